"""Out of memory: the microbatch is halved, said once and kept; values stay what they were; one row is the floor."""
import json
import platform
import random
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from transformers import PreTrainedModel

import evo_drop
import families
from database import build, gptq, hessian
from database.hessian import Calibration
from database.levels import LevelSwitcher
from database.store import Database, LevelCache
from test_fitness import documents, drop, random_candidates
from utils.decoder import Decoder
from utils.errors import RunError
from utils.fitness import Fitness, out_of_memory, storage_for
from utils.model import load_decoder
from utils.runs import Run

ROOT = Path(__file__).resolve().parents[1]
CPU = RuntimeError("[enforce fail at alloc_cpu.cpp:124] err == 0. DefaultCPUAllocator: can't allocate memory: you "
                   "tried to allocate 68719476736 bytes. Error code 12 (Cannot allocate memory)")
GPU = torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB.\nGPU 0 has a total capacity of 8 GiB")
TEXT = ["--calibration_sequence_length", "32", "--calibration_tokens", "512", "--calibration_data"]


@pytest.fixture
def memory(monkeypatch):
    """memory.tokens: the most that go through block 2 before memory runs out; memory.failures: how often it did."""
    class Memory:
        tokens, failures, error = 10**9, 0, GPU

    memory, run_block = Memory(), Decoder.run_block

    def limited(self, index, hidden_states, inputs):
        if index == 2 and hidden_states.shape[:2].numel() > memory.tokens:
            memory.failures += 1
            raise memory.error
        return run_block(self, index, hidden_states, inputs)

    monkeypatch.setattr(Decoder, "run_block", limited)
    return memory


@pytest.mark.parametrize("error", [CPU, GPU, MemoryError()])
def test_walk_that_does_not_fit_gives_the_same_values_in_smaller_microbatches(error, memory, capsys):
    decoder = Decoder(families.build("llama"))
    fitness = Fitness(decoder, documents(), drop(decoder), microbatch_tokens=160)
    expected = fitness.measure(random_candidates(6), kinds=("kl", "ppl"))
    memory.tokens, memory.error = 50, error
    values = fitness.measure(random_candidates(6), kinds=("kl", "ppl"))
    assert fitness.sizes == [160, 40] and memory.failures == 2
    assert capsys.readouterr().out.splitlines() == [
        f"out of memory: from now on at most {new} tokens at once instead of {old}"
        for old, new in ((160, 80), (80, 40))]
    torch.testing.assert_close(torch.tensor(values), torch.tensor(expected), rtol=1e-6, atol=1e-8)
    assert fitness.measure(random_candidates(6), kinds=("kl", "ppl")) == values and memory.failures == 2


def test_cached_levels_are_given_back_before_microbatches_are_halved(checkpoint, databases, monkeypatch, capsys):
    decoder = load_decoder(str(checkpoint), dtype="float32", device="cpu")
    database = Database.open(databases["quant"])
    switcher = LevelSwitcher(decoder, database, 1.0)
    fitness = Fitness(decoder, documents(), switcher.set_block, microbatch_tokens=160)
    candidates = [switcher.states(dict.fromkeys(database.layers, level)) for level in (2, 3, 4)]
    expected = fitness.measure(candidates)
    held, run_block, failures = switcher.cache.bytes, Decoder.run_block, []

    def limited(self, index, hidden_states, inputs):
        if switcher.cache.bytes > held // 2:
            failures.append(index)
            raise GPU
        return run_block(self, index, hidden_states, inputs)

    monkeypatch.setattr(Decoder, "run_block", limited)
    assert fitness.measure(candidates) == expected and fitness.sizes == [160, 160] and len(failures) == 1
    assert 0 < switcher.cache.bytes <= switcher.cache.max_bytes == held // 2
    assert capsys.readouterr().out == (f"out of memory: {held / 1e9:.1f} GB of cached levels given back, from now on "
                                       f"half as many are kept\n")
    monkeypatch.setattr(Decoder, "run_block", lambda *_: (_ for _ in ()).throw(GPU))
    with pytest.raises(RunError, match="^out of memory with a single row"):      # nor does it go on for ever
        fitness.measure(candidates)
    assert capsys.readouterr().out.count("cached levels given back") == 1


@pytest.mark.parametrize("free, kept", [(801, "cuda"), (800, "cpu")])
def test_what_would_fill_a_device_is_kept_in_host_memory(free, kept, monkeypatch):
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda device: (free, 10**9))
    assert storage_for(100, torch.device("cuda"), 1 / 8) == torch.device(kept)
    assert storage_for(10**18, torch.device("cpu"), 1 / 8) == torch.device("cpu")


def test_model_too_large_for_the_device_names_what_helps(checkpoint, monkeypatch):
    monkeypatch.setattr(PreTrainedModel, "to", lambda *_: (_ for _ in ()).throw(GPU))
    with pytest.raises(ValueError, match="^--model_name_or_path .*too large for the device; add --cpu_offload_modules"):
        load_decoder(str(checkpoint), device="cpu")


def test_teacher_that_does_not_fit_is_run_again_from_its_beginning(memory):
    texts, candidates = documents(), random_candidates(4)
    smaller, decoder = Decoder(families.build("llama")), Decoder(families.build("llama"))
    expected = Fitness(smaller, texts, drop(smaller), microbatch_tokens=40).measure(candidates)
    memory.tokens = 50
    assert Fitness(decoder, texts, drop(decoder), microbatch_tokens=160).measure(candidates) == expected


def test_sizes_of_an_earlier_run_give_its_values_to_the_bit(memory):
    texts = documents()
    decoder, resumed = Decoder(families.build("llama")), Decoder(families.build("llama"))
    fitness = Fitness(decoder, texts, drop(decoder), microbatch_tokens=160)
    memory.tokens = 50
    values = fitness.measure(random_candidates(4))
    memory.tokens = 10**9
    again = Fitness(resumed, texts, drop(resumed), microbatch_tokens=160, sizes=fitness.sizes)
    assert again.measure(random_candidates(4)) == values and again.sizes == [160, 40]


def test_a_row_that_does_not_fit_by_itself_is_an_error_that_says_what_to_lower(memory):
    memory.tokens = 36
    decoder = Decoder(families.build("llama"))
    with pytest.raises(RunError, match=r"^out of memory with a single row of 37 tokens \(CUDA out of memory. Tried to "
                                       r"allocate 2.00 GiB.\); lower --calibration_sequence_length"):
        Fitness(decoder, documents(), drop(decoder))


@pytest.mark.parametrize("fails_at", [0, 3, 9, 23])                    # of the outer products of all blocks
def test_hessians_are_the_same_in_smaller_microbatches(fails_at, monkeypatch, capsys):
    add, calls = hessian.add_outer_products, iter(range(10**6))

    def failing(*args):
        if next(calls) == fails_at:
            raise GPU
        add(*args)

    def hessians() -> dict[str, torch.Tensor]:
        decoder = Decoder(families.build("llama"))
        calibration = Calibration(decoder, documents([40] * 15), decoder.device, microbatch_tokens=160)
        found = {}
        for block in decoder.blocks:
            found |= calibration.measure(block.layers, advance=True)
        return found

    expected = hessians()
    monkeypatch.setattr(hessian, "CHUNKS", 2)                           # of several microbatches each
    several = hessians()
    monkeypatch.setattr(hessian, "add_outer_products", failing)
    found = hessians()
    printed = capsys.readouterr().out
    assert printed.count("out of memory: from now on at most ") == printed.count("\n") == 1
    for name in expected:
        atol = 1e-5 * float(expected[name].diagonal().max())
        torch.testing.assert_close(several[name], expected[name], rtol=1e-4, atol=atol)
        torch.testing.assert_close(found[name], expected[name], rtol=1e-4, atol=atol)


@pytest.mark.parametrize("error", [CPU, GPU, MemoryError()])
def test_a_build_goes_on_in_smaller_microbatches(error, checkpoint, text, tmp_path, memory, capsys):
    def built(folder: str) -> list[torch.Tensor]:
        gptq.main(gptq.make_parser().parse_args(
            ["--model_name_or_path", checkpoint, *TEXT, text, "--bitwidth_options", "3", "--calibration_bitwidth", "3",
             "--microbatch_tokens", "512", "--save_dir", str(tmp_path / folder)]))
        database = Database.open(tmp_path / folder)
        return [database.weight(name, 3).float() for name in database.layers]

    expected = built("whole")
    memory.tokens, memory.error = 100, error
    capsys.readouterr()
    found = built("smaller")
    assert capsys.readouterr().out.count("out of memory: from now on at most ") == memory.failures > 0
    differing = sum(int((a != b).sum()) for a, b in zip(found, expected)) / sum(a.numel() for a in found)
    assert differing < 0.02                                             # weights that were halfway between two levels
    memory.failures = 0
    built("smaller")                                                    # finished: nothing is refused
    assert not memory.failures


def test_a_build_without_room_for_a_row_or_a_layer_names_what_helps(checkpoint, text, tmp_path, memory, monkeypatch,
                                                                  capsys):
    command = ["gptq", "--model_name_or_path", str(checkpoint), *TEXT, text, "--bitwidth_options", "3",
               "--calibration_bitwidth", "3", "--calibration_sequence_length", "48", "--save_dir", str(tmp_path / "db")]
    monkeypatch.setattr("sys.argv", command)
    memory.tokens = 40                                                  # enough to find the blocks
    with pytest.raises(SystemExit):
        build.run(gptq.make_parser(), gptq.main)
    printed = capsys.readouterr().err
    assert "error: out of memory with a single row of 48 tokens (CUDA out of memory. Tried to allocate 2.00" in printed
    assert "; use --cpu_offload_modules and --cpu_offload_activations, or a shorter --calibration_seq" in printed
    memory.tokens = 10**9
    with monkeypatch.context() as patch:
        patch.setattr(build.store, "write_layer", lambda *_: (_ for _ in ()).throw(CPU))
        with pytest.raises(SystemExit):
            build.run(gptq.make_parser(), gptq.main)
    assert "to go on, run the same command with --cpu_offload_modules and" in capsys.readouterr().err
    monkeypatch.setattr("sys.argv", [*command, "--cpu_offload_modules", "--cpu_offload_activations"])
    build.run(gptq.make_parser(), gptq.main)                            # the remedy is not refused
    assert Database.open(tmp_path / "db").layers


def test_other_errors_are_not_taken_for_it(memory):
    memory.tokens, memory.error = 50, RuntimeError("mat1 and mat2 shapes cannot be multiplied")
    decoder = Decoder(families.build("llama"))
    with pytest.raises(RuntimeError, match="shapes"):
        Fitness(decoder, documents(), drop(decoder))


@pytest.mark.parametrize("message", [
    "CUDA error: out of memory\nCUDA kernel errors might be asynchronously reported at some other API call",
    "CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling `cublasCreate(handle)`",
    "cuDNN error: CUDNN_STATUS_ALLOC_FAILED", "Triton Error [CUDA]: out of memory"])
def test_a_devices_libraries_run_out_of_memory_in_words_of_their_own(message):
    assert out_of_memory(RuntimeError(message))
    assert out_of_memory(torch.AcceleratorError(message))
    assert not out_of_memory(ValueError(message))                       # of ours: what is said once all has been tried


def test_the_cpus_own_allocator_is_recognised():
    with pytest.raises(RuntimeError) as caught:
        torch.empty(2**60, dtype=torch.uint8)
    assert out_of_memory(caught.value)


def test_a_block_left_half_switched_is_switched_anew(checkpoint, text, tmp_path, monkeypatch):
    gptq.main(gptq.make_parser().parse_args(
        ["--model_name_or_path", checkpoint, *TEXT, text, "--bitwidth_options", "2", "3", "4",
         "--calibration_bitwidth", "3", "--save_dir", str(tmp_path / "db")]))
    database, rng = Database.open(tmp_path / "db"), random.Random(0)
    texts = [torch.randint(3, 90, (24,), generator=torch.Generator().manual_seed(i)) for i in range(4)]
    candidates = [{name: rng.choice((2, 3, 4)) for name in database.layers} for _ in range(4)]

    def measure(fails_at: int) -> list:
        decoder = load_decoder(checkpoint, device="cpu")
        switcher = LevelSwitcher(decoder, database, 0.0)
        fitness = Fitness(decoder, texts, switcher.set_block, microbatch_tokens=48)
        calls, copy_ = iter(range(10**6)), LevelCache.copy_

        def failing(self, *args):
            if next(calls) == fails_at:
                raise GPU
            copy_(self, *args)

        with monkeypatch.context() as patch:
            patch.setattr(LevelCache, "copy_", failing)
            values = fitness.measure([switcher.states(levels) for levels in candidates])
        assert fitness.sizes == [48, 24 if fails_at >= 0 else 48]
        return values

    expected = measure(-1)
    for fails_at in (0, 3, 45, 61):                                    # in the middle of a block
        torch.testing.assert_close(torch.tensor(measure(fails_at)), torch.tensor(expected), rtol=1e-5, atol=1e-8)


def test_a_search_that_ran_out_of_memory_resumes_to_the_same_files(checkpoint, text, tmp_path, memory, monkeypatch,
                                                                  capsys):
    def search(folder: str) -> dict[str, bytes]:
        evo_drop.main(["--model_name_or_path", checkpoint, *TEXT, text, "--sparsity", "0.34",
                       "--initially_generated", "4", "--initial_tokens", "64", "--generations", "3",
                       "--offspring", "4", "--survivors_per_selection", "2", "1",
                       "--tokens_per_selection", "64", "256", "--eval_datasets", text, "--eval_tokens", "256",
                       "--eval_sequence_length", "32", "--output_dir", str(tmp_path / folder)])
        return {name: (tmp_path / folder / name).read_bytes()
                for name in ("layer_drop_config.txt", "log.jsonl", "checkpoint.json")}

    log = Run.log

    def shrinking(self, record, **timing):
        log(self, record, **timing)
        if record["generation"] == 1:
            memory.tokens = 100                                         # other programs want theirs

    monkeypatch.setattr(Run, "log", shrinking)
    whole = search("whole")
    assert capsys.readouterr().out.count("out of memory") == memory.failures > 0
    state = json.loads(whole["checkpoint.json"])["state"]["microbatch_tokens"]
    assert state["fitness"][1] <= 100 < state["fitness"][0] and state["evaluation"][text][1] <= 100

    memory.tokens = 10**9
    checkpoint_, killed = Run.checkpoint, []

    def dying(self, **saved):
        checkpoint_(self, **saved)
        if saved["generation"] == 2 and not killed:
            killed.append(True)
            raise KeyboardInterrupt

    monkeypatch.setattr(Run, "checkpoint", dying)
    with pytest.raises(KeyboardInterrupt):
        search("killed")
    memory.tokens, failures = 10**9, memory.failures
    assert search("killed") == whole
    assert memory.failures == failures                                  # the sizes of the checkpoint were enough


FAULTS = """
import resource, sys, torch
from utils.model import load_decoder

def faults(count, megabytes):
    before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    for _ in range(20):
        arrays = [torch.ones(megabytes * 2**18) for _ in range(count)]
        del arrays                   # by default the next are new pages, up to 20 * 256 * count * megabytes in all
    return resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before

decoder = load_decoder(sys.argv[1], device="cpu")
faults(16, 8)
print(faults(8, 1) + faults(8, 8) + faults(16, 8))
"""


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="other allocators have rules of their own")
def test_loaded_models_pages_are_faulted_in_once(tmp_path):
    """In a process of its own: what is free already depends on what was run before."""
    families.build("llama").save_pretrained(tmp_path)
    printed = subprocess.run([sys.executable, "-c", FAULTS, tmp_path], capture_output=True, text=True, cwd=ROOT)
    assert int(printed.stdout) < 1000, printed.stderr
