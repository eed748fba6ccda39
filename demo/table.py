"""One table of what demo/run.sh found: perplexity and KL divergence on held-out text, for every task.

    python demo/table.py results/demo
"""
import json
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
from utils.report import commit, format_table


def main(folder: Path) -> None:
    summaries = {task: json.loads((folder / task / "summary.json").read_text()) for task in ("drop", "sparse", "quant")}
    shortgpt = json.loads((folder / "shortgpt.json").read_text())["compressed"]
    evaluations = {task: dict(summary["evaluation"]) for task, summary in summaries.items()}
    evaluations["drop"] = {"dense": evaluations["drop"].pop("dense"), "ShortGPT ranking": shortgpt,
                           **evaluations["drop"]}
    for task, results in evaluations.items():
        results["search, finished"] = json.loads((folder / f"{task}_finished.json").read_text())["compressed"]
    names = {"drop": "depth, 25%", "sparse": "sparsity, 60%", "quant": "quantization, 2.5 bits"}
    rows = [["task", "configuration", "perplexity", "KL, nats a token"]]
    for task, results in evaluations.items():
        for who, datasets in results.items():
            if who != "dense" or task == "drop":
                [measured] = datasets.values()
                rows.append(["dense" if who == "dense" else names[task], "–" if who == "dense" else who,
                             measured["ppl"], measured["kl"]])
    print(f"{format_table(rows)}\n\nCommit {commit()}: `make demo`\n")
    for task, summary in summaries.items():
        print(f"{names[task]}: {summary['budget']}; {summary['tokens']:,} tokens in {summary['seconds']:.0f} s; "
              f"{folder / task / 'search.png'}")


if __name__ == "__main__":
    main(Path(sys.argv[1]))
