"""Several processes: the same files as one, work in equal parts, and one error that ends all of them."""
import json
import os
import shutil
import subprocess
import sys
from collections import Counter

import pytest
import torch

import families
import processes
from benchmarks.families import NUM_BLOCKS, save_family
from conftest import ROOT
from utils import distributed
from utils.configs import write_drop_config
from utils.decoder import Decoder
from utils.fitness import Fitness, microbatches

SEARCH = ["--calibration_tokens", "1024", "--microbatch_tokens", "64", "--initial_tokens", "64",
          "--initially_generated", "4", "--offspring", "6", "--survivors_per_selection", "3", "1",
          "--tokens_per_selection", "64", "256"]
RESULTS = {"evo_drop": "layer_drop_config.txt", "evo_unstructured": "final_configuration.txt",
           "evo_quant": "evo-kl-configuration-2.5.txt"}


def torchrun(commands: list[list[str]], count: int = 2) -> subprocess.CompletedProcess:
    return subprocess.run([sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={count}",
                           str(ROOT / "tests" / "processes.py"), json.dumps(commands)], capture_output=True, text=True,
                          cwd=ROOT, timeout=600, env=os.environ | {"OMP_NUM_THREADS": "1"})


def build_commands(inputs: list[str], folder) -> list[list[str]]:
    model = [*inputs, "--calibration_tokens", "512", "--microbatch_tokens", "96"]
    return [["database.sparsegpt", *model, "--sparsity", "0.5", "--num_levels", "2", "--weights_diff", "100",
             "--save_dir", str(folder / "sparsegpt")],
            ["database.gptq", *model, "--bitwidth_options", "2", "3", "4", "--calibration_bitwidth", "3",
             "--group_size", "16", "--perchannel", "--save_dir", str(folder / "gptq")]]


def search_commands(inputs: list[str], databases, folder, generations: int) -> list[list[str]]:
    own = {"evo_drop": ["--sparsity", "0.5", "--no_eval", "--init", "measured", "--screen", "2", "--refine", "1"],
           "evo_unstructured": ["--sparse_weights_path", str(databases / "sparsegpt"), "--no_eval",
                                "--init", "measured", "--screen", "2", "--refine", "1"],
           "evo_quant": ["--quant_weights_path", str(databases / "gptq"), "--target_bitwidth", "2.5",
                         "--eval_datasets", inputs[-1], "--eval_tokens", "512"]}
    return [[name, *inputs, *SEARCH, *flags, "--generations", str(generations),
             "--output_dir", str(folder / name)] for name, flags in own.items()]


@pytest.fixture(scope="module")
def inputs(checkpoint, text) -> list[str]:
    return ["--device", "cpu",                           # of GPUs each process needs one of its own
            "--model_name_or_path", str(checkpoint), "--calibration_sequence_length", "32", "--calibration_data", text]


def finish_commands(inputs: list[str], databases, folder) -> list[list[str]]:
    own = {"finish-shared": ["--model_name_or_path", str(databases / "sharing"),      # keys and values among blocks
                             "--drop_config", str(databases / "drop.txt")],
           "finish-sparsegpt": ["--sparse_weights_path", str(databases / "sparsegpt"), "--sparse_config_path", "0"],
           "finish-gptq": ["--quant_weights_path", str(databases / "gptq"), "--quant_config_path", "2"]}
    return [["finish", *inputs, "--calibration_tokens", "512", "--batch_size", "4", "--steps", "3",
             "--end_to_end_steps", "2", *flags, "--save_dir", str(folder / name)] for name, flags in own.items()]


@pytest.fixture(scope="module")
def runs(inputs, tmp_path_factory):
    """{"one": folder, "two": folder} of the same programs run by one process and by two."""
    folders = {name: tmp_path_factory.mktemp(name) for name in ("one", "two")}
    for command in build_commands(inputs, folders["one"]):
        processes.run(command)
    save_family("gemma4_text", folders["one"] / "sharing")
    write_drop_config(folders["one"] / "drop.txt", [(True, False), *[(False, False)] * (NUM_BLOCKS - 1)])
    resumed = search_commands(inputs, folders["one"], folders["two"], 1)[2]
    processes.run(resumed)                                              # by one process; two go on
    processes.run(["hessians", str(folders["one"] / "hessians.json")])
    finished = torchrun([["hessians", str(folders["two"] / "hessians.json")], *build_commands(inputs, folders["two"]),
                         *search_commands(inputs, folders["one"], folders["two"], 3),
                         *finish_commands(inputs, folders["one"], folders["two"])])
    assert finished.returncode == 0, finished.stderr
    folders["printed"] = finished.stdout
    for command in (*search_commands(inputs, folders["one"], folders["one"], 3),
                    *finish_commands(inputs, folders["one"], folders["one"])):
        processes.run(command)
    return folders


# ---- the same results ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("search", RESULTS)
def test_two_processes_find_what_one_finds(runs, search):
    for file in (RESULTS[search], "log.jsonl"):
        assert (runs["two"] / search / file).read_bytes() == (runs["one"] / search / file).read_bytes(), file
    summaries = [json.loads((runs[name] / search / "summary.json").read_text()) for name in ("one", "two")]
    timing = {"seconds": 0, "tokens_per_second": 0}
    assert summaries[0] | timing == summaries[1] | timing


@pytest.mark.parametrize("method", ["sparsegpt", "gptq", "finish-sparsegpt", "finish-gptq"])
def test_two_processes_build_the_database_that_one_builds(runs, method):
    one, two = ({file.name: file.read_bytes() for file in (runs[name] / method).iterdir()
                 if file.suffix in (".safetensors", ".json")} for name in ("one", "two"))
    assert len(one) == 43 and one == two


def test_two_processes_finish_blocks_that_share_keys_and_values_as_one_does(runs):
    one, two = ((runs[name] / "finish-shared" / "model.safetensors").read_bytes() for name in ("one", "two"))
    assert one == two


def test_layers_that_only_one_process_sees_have_their_hessian(runs):
    one, two = ((runs[name] / "hessians.json").read_text() for name in ("one", "two"))
    assert one == two
    found = json.loads(one)
    assert found["none"] is None and found["last"] == found["shared"] != found["all"]


def test_one_process_prints_and_says_how_long_they_waited(runs):
    assert runs["printed"].count("generation 3/3") == 3
    assert runs["printed"].count("2 processes, idle ") == 8


def test_one_process_goes_on_where_two_left_off(runs, inputs, tmp_path):
    logs = []
    for name in ("one", "two"):
        folder = tmp_path / name
        shutil.copytree(runs[name] / "evo_drop", folder / "evo_drop")
        processes.run(search_commands(inputs, runs["one"], folder, 4)[0])
        logs.append((folder / "evo_drop" / "log.jsonl").read_bytes())
    assert logs[0] == logs[1] and logs[0].count(b"\n") == 5


# ---- equal parts -----------------------------------------------------------------------------------------------------


@pytest.fixture
def as_process(monkeypatch):
    """Pretend to be one of several processes, for what does not exchange anything."""
    def pretend(rank: int, count: int) -> None:
        monkeypatch.setattr(distributed, "rank", lambda: rank)
        monkeypatch.setattr(distributed, "world_size", lambda: count)
    return pretend


@pytest.mark.parametrize("count", [1, 2, 3, 8, 40])
def test_shares_are_contiguous_and_of_about_equal_cost(as_process, count):
    as_process(0, count)
    costs = [1.0 + i % 5 for i in range(120)]
    owners = distributed.shares(costs)
    assert owners == sorted(owners) and set(owners) == set(range(count))
    parts = [sum(cost for cost, owner in zip(costs, owners) if owner == rank) for rank in range(count)]
    assert max(parts) <= sum(costs) / count + max(costs)


def test_items_are_never_cut_unevenly_that_can_be_dealt_evenly(as_process):
    as_process(0, 4)
    assert distributed.shares([3.0] * 8) == [0, 0, 1, 1, 2, 2, 3, 3]


@pytest.mark.parametrize("count", [1, 2, 3, 5])
@pytest.mark.parametrize("num_candidates", [2, 40])
def test_every_candidate_walks_every_microbatch_in_one_process(as_process, count, num_candidates):
    documents = [torch.randint(3, families.VOCABULARY, (length,)) for length in (37, 30, 23, 19, 14, 9)]
    decoder = Decoder(families.build("llama"))
    fitness = Fitness(decoder, documents, lambda index, state: None, teacher=False, microbatch_tokens=40)
    batches = microbatches([(i, len(document)) for i, document in enumerate(documents)], 40, decoder.packed_rows)
    candidates = [tuple((i >> block) & 1 for block in range(families.NUM_BLOCKS)) for i in range(num_candidates)]
    walked = Counter()
    for rank in range(count):
        as_process(rank, count)
        walked.update((batch, i) for batch, members in fitness._own_walks(candidates, batches) for i in members)
    assert walked == Counter((batch, i) for batch in range(len(batches)) for i in range(num_candidates))


# ---- errors ----------------------------------------------------------------------------------------------------------


def test_a_process_that_fails_ends_all_with_its_error():
    failed = torchrun([["fail_in_one"]])
    assert failed.returncode != 0, failed.stderr
    assert "ZeroDivisionError: the last process failed" in failed.stderr


def test_a_mistake_that_all_processes_find_is_told_once():
    failed = torchrun([["fail_in_all"]])
    assert failed.returncode != 0
    assert failed.stderr.count("error: --flag 3: too many") == 1


def test_processes_do_not_share_a_gpu(as_process):
    from utils.model import default_device
    as_process(1, 2)
    with pytest.raises(ValueError, match="--device cuda:0: each process has a GPU of its own; use cuda"):
        default_device("cuda:0")
