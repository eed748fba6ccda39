"""K-quants of real layers: GPTQ on the grid against llama.cpp's own quantizer, with and without an importance matrix.

    PYTHONPATH=.venv/runtimes python benchmarks/kquants.py --model_name_or_path MODEL --blocks 4

Of the layers in the first blocks whose rows 256 divides: the relative output error ‖(W−Ŵ)X‖²/‖WX‖² on calibration text
and on held-out text, their mean. llama.cpp's quantizer is the one in the binding of requirements-gguf.txt
(`ggml_quantize_chunk`); its importance matrix is the mean square of every input on the calibration text.
"""
import argparse
import ctypes
import importlib.util
import sys
from pathlib import Path

import torch
from torch import nn

ROOT = Path(__file__).resolve().parents[1]
sys.path[0] = str(ROOT)
from benchmarks.programs import write_readme
from database.kquant import quantize
from formats.kquants import TYPES, block_bytes, dequantize, level_of
from utils.data import calibration_documents, evaluation_documents
from utils.model import load_decoder, load_tokenizer
from utils.report import format_table

KINDS = ["Q2_K", "Q3_K", "Q4_K", "Q5_K", "Q6_K"]
WAYS = ["llama.cpp", "llama.cpp, imatrix", "ours, rounded", "ours, GPTQ"]


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model_name_or_path", required=True)
    parser.add_argument("--blocks", type=int, default=4, help="of the model, from the first on (default: 4)")
    parser.add_argument("--data", default="stdlib", help="calibration and held-out text (default: stdlib)")
    parser.add_argument("--tokens", type=int, default=16384, help="of either (default: 16384)")
    parser.add_argument("--sequence_length", type=int, default=256)
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


def main() -> None:
    args = parse_arguments()
    torch.set_num_threads(1)
    tokenizer = load_tokenizer(args.model_name_or_path)
    decoder = load_decoder(args.model_name_or_path, "float32", "cpu")
    layers = {name: layer for block in decoder.blocks[:args.blocks] for name, layer in block.layers.items()
              if layer.in_features % 256 == 0}
    if not layers:
        raise SystemExit(f"--model_name_or_path {args.model_name_or_path}: 256 divides the rows of no layer")
    length = args.sequence_length
    texts = [calibration_documents(args.data, tokenizer, args.tokens, length, seed=0),
             evaluation_documents(args.data, tokenizer, args.tokens, length)]
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
    table = format_table([["bits", "type", *[f"{way}{side}" for way in WAYS for side in ("", " (held out)")]]] + [
        [str(level_of(kind)), kind, *[f"{value:.3g}" for way in WAYS for value in sums[kind, way]]] for kind in KINDS])
    print(table)
    if args.write_readme:
        write_readme(args.write_readme, table)


if __name__ == "__main__":
    main()
