"""What all database builds share: flags, checks, and the loop over blocks that can be killed and resumed anywhere."""
import argparse
import hashlib
import json
import re
import time
from collections import Counter
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from datetime import timedelta
from pathlib import Path

import torch
from torch import nn

from database import store
from database.hessian import Calibration
from utils import distributed
from utils.data import documents_sha256, sequence_length
from utils.decoder import Decoder
from utils.experts import ExpertLayer, Layer
from utils.files import check_writable, lock
from utils.fitness import out_of_memory
from utils.flags import add_calibration_flags, add_model_flags, check_calibration_flags
from utils.inputs import decoder_of, documents_of, tokenizer_of
from utils.model import check_unpacked, default_device, load_config, weights_fingerprint
from utils.runs import open_wandb

# what decides where and how a build runs or what it is called, but not what is built
NOT_COMPARED = ("model_name_or_path", "tokenizer_name", "use_fast_tokenizer", "device", "trust_remote_code", "save_dir",
                "cpu_offload_modules", "cpu_offload_activations", "activations_dir", "verbose", "low_cpu_mem_usage",
                "pre_block_modules", "block_modules", "post_block_modules", "log_wandb", "text_field")

# threads that write layers: on a GPU solving takes no time beside copying, hashing and writing
WRITERS = {"cuda": 3}


def add_build_flags(parser: argparse.ArgumentParser, layers_flag: str, solves: bool = True) -> None:
    """`solves`: the build compresses layers itself."""
    add_model_flags(parser, offload=True)
    add_calibration_flags(parser, tokens=8388608)
    group = parser.add_argument_group("build")
    group.add_argument("--save_dir", type=Path, required=True, metavar="DIR",
                       help="of the database: manifest.json and a file a layer; run again to resume a killed build")
    group.add_argument(layers_flag, metavar="REGEX", help="layers to compress, by full name, e.g. "
                       "'.*layers.*((q|k|v|o|gate|up|down)_proj)$' (default: every linear layer of the blocks, "
                       "experts' matrices among them)")
    if solves:
        group.add_argument("--rel_damp", type=float, default=1e-2, metavar="SHARE",
                           help="added to the Hessian's diagonal, as a share of its mean (default: 0.01)")
        group.add_argument("--block_size", type=int, default=128, metavar="COLUMNS",
                           help="compressed before the columns after them are updated (default: 128)")
    group.add_argument("--seed", type=int, default=0, help="of the choice of documents (default: 0)")
    group.add_argument("--cpu_offload_activations", action="store_true",
                       help="keep only the working microbatch's hidden states on the device, as is done anyway where "
                            "they would take more than half of what is free there")
    group.add_argument("--activations_dir", type=Path, metavar="DIR",
                       help="keep the other microbatches' hidden states in files there, not in memory, where the host "
                            "has too little: 2 bytes times tokens times hidden size, e.g. 69 GB for 8B models at the "
                            "default tokens; the files are gone when the build ends, however it ends")
    group.add_argument("--verbose", action="store_true", help="print every layer's errors")
    group.add_argument("--log_wandb", action="store_true", help="log to Weights & Biases")
    ignored = parser.add_argument_group("accepted and ignored")
    ignored.add_argument("--low_cpu_mem_usage", action="store_true", help="always so")
    for flag in ("--pre_block_modules", "--block_modules", "--post_block_modules"):
        ignored.add_argument(flag, nargs="+", metavar="NAME", help="found by the model's structure")


def run(parser: argparse.ArgumentParser, main: Callable[[argparse.Namespace], None]) -> None:
    """Run a command; what its user can mend ends it with one sentence instead of a traceback."""
    args = parser.parse_args()
    try:
        distributed.launch(lambda: main(args))
    except (ValueError, OSError) as error:
        parser.exit(2, f"{parser.prog}: error: {error}\n")
    except (RuntimeError, MemoryError) as error:
        if not out_of_memory(error):
            raise
        reason = (str(error) or type(error).__name__).splitlines()[0]
        parser.exit(1, f"{parser.prog}: error: {reason}; to go on, run the same command with --cpu_offload_modules and "
                       f"--cpu_offload_activations, or on a device with more memory\n")


def check_build_flags(args: argparse.Namespace) -> None:
    """Raise ValueError, naming the flag, its value and the remedy, for what needs neither model nor data to see."""
    check_calibration_flags(args)
    if getattr(args, "block_size", 1) < 1:
        raise ValueError(f"--block_size {args.block_size}: must be at least 1")
    if not 0 <= getattr(args, "rel_damp", 0) < float("inf"):
        raise ValueError(f"--rel_damp {args.rel_damp}: must be 0 or more, e.g. 0.01")
    default_device(args.device)
    for flag in ("pre_block_modules", "block_modules", "post_block_modules"):
        if getattr(args, flag):
            print(f"--{flag} is ignored: blocks are found by the model's structure")
    if args.low_cpu_mem_usage:
        print("--low_cpu_mem_usage is ignored: it is always so")


def check_regex(pattern: str | None, flag: str) -> None:
    try:
        re.compile(pattern or "")
    except re.error as error:
        raise ValueError(f"{flag} {pattern}: not a regular expression ({error})") from error


def build(args: argparse.Namespace, method: str, layers_flag: str, solve_layer: Callable, resolve: Callable,
          feed_forward: int | None, check: Callable | None = None) -> None:
    """Build the database of `args`, or what is missing of it.

    solve_layer(name, weight, hessian, args) -> ({level: (packed, manifest entry)}, relative damping used, or None);
    resolve(args, config) replaces missing flags that depend on the model; `feed_forward` is the level whose weights the
    next block's inputs come from, in a layer that lacks it the next one above; None: the model's own. check(decoder,
    layers of every block) may raise ValueError before anything is written.
    """
    check_build_flags(args)
    pattern = getattr(args, layers_flag)
    check_regex(pattern, f"--{layers_flag}")
    manifest = find_manifest(args.save_dir)
    config = load_config(args.model_name_or_path, args.trust_remote_code)
    args.calibration_sequence_length = sequence_length(args.calibration_sequence_length, config,
                                                       "--calibration_sequence_length")
    resolve(args, config)
    flags = {key: value for key, value in vars(args).items() if key not in NOT_COMPARED}
    header = {"format": store.FORMAT, "method": method, "model": args.model_name_or_path,
              "config_sha256": store.config_sha256(config), "flags": flags}
    check_same(manifest, header, args.save_dir)
    found = json.dumps(manifest)
    documents = documents_of(args, config, tokenizer_of(args))
    header["calibration_sha256"] = documents_sha256(documents)
    check_same(manifest, header, args.save_dir)
    if manifest is not None:
        manifest = forget_damaged(args.save_dir, manifest)
        if all(manifest["layers"].values()):
            print(f"{args.save_dir}: finished, {len(manifest['layers'])} layers")
            return

    check_writable(args.save_dir, "--save_dir")
    lock(args.save_dir, "--save_dir")
    if json.dumps(find_manifest(args.save_dir)) != found:
        raise ValueError(f"--save_dir {args.save_dir}: another process has just written there; run the same command "
                         f"again")
    if args.activations_dir:
        check_writable(args.activations_dir, "--activations_dir")
    wandb = open_wandb(args.log_wandb, vars(args))
    decoder = decoder_of(args)
    check_unpacked(decoder.model, "--model_name_or_path", args.model_name_or_path)
    if decoder.offloaded:
        decoder.offloaded.restore()              # their weights are read next
    layers = choose_layers(decoder, pattern, f"--{layers_flag}")
    ends = decoder.ends if getattr(args, "embedding_bitwidths", None) else {}
    names = [*(name for block in layers for name in block), *ends]
    header["weights_sha256"] = weights_sha256({name: (decoder.layers | ends)[name] for name in names})
    check_same(manifest, header, args.save_dir)
    print(coverage(decoder, layers), flush=True)
    if check:
        check(decoder, layers)
    if manifest is None:
        manifest = {**header, "model_sha256": weights_fingerprint(args.model_name_or_path),
                    "layers": dict.fromkeys(names)}
    start_writing(args.save_dir, manifest)
    manifest["layers"] = build_ends(args, manifest, ends, solve_layer)
    if all(manifest["layers"].values()):
        return
    calibration = Calibration(decoder, documents, decoder.device, args.microbatch_tokens, args.cpu_offload_activations,
                              args.activations_dir)
    build_blocks(args, manifest, calibration, layers, solve_layer, feed_forward, wandb)


@distributed.from_main
def build_ends(args: argparse.Namespace, manifest: dict, ends: dict[str, nn.Module], solve_layer: Callable) -> dict:
    """Solve and save embedding and head, of which nothing is known of their inputs: they are rounded to nearest. One
    level after the other, since they are large. Returns the manifest's layers."""
    for name, end in ends.items():
        if manifest["layers"][name] is None:
            weight, levels = end.weight, {}
            hessian = torch.eye(weight.shape[1], device=weight.device)
            for bits in args.embedding_bitwidths:
                own = argparse.Namespace(**{**vars(args), "bitwidth_options": [bits]})
                levels |= {level: ({part: tensor.cpu() for part, tensor in packed.items()}, {**entry, "end": True})
                           for level, (packed, entry) in solve(name, weight, hessian, own, solve_layer).items()}
            manifest["layers"][name] = store.write_layer(args.save_dir, name, tuple(weight.shape), levels)
            store.write_manifest(args.save_dir, manifest)
            print(f"{name}: rounded to {', '.join(map(str, levels))} bits", flush=True)
    return manifest["layers"]


def build_blocks(args: argparse.Namespace, manifest: dict, calibration: Calibration,
                 layers: list[dict[str, Layer]], solve_layer: Callable, feed_forward: int | None, wandb=None
                 ) -> None:
    """Walk the blocks up to the last incomplete one: solve and save those that are incomplete, pass through others.
    `wandb`, a run of Weights & Biases, gets every block's seconds and errors."""
    entries = manifest["layers"]
    incomplete = [i for i, block in enumerate(layers) if any(entries[name] is None for name in block)]
    began, seconds = time.time(), []
    for index in range(incomplete[-1] + 1):
        started = time.time()
        calibration.decoder.bring(index)         # for as long as it is measured, solved and run
        if index in incomplete:
            hessians = calibration.measure(layers[index], advance=feed_forward is None)
            measured = time.time()
            for others, lines in distributed.gather(solve_block(layers[index], hessians, args, solve_layer)):
                entries.update(others)
                print("".join(f"{line}\n" for line in lines), end="")
            distributed.from_main(store.write_manifest)(args.save_dir, manifest)
            solved = time.time()
        if feed_forward is not None and index < incomplete[-1]:
            database = store.Database(args.save_dir, finished=False)
            for name, layer in layers[index].items():
                level = min(level for level in database.levels(name) if level >= feed_forward)
                layer.weight.data.copy_(database.weight(name, level, layer.weight.device))
        if index < incomplete[-1] and calibration.position == index:
            calibration.run()
        if index in incomplete:
            seconds.append(time.time() - started)
            left = sum(i > index for i in incomplete) * sum(seconds) / len(seconds)
            print(f"block {index + 1}/{len(layers)}: calibration {measured - started:.1f} s, "
                  f"{args.calibration_tokens / (measured - started):,.0f} tokens/s; levels {solved - measured:.1f} s; "
                  f"left {timedelta(seconds=round(left))}", flush=True)
            if wandb:
                wandb.log({"block": index, "seconds": solved - started,
                           **{f"error of {name} at {level}": stored["error"] for name in layers[index]
                              for level, stored in entries[name]["levels"].items()}})
        else:
            print(f"block {index + 1}/{len(layers)}: already built", flush=True)
    distributed.report_idle(time.time() - began)
    uncalibrated = sum(not entry.get("calibrated", True) for entry in entries.values())
    if uncalibrated:
        print(f"{uncalibrated} of {len(entries)} layers saw too few calibration tokens, so they were rounded to "
              f"nearest, pruned by magnitude or imported; more --calibration_tokens reach more of them")
    print(f"{args.save_dir}: finished, {len(entries)} layers in {timedelta(seconds=round(time.time() - began))}")


def solve_block(layers: dict[str, Layer], hessians: dict[str, torch.Tensor | None], args: argparse.Namespace,
                solve_layer: Callable) -> tuple[dict[str, dict], list[str]]:
    """(layer -> its entry in the manifest, notes) of the layers of a block that this process has Hessians of, which are
    used up. Files are written while later layers are solved; on leaving, however that is, none is half-way."""
    writing, notes, uncalibrated = {}, [], set()
    writers = WRITERS.get(next(iter(layers.values())).weight.device.type, 1)
    with ThreadPoolExecutor(writers) as writer:
        for name in list(hessians):
            weight, hessian = layers[name].weight, hessians.pop(name)
            if hessian is None:
                uncalibrated.add(name)
                if isinstance(layers[name], ExpertLayer):    # of which there may be thousands: counted at the end
                    hessian = torch.eye(weight.shape[1], device=weight.device)
            levels = solve(name, weight, hessian, args, solve_layer, notes.append)
            for written in [*writing.values()][:len(writing) + 1 - writers]:     # so many layers stay in memory
                written.result()
            writing[name] = writer.submit(store.write_layer, args.save_dir, name, tuple(weight.shape), levels)
        return {name: written.result() | ({"calibrated": False} if name in uncalibrated else {})
                for name, written in writing.items()}, notes


def solve(name: str, weight: torch.Tensor, hessian: torch.Tensor | None, args: argparse.Namespace,
          solve_layer: Callable, note: Callable[[str], None] = print) -> dict:
    """`solve_layer` with its errors under the layer's name, and with a note where something unusual had to be done."""
    if not torch.isfinite(weight).all():
        raise ValueError(f"{name}: NaN or infinite weights; check the model, or use another --dtype (bfloat16, "
                         f"float32)")
    if hessian is None:
        note(f"{name}: saw no calibration token, so its errors are those of its weights, which are rounded to nearest, "
             f"pruned by magnitude or imported")
        hessian = torch.eye(weight.shape[1], device=weight.device)
    try:
        levels, damping = solve_layer(name, weight, hessian, args)
    except ValueError as error:
        raise ValueError(f"{name}: {error}") from error
    if damping is not None and damping > args.rel_damp:
        note(f"{name}: its Hessian is not positive definite with --rel_damp {args.rel_damp:g}; used {damping:g}")
    if args.verbose:
        note(f"{name}: error " + ", ".join(f"{level}: {entry['error']:.3g}" for level, (_, entry) in levels.items()))
    return levels


def choose_layers(decoder: Decoder, pattern: str | None, flag: str) -> list[dict[str, Layer]]:
    """The layers of every block whose full name matches. Raises ValueError when none does."""
    layers = [{name: layer for name, layer in block.layers.items() if re.search(pattern or "", name)}
              for block in decoder.blocks]
    if not decoder.layers:
        raise ValueError(f"{type(decoder.model).__name__}: its blocks have no nn.Linear, which is all that is "
                         f"compressed")
    if not any(layers):
        raise ValueError(f"{flag} {pattern}: matches none of the {len(decoder.layers)} linear layers, such as "
                         f"{next(iter(decoder.layers))}")
    return layers


def coverage(decoder: Decoder, layers: list[dict[str, Layer]]) -> str:
    """How much of the blocks' weights some layers are, and what most of the rest is, in words."""
    covered: Counter = Counter()
    for block in layers:
        for layer in block.values():
            covered[getattr(layer, "parameter", layer.weight)] += layer.in_features * layer.out_features
    total, others = 0, Counter()
    for block in decoder.blocks:
        for name, parameter in block.module.named_parameters():
            total += parameter.numel()
            others[re.sub(r"\d+", "*", name)] += parameter.numel() - covered[parameter]
    rest = ", ".join(f"{name} ({count / total:.2%})" for name, count in others.most_common(3) if count)
    return (f"{sum(map(len, layers))} layers hold {covered.total() / total:.2%} of the blocks' weights"
            f"{f'; most of what stays as it is: {rest}' if rest else ''}")


def check_same(manifest: dict | None, header: dict, save_dir: Path) -> None:
    """Raises ValueError naming what differs when an earlier build in the folder was not this one."""
    found = store.differences(manifest, header) if manifest is not None else []
    if found:
        raise ValueError(f"--save_dir {save_dir}: holds another build, which differs in {', '.join(found)}; use "
                         f"another folder, or the same flags to resume it")


@distributed.from_main
def find_manifest(save_dir: Path) -> dict | None:
    """The manifest of an earlier build in the folder. Raises ValueError for database files without one."""
    manifest = store.read_manifest(save_dir)
    if manifest is None and save_dir.exists():
        store.check_no_foreign_files(save_dir, [])
    return manifest


@distributed.from_main
def start_writing(save_dir: Path, manifest: dict) -> None:
    """Write the manifest. Raises ValueError where the folder has files that are no layer's."""
    store.check_no_foreign_files(save_dir, list(manifest["layers"]))
    store.write_manifest(save_dir, manifest)


@distributed.from_main
def forget_damaged(save_dir: Path, manifest: dict) -> dict:
    """The manifest with layers whose file is not the one that was built marked as not built; says so."""
    for name, entry in manifest["layers"].items():
        if entry is not None and not store.intact(save_dir, manifest, name):
            file = store.layer_file(save_dir, name)
            print(f"{file}: {'not the file that was built' if file.exists() else 'missing'}; building it again")
            manifest["layers"][name] = None
    return manifest


def weights_sha256(layers: dict[str, Layer]) -> str:
    """Hash of 64 weights spread over every layer: tells a fine-tuned or retrained model from the one built for."""
    digest = hashlib.sha256()
    for name, layer in layers.items():
        weights = layer.weight.flatten()
        sample = weights[::max(1, len(weights) // 64)].float().cpu()
        digest.update(name.encode() + sample.numpy().tobytes())
    return digest.hexdigest()

