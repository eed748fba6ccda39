"""Rank the best candidate of every generation of a search among all candidates there are.

    python evo_drop.py ... --sparsity 0.375 --drop_entire_block --drop_two_consecutive --output_dir run
    python scripts/convergence.py ... --sparsity 0.375 --search run --output convergence.json

Every way to drop that share of the pairs of consecutive blocks is measured by KL divergence from the whole model on
tokens of the search's own calibration text. Beside the JSON, convergence-optimum.txt has the best one.
"""
import argparse
import itertools
import json
import math
import random
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
from baselines.drop_scores import measure_all, without
from utils.configs import DROP_WORDS, drop_words, write_drop_config
from utils.data import draw_minibatch
from utils.errors import RunError, user_errors
from utils.files import check_writable_file, write_atomic
from utils.fitness import Fitness
from utils.flags import add_calibration_flags, add_model_flags, check_calibration_flags
from utils.inputs import decoder_of, documents_of, tokenizer_of
from utils.model import load_config
from utils.report import format_table
from utils.runs import read_log


def parse_arguments(argv: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add_model_flags(parser)
    add_calibration_flags(parser, tokens=131072)
    parser.add_argument("--sparsity", type=float, required=True, metavar="FRACTION", help="the search's, e.g. 0.375")
    parser.add_argument("--brute_force_tokens", type=int, default=8192, metavar="TOKENS",
                        help="of the calibration text, on which every candidate is measured (default: 8192)")
    parser.add_argument("--search", type=Path, required=True, metavar="FOLDER", help="of the run of evo_drop.py")
    parser.add_argument("--seed", type=int, default=0, help="of the search (default: 0)")
    parser.add_argument("--output", type=Path, required=True, metavar="FILE", help="write the ranks as JSON there")
    return parser.parse_args(argv)


def pairs_dropped(sparsity: float, num_blocks: int) -> int:
    return math.floor(sparsity * (num_blocks // 2) + 1e-9)


def check_winners(winners: list[str], args: argparse.Namespace, num_blocks: int) -> None:
    """Raise ValueError unless all of them are among the combinations that are measured."""
    count = pairs_dropped(args.sparsity, num_blocks)
    for words in map(str.split, winners):
        if len(words) != num_blocks or words[::2] != words[1::2] or words.count("attn+mlp") != 2 * count or (
                words.count("none") != num_blocks - 2 * count):
            raise ValueError(f"--search {args.search}: {' '.join(words)} is not {count} pairs of the model's "
                             f"{num_blocks} blocks; run evo_drop.py with --drop_entire_block --drop_two_consecutive "
                             f"--sparsity {args.sparsity:g}")


def first_reached(ranks: list[int]) -> list[tuple[int, int]]:
    """(generation, rank) wherever the best candidate so far changes its rank; generation 0 is the start."""
    return [(generation, rank) for generation, (rank, before) in enumerate(zip(ranks, [None, *ranks]))
            if rank != before]


@user_errors(RunError)
def main(argv: list[str] | None = None) -> dict:
    args = parse_arguments(argv)
    with user_errors():
        config = load_config(args.model_name_or_path, args.trust_remote_code)
        check_calibration_flags(args)
        if not 2 <= args.brute_force_tokens <= args.calibration_tokens:
            raise ValueError(f"--brute_force_tokens {args.brute_force_tokens}: from 2 to the {args.calibration_tokens} "
                             f"--calibration_tokens are needed")
        check_writable_file(args.output, "--output")
        winners = [record["dropped"] for record in map(json.loads, read_log(args.search).splitlines())
                   if "dropped" in record]
        check_winners(winners, args, config.get_text_config(decoder=True).num_hidden_layers)
        documents = documents_of(args, config, tokenizer_of(args))
        decoder = decoder_of(args)
        decoder.check_dropped([(True, True)] * len(decoder.blocks))
    num_blocks = len(decoder.blocks)
    fitness = Fitness(decoder, documents, lambda i, state: decoder.blocks[i].drop(*state),
                      microbatch_tokens=args.microbatch_tokens, progress="uncompressed model on calibration data")
    minibatch = draw_minibatch(documents, args.brute_force_tokens, random.Random(args.seed))
    count = pairs_dropped(args.sparsity, num_blocks)
    total = math.comb(num_blocks // 2, count)
    sets = (tuple(block for pair in pairs for block in (2 * pair, 2 * pair + 1))
            for pairs in itertools.combinations(range(num_blocks // 2), count))
    divergences = {" ".join(drop_words(without(dropped, num_blocks))): value
                   for dropped, value in measure_all(fitness, sets, total, minibatch=minibatch).items()}
    ranked = sorted(divergences, key=divergences.get)
    ranks = [ranked.index(winner) + 1 for winner in winners]
    print(format_table([["generation", "rank of the best", "of", "KL", "optimum's KL"],
                        *[[generation, rank, total, divergences[ranked[rank - 1]], divergences[ranked[0]]]
                          for generation, rank in first_reached(ranks)]]))
    write_drop_config(args.output.with_name("convergence-optimum.txt"),
                      [DROP_WORDS[word] for word in ranked[0].split()])
    result = {"model": args.model_name_or_path, "candidates": total, "ranks": ranks,
              "KL": [divergences[winner] for winner in winners], "optimum": ranked[0],
              "optimum's KL": divergences[ranked[0]]}
    write_atomic(args.output, json.dumps(result) + "\n")
    return result


if __name__ == "__main__":
    main()
