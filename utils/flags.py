"""Command-line flags that the searches share, with the reference implementation's names, and the checks that come
before anything is loaded."""
import argparse
import sys
from collections.abc import Callable, Sequence

from utils.data import check_dataset

START_SHARE = 0.1            # of --search_tokens, for measuring each unit alone
GENERATIONS = 24             # that --search_tokens makes of half a million tokens; more of more, by the cube root


def add_model_flags(parser: argparse.ArgumentParser, offload: bool = False, compiled: bool = False) -> None:
    """`offload`, `compiled`: the program knows what to do with --cpu_offload_modules, with --compile."""
    group = parser.add_argument_group("model")
    group.add_argument("--model_name_or_path", required=True, metavar="NAME",
                       help="hub name or folder of a causal language model, e.g. meta-llama/Meta-Llama-3-8B")
    group.add_argument("--tokenizer_name", metavar="NAME", help="tokenizer, if not the model's own")
    group.add_argument("--use_fast_tokenizer", action=argparse.BooleanOptionalAction, default=True,
                       help="use the Rust tokenizer (default: yes)")
    group.add_argument("--dtype", default="auto", choices=["auto", "float16", "bfloat16", "float32", "float64"],
                       help="of the weights; auto: the checkpoint's on a GPU, float32 on a CPU; bfloat16 is faster on "
                            "CPUs with AVX-512 BF16 or AMX (default: auto)")
    group.add_argument("--attn_implementation", choices=["eager", "sdpa", "flash_attention_2"],
                       help="default: what transformers picks for the model")
    group.add_argument("--device", help="cpu, cuda or cuda:N (default: the first GPU, else the CPU)")
    group.add_argument("--microbatch_tokens", type=int, metavar="TOKENS",
                       help="tokens that go through the model at once, e.g. 4096 (default: by the device's memory)")
    group.add_argument("--trust_remote_code", action="store_true", help="run Python code that comes with the model")
    if offload:
        group.add_argument("--cpu_offload_modules", action="store_true",
                           help="keep blocks in host memory and only those at work on the device, for a model larger "
                                "than it")
    if compiled:
        group.add_argument("--compile", action="store_true",
                           help="run blocks through torch.compile: can be faster, after some seconds; the same up to "
                                "rounding; needs a C++ compiler")


def add_calibration_flags(parser: argparse.ArgumentParser, tokens: int, longest: int = 8192) -> None:
    group = parser.add_argument_group("calibration")
    group.add_argument("--calibration_data", default="fineweb_edu", metavar="DATA",
                       help="fineweb_edu, c4, wikitext2, stdlib, a .txt/.jsonl/.parquet file or folder, or several in "
                            "equal parts, joined by a plus: fineweb_edu+code.jsonl (default: fineweb_edu)")
    group.add_argument("--calibration_tokens", type=int, default=tokens, metavar="TOKENS",
                       help=f"exactly this many, or the run is refused (default: {tokens})")
    group.add_argument("--calibration_sequence_length", type=int, metavar="TOKENS",
                       help=f"longest document, in tokens, e.g. 4096 (default: min(context length, {longest}))")
    add_text_flag(group)


def add_text_flag(group: argparse._ArgumentGroup) -> None:
    group.add_argument("--text_field", default="text", metavar="FIELD",
                       help="of rows in local .jsonl and .parquet files: a text, or a chat's messages (default: text)")


def add_evaluation_flags(parser: argparse.ArgumentParser, in_search: bool = True) -> None:
    group = parser.add_argument_group("evaluation")
    group.add_argument("--eval_datasets", nargs="+", default=["fineweb_edu", "wikitext2", "c4"], metavar="DATA",
                       help="as --calibration_data; the held-out side is used (default: fineweb_edu wikitext2 c4)")
    group.add_argument("--eval_tokens", type=int, default=524288, metavar="TOKENS",
                       help="at most this many of each dataset (default: 524288)")
    group.add_argument("--eval_sequence_length", type=int, metavar="TOKENS",
                       help="longest document, in tokens (default: min(context length, 8192))")
    if not in_search:
        add_text_flag(group)
    else:
        group.add_argument("--eval_every", type=int, default=1, metavar="GENERATIONS",
                           help="log perplexities every so often; 0: only at the end (default: 1, which is slow)")
        group.add_argument("--no_eval", action="store_true", help="measure no perplexities at all")


def add_search_flags(parser: argparse.ArgumentParser, generations: int | None, offspring: int, survivors: list[int],
                     tokens: list[int], init: dict[str, str], initially_generated: int, initial_tokens: int,
                     fitness: list[str], generations_help: str) -> argparse._ArgumentGroup:
    """`init`: meaning of every --init, the first is the default."""
    group = parser.add_argument_group("evolutionary search")
    group.add_argument("--search_tokens", type=int, metavar="TOKENS",
                       help="how long to search at most, about, in tokens of all candidates: sets --init, --screen, "
                            "--refine, --initial_tokens, --generations, --offspring and the selection steps as "
                            "recommended, where they are not given, and prints them")
    group.add_argument("--generations", type=int, default=generations, help=generations_help)
    group.add_argument("--offspring", type=int, default=offspring, metavar="CANDIDATES",
                       help=f"a generation (default: {offspring})")
    group.add_argument("--population_size", type=int, metavar="CANDIDATES",
                       help="parents; always the last of --survivors_per_selection (default: that)")
    group.add_argument("--init", choices=list(init), default=next(iter(init)),
                       help=f"the first parents. {'; '.join(f'{name}: {meaning}' for name, meaning in init.items())} "
                            f"(default: {next(iter(init))})")
    group.add_argument("--initially_generated", type=int, default=initially_generated, metavar="CANDIDATES",
                       help=f"random ones from which the first parents are chosen (default: {initially_generated})")
    group.add_argument("--initial_tokens", type=int, default=initial_tokens, metavar="TOKENS",
                       help=f"on which the random ones are measured, or every unit alone (default: {initial_tokens})")
    group.add_argument("--survivors_per_selection", type=int, nargs="+", default=survivors, metavar="CANDIDATES",
                       help=f"kept after each selection step (default: {' '.join(map(str, survivors))})")
    group.add_argument("--tokens_per_selection", type=int, nargs="+", default=tokens, metavar="TOKENS",
                       help=f"of each selection step's minibatch (default: {' '.join(map(str, tokens))})")
    group.add_argument("--screen", type=int, default=1, metavar="FACTOR",
                       help="draw this many times the offspring and measure as many as else: three in four are those "
                            "that an additive model of the levels, fitted to all that was measured before, ranks best, "
                            "the others random, e.g. 4 (default: 1, all are measured)")
    group.add_argument("--strategy", choices=["plus", "comma"], default="plus",
                       help="plus: the parents compete in the last selection step; comma: offspring alone survive "
                            "(default: plus)")
    group.add_argument("--confirm_tokens", type=int, default=0, metavar="TOKENS",
                       help="a parent gives way only to what is better on this much text, too, the same in all "
                            "generations, e.g. four times the last step's (default: 0, the last step decides)")
    group.add_argument("--no_reuse", action="store_true",
                       help="run parents again on documents that they have seen, as the paper's count of tokens has "
                            "it; by default that is looked up, which gives the same")
    group.add_argument("--max_mutations", type=int, default=3, metavar="SWITCHES",
                       help="an offspring differs by min(U1, U2) level switches, U uniform in 1..this (default: 3)")
    group.add_argument("--fixed_mutations", type=int, metavar="SWITCHES",
                       help="every offspring differs by this many level switches instead, for the paper's ablation")
    group.add_argument("--fitness_fn", choices=fitness, default="kl",
                       help="kl: mean KL divergence from the uncompressed model, nats a token (default: kl)")
    if "sparse_kl" in fitness:
        group.add_argument("--kl_topk", type=int, default=10, metavar="LOGITS",
                           help="of sparse_kl: the teacher's largest (default: 10)")
    group.add_argument("--seed", type=int, default=0, help="of everything random (default: 0)")
    return group


def add_output_flags(parser: argparse.ArgumentParser, task: str) -> argparse._ArgumentGroup:
    group = parser.add_argument_group("output")
    group.add_argument("--output_dir", metavar="FOLDER",
                       help=f"of this run; the same command resumes it (default: runs/{task}-<hash of the flags>)")
    group.add_argument("--log_wandb", action="store_true", help="log to Weights & Biases")
    return group


def spread_search_tokens(args: argparse.Namespace, argv: Sequence[str] | None, parser: argparse.ArgumentParser,
                         check: Callable[[argparse.Namespace], None], way: list[str], start: int, refining: int = 0,
                         confirm: bool = False) -> argparse.Namespace:
    """`args`, where --search_tokens is given with the flags `way` and with numbers that spend about as many tokens;
    flags in `argv` come before those. Raises ValueError, naming the flag, where that is too few.

    start, refining: evaluations of --initial_tokens that the start and --refine take. A tenth of the tokens is for the
    start. The first selection step measures 16 candidates, the second 4 on four times the tokens, the last 2 and the
    parent on sixteen times, which makes 80 times the first step's tokens a generation.
    """
    tokens = args.search_tokens
    if tokens is None:
        return args
    least = max(25_000, round(16 * start / START_SHARE))
    if tokens < least:
        raise ValueError(f"--search_tokens {tokens}: too few to measure every unit and to select; give at least "
                         f"{least}")
    initial = START_SHARE * tokens / start
    left = (tokens - initial * (start + refining)) / (80 + 64 / 3 * confirm)
    generations = round(GENERATIONS * (tokens / 500_000) ** (1 / 3))
    first = int(min(left / generations, args.calibration_tokens / 16)) // 2 * 2
    if first < 2:
        raise ValueError(f"--calibration_tokens {args.calibration_tokens}: too few for --search_tokens; give at least "
                         f"32")
    chosen = [*way, "--initial_tokens", int(min(initial, 16 * first)) // 2 * 2, "--generations",
              max(1, round(left / first)), "--offspring", 16, "--survivors_per_selection", 4, 2, 1,
              "--tokens_per_selection", first, 4 * first, 16 * first]
    if confirm:
        chosen += ["--confirm_tokens", min(64 * first, args.calibration_tokens)]
    chosen = [*map(str, chosen)]
    print(f"--search_tokens {tokens}: {' '.join(chosen)}")
    args = parser.parse_args([*chosen, *(sys.argv[1:] if argv is None else argv)])
    try:
        check(args)
    except ValueError as error:
        raise ValueError(f"{error} (of this --search_tokens has set {' '.join(chosen)}: what is given by hand comes "
                         f"before that, e.g. --refine 0 --screen 1 --confirm_tokens 0)") from error
    return args


def flag_defaults(parser: argparse.ArgumentParser) -> dict:
    """Flag -> its default; none of the flags that are required."""
    return {action.dest: action.default for action in parser._actions
            if not action.required and action.default is not argparse.SUPPRESS}


def check_calibration_flags(args: argparse.Namespace) -> None:
    """Raise ValueError for model and calibration flags that no model and no data could satisfy."""
    check_least(args, calibration_tokens=2, calibration_sequence_length=2, microbatch_tokens=1)
    check_dataset(args.calibration_data, "--calibration_data")


def check_evaluation_flags(args: argparse.Namespace) -> None:
    """Raise ValueError for model and evaluation flags that no model and no data could satisfy."""
    check_least(args, eval_tokens=2, eval_sequence_length=2, microbatch_tokens=1)
    for name in args.eval_datasets:
        check_dataset(name, "--eval_datasets")


def check_least(args: argparse.Namespace, **least: int) -> None:
    """Raise ValueError for a flag, of those named, that is below the number beside it."""
    for flag, number in least.items():
        value = getattr(args, flag)
        if value is not None and value < number:
            raise ValueError(f"--{flag} {value}: must be at least {number}")


def check_search_flags(args: argparse.Namespace) -> None:
    """Raise ValueError, naming the flag, its value and the remedy, for flags that no model and no data could satisfy.
    Sets `population_size` where it was left out."""
    survivors, tokens = args.survivors_per_selection, args.tokens_per_selection
    args.population_size = survivors[-1] if args.population_size is None else args.population_size
    if len(survivors) != len(tokens):
        raise ValueError(f"--survivors_per_selection {_words(survivors)} and --tokens_per_selection {_words(tokens)}: "
                         f"{len(survivors)} and {len(tokens)} steps; give one number each for every selection step")
    if min(survivors) < 1 or min(tokens) < 2:
        raise ValueError(f"--survivors_per_selection {_words(survivors)}, --tokens_per_selection {_words(tokens)}: "
                         f"at least 1 survivor and 2 tokens in every step are needed")
    for least, meaning, names in (
            (1, "must be at least 1", ("offspring", "screen", "population_size", "initially_generated", "max_mutations",
                                       "fixed_mutations", "microbatch_tokens", "kl_topk")),
            (0, "must be 0 or more", ("generations", "eval_every", "refine")),
            (2, "at least 2 are needed, one token to predict another",
             ("calibration_sequence_length", "eval_sequence_length", "calibration_tokens", "eval_tokens",
              "initial_tokens"))):
        for flag in names:
            value = getattr(args, flag, None)
            if value is not None and value < least:
                raise ValueError(f"--{flag} {value}: {meaning}")
    if survivors[0] > args.offspring:
        raise ValueError(f"--survivors_per_selection {_words(survivors)}: more survivors than the {args.offspring} "
                         f"--offspring; lower it or raise --offspring")
    if sorted(survivors, reverse=True) != survivors:
        raise ValueError(f"--survivors_per_selection {_words(survivors)}: a step cannot keep more than the one before "
                         f"it; give falling numbers")
    if survivors[-1] != args.population_size:
        raise ValueError(f"--population_size {args.population_size}: must equal the last of --survivors_per_selection "
                         f"{_words(survivors)}, since the last step's survivors are the next parents")
    if args.initially_generated < args.population_size:
        raise ValueError(f"--initially_generated {args.initially_generated}: fewer than --population_size "
                         f"{args.population_size}; generate at least as many")
    if args.confirm_tokens and (args.strategy == "comma" or args.confirm_tokens < 2):
        raise ValueError(f"--confirm_tokens {args.confirm_tokens}: " + (
            "at least 2 are needed, one token to predict another; 0 confirms nothing" if args.confirm_tokens < 2 else
            "keeps parents that are better, which --strategy comma lets go; leave out one of them"))
    for flag, value in (("--initial_tokens", args.initial_tokens), ("--tokens_per_selection", max(tokens)),
                        ("--confirm_tokens", args.confirm_tokens)):
        if value > args.calibration_tokens:
            raise ValueError(f"{flag} {value}: more than the {args.calibration_tokens} --calibration_tokens; raise "
                             f"those or lower it")
    check_dataset(args.calibration_data, "--calibration_data")
    if not args.no_eval:
        for name in args.eval_datasets:
            check_dataset(name, "--eval_datasets")


def _words(values: list[int]) -> str:
    return " ".join(map(str, values))
