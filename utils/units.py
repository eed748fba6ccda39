"""Units of an allocation search: layers that change level together, and the levels they may take."""
import argparse
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from fnmatch import fnmatchcase

from utils.configs import parse_level

# Projections that inference engines fuse into one matrix, by the names they have in published models: --tie -> sets.
FUSED = {"qkv": [{"q_proj", "k_proj", "v_proj", "query", "key", "value", "wq", "wk", "wv"},
                 {"q_a_proj", "kv_a_proj_with_mqa"},                                     # latent attention
                 {"in_proj_qkv", "in_proj_z"}, {"in_proj_b", "in_proj_a"}],              # linear attention
         "gate_up": [{"gate_proj", "up_proj", "w1", "w3"}]}
EXPERT = re.compile(r"(.*experts)\.\d+\.(.+)")        # a layer of one expert of many: which experts, what of each


@dataclass(frozen=True)
class Unit:
    names: tuple[str, ...]       # layers, in model order
    levels: tuple[float, ...]      # that all of them may take, ascending

    def __len__(self) -> int:
        return len(self.names)

    @property
    def of_experts(self) -> bool:
        return EXPERT.fullmatch(self.names[0]) is not None


def add_unit_flags(group: argparse._ArgumentGroup) -> None:
    group.add_argument("--tie", default="", metavar="SETS",
                       help="layers that change level together, so that engines that fuse them can serve the result: "
                            "qkv, gate_up, qkv,gate_up or block; of a mixture, a matrix changes in all experts of a "
                            "block together, with experts all of them do, with single_experts each alone "
                            "(default: none)")
    group.add_argument("--pin", nargs="+", default=[], metavar="PATTERN=LEVEL",
                       help="layers held at one level, e.g. 'model.layers.0.*=4'")
    group.add_argument("--bounds", nargs="+", default=[], metavar="PATTERN=LOW:HIGH",
                       help="levels that layers may take, e.g. '*.down_proj=3:6'; of several matching the last counts")


def check_unit_flags(args: argparse.Namespace) -> None:
    """Raise ValueError for a --tie, --pin or --bounds that cannot be read."""
    for word in filter(None, args.tie.split(",")):
        if word not in (*FUSED, "block", "experts", "single_experts"):
            raise ValueError(f"--tie {args.tie}: {word} is not a set of layers; use qkv, gate_up, qkv,gate_up, block, "
                             f"experts or single_experts")
    parse_bounds(args)


def parse_bounds(args: argparse.Namespace) -> list[tuple[str, str, float, float]]:
    """(as given, pattern, lowest, highest level) of every --bounds, then of every --pin."""
    bounds = []
    for flag, items in (("--bounds", args.bounds), ("--pin", args.pin)):
        for item in items:
            pattern, _, value = item.rpartition("=")
            low, colon, high = value.partition(":")
            try:
                if not pattern or bool(colon) != (flag == "--bounds"):
                    raise ValueError
                bounds.append((f"{flag} {item}", pattern, parse_level(low), parse_level(high if colon else low)))
            except ValueError:
                example = "'*.down_proj=3:6'" if flag == "--bounds" else "'model.layers.0.*=4'"
                raise ValueError(f"{flag} {item}: not understood; write it like {example}") from None
    return bounds


def build_units(blocks: Sequence[Sequence[str]], levels: Mapping[str, Iterable[float]], args: argparse.Namespace
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
            fused = next((min(members) for tie in ties for members in FUSED.get(tie, ()) if last in members), None)
            key = (index,) if "block" in ties else (parent, fused) if fused else (name,)
            if "block" not in ties and "single_experts" not in ties and (expert := EXPERT.fullmatch(name)):
                key = (index, expert[1], None if "experts" in ties else fused or expert[2])
            grouped.setdefault(key, []).append(name)
    units = []
    for names in grouped.values():
        shared = sorted(set.intersection(*(set(allowed[name]) for name in names)))
        if not shared:
            raise ValueError(f"--tie {args.tie}: {', '.join(names)} have no level in common that --pin and --bounds "
                             f"allow; change those")
        units.append(Unit(tuple(names), tuple(shared)))
    return units


def units_of(levels: Mapping[str, Iterable[int]], args: argparse.Namespace) -> list[Unit]:
    """Those that `build_units` will make of the layers of a database, whose blocks are their first number."""
    blocks: dict[str, list[str]] = {}
    for name in levels:
        blocks.setdefault(re.search(r"\d+|$", name)[0], []).append(name)
    return build_units([*blocks.values()], levels, args)


def level_map(blocks: Sequence[Sequence[str]], values: Mapping[str, float]) -> tuple[list[list[float]], list[str]]:
    """([kinds, blocks] with NaN where a block has no such layer, kinds): values by kind of layer and depth; of a
    block's experts the mean."""
    kinds = [_kinds(names) for names in blocks]
    rows: dict[str, list[float]] = {kind: [float("nan")] * len(blocks) for of_block in kinds for kind in of_block}
    for index, of_block in enumerate(kinds):
        for kind, names in of_block.items():
            rows[kind][index] = sum(values[name] for name in names) / len(names)
    return list(rows.values()), list(rows)


def _kinds(names: Sequence[str]) -> dict[str, list[str]]:
    """A block's layers by what their names are inside it: what follows the part that all share, less an expert's
    number."""
    parts = [name.split(".") for name in names]
    shared = next((i for i, words in enumerate(zip(*parts)) if len(set(words)) > 1), -1)
    kinds: dict[str, list[str]] = {}
    for name, words in zip(names, parts):
        kind = ".".join(words[shared:])
        expert = EXPERT.fullmatch(kind)
        kinds.setdefault(f"{expert[1]}.{expert[2]}" if expert else kind, []).append(name)
    return kinds
