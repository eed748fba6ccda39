"""Time, memory and disk that a list of commands needs on one A100 80 GB, from their flags and the model's shapes.

    python scripts/estimate.py PLAN

PLAN has a command a line, e.g. `evo_drop.py --model_name_or_path meta-llama/Meta-Llama-3-8B --sparsity 0.25`, as
scripts/common.sh writes them down. An estimate, not a measurement: no tensor is allocated and no weight is read.
"""
import argparse
import math
import shlex
import sys
from collections.abc import Iterable
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path

import torch
from torch import nn

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
import eval_config
import evo_drop
import evo_quant
import evo_unstructured
import finish
from baselines import dp, drop_scores, owl
from database import gptq, sparsegpt
from scripts import convergence, nonmonotonicity
from utils.data import default_sequence_length
from utils.decoder import find_blocks
from utils.errors import user_errors
from utils.model import load_config, model_class
from utils.report import format_table
from utils.tasks import split_names
from utils.units import FUSED

RATES = {"bf16": 312e12, "fp32": 19.5e12}                       # FLOP/s of an A100, dense
UTILIZATION = 0.5                                               # of them, in large matrix products
FILES = 2e9                                                     # bytes/s from and to a local disk
COPIES = 25e9                                                   # bytes/s from pinned host memory, PCIe 4.0 x16
UNPINNED = 6e9                                                  # from and to any other
WRITING = 0.7e9                                                 # bytes/s of one thread: a checksum, then the file
HALF = 2                                                        # bytes of a weight or activation
GB = 1e9
DEVICE = 80 * GB
# questions x answers x about as many tokens as a question with an answer has
TASK_TOKENS = {"arc_easy": 2376 * 4 * 35, "arc_challenge": 1172 * 4 * 40, "winogrande": 1267 * 2 * 30,
               "hellaswag": 10042 * 4 * 95, "piqa": 1838 * 2 * 35}


@dataclass(frozen=True)
class Shape:
    """Of a model: what its FLOP and bytes follow from."""
    blocks: int
    hidden: int
    vocabulary: int
    context: int                                 # default sequence length
    parameters: int
    attention_width: int                         # heads x head size
    layers: tuple[tuple[str, int, int], ...]     # (input, out, in): layers of the same input share a Hessian

    @property
    def weights(self) -> int:
        return sum(out * columns for _, out, columns in self.layers)

    def forward(self, tokens: float, length: int | None) -> float:
        """FLOP of the blocks: the layers' products, and a causal attention's two."""
        return tokens * (2 * self.weights + 2 * (length or self.context) * self.attention_width * self.blocks)

    def head(self, tokens: float) -> float:
        return 2 * tokens * self.hidden * self.vocabulary


@cache
def shape_of(name: str, trust_remote_code: bool = False) -> Shape:
    config = load_config(name, trust_remote_code)
    with torch.device("meta"):
        model = model_class(config).from_config(config, trust_remote_code=trust_remote_code)
    text_config = config.get_text_config(decoder=True)
    layers = []
    for layer_name, layer in find_blocks(model)[1].named_modules():
        if isinstance(layer, nn.Linear):
            parent, _, last = layer_name.rpartition(".")
            fused = next((f"{parent}.{tie}" for tie, sets in FUSED.items() if last in sets[0]), layer_name)
            layers.append((fused, layer.out_features, layer.in_features))
    if any(parameter.dim() == 3 and "experts" in own for own, parameter in model.named_parameters()):
        print(f"{name}: a mixture, whose experts are not counted in what follows")
    head_size = getattr(text_config, "head_dim", None) or text_config.hidden_size // text_config.num_attention_heads
    return Shape(text_config.num_hidden_layers, text_config.hidden_size, text_config.vocab_size,
                 default_sequence_length(config), sum(p.numel() for p in model.parameters()),
                 text_config.num_attention_heads * head_size, tuple(layers))


@dataclass
class Need:
    flop: dict[str, float] = field(default_factory=dict)    # by precision
    files: float = 0.0                           # bytes read and written
    disk: float = 0.0                            # bytes that stay
    device: float = 0.0                          # bytes at the peak
    host: float = 0.0
    copies: float = 0.0                          # bytes between host memory and the device, beside the computations
    waits: float = 0.0                           # the same, for which computations wait
    written: float = 0.0                         # bytes of files with checksums, written beside the computations
    sealed: float = 0.0                          # the same, for which they wait

    @property
    def seconds(self) -> float:
        computing = sum(flop / (UTILIZATION * RATES[kind]) for kind, flop in self.flop.items())
        return (max(computing, self.copies / COPIES, self.written / WRITING) + self.waits / UNPINNED
                + self.sealed / WRITING + self.files / FILES)

    def __add__(self, other: "Need") -> "Need":
        """Both, one after the other."""
        kinds = {*self.flop, *other.flop}
        return Need({kind: self.flop.get(kind, 0) + other.flop.get(kind, 0) for kind in kinds},
                    self.files + other.files, self.disk + other.disk, max(self.device, other.device),
                    max(self.host, other.host), self.copies + other.copies, self.waits + other.waits,
                    self.written + other.written, self.sealed + other.sealed)


# ---- one command -----------------------------------------------------------------------------------------------------


def resident(shape: Shape, args: argparse.Namespace) -> float:
    """Parameters on the device: all, or two blocks and what is in none."""
    offloaded = getattr(args, "cpu_offload_modules", False)
    return shape.parameters - (shape.weights * (1 - 2 / shape.blocks) if offloaded else 0)


def microbatch(shape: Shape, args: argparse.Namespace) -> tuple[float, float]:
    """(tokens, bytes a token) of the fitness walk: block inputs, and the teacher's logits."""
    a_token = (shape.blocks + 1) * shape.hidden * HALF + HALF * shape.vocabulary
    room = (DEVICE - HALF * resident(shape, args)) / 16                     # as utils/fitness.py has it
    return args.microbatch_tokens or min(8192, max(512, room // a_token)), a_token


def evaluations(shape: Shape, args: argparse.Namespace, candidates: float, candidate_tokens: float,
                teacher_tokens: float, database_bytes: float = 0.0) -> Need:
    """The teacher over its tokens, then `candidates` walks. Prefixes that candidates share are not subtracted."""
    length = getattr(args, "calibration_sequence_length", None) or getattr(args, "eval_sequence_length", None)
    flop = shape.forward(teacher_tokens + candidates * candidate_tokens, length) + shape.head(
        teacher_tokens + candidates * candidate_tokens)
    cached = min(database_bytes, getattr(args, "level_cache_gb", 0) * GB)
    return Need({"bf16": flop}, HALF * shape.parameters + database_bytes,
                device=HALF * (resident(shape, args) + teacher_tokens * shape.hidden)
                + math.prod(microbatch(shape, args)) + cached, host=HALF * shape.parameters)


def search_tokens(args: argparse.Namespace, generations: int) -> int:
    """Candidates times tokens of a whole search; the parents compete in the last step. At most: what parents have seen
    is not run again."""
    survivors, tokens = args.survivors_per_selection, args.tokens_per_selection
    candidates = [args.offspring, *survivors[:-1]]
    candidates[-1] += survivors[-1] if args.strategy == "plus" else 0
    confirmed = (generations + 1) * survivors[-1] * args.confirm_tokens
    return args.initially_generated * args.initial_tokens + confirmed + generations * sum(
        count * step for count, step in zip(candidates, tokens))


def search(shape: Shape, args: argparse.Namespace, database_bytes: float) -> Need:
    generations = args.generations
    if generations is None:                      # the paper's, of evo_drop.py
        dropped = math.floor(args.sparsity * shape.blocks + 1e-9)
        generations = math.ceil(dropped * (shape.blocks - dropped) / 1.5)
    need = evaluations(shape, args, 1, search_tokens(args, generations), args.calibration_tokens, database_bytes)
    if args.cpu_offload_modules:                 # every block once for each microbatch, whatever the candidates
        tokens, _ = microbatch(shape, args)
        steps = generations * sum(math.ceil(step / tokens) for step in args.tokens_per_selection)
        need.copies = HALF * shape.weights * (math.ceil(args.calibration_tokens / tokens) + steps)
        # two of a layer's levels (five bitwidths, seventeen sparsities), but for those that are kept on the device
        used = 2 / (17 if hasattr(args, "sparse_weights_path") else 5) * database_bytes
        need.copies += steps * max(0, used - getattr(args, "level_cache_gb", 0) * GB)
        need.device += 2 * args.offspring * min(tokens, args.tokens_per_selection[0]) * shape.hidden * HALF
    return need


def level_bytes(shape: Shape, args: argparse.Namespace) -> float:
    """Of all levels on disk: bitmasks and kept values, or codes with their float16 scales and uint8 zeros."""
    if hasattr(args, "bitwidth_options"):
        return sum(out * columns * bits / 8 + 3 * out * -(-columns // (args.group_size or columns))
                   for _, out, columns in shape.layers for bits in args.bitwidth_options)
    step = args.weights_diff or sparsegpt.default_weights_diff(args.sparsity, args.num_levels, shape.hidden)
    return sum(out * columns / 8 + HALF * kept for _, out, columns in shape.layers
               for kept in sparsegpt.kept_weights(out * columns, args.sparsity, args.num_levels, step).values())


def database(shape: Shape, args: argparse.Namespace) -> Need:
    quantized = hasattr(args, "bitwidth_options")
    levels = len(args.bitwidth_options) if quantized else 2 * args.num_levels + 1
    passes = 2 if quantized else 1               # quantized weights feed the next block
    inputs = {key: columns for key, _, columns in shape.layers}
    activations = HALF * args.calibration_tokens * shape.hidden
    largest = max(out * columns for _, out, columns in shape.layers)
    size = level_bytes(shape, args)
    on_device = (not args.cpu_offload_activations and not args.activations_dir
                 and activations < (DEVICE - HALF * resident(shape, args)) / 2)
    # above the diagonal alone, in eight parts; and in every pass a block takes its inputs, in the last it gives outputs
    hessians = 9 / 16 * sum(2 * args.calibration_tokens * columns**2 for columns in inputs.values())
    travelling = 0 if on_device else shape.blocks * (passes + 1) * activations
    return Need({"bf16": passes * shape.forward(args.calibration_tokens, args.calibration_sequence_length) + hessians,
                 "fp32": sum(levels * out * columns**2 + columns**3 for _, out, columns in shape.layers)},
                HALF * shape.parameters, size,
                HALF * resident(shape, args) + 8 * sum(c**2 for c in inputs.values()) / shape.blocks
                + 8 * levels * largest + (activations if on_device else 0),
                HALF * shape.parameters + (0 if on_device or args.activations_dir else activations),
                copies=travelling, written=size)


def finishing(shape: Shape, args: argparse.Namespace, database_bytes: float) -> Need:
    length = args.calibration_sequence_length or min(finish.SEQUENCE_LENGTH, shape.context)
    trained = 3 * args.steps * args.batch_size * length                     # forward, and twice that back
    states = HALF * args.calibration_tokens * shape.hidden                  # given, passed, and one being made
    on_device = 3 * states < DEVICE / 4
    # a block's are read and made twice; each step takes what it is given and what it should give; and offloaded blocks
    travelling = (0 if on_device else shape.blocks * (4 * states + HALF * 2 * trained / 3 * shape.hidden)) + (
        2 * HALF * shape.weights if args.cpu_offload_modules else 0)
    # of a block's weights: what is trained, its gradient and Adam's two moments, all in float32, the value in both
    block = (4 * 4 + 4 + 2 * HALF) * shape.weights / shape.blocks
    kept = database_bytes / 5 if args.quant_weights_path else HALF * shape.parameters
    together = args.end_to_end_steps * args.batch_size * length             # two forwards, and twice one back
    # of all blocks codes, or else what is trained and Adam's two moments, in float32
    state = (1 if args.quant_weights_path else 3 * 4) * shape.weights if together else 0
    return Need({"bf16": shape.forward(2 * args.calibration_tokens + trained + 4 * together, length)
                         + shape.head(4 * together)},
                HALF * shape.parameters + database_bytes, kept,
                HALF * resident(shape, args) + block + state + (3 * states if on_device else 0),
                HALF * shape.parameters + (0 if on_device else 3 * states), waits=travelling, sealed=kept)


def evaluation(shape: Shape, args: argparse.Namespace, database_bytes: float) -> Need:
    tokens = 0 if args.no_perplexity else args.eval_tokens * len(args.eval_datasets)
    compressed = bool(args.drop_config or args.sparse_config_path or args.quant_config_path)
    # files are read whole, for their checksums
    need = evaluations(shape, args, int(compressed), tokens, tokens, database_bytes)
    asked = sum(TASK_TOKENS.get(task, 0) for task in split_names(args.tasks or ""))
    need.flop["bf16"] += shape.forward(asked, 128) + shape.head(asked)
    return need


def scores(shape: Shape, args: argparse.Namespace) -> Need:
    of_blocks = set(args.scoring_method) & {"perplexity", "kl_div", "l2", "l2_normalized"}
    walks = sum(len(args.sparsities) if method.startswith("window") else 1
                for method in args.scoring_method if method not in of_blocks)
    return evaluations(shape, args, walks + len(of_blocks) * shape.blocks, args.calibration_tokens,
                       args.calibration_tokens)


def need_of(command: list[str], sizes: dict[str, float]) -> Need:
    """`sizes`: bytes of the databases that commands before this one build; this one's are added."""
    program, arguments = (command[1], command[2:]) if command[0] == "-m" else (command[0], command[1:])
    args = PARSERS[program](arguments)
    shape = shape_of(args.model_name_or_path, args.trust_remote_code)
    folder = getattr(args, "sparse_weights_path", None) or getattr(args, "quant_weights_path", None)
    folder = Path(folder or "none")
    stored = sizes.get(str(folder)) or sum(file.stat().st_size for file in folder.glob("*.safetensors"))
    match program:
        case "evo_drop.py" | "evo_unstructured.py" | "evo_quant.py":
            return search(shape, args, stored)
        case "database.sparsegpt" | "database.gptq":
            need = database(shape, args)
            sizes[str(args.save_dir)] = need.disk
            return need
        case "eval_config.py":
            return evaluation(shape, args, stored)
        case "finish.py":
            return finishing(shape, args, stored)
        case "baselines.drop_scores":
            return scores(shape, args)
        case "baselines.owl":
            return evaluations(shape, args, len(args.owl_lambda) * len(args.owl_m), args.calibration_tokens,
                               args.calibration_tokens, stored)
        case "baselines.dp":
            if args.errors == "manifest":
                return Need()
            changes = len(shape.layers) * len(args.measured_levels or range(17 if args.sparse_weights_path else 5))
            return evaluations(shape, args, changes / 2, args.calibration_tokens, args.calibration_tokens, stored)
        case "scripts/nonmonotonicity.py":
            return evaluations(shape, args, nonmonotonicity.count_sets(shape.blocks, args.most),
                               args.calibration_tokens, args.calibration_tokens)
        case "scripts/convergence.py":
            pairs = shape.blocks // 2
            return evaluations(shape, args, math.comb(pairs, convergence.pairs_dropped(args.sparsity, shape.blocks)),
                               args.brute_force_tokens, args.calibration_tokens)


PARSERS = {"evo_drop.py": evo_drop.parse_arguments, "evo_unstructured.py": evo_unstructured.parse_arguments,
           "evo_quant.py": evo_quant.parse_arguments, "eval_config.py": eval_config.parse_arguments,
           "finish.py": finish.parse_arguments,
           "database.sparsegpt": lambda argv: sparsegpt.make_parser().parse_args(argv),
           "database.gptq": lambda argv: gptq.make_parser().parse_args(argv),
           "baselines.drop_scores": drop_scores.parse_arguments, "baselines.owl": owl.parse_arguments,
           "baselines.dp": dp.parse_arguments, "scripts/nonmonotonicity.py": nonmonotonicity.parse_arguments,
           "scripts/convergence.py": convergence.parse_arguments}


def estimate(commands: Iterable[list[str]]) -> dict[str, tuple[int, Need]]:
    """Program -> (number of commands, what they need)."""
    sizes: dict[str, float] = {}
    totals: dict[str, tuple[int, Need]] = {}
    for command in commands:
        program = command[1] if command[0] == "-m" else command[0]
        count, need = totals.get(program, (0, Need()))
        totals[program] = count + 1, need + need_of(command, sizes)
    return totals


def amount(value: float) -> str:
    """In two digits, or as an integer where that has more."""
    return f"{value:,.0f}" if value >= 10 else "< 0.001" if 0 < value < 1e-3 else f"{value:.2g}"


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("plan", type=Path, help="file with a command a line")
    commands = [shlex.split(line) for line in parser.parse_args(argv).plan.read_text().splitlines()]
    if not commands:
        print("nothing: all parts are finished")
        return
    with user_errors():
        totals = estimate(commands)
    all_needs = sum((need for _, need in totals.values()), Need())
    rows = [["program", "runs", "PFLOP", "GPU GB", "host GB", "disk GB", "A100 hours (estimate)"]]
    for program, (count, need) in [*totals.items(), ("all", (len(commands), all_needs))]:
        rows.append([program, count, *map(amount, (
            sum(need.flop.values()) / 1e15, need.device / GB, need.host / GB, need.disk / GB, need.seconds / 3600))])
    print(format_table(rows))
    print(f"An estimate: counted FLOP, without subtracting what candidates share, at {UTILIZATION:.0%} of an A100's "
          f"{', '.join(f'{rate / 1e12:g} ({kind})' for kind, rate in RATES.items())} TFLOP/s, and files at "
          f"{FILES / GB:g} GB/s. Beside the computations: offloaded blocks, an offloaded search's levels that "
          f"are not cached and databases' hidden states at {COPIES / GB:g} GB/s, databases' files at "
          f"{WRITING / GB:g} GB/s. Not beside them: of finish.py, what does not stay on the GPU at {UNPINNED / GB:g} "
          f"GB/s, and the result's files")


if __name__ == "__main__":
    main()
