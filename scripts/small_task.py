"""A multiple-choice task for lm-eval from the held-out side of Python's standard library: which line comes next?

    python scripts/small_task.py FOLDER; python eval_config.py ... --tasks next_line --include_path FOLDER

What SMALL=1 has in place of the paper's tasks, which need a network.
"""
import json
import random
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
from utils.data import stdlib_texts
from utils.files import write_atomic

QUESTIONS, CONTEXT_LINES = 64, 8


def main(folder: Path) -> None:
    rng = random.Random(0)
    texts = [lines for text in stdlib_texts("test")
             if len(lines := [line for line in text.splitlines() if line.strip()]) > 4 * CONTEXT_LINES]
    rows = []
    while len(rows) < QUESTIONS:
        lines = rng.choice(texts)
        start = rng.randrange(len(lines) - CONTEXT_LINES)
        following = lines[start + CONTEXT_LINES]
        others = sorted(set(lines) - {following})
        if len(others) < 3:
            continue
        choices = rng.sample([following, *rng.sample(others, 3)], 4)
        rows.append({"context": "\n".join(lines[start:start + CONTEXT_LINES]), "choices": ["\n" + c for c in choices],
                     "answer": choices.index(following)})
    folder.mkdir(parents=True, exist_ok=True)
    data = folder.resolve() / "next_line.jsonl"
    write_atomic(data, "".join(json.dumps(row) + "\n" for row in rows))
    write_atomic(folder / "next_line.yaml", f"""\
task: next_line
dataset_path: json
dataset_kwargs: {{data_files: {{validation: {data}}}}}
validation_split: validation
output_type: multiple_choice
doc_to_text: "{{{{context}}}}"
doc_to_choice: "{{{{choices}}}}"
doc_to_target: answer
target_delimiter: ""
metric_list: [{{metric: acc, aggregation: mean, higher_is_better: true}}]
""")


if __name__ == "__main__":
    main(Path(sys.argv[1]))
