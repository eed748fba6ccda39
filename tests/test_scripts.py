"""scripts/: the shell is sound, reports fail on empty rows, estimates are the arithmetic they claim to be."""
import csv
import hashlib
import itertools
import json
import math
import random
import shlex
import subprocess
import sys
from pathlib import Path

import pytest
from lm_eval.tasks import TaskManager

import evo_drop
import evo_quant
import evo_unstructured
from benchmarks import scaling
from benchmarks.families import save_family
from scripts import convergence, estimate, nonmonotonicity, report, small_task
from utils.configs import read_drop_config
from utils.data import stdlib_texts
from utils.files import seal
from utils.flags import check_search_flags
from utils.model import load_config, load_decoder

SCRIPTS = Path(__file__).parents[1] / "scripts"
TABLES = sorted(path for path in SCRIPTS.glob("*.sh") if path.name != "common.sh")


# ---- the paper's figures ---------------------------------------------------------------------------------------------


def test_paper_figures_are_numbers_under_unique_keys():
    with report.PAPER.open(newline="") as stream:
        rows = list(csv.DictReader(stream))
    keys = [(row["table"], row["model"], row["level"], row["method"]) for row in rows]
    assert len(set(keys)) == len(keys) == 157
    assert {row["table"] for row in rows} == {"depth", "sparsity", "quant"}
    assert {row["model"] for row in rows} == set(report.MODELS.values())
    for row in rows:
        figures = [float(row[column]) for column in report.COLUMNS if row[column]]
        assert figures and all(0 < figure < math.inf for figure in figures)
        assert None not in row and (row["method"] == "Dense") == (row["level"] == "0")
        accuracy = row["average_accuracy"]
        assert not accuracy or 25 < float(accuracy) < 100


@pytest.mark.parametrize("key, column, figure", [
    (("depth", "Mistral-7B-v0.3", "25", "EvoPress"), "wikitext2", "8.66"),
    (("depth", "Llama-3.1-8B", "12.5", "CosineWindow"), "fineweb_edu", "13.76"),
    (("sparsity", "Phi-3-Medium-14B", "70", "OWL"), "average_accuracy", "55.4"),
    (("quant", "Llama-2-7B", "3", "EvoPress(PPL)"), "fineweb_edu", "6.79"),
    (("quant", "Llama-3-8B", "3", "EvoPress"), "c4", "12.03"),
    (("quant", "Llama-3-8B", "2.25", "BestOf32"), "average_accuracy", "36.8"),
])
def test_figures_are_in_their_columns(key, column, figure):
    assert report.read_paper()[key][column] == figure


# ---- report ----------------------------------------------------------------------------------------------------------


def results(path: Path, perplexity: float = 7.25, **more) -> Path:
    path.write_text(json.dumps({"dense": {"wikitext2": {"ppl": 5.0, "kl": 0.0}},
                                "compressed": {"wikitext2": {"ppl": perplexity, "kl": 0.125}}} | more))
    return path


def test_report_puts_the_measured_beside_the_papers_figures(tmp_path, capsys):
    file = results(tmp_path / "a.json", average_accuracy=61.5)
    assert report.main(["mistralai/Mistral-7B-v0.3", "--row", "sparsity", "60", "EvoPress", str(file),
                        "--row", "sparsity", "60", "always 3", str(file)]) == 0
    lines = [[cell.strip() for cell in line.split("|")[1:-1]]
             for line in capsys.readouterr().out.splitlines() if "|" in line]
    assert lines[0] == ["level", "method", "paper wikitext2", "paper c4", "paper fineweb_edu", "paper avg. acc.",
                        "wikitext2 ppl", "wikitext2 KL", "avg. acc."]
    assert lines[2] == ["60", "EvoPress", "7.08", "10.27", "–", "62.2", "7.2500", "0.1250", "61.50"]
    assert lines[3][:6] == ["60", "always 3", "–", "–", "–", "–"]


def test_dense_rows_show_the_dense_model_and_contradictions_are_noted(tmp_path, capsys):
    (tmp_path / "dense.json").write_text(json.dumps({"dense": {"stdlib": {"ppl": 5.0, "kl": 0.0}}}))
    assert report.main(["Llama-2-7b-hf", "--row", "sparsity", "0", "Dense", str(tmp_path / "dense.json")]) == 0
    out = capsys.readouterr().out
    assert "5.12" in out and "5.0000" in out
    assert "paper, 0 Dense: wikitext2 5.12 here, 5.21 in the paper's depth table" in out


@pytest.mark.parametrize("content", [None, "", "{}", '{"dense": {}}',
                                     '{"dense": {"wikitext2": {"ppl": NaN, "kl": 0.0}}}',
                                     '{"dense": {"wikitext2": {"ppl": 5.0, "kl": NaN}}}'])
@pytest.mark.parametrize("alone", [True, False])
def test_an_empty_cell_fails_and_is_named(tmp_path, capsys, content, alone):
    bad = tmp_path / "bad.json"
    if content is not None:
        bad.write_text(content)
    rows = [] if alone else ["--row", "quant", "3", "EvoPress", str(results(tmp_path / "good.json"))]
    assert report.main(["demo/model", *rows, "--row", "quant", "4", "Uniform", str(bad)]) == 1
    assert "empty: 4 Uniform: no " in capsys.readouterr().err


def test_an_infinite_perplexity_is_a_measurement(tmp_path):
    file = results(tmp_path / "a.json", math.inf)
    assert report.main(["demo/model", "--row", "quant", "2", "Uniform", str(file)]) == 0


# ---- estimate --------------------------------------------------------------------------------------------------------


def test_amounts_of_a_small_model_are_not_rounded_to_nothing():
    assert [*map(estimate.amount, (0, 3e-5, 0.0028, 1.44, 26.6, 1234.5))] == ["0", "< 0.001", "0.0028", "1.4", "27",
                                                                              "1,234"]


def test_shape_is_that_of_the_model(checkpoint):
    decoder = load_decoder(str(checkpoint), device="cpu")
    shape = estimate.shape_of(str(checkpoint))
    assert shape.parameters == sum(parameter.numel() for parameter in decoder.model.parameters())
    assert shape.weights == sum(layer.weight.numel() for layer in decoder.layers.values())
    assert shape.blocks == len(decoder.blocks) == 6
    assert len({key for key, *_ in shape.layers}) == 4 * 6       # q, k and v share a Hessian, gate and up too


def test_shape_is_found_wherever_a_family_has_its_blocks(tmp_path):
    decoder = load_decoder(save_family("gpt2", tmp_path), device="cpu")
    shape = estimate.shape_of(str(tmp_path))
    assert shape.blocks == len(decoder.blocks) and shape.weights == sum(
        layer.weight.numel() for layer in decoder.layers.values())


SHAPE = estimate.Shape(blocks=32, hidden=4096, vocabulary=128256, context=8192, parameters=8_030_261_248,
                       attention_width=4096, layers=tuple(
                           (f"{block}.{key}", out, columns) for block in range(32) for key, out, columns in
                           (("qkv", 4096, 4096), ("qkv", 1024, 4096), ("qkv", 1024, 4096), ("o", 4096, 4096),
                            ("gate_up", 14336, 4096), ("gate_up", 14336, 4096), ("down", 4096, 14336))))


@pytest.fixture
def llama3(monkeypatch):
    monkeypatch.setattr(estimate, "shape_of", lambda name, trust_remote_code: SHAPE)


def need(command: str, sizes: dict | None = None) -> estimate.Need:
    program, _, rest = command.partition(" ")
    module = ["-m"] if "." in program and not program.endswith(".py") else []
    return estimate.need_of([*module, program, "--model_name_or_path", "m", *shlex.split(rest)],
                            {} if sizes is None else sizes)


def test_search_tokens_are_those_a_run_logs():
    args = evo_unstructured.parse_arguments(["--model_name_or_path", "m", "--sparse_weights_path", "db"])
    assert estimate.search_tokens(args, 1) - estimate.search_tokens(args, 0) == 64 * 2048 + 8 * 16384 + (2 + 1) * 65536
    args.strategy = "comma"
    assert estimate.search_tokens(args, 1) - estimate.search_tokens(args, 0) == 64 * 2048 + 8 * 16384 + 2 * 65536
    fast = evo_quant.parse_arguments(shlex.split(
        "--model_name_or_path m --quant_weights_path db --target_bitwidth 3 --offspring 16 "
        "--survivors_per_selection 1 1 --tokens_per_selection 512 8192"))
    assert estimate.search_tokens(fast, 1) - estimate.search_tokens(fast, 0) == 16 * 512 + 2 * 8192


def test_depth_search_without_generations_takes_the_papers_number(llama3):
    default, given = (need(f"evo_drop.py --sparsity 0.25 {more}") for more in ("", "--generations 128"))
    assert default == given                                      # 8 * 24 / 1.5
    tokens = 64 * 2048 + 128 * (32 * 2048 + 3 * 32768) + 131072
    per_token = 2 * SHAPE.weights + 2 * 8192 * 4096 * 32 + 2 * 4096 * 128256
    assert default.flop["bf16"] == pytest.approx(tokens * per_token)
    assert default.seconds == pytest.approx(tokens * per_token / 156e12 + 2 * SHAPE.parameters / 2e9)


def test_databases_of_an_8b_model_have_the_size_they_have_on_disk(llama3):
    sizes: dict = {}
    quant = need("database.gptq --bitwidth_options 2 3 4 5 6 --group_size 128 --save_dir db", sizes)
    assert quant.disk == pytest.approx(SHAPE.weights * (20 / 8 + 5 * 3 / 128)) and sizes == {"db": quant.disk}
    for path in ("db", "./db", "db/"):
        assert need(f"evo_quant.py --target_bitwidth 3 --quant_weights_path {path}", sizes).files == (
            2 * SHAPE.parameters + quant.disk)
    sparse = need("database.sparsegpt --sparsity 0.7 --weights_diff 1000000 --save_dir sparse")
    kept = [sum(round(out * columns * 0.3) - level * 1_000_000 for _, out, columns in SHAPE.layers
                if 0 <= round(out * columns * 0.7) + level * 1_000_000 <= out * columns) for level in range(-8, 9)]
    masks = sum(out * columns / 8 for _, out, columns in SHAPE.layers for level in range(-8, 9)
                if 0 <= round(out * columns * 0.7) + level * 1_000_000 <= out * columns)
    assert sparse.disk == pytest.approx(2 * sum(kept) + masks, rel=1e-6)
    hidden_states = 2 * 8388608 * 4096                           # too many for the device, which is as if told so
    offloaded = need("database.gptq --cpu_offload_activations --save_dir db")
    assert (offloaded.device, offloaded.host) == (quant.device, quant.host)
    assert quant.host == 2 * SHAPE.parameters + hidden_states
    fewer = [need(f"database.gptq --calibration_tokens 2097152 {flag} --save_dir db")
             for flag in ("", "--cpu_offload_activations")]
    assert fewer[0].device - fewer[1].device == pytest.approx(hidden_states / 4) == fewer[1].host - fewer[0].host
    hessians = 9 / 16 * 2 * 8388608 * 32 * (3 * 4096**2 + 14336**2)      # above the diagonal, in eight parts
    assert quant.flop["bf16"] == pytest.approx(2 * SHAPE.forward(8388608, None) + hessians)


def test_databases_count_what_travels_and_what_is_written_beside_the_computations(llama3):
    states = 2 * 8388608 * 4096
    quant, sparse = (need(f"database.{command} --save_dir db") for command in ("gptq", "sparsegpt --sparsity 0.6"))
    assert quant.copies == 32 * 3 * states and sparse.copies == 32 * 2 * states      # read twice, written once
    assert (quant.written, sparse.written) == (quant.disk, sparse.disk)
    assert need("database.gptq --calibration_tokens 2097152 --save_dir db").copies == 0          # stays on the device
    assert need("database.gptq --activations_dir . --save_dir db").host == quant.host - states
    sparse.flop.clear()
    assert sparse.seconds == pytest.approx(max(sparse.written / 0.7e9, sparse.copies / 25e9) + sparse.files / 2e9)


def test_an_offloaded_search_copies_the_levels_it_does_not_keep(llama3):
    command = "evo_quant.py --target_bitwidth 3 --microbatch_tokens 2048 --quant_weights_path db --level_cache_gb"
    every, some, none = (need(f"{command} {gb} --cpu_offload_modules", {"db": 100e9}).copies for gb in (40, 24, 0))
    steps = 150 * (1 + 8 + 64)
    assert none - every == pytest.approx(steps * 40e9) and some - every == pytest.approx(steps * 16e9)


def test_offloaded_blocks_are_copied_for_every_microbatch_and_two_stay_on_the_device(llama3):
    plain, offloaded = (need(f"evo_drop.py --sparsity 0.25 --microbatch_tokens 2048 {more}")
                        for more in ("", "--cpu_offload_modules"))
    assert offloaded.copies == 2 * SHAPE.weights * (64 + 128 * (1 + 16)) and plain.copies == 0
    prefixes = 2 * 32 * 2048 * 4096 * 2
    assert plain.device - offloaded.device == pytest.approx(2 * SHAPE.weights * 30 / 32 - prefixes)
    assert offloaded.seconds == plain.seconds                    # copies hide behind computations ...
    offloaded.flop.clear()
    assert offloaded.seconds == pytest.approx(offloaded.copies / 25e9 + offloaded.files / 2e9)      # ... or not


def test_finishing_runs_the_text_twice_and_every_step_three_times(llama3):
    asked = need("finish.py --quant_weights_path db --quant_config_path 3 --save_dir out", {"db": 18e9})
    assert asked.flop == {"bf16": pytest.approx(SHAPE.forward(2 * 262144 + 3 * 200 * 8 * 2048, 2048))}
    assert asked.host == 2 * SHAPE.parameters and asked.disk == 18e9 / 5 == asked.sealed
    more = need("finish.py --calibration_tokens 2097152 --quant_weights_path db --quant_config_path 3 --save_dir out")
    states = 2 * 2097152 * 4096                                  # for which the device has no room
    assert more.host - asked.host == 3 * states and asked.waits == 0
    assert more.waits == 32 * (4 * states + 2 * 2 * 200 * 8 * 2048 * 4096)
    offloaded = need("finish.py --cpu_offload_modules --quant_weights_path db --quant_config_path 3 --save_dir out")
    assert offloaded.waits == 2 * 2 * SHAPE.weights              # there and back
    more.flop.clear()
    assert more.seconds == pytest.approx(more.waits / 6e9 + more.sealed / 0.7e9 + more.files / 2e9)
    for levels, a_weight in (("quant", 1), ("sparse", 12)):      # of quantized layers the scales alone are trained
        apart, together = (need(f"finish.py --{levels}_weights_path db --{levels}_config_path 0 --save_dir out {steps}")
                           for steps in ("", "--end_to_end_steps 100"))
        tokens = 4 * 100 * 8 * 2048
        assert together.flop["bf16"] - apart.flop["bf16"] == pytest.approx(
            SHAPE.forward(tokens, 2048) + SHAPE.head(tokens))
        assert together.device - apart.device == pytest.approx(a_weight * SHAPE.weights)


def test_needs_add_up_with_the_highest_peak():
    total = (estimate.Need({"bf16": 1}, 2, 3, 40, 5, 6, 7, 8)
             + estimate.Need({"bf16": 10, "fp32": 7}, 20, 30, 4, 50, 60, 70, 80))
    assert total == estimate.Need({"bf16": 11, "fp32": 7}, 22, 33, 40, 50, 66, 77, 88)


# ---- the shell -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("script", [*TABLES, SCRIPTS / "common.sh"], ids=lambda path: path.name)
def test_shell_parses(script):
    subprocess.run(["bash", "-n", script], check=True)
    if script.name != "common.sh":
        assert script.stat().st_mode & 0o100, "not executable"


def planned(script: Path, tmp_path: Path, **environment) -> list[list[str]]:
    """The commands of a script, as it hands them to estimate.py; nothing is run."""
    stub = tmp_path / "stub.sh"
    stub.write_text('#!/bin/sh\ncase "$1" in\nscripts/estimate.py) cat "$2" ;;\n'
                    f'-c) [ -n "$ANSWER" ] && echo "$ANSWER" || exec {sys.executable} "$@" ;;\nesac\n')
    stub.chmod(0o755)
    out = subprocess.run(["bash", script], check=True, capture_output=True, text=True, cwd=tmp_path,
                         env={"PATH": "/usr/bin:/bin", "PYTHON": str(stub), "OUT": str(tmp_path / "out"),
                              "ESTIMATE": "1", **environment}).stdout
    return [shlex.split(line) for line in out.splitlines() if not line.startswith("==")]


@pytest.mark.parametrize("small", ["", "1"])
@pytest.mark.parametrize("script", TABLES, ids=lambda path: path.stem)
def test_every_planned_command_is_one_its_program_takes(script, small, tmp_path):
    commands = planned(script, tmp_path, SMALL=small)
    for command in commands:
        program, arguments = (command[1], command[2:]) if command[0] == "-m" else (command[0], command[1:])
        estimate.PARSERS[program](arguments)
    models = {command[command.index("--model_name_or_path") + 1] for command in commands}
    assert models
    assert models == {"demo/model"} if small else all(Path(model).name in report.MODELS for model in models)


def test_one_dial_divides_what_the_searches_and_databases_of_the_paper_take(tmp_path):
    def value(commands: list[list[str]], program: str, flag: str) -> list[int]:
        command = next(command for command in commands if program in command)
        at = command.index(flag) + 1
        return [int(word) for word in itertools.takewhile(lambda word: not word.startswith("--"), command[at:])]

    scaled = planned(SCRIPTS / "table_quant.sh", tmp_path, MODEL="demo/model", SCALE="64", LEVELS="3")
    assert value(scaled, "evo_quant.py", "--tokens_per_selection") == [256, 2048, 16384]
    assert value(scaled, "evo_quant.py", "--generations") == [19]
    assert value(scaled, "evo_quant.py", "--offspring") == [128]
    assert value(scaled, "database.gptq", "--calibration_tokens") == [131072]
    for program, flag in (("database.gptq", "--calibration_sequence_length"),
                          ("eval_config.py", "--eval_sequence_length")):
        assert value(scaled, program, flag) == [512]                     # the model's context, not 8192 / 8
    scale = dict(MODEL="demo/model", SCALE="64", ANSWER="256")           # of the context's length, which takes seconds
    shorter = planned(SCRIPTS / "convergence.sh", tmp_path, **scale)
    assert value(shorter, "evo_drop.py", "--calibration_sequence_length") == [256]
    assert value(shorter, "scripts/convergence.py", "--brute_force_tokens") == [1024]
    assert value(planned(SCRIPTS / "nonmonotonicity.sh", tmp_path, **scale), "scripts/nonmonotonicity.py",
                 "--calibration_tokens") == [1024]
    assert value(planned(SCRIPTS / "table_dp.sh", tmp_path, **scale, LEVELS="70")[2:], "baselines.dp",
                 "--calibration_tokens") == [2048]
    paper = planned(SCRIPTS / "table_quant.sh", tmp_path, MODEL="demo/model", LEVELS="3")
    assert value(paper, "evo_quant.py", "--tokens_per_selection") == [2048, 16384, 131072]
    assert not any("--calibration_sequence_length" in command for command in paper)
    refused = subprocess.run(["bash", SCRIPTS / "table_quant.sh"], capture_output=True, text=True,
                             env={"PATH": "/usr/bin:/bin", "SCALE": "0.5"})
    assert refused.returncode == 1 and refused.stderr.startswith("SCALE=0.5: ")


def test_the_step_of_sparsity_is_the_papers_for_its_models_and_follows_the_size_of_others(tmp_path):
    def steps(model: str) -> set[str]:
        return {word for command in planned(SCRIPTS / "table_sparsity.sh", tmp_path, MODEL=model)
                for flag, word in zip(command, command[1:]) if flag == "--weights_diff"}

    assert steps("meta-llama/Meta-Llama-3-8B") == {"1000000"} and steps("demo/model") == set()


def test_a_model_of_which_the_paper_has_one_sparsity_is_taken_to_that_unless_others_are_asked_for(tmp_path):
    def levels(**environment) -> set[str]:
        return {command[command.index("--sparsity") + 1] for command in planned(
            SCRIPTS / "table_sparsity.sh", tmp_path, **environment) if command[:2] == ["-m", "database.sparsegpt"]}

    phi3, llama3 = "microsoft/Phi-3-medium-128k-instruct", "meta-llama/Meta-Llama-3-8B"
    assert levels(MODEL=phi3) == {"0.7"} and levels(MODEL=llama3) == {"0.5", "0.6", "0.7"}
    assert levels(MODEL=phi3, LEVELS="50") == {"0.5"}


def test_a_part_that_fails_ends_its_script_and_is_not_taken_for_finished(tmp_path):
    stub = tmp_path / "stub.sh"
    stub.write_text('#!/bin/sh\necho "$@"\ncase "$1" in scripts/estimate.py) ;; *) exit 3 ;; esac\n')
    stub.chmod(0o755)
    done = subprocess.run(["bash", SCRIPTS / "nonmonotonicity.sh"], capture_output=True, text=True, cwd=tmp_path,
                          env={"PATH": "/usr/bin:/bin", "PYTHON": str(stub), "OUT": str(tmp_path / "out"), "TASKS": "",
                               "SMALL": "1"})
    assert done.returncode == 3
    logs = [path.relative_to(tmp_path / "out") for path in (tmp_path / "out").rglob("*.log")]
    assert len(logs) == 1 and not list((tmp_path / "out").rglob("*.done"))      # the first, and none after it


def test_searches_have_exactly_the_papers_hyperparameters(tmp_path):
    searches = {"evo_drop.py": (32, [2, 1], [2048, 32768], 131072, None),
                "evo_unstructured.py": (64, [8, 2, 1], [2048, 16384, 65536], 524288, 400),
                "evo_quant.py": (128, [16, 4, 1], [2048, 16384, 131072], 524288, 150)}
    seen = set()
    for script in ("table_depth", "table_sparsity", "table_quant"):
        for command in planned(SCRIPTS / f"{script}.sh", tmp_path):
            if command[0] in searches:
                args = estimate.PARSERS[command[0]](command[1:])
                if args.generations == 0:                        # a baseline: the search's start
                    continue
                assert searches[command[0]] == (args.offspring, args.survivors_per_selection, args.tokens_per_selection,
                                                args.calibration_tokens, args.generations)
                seen.add(command[0])
            elif command[:2] in (["-m", "database.sparsegpt"], ["-m", "database.gptq"]):
                args = estimate.PARSERS[command[1]](command[2:])
                assert (args.calibration_tokens, args.rel_damp, args.block_size) == (8388608, 0.01, 128)
                if command[1] == "database.gptq":
                    assert (args.bitwidth_options, args.calibration_bitwidth) == ([2, 3, 4, 5, 6], 3)
                    assert (args.group_size, args.perchannel, args.sym) == (128, True, False)
                else:
                    assert (args.num_levels, args.weights_diff) == (8, 1_000_000)
    assert seen == set(searches)


def test_a_finished_part_is_not_planned_again_unless_its_flags_change(tmp_path):
    script, runs = SCRIPTS / "nonmonotonicity.sh", tmp_path / "out" / "model"
    commands = planned(script, tmp_path, SMALL="1")
    first = next(command for command in commands if "nonmonotonicity.py" in command[0])
    runs.mkdir(parents=True, exist_ok=True)
    (runs / "nonmonotonicity.done").write_text(" ".join(first) + "\n")
    assert planned(script, tmp_path, SMALL="1") == [command for command in commands if command != first]
    assert first not in planned(script, tmp_path, SMALL="1", DATA="c4")
    assert len(planned(script, tmp_path, SMALL="1", DATA="c4")) == len(commands)


# ---- the small programs ----------------------------------------------------------------------------------------------


def test_pairs_are_sets_of_which_the_larger_loses_less():
    divergences = {(0,): 1.0, (1,): 0.5, (2,): 0.1, (0, 1): 0.7, (0, 2): 1.2, (1, 2): 0.45, (0, 1, 2): 0.6}
    assert nonmonotonicity.better_with_more(divergences) == [
        (0.5, (0, 2), (0, 1, 2)), (0.7, (0,), (0, 1)), (0.6 / 0.7, (0, 1), (0, 1, 2)), (0.9, (1,), (1, 2))]
    assert nonmonotonicity.count_sets(32, 3) == 32 + 496 + 4960


TEXT = ["--calibration_data", "stdlib", "--calibration_sequence_length", "32", "--calibration_tokens", "256"]


def test_brute_force_ranks_every_winner_of_a_search(checkpoint, tmp_path):
    model = ["--model_name_or_path", str(checkpoint), *TEXT, "--sparsity", "0.34"]
    evo_drop.main([*model, "--drop_entire_block", "--drop_two_consecutive", "--no_eval", "--offspring", "2",
                   "--survivors_per_selection", "1", "--tokens_per_selection", "256", "--initially_generated", "1",
                   "--initial_tokens", "256", "--generations", "3", "--output_dir", str(tmp_path / "run")])
    result = convergence.main([*model, "--brute_force_tokens", "256", "--search", str(tmp_path / "run"), "--output",
                               str(tmp_path / "convergence.json")])
    assert result["candidates"] == 3 and len(result["ranks"]) == 4   # the start, and three generations
    assert result["ranks"][-1] == 1                              # two offspring and the parent are all there are
    summary = json.loads((tmp_path / "run" / "summary.json").read_text())
    assert result["optimum"] == summary["dropped"]
    assert result["KL"][-1] == pytest.approx(summary["fitness"], rel=1e-4)
    assert sum(map(all, read_drop_config(tmp_path / "convergence-optimum.txt"))) == 2
    with pytest.raises(SystemExit, match="--brute_force_tokens 512: from 2 to the 256 --calibration_tokens are needed"):
        convergence.main([*model, "--brute_force_tokens", "512", "--search", str(tmp_path / "run"), "--output",
                          str(tmp_path / "convergence.json")])
    assert convergence.first_reached([5, 5, 2, 2, 1]) == [(0, 5), (2, 2), (4, 1)]


def test_blocks_that_others_read_from_are_not_dropped_one_by_one(tmp_path):
    """What later ones would read is left of whatever was measured before."""
    model = ["--model_name_or_path", save_family("gemma4_text", tmp_path / "model"), *TEXT]
    with pytest.raises(SystemExit, match="error: .*read"):
        nonmonotonicity.main([*model, "--most", "2", "--save_dir", str(tmp_path / "out")])
    blocks = load_config(model[1]).num_hidden_layers
    (tmp_path / "run").mkdir()
    halves = " ".join(["attn+mlp"] * 2 + ["none"] * (blocks - 2))
    log = json.dumps({"generation": 0, "dropped": halves}) + "\n"
    (tmp_path / "run" / "log.jsonl").write_text(log)
    (tmp_path / "run" / "checkpoint.json").write_text(seal({
        "log_bytes": len(log), "log_sha256": hashlib.sha256(log.encode()).hexdigest()}))
    with pytest.raises(SystemExit, match="error: .*read"):
        convergence.main([*model, "--sparsity", str(2 / blocks), "--brute_force_tokens", "64", "--search",
                          str(tmp_path / "run"), "--output", str(tmp_path / "convergence.json")])


def test_small_task_is_one_the_harness_reads(tmp_path):
    small_task.main(tmp_path)
    [task] = TaskManager(include_path=str(tmp_path), include_defaults=False).load(["next_line"])["tasks"].values()
    documents = list(task.validation_docs())
    assert len(documents) == small_task.QUESTIONS
    held_out = set(stdlib_texts("test"))
    for document in documents[:8]:
        following = document["context"] + document["choices"][document["answer"]]
        lines = [line for text in held_out for line in text.splitlines() if line.strip()]
        assert following in "\n".join(lines)
        assert len(set(document["choices"])) == 4


def test_fixed_mutations_switch_exactly_so_often():
    units = tuple(evo_drop.Unit(kind, ((block, half),), 1, True) for half, kind in enumerate(("attn", "mlp"))
                  for block in range(32))
    space, rng = evo_drop.Space(units, {"attn": 8, "mlp": 8}), random.Random(0)
    parent = evo_drop.random_candidate(space, rng)

    def distances(**fixed) -> list[int]:
        children = [evo_drop.mutate(space, [parent], 3, rng, **fixed) for _ in range(200)]
        return [sum(a != b for a, b in zip(parent, child)) // 2 for child in children]

    assert set(distances(fixed_mutations=1)) == {1}
    assert max(distances(fixed_mutations=7)) == 7 and sum(distances(fixed_mutations=7)) > 2 * sum(distances())


def test_scaling_is_measured_of_every_program_that_processes_share(monkeypatch):
    monkeypatch.setattr("sys.argv", ["scaling.py"])
    commands = scaling.commands(scaling.parse_arguments(), Path("one"), Path("out"))
    assert list(commands) == ["database.sparsegpt", "database.gptq", "evo_drop", "evo_unstructured", "evo_quant"]
    for name, command in commands.items():
        program, arguments = (command[1], command[2:]) if command[0] == "-m" else (command[0], command[1:])
        args = estimate.PARSERS[program](list(map(str, arguments)))
        if name.startswith("evo"):
            check_search_flags(args)
        assert str(args.save_dir if name.startswith("database") else args.output_dir) == f"out/{name}"
    assert args.quant_weights_path == "one/database.gptq"
