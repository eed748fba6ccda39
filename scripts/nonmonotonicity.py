"""Find two sets of blocks, one the other and one block more, such that dropping more loses less.

    python scripts/nonmonotonicity.py --model_name_or_path meta-llama/Meta-Llama-3-8B --most 3 --save_dir pair

All sets of up to --most blocks are measured by KL divergence from the whole model on the calibration tokens. Writes
fewer.txt and more.txt, configurations of the pair in which the additional block wins back the largest share, and
pairs.json with the ten best.
"""
import argparse
import itertools
import json
import math
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
from baselines.drop_scores import Blocks, measure_all, without
from utils.configs import write_drop_config
from utils.errors import RunError, user_errors
from utils.files import check_writable, write_atomic
from utils.fitness import Fitness
from utils.flags import add_calibration_flags, add_model_flags, check_calibration_flags
from utils.inputs import decoder_of, documents_of, tokenizer_of
from utils.model import load_config
from utils.report import format_table


def parse_arguments(argv: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add_model_flags(parser)
    add_calibration_flags(parser, tokens=8192)
    parser.add_argument("--most", type=int, default=3, metavar="BLOCKS", help="dropped together (default: 3)")
    parser.add_argument("--seed", type=int, default=0, help="of the calibration tokens' choice (default: 0)")
    parser.add_argument("--save_dir", required=True, metavar="FOLDER", help="of fewer.txt, more.txt and pairs.json")
    return parser.parse_args(argv)


def count_sets(num_blocks: int, most: int) -> int:
    return sum(math.comb(num_blocks, size) for size in range(1, most + 1))


def better_with_more(divergences: dict[Blocks, float]) -> list[tuple[float, Blocks, Blocks]]:
    """(KL of the larger set over KL of the smaller, smaller, larger), best first, where that is below 1."""
    pairs = []
    for more, divergence in divergences.items():
        for fewer in itertools.combinations(more, len(more) - 1):
            if fewer and divergence < divergences[fewer]:
                pairs.append((divergence / divergences[fewer], fewer, more))
    return sorted(pairs)


@user_errors(RunError)
def main(argv: list[str] | None = None) -> list[tuple[float, Blocks, Blocks]]:
    args = parse_arguments(argv)
    with user_errors():
        if args.most < 2:
            raise ValueError(f"--most {args.most}: a pair needs sets of at least 2 blocks")
        config = load_config(args.model_name_or_path, args.trust_remote_code)
        check_calibration_flags(args)
        check_writable(args.save_dir, "--save_dir")
        documents = documents_of(args, config, tokenizer_of(args))
        decoder = decoder_of(args)
        decoder.check_dropped([(True, True)] * len(decoder.blocks))
    num_blocks = len(decoder.blocks)
    fitness = Fitness(decoder, documents, lambda i, state: decoder.blocks[i].drop(*state),
                      microbatch_tokens=args.microbatch_tokens, progress="uncompressed model on calibration data")
    sets = itertools.chain.from_iterable(itertools.combinations(range(num_blocks), size)
                                         for size in range(1, args.most + 1))
    total = count_sets(num_blocks, args.most)
    divergences = measure_all(fitness, sets, total)
    pairs = better_with_more(divergences)
    print(f"{len(pairs):,} pairs of {total:,} sets in which dropping one block more loses less")
    if not pairs:
        raise SystemExit("no such pair: raise --most, or this model's losses are monotone on these tokens")
    print(format_table([["drop", "KL", "drop more", "KL, of more"],
                        *[[_words(fewer), divergences[fewer], _words(more), divergences[more]]
                          for _, fewer, more in pairs[:10]]]))
    _, fewer, more = pairs[0]
    write_drop_config(f"{args.save_dir}/fewer.txt", without(fewer, num_blocks))
    write_drop_config(f"{args.save_dir}/more.txt", without(more, num_blocks))
    write_atomic(f"{args.save_dir}/pairs.json", json.dumps(
        [{"fewer": fewer, "KL fewer": divergences[fewer], "more": more, "KL more": divergences[more]}
         for _, fewer, more in pairs[:10]]) + "\n")
    return pairs


def _words(blocks: Blocks) -> str:
    return " ".join(map(str, blocks))


if __name__ == "__main__":
    main()
