"""benchmarks/gpu.sh: every part runs, here tiny and on a CPU; one that fails stops no other, and is run again."""
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from benchmarks import gpu, search

ROOT = Path(__file__).resolve().parents[1]
STUB = """#!/bin/bash
# stands in for Python: lists three parts, of which the second fails for as long as OUT/mended is not there
out=$(grep -oP '(?<=--out )[^ ]+' <<< "$*")
case "$2" in
    --list) echo first second third; exit ;;
    --report) echo "tables of $out"; exit ;;
esac
echo "${@:2}"
code=0
for part in "${@:2}"; do
    case "$part" in
        --out) exit $code ;;
        second) if [ -e "$out/mended" ]; then touch "$out/$part.json"; else echo "no such device"; code=3; fi ;;
        *) touch "$out/$part.json" ;;
    esac
done
"""


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    """{part: its results}, all run once."""
    out = tmp_path_factory.mktemp("gpu")
    return {name: gpu.run(name, out, tiny=True) for name in gpu.PARTS if name != "tests"}


@pytest.mark.parametrize("name", [name for name in gpu.PARTS if name != "tests"])
def test_a_part_leaves_results_that_json_can_hold(name, finished):
    result = json.loads(json.dumps(finished[name]))
    assert result["device"] == "CPU, tiny" and result["torch"] == torch.__version__
    assert result["part_seconds"] > 0 and len(result) > 3


def test_what_parts_find_is_consistent(finished):
    assert set(finished["demo"]["differences"].values()) == {0.0}        # the CPU against itself
    for name in ("evo_drop", "evo_unstructured", "evo_quant"):
        assert finished[f"generation-{name}"]["difference"] <= search.TOLERANCE[torch.float32]
    blocks = finished["database-block"]
    assert blocks["gptq, plain"]["gb_written_a_block"] == pytest.approx(
        blocks["gptq, overlapped"]["gb_written_a_block"], rel=0.01)
    assert 0 < finished["offload"]["copies_gb_a_second"] and finished["profile"]["top"]


def test_tables_have_every_part_and_say_what_is_missing(finished):
    targets, everything = gpu.tables(finished)
    assert "| CPU, tiny" in targets and targets.count("x |") >= 10
    assert "generation of evo_quant" in everything and "a block from end to end" in everything
    missing = everything[everything.index("not yet measured"):]
    assert "tests" in missing and "walk" not in missing
    assert gpu.tables({})[1].count("\n") == len(gpu.PARTS) + 1


def test_estimates_stand_beside_what_was_measured(finished):
    header, *rows = gpu.compared(finished)
    assert header == ["", "estimated for an A100", "measured"] and gpu.compared({}) == []
    found = {name: values for name, *values in rows}
    assert found["database.gptq, hours"] == [pytest.approx(0.63, abs=0.01),
                                             finished["database-block"]["gptq, overlapped"]["hours_at_paper"]]
    drop = finished["generation-evo_drop"]
    assert found["evo_drop, a generation, s"] == [pytest.approx(17.5, rel=0.1),
                                                  drop["divide"] * drop["costs"]["here"]["seconds"]]
    assert found["evo_quant of 70B, offloaded, a generation, s"][0] == pytest.approx(47 * 3600 / 150, rel=0.03)
    finish = finished["finish"]
    assert found["finish.py, hours"] == [pytest.approx(0.27, abs=0.02), finish["hours"]]
    assert len(rows) == 2 * 3 + 3 * 3 + 2 + 2 and "| copies from pinned memory, GB/s" in gpu.tables(finished)[1]


def test_report_puts_the_tables_into_both_readmes(finished, tmp_path, monkeypatch):
    for page in ("README.md", "benchmarks/README.md"):
        (tmp_path / page).parent.mkdir(exist_ok=True)
        (tmp_path / page).write_text((ROOT / page).read_text())
    (tmp_path / "walk.json").write_text(json.dumps(finished["walk"]))
    (tmp_path / "generation-evo_drop.json").write_text(json.dumps(finished["generation-evo_drop"]))
    monkeypatch.setattr(gpu, "ROOT", tmp_path)
    monkeypatch.setattr("sys.argv", ["gpu.py", "--write_readme", "--out", str(tmp_path)])
    gpu.main()
    assert "| a generation of evo_drop against the plain way" in (tmp_path / "README.md").read_text()
    assert "| walk, tokens/s, by tokens of a microbatch" in (tmp_path / "benchmarks" / "README.md").read_text()


def test_the_tests_of_a_gpu_are_counted(tmp_path):
    environment = dict(os.environ, OMP_NUM_THREADS="1")
    subprocess.run([sys.executable, "benchmarks/gpu.py", "tests", "--tiny", "--out", str(tmp_path)], cwd=ROOT,
                   env=environment, check=True, capture_output=True)
    result = json.loads((tmp_path / "tests.json").read_text())
    assert result["counts"]["passed"] > 3 and not result["counts"]["failed"] and result["failed"] == []


@pytest.mark.parametrize("tiny", [True, False])
def test_a_part_that_fails_stops_no_other_and_is_the_only_one_run_again(tiny, tmp_path):
    python, out = tmp_path / "python", tmp_path / "out"
    python.write_text(STUB)
    python.chmod(0o755)

    def run():
        return subprocess.run(["bash", str(ROOT / "benchmarks" / "gpu.sh")], capture_output=True, text=True,
                              env=dict(os.environ, TINY="1" * tiny, OUT=str(out), PYTHON=str(python)))

    def process(*parts):
        return f"{' '.join(parts)} --out {out}{' --tiny' * tiny}"

    first = run()
    processes = ([process("first", "second", "third"), "no such device"] if tiny else
                 [process("first"), process("second"), "no such device", process("third")])
    assert first.returncode == 1 and first.stdout.splitlines() == [
        *processes, f"tables of {out}", "what has failed is run again, alone, by the same command"]
    (out / "mended").touch()
    again = run()
    assert again.returncode == 0 and again.stdout.splitlines() == [
        "== first: finished", "== third: finished", process("second"), f"tables of {out}"]


def test_parts_of_one_process_do_not_stop_each_other_either(tmp_path, monkeypatch, capsys):
    def failing(part):
        raise SystemExit("error: out of luck")

    monkeypatch.setitem(gpu.PARTS, "walk", failing)
    monkeypatch.setitem(gpu.PARTS, "profile", lambda part: part.keep(found=1))
    monkeypatch.setattr("sys.argv", ["gpu.py", "walk", "profile", "--tiny", "--out", str(tmp_path)])
    with pytest.raises(SystemExit, match="^failed: walk$"):
        gpu.main()
    assert "out of luck" in capsys.readouterr().out and [file.name for file in tmp_path.iterdir()] == ["profile.json"]
