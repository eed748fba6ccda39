"""Killed, without room and fed damaged files: a few trials of each kind that benchmarks/reliability.py makes many
of."""
import multiprocessing
import os
import random
import signal
import time

import pytest
import tqdm.auto
from hypothesis import given, settings
from hypothesis import strategies as st
from tqdm.std import TqdmDefaultWriteLock

from benchmarks import damage, reliability
from benchmarks.damage import Failure
from benchmarks.reliability import PROGRAMS

ONE_OF_EACH_KIND = ["evo_unstructured.py", "database.gptq", "baselines.drop_scores", "eval_config.py", "export.py"]


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    """Programs run in processes forked from this one."""
    return reliability.Workplace(tmp_path_factory.mktemp("reliability") / "place")


@pytest.mark.parametrize("program", ONE_OF_EACH_KIND)
def test_killed_three_times_it_ends_in_the_same_files_with_nothing_half_written(place, program):
    assert reliability.killed(place, program, 3, random.Random(program)) == {"same files": 3}


def test_progress_bar_of_a_killed_program_holds_up_no_other(place, monkeypatch):
    """tqdm's lock is shared by all processes forked from one, and nobody opens it for a process that is killed."""
    def killed_while_it_prints():
        lock.acquire()
        os.kill(os.getpid(), signal.SIGKILL)

    monkeypatch.setattr(TqdmDefaultWriteLock, "mp_lock", multiprocessing.RLock(), raising=False)    # stays locked
    lock = TqdmDefaultWriteLock()
    for kind in (tqdm.std.tqdm, tqdm.auto.tqdm):             # of either kind, this one may have been the first
        monkeypatch.setattr(kind, "_lock", lock, raising=False)
    monkeypatch.setattr(place, "patience", 60)
    place.fill()
    status, _ = place.finish(*place.start("export.py", killed_while_it_prints))
    assert status == -signal.SIGKILL
    place.run("export.py")


def test_program_that_hangs_is_ended_and_tells_where(place, monkeypatch):
    monkeypatch.setattr(place, "patience", 0.5)
    place.fill()
    with pytest.raises(Failure, match=rf"(?s)export\.py ended with -{signal.SIGALRM:d}: .*in hang_on_purpose"):
        place.run("export.py", hang_on_purpose)


def hang_on_purpose():
    time.sleep(600)


@pytest.mark.parametrize("program", PROGRAMS)
def test_a_full_disk_and_a_place_beneath_a_file_end_in_one_sentence_with_what_was_finished_intact(place, program):
    times = 2 if program in ("evo_unstructured.py", "export.py") else 1      # then also a limit on the size of files
    assert reliability.full_disk(place, program, times, random.Random(program)) == {"one sentence": times}
    assert reliability.beneath_a_file(place, program)["one sentence"] >= 1


@pytest.fixture(scope="module")
def readers(place):
    return reliability.finished(place)


@settings(max_examples=300)
@given(st.data(), st.randoms(use_true_random=False))
def test_damaged_files_are_refused_by_name_or_read_as_before(readers, data, rng):
    reader = data.draw(st.sampled_from([reader for reader in readers if reader.checked]), label="file")
    damage.read_damaged(reader, rng)


def test_truncated_and_foreign_models_are_refused_by_name(readers):
    rng = random.Random(0)
    for reader in readers:
        if not reader.checked:
            assert damage.read_damaged(reader, rng)[1] == "one sentence"
