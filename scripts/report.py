"""Paper and measured side by side: the last step of every script of this folder.

    python scripts/report.py meta-llama/Llama-2-7b-hf --row sparsity 70 EvoPress results/eval.json --row ...

A row names the table, level and method of its figures in paper_tables.csv, and a file of eval_config.py --output. Of
the paper – stands where no figure is at hand. Exits with 1 where a measured cell is empty.
"""
import argparse
import csv
import json
import math
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
from utils.report import commit, format_table

PAPER = Path(__file__).with_name("paper_tables.csv")
COLUMNS = {"wikitext2": "paper wikitext2", "c4": "paper c4", "fineweb_edu": "paper fineweb_edu",
           "average_accuracy": "paper avg. acc."}
# a model's last part of the hub name or folder -> its name in the paper's tables
MODELS = {"Llama-2-7b-hf": "Llama-2-7B", "Meta-Llama-3-8B": "Llama-3-8B", "Llama-3.1-8B": "Llama-3.1-8B",
          "Meta-Llama-3.1-8B": "Llama-3.1-8B", "Mistral-7B-v0.3": "Mistral-7B-v0.3",
          "Phi-3-medium-128k-instruct": "Phi-3-Medium-14B"}

Figures = dict[tuple[str, str, str, str], dict[str, str]]       # (table, model, level, method) -> column -> as printed


def read_paper(path: Path = PAPER) -> Figures:
    with path.open(newline="") as stream:
        return {(row["table"], row["model"], row["level"], row["method"]): row for row in csv.DictReader(stream)}


def read_measured(path: Path) -> dict[str, float | None]:
    """Column -> value: a perplexity of every dataset, the KL divergence on the first, the average accuracy. NaN, which
    is no measurement, is None."""
    try:
        results = json.loads(path.read_text())
    except (OSError, ValueError):
        return {}
    datasets = results.get("compressed", results.get("dense", {}))
    values = {f"{dataset} ppl": figures["ppl"] for dataset, figures in datasets.items()}
    values |= {f"{dataset} KL": figures["kl"] for dataset, figures in list(datasets.items())[:1]}
    if results.get("average_accuracy") is not None:
        values["avg. acc."] = results["average_accuracy"]
    return {column: None if math.isnan(value) else value for column, value in values.items()}


def side_by_side(model: str, rows: list[tuple[str, str, str, Path]], paper: Figures
                 ) -> tuple[list[list[object]], list[str], list[str]]:
    """(table, the paper's contradictions in it, what is missing) of rows (table, level, method, file)."""
    name = MODELS.get(Path(model).name)
    measured = [read_measured(path) for *_, path in rows]
    columns = list(dict.fromkeys(column for values in measured for column in values))
    table: list[list[object]] = [["level", "method", *COLUMNS.values(), *columns]]
    notes, missing = [], []
    for (kind, level, method, path), values in zip(rows, measured):
        figures = paper.get((kind, name, level, method), {})
        if method == "Dense" and not figures:                   # the same model in every table
            figures = paper.get(("depth", name, level, method), {})
        table.append([level, method, *[figures.get(column) or None for column in COLUMNS],
                      *[values.get(column) for column in columns]])
        if figures.get("note"):
            notes.append(f"paper, {level} {method}: {figures['note']}")
        empty = [column for column in columns if values.get(column) is None] or ([] if columns else ["everything"])
        if empty:
            missing.append(f"{level} {method}: no {', '.join(empty)} in {path}")
    return table, notes, missing


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", help="hub name or folder")
    parser.add_argument("--row", nargs=4, action="append", required=True, metavar=("TABLE", "LEVEL", "METHOD", "FILE"))
    args = parser.parse_args(argv)
    table, notes, missing = side_by_side(args.model, [(*row[:3], Path(row[3])) for row in args.row], read_paper())
    print(f"\n{args.model}, commit {commit()}\n{format_table(table)}")
    for note in notes:
        print(note)
    for row in missing:
        print(f"empty: {row}", file=sys.stderr)
    return 1 if missing else 0


if __name__ == "__main__":
    sys.exit(main())
