"""Finish what a search has found: train the compressed weights, block after block, in their own mixture.

    python finish.py --model_name_or_path meta-llama/Meta-Llama-3-8B --quant_weights_path db \\
        --quant_config_path evo-kl-configuration-2.5.txt --save_dir db/finished-2.5
    python finish.py --model_name_or_path meta-llama/Meta-Llama-3-8B --drop_config layer_drop_config.txt --save_dir out

Each block is trained to give what the uncompressed model's block gave, on what the blocks finished so far pass to it; a
block before others that are dropped whole, to give what the last of those gave. With --end_to_end_steps all are then
trained together, to predict what the model predicts. The budget stays. Of bits and sparsity comes a database with one
level a layer, which eval_config.py and export.py take with the same configuration; of depth a checkpoint without what
was dropped.
"""
import argparse
import time
from datetime import timedelta
from pathlib import Path

import torch

from database.finished import FinishedCheckpoint, FinishedDatabase, header_of
from database.levels import add_configuration_flags, check_configuration_flags, open_configuration
from database.tuning import PARTS, HiddenStates, Passed
from utils import distributed
from utils.configs import read_drop_config
from utils.data import sequence_length
from utils.decoder import Decoder
from utils.errors import RunError, user_errors
from utils.files import check_writable, lock
from utils.fitness import default_microbatch_tokens, out_of_memory
from utils.flags import add_calibration_flags, add_model_flags, check_calibration_flags, check_least
from utils.inputs import decoder_of, documents_of, tokenizer_of
from utils.model import check_unpacked, load_config

SEED_STRIDE = 1_000_003          # from one block's batches to the next one's
SEQUENCE_LENGTH = 2048           # of calibration documents by default: gradients need memory


def make_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add_model_flags(parser, offload=True)
    add_calibration_flags(parser, tokens=262144, longest=SEQUENCE_LENGTH)
    add_configuration_flags(parser)
    group = parser.add_argument_group("training")
    group.add_argument("--steps", type=int, default=200, help="of the optimizer, a block (default: 200)")
    group.add_argument("--end_to_end_steps", type=int, default=0, metavar="STEPS",
                       help="afterwards, of all blocks together, to the least KL divergence: of quantized layers the "
                            "scales alone, in 3 bytes a weight of memory; all else, K-quants' codes among it, needs 15 "
                            "(default: 0)")
    group.add_argument("--batch_size", type=int, default=8, metavar="DOCUMENTS",
                       help="a step, each of --calibration_sequence_length tokens (default: 8)")
    group.add_argument("--learning_rate", type=float, metavar="RATE",
                       help="at first, falling linearly to 0: of quantized weights in steps of their grid, of others "
                            "in their root mean square (default: of quantized ones 0.02, of sparse ones "
                            "0.45 / √inputs, of others 0.25 / √inputs)")
    group.add_argument("--seed", type=int, default=0, help="of documents and batches (default: 0)")
    group.add_argument("--save_dir", type=Path, required=True, metavar="DIR",
                       help="of the database, or for depth of the checkpoint; run again to resume")
    return parser


def parse_arguments(argv: list[str] | None = None) -> argparse.Namespace:
    return make_parser().parse_args(argv)


def check_flags(args: argparse.Namespace, config) -> None:
    """Raise ValueError, naming the flag, its value and the remedy. Sets the sequence length where it was left out."""
    check_calibration_flags(args)
    check_least(args, steps=1, end_to_end_steps=0, batch_size=1)
    if args.end_to_end_steps and args.cpu_offload_modules:
        raise ValueError(f"--end_to_end_steps {args.end_to_end_steps}: trains the whole model on the device; leave it "
                         f"or --cpu_offload_modules out")
    if args.learning_rate is not None and not 0 < args.learning_rate <= 1:
        raise ValueError(f"--learning_rate {args.learning_rate:g}: must be above 0 and at most 1, e.g. 0.02")
    args.calibration_sequence_length = args.calibration_sequence_length or min(
        SEQUENCE_LENGTH, sequence_length(None, config, "--calibration_sequence_length"))
    if args.batch_size * args.calibration_sequence_length > args.calibration_tokens:
        raise ValueError(f"--batch_size {args.batch_size}: takes {args.batch_size} documents of "
                         f"{args.calibration_sequence_length} tokens, more than --calibration_tokens "
                         f"{args.calibration_tokens}; raise those or lower it")
    check_writable(args.save_dir, "--save_dir")
    lock(args.save_dir, "--save_dir")


def finish_blocks(args: argparse.Namespace, decoder: Decoder, documents: list[torch.Tensor],
                  dropped: list[tuple[bool, bool]], result: FinishedDatabase | FinishedCheckpoint,
                  device: torch.device, home: torch.device) -> tuple[HiddenStates, list[Passed] | None, list[Passed]]:
    """Train the blocks that are left, one after the other; afterwards the model is the finished one. A block is on
    `device` while it is at work and at `home` before and after. Returns the calibration documents, what the first block
    is given of them, and what the uncompressed model's last one gives."""
    decoder.blocks[0].module.to(device)
    batch_tokens = args.batch_size * args.calibration_sequence_length
    tokens = args.microbatch_tokens or min(default_microbatch_tokens(decoder), -(-batch_tokens // PARTS))
    gone = {index for index, halves in enumerate(dropped) if all(halves)}
    calibration = HiddenStates(decoder, documents, tokens, device, result.own_ends, streams=4 if gone else 2)

    def after_dropped(states: list[Passed], index: int) -> list[Passed]:
        """What the uncompressed blocks that are dropped right after block `index` make of its outputs `states`."""
        while (index := index + 1) in gone:
            decoder.blocks[index].module.to(device)
            states = calibration.run(states, index)
            decoder.blocks[index].module.to(home)
        return states

    began, trained = time.time(), 0
    embedded = result.embedded(calibration)
    # to the uncompressed block, and by the finished ones before it; None: the model's embeddings
    given, passed = None, embedded
    for block in decoder.blocks:
        block.module.to(device)
        targets = calibration.run(given, block.index)
        note = "dropped" if block.index in gone else "finished before"
        if not result.has(block):
            weights = result.weights(block)
            goal = after_dropped(targets, block.index) if weights else targets
            block.drop(*dropped[block.index])
            first, last = calibration.train(block.index, weights, passed, goal, args.steps, batch_tokens,
                                            args.seed + SEED_STRIDE * block.index) if weights else (0.0, 0.0)
            block.drop(False, False)
            result.save(block, weights, calibration, given)
            trained += 1
            left = (time.time() - began) / trained * sum(not result.has(other) for other in decoder.blocks)
            note = f"relative error {first:.3g} -> {last:.3g}; left {timedelta(seconds=round(left))}"
        result.load(block)
        block.drop(*dropped[block.index])
        passed = calibration.run(passed, block.index)
        given = targets
        block.module.to(home)
        print(f"block {block.index + 1}/{len(decoder.blocks)}: {note}", flush=True)
    distributed.report_idle(time.time() - began)
    return calibration, embedded, given


def finish_together(args: argparse.Namespace, decoder: Decoder, result: FinishedDatabase | FinishedCheckpoint,
                    calibration: HiddenStates, embedded: list[Passed] | None, teacher: list[Passed]) -> None:
    """Train all blocks of the finished model together."""
    weights = [result.weights(block, together=True) for block in decoder.blocks]
    losses, began, shown = [], time.time(), time.time()
    for loss in calibration.train_together(weights, embedded, teacher, args.end_to_end_steps,
                                           args.batch_size * args.calibration_sequence_length, args.seed):
        losses.append(loss)
        if time.time() - shown > 10 or len(losses) in (1, args.end_to_end_steps):
            shown = time.time()
            left = (shown - began) / len(losses) * (args.end_to_end_steps - len(losses))
            recent = losses[-10:]
            print(f"end to end: step {len(losses)}/{args.end_to_end_steps}, divergence "
                  f"{sum(recent) / len(recent):.4g}; left {timedelta(seconds=round(left))}", flush=True)
    result.save_together(weights)


@user_errors(RunError)
def main(argv: list[str] | None = None) -> None:
    """Finish what the flags name, or what is left of it."""
    args = parse_arguments(argv)
    with user_errors():
        config = load_config(args.model_name_or_path, args.trust_remote_code)
        check_configuration_flags(args, config)
        database, levels = open_configuration(args) or (None, {})
        if database is None and not args.drop_config:
            raise ValueError("--quant_config_path, --sparse_config_path, --drop_config: nothing to finish; give a "
                             "configuration")
        num_blocks = config.get_text_config(decoder=True).num_hidden_layers
        dropped = read_drop_config(args.drop_config, num_blocks) if args.drop_config else [(False, False)] * num_blocks
        check_flags(args, config)
        tokenizer = tokenizer_of(args)
        documents = documents_of(args, config, tokenizer)
        decoder = decoder_of(args)
        check_unpacked(decoder.model, "--model_name_or_path", args.model_name_or_path)
        device = decoder.device
        home = torch.device("cpu") if decoder.offloaded else device
        decoder.end_offloading()
        decoder.check_dropped(dropped)
        header = header_of(args, config, decoder, documents, dropped)
        result = (FinishedDatabase(args, header, decoder, database, levels, dropped) if database else
                  FinishedCheckpoint(args, config, header, decoder, dropped))
        if result.complete:
            print(f"{args.save_dir}: finished")
            return
    began = time.time()
    try:
        trained = finish_blocks(args, decoder, documents, dropped, result, device, home)
        if args.end_to_end_steps:
            finish_together(args, decoder, result, *trained)
    except (RuntimeError, MemoryError) as error:
        if not out_of_memory(error):
            raise
        reason = (str(error) or type(error).__name__).splitlines()[0]
        remedy = f"{'without --end_to_end_steps' if args.end_to_end_steps else 'with --cpu_offload_modules'}"
        raise RunError(f"{reason}; to go on, run the same command with a smaller --microbatch_tokens, or "
                       f"{remedy}") from error
    result.end(tokenizer)
    print(f"{args.save_dir}: finished in {timedelta(seconds=round(time.time() - began))}")


if __name__ == "__main__":
    distributed.launch(main)
