"""Write a compressed model as a checkpoint that other runtimes load: a configuration is half a result.

    python export.py --model_name_or_path meta-llama/Meta-Llama-3-8B --drop_config layer_drop_config.txt --save_dir out
    python export.py --model_name_or_path meta-llama/Meta-Llama-3-8B --quant_weights_path db --quant_config_path \\
        evo-kl-configuration-3.txt --fuse promote --save_dir out

Dropped sub-blocks become fewer blocks; sparse weights are zeros in place; quantized weights are the database's integers
in compressed-tensors' format (transformers, vLLM), a GGUF file (llama.cpp), MLX's (mlx-lm), or dequantized (--format
dense).
"""
import argparse
import json
import os
import re
import shlex
import shutil
import sys
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path

import torch
from torch import nn
from transformers.core_model_loading import revert_weight_conversion

from database.exported import check_experts, layer_bytes
from database.levels import add_configuration_flags, check_configuration_flags, load_configuration, open_configuration
from database.store import Database
from formats import compressed_tensors, mlx
from formats.compressed_tensors import Quantized, Scheme
from formats.gguf import check_gguf, write_gguf
from formats.kquants import Blocks
from formats.regroup import Regrouped, regroup
from formats.towers import copy_processors, is_wrapped, text_class, with_tower, without_tower
from utils.configs import drop_words, read_drop_config
from utils.decoder import Decoder
from utils.errors import RunError, user_errors
from utils.experts import ExpertLayer
from utils.files import check_writable, lock, write_atomic
from utils.model import DTYPES, check_unpacked, dtype_in, load_config, load_decoder, load_tokenizer, save_pretrained
from utils.report import evaluation_rows, format_table

MARK = "export.json"             # in every finished export: --overwrite replaces nothing else


def parse_arguments(argv: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    model = parser.add_argument_group("model")
    model.add_argument("--model_name_or_path", required=True, metavar="NAME",
                       help="hub name or folder of a causal language model, e.g. meta-llama/Meta-Llama-3-8B")
    model.add_argument("--tokenizer_name", metavar="NAME", help="tokenizer, if not the model's own")
    model.add_argument("--dtype", default="auto", choices=["auto", *DTYPES],
                       help="of weights that are not quantized; auto: the checkpoint's own (default: auto)")
    model.add_argument("--device", help="cpu, cuda or cuda:N (default: the first GPU, else the CPU)")
    model.add_argument("--trust_remote_code", action="store_true", help="run Python code that comes with the model")
    add_configuration_flags(parser)
    output = parser.add_argument_group("output")
    output.add_argument("--save_dir", required=True, metavar="FOLDER", help="a new folder for the exported model")
    output.add_argument("--overwrite", action="store_true", help="replace an export that is there already")
    output.add_argument("--format", default="auto", choices=["auto", "dense", "compressed-tensors", "gguf",
                                                                       *mlx.SCALES],
                        help="auto: compressed-tensors for a quantized model, else dense; mlx-float16 takes less space "
                             "than mlx, but rounds (default: auto)")
    output.add_argument("--fuse", default="none", choices=["none", "promote"],
                        help="compressed-tensors: pack q/k/v and gate/up in the widest bitwidth among them, as vLLM "
                             "needs, without changing a weight (default: none)")
    output.add_argument("--pack_bits", type=int, nargs="+", default=range(1, 9), metavar="BITS",
                        help="compressed-tensors: the widths that the runtime takes, such as 4 for vLLM on a CPU; "
                             "every layer is packed in the narrowest that holds it, without changing a weight "
                             "(default: its own)")
    output.add_argument("--tensor_types", metavar="FILE",
                        help="of --format gguf: also write there which type each layer has, as llama-quantize "
                             "--tensor-type-file reads it")
    output.add_argument("--text_only", action="store_true",
                        help="of a model that takes images or sound, export the text model alone (default: all of it)")
    output.add_argument("--max_shard_size", default="5GB", metavar="SIZE",
                        help="of a safetensors file, e.g. 500MB (default: 5GB)")
    output.add_argument("--evaluation", metavar="FILE",
                        help="JSON that eval_config.py --output wrote, for the model card (default: the summary.json "
                             "beside the configuration, if it is of that configuration)")
    return parser.parse_args(argv)


@user_errors(RunError)
def main(argv: list[str] | None = None) -> dict:
    """Export what the flags name; returns what export.json holds."""
    args = parse_arguments(argv)
    command = shlex.join(["python", "export.py", *(sys.argv[1:] if argv is None else argv)])
    with user_errors():
        config = load_config(args.model_name_or_path, args.trust_remote_code)
        check_flags(args, config)
        evaluation = read_evaluation(args)
        opened = open_configuration(args)
        tokenizer = load_tokenizer(args.tokenizer_name or args.model_name_or_path,
                                   trust_remote_code=args.trust_remote_code)
        if args.format == "gguf":
            check_gguf(config, tokenizer)
        if args.format in mlx.SCALES:
            mlx.check_model(config)
        if opened and opened[0].method == "gptq" and args.format not in ("dense", "gguf"):
            for name, level in opened[1].items():
                layer_bytes(opened[0], name, level, args.format)
        dtype = args.dtype if args.dtype != "auto" else str(dtype_in(config) or torch.float32).removeprefix("torch.")
        decoder = load_decoder(args.model_name_or_path, dtype, args.device, trust_remote_code=args.trust_remote_code)
        check_unpacked(decoder.model, "--model_name_or_path", args.model_name_or_path)
        if args.format == "compressed-tensors":
            check_experts(decoder, opened[0])
        dense = count(decoder.model)
        set_block, candidate = load_configuration(args, decoder)
        for index, state in enumerate(candidate):
            set_block(index, state)                  # from here on, decoder.model is the model that was searched
        dropped = [drop for drop, _ in candidate[:len(decoder.blocks)]]
        regrouped = regroup(decoder, dropped)
        searched = count(regrouped.model)
        regrouped = (without_tower(regrouped) if args.text_only else
                     with_tower(regrouped, args.model_name_or_path, config))
        exported = count(regrouped.model)
        dense = {key: dense[key] + max(0, exported[key] - searched[key]) for key in dense}       # the tower
        experts = expert_layers(decoder, regrouped)
        quantized, schemes = {}, {}
        if args.quant_config_path and args.format != "dense":
            quantized = quantized_layers(regrouped, experts, *opened)
            if args.format == "compressed-tensors":
                compressed_tensors.check_loadable(regrouped.model, list(quantized))
                schemes = compressed_tensors.choose_schemes(quantized, args.fuse == "promote", experts, args.pack_bits)
    check_room(args.save_dir, regrouped.model, quantized, experts)
    with finished_or_nothing(args.save_dir, args.overwrite) as folder:
        if args.format == "gguf":
            report = write_gguf(folder / "model.gguf", regrouped.model, tokenizer, quantized)
        elif args.format in mlx.SCALES:
            report = mlx.write_mlx(folder, regrouped.model, tokenizer, quantized, args.max_shard_size, args.format)
        else:
            report = write_checkpoint(folder, regrouped.model, tokenizer, quantized, schemes,
                                      {name: parameter for name, (parameter, _) in experts.items()},
                                      args.max_shard_size, is_wrapped(config))
        copy_processors(args.model_name_or_path, folder, regrouped.model.config)
        report = {"format": args.format, "model": args.model_name_or_path, "command": command,
                  "blocks": {"dense": len(decoder.blocks), "exported": len(regrouped.pairs)},
                  "parameters": {"dense": dense["parameters"], "exported": exported["parameters"]},
                  "bytes": {"dense": dense["bytes"], "exported": weight_bytes(folder)},
                  "zeros": sum(int((weight == 0).sum()) for weight in regrouped.model.parameters()), **report}
        lines = describe(report, dropped, regrouped)
        write_atomic(folder / "README.md", model_card(report, lines, evaluation))
        write_atomic(folder / MARK, json.dumps(report, indent=2) + "\n")
    if args.tensor_types:
        write_atomic(args.tensor_types, "".join(f"^{re.escape(name)}$={kind.lower()}\n"
                                                for name, kind in report["tensor_types"].items()))
    print("\n".join(lines))
    print(f"saved: {args.save_dir}")
    return report


# ---- before the model is loaded --------------------------------------------------------------------------------------


def check_flags(args: argparse.Namespace, config) -> None:
    """Raise ValueError for what can be known to fail before the model is loaded. Resolves --format auto."""
    if args.format == "auto":
        args.format = "compressed-tensors" if args.quant_config_path else "dense"
    if not (args.drop_config or args.sparse_config_path or args.quant_config_path):
        raise ValueError("--drop_config, --sparse_config_path, --quant_config_path: nothing to export; give a "
                         "configuration")
    check_configuration_flags(args, config)
    if args.format in ("compressed-tensors", *mlx.SCALES) and not args.quant_config_path:
        raise ValueError(f"--format {args.format}: holds quantized weights; give --quant_weights_path and "
                         f"--quant_config_path, or use --format dense")
    if args.fuse == "promote" and args.format != "compressed-tensors":
        raise ValueError(f"--fuse promote: is for --format compressed-tensors, not {args.format}; leave it out")
    if args.pack_bits != range(1, 9):
        if args.format != "compressed-tensors":
            raise ValueError(f"--pack_bits {args.pack_bits[0]}: is for --format compressed-tensors, not {args.format}; "
                             f"leave it out")
        if wrong := [bits for bits in args.pack_bits if not 2 <= bits <= 8]:
            raise ValueError(f"--pack_bits {wrong[0]}: the format packs 2 to 8 bits")
    if args.tensor_types and (args.format != "gguf" or not args.quant_config_path):
        raise ValueError(f"--tensor_types {args.tensor_types}: says how --format gguf stores quantized layers; give "
                         f"that with --quant_config_path, or leave it out")
    if args.tensor_types:
        check_writable(Path(args.tensor_types).absolute().parent, "--tensor_types")
    if not re.fullmatch(r"[1-9]\d*[KMGT]B", args.max_shard_size):
        raise ValueError(f"--max_shard_size {args.max_shard_size}: not a size; write it like 500MB or 5GB")
    folder = Path(args.save_dir)
    if replaces(folder, args.overwrite):
        if not (folder / MARK).is_file():
            raise ValueError(f"--save_dir {folder}: --overwrite replaces only finished exports, and there is no {MARK} "
                             f"in it; name another folder")
        inside = [path for path in (args.model_name_or_path, args.drop_config, args.quant_weights_path,
                                    args.sparse_weights_path, args.quant_config_path, args.sparse_config_path)
                  if path and Path(path).exists() and Path(path).resolve().is_relative_to(folder.resolve())]
        if inside:
            raise ValueError(f"--save_dir {folder}: replacing it would delete {inside[0]}, which this export reads; "
                             f"name another folder")
    check_writable(folder.absolute().parent, "--save_dir")
    if args.text_only and not is_wrapped(config):
        raise ValueError(f"--text_only: {config.model_type} models have nothing but text; leave it out")
    if args.text_only and text_class(config) is None:
        raise ValueError(f"--text_only: transformers has no class for the text model of {config.model_type}; leave it "
                         f"out")


def replaces(folder: Path, overwrite: bool) -> bool:
    """Whether there is something in its place. Raises ValueError where that may not be replaced."""
    found = folder.exists() and (not folder.is_dir() or any(folder.iterdir()))
    if found and not overwrite:
        raise ValueError(f"--save_dir {folder}: is there already; add --overwrite to replace it, or name another")
    return found


def read_evaluation(args: argparse.Namespace) -> dict | None:
    """{who: {dataset: {"ppl", "kl"}}} for the model card; None where nothing was measured."""
    if args.evaluation:
        try:
            evaluation = json.loads(Path(args.evaluation).read_text(encoding="utf-8"))
            evaluation = {who: evaluation[who] for who in ("dense", "compressed") if who in evaluation}
            if not evaluation:
                raise ValueError("there is neither dense nor compressed in it")
            evaluation_rows(evaluation)
        except (OSError, ValueError, AttributeError, TypeError) as error:
            raise ValueError(f"--evaluation {args.evaluation}: not the JSON that eval_config.py --output writes "
                             f"({error}); give that, or leave it out") from error
        return evaluation
    files = [file for file in (args.drop_config, args.sparse_config_path, args.quant_config_path) if file]
    beside = Path(files[0]).parent / "summary.json"
    if len(files) > 1 or not Path(files[0]).is_file() or not beside.is_file():
        return None                                  # a summary says nothing about two configurations together
    try:
        summary = json.loads(beside.read_text(encoding="utf-8"))
        if args.drop_config:
            same = summary["dropped"] == " ".join(drop_words(read_drop_config(args.drop_config)))
        else:
            database, levels = open_configuration(args)      # not one that finish.py has made of the searched one
            same = (summary["database_sha256"], summary["levels"]) == (database.sha256, levels)
        return summary["evaluation"] or None if same else None
    except (ValueError, KeyError, TypeError):
        return None


# ---- writing ---------------------------------------------------------------------------------------------------------


@contextmanager
def finished_or_nothing(save_dir: str, overwrite: bool) -> Iterator[Path]:
    """A folder beside `save_dir` that takes its name, and the place of what is there, once all of it is written. Ends
    the program where another process writes there, or has in the meantime."""
    target = Path(save_dir).absolute()
    partial, replaced = (target.with_name(f".{target.name}.{suffix}") for suffix in ("partial", "replaced"))

    def put_back() -> None:                          # what was to be replaced, when that failed half-way
        if replaced.exists() and not target.exists():
            os.replace(replaced, target)

    with user_errors():
        partial.mkdir(exist_ok=True)
        lock(partial, "--save_dir")
        put_back()                                   # of an export that was killed
        replaces(target, overwrite)
    for path in partial.iterdir():                   # what that one had written
        shutil.rmtree(path) if path.is_dir() else path.unlink()
    try:
        yield partial
        shutil.rmtree(replaced, ignore_errors=True)
        if target.exists():
            os.replace(target, replaced)
        os.replace(partial, target)
        shutil.rmtree(replaced, ignore_errors=True)
    except BaseException:
        put_back()
        shutil.rmtree(partial, ignore_errors=True)
        raise


def check_room(save_dir: str, model: nn.Module, quantized: Mapping[str, Quantized],
               experts: Mapping[str, tuple[str, str]]) -> None:
    """Raises RunError where the disk has less room than the weights take at least, before anything is written. experts:
    see `expert_layers`."""
    packed = {id(model.get_parameter(experts[name][0] if name in experts else f"{name}.weight")) for name in quantized}
    needed = sum(parameter.nbytes for parameter in model.parameters() if id(parameter) not in packed)
    needed += sum(layer.data.nbytes if isinstance(layer, Blocks) else
                  layer.codes.numel() * layer.bits // 8 + layer.scales.nbytes for layer in quantized.values())
    free = shutil.disk_usage(Path(save_dir).absolute().parent).free
    if free < needed:
        raise RunError(f"--save_dir {save_dir}: needs {needed / 1e9:.2f} GB at least, but its disk has only "
                       f"{free / 1e9:.2f} left; make room, or name a folder on another")


def expert_layers(decoder: Decoder, regrouped: Regrouped) -> dict[str, tuple[str, str]]:
    """Name of every expert's matrix in the new model -> (name of the parameter that has it, name of the matrix in the
    original one)."""
    def places(of: Decoder) -> dict[str, tuple]:
        names = {parameter: name for name, parameter in of.model.named_parameters()}
        return {name: (names[layer.parameter], layer.expert, layer.outputs.start) for name, layer in of.layers.items()
                if isinstance(layer, ExpertLayer)}

    originals = {place: name for name, place in places(decoder).items()}
    if not originals:
        return {}
    new = decoder if regrouped.model is decoder.model else Decoder(regrouped.model)
    return {name: (parameter, originals[regrouped.sources[parameter], *place])
            for name, (parameter, *place) in places(new).items()}


def quantized_layers(regrouped: Regrouped, experts: Mapping[str, tuple[str, str]], database: Database,
                     levels: Mapping[str, float]) -> dict[str, Quantized | Blocks]:
    """Codes of the model's quantized layers, by their names in the new model; zeroed ones are quantized zeros. experts:
    see `expert_layers`."""
    layers = {}
    linear = {name: regrouped.sources.get(f"{name}.weight", name).removesuffix(".weight")
              for name, module in regrouped.model.named_modules()                # with those of a tower
              if isinstance(module, (nn.Linear, nn.Embedding))}
    for name, source in (linear | {name: source for name, (_, source) in experts.items()}).items():
        if source not in levels:
            continue
        level = levels[source]
        zeroed = (f"{name}.weight" if name in linear else experts[name][0]) in regrouped.zeroed
        if kind := database.type(source, level):
            blocks = database.packed(source, level)["blocks"]
            layers[name] = Blocks(kind, torch.zeros_like(blocks) if zeroed else blocks)
        elif zeroed:
            layers[name] = compressed_tensors.zero_layer(database.shape(source))
        else:
            layers[name] = Quantized(*database.codes(source, level), level, database.group_size(source, level))
    return layers


def write_checkpoint(folder: Path, model: nn.Module, tokenizer, quantized: Mapping[str, Quantized],
                     schemes: Mapping[str, Scheme], experts: Mapping[str, str], max_shard_size: str,
                     wrapped: bool = False) -> dict:
    """Write the files that `from_pretrained` reads; returns what to report of the quantized layers. experts: name of an
    expert's matrix -> the parameter that has it; `wrapped`: the checkpoint has a tower."""
    options = {"max_shard_size": max_shard_size}
    if wrapped or renamed(model, set(quantized) - set(experts)):
        options["save_original_format"] = False      # names are those of its class, which quantization_config has, too
    if not quantized:
        save_pretrained(model, tokenizer, folder, **options)
        return {}
    linear = linear_layers(model)
    state, stored = model.state_dict(), 0
    for name, layer in quantized.items():
        if name in experts:                          # which transformers unpacks in the dtype of the scales
            layer = layer._replace(scales=layer.scales.float())
        packed = compressed_tensors.pack(name, layer, schemes[name])
        stored += sum(tensor.nbytes for tensor in packed.values())
        state.pop(experts.get(name, f"{name}.weight"), None)
        state.update(packed)
    routers = [name for name, module in model.named_modules() if experts and not isinstance(module, (nn.Linear,
               nn.Embedding)) and getattr(module, "weight", torch.empty(0)).dim() == 2]      # linear layers in vLLM
    model.config.quantization_config = compressed_tensors.quantization_config(
        schemes, [name for name in linear if name not in schemes] + routers, experts)
    save_pretrained(model, tokenizer, folder, state_dict=state, **options)
    uneven = compressed_tensors.unevenly_packed(linear, schemes)
    odd = [name for name, layer in quantized.items() if layer.codes.shape[0] % 32]
    notes = [f"vLLM's kernels take output sizes that are multiples of 32; {len(odd)} quantized layers (first {odd[0]}) "
             f"are not."] if odd else []
    notes.append("Written for compressed-tensors 0.18 and read back with transformers 5.20. transformers 5.23 does not "
                 "load layers of different bitwidths, or gives all of them the first one's.")
    if not all(torch.equal(layer.scales, layer.scales.to(model.dtype).to(layer.scales.dtype))
               for layer in quantized.values()):
        kinds = sorted({str(layer.scales.dtype).removeprefix("torch.") for layer in quantized.values()})
        exact = "float32" if len(kinds) > 1 or kinds == ["float32"] else f"{kinds[0]} or float32"
        here = str(model.dtype).removeprefix("torch.")
        notes.append(f"Scales are {' and '.join(kinds)}, and loading in {here}, this file's default, rounds them; load "
                     f"it in {exact}, or export with that --dtype, for the weights to the bit.")
    return {"vllm_fused_rule": not uneven, "unevenly_packed": uneven, "notes": notes,
            **compressed_tensors.bits_a_weight(quantized.values(), stored)}


def renamed(model: nn.Module, names: Iterable[str]) -> bool:
    """Whether checkpoints of the model call any of these layers otherwise. transformers leaves a packed layer's scales
    that it renames in their dtype, which the model has to be in, then."""
    weights = {f"{name}.weight": torch.empty(0) for name in names}
    return revert_weight_conversion(model, dict(weights)).keys() != weights.keys()


def linear_layers(model: nn.Module) -> list[str]:
    return [name for name, module in model.named_modules() if isinstance(module, nn.Linear)]


# ---- sizes and the model card ----------------------------------------------------------------------------------------


def count(model: nn.Module) -> dict[str, int]:
    """Parameters, tied ones once, and their bytes."""
    parameters = list(model.parameters())
    return {"parameters": sum(p.numel() for p in parameters), "bytes": sum(p.nbytes for p in parameters)}


def weight_bytes(folder: Path) -> int:
    return sum(file.stat().st_size for file in folder.iterdir() if file.suffix in (".safetensors", ".gguf"))


def describe(report: dict, dropped: list[tuple[bool, bool]], regrouped: Regrouped) -> list[str]:
    """What the export is, in lines of Markdown."""
    sides = ("dense", "exported")
    rows = [["", *sides],
            ["bytes on disk", *(f"{report['bytes'][side]:,}" for side in sides)],
            ["parameters", *(f"{report['parameters'][side]:,}" for side in sides)],
            ["blocks", *(str(report["blocks"][side]) for side in sides)],
            ["bits a parameter, all files",
             *(8 * report["bytes"][side] / report["parameters"][side] for side in sides)]]
    before, after = (report["parameters"][side] for side in sides)
    lines = [f"{before - after:,} of {before:,} parameters removed ({1 - after / before:.2%})."]
    if "bits_a_weight" in report:
        bits = report["bits_a_weight"]
        lines.append(f"Quantized layers: {bits['codes']:.3f} bits a weight as searched, {bits['stored']:.3f} as "
                     f"stored, with scales and zeros.")
    else:
        lines.append(f"{report['zeros']:,} of the parameters that are left are zero ({report['zeros'] / after:.2%}).")
    if any(map(any, dropped)):
        halves = sum(half is None for pair in regrouped.pairs for half in pair)
        lines.append(f"Dropped: {sum(attn for attn, _ in dropped)} attentions and {sum(mlp for _, mlp in dropped)} "
                     f"MLPs; {halves} unpaired halves are zeros.")
    if "vllm_fused_rule" in report:
        uneven = report["unevenly_packed"]
        lines.append("vLLM's rule that fused layers (q/k/v, gate/up) share their packing holds." if not uneven else
                     f"vLLM's rule that fused layers share their packing does not hold for {len(uneven)} sets of "
                     f"layers (first {', '.join(uneven[0])}), so vLLM cannot load this; --fuse promote makes it hold "
                     f"where all of them are quantized.")
    return [format_table(rows), "", *lines, *report.get("notes", ())]


def model_card(report: dict, lines: list[str], evaluation: dict | None) -> str:
    """README.md: what was measured and the command that made it; says so where nothing was measured."""
    measured = format_table(evaluation_rows(evaluation)) if evaluation else (
        "Not measured: no --evaluation was given, and no summary.json of this configuration and database is beside it.")
    tag = "" if os.path.exists(report["model"]) else f"base_model: {report['model']}\n"
    return (f"---\n{tag}tags:\n- evopress\n---\n"
            f"# {Path(report['model']).name}, compressed\n\n"
            f"Made by EvoPress (arXiv 2410.14649) with\n\n```\n{report['command']}\n```\n\n"
            f"## Quality\nPerplexity, and KL divergence from the uncompressed model in nats a token.\n\n{measured}\n\n"
            f"## Size\n" + "\n".join(lines) + "\n")


if __name__ == "__main__":
    main()
