"""benchmarks/search_quality.py: what a search had found by when, and how few tokens reach where another ends; and what
benchmarks/quality.py compares searches with."""
import json
import subprocess
from pathlib import Path
from types import SimpleNamespace

import pytest

from benchmarks import programs
from benchmarks import search_quality as quality
from benchmarks.programs import claim, run_here, write_readme
from benchmarks.quality import rows_of
from utils import report


def write_run(out: Path, setting, variant: str, seed: int, tokens: list[int]) -> None:
    folder = quality.folder_of(setting, variant, seed, out)
    folder.mkdir(parents=True)
    (folder / "summary.json").write_text("{}")
    (folder / "log.jsonl").write_text("".join(
        json.dumps({"generation": i, "tokens": spent, "levels": [seed, i]}) + "\n" for i, spent in enumerate(tokens)))


def test_candidate_at_is_the_last_one_that_was_paid_for():
    log = [{"tokens": 10, "levels": [0, 1]}, {"tokens": 30, "levels": [1, 0]}, {"tokens": 50, "dropped": "attn none"}]
    assert [quality.candidate_at(log, tokens) for tokens in (9, 10, 29.9, 30, 50, 99)] == [
        None, "[0, 1]", "[0, 1]", "[1, 0]", '"attn none"', '"attn none"']


def test_median_takes_each_seeds_latest_value_and_none_before_all_have_one():
    runs = [{0.05: 3.0, 0.5: 1.0}, {0.1: 2.0, 0.5: 1.5}, {0.04: 5.0}]
    assert [quality.median_at(runs, share) for share in (0.04, 0.05, 0.1, 0.5, 1.0)] == [None, None, 3.0, 1.5, 1.5]


def test_share_to_reach_is_the_first_at_which_the_median_is_as_low():
    runs = [{0.1: 4.0, 0.25: 2.0, 1.0: 3.0}, {0.1: 4.0, 0.25: 2.5, 1.0: 1.0}, {0.1: 1.0, 0.25: 1.0, 1.0: 1.0}]
    assert [quality.share_to_reach(runs, goal) for goal in (4.0, 2.0, 1.5, 0.9)] == [0.1, 0.25, 1.0, None]


def test_curves_compare_each_search_with_the_papers_way_on_the_seeds_that_both_have(tmp_path, monkeypatch):
    setting = quality.Setting("bits", 2.5)
    monkeypatch.setattr(quality, "CURVE", (0.05, 0.2, 0.25, 0.5, 0.75, 1.0))
    monkeypatch.setattr(quality, "SHARES", (0.05, 0.5, 0.75, 1.0))
    for seed in range(3):
        write_run(tmp_path, setting, quality.PAPER, seed, [10, 400, 700])           # without what is looked up
    for seed in (0, 2, 4):
        write_run(tmp_path, setting, quality.OURS, seed, [50, 250, 900])             # the last generation is too many
    quality.folder_of(setting, "screening alone", 0, tmp_path).mkdir()           # unfinished
    monkeypatch.setattr(quality, "heldout", lambda _, candidates, __: {
        c: sum(x * y for x, y in zip(json.loads(c), (100, 1))) for c in candidates})
    found = quality.curves(setting, SimpleNamespace(seeds=5, out=tmp_path, generations=[60, 2, 1],
                                                    tokens_per_selection=[15, 36, 37],      # 495 a generation
                                                    variants=[quality.OURS, "screening alone"]))
    assert list(found) == [quality.PAPER, quality.OURS] and [len(runs) for runs in found.values()] == [3, 2]
    second = found[quality.OURS][1]
    assert sorted(found[quality.PAPER][1]) == [0.01, 0.05, 0.5, 0.75, 1.0]
    assert min(second) == 0.05 and second[0.2] == 200 and second[0.25] == second[1.0] == 201
    assert [found[quality.PAPER][1][share] for share in (0.01, 0.05, 0.5, 0.75, 1.0)] == [100, 100, 100, 101, 102]
    table = quality.table({setting.name: found})
    rows = [[cell.strip() for cell in line.split("|")[1:-1]] for line in table.splitlines()]
    assert rows[2][:4] == ["2.5 bits", "paper's way", "3", "1.0%"] and rows[3][:4] == ["2.5 bits", "ours", "2", "5.0%"]
    quality.plot({setting.name: found}, tmp_path / "plot.png")
    assert (tmp_path / "plot.png").stat().st_size > 10_000


def test_heldout_values_are_kept_for_one_text_and_measured_anew_for_another(tmp_path, checkpoint, monkeypatch):
    measured, measure = [], quality.Fitness.measure

    def counting(self, candidates, *rest):
        measured.append(len(candidates))
        return measure(self, candidates, *rest)

    monkeypatch.setattr(quality.Fitness, "measure", counting)
    args = SimpleNamespace(out=tmp_path, model_name_or_path=str(checkpoint), data="unused", eval_data="stdlib",
                           eval_tokens=[128, 2], sequence_length=32, dtype="auto")
    setting, candidates = quality.Setting("depth", 0.5), [json.dumps(" ".join(words)) for words in (
        ["none"] * 6, ["attn", *["none"] * 5], ["mlp", *["none"] * 5])]
    values = quality.heldout(setting, candidates[:2], args)
    assert values[candidates[0]] == pytest.approx(0, abs=1e-6) and values[candidates[1]] > 1e-4
    again = quality.heldout(setting, candidates, args)
    assert measured == [2, 1] and again[candidates[1]] == values[candidates[1]]
    args.eval_tokens = [256, 2]
    assert quality.heldout(setting, candidates[1:2], args)[candidates[1]] != values[candidates[1]]
    assert measured == [2, 1, 1]
    args.dtype = "bfloat16"
    assert quality.heldout(setting, candidates[1:2], args)[candidates[1]] != values[candidates[1]]
    assert measured == [2, 1, 1, 1]


def test_folder_with_results_of_other_flags_is_refused(tmp_path):
    args, folder = SimpleNamespace(data="stdlib", steps=[4, 2], jobs=1), tmp_path / "results"
    claim(folder, args, ("data", "steps"))
    args.jobs = 2
    claim(folder, args, ("data", "steps"))
    args.steps = [4, 1]
    with pytest.raises(SystemExit, match=rf"--out {folder}: has results of --steps \[4, 2\], not \[4, 1\]"):
        claim(folder, args, ("data", "steps"))


def test_readme_gets_the_text_between_its_marks_and_none_without_them(tmp_path):
    readme = tmp_path / "README.md"
    readme.write_text("a\n<!-- x -->\nold\n<!-- /x -->\nb\n<!-- y -->\n")
    write_readme("x", "new\nlines", readme, made=["then", "now", "then"])
    assert readme.read_text() == "a\n<!-- x -->\nnew\nlines\n\nthen\nnow\n<!-- /x -->\nb\n<!-- y -->\n"
    for name in ("y", "z"):
        with pytest.raises(SystemExit, match=f"--write_readme {name}: README.md has no marks <!-- {name} -->"):
            write_readme(name, "text", readme)
    assert "text" not in readme.read_text()


def test_table_names_the_commit_and_the_command(tmp_path, monkeypatch):
    def git(*arguments: str) -> str:
        return subprocess.run(["git", "-C", str(tmp_path), "-c", "user.name=a", "-c", "user.email=a@b.c", *arguments],
                              capture_output=True, text=True, check=True).stdout.strip()

    readme, module = tmp_path / "README.md", tmp_path / "report.py"
    for file in (readme, module):
        file.write_text("<!-- x -->\n<!-- /x -->\n")
    monkeypatch.setattr(programs, "COMMAND", "python benchmarks/quality.py --out a")
    monkeypatch.setattr(report, "__file__", str(module))

    def written() -> str:
        write_readme("x", "table", readme)
        return readme.read_text().splitlines()[3]

    assert written() == "Commit unknown: `python benchmarks/quality.py --out a`"
    for arguments in (["init", "-q"], ["add", "."], ["commit", "-q", "-m", "first"]):
        git(*arguments)
    for _ in range(2):                                                   # the table itself is no change
        assert written() == f"Commit {git('rev-parse', 'HEAD')[:7]}: `python benchmarks/quality.py --out a`"
    module.write_text("changed")
    assert written() == f"Commit {git('rev-parse', 'HEAD')[:7]}+: `python benchmarks/quality.py --out a`"


def test_script_run_in_this_process_writes_to_its_log_and_fails_as_one(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(programs, "ROOT", tmp_path)
    monkeypatch.setattr("sys.argv", ["pytest"])
    script, log = tmp_path / "script.py", tmp_path / "logs" / "script.log"
    for body, printed in [("print(*sys.argv[1:])", "--seed 3\n"),
                          ("print('to stderr', file=sys.stderr)", "to stderr\n"),
                          ("print('done'); sys.exit(0)", "done\n"), ("if __name__ == '__main__': print(1)", "1\n")]:
        script.write_text(f"import sys\n{body}\n")
        run_here(["script.py", "--seed", 3], log)
        assert log.read_text() == printed
    for body, printed in [("sys.exit('error: --seed 3: no')", "error: --seed 3: no"), ("sys.exit(2)", ""),
                          ("raise ValueError('why')", "ValueError: why")]:
        script.write_text(f"import sys\n{body}\n")
        with pytest.raises(SystemExit, match=f"script.py --seed 3\nfailed, see {log}"):
            run_here(["script.py", "--seed", 3], log)
        assert printed in log.read_text()
    assert capsys.readouterr() == ("", "")


def test_a_search_is_compared_with_its_start_and_with_every_baseline_over_seeds():
    def values(kl: float) -> dict:
        return {"text": {"kl": kl, "ppl": 10 * kl}}

    found = [({"tokens": 1000 + seed, "evaluation": {"dense": values(0.0), "measured start": values(0.5),
                                                     "search": values(kl)}}, {"OWL": values(0.35)})
             for seed, kl in enumerate((0.3, 0.45, 0.2))]
    rows = rows_of("sparsity 50%", found, "text")
    assert [row[:6] for row in rows] == [
        ["sparsity 50%", "measured start", 0.5, 0.3, "0.2000–0.4500", "3 of 3"],
        ["sparsity 50%", "OWL", 0.35, 0.3, "0.2000–0.4500", "2 of 3"]]
    assert rows[1][6:] == [pytest.approx(3.5), pytest.approx(3.0), 0.0, "1,000"]
    assert rows_of("depth 25.0%", found, "text")[0][1] == "best of 64 random"
