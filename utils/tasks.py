"""Tasks of EleutherAI's lm-eval on a model in memory. The harness is imported only where tasks are asked for."""
import argparse
import difflib
from collections.abc import Iterator, Mapping, Sequence
from copy import deepcopy
from functools import partial
from pathlib import Path


def add_task_flags(parser: argparse.ArgumentParser) -> None:
    group = parser.add_argument_group("lm-eval tasks, on the configuration (without one: on the dense model)")
    group.add_argument("--tasks", metavar="NAMES", help="separated by commas, e.g. the paper's "
                       "arc_easy,arc_challenge,winogrande,hellaswag,piqa")
    group.add_argument("--num_fewshot", type=int, metavar="EXAMPLES",
                       help="put before each question (default: the task's own number, else 0)")
    group.add_argument("--batch_size", default="16", metavar="REQUESTS|auto",
                       help="run together; auto: as many as fit (default: 16)")
    group.add_argument("--limit", type=float, metavar="QUESTIONS",
                       help="of each task, or a share below 1, for a quick look (default: all)")
    group.add_argument("--include_path", metavar="FOLDER", help="with YAML files of tasks of your own")


def check_task_flags(args: argparse.Namespace) -> None:
    """Raise ValueError, naming the flag and its value, for flags that no task can satisfy."""
    if args.num_fewshot is not None and args.num_fewshot < 0:
        raise ValueError(f"--num_fewshot {args.num_fewshot}: must be 0 or more")
    if args.batch_size != "auto" and not (args.batch_size.isdigit() and int(args.batch_size)):
        raise ValueError(f"--batch_size {args.batch_size}: must be auto or at least 1")
    if args.limit is not None and not args.limit > 0:
        raise ValueError(f"--limit {args.limit:g}: must be above 0")
    if args.include_path and not Path(args.include_path).is_dir():
        raise ValueError(f"--include_path {args.include_path}: is not a folder; name one with YAML files of tasks")


def find_tasks(names: str, include_path: str | None):
    """The harness's task manager once it has loaded the tasks and their data, so that what cannot be had is known
    before a model is loaded. Raises ValueError naming the task."""
    from lm_eval.tasks import TaskManager
    manager = TaskManager(include_path=include_path, include_defaults=False)
    if not set(split_names(names)) <= set(manager.all_tasks):        # reading the harness's own 14,000 takes a while
        manager = TaskManager(include_path=include_path)
    for name in split_names(names):
        if name not in manager.all_tasks:
            near = ", ".join(difflib.get_close_matches(name, manager.all_tasks, 3))
            remedy = f"did you mean {near}?" if near else "lm-eval ls tasks lists them, --include_path adds your own"
            raise ValueError(f"--tasks {name}: no such task; {remedy}")
        try:
            manager.load([name])
        except (OSError, ValueError) as error:
            reason = " ".join(str(error).split())[:200]
            raise ValueError(f"--tasks {name}: its data cannot be loaded ({reason})") from error
    if set(split_names(names)) & set(manager.all_groups):
        try:
            manager.load(split_names(names))
        except ValueError as error:                  # one task in two of them
            raise ValueError(f"--tasks {names}: {error}; leave out one of them") from error
    return manager


def run_tasks(args: argparse.Namespace, manager, model, tokenizer) -> dict[str, dict[str, float]]:
    """{task: {metric: value}} of `model` as it is now; metrics are named as in the harness, e.g. "acc,none". Of a group
    whose tasks are averaged, e.g. mmlu, that average alone."""
    from lm_eval import simple_evaluate
    from lm_eval.models.huggingface import HFLM
    batch_size = args.batch_size if args.batch_size == "auto" else int(args.batch_size)
    limit = int(args.limit) if args.limit is not None and args.limit >= 1 else args.limit
    harness = HFLM
    if tokenizer.eos_token_id is None:
        harness, tokenizer = _without_eos(HFLM), deepcopy(tokenizer)
        prefix = tokenizer.bos_token_id
        if prefix is None:
            config = model.config.get_text_config(decoder=True)
            prefix = next((i for i in (config.bos_token_id, config.eos_token_id) if isinstance(i, int)), 0)
            print(f"the tokenizer has no BOS and no EOS token: a text without context is scored after token {prefix} "
                  f"({tokenizer.decode([prefix])!r}), and generated ones end only where their task says")
        if tokenizer.pad_token_id is None:
            tokenizer.pad_token_id = prefix          # or the harness adds one that the model has no embedding for
        harness = partial(harness, prefix_token_id=prefix)
    found = simple_evaluate(harness(pretrained=model, tokenizer=tokenizer, batch_size=batch_size, backend="causal"),
                            tasks=split_names(args.tasks), num_fewshot=args.num_fewshot, limit=limit,
                            task_manager=manager, log_samples=False)
    averaged = {task for group in found.get("groups", ()) for task in _members(found["group_subtasks"], group)}
    return {task: {metric: value for metric, value in metrics.items() if isinstance(value, (int, float))}
            for task, metrics in found["results"].items() if task not in averaged}


def _members(subtasks: Mapping[str, Sequence[str]], group: str) -> Iterator[str]:
    """All that a group consists of, groups within it and their tasks included."""
    for name in subtasks.get(group, ()):
        yield name
        yield from _members(subtasks, name)


def _without_eos(harness: type) -> type:
    """lm-eval's model for a tokenizer that has no EOS token, which it takes every one to have."""
    class WithoutEos(harness):
        def tok_decode(self, tokens, *args, **kwargs):
            return None if tokens is None else super().tok_decode(tokens, *args, **kwargs)

    return WithoutEos


def split_names(names: str) -> list[str]:
    return [name.strip() for name in names.split(",") if name.strip()]


def headline(metrics: Mapping[str, float]) -> float | None:
    """Accuracy, as in the paper's tables (not length-normalised), or a task's first metric where it has none."""
    values = [value for metric, value in metrics.items() if "stderr" not in metric and metric != "sample_len"]
    return metrics.get("acc,none", values[0] if values else None)


def average_accuracy(results: Mapping[str, Mapping[str, float]]) -> float | None:
    """Mean over the tasks that have an accuracy, in percent; None where no task has one."""
    accuracies = [metrics["acc,none"] for metrics in results.values() if "acc,none" in metrics]
    return 100 * sum(accuracies) / len(accuracies) if accuracies else None


def task_rows(who: str, results: Mapping[str, Mapping[str, float]]) -> list[list[object]]:
    """Table rows: a column a task, accuracies in percent, and the accuracies' average."""
    values = [100 * metrics["acc,none"] if "acc,none" in metrics else headline(metrics) for metrics in results.values()]
    return [["", *results, "average accuracy"], [who, *values, average_accuracy(results)]]
