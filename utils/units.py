"""Units of an allocation search: layers that change level together, and the levels they may take."""
import argparse
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from fnmatch import fnmatchcase

# Projections that inference engines fuse into one matrix, by the names they have in published models.
FUSED = {"qkv": {"q_proj", "k_proj", "v_proj", "query", "key", "value", "wq", "wk", "wv"},
         "gate_up": {"gate_proj", "up_proj", "w1", "w3"}}


@dataclass(frozen=True)
class Unit:
    names: tuple[str, ...]       # layers, in model order
    levels: tuple[int, ...]      # that all of them may take, ascending

    def __len__(self) -> int:
        return len(self.names)


def add_unit_flags(group: argparse._ArgumentGroup) -> None:
    group.add_argument("--tie", default="", metavar="SETS",
                       help="layers that change level together, so that engines that fuse them can serve the result: "
                            "qkv, gate_up, qkv,gate_up or block (default: none)")
    group.add_argument("--pin", nargs="+", default=[], metavar="PATTERN=LEVEL",
                       help="layers held at one level, e.g. 'model.layers.0.*=4'")
    group.add_argument("--bounds", nargs="+", default=[], metavar="PATTERN=LOW:HIGH",
                       help="levels that layers may take, e.g. '*.down_proj=3:6'; of several matching the last counts")


def check_unit_flags(args: argparse.Namespace) -> None:
    """Raise ValueError for a --tie, --pin or --bounds that cannot be read."""
    for word in filter(None, args.tie.split(",")):
        if word not in (*FUSED, "block"):
            raise ValueError(f"--tie {args.tie}: {word} is not a set of layers; use qkv, gate_up, qkv,gate_up or block")
    parse_bounds(args)


def parse_bounds(args: argparse.Namespace) -> list[tuple[str, str, int, int]]:
    """(as given, pattern, lowest, highest level) of every --bounds, then of every --pin."""
    bounds = []
    for flag, items in (("--bounds", args.bounds), ("--pin", args.pin)):
        for item in items:
            pattern, _, value = item.rpartition("=")
            low, colon, high = value.partition(":")
            try:
                if not pattern or bool(colon) != (flag == "--bounds"):
                    raise ValueError
                bounds.append((f"{flag} {item}", pattern, int(low), int(high if colon else low)))
            except ValueError:
                example = "'*.down_proj=3:6'" if flag == "--bounds" else "'model.layers.0.*=4'"
                raise ValueError(f"{flag} {item}: not understood; write it like {example}") from None
    return bounds


def build_units(blocks: Sequence[Sequence[str]], levels: Mapping[str, Iterable[int]], args: argparse.Namespace
                ) -> list[Unit]:
    """Units of the layers in `blocks` (names by block) with the levels that the database and the flags leave them.

    Raises ValueError when a pattern matches no layer, or leaves one without a level.
    """
    allowed = {name: sorted(levels[name]) for names in blocks for name in names}
    for given, pattern, low, high in parse_bounds(args):
        matching = [name for name in allowed if fnmatchcase(name, pattern)]
        if not matching:
            raise ValueError(f"{given}: matches no layer; layers are named like {next(iter(allowed))}")
        for name in matching:
            allowed[name] = [level for level in sorted(levels[name]) if low <= level <= high]
            if not allowed[name]:
                raise ValueError(f"{given}: {name} has no such level; it has {sorted(levels[name])}")
    ties = args.tie.split(",") if args.tie else []
    grouped: dict[tuple, list[str]] = {}
    for index, names in enumerate(blocks):
        for name in names:
            parent, _, last = name.rpartition(".")
            fused = next((tie for tie in ties if last in FUSED.get(tie, ())), None)
            key = (index,) if "block" in ties else (parent, fused) if fused else (name,)
            grouped.setdefault(key, []).append(name)
    units = []
    for names in grouped.values():
        shared = sorted(set.intersection(*(set(allowed[name]) for name in names)))
        if not shared:
            raise ValueError(f"--tie {args.tie}: {', '.join(names)} have no level in common that --pin and --bounds "
                             f"allow; change those")
        units.append(Unit(tuple(names), tuple(shared)))
    return units


def level_map(blocks: Sequence[Sequence[str]], values: Mapping[str, float]) -> tuple[list[list[float]], list[str]]:
    """([kinds, blocks] with NaN where a block has no such layer, kinds): values by kind of layer and depth."""
    kinds = list(dict.fromkeys(_kind(name, names) for names in blocks for name in names))
    rows = [[next((values[name] for name in names if _kind(name, names) == kind), float("nan")) for names in blocks]
            for kind in kinds]
    return rows, kinds


def _kind(name: str, names: Sequence[str]) -> str:
    """A layer's name inside its block: what follows the part that all names of the block share."""
    if len(names) == 1:
        return name.rpartition(".")[2]
    parts = [other.split(".") for other in names]
    shared = next(i for i, words in enumerate(zip(*parts)) if len(set(words)) > 1)
    return ".".join(name.split(".")[shared:])
