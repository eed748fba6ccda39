"""Perplexity, KL divergence from the uncompressed model, and lm-eval tasks, of found configurations and checkpoints.

    python eval_config.py --model_name_or_path meta-llama/Meta-Llama-3-8B --drop_config layer_drop_config.txt
    python eval_config.py --model_name_or_path meta-llama/Meta-Llama-3-8B --checkpoint finished-25
    python eval_config.py --model_name_or_path meta-llama/Meta-Llama-3-8B --quant_weights_path db \\
        --quant_config_path 3 --tasks arc_easy,arc_challenge,winogrande,hellaswag,piqa

Without a configuration only the dense model is evaluated. Prints tables and, with --output, writes JSON.
"""
import argparse
import json
from pathlib import Path

from database.levels import (
    add_configuration_flags,
    check_configuration_flags,
    describe_levels,
    describe_whole,
    load_configuration,
    open_configuration,
)
from database.store import MANIFEST
from utils.data import sequence_length
from utils.errors import RunError, user_errors
from utils.evaluation import Evaluation, load_evaluation_documents
from utils.files import check_writable_file, write_atomic
from utils.flags import add_evaluation_flags, add_model_flags, check_evaluation_flags
from utils.inputs import decoder_of, tokenizer_of
from utils.model import load_config, load_decoder
from utils.report import evaluation_rows, format_table
from utils.tasks import add_task_flags, average_accuracy, check_task_flags, find_tasks, run_tasks, task_rows


def parse_arguments(argv: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add_model_flags(parser, offload=True)
    add_configuration_flags(parser)
    add_evaluation_flags(parser, in_search=False)
    add_task_flags(parser)
    parser.add_argument("--checkpoint", metavar="FOLDER",
                        help="instead of a configuration: what finish.py, export.py or another tool made of the model")
    parser.add_argument("--no_perplexity", action="store_true", help="run the tasks alone")
    parser.add_argument("--output", metavar="FILE", help="write the results as JSON there")
    return parser.parse_args(argv)


@user_errors(RunError)
def main(argv: list[str] | None = None) -> dict:
    """Evaluate what the flags name; returns {"dense" or "compressed": {dataset: {"ppl", "kl"}}}, and with --tasks
    "tasks": {task: {metric: value}} and "average_accuracy", in percent, of the configuration."""
    args = parse_arguments(argv)
    with user_errors():
        check_task_flags(args)
        if args.no_perplexity and not args.tasks:
            raise ValueError("--no_perplexity: leaves nothing to evaluate; name --tasks, or leave it out")
        if args.checkpoint and (args.drop_config or args.sparse_config_path or args.quant_config_path or args.tasks):
            raise ValueError(f"--checkpoint {args.checkpoint}: is compared with the uncompressed model; leave "
                             f"configurations out, and run --tasks with it as --model_name_or_path")
        if args.checkpoint and Path(args.checkpoint, MANIFEST).is_file():
            raise ValueError(f"--checkpoint {args.checkpoint}: is a database; give it as --quant_weights_path or "
                             f"--sparse_weights_path, with its configuration")
        if args.tasks and args.cpu_offload_modules:
            raise ValueError("--cpu_offload_modules: --tasks run the whole model at once; leave one of them out, or "
                             "run the tasks on what export.py saves, in a runtime that spreads it over devices")
        datasets = [] if args.no_perplexity else args.eval_datasets
        if datasets:
            check_evaluation_flags(args)
        if args.output:
            check_writable_file(args.output, "--output")
        config = load_config(args.model_name_or_path, args.trust_remote_code)
        check_configuration_flags(args, config)
        tasks = find_tasks(args.tasks, args.include_path) if args.tasks else None
        tokenizer = tokenizer_of(args)
        documents = load_evaluation_documents(datasets, tokenizer, args.eval_tokens,
                                              sequence_length(args.eval_sequence_length, config,
                                                              "--eval_sequence_length"), 0, args.text_field)
        decoder = decoder_of(args)
        set_block, candidate = load_configuration(args, decoder)
        checkpoint = load_decoder(args.checkpoint, args.dtype, args.device, args.attn_implementation,
                                  args.trust_remote_code, args.cpu_offload_modules,
                                  flag="--checkpoint") if args.checkpoint else None

    compressed = bool(args.drop_config or args.sparse_config_path or args.quant_config_path)
    if opened := open_configuration(args):
        print(f"searched layers: {describe_levels(*opened)}\n"
              f"whole model: {describe_whole(decoder, config, *opened)}")
    results = {}
    if datasets:
        evaluation = Evaluation(decoder, documents, set_block, args.microbatch_tokens)
        results["dense"] = evaluation.dense
        if compressed:
            results["compressed"] = evaluation(candidate)
        elif checkpoint:
            with user_errors():
                results["compressed"] = evaluation.of(checkpoint)
        print(format_table(evaluation_rows(results)))
    if tasks:
        for index, state in enumerate(candidate):
            set_block(index, state)
        measured = run_tasks(args, tasks, decoder.model, tokenizer)
        print(format_table(task_rows("compressed" if compressed else "dense", measured)))
        results |= {"tasks": measured, "average_accuracy": average_accuracy(measured)}
    if args.output:
        write_atomic(args.output, json.dumps(results, indent=2) + "\n")
    return results


if __name__ == "__main__":
    main()
