"""The database on disk: a folder with manifest.json and one safetensors file a layer, which holds all its levels.

manifest.json
  format, method ("sparsegpt" or "gptq"), model, config_sha256, weights_sha256, calibration_sha256, flags
  model_sha256: `utils.model.weights_fingerprint` of the checkpoint; older databases have none
  sha256: of all the rest
  layers: name -> null while the layer is not built, then
    shape [out, in]; bytes and sha256 of its file; levels: level -> {kept or bits and overhead_bits, error}, and
    of imported ones group_size, sym (all zeros are in the middle), and of scales that are not in half precision their
    dtype and half (it would hold them), or type, of blocks as GGUF has them (formats/kquants.py); end, of the embedding
    or the head;
    calibrated: false where it saw too few tokens for a Hessian
The method "gptq" stands for quantized levels, those of other tools included (import_levels.py). A layer file has a
level's tensors under "<level>.<part>" (parts: see packing.py; of a type, its blocks). Files appear whole or not at all,
and a file is in use only once the manifest names its checksum, so a build may be killed at any moment; what is
truncated, altered, swapped or comes from another database never passes the checksum.
"""
import hashlib
import json
import re
from collections import OrderedDict
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch import nn

from database import packing
from database.hidden_states import SideStream, on_host
from formats import kquants
from utils.configs import parse_level
from utils.errors import RunError
from utils.files import read_sealed, replacing, seal, write_atomic

FORMAT = 1
MANIFEST = "manifest.json"
HEADER = ("format", "method", "config_sha256", "weights_sha256", "calibration_sha256", "flags")


class Database:
    """A finished database, opened for reading. Tensors come from memory-mapped files, checked before first use."""

    def __init__(self, path: str | Path, finished: bool = True):
        """Raises ValueError naming the file that is missing, unreadable, foreign or of the wrong size.

        With `finished=False`, the layers that a build has finished so far.
        """
        self.path = Path(path)
        self.manifest = read_manifest(self.path)
        if self.manifest is None:
            raise ValueError(f"{self.path}: no {MANIFEST} in it, so it is not a database; build one with "
                             f"python -m database.sparsegpt or python -m database.gptq")
        self.method: str = self.manifest["method"]
        entries = self.manifest["layers"]
        missing = [name for name, entry in entries.items() if entry is None]
        if missing and finished:
            raise ValueError(f"{self.path}: the build is not finished, {len(missing)} of {len(entries)} layers are "
                             f"missing (first {missing[0]}); run its command again to finish it")
        check_no_foreign_files(self.path, list(entries))
        self.layers: list[str] = [name for name, entry in entries.items() if entry is not None]
        for name in self.layers:
            file, size = layer_file(self.path, name), self.manifest["layers"][name]["bytes"]
            if not file.is_file():
                raise ValueError(f"{file}: missing; {_REBUILD}")
            if file.stat().st_size != size:
                raise ValueError(f"{file}: {file.stat().st_size} bytes instead of {size}; {_REBUILD}")
        self._files: dict[str, safe_open] = {}
        # sizes may agree with another database's manifest, checksums do not; all files would take minutes
        smallest = min(self.layers, key=lambda name: entries[name]["bytes"], default=None)
        if smallest and not intact(self.path, self.manifest, smallest):
            raise ValueError(f"{self.path / MANIFEST}: does not go with {layer_file(self.path, smallest)} (wrong "
                             f"checksum); {_REBUILD}")

    @classmethod
    def open(cls, path: str | Path) -> "Database":
        return cls(path)

    @property
    def sha256(self) -> str:
        """Tells databases apart: of the manifest, which has the checksum of every file."""
        return hashlib.sha256(json.dumps(self.manifest, sort_keys=True).encode()).hexdigest()

    def shape(self, name: str) -> tuple[int, int]:
        """(out, in) of a layer's weight."""
        return tuple(self.manifest["layers"][name]["shape"])

    def levels(self, name: str) -> list[float]:
        """A layer's levels in ascending order: signed sparsity steps, or bits a weight."""
        return sorted(map(parse_level, self.manifest["layers"][name]["levels"]))

    def type(self, name: str, level: float) -> str | None:
        """GGUF's type of a level (gptq); None for scale * (code - zero)."""
        return self._level(name, level).get("type")

    def is_end(self, name: str) -> bool:
        """Whether it is the embedding or the head, not a layer of a block."""
        return any(entry.get("end", False) for entry in self.manifest["layers"][name]["levels"].values())

    def kept(self, name: str, level: float) -> int:
        """Number of weights kept (sparsegpt)."""
        return self._level(name, level)["kept"]

    def bits(self, name: str, level: float, overhead: bool = False) -> int:
        """Bits of all codes (gptq); with `overhead`, also of the scales and the uint8 zeros as stored."""
        entry = self._level(name, level)
        return entry["bits"] + (entry["overhead_bits"] if overhead else 0)

    def error(self, name: str, level: float) -> float:
        """Relative output error ‖(W−Ŵ)X‖²/‖WX‖² on the calibration tokens; for a layer that saw none, X = I."""
        return self._level(name, level)["error"]

    def weight(self, name: str, level: float, device: str | torch.device = "cpu", dtype: torch.dtype | None = None
               ) -> torch.Tensor:
        """The layer at a level, [out, in]; by default in the dtype it is stored in (float32 for quantized levels)."""
        return self.unpack(name, level, self.packed(name, level, device)).to(dtype)

    def codes(self, name: str, level: float) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """A gptq level as (codes uint8 [out, in], scales [out, groups], zeros uint8 [out, groups])."""
        return packing.unpack_codes(self.packed(name, level), self.shape(name), level)

    def group_size(self, name: str, level: float) -> int:
        """Input columns that share a scale (gptq): the whole row without --group_size."""
        size = self._level(name, level).get("group_size") or self.manifest["flags"].get("group_size")
        return size or self.shape(name)[1]

    def symmetric(self, name: str, level: float) -> bool:
        """Whether all zeros of a level are in the middle of its codes (gptq)."""
        return bool(self._level(name, level).get("sym", self.manifest["flags"].get("sym")))

    def scales(self, name: str, level: float) -> tuple[torch.dtype, bool]:
        """(dtype of a level's scales, whether half precision holds them) (gptq)."""
        entry = self._level(name, level)
        return getattr(torch, entry.get("scales", "float16")), entry.get("half", True)

    def check_weights(self, fingerprint: str | None) -> None:
        """Raises ValueError when the database was built for other weights than these, as far as that is known."""
        if fingerprint and (self.manifest.get("model_sha256") or fingerprint) != fingerprint:
            raise ValueError(f"{self.path}: built for {self.manifest['model']}, whose weights differ from this model's "
                             f"(another fingerprint); build a database for this model or name that one")

    def check_model(self, config) -> None:
        """Raises ValueError when the database was built for a model with another configuration."""
        if config_sha256(config) != self.manifest["config_sha256"]:
            raise ValueError(f"{self.path}: built for {self.manifest['model']}, whose configuration differs from this "
                             f"model's; build a database for this model or name that one")

    def packed(self, name: str, level: float, device: str | torch.device = "cpu") -> packing.Packed:
        """The packed tensors of a level on `device`. Raises ValueError when the file is not the one that was built."""
        self._level(name, level)
        if name not in self._files:
            file = layer_file(self.path, name)
            if not intact(self.path, self.manifest, name):
                raise RunError(f"{file}: not the file that was built (wrong checksum); {_REBUILD}")
            self._files[name] = safe_open(file, framework="pt")
        parts = (("mask", "values") if self.method == "sparsegpt" else ("blocks",) if self.type(name, level) else
                 ("codes", "scales", "zeros"))
        return {part: self._files[name].get_tensor(f"{level}.{part}").to(device) for part in parts}

    def unpack(self, name: str, level: float, packed: packing.Packed, out: torch.Tensor | None = None) -> torch.Tensor:
        """Weight [out, in] on the device of `packed`; into `out`, which may have another dtype, where it is given."""
        if self.method == "sparsegpt":
            return packing.unpack_sparse(packed, self.shape(name), out)
        if kind := self.type(name, level):
            weight = kquants.dequantize(kind, packed["blocks"])
            return weight if out is None else out.copy_(weight)
        return packing.unpack_quantized(packed, self.shape(name), level, self.group_size(name, level), out)

    def _level(self, name: str, level: float) -> dict:
        try:
            return self.manifest["layers"][name]["levels"][str(level)]
        except KeyError:
            known = f"it has {self.levels(name)}" if name in self.manifest["layers"] else "the layer is not in it"
            raise ValueError(f"{self.path}: no level {level} of {name}; {known}") from None


class LevelCache:
    """Packed levels on the device within a budget of bytes; the one used longest ago goes first. Where blocks take
    turns (`in_turn`), that one would be needed next, and none would ever be found: there the first ones stay."""

    def __init__(self, database: Database, device: str | torch.device, dtype: torch.dtype, max_bytes: int,
                 in_turn: bool = False):
        self.database, self.device, self.dtype, self.max_bytes = database, device, dtype, max_bytes
        self.in_turn = in_turn
        self.bytes = 0
        self._side = SideStream(torch.device(device)) if torch.device(device).type == "cuda" else None
        # A thread's allocations have a part of the heap to themselves. Beside those of a walk, levels that stay would
        # break up what a walk has given back until it fits nothing any more: 7 GB were seen for 0.35 GB of levels
        self._reader = ThreadPoolExecutor(1)
        self._levels: OrderedDict[tuple[str, float], packing.Packed] = OrderedDict()

    def copy_(self, parameter: nn.Parameter, name: str, level: float) -> None:
        """Unpack a level into `parameter.data` ([out, in], on the cache's device), rounded to the cache's dtype."""
        packed, weight = self._packed(name, level), parameter.data
        if weight.dtype == self.dtype and weight.is_contiguous():
            self.database.unpack(name, level, packed, weight)
        else:
            weight.copy_(self.database.unpack(name, level, packed).to(self.dtype))

    def give_back(self) -> int:
        """Drop all levels and from now on keep half as many bytes as they took; returns those. For when memory does not
        suffice."""
        freed, self.bytes = self.bytes, 0
        self._levels.clear()
        self.max_bytes = min(self.max_bytes, freed // 2)
        return freed

    def _packed(self, name: str, level: float) -> packing.Packed:
        key = (name, level)
        if key in self._levels:
            self._levels.move_to_end(key)
            return self._levels[key]
        packed = self._fetch(name, level)
        size = _bytes(packed)
        if size <= self.max_bytes - (self.bytes if self.in_turn else 0):
            while self.bytes + size > self.max_bytes:
                self.bytes -= _bytes(self._levels.popitem(last=False)[1])
            self._levels[key] = packed
            self.bytes += size
        return packed

    def _fetch(self, name: str, level: float) -> packing.Packed:
        """A level on the device: on a GPU it is read and copied while what was queued before is computed, for which an
        ordinary copy would wait. As searches queue several candidates' blocks ahead, levels hide behind those."""
        if not self._side:
            return self._reader.submit(self.database.packed, name, level, self.device).result()
        arrived = {}
        for part, tensor in self.database.packed(name, level).items():
            staged = self._side.host_buffer(tensor.numel(), tensor.dtype).view(tensor.shape).copy_(tensor)
            arrived[part] = self._side.device_buffer(tensor)
            self._side.let_wait(arrived[part], self._side.copy(arrived[part], staged))
        return arrived


# ---- building --------------------------------------------------------------------------------------------------------


def read_manifest(path: Path) -> dict | None:
    """The manifest of the database at `path`, None where there is none. Raises ValueError when it cannot be one."""
    file = path / MANIFEST
    if not file.is_file():
        return None
    try:
        manifest = read_sealed(file)
    except ValueError as error:
        raise ValueError(f"{error}, so not a database's manifest; rebuild the database in an empty folder") from error
    if (manifest.get("format") != FORMAT or manifest.get("method") not in ("sparsegpt", "gptq")
            or not {*HEADER, "model"} <= manifest.keys() or not isinstance(manifest.get("layers"), dict)):
        raise ValueError(f"{file}: not a manifest of format {FORMAT}; rebuild the database in an empty folder")
    for name in manifest["layers"]:
        layer_file(path, name)
    return manifest


def write_manifest(path: Path, manifest: dict) -> None:
    write_atomic(path / MANIFEST, seal(manifest, indent=1))


def write_layer(path: Path, name: str, shape: tuple[int, int], levels: dict[float, tuple[packing.Packed, dict]]
                ) -> dict:
    """Write a layer's file; returns its entry for the manifest. levels: level -> (packed, the level's entry)."""
    tensors = {f"{level}.{part}": on_host(tensor.contiguous()) for level, (packed, _) in levels.items()
               for part, tensor in packed.items()}
    with replacing(layer_file(path, name)) as beside:        # nothing here keeps Python's lock: see `solve_block`
        save_file(tensors, beside)
        with beside.open("rb") as stream:
            size, digest = beside.stat().st_size, hashlib.file_digest(stream, "sha256").hexdigest()
    return {"shape": list(shape), "bytes": size, "sha256": digest,
            "levels": {str(level): entry for level, (_, entry) in sorted(levels.items())}}


def differences(manifest: dict, header: dict) -> list[str]:
    """What a manifest was built with that differs from `header`, in words; what `header` lacks is not compared."""
    found = []
    words = {"config_sha256": "the model's configuration", "weights_sha256": "the model's weights",
             "calibration_sha256": "the calibration tokens"}
    for key in HEADER:
        if key == "flags" and key in header:
            old, new = manifest[key], header[key]
            found += [f"--{flag} {new.get(flag)} (it was {old.get(flag)})"
                      for flag in {**old, **new} if old.get(flag) != new.get(flag)]
        elif key in header and manifest[key] != header[key]:
            found.append(words.get(key, f"{key} {header[key]} (it was {manifest[key]})"))
    return found


def intact(path: Path, manifest: dict, name: str) -> bool:
    """Whether the layer's file is the one the manifest describes, byte for byte."""
    entry, file = manifest["layers"][name], layer_file(path, name)
    if entry is None or not file.is_file() or file.stat().st_size != entry["bytes"]:
        return False
    with file.open("rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest() == entry["sha256"]


def layer_file(path: Path, name: str) -> Path:
    """Raises ValueError for a name that could lead outside the folder: manifests may come from anywhere."""
    if not re.fullmatch(r"\w[\w.-]{0,200}", name):
        raise ValueError(f"{path / MANIFEST}: {name!r} is not a layer's name; rebuild the database in an empty folder")
    return path / f"{name}.safetensors"


def check_no_foreign_files(path: Path, names: list[str]) -> None:
    """Raises ValueError naming a safetensors file in the folder that is no layer's."""
    own = {layer_file(path, name) for name in names}
    foreign = sorted(file.name for file in path.glob("*.safetensors") if file not in own)
    if foreign:
        raise ValueError(f"{path / foreign[0]}: does not belong to this database; move it elsewhere")


def config_sha256(config) -> str:
    """Hash of a decoder's configuration: its architecture, not where it was loaded from or how it is run."""
    ignored = ("transformers_version", "dtype", "torch_dtype", "use_cache", "quantization_config")
    values = {key: value for key, value in config.get_text_config(decoder=True).to_dict().items()
              if key[0] != "_" and key not in ignored}
    return hashlib.sha256(json.dumps(values, sort_keys=True, default=str).encode()).hexdigest()


_REBUILD = "run the command that built the database again to rebuild it"


def _bytes(packed: packing.Packed) -> int:
    return sum(tensor.nbytes for tensor in packed.values())
