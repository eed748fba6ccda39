"""Databases built through the command line: exact, resumable after any kill, and never read when damaged."""
import argparse
import heapq
import inspect
import json
import multiprocessing
import os
import random
import shutil
import signal
import sys
import textwrap
import time
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from safetensors import safe_open
from torch import nn
from transformers import AutoModelForCausalLM, Gemma3Config

import families
import plain_solvers
from database import build, gptq, sparsegpt, store
from database.store import Database, LevelCache, config_sha256, read_manifest, write_manifest
from utils.data import calibration_documents
from utils.decoder import Decoder
from utils.model import load_tokenizer

MODULES = {"sparsegpt": sparsegpt, "gptq": gptq}
FLAGS = {"sparsegpt": ["--sparsity", "0.5", "--num_levels", "2", "--propagate", "compressed"],
         "gptq": ["--bitwidth_options", "2", "3", "4", "--calibration_bitwidth", "2", "--group_size", "20",
                  "--perchannel"]}


@pytest.fixture(scope="module")
def model(tmp_path_factory, tokenizer):
    """Folder of a Llama of three blocks, with k and v a quarter of the size of q, in half precision, and some text."""
    folder = families.save_llama(tmp_path_factory.mktemp("model"), tokenizer, num_hidden_layers=3,
                                 num_key_value_heads=1)
    half = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float16)
    half.save_pretrained(folder)
    with open(f"{folder}/text.jsonl", "w") as file:
        file.writelines(json.dumps({"text": inspect.getsource(module)}) + "\n"
                        for module in (argparse, heapq, json, random, shutil, textwrap))
    return folder


@pytest.fixture(scope="module", params=["sparsegpt", "gptq"])
def built(request, model, tmp_path_factory):
    """A finished database's folder; tests copy it before they touch it."""
    folder = tmp_path_factory.mktemp("built") / request.param
    run(request.param, model, folder)
    return folder


def run(method, model, folder, *flags):
    parser = MODULES[method].make_parser()
    MODULES[method].main(parser.parse_args([
        "--model_name_or_path", str(model), "--calibration_data", f"{model}/text.jsonl", "--calibration_tokens", "2048",
        "--save_dir", str(folder), "--device", "cpu", *FLAGS[method], *flags]))


def contents(folder):
    return {file.name: file.read_bytes() for file in Path(folder).iterdir()}


def copy(built, tmp_path):
    return Path(shutil.copytree(built, tmp_path / built.name))


# ---- what is in it ---------------------------------------------------------------------------------------------------


def test_every_level_has_exactly_the_promised_weights_or_bits(built, model):
    database = Database.open(built)
    layers = {name: module for name, module in AutoModelForCausalLM.from_pretrained(model).named_modules()
              if isinstance(module, nn.Linear) and "layers" in name}
    assert database.layers == list(layers)
    for name, layer in layers.items():
        size = layer.weight.numel()
        assert database.shape(name) == layer.weight.shape
        with safe_open(built / f"{name}.safetensors", "pt") as file:
            tensors = {key: file.get_tensor(key) for key in file.keys()}        # noqa: SIM118 (no dictionary)
        stored = {level: sum(t.nbytes for key, t in tensors.items() if key.startswith(f"{level}."))
                  for level in database.levels(name)}
        assert sum(stored.values()) == sum(t.nbytes for t in tensors.values())
        for level in database.levels(name):
            if database.method == "sparsegpt":
                step = database.manifest["flags"]["weights_diff"]
                kept = size - round(0.5 * size) - level * step
                mask = tensors[f"{level}.mask"]
                counted = sum(int(mask.bitwise_right_shift(bit).bitwise_and(1).sum()) for bit in range(8))
                assert database.kept(name, level) == counted == len(tensors[f"{level}.values"]) == kept
                assert int(database.weight(name, level).count_nonzero()) == kept
                assert 8 * stored[level] <= 1.02 * (size + 16 * kept)
            else:
                groups = layer.out_features * -(-layer.in_features // 20)
                assert database.bits(name, level) == size * level
                assert database.bits(name, level, overhead=True) == size * level + 24 * groups
                assert 8 * stored[level] - database.bits(name, level, overhead=True) in range(3 * 8)
                codes, scales, zeros = database.codes(name, level)
                assert codes.max() < 2**level
                assert scales.shape == zeros.shape == (layer.out_features, groups // layer.out_features)
                column = torch.arange(layer.in_features) // 20
                weight = (codes.float() - zeros[:, column]) * scales[:, column].float()
                assert torch.equal(database.weight(name, level), weight)
                assert len(set(codes[0].tolist())) <= 2**level
    if database.method == "sparsegpt":      # levels as far as 0..1 allows; k and v reach both ends exactly
        assert database.levels("model.layers.0.self_attn.q_proj") == [-2, -1, 0, 1, 2]
        levels = database.levels("model.layers.0.self_attn.k_proj")
        size = layers["model.layers.0.self_attn.k_proj"].weight.numel()
        assert [database.kept("model.layers.0.self_attn.k_proj", level) for level in levels] == [size, size // 2, 0]


def test_errors_fall_as_levels_keep_more(built):
    database = Database.open(built)
    for name in database.layers:
        errors = [database.error(name, level) for level in database.levels(name)]
        assert errors == sorted(errors, reverse=database.method == "gptq")
        assert 0 <= min(errors) and max(errors) <= 1 + 1e-6


def test_nothing_pruned_is_the_model_itself(built, model):
    database = Database.open(built)
    if database.method == "sparsegpt":
        layers = dict(AutoModelForCausalLM.from_pretrained(model, dtype=torch.float16).named_modules())
        name = "model.layers.2.self_attn.v_proj"
        assert torch.equal(database.weight(name, -1), layers[name].weight)
        assert not database.weight(name, 1).any()


@pytest.mark.parametrize("method, flags, level", [
    ("sparsegpt", ["--propagate", "dense"], None), ("sparsegpt", ["--propagate", "compressed"], 0),
    ("gptq", ["--calibration_bitwidth", "2"], 2), ("gptq", ["--calibration_bitwidth", "4"], 4)])
@torch.no_grad()
def test_the_next_block_sees_the_weights_of_the_level_that_feeds_forward(model, tmp_path, method, flags, level):
    run(method, model, tmp_path / "db", *flags)
    database = Database.open(tmp_path / "db")
    whole = AutoModelForCausalLM.from_pretrained(model, dtype=torch.float32)
    layers = dict(whole.named_modules())
    if level is not None:
        for name in database.layers[:7]:
            layers[name].weight.copy_(database.weight(name, level))
    documents = calibration_documents(f"{model}/text.jsonl", load_tokenizer(model), 2048, 256)
    inputs = []
    name = "model.layers.1.mlp.down_proj"
    layers[name].register_forward_pre_hook(lambda module, args: inputs.append(args[0][0]))
    for document in documents:
        whole(input_ids=document[None], use_cache=False)
    x, weight = torch.cat(inputs), layers[name].weight
    assert len(x) == 2048
    for stored in database.levels(name):
        error = plain_solvers.relative_error(weight, database.weight(name, stored), x.T @ x)
        assert database.error(name, stored) == pytest.approx(error, rel=1e-3, abs=1e-9)


def test_layers_that_a_regular_expression_leaves_out(model, tmp_path):
    run("sparsegpt", model, tmp_path / "db", "--prunable_modules", r".*layers\.[02].*((q|up)_proj)$")
    assert Database.open(tmp_path / "db").layers == [f"model.layers.{i}.{layer}" for i in (0, 2)
                                                     for layer in ("self_attn.q_proj", "mlp.up_proj")]


def test_level_cache_gives_the_same_weights_within_its_budget(built):
    database = Database.open(built)
    sizes = {(name, level): sum(t.nbytes for t in database.packed(name, level).values())
             for name in database.layers for level in database.levels(name)}
    for budget in (0, max(sizes.values()) * 3, 10**9):
        cache = LevelCache(database, "cpu", torch.float32, budget)
        keys = random.Random(0).choices(list(sizes), k=200)
        for name, level in keys:
            parameter = nn.Parameter(torch.full(database.shape(name), torch.nan), requires_grad=False)
            cache.copy_(parameter, name, level)
            assert torch.equal(parameter.data, database.weight(name, level).float())
            assert cache.bytes == sum(sizes[key] for key in cache._levels) <= budget
        if budget > max(sizes.values()):
            assert list(cache._levels)[-1] == keys[-1]
    assert len(cache._levels) == len(set(keys))


def test_level_cache_drops_what_was_used_longest_ago(built):
    database = Database.open(built)
    name = "model.layers.0.mlp.up_proj"
    first, second, third = database.levels(name)[:3]
    parameter = nn.Parameter(torch.empty(database.shape(name)), requires_grad=False)
    cache = LevelCache(database, "cpu", torch.float32, 10**9)
    for level in (first, second, first):
        cache.copy_(parameter, name, level)
    # one byte short of holding all three
    cache.max_bytes = cache.bytes + sum(tensor.nbytes for tensor in database.packed(name, third).values()) - 1
    cache.copy_(parameter, name, third)
    assert list(cache._levels) == [(name, first), (name, third)]


# ---- building it -----------------------------------------------------------------------------------------------------


def test_finished_build_says_so_and_changes_nothing(built, model, tmp_path, capsys, monkeypatch):
    folder = copy(built, tmp_path)
    before = contents(folder)
    monkeypatch.setattr(build, "decoder_of", lambda *args: pytest.fail("loaded the model"))
    run(built.name, model, folder)
    assert "finished" in capsys.readouterr().out and contents(folder) == before


def test_what_another_process_built_between_start_and_lock_is_not_written_over(built, model, tmp_path, monkeypatch):
    folder, before = tmp_path / "db", contents(built)
    documents_of = build.documents_of

    def meanwhile(*args):
        shutil.copytree(built, folder)
        return documents_of(*args)

    monkeypatch.setattr(build, "documents_of", meanwhile)
    with pytest.raises(ValueError, match="another process has just written there; run the same command again"):
        run(built.name, model, folder, "--calibration_tokens", "64")
    assert contents(folder) == before


def test_a_model_larger_than_the_device_is_probed_and_built_block_by_block(built, model, tmp_path, monkeypatch):
    run_block, seen = Decoder.run_block, []

    def watching(self, index, *arguments):
        output = run_block(self, index, *arguments)
        seen.append((self.offloaded.bytes_on_device, sum(buffer.nbytes for buffer in self.offloaded._host)))
        return output

    monkeypatch.setattr(Decoder, "run_block", watching)
    run(built.name, model, tmp_path / "offloaded", "--cpu_offload_modules")
    assert all(0 < present < everything for present, everything in seen)
    assert contents(tmp_path / "offloaded") == contents(built)


def test_several_writers_write_the_same_and_no_more_layers_wait_than_there_are(built, model, tmp_path, monkeypatch):
    write_layer, started, waiting = store.write_layer, [], []

    def slow(*args):
        time.sleep(0.05)
        written = write_layer(*args)
        waiting.append(len(started) - len(waiting))
        return written

    solve = build.solve
    monkeypatch.setattr(build, "WRITERS", {"cpu": 3})
    monkeypatch.setattr(build, "solve", lambda *args: (solve(*args), started.append(args[0]))[0])
    monkeypatch.setattr(store, "write_layer", slow)
    run(built.name, model, tmp_path / "again")
    assert contents(tmp_path / "again") == contents(built)
    assert 3 <= max(waiting) <= 4                        # written, and the one that has been solved meanwhile


@pytest.mark.parametrize("flags, named", [
    (["--rel_damp", "0.02"], r"--rel_damp 0\.02 \(it was 0\.01\)"), (["--seed", "1"], "--seed 1"),
    (["--calibration_tokens", "4096"], "--calibration_tokens 4096"), (["--block_size", "64"], "--block_size 64")])
def test_other_flags_are_refused_by_name(built, model, tmp_path, flags, named):
    folder = copy(built, tmp_path)
    before = contents(folder)
    with pytest.raises(ValueError, match=f"--save_dir .*{named}"):
        run(built.name, model, folder, *flags)
    assert contents(folder) == before


def test_other_method_model_weights_and_text_are_refused(built, model, tmp_path, tokenizer, monkeypatch):
    folder = copy(built, tmp_path)
    other = {"gptq": "sparsegpt", "sparsegpt": "gptq"}[built.name]
    with pytest.raises(ValueError, match=f"method {other}"):
        run(other, model, folder)
    with pytest.raises(ValueError, match="the model's configuration"):
        run(built.name, families.save_llama(tmp_path / "wider", tokenizer, intermediate_size=64), folder,
            "--calibration_data", f"{model}/text.jsonl")
    (folder / "model.layers.0.mlp.up_proj.safetensors").unlink()         # else it is finished before weights are seen
    retrained = AutoModelForCausalLM.from_pretrained(model)
    families.scale_weights(retrained, seed=5)
    shutil.copytree(model, tmp_path / "retrained")
    retrained.save_pretrained(tmp_path / "retrained")
    with pytest.raises(ValueError, match="the model's weights"):
        run(built.name, tmp_path / "retrained", folder, "--calibration_data", f"{model}/text.jsonl")
    monkeypatch.setattr(build, "documents_of", lambda *args: [torch.arange(2048)])
    with pytest.raises(ValueError, match="the calibration tokens"):
        run(built.name, model, folder)


@pytest.mark.parametrize("damage", ["truncated", "altered", "swapped", "missing", "of another database"])
def test_damaged_files_are_named_and_rebuilt_or_refused(built, model, tmp_path, capsys, damage):
    folder = copy(built, tmp_path)
    before = contents(folder)
    name = "model.layers.1.self_attn.q_proj"
    file, twin = folder / f"{name}.safetensors", folder / "model.layers.1.self_attn.o_proj.safetensors"
    content = bytearray(file.read_bytes())
    if damage == "truncated":
        file.write_bytes(content[:-1])
    elif damage == "altered":
        content[-5] ^= 1
        file.write_bytes(content)
    elif damage == "swapped":
        file.write_bytes(twin.read_bytes())
    elif damage == "missing":
        file.unlink()
    else:
        run(built.name, model, tmp_path / "other", "--seed", "1")
        shutil.copy(tmp_path / "other" / file.name, file)
    with pytest.raises(ValueError, match=f"{name}.safetensors.*build"):
        Database.open(folder).weight(name, Database.open(folder).levels(name)[0])
    run(built.name, model, folder)
    output = capsys.readouterr().out
    assert f"{file}: " in output and "building it again" in output
    assert contents(folder) == before


def test_files_that_belong_to_no_layer_are_refused(built, model, tmp_path):
    folder = copy(built, tmp_path)
    shutil.copy(folder / "model.layers.0.mlp.up_proj.safetensors", folder / "model.layers.7.mlp.up_proj.safetensors")
    with pytest.raises(ValueError, match="model.layers.7.mlp.up_proj.safetensors: does not belong"):
        Database.open(folder)
    (tmp_path / "checkpoint").mkdir()
    shutil.copy(Path(model) / "model.safetensors", tmp_path / "checkpoint")
    with pytest.raises(ValueError, match="model.safetensors: does not belong"):
        run(built.name, model, tmp_path / "checkpoint")


@pytest.mark.parametrize("change, named", [
    (lambda m: m["layers"].update({"../../outside": m["layers"]["model.layers.0.mlp.up_proj"]}), "outside"),
    (lambda m: m["layers"].update({"model.layers.0.mlp.up_proj": None}), "not finished.*model.layers.0.mlp.up_proj"),
    (lambda m: m.update(format=99), "format 1"), (lambda m: m.pop("flags"), "manifest"),
    (lambda m: m.update(layers=[]), "manifest")])
def test_manifests_that_cannot_be_used_are_refused(built, tmp_path, change, named):
    folder = copy(built, tmp_path)
    manifest = read_manifest(folder)
    change(manifest)
    write_manifest(folder, manifest)
    with pytest.raises(ValueError, match=named):
        Database.open(folder)


def test_an_edited_manifest_is_refused(built, tmp_path):
    folder = copy(built, tmp_path)
    text = (folder / "manifest.json").read_text()
    (folder / "manifest.json").write_text(text.replace('"bytes": ', '"bytes": 1', 1))
    with pytest.raises(ValueError,
                       match=r"manifest.json: damaged or edited \(wrong checksum\).*; rebuild the database"):
        Database.open(folder)


def test_folders_without_a_readable_manifest_are_refused(tmp_path):
    with pytest.raises(ValueError, match="not a database"):
        Database.open(tmp_path)
    (tmp_path / "manifest.json").write_text('{"format": 1, "layers"')
    with pytest.raises(ValueError, match="manifest.json: cannot be read as JSON .*, so not a database's manifest"):
        Database.open(tmp_path)


def test_unknown_levels_are_named(built):
    database = Database.open(built)
    with pytest.raises(ValueError, match="no level 9 of model.layers.0.mlp.up_proj; it has"):
        database.weight("model.layers.0.mlp.up_proj", 9)
    with pytest.raises(ValueError, match="no level 2 of lm_head"):
        database.weight("lm_head", 2)


# ---- killed ----------------------------------------------------------------------------------------------------------


def run_quietly(method, model, folder, dies_at_write=None, begun=None):
    """A build in a process of its own, which may kill itself at its n-th rename: before it (even) or after (odd)."""
    torch.set_num_threads(1)
    if begun is not None:
        begun.set()
    for stream in (1, 2):
        os.dup2(os.open(os.devnull, os.O_WRONLY), stream)
    if dies_at_write is not None:
        replace, seen = os.replace, []

        def dying(*paths):
            if 2 * len(seen) == dies_at_write:
                os.kill(os.getpid(), signal.SIGKILL)
            replace(*paths)
            if 2 * len(seen) + 1 == dies_at_write:
                os.kill(os.getpid(), signal.SIGKILL)
            seen.append(paths)
        os.replace = dying
    run(method, model, folder)


@pytest.fixture(scope="module")
def processes():
    """Processes forked from one that has imported everything: starting one costs nothing."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["database.sparsegpt", "database.gptq", "transformers.models.llama.modeling_llama"])
    return context


def test_killed_at_five_random_moments_and_resumed_it_is_the_same_database(built, model, tmp_path, processes):
    def start(folder):
        begun = processes.Event()
        process = processes.Process(target=run_quietly, args=(built.name, model, folder, None, begun))
        process.start()
        begun.wait()
        return process, time.time()

    for _ in range(2):                               # the first process also waits for the imports of all
        process, began = start(tmp_path / "whole")
        process.join()
        seconds = time.time() - began
        assert contents(tmp_path / "whole") == contents(built)
        shutil.rmtree(tmp_path / "whole")
    folder, generator, kills = tmp_path / "killed", random.Random(0), 0
    while kills < 5:
        process, _ = start(folder)
        process.join(generator.uniform(0.1, 1.0) * seconds)
        kills += process.is_alive()
        process.kill()
        process.join()
        manifest = folder / "manifest.json"
        if manifest.exists() and all(json.loads(manifest.read_text())["layers"].values()):
            assert contents(folder) == contents(built)
            shutil.rmtree(folder)                    # once more from the start
    process, _ = start(folder)
    process.join()
    assert process.exitcode == 0 and contents(folder) == contents(built)


def test_killed_around_any_write_and_resumed_it_is_the_same_database(built, model, tmp_path, processes):
    # renames: a manifest, then seven layers and a manifest a block
    for first, second in ((2, 9), (19, 6)):
        folder = tmp_path / f"killed-{first}"
        for dies_at_write, code in ((first, -signal.SIGKILL), (second, -signal.SIGKILL), (None, 0)):
            process = processes.Process(target=run_quietly, args=(built.name, model, folder, dies_at_write))
            process.start()
            process.join()
            assert process.exitcode == code
        assert contents(folder) == contents(built)


# ---- mistakes --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("method, flags, named", [
    ("sparsegpt", ["--sparsity", "1.2"], "--sparsity 1.2: must be from 0 to 1"),
    ("sparsegpt", ["--num_levels", "-1"], "--num_levels -1"),
    ("sparsegpt", ["--weights_diff", "0"], "--weights_diff 0: must be at least 1"),
    ("sparsegpt", ["--sparsity", "0"], "--weights_diff: the default at --sparsity 0 .* is no weight at all; give it"),
    ("sparsegpt", ["--prunable_modules", "("], "--prunable_modules .*not a regular expression"),
    ("gptq", ["--bitwidth_options", "3", "9"], "--bitwidth_options 3 9: must be from 1 to 8"),
    ("gptq", ["--calibration_bitwidth", "5"], "--calibration_bitwidth 5: must be one of --bitwidth_options 2 3 4"),
    ("gptq", ["--group_size", "0"], "--group_size 0"), ("gptq", ["--rel_damp", "-1"], "--rel_damp -1"),
    ("gptq", ["--block_size", "0"], "--block_size 0"),
    ("gptq", ["--calibration_tokens", "1"], "--calibration_tokens 1"),
    ("gptq", ["--calibration_data", "nowhere.txt"], "--calibration_data nowhere.txt: no such dataset"),
    ("gptq", ["--device", "cuda:99"], "--device cuda:99: not available"),
    ("gptq", ["--model_name_or_path", "/nowhere/at/all"], "--model_name_or_path /nowhere/at/all"),
    ("gptq", ["--calibration_tokens", "999999999"], "--calibration_tokens 999999999: .* holds only")])
def test_mistakes_are_told_before_the_model_is_loaded(model, tmp_path, monkeypatch, method, flags, named):
    monkeypatch.setattr(build, "decoder_of", lambda *args: pytest.fail("loaded the model"))
    with pytest.raises(ValueError, match=named):
        run(method, model, tmp_path / "db", *flags)
    assert not (tmp_path / "db").exists()


def test_errors_of_every_block_go_to_wandb_and_the_database_stays_the_same(built, model, tmp_path, monkeypatch):
    logged = []
    monkeypatch.setitem(sys.modules, "wandb", SimpleNamespace(init=lambda config: SimpleNamespace(log=logged.append)))
    run(built.name, model, tmp_path / "db", "--log_wandb")
    assert contents(tmp_path / "db") == contents(built)
    database = Database.open(built)
    assert [record["block"] for record in logged] == [0, 1, 2]
    for index, record in enumerate(logged):
        errors = {f"error of {name} at {level}": database.error(name, level) for name in database.layers
                  if name.startswith(f"model.layers.{index}.") for level in database.levels(name)}
        assert errors and errors == {key: value for key, value in record.items() if key.startswith("error of")}


def test_a_mistake_ends_the_command_with_one_sentence(monkeypatch, capsys, tmp_path):
    monkeypatch.setattr("sys.argv", ["gptq.py", "--model_name_or_path", "m", "--save_dir", str(tmp_path),
                                     "--group_size", "0"])
    with pytest.raises(SystemExit) as exit:
        build.run(gptq.make_parser(), gptq.main)
    assert exit.value.code == 2
    assert capsys.readouterr().err == ("python -m database.gptq: error: --group_size 0: must be at least 1 column, "
                                       "e.g. 128; leave it out for one grid a row\n")


def test_a_model_without_linear_layers_is_named():
    with pytest.raises(ValueError, match="GPT2LMHeadModel: its blocks have no nn.Linear"):
        build.choose_layers(Decoder(families.build("gpt2")), None, "--quantizable_modules")


def test_a_regular_expression_without_a_match_names_a_layer(model, tmp_path):
    with pytest.raises(ValueError, match=r"matches none of the 21 linear layers.*model\.layers\.0\.self_attn\.q_proj"):
        run("gptq", model, tmp_path / "db", "--quantizable_modules", "query")


def test_a_save_dir_that_cannot_be_written_is_named_before_the_model_is_loaded(model, tmp_path, monkeypatch):
    monkeypatch.setattr(build, "decoder_of", lambda *args: pytest.fail("loaded the model"))
    (tmp_path / "file").write_text("in the way")
    with pytest.raises(ValueError, match="--save_dir .*file/db: cannot be written"):
        run("gptq", model, tmp_path / "file" / "db")


def test_reference_command_lines_run_and_ignored_flags_are_told(model, tmp_path, capsys):
    run("gptq", model, tmp_path / "db", "--quantizable_modules", r".*layers.*((q|k|v|o|gate|up|down)_proj)$",
        "--pre_block_modules", "model.embed_tokens", "--block_modules", "model.layers", "--post_block_modules",
        "model.norm", "lm_head", "--low_cpu_mem_usage", "--cpu_offload_modules", "--cpu_offload_activations",
        "--verbose", "--attn_implementation", "sdpa", "--dtype", "float32", "--act_order", "--sym")
    output = capsys.readouterr().out
    for flag in ("--pre_block_modules", "--block_modules", "--post_block_modules", "--low_cpu_mem_usage"):
        assert f"{flag} is ignored" in output
    assert "left 0:00:00" in output and "model.layers.2.mlp.down_proj: error 2: " in output


def test_one_grid_for_all_rows_is_told(model, tmp_path, capsys):
    run("gptq", model, tmp_path / "rows")
    assert "without --perchannel" not in capsys.readouterr().out
    gptq.main(gptq.make_parser().parse_args([
        "--model_name_or_path", str(model), "--calibration_data", f"{model}/text.jsonl", "--calibration_tokens", "512",
        "--calibration_sequence_length", "32", "--save_dir", str(tmp_path / "one")]))
    assert "without --perchannel all rows of a layer share their grid" in capsys.readouterr().out


def test_a_composite_models_configuration_counts_by_its_decoder():
    sizes = {"hidden_size": 32, "num_hidden_layers": 2}
    whole, loaded = (Gemma3Config(text_config=sizes) for _ in range(2))
    loaded.text_config.dtype = torch.bfloat16                          # as from_pretrained writes it
    assert config_sha256(whole) == config_sha256(loaded) == config_sha256(whole.text_config)
    assert config_sha256(whole) != config_sha256(Gemma3Config(text_config=sizes | {"hidden_size": 64}))


def test_a_layer_without_calibration_tokens_is_rounded_to_nearest(capsys):
    weight = torch.randn(8, 12)
    args = gptq.make_parser().parse_args(["--model_name_or_path", "m", "--save_dir", "d", "--perchannel"])
    levels = build.solve("model.layers.0.experts.1.w1", weight, None, args, gptq.solve_layer)
    assert capsys.readouterr().out.startswith("model.layers.0.experts.1.w1: saw no calibration token")
    packed, entry = levels[4]
    codes, scales, zeros = store.packing.unpack_codes(packed, weight.shape, 4)
    nearest = (weight / scales.float()).round().add(zeros).clamp(0, 15)
    assert torch.equal(codes, nearest.byte()) and entry["bits"] == 4 * 96


def test_weights_that_are_not_finite_are_named():
    weight = torch.full((4, 4), torch.inf)
    with pytest.raises(ValueError, match="^a.b: NaN or infinite weights"):
        build.solve("a.b", weight, torch.eye(4), None, gptq.solve_layer)


def test_values_that_overflow_float16_are_kept_in_bfloat16():
    assert sparsegpt.values_dtype(torch.float32, torch.tensor([1e5])) == torch.bfloat16
    assert sparsegpt.values_dtype(torch.float32, torch.tensor([6e4])) == torch.float16
    assert sparsegpt.values_dtype(torch.bfloat16, torch.tensor([1.0])) == torch.bfloat16
