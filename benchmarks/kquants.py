"""K-quants of real layers: GPTQ on the grid against llama.cpp's own quantizer, with and without an importance matrix.

    PYTHONPATH=.venv/runtimes python benchmarks/kquants.py --model_name_or_path MODEL --blocks 4
    PYTHONPATH=.venv/runtimes python benchmarks/kquants.py --model_name_or_path MODEL --whole_model

Of the layers in the first blocks whose rows 256 divides: the relative output error ‖(W−Ŵ)X‖²/‖WX‖² on calibration text
and on held-out text, their mean. llama.cpp's quantizer is the one in the binding of requirements-gguf.txt
(`ggml_quantize_chunk`); its importance matrix is the mean square of every input on the calibration text.

With --whole_model the divergence of the whole model on held-out text instead, its blocks in one type, in the mixes that
llama.cpp calls Q2_K and Q3_K_M, and in what a search finds at the same bits and at --bits; each allocation by all three
quantizers. Embeddings and head stay as they are.
"""
import argparse
import ctypes
import importlib.util
import math
import sys
from pathlib import Path

import torch
from torch import nn

ROOT = Path(__file__).resolve().parents[1]
sys.path[0] = str(ROOT)
import evo_quant
from benchmarks.programs import claim, write_readme
from database import gptq
from database.kquant import quantize
from database.store import Database
from formats.kquants import TYPES, block_bytes, dequantize, fitting, level_of
from utils.data import calibration_documents, evaluation_documents
from utils.fitness import Fitness
from utils.model import load_decoder, load_tokenizer
from utils.report import format_table

KINDS = ["Q2_K", "Q3_K", "Q4_K", "Q5_K", "Q6_K"]
WAYS = ["llama.cpp", "llama.cpp, imatrix", "ours, rounded", "ours, GPTQ"]
MIXES = ("Q2_K", "Q3_K_M")
SEARCH = """--group_rule none --init measured --initial_tokens 512 --generations 5 --offspring 8
    --survivors_per_selection 2 1 --tokens_per_selection 512 2048 --no_eval""".split()


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model_name_or_path", required=True)
    parser.add_argument("--blocks", type=int, default=4, help="of the model, from the first on (default: 4)")
    parser.add_argument("--data", default="stdlib", help="calibration and held-out text (default: stdlib)")
    parser.add_argument("--tokens", type=int, default=16384, help="of either (default: 16384)")
    parser.add_argument("--sequence_length", type=int, default=256)
    parser.add_argument("--whole_model", action="store_true", help="measure the model's divergence, not layers' errors")
    parser.add_argument("--bits", type=float, nargs="+", default=[3, 3.4375], help="searched besides the mixes' bits")
    parser.add_argument("--out", type=Path, default=Path("results/kquants"), help="of --whole_model")
    parser.add_argument("--write_readme", nargs="?", const="kquants", metavar="NAME",
                        help="put the table between the <!-- NAME --> marks of benchmarks/README.md (default: kquants)")
    return parser.parse_args()


@torch.no_grad()
def second_moments(decoder, layers: dict[str, nn.Linear], documents: list[torch.Tensor], blocks: int
                   ) -> dict[str, torch.Tensor]:
    """Layer -> sum of the outer products of its inputs, float32 [in, in], from running the first blocks alone."""
    moments = {name: torch.zeros(layer.in_features, layer.in_features) for name, layer in layers.items()}

    def hook(name: str):
        def add(_, args):
            inputs = args[0].flatten(0, -2).float()
            moments[name].addmm_(inputs.T, inputs)
        return add

    hooks = [layer.register_forward_pre_hook(hook(name)) for name, layer in layers.items()]
    for document in documents:
        inputs = decoder.block_inputs(document[None])
        states = inputs.hidden_states
        for index in range(blocks):
            states = decoder.run_block(index, states, inputs)
    for hook in hooks:
        hook.remove()
    return moments


def by_llama_cpp(kind: str, weight: torch.Tensor, importance: torch.Tensor | None = None) -> torch.Tensor:
    """The layer as llama.cpp quantizes it, float32 [out, in]; importance: of every column."""
    import gguf
    [library] = Path(importlib.util.find_spec("xllamacpp").origin).parent.glob("*.so")
    function = ctypes.CDLL(str(library)).ggml_quantize_chunk
    function.restype = ctypes.c_size_t
    function.argtypes = [ctypes.c_int, ctypes.c_void_p, ctypes.c_void_p, *[ctypes.c_int64] * 3, ctypes.c_void_p]
    rows, columns = weight.shape
    weight, importance = weight.contiguous(), None if importance is None else importance.contiguous()
    data = torch.zeros(rows, columns // TYPES[kind].block * block_bytes(kind), dtype=torch.uint8)
    function(int(gguf.GGMLQuantizationType[kind]), weight.data_ptr(), data.data_ptr(), 0, rows, columns,
             None if importance is None else importance.data_ptr())
    return dequantize(kind, data)


def error(weight: torch.Tensor, level: torch.Tensor, moment: torch.Tensor) -> float:
    delta = level - weight
    return float(((delta @ moment) * delta).sum() / ((weight @ moment) * weight).sum())


def layer_errors(args: argparse.Namespace, decoder, texts: list[list[torch.Tensor]]) -> list[list]:
    """A row for every type: mean relative output errors by every quantizer, on both texts."""
    layers = {name: layer for block in decoder.blocks[:args.blocks] for name, layer in block.layers.items()
              if layer.in_features % 256 == 0}
    if not layers:
        raise SystemExit(f"--model_name_or_path {args.model_name_or_path}: 256 divides the rows of no layer")
    moments = [second_moments(decoder, layers, documents, args.blocks) for documents in texts]
    sums = {(kind, way): [0.0, 0.0] for kind in KINDS for way in WAYS}
    for name, layer in layers.items():
        weight, ours = layer.weight.detach().float(), moments[0][name]
        columns = torch.eye(len(ours)) * ours.diagonal()
        swept, rounded = (quantize(weight, hessian.clone(), KINDS)[0] for hessian in (ours, columns))
        for i, kind in enumerate(KINDS):
            found = [by_llama_cpp(kind, weight), by_llama_cpp(kind, weight, ours.diagonal() / args.tokens),
                     dequantize(kind, rounded[i]), dequantize(kind, swept[i])]
            for way, level in zip(WAYS, found, strict=True):
                for side, moment in enumerate(moments):
                    sums[kind, way][side] += error(weight, level, moment[name]) / len(layers)
        print(f"{name}: done", flush=True)
    return [["bits", "type", *[f"{way}{side}" for way in WAYS for side in ("", " (held out)")]]] + [
        [str(level_of(kind)), kind, *[f"{value:.3g}" for way in WAYS for value in sums[kind, way]]] for kind in KINDS]


# ---- whole models ----------------------------------------------------------------------------------------------------


def llama_cpp_mix(mix: str, name: str, block: int, config) -> str:
    """The type that llama-quantize gives a Llama's layer in a mix (llama_tensor_get_type)."""
    layer, wide = name.rpartition(".")[2], config.num_attention_heads >= 4 * config.num_key_value_heads
    if mix == "Q2_K":
        return {"v_proj": "Q4_K" if wide else "Q3_K", "o_proj": "Q3_K", "down_proj": "Q3_K"}.get(layer, "Q2_K")
    return {"v_proj": "Q5_K" if block < 2 else "Q4_K", "o_proj": "Q4_K",
            "down_proj": "Q5_K" if block < config.num_hidden_layers // 16 else "Q4_K"}.get(layer, "Q3_K")


def whole_model(args: argparse.Namespace, decoder, texts: list[list[torch.Tensor]]) -> list[list]:
    """A row for every allocation of types: its name, bits a weight, divergence by every quantizer in nats a token."""
    folder, text = str(args.out / "levels"), [
        "--model_name_or_path", args.model_name_or_path, "--calibration_data", args.data,
        "--calibration_sequence_length", str(args.sequence_length), "--calibration_tokens", str(args.tokens)]
    gptq.main(gptq.make_parser().parse_args([*text, "--grid", "k-quant", "--bitwidth_options", *"23456", "--save_dir",
                                             folder]))
    database, blocks = Database.open(folder), {name: block for block in decoder.blocks for name in block.layers}

    def fit(kinds: dict[str, str]) -> dict[str, str]:
        return {name: fitting(kind, database.shape(name)[1]) for name, kind in kinds.items()}

    def bits(kinds: dict[str, str]) -> float:
        counted = sum(math.prod(database.shape(name)) for name in kinds)
        return sum(database.bits(name, level_of(kind)) for name, kind in kinds.items()) / counted

    found = {f"all {kind}": fit(dict.fromkeys(database.layers, kind)) for kind in ("Q2_K", "Q3_K")}
    found |= {f"llama.cpp's {mix}": fit({name: llama_cpp_mix(mix, name, blocks[name].index, decoder.config)
                                         for name in database.layers}) for mix in MIXES}
    for target in sorted({*args.bits, *(math.ceil(1e6 * bits(found[f"llama.cpp's {mix}"])) / 1e6 for mix in MIXES)}):
        levels = evo_quant.main([*text, *SEARCH, "--quant_weights_path", folder, "--target_bitwidth", str(target),
                                 "--output_dir", str(args.out / f"search-{target}")])["levels"]
        found[f"search to {target:.5g}"] = {name: database.type(name, level) for name, level in levels.items()}

    moments = second_moments(decoder, decoder.layers, texts[0], len(decoder.blocks))
    dense = {name: layer.weight.detach().clone() for name, layer in decoder.layers.items()}
    weights = {"llama.cpp": lambda name, kind: by_llama_cpp(kind, dense[name]),
               "llama.cpp, imatrix": lambda name, kind: by_llama_cpp(kind, dense[name],
                                                                     moments[name].diagonal() / args.tokens),
               "ours, GPTQ": lambda name, kind: database.weight(name, level_of(kind))}

    def set_block(index: int, state: tuple[str, str]) -> None:
        way, allocation = state
        for name, layer in decoder.blocks[index].layers.items():
            layer.weight.data.copy_(weights[way](name, found[allocation][name]))

    fitness = Fitness(decoder, texts[1], set_block)
    rows = [["blocks' types", "bits a weight", *weights]]
    for allocation in sorted(found, key=lambda allocation: bits(found[allocation])):
        states = [((way, allocation),) * len(decoder.blocks) for way in weights]
        rows.append([allocation, f"{bits(found[allocation]):.4f}", *(kl for kl, in fitness.measure(states))])
    return rows


def main() -> None:
    args = parse_arguments()
    torch.set_num_threads(1)
    tokenizer = load_tokenizer(args.model_name_or_path)
    decoder = load_decoder(args.model_name_or_path, "float32", "cpu")
    length = args.sequence_length
    texts = [calibration_documents(args.data, tokenizer, args.tokens, length, seed=0),
             evaluation_documents(args.data, tokenizer, args.tokens, length)]
    if args.whole_model:
        claim(args.out, args, ("model_name_or_path", "data", "tokens", "sequence_length"))
    table = format_table((whole_model if args.whole_model else layer_errors)(args, decoder, texts))
    print(table)
    if args.write_readme:
        write_readme(args.write_readme, table)


if __name__ == "__main__":
    main()
