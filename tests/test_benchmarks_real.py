"""benchmarks/real.py and benchmarks/finish.py: every program is run once, and one table has all that it gave."""
import importlib
import json
from pathlib import Path

import pytest

from benchmarks import finish, real


@pytest.fixture
def ran(monkeypatch) -> list[str]:
    """Programs run in this process, with few tokens, and counted."""
    names = []

    def run(arguments: list, log: Path) -> None:
        name, *flags = map(str, arguments[1:] if arguments[0] == "-m" else arguments)
        names.append(name)
        program = importlib.import_module(name.removesuffix(".py"))
        program.main(program.make_parser().parse_args(flags) if name.startswith("database.") else flags)

    for module in (finish, real):
        monkeypatch.setattr(module, "run", run)
    few = ["--offspring", 4, "--survivors_per_selection", 2, 1, "--tokens_per_selection", 32, 64, "--no_eval"]
    monkeypatch.setattr(real, "SEARCH", few)
    monkeypatch.setattr(real, "BASELINE_TOKENS", 64)
    for kind in ("depth", "quant"):
        monkeypatch.setitem(real.PAPER, kind, ["--initially_generated", 2, "--initial_tokens", 32, "--generations", 1])
        monkeypatch.setitem(real.OURS, kind, ["--init", "measured", "--initial_tokens", 32, "--generations", 1])
    return names


def table_of(monkeypatch, capsys, benchmark, out: Path, *flags: object) -> list[dict[str, str]]:
    monkeypatch.setattr("sys.argv", [benchmark.__file__, *map(str, flags), "--out", str(out)])
    benchmark.main()
    printed = capsys.readouterr().out
    lines = [line for line in printed[printed.rindex("| budget "):].splitlines() if line.startswith("|")]
    header, _, *rows = [[cell.strip() for cell in line.strip("|").split("|")] for line in lines]
    return [dict(zip(header, row)) for row in rows]


def test_the_table_has_every_way_at_every_budget_and_what_is_finished_is_not_run_again(
        checkpoint, text, tmp_path, monkeypatch, capsys, ran):
    common = ["--model_name_or_path", checkpoint, "--data", text, "--eval_data", text, "--parts", "depth", "bits",
              "--calibration_tokens", 256, "--sequence_length", 32, "--eval_tokens", 128, "--steps", 2, "--batch_size",
              2, "--shares", 0.25, 0.5, "--bitwidths", 3]
    rows = table_of(monkeypatch, capsys, real, tmp_path, *common, "--recommended_alone", "--no_finish")
    depth = ["ShortGPT", "Shortened Llama", "recommended"]
    assert [(row["budget"], row["configuration"]) for row in rows] == [
        *((budget, way) for budget in ("25.0% depth", "50.0% depth") for way in depth),
        *(("3.0 bits", way) for way in ("uniform", "DP over layer errors", "recommended"))]
    label = f"{text} KL"
    assert all(float(row[label]) > 0 for row in rows) and {row["MB"] for row in rows} == {"–"}
    assert not {"finish.py", "export.py"} & {*ran} and ran.count("evo_drop.py") == 2

    before = len(ran)
    again = table_of(monkeypatch, capsys, real, tmp_path, *common, "--recommended_alone", "--no_finish")
    assert again == rows and len(ran) == before

    more = table_of(monkeypatch, capsys, real, tmp_path, *common[:-1], 3, "--seeds", 2)
    assert ran[before:].count("evo_quant.py") == 3 and ran[before:].count("database.gptq") == 0
    ways = {(row["budget"], row["configuration"]): row for row in more}
    assert {way for _, way in ways} == {*depth, "uniform", "DP over layer errors", "the paper's way",
                                        "recommended, finished"}
    searched, finished = ways["3.0 bits", "recommended"], ways["3.0 bits", "recommended, finished"]
    low, high = map(float, searched[f"{text} range"].split("–"))
    assert low <= float(searched[label]) <= high and float(finished["MB"]) >= 0
    own = json.loads((tmp_path / "quant-3.0-finished.json").read_text())["compressed"]
    assert float(finished[label]) == pytest.approx(next(iter(own.values()))["kl"], abs=1e-4)
    assert (tmp_path / "real.png").stat().st_size > 10_000


def test_what_finishing_is_worth_has_uniform_random_and_searched_before_and_after(
        checkpoint, text, tmp_path, monkeypatch, capsys, ran):
    few = ["--generations", 1, "--offspring", 4, "--tokens_per_selection", 64, "--survivors_per_selection", 1,
           "--initial_tokens", 32]
    for name in ("DEPTH", "LEVELS"):
        monkeypatch.setattr(finish, name, few)
    monkeypatch.setattr(finish, "RANDOM", [*finish.RANDOM, "--initial_tokens", 32, "--tokens_per_selection", 32])
    monkeypatch.setattr(finish, "SCORE_TOKENS", 64)
    flags = ["--model_name_or_path", checkpoint, "--data", text, "--calibration_tokens", 256, "--sequence_length", 32,
             "--eval_tokens", 128, "--steps", 2, "--batch_size", 2, "--dtype", "float32",
             "--budgets", "2.5 bits", "50% sparsity", "25% depth"]
    rows = table_of(monkeypatch, capsys, finish, tmp_path, *flags)
    assert [(row["budget"], row["configuration"]) for row in rows] == [
        ("2.5 bits", "random"), ("2.5 bits", "searched"),
        *(("50% sparsity", way) for way in ("uniform", "random", "searched")),
        *(("25% depth", way) for way in ("ShortGPT", "random", "searched"))]
    assert all(float(row["finished: KL"]) > 0 and float(row["minutes to finish"]) > 0 for row in rows)
    assert all(row["finished: KL"] < row["KL"] for row in rows) and ran.count("finish.py") == len(rows)

    before = len(ran)
    kept = [row for row in rows if "random" not in row.values()]
    assert table_of(monkeypatch, capsys, finish, tmp_path, *flags, "--ways", "uniform", "searched") == kept
    assert len(ran) == before
