"""Put a model's layers at the levels of a database: what the searches, baselines and evaluations switch with."""
import argparse
import math
import re
from collections.abc import Callable, Hashable, Iterator, Mapping
from contextlib import contextmanager

import torch

from database.store import Database, LevelCache
from utils.configs import check_level_config, parse_level, read_drop_config, read_level_config
from utils.decoder import Decoder
from utils.model import dtype_in, weights_fingerprint

GIGABYTE = 10**9
METHODS = {"sparse": "sparsegpt", "quant": "gptq"}     # kind of level -> what builds a database of it


class LevelSwitcher:
    """The levels a decoder's layers are at, switched one by one: unpacking a changed layer is all a switch costs."""

    def __init__(self, decoder: Decoder, database: Database, cache_gb: float):
        """Raises ValueError when the database was built for another model, or for layers this one does not have."""
        database.check_model(decoder.config)
        layers = decoder.layers | decoder.ends
        unknown = [name for name in database.layers if name not in layers]
        if unknown:
            raise ValueError(f"{database.path}: has {unknown[0]}, which is neither a linear layer of the model's "
                             f"blocks nor its embedding or head; build a database for this model")
        for name in database.layers:
            shape = tuple(layers[name].weight.shape)
            if shape != database.shape(name):
                raise ValueError(f"{database.path}: {name} is {database.shape(name)}, but {shape} in the model; build "
                                 f"a database for this model")
        stored = set(database.layers)
        self.names = [[name for name in block.layers if name in stored] for block in decoder.blocks]
        if ends := [name for name in decoder.ends if name in stored]:
            self.names.append(ends)
        self.loaded: dict[str, int] = {}
        self.switches = 0
        self._layers = layers
        self._uncompressed: dict[str, torch.Tensor] | None = None   # weights that `restorable` is to bring back
        self._ends: dict[str, torch.Tensor] = {}                    # the uncompressed ones, which are always kept
        self._decoder = decoder
        if decoder.offloaded:
            decoder.offloaded.on_leave = self._forget
        self.cache = LevelCache(database, decoder.device, decoder.dtype, int(cache_gb * GIGABYTE),
                                in_turn=decoder.offloaded is not None)
        decoder.give_back = self.cache.give_back

    def set_block(self, index: int, levels: Hashable) -> None:
        """Put the layers of block `index` at `levels`, a tuple in the order of `names[index]`. After the last block
        come embedding and head, where the database has them: they can be put at None, as they were, at any time."""
        if index == len(self._decoder.blocks):
            self._set_ends(levels)
            return
        for name, level in zip(self.names[index], levels, strict=True):
            if self.loaded.get(name) == level:
                continue
            weight = self._layers[name].weight
            if self._uncompressed is not None and name not in self.loaded:
                self._uncompressed[name] = weight.data.clone()
            if level is None:
                weight.data.copy_(self._uncompressed.pop(name))
                del self.loaded[name]
            else:
                self.cache.copy_(weight, name, level)
                self.loaded[name] = level
            self.switches += 1

    def _set_ends(self, levels: tuple[float | None, ...]) -> None:
        for name, level in zip(self.names[-1], levels, strict=True):
            weight = self._layers[name].weight
            own = self._ends.setdefault(name, weight.data)
            if level is None:
                weight.data = own
            elif self.loaded.get(name) != level:
                if self.loaded.get(name) is None:
                    weight.data = torch.empty_like(own)
                self.cache.copy_(weight, name, level)
                self.switches += 1
            self.loaded[name] = level

    def _forget(self, index: int) -> None:
        """The weights of an offloaded block are the model's own again."""
        for name in self.names[index]:
            self.loaded.pop(name, None)
            if self._uncompressed is not None:
                self._uncompressed.pop(name, None)
        self._decoder.states[index] = None

    @contextmanager
    def restorable(self) -> Iterator[None]:
        """Use it while the model is uncompressed. Within, the level None is a layer as it was, whose weights are kept
        beside it for as long as it is at another level; afterwards all layers are as they were."""
        self._uncompressed = {}
        try:
            yield
        finally:
            for index, names in enumerate(self.names):
                self.set_block(index, (None,) * len(names))
            self._uncompressed = None

    def states(self, levels: Mapping[str, int]) -> tuple[tuple[int, ...], ...]:
        """Level by layer name as a candidate of the fitness walk: a tuple of levels for every block, and for the ends
        if they have any."""
        return tuple(tuple(levels[name] for name in names) for names in self.names)


def describe_levels(database: Database, levels: Mapping[str, int]) -> str:
    """What some layers' levels make of them, in words, counted in the database."""
    weights = sum(math.prod(database.shape(name)) for name in levels)
    if database.method == "sparsegpt":
        kept = sum(database.kept(name, level) for name, level in levels.items())
        return f"{kept:,} of {weights:,} weights kept, sparsity {1 - kept / weights:.4%}"
    codes, stored = (sum(database.bits(name, level, overhead) for name, level in levels.items()) / weights
                     for overhead in (False, True))
    return f"{codes:.4f} bits a weight, {stored:.4f} with scales and zeros"


def describe_whole(decoder: Decoder, config, database: Database, levels: Mapping[str, int]) -> str:
    """What they make of the whole model, in words. config: as the checkpoint has it, in whose dtype all else is
    stored."""
    weights = sum(parameter.numel() for parameter in decoder.model.parameters())
    searched = sum(math.prod(database.shape(name)) for name in levels)
    share = f"{searched:,} of {weights:,} weights ({searched / weights:.1%}) are in layers that were searched"
    if database.method == "sparsegpt":
        pruned = searched - sum(database.kept(name, level) for name, level in levels.items())
        return f"sparsity {pruned / weights:.4%}; {share}"
    bits = 8 * getattr(torch, str(dtype_in(config) or decoder.dtype).removeprefix("torch.")).itemsize
    stored = sum(database.bits(name, level, overhead=True) for name, level in levels.items())
    return (f"{(stored + (weights - searched) * bits) / weights:.4f} bits a weight with scales and zeros; {share}, the "
            f"others have {bits} bits")


# ---- configurations on the command line ------------------------------------------------------------------------------


def add_configuration_flags(parser: argparse.ArgumentParser) -> None:
    group = parser.add_argument_group("configuration (a drop configuration may go with one of the other two)")
    group.add_argument("--drop_config", metavar="FILE", help="layer_drop_config.txt of evo_drop.py")
    group.add_argument("--drop_budget", type=float, metavar="FRACTION",
                       help="refuse one that drops less than this share of the attentions and MLPs, e.g. 0.25")
    for kind, script in (("sparse", "evo_unstructured.py"), ("quant", "evo_quant.py")):
        group.add_argument(f"--{kind}_weights_path", metavar="FOLDER", help=f"database the {kind} configuration is for")
        group.add_argument(f"--{kind}_config_path", metavar="FILE|LEVEL",
                           help=f"result of {script}, or one level for all layers")
    group.add_argument("--sparse_budget", type=float, metavar="FRACTION",
                       help="refuse a sparse configuration that prunes less than this share of the weights, e.g. 0.7")
    group.add_argument("--quant_budget", type=float, metavar="BITS",
                       help="refuse a quant configuration that takes more bits a weight on average, e.g. 2.5")
    group.add_argument("--level_cache_gb", type=float, default=0.0, metavar="GB",
                       help="packed levels kept on the device (default: 0)")


def open_database(args: argparse.Namespace, kind: str, config=None) -> Database:
    """The database that --sparse_weights_path or --quant_weights_path names, by `kind`. Raises ValueError for one of
    the other kind, naming the flag, and for one of another model than `config` describes."""
    folder, method = getattr(args, f"{kind}_weights_path"), METHODS[kind]
    database = Database.open(folder)
    if database.method != method:
        raise ValueError(f"--{kind}_weights_path {folder}: holds {database.method} levels; build one with python -m "
                         f"database.{method}")
    if config is not None:
        database.check_model(config)
        database.check_weights(weights_fingerprint(args.model_name_or_path))
    return database


def check_configuration_flags(args: argparse.Namespace, config) -> None:
    """Raise ValueError for a configuration that cannot be read, does not fit its database and the model's `config`, or
    misses its budget: all that can be known before the model is loaded."""
    for kind in ("drop", *METHODS):
        file = args.drop_config if kind == "drop" else getattr(args, f"{kind}_config_path")
        budget = getattr(args, f"{kind}_budget")
        if budget is not None and not file:
            raise ValueError(f"--{kind}_budget {budget:g}: there is no {kind} configuration to hold to it; give "
                             f"one, or leave it out")
    if args.drop_config:
        states = read_drop_config(args.drop_config, config.get_text_config(decoder=True).num_hidden_layers)
        check_budget(args, "drop", sum(map(sum, states)) / (2 * len(states)))
    for kind in METHODS:
        folder, file = getattr(args, f"{kind}_weights_path"), getattr(args, f"{kind}_config_path")
        if bool(folder) != bool(file):
            raise ValueError(f"--{kind}_weights_path {folder}, --{kind}_config_path {file}: a configuration needs its "
                             f"database; give both or neither")
    if args.sparse_weights_path and args.quant_weights_path:
        raise ValueError("--sparse_weights_path and --quant_weights_path: a layer is either sparse or quantized; give "
                         "one")
    opened = open_configuration(args)
    if opened:
        database, levels = opened
        database.check_model(config)
        database.check_weights(weights_fingerprint(args.model_name_or_path))
        size = sum(math.prod(database.shape(name)) for name in levels)
        if database.method == "gptq":
            check_budget(args, "quant", sum(database.bits(name, level) for name, level in levels.items()) / size)
        else:
            check_budget(args, "sparse", 1 - sum(database.kept(name, level) for name, level in levels.items()) / size)


def check_budget(args: argparse.Namespace, kind: str, found: float) -> None:
    """Raise ValueError where a configuration takes more bits, or prunes or drops less, than --<kind>_budget allows."""
    budget = getattr(args, f"{kind}_budget")
    over = budget is not None and (found > budget + 1e-9 if kind == "quant" else found < budget - 1e-9)
    if over:
        measure = {"drop": "of the sub-blocks dropped", "sparse": "of the weights pruned",
                   "quant": "bits a weight"}[kind]
        file = args.drop_config if kind == "drop" else getattr(args, f"{kind}_config_path")
        raise ValueError(f"{file}: {found:.6g} {measure}, which misses --{kind}_budget {budget:g}; change the "
                         f"configuration or the budget")


def open_configuration(args: argparse.Namespace) -> tuple[Database, dict[str, int]] | None:
    """The database and the level of every layer that the flags name; None without a level configuration."""
    for kind in METHODS:
        file = getattr(args, f"{kind}_config_path")
        if not file:
            continue
        database = open_database(args, kind)
        uniform = re.fullmatch(r"-?\d+(\.\d+)?", file) is not None
        levels = dict.fromkeys(database.layers, parse_level(file)) if uniform else read_level_config(file)
        check_level_config(f"--{kind}_config_path {file}" if uniform else file, levels,
                           {name: database.levels(name) for name in database.layers})
        return database, levels
    return None


def load_configuration(args: argparse.Namespace, decoder: Decoder
                       ) -> tuple[Callable[[int, Hashable], None], tuple[Hashable, ...]]:
    """(set_block, candidate) of the configuration that the flags name, for the fitness walk or to compress the
    model."""
    count = len(decoder.blocks)
    dropped = read_drop_config(args.drop_config, count) if args.drop_config else [(False, False)] * count
    decoder.check_dropped(dropped)
    opened = open_configuration(args)
    switcher = LevelSwitcher(decoder, opened[0], args.level_cache_gb) if opened else None
    levels = switcher.states(opened[1]) if opened else [()] * count

    def set_block(index: int, state: tuple) -> None:
        if index == count:                           # embedding and head
            switcher.set_block(index, state)
            return
        drop, block_levels = state
        decoder.blocks[index].drop(*drop)
        if switcher:
            switcher.set_block(index, block_levels)

    return set_block, (*zip(dropped, levels), *levels[count:])
