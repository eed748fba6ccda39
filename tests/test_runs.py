"""A run's folder: whole files, resuming at the last checkpoint, refusing what does not belong to it."""
import errno
import json
import random
import subprocess
import sys

import pytest

from utils.errors import RunError, user_errors
from utils.files import check_writable, read_sealed, seal, write_atomic
from utils.report import evaluation_rows, format_table, plot_search
from utils.runs import Run, default_folder, open_wandb, rng_state, set_rng_state

FLAGS = {"seed": 0, "sparsity": 0.25, "generations": 3, "output_dir": "x", "log_wandb": False}


def checkpointed(folder, generation: int = 2) -> Run:
    run = Run(folder, FLAGS)
    for number in range(generation + 1):
        run.log({"generation": number, "fitness": 1 / max(number, 1)}, seconds=number)
        run.checkpoint(generation=number, population=[[True, False]])
    return run


def test_file_is_whole_or_as_before(tmp_path, monkeypatch):
    path = tmp_path / "file.txt"
    write_atomic(path, "old")
    monkeypatch.setattr("os.fsync", lambda handle: (_ for _ in ()).throw(OSError("disk full")))
    with pytest.raises(OSError, match="disk full"):
        write_atomic(path, "new and longer")
    assert path.read_text() == "old"
    assert list(tmp_path.iterdir()) == [path], "nothing is left beside it"


def test_user_errors_end_in_one_sentence():
    with pytest.raises(SystemExit, match="^error: --flag 3: too many$"), user_errors():
        raise ValueError("--flag 3: too many")
    with pytest.raises(KeyError), user_errors():                        # our mistakes keep their traceback
        raise KeyError
    with pytest.raises(SystemExit, match="^error: /full: No space left on device; what was finished before is intact"):
        with user_errors():
            raise OSError(errno.ENOSPC, "No space left on device", "/full")


def test_after_set_up_a_value_error_is_a_mistake_of_ours():
    with pytest.raises(SystemExit, match="^error: damaged$"), user_errors(RunError):
        raise RunError("damaged")
    with pytest.raises(ValueError, match="ours"), user_errors(RunError):
        raise ValueError("ours")


def test_folder_beneath_a_file_is_refused_naming_the_flag(tmp_path):
    (tmp_path / "file").write_text("")
    for folder in (tmp_path / "file", tmp_path / "file" / "below"):
        with pytest.raises(ValueError, match=rf"--save_dir {folder}: cannot be written \(.+\); name a folder"):
            check_writable(folder, "--save_dir")
    check_writable(tmp_path / "new" / "folder", "--save_dir")
    assert list((tmp_path / "new" / "folder").iterdir()) == []


def test_default_folder_depends_on_what_decides_the_result_only():
    folder = default_folder("evo_drop", FLAGS)
    assert folder.startswith("runs/evo_drop-")
    assert folder == default_folder("evo_drop", FLAGS | {"generations": 9, "output_dir": "y", "log_wandb": True})
    assert folder != default_folder("evo_drop", FLAGS | {"seed": 1})
    assert folder != default_folder("evo_drop", FLAGS | {"text_field": "body"})
    assert folder != default_folder("evo_quant", FLAGS)


def test_fresh_run_has_no_state_and_clears_the_log_of_one_that_never_checkpointed(tmp_path):
    (tmp_path / "log.jsonl").write_text("half a li")
    (tmp_path / "summary.json").write_text(json.dumps({"generations": FLAGS["generations"]}))    # of an earlier run
    run = Run(tmp_path, FLAGS)
    assert run.state is None and not run.finished and run.records() == [] and run.summary() is None


def test_run_resumes_at_its_last_checkpoint_and_forgets_what_was_logged_after_it(tmp_path):
    checkpointed(tmp_path).log({"generation": 3, "fitness": 0.1})                # killed before its checkpoint
    with open(tmp_path / "log.jsonl", "a") as log:
        log.write('{"generation": 4, "fit')
    run = Run(tmp_path, FLAGS)
    assert run.state == {"generation": 2, "population": [[True, False]]}
    assert [record["generation"] for record in run.records()] == [0, 1, 2]
    assert not run.finished


def test_finished_means_summarized_for_as_many_generations(tmp_path):
    run = checkpointed(tmp_path, 3)
    assert not Run(tmp_path, FLAGS).finished
    run.summarize({"generations": 3, "fitness": 0.5})
    assert Run(tmp_path, FLAGS).finished
    assert Run(tmp_path, FLAGS).summary() == {"generations": 3, "fitness": 0.5}
    assert not Run(tmp_path, FLAGS | {"generations": 4}).finished


def test_a_folder_that_another_process_works_in_is_refused(tmp_path):
    code = "import fcntl, os, sys; fcntl.flock(os.open(sys.argv[1], os.O_RDONLY), fcntl.LOCK_EX); print(1); input()"
    with subprocess.Popen([sys.executable, "-uc", code, tmp_path], stdin=subprocess.PIPE, stdout=subprocess.PIPE,
                          text=True) as other:
        assert other.stdout.readline() == "1\n"
        with pytest.raises(ValueError, match="--output_dir .*: another process is at work there; let it end, or name"):
            Run(tmp_path, FLAGS)
        other.communicate("end\n")
    for _ in range(2):                                   # this process itself goes on where it likes
        Run(tmp_path, FLAGS)
    assert not list(tmp_path.iterdir())


def test_a_missing_number_of_generations_is_finished_at_its_default_only(tmp_path):
    checkpointed(tmp_path, 3).summarize({"generations": 3})
    for default, finished in ((4, False), (3, True)):
        run = Run(tmp_path, FLAGS | {"generations": None})
        assert not run.finished
        run.default_to(default)
        assert run.finished == finished and run.generations == default
    with pytest.raises(RunError, match="--generations 2: the run in .* is already at generation 3"):
        Run(tmp_path, FLAGS | {"generations": None}).default_to(2)


@pytest.mark.parametrize("flags, message", [
    ({"seed": 1}, r"other flags \(--seed 0 there, 1 here\); use those flags to resume it, or another folder"),
    ({"sparsity": 0.5, "seed": 2}, r"other flags \(--seed 0 there, 2 here; --sparsity 0.25 there, 0.5 here\)"),
    ({"brand_new": 7}, r"other flags \(--brand_new None there, 7 here\)"),
])
def test_folder_of_another_run_is_refused_naming_what_differs(tmp_path, flags, message):
    checkpointed(tmp_path)
    log = (tmp_path / "log.jsonl").read_bytes()
    with pytest.raises(ValueError, match=rf"--output_dir {tmp_path}: holds a run with {message}"):
        Run(tmp_path, FLAGS | flags)
    assert (tmp_path / "log.jsonl").read_bytes() == log


def test_a_flag_that_an_earlier_version_did_not_know_had_its_default_there(tmp_path):
    state = checkpointed(tmp_path).state
    defaults = {"share": 0.0, "names": ("a",), "never_given": 1, "seed": 1}
    assert Run(tmp_path, FLAGS | {"share": 0.0, "names": ("a",)}, defaults=defaults).state == state
    with pytest.raises(ValueError, match=r"other flags \(--share 0.0 there, 1.0 here\)"):
        Run(tmp_path, FLAGS | {"share": 1.0}, defaults=defaults)
    with pytest.raises(ValueError, match=r"other flags \(--seed 0 there, 1 here\)"):
        Run(tmp_path, FLAGS | {"seed": 1}, defaults=defaults)


def test_a_run_goes_on_only_with_the_inputs_that_it_was_begun_with(tmp_path):
    run = Run(tmp_path, FLAGS)
    run.check_inputs(calibration_data="a", sparse_weights_path="b")
    run.log({"generation": 0})
    run.checkpoint(generation=0)
    Run(tmp_path, FLAGS).check_inputs(calibration_data="a", sparse_weights_path="b")
    with pytest.raises(RunError, match=f"^--sparse_weights_path: not what it was when the run in {tmp_path} was begun"):
        Run(tmp_path, FLAGS).check_inputs(calibration_data="a", sparse_weights_path="c")
    saved = read_sealed(tmp_path / "checkpoint.json")
    del saved["inputs"]                                              # of an earlier version, ...
    saved["flags"]["level_cache_gb"] = 24.0                          # ... which compared it
    (tmp_path / "checkpoint.json").write_text(seal(saved))
    Run(tmp_path, FLAGS).check_inputs(calibration_data="c")


def test_run_cannot_be_shortened(tmp_path):
    checkpointed(tmp_path)
    with pytest.raises(ValueError, match="--generations 1: the run in .* is already at generation 2"):
        Run(tmp_path, FLAGS | {"generations": 1})


@pytest.mark.parametrize("damage", [
    lambda text: "{", lambda text: "[]", lambda text: '{"version": 1}', lambda text: "[" * 100_000,
    lambda text: text.replace('"generation": 2', '"generation": 1'), lambda text: text[:-20], lambda text: "\xff"])
def test_damaged_checkpoint_is_refused(tmp_path, damage):
    checkpointed(tmp_path)
    path = tmp_path / "checkpoint.json"
    path.write_text(damage(path.read_text()), encoding="latin-1")
    with pytest.raises(ValueError, match=rf"{path}: .*; remove {tmp_path} to start over"):
        Run(tmp_path, FLAGS)


def test_checkpoint_of_another_version_is_refused(tmp_path):
    (tmp_path / "checkpoint.json").write_text(seal({"version": 1}))
    with pytest.raises(ValueError, match="checkpoint.json: version 1 instead of 2; remove"):
        Run(tmp_path, FLAGS)


@pytest.mark.parametrize("spoil", [
    lambda log: log.unlink(), lambda log: log.write_text(""), lambda log: log.write_bytes(log.read_bytes()[:-1]),
    lambda log: log.write_text(log.read_text().replace("0.5", "0.6"))])
def test_log_that_is_not_the_checkpoints_is_refused(tmp_path, spoil):
    checkpointed(tmp_path)
    spoil(tmp_path / "log.jsonl")
    with pytest.raises(ValueError, match=rf"{tmp_path}/log.jsonl: not the log that checkpoint.json goes with"):
        Run(tmp_path, FLAGS)


def test_tokens_a_second_are_those_of_this_process(tmp_path):
    run = Run(tmp_path, FLAGS)
    run.log({"generation": 1})
    run.checkpoint(generation=1, tokens=1000)
    resumed = Run(tmp_path, FLAGS)
    resumed.checkpoint(generation=2, tokens=1400)
    for process, before in ((run, 0), (resumed, 1000)):
        process.began -= 10
        timing = process.timing(1500)
        assert timing["seconds"] > 10 and timing["tokens_per_second"] == (1500 - before) / timing["seconds"]


def test_damaged_summary_is_made_again(tmp_path):
    checkpointed(tmp_path, 3).summarize({"generations": 3})
    (tmp_path / "summary.json").write_text('{"generations": 3')
    assert not Run(tmp_path, FLAGS).finished


def test_what_a_killed_process_was_writing_is_removed_and_its_seconds_are_not_there_twice(tmp_path):
    checkpointed(tmp_path).log({"generation": 3}, seconds=3)                     # killed before its checkpoint
    (tmp_path / ".checkpoint.json.x7_a.partial").write_text("half a ch")
    (tmp_path / ".checkpoint.json.x7_b.partial").mkdir()
    (tmp_path / ".checkpoint.json.x7_b.partial" / ".tmpZIgz8W").write_text("half a che")
    run = Run(tmp_path, FLAGS)
    run.log({"generation": 3}, seconds=4)
    run.checkpoint(generation=3)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["checkpoint.json", "log.jsonl", "timing.jsonl"]
    assert [json.loads(line) for line in (tmp_path / "timing.jsonl").read_text().splitlines()] == [
        {"seconds": 0}, {"seconds": 1}, {"seconds": 2}, {"seconds": 4}]


def test_generator_goes_on_where_it_was_after_a_trip_through_json():
    rng, other = random.Random(3), random.Random(4)
    rng.random()
    state = json.loads(json.dumps(rng_state(rng)))
    expected = [rng.random() for _ in range(5)]
    set_rng_state(other, state)
    assert [other.random() for _ in range(5)] == expected


def test_table_of_evaluations_has_a_column_for_every_dataset_and_measure():
    rows = evaluation_rows({"dense": {"a": {"ppl": 12.3456, "kl": 0.0}, "b": {"ppl": 5.0, "kl": 0.0}},
                            "search": {"a": {"ppl": 1234.5, "kl": 0.12345}}})
    assert rows == [["", "a ppl", "a KL", "b ppl", "b KL"], ["dense", 12.3456, 0.0, 5.0, 0.0],
                    ["search", 1234.5, 0.12345, None, None]]
    assert format_table(rows).splitlines() == [
        "|        |    a ppl |   a KL |  b ppl |   b KL |",
        "|--------|---------:|-------:|-------:|-------:|",
        "| dense  |    12.35 | 0.0000 | 5.0000 | 0.0000 |",
        "| search | 1,234.50 | 0.1235 |      – |      – |"]


def test_picture_appears_whole(tmp_path):
    records = [{"tokens": 10 * i, "fitness": 1 / i} for i in (1, 2, 3)]
    plot_search(tmp_path / "search.png", records, [(10, 1.0), (20, 0.6)], 64, [[0, 1], [1, 0]], ["attention", "MLP"],
                "title", "dropped", "kl")
    assert (tmp_path / "search.png").read_bytes().startswith(b"\x89PNG")
    assert [path.name for path in tmp_path.iterdir()] == ["search.png"]


def test_weights_and_biases_is_asked_for_only_with_its_flag(monkeypatch):
    monkeypatch.setitem(__import__("sys").modules, "wandb", None)                          # as if not installed
    assert open_wandb(False, {}) is None
    with pytest.raises(ValueError, match="--log_wandb: the wandb package is not installed; pip install wandb"):
        open_wandb(True, {})
