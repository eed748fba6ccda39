"""What finish.py has finished so far, on disk block by block, so that it can be killed and resumed anywhere."""
import argparse
import hashlib
import json
import shutil
from collections.abc import Mapping, Sequence
from contextlib import contextmanager, nullcontext
from pathlib import Path

import torch
from safetensors.torch import load, save
from torch import nn

from database.build import NOT_COMPARED, check_same, find_manifest, forget_damaged, start_writing, weights_sha256
from database.packing import Packed
from database.store import FORMAT, Database, config_sha256, write_layer, write_manifest
from database.trained import BlockWeight, DenseWeight, ExpertsWeight, QuantizedWeight, SparseWeight, Weight
from database.tuning import HiddenStates, Passed
from formats.regroup import regroup
from formats.towers import copy_processors, with_tower
from utils import distributed
from utils.data import documents_sha256
from utils.decoder import Block, Decoder
from utils.experts import ExpertLayer
from utils.files import PARTIAL, move_checkpoint, read_sealed, seal, write_atomic
from utils.model import cast, dtype_in, save_pretrained

MARK = "finish.json"             # what a checkpoint that is being finished depends on
TOGETHER = "trained_together"    # in a manifest whose blocks were trained together after each was by itself
SOURCE = "finished_from"         # flag of a database of trained levels, whose codes are where training starts again
# flags that decide where and how blocks are trained, or of whose files the content is compared
ELSEWHERE = (*NOT_COMPARED, "microbatch_tokens", "level_cache_gb", "drop_config", "drop_budget", "quant_weights_path",
             "quant_config_path", "quant_budget", "sparse_weights_path", "sparse_config_path", "sparse_budget")


def header_of(args: argparse.Namespace, config, decoder: Decoder, documents: Sequence[torch.Tensor],
              dropped: Sequence[tuple[bool, bool]]) -> dict:
    """What a result depends on: one begun on anything else is not resumed."""
    flags = {key: value for key, value in vars(args).items() if key not in ELSEWHERE}
    if not args.end_to_end_steps:    # what was finished before there was a choice is the same
        del flags["end_to_end_steps"]
    return {"format": FORMAT, "model": args.model_name_or_path, "config_sha256": config_sha256(config),
            "weights_sha256": weights_sha256(decoder.layers), "calibration_sha256": documents_sha256(documents),
            "flags": {**flags, "dropped": "".join("01"[half] for halves in dropped for half in halves)}}


def _allow_together(found: dict, header: dict) -> None:
    """Blocks that were trained one by one are the same with and without --end_to_end_steps after that."""
    earlier = {key: value for key, value in found["flags"].items() if key != "end_to_end_steps"}
    found["flags"] = {key: value if key == "end_to_end_steps" else earlier.get(key)
                      for key, value in header["flags"].items()} | earlier


def _within(block: Block, name: str) -> str:
    """A layer's name within its block."""
    return name.removeprefix(f"{block.name}.")


def _dropped_modules(block: Block, dropped: tuple[bool, bool]) -> set[nn.Module]:
    return {inner for half, gone in zip((block.attn, block.mlp), dropped) if gone
            for module in half.modules for inner in module.modules()}


class FinishedDatabase:
    """A database with a configuration's levels, of which every block is trained by itself."""

    def __init__(self, args: argparse.Namespace, header: dict, decoder: Decoder, source: Database,
                 levels: Mapping[str, float], dropped: Sequence[tuple[bool, bool]]):
        """Raises ValueError where the folder holds anything else."""
        self.path, self.decoder, self.source = args.save_dir, decoder, source
        self._layers = decoder.layers
        self.levels, self.dropped = levels, dropped
        self.learning_rate = {} if args.learning_rate is None else {"learning_rate": args.learning_rate}
        self._together = bool(args.end_to_end_steps)
        checksum = hashlib.sha256(json.dumps(levels, sort_keys=True).encode()).hexdigest()
        header = {**header, "method": source.method, "model_sha256": source.manifest.get("model_sha256"),
                  "flags": {**source.manifest["flags"], **header["flags"], SOURCE: source.sha256,
                            "levels": checksum}}
        manifest = find_manifest(self.path)
        if manifest and not manifest.get(TOGETHER):
            _allow_together(manifest, header)
        check_same(manifest, header, self.path)
        new = {**header, "layers": dict.fromkeys(source.layers)}
        self.manifest = forget_damaged(self.path, manifest) if manifest else new
        if self.manifest.get(TOGETHER) and not all(self.manifest["layers"].values()):
            print(f"{self.path}: blocks were trained together, so all are trained again")
            self.manifest = new
        start_writing(self.path, self.manifest)
        self._ends = [name for name in source.layers if source.is_end(name)]     # which are not trained
        self._own_ends: dict[str, torch.Tensor] = {}
        if missing := [name for name in self._ends if self.manifest["layers"][name] is None]:
            self.manifest["layers"].update(self._write(
                {name: source.packed(name, levels[name]) for name in missing},
                {name: source.error(name, levels[name]) for name in missing}))
            distributed.from_main(write_manifest)(self.path, self.manifest)

    def embedded(self, calibration: HiddenStates) -> list[Passed] | None:
        """What the first block is given; None where the embedding is the model's own."""
        with self.own_ends():
            return calibration.embedded() if self._ends else None

    @contextmanager
    def own_ends(self):
        """Have the embedding and the head that the database has, where there are any."""
        ends = {name: self.decoder.ends[name].weight for name in self._ends}
        kept = {name: weight.data for name, weight in ends.items()}
        if ends and not self._own_ends:
            self._own_ends = {name: self.source.weight(name, self.levels[name], weight.device, weight.dtype)
                              for name, weight in kept.items()}
        try:
            for name, weight in ends.items():
                weight.data = self._own_ends[name]
            yield
        finally:
            for name, weight in ends.items():
                weight.data = kept[name]

    def names(self, block: Block) -> list[str]:
        """Full names of the block's layers that the database has."""
        return [name for name in block.layers if name in self.manifest["layers"]]

    @property
    def complete(self) -> bool:
        return all(self.manifest["layers"].values()) and self._together == self.manifest.get(TOGETHER, False)

    def has(self, block: Block) -> bool:
        return all(self.manifest["layers"][name] for name in self.names(block))

    def weights(self, block: Block, together: bool = False) -> dict[str, Weight]:
        """What is to be trained, by the parameter's name within the block: of the uncompressed block, or of the
        finished one, to be trained `together` with all others."""
        gone = _dropped_modules(block, self.dropped[block.index])
        source = Database(self.path, finished=False) if together else self.source
        weights = {f"{_within(block, name)}.weight": self._weight(source, name, together) for name in self.names(block)
                   if block.layers[name] not in gone and not isinstance(block.layers[name], ExpertLayer)
                   and self._trainable(name)}
        stored = set(self.names(block))
        for own, parameter in block.module.named_parameters():
            experts = {name: layer for name, layer in block.layers.items()
                       if isinstance(layer, ExpertLayer) and layer.parameter is parameter}
            trained = {name: self._weight(source, name, together) for name in experts
                       if name in stored and self._trainable(name)}
            if trained and not any(parameter is other for module in gone for other in module.parameters()):
                weights[own] = ExpertsWeight(experts, trained)
        return weights

    def _trainable(self, name: str) -> bool:
        return self.source.method == "sparsegpt" or self.source.type(name, self.levels[name]) != "F16"

    def _weight(self, source: Database, name: str, together: bool) -> Weight:
        level, weight, how = self.levels[name], self._layers[name].weight, {**self.learning_rate, "together": together}
        packed = source.packed(name, level, weight.device)
        if source.method == "sparsegpt":
            return SparseWeight(packed, source.shape(name), **how)
        keep_codes = SOURCE in source.manifest["flags"]
        if together:
            weight = source.unpack(name, level, packed)
        if kind := source.type(name, level):
            return BlockWeight(weight, packed, kind, keep_codes, **how)
        return QuantizedWeight(weight, packed, level, source.group_size(name, level), keep_codes, **how)

    def save(self, block: Block, trained: Mapping[str, Weight], calibration: HiddenStates,
             states: list[Passed] | None) -> None:
        """Write the block's layers. The block is still uncompressed; `states`: what it is given."""
        packed = self._packed(block, trained)
        packed = {name: packed.get(name) or self.source.packed(name, self.levels[name]) for name in self.names(block)}
        errors = calibration.relative_errors(block.index, states, {
            _within(block, name): self.source.unpack(name, self.levels[name], parts) for name, parts in packed.items()})
        self.manifest["layers"].update(self._write(packed, {name: errors[_within(block, name)] for name in packed}))
        distributed.from_main(write_manifest)(self.path, self.manifest)

    def save_together(self, trained: Sequence[Mapping[str, Weight]]) -> None:
        """Write what was trained of all blocks together. Layers' errors stay what they were before."""
        for block, weights in zip(self.decoder.blocks, trained):
            packed = self._packed(block, weights)
            errors = {name: self.manifest["layers"][name]["levels"][str(self.levels[name])]["error"] for name in packed}
            self.manifest["layers"].update(self._write(packed, errors))
        self.manifest[TOGETHER] = True
        distributed.from_main(write_manifest)(self.path, self.manifest)

    def _packed(self, block: Block, trained: Mapping[str, Weight]) -> dict[str, Packed]:
        """Of the layers that were trained, by full name."""
        of_experts = {name: weight for whole in trained.values() if isinstance(whole, ExpertsWeight)
                      for name, weight in whole.weights.items()}
        weights = {name: of_experts.get(name) or trained.get(f"{_within(block, name)}.weight")
                   for name in self.names(block)}
        return {name: weight.packed() for name, weight in weights.items() if weight}

    @distributed.from_main
    def _write(self, packed: dict[str, Packed], errors: dict[str, float]) -> dict[str, dict]:
        """Layer -> its entry in the manifest."""
        entries = {}
        for name, parts in packed.items():
            level = self.levels[name]
            entry = {**self.source.manifest["layers"][name]["levels"][str(level)], "error": errors[name]}
            if "scales" in parts:                # which are in half precision now, and may not have been before
                before = self.source.packed(name, level)["scales"]
                entry["overhead_bits"] += 8 * (parts["scales"].nbytes - before.nbytes)
                if parts["scales"].dtype != before.dtype:
                    entry = {key: value for key, value in entry.items() if key not in ("scales", "half")}
            entries[name] = write_layer(self.path, name, self.source.shape(name), {level: (parts, entry)})
        return entries

    def load(self, block: Block) -> None:
        """Give the block its finished weights."""
        database = Database(self.path, finished=False)
        for name in self.names(block):
            weight = block.layers[name].weight
            weight.data.copy_(database.weight(name, self.levels[name], weight.device))

    def end(self, tokenizer) -> None:
        """All is in place once every block is written."""


class FinishedCheckpoint:
    """A checkpoint without what was dropped, of which every block is trained by itself; until all are, a file each."""

    def __init__(self, args: argparse.Namespace, config, header: dict, decoder: Decoder,
                 dropped: Sequence[tuple[bool, bool]]):
        """Raises ValueError where the folder holds anything else."""
        self.path, self.decoder, self.dropped = args.save_dir, decoder, dropped
        self.model, self.config = args.model_name_or_path, config
        self.learning_rate = {} if args.learning_rate is None else {"learning_rate": args.learning_rate}
        self.dtype = (dtype_in(config) if args.dtype == "auto" else None) or decoder.dtype      # to be saved in
        self._mark = self._begin(json.loads(json.dumps(header, default=str)))

    @distributed.from_main
    def _begin(self, header: dict) -> dict:
        """What is in the mark: beside the header, name of a block's file -> its SHA-256."""
        mark = self.path / MARK
        found = read_sealed(mark) if mark.is_file() else None
        if found is None and any(self.path.iterdir()):
            raise ValueError(f"--save_dir {self.path}: is not empty, and not from finish.py; name another folder")
        if found and not self.complete:
            _allow_together(found, header)
        check_same(found and {**found, "method": None}, {**header, "method": None}, self.path)
        if self.complete:
            self._tidy()
            return found
        blocks = {}
        for name, checksum in (found or {}).get("blocks", {}).items():
            file = self.path / name
            if file.is_file() and hashlib.sha256(file.read_bytes()).hexdigest() == checksum:
                blocks[name] = checksum
            else:
                print(f"{file}: {'not the file that was written' if file.exists() else 'missing'}; training it again")
        write_atomic(mark, seal({**header, "blocks": blocks}))
        return {**header, "blocks": blocks}

    def _tidy(self) -> None:
        """Remove what was there until the checkpoint was."""
        shutil.rmtree(self.path / f".model{PARTIAL}", ignore_errors=True)
        for file in self.path.glob("block-*.safetensors"):
            file.unlink()

    @property
    def complete(self) -> bool:
        return (self.path / "config.json").is_file()

    def embedded(self, calibration: HiddenStates) -> None:
        """The embedding is the model's own."""

    own_ends = nullcontext

    def has(self, block: Block) -> bool:
        return all(self.dropped[block.index]) or self._file(block).name in self._mark["blocks"]

    def weights(self, block: Block, together: bool = False) -> dict[str, Weight]:
        """What is to be trained, by the parameter's name within the block, alone or `together` with all others."""
        gone = {id(parameter) for module in _dropped_modules(block, self.dropped[block.index])
                for parameter in module.parameters()}
        how = {**self.learning_rate, "together": together}
        return {name: DenseWeight(parameter, **how) for name, parameter in
                block.module.named_parameters() if id(parameter) not in gone and parameter.is_floating_point()}

    def save(self, block: Block, trained: Mapping[str, Weight], calibration: HiddenStates,
             states: list[Passed] | None) -> None:
        """Write the block's parameters."""
        self._mark["blocks"] |= self._write(block, trained)

    @distributed.from_main
    def _write(self, block: Block, trained: Mapping[str, Weight]) -> dict[str, str]:
        dtypes = {name: parameter.dtype for name, parameter in block.module.named_parameters()}
        content = save({name: weight.value().detach().to(dtypes[name]).cpu().contiguous()
                        for name, weight in trained.items()})
        own = {self._file(block).name: hashlib.sha256(content).hexdigest()}
        write_atomic(self._file(block), content)
        write_atomic(self.path / MARK, seal({**self._mark, "blocks": self._mark["blocks"] | own}))
        return own

    def load(self, block: Block) -> None:
        """Give the block its finished parameters."""
        if not all(self.dropped[block.index]):
            parameters = dict(block.module.named_parameters())
            for name, value in load(self._file(block).read_bytes()).items():
                parameters[name].data.copy_(value)

    def save_together(self, trained: Sequence[Mapping[str, Weight]]) -> None:
        """The model has what was trained; `end` writes it."""

    @distributed.main_only
    def end(self, tokenizer) -> None:
        """Write the checkpoint: the kept halves regrouped into as few blocks as give the same function."""
        partial = self.path / f".model{PARTIAL}"
        shutil.rmtree(partial, ignore_errors=True)
        blocks = next(self.decoder.blocks[0].module.parameters())
        self.decoder.move_surroundings(blocks.device)            # which is the host's with --cpu_offload_modules
        model = with_tower(regroup(self.decoder, self.dropped), self.model, self.config).model
        save_pretrained(cast(model, self.dtype), tokenizer, partial)
        copy_processors(self.model, partial, model.config)
        move_checkpoint(partial, self.path)
        self._tidy()

    def _file(self, block: Block) -> Path:
        return self.path / f"block-{block.index:03}.safetensors"
