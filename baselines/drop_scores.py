"""Depth-pruning baselines: score every block once, then drop whole blocks by their scores (the paper's appendix).

    python -m baselines.drop_scores --model_name_or_path meta-llama/Meta-Llama-3-8B --sparsities 0.125 0.25 0.375 0.5

cosine_similarity         ShortGPT (Men et al., 2024), block influence: 1 - cos(block input, block output), over tokens
window_cosine_similarity  Gromov et al. (2024): the same over a window of consecutive blocks, which go together
norm_ratio                weight subcloning (Samragh et al., 2023): ‖f(x)‖ / ‖x + f(x)‖ of a block that adds f(x)
perplexity                Shortened Llama (Kim et al., 2024): perplexity without the block
kl_div                    KL divergence from the whole model without the block
l2, l2_normalized         ‖h' - h‖, or that over ‖h‖: the last block's output, before the final norm, without the block
The lowest scores are dropped. --brute_force measures every combination of blocks instead. Each sparsity gives a file
<method>-<sparsity>.txt with one of none/attn+mlp a block; <method>.json holds the scores.
"""
import argparse
import itertools
import json
import math
import time
from collections.abc import Callable, Iterable, Iterator

import torch
import torch.nn.functional as F

from utils.configs import write_drop_config
from utils.decoder import BlockInputs, Decoder
from utils.errors import RunError, user_errors
from utils.files import check_writable, write_atomic
from utils.fitness import Fitness, Row, assemble, default_microbatch_tokens, microbatches
from utils.flags import add_calibration_flags, add_model_flags, check_calibration_flags
from utils.inputs import decoder_of, documents_of, tokenizer_of
from utils.model import load_config
from utils.report import format_table

FITNESS = {"kl_div": "kl", "perplexity": "ppl"}
METHODS = ("cosine_similarity", "window_cosine_similarity", "norm_ratio", "perplexity", "kl_div", "l2", "l2_normalized")
Blocks = tuple[int, ...]                 # indices of whole blocks
BATCH = 256                              # combinations of a brute-force search that are walked together


def parse_arguments(argv: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add_model_flags(parser)
    add_calibration_flags(parser, tokens=131072)
    scores = parser.add_argument_group("scores")
    scores.add_argument("--scoring_method", nargs="+", choices=METHODS, default=["cosine_similarity"], metavar="METHOD",
                        help=f"one or several of {', '.join(METHODS)} (default: cosine_similarity)")
    scores.add_argument("--sparsities", nargs="+", type=float, default=[0.25], metavar="FRACTION",
                        help="drop this share, rounded down, of the blocks, e.g. 0.125 0.25 0.375 0.5 (default: 0.25)")
    scores.add_argument("--brute_force", action="store_true",
                        help="measure all combinations of blocks, with --scoring_method kl_div or perplexity")
    scores.add_argument("--brute_force_limit", type=int, default=10_000, metavar="COMBINATIONS",
                        help="refuse to measure more than this many for one sparsity (default: 10000)")
    scores.add_argument("--seed", type=int, default=0, help="of the calibration tokens' choice (default: 0)")
    output = parser.add_argument_group("output")
    output.add_argument("--save_dir", default="baseline_configs", metavar="FOLDER",
                        help="write the configurations and scores there (default: baseline_configs)")
    return parser.parse_args(argv)


def check_flags(args: argparse.Namespace, num_blocks: int) -> None:
    for sparsity in args.sparsities:
        if not 0 < sparsity < 1:
            raise ValueError(f"--sparsities {sparsity}: fractions between 0 and 1 are needed, e.g. 0.25")
        if not num_dropped(sparsity, num_blocks):
            raise ValueError(f"--sparsities {sparsity}: drops none of the {num_blocks} blocks; give at least "
                             f"{math.ceil(1000 / num_blocks) / 1000}")
        combinations = math.comb(num_blocks, num_dropped(sparsity, num_blocks))
        if args.brute_force and combinations > args.brute_force_limit:
            raise ValueError(f"--brute_force: --sparsities {sparsity} has {combinations:,} combinations of "
                             f"{num_dropped(sparsity, num_blocks)} of {num_blocks} blocks, "
                             f"{combinations * args.calibration_tokens:,} tokens; if that is meant, add "
                             f"--brute_force_limit {combinations}")
    if args.brute_force and not set(args.scoring_method) <= set(FITNESS):
        raise ValueError(f"--brute_force: --scoring_method {' '.join(args.scoring_method)} only scores single blocks; "
                         f"use {' or '.join(FITNESS)}")
    check_calibration_flags(args)


def num_dropped(sparsity: float, num_blocks: int) -> int:
    """Whole blocks dropped at a sparsity, rounded down as in evo_drop.py."""
    return math.floor(sparsity * num_blocks + 1e-9)


# ---- scores from hidden states ---------------------------------------------------------------------------------------


def cosine_distance(before: torch.Tensor, after: torch.Tensor) -> torch.Tensor:
    """1 - cos of [..., hidden] states (Men et al., 2024, equation 1; Gromov et al. over windows)."""
    return 1 - F.cosine_similarity(before, after, dim=-1)


def norm_ratio(before: torch.Tensor, after: torch.Tensor) -> torch.Tensor:
    """‖f(x)‖ / ‖x + f(x)‖ of [..., hidden] states: how much of its output a block has added itself."""
    return (after - before).norm(dim=-1) / after.norm(dim=-1)


def l2_distance(before: torch.Tensor, after: torch.Tensor) -> torch.Tensor:
    return (after - before).norm(dim=-1)


def l2_distance_normalized(before: torch.Tensor, after: torch.Tensor) -> torch.Tensor:
    return (after - before).norm(dim=-1) / before.norm(dim=-1)


Measure = Callable[[torch.Tensor, torch.Tensor], torch.Tensor]
ACROSS_BLOCKS: dict[str, Measure] = {"cosine_similarity": cosine_distance, "window_cosine_similarity": cosine_distance,
                                     "norm_ratio": norm_ratio}
AT_THE_END: dict[str, Measure] = {"l2": l2_distance, "l2_normalized": l2_distance_normalized}


@torch.no_grad()
def walk(decoder: Decoder, documents: list[torch.Tensor], microbatch_tokens: int | None
         ) -> Iterator[tuple[BlockInputs, list[torch.Tensor]]]:
    """For each microbatch what the model passes to its blocks, and n + 1 hidden states [rows, tokens, hidden]: the
    input of every block, and the last block's output as it is before the final norm. All blocks are put back first: a
    candidate may have been measured without some."""
    for block in decoder.blocks:
        block.drop(False, False)
    decoder.states[:] = [None] * len(decoder.blocks)
    whole = [(i, len(document)) for i, document in enumerate(documents)]
    for rows in microbatches(whole, microbatch_tokens or default_microbatch_tokens(decoder), decoder.packed_rows):
        input_ids, position_ids, _ = assemble(documents, rows)
        inputs = decoder.block_inputs(input_ids, position_ids)
        states = [inputs.hidden_states]
        for i in range(len(decoder.blocks)):
            states.append(decoder.run_block(i, states[-1], inputs))
        yield inputs, states


def scores_across_blocks(decoder: Decoder, documents: list[torch.Tensor], measure: Measure, length: int = 1,
                         microbatch_tokens: int | None = None) -> list[float]:
    """Mean over all tokens of `measure(input, output)` of every window of `length` consecutive blocks."""
    sums = torch.zeros(len(decoder.blocks) + 1 - length, dtype=torch.float64)
    for _, states in walk(decoder, documents, microbatch_tokens):
        sums += torch.stack([measure(before.float(), after.float()).sum(dtype=torch.float64)
                             for before, after in zip(states, states[length:])]).cpu()
    return (sums / sum(map(len, documents))).tolist()


def scores_at_the_end(decoder: Decoder, documents: list[torch.Tensor], measure: Measure,
                      microbatch_tokens: int | None = None) -> list[float]:
    """Mean over all tokens of `measure(last block's output of the whole model, the same without block i)` for every i.

    The model without block i is run from block i on: what is before is shared.
    """
    sums = torch.zeros(len(decoder.blocks), dtype=torch.float64)
    for inputs, states in walk(decoder, documents, microbatch_tokens):
        for block in decoder.blocks:
            block.drop(True, True)
            hidden_states = states[block.index]
            for i in range(block.index, len(decoder.blocks)):
                hidden_states = decoder.run_block(i, hidden_states, inputs)
            block.drop(False, False)
            sums[block.index] += measure(states[-1].float(), hidden_states.float()).sum(dtype=torch.float64).cpu()
    return (sums / sum(map(len, documents))).tolist()


# ---- scores from the model's output ----------------------------------------------------------------------------------


def without(dropped: Blocks, num_blocks: int) -> tuple[tuple[bool, bool], ...]:
    """(attention dropped, MLP dropped) of every block when whole blocks are dropped."""
    return tuple((i in dropped, i in dropped) for i in range(num_blocks))


def scores_from_output(fitness: Fitness, kind: str) -> list[float]:
    """KL divergence (kind "kl", nats a token) or perplexity ("ppl") without each block, in one walk."""
    num_blocks = len(fitness.decoder.blocks)
    candidates = [without((i,), num_blocks) for i in range(num_blocks)]
    return [value for value, in fitness.measure(candidates, kinds=(kind,))]


def measure_all(fitness: Fitness, sets: Iterable[Blocks], total: int, kind: str = "kl", minibatch: Row | None = None
                ) -> dict[Blocks, float]:
    """KL divergence or perplexity, on all documents or a minibatch, without each of `total` sets of blocks, which are
    in order: those of a batch share first blocks."""
    sets, measured, num_blocks = iter(sets), {}, len(fitness.decoder.blocks)
    began = shown = time.time()
    while batch := list(itertools.islice(sets, BATCH)):
        values = fitness.measure([without(dropped, num_blocks) for dropped in batch], minibatch, kinds=(kind,))
        measured.update((dropped, value) for (value,), dropped in zip(values, batch))
        if time.time() - shown > 10:
            shown = time.time()
            print(f"{len(measured):,} of {total:,} sets of blocks, lowest {kind} {min(measured.values()):.5f}, "
                  f"{(shown - began) * (total - len(measured)) / len(measured):.0f} s left", flush=True)
    return measured


def brute_force(fitness: Fitness, kind: str, count: int) -> tuple[float, Blocks]:
    """(value, blocks) of the best of all combinations of `count` dropped blocks."""
    num_blocks = len(fitness.decoder.blocks)
    combinations = itertools.combinations(range(num_blocks), count)
    measured = measure_all(fitness, combinations, math.comb(num_blocks, count), kind)
    return min((value, dropped) for dropped, value in measured.items())


# ---- from scores to configurations -----------------------------------------------------------------------------------


def lowest(scores: list[float], count: int) -> tuple[int, ...]:
    """The `count` blocks of lowest score in ascending order; of equal ones the earlier, and one that is NaN last."""
    order = sorted(range(len(scores)), key=lambda i: (math.isnan(scores[i]), scores[i], i))
    return tuple(sorted(order[:count]))


@user_errors(RunError)
def main(argv: list[str] | None = None) -> dict[str, dict]:
    """Write the configurations of the flags; returns what the <method>.json files hold, by method."""
    args = parse_arguments(argv)
    with user_errors():
        config = load_config(args.model_name_or_path, args.trust_remote_code)
        check_flags(args, config.get_text_config(decoder=True).num_hidden_layers)
        check_writable(args.save_dir, "--save_dir")
        documents = documents_of(args, config, tokenizer_of(args))
        decoder = decoder_of(args)
        decoder.check_dropped([(True, True)] * len(decoder.blocks))      # any of them may be, and whole
    num_blocks = len(decoder.blocks)
    counts = {sparsity: num_dropped(sparsity, num_blocks) for sparsity in args.sparsities}
    if set(args.scoring_method) & set(FITNESS):
        fitness = Fitness(decoder, documents, lambda i, state: decoder.blocks[i].drop(*state),
                          teacher="kl_div" in args.scoring_method, microbatch_tokens=args.microbatch_tokens,
                          progress="uncompressed model on calibration data")

    results = {}
    for method in args.scoring_method:
        scores: dict[str, object]
        print(f"{method}, {sum(map(len, documents)):,} tokens", flush=True)
        if args.brute_force:
            found = {sparsity: brute_force(fitness, FITNESS[method], count) for sparsity, count in counts.items()}
            dropped = {sparsity: blocks for sparsity, (_, blocks) in found.items()}
            scores = {str(sparsity): value for sparsity, (value, _) in found.items()}
        elif method == "window_cosine_similarity":
            windows = {sparsity: scores_across_blocks(decoder, documents, cosine_distance, count,
                                                      args.microbatch_tokens) for sparsity, count in counts.items()}
            dropped = {sparsity: tuple(range(first, first + counts[sparsity])) for sparsity, values in windows.items()
                       for first in lowest(values, 1)}
            scores = {str(sparsity): values for sparsity, values in windows.items()}
        else:
            if method in ACROSS_BLOCKS:
                values = scores_across_blocks(decoder, documents, ACROSS_BLOCKS[method], 1, args.microbatch_tokens)
            elif method in AT_THE_END:
                values = scores_at_the_end(decoder, documents, AT_THE_END[method], args.microbatch_tokens)
            else:
                values = scores_from_output(fitness, FITNESS[method])
            dropped = {sparsity: lowest(values, count) for sparsity, count in counts.items()}
            scores = {"blocks": values}
        name = f"brute_force_{method}" if args.brute_force else method
        for sparsity, blocks in dropped.items():
            write_drop_config(f"{args.save_dir}/{name}-{sparsity}.txt", without(blocks, num_blocks))
        results[name] = {"model": args.model_name_or_path, "tokens": args.calibration_tokens, "scores": scores,
                         "dropped": {str(sparsity): blocks for sparsity, blocks in dropped.items()}}
        write_atomic(f"{args.save_dir}/{name}.json", json.dumps(results[name]) + "\n")
    print(format_table([["method", "sparsity", "blocks dropped"],
                        *[[name, sparsity, " ".join(map(str, blocks))] for name, result in results.items()
                          for sparsity, blocks in result["dropped"].items()]]))
    print(f"saved: {args.save_dir}")
    return results


if __name__ == "__main__":
    main()
