"""Depth and sparsity exports: reloaded in a fresh process by plain transformers, they are the searched model."""
import errno
import fcntl
import json
import multiprocessing
import os
import shutil
import time
from contextlib import contextmanager
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from safetensors.torch import load_file

import export
import families
from database.store import Database
from exports import MIXED_TYPES, greedy, reload, save_model, six_blocks, write_database, write_levels
from utils.configs import write_drop_config

FAMILIES = ["llama", "qwen2", "qwen3", "gemma2", "phi3", "gpt_neox"]
DROPPED = [(False, True), (True, False), (False, True), (True, False), (True, True), (False, False)]


def export_dropped(tmp_path, model_folder: str, dropped, *flags: str) -> Path:
    write_drop_config(tmp_path / "drop.txt", dropped)
    out = tmp_path / f"out-{Path(model_folder).name}"
    export.main(["--model_name_or_path", model_folder, "--drop_config", str(tmp_path / "drop.txt"), "--save_dir",
                 str(out), *flags])
    return out


# ---- depth -----------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def depth_exports(tmp_path_factory, tokenizer):
    """{family: (searched model, the export's folder, what a fresh process gets from it)}, and the tokens."""
    tmp_path = tmp_path_factory.mktemp("depth")
    tokens = torch.randint(3, families.VOCABULARY, (2, 24), generator=torch.Generator().manual_seed(3))
    models = {}
    for name in FAMILIES:
        model = six_blocks(name)
        folder = save_model(tmp_path / name, model, tokenizer)
        out = export_dropped(tmp_path, folder, DROPPED)
        models[name] = families.dropped_copy(model, DROPPED), out, reload(out, tokens)
    return models, tokens


@pytest.mark.parametrize("family", FAMILIES)
def test_depth_export_is_the_searched_model_to_the_bit(depth_exports, family):
    searched, _, loaded = depth_exports[0][family]
    with torch.no_grad():
        expected = searched(input_ids=depth_exports[1]).logits
    assert torch.equal(loaded["logits"], expected)


@pytest.mark.parametrize("family", FAMILIES)
def test_depth_export_generates_alike_with_and_without_cache(depth_exports, family):
    searched, _, loaded = depth_exports[0][family]
    expected = greedy(searched, depth_exports[1][:1, :8])
    assert expected.shape == (1, 40)
    assert torch.equal(loaded["cached"], expected) and torch.equal(loaded["uncached"], expected)


@pytest.mark.parametrize("family", FAMILIES)
def test_depth_export_has_the_fewest_blocks(depth_exports, family):
    config = json.loads((depth_exports[0][family][1] / "config.json").read_text())
    assert config["num_hidden_layers"] == (5 if family == "gpt_neox" else 3)   # a parallel residual pairs nothing


@pytest.mark.parametrize("family", ["qwen2", "gemma2"])
def test_layer_types_follow_the_attention(depth_exports, family):
    config = json.loads((depth_exports[0][family][1] / "config.json").read_text())
    assert config["layer_types"] == [MIXED_TYPES[index] for index in (0, 2, 5)]


def test_everything_dropped_still_loads(tmp_path, tokenizer):
    model = six_blocks("llama")
    out = export_dropped(tmp_path, save_model(tmp_path / "m", model, tokenizer), [(True, True)] * 6)
    tokens = torch.randint(families.VOCABULARY, (1, 9))
    loaded = reload(out, tokens)
    with torch.no_grad():
        assert torch.equal(loaded["logits"], families.dropped_copy(model, [(True, True)] * 6)(tokens).logits)


def test_generation_config_is_kept_even_where_transformers_refuses_to_save_it(tmp_path, checkpoint):
    folder = shutil.copytree(checkpoint, tmp_path / "m")
    (folder / "generation_config.json").write_text('{"temperature": 0.6, "max_length": 99, "do_sample": false}')
    out = export_dropped(tmp_path, str(folder), DROPPED)
    saved = json.loads((out / "generation_config.json").read_text())
    assert saved["temperature"] == 0.6 and saved["max_length"] == 99


# ---- sparsity --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("drop", [False, True])
def test_sparse_export_has_the_databases_weights_tied_and_sharded(tmp_path, tokenizer, drop):
    model = families.build("qwen2", dtype=torch.bfloat16, tie_word_embeddings=True)
    folder = save_model(tmp_path / "m", model, tokenizer)
    database = write_database(tmp_path / "db", folder, "sparsegpt", [-1, 0, 1])
    config = write_levels(tmp_path / "levels.txt", database, lambda number, name: number % 3 - 1)
    dropped = [(False, True), (True, False), (False, False), (False, False)] if drop else [(False, False)] * 4
    write_drop_config(tmp_path / "drop.txt", dropped)
    out = tmp_path / "out"
    report = export.main(["--model_name_or_path", folder, "--sparse_weights_path", database, "--sparse_config_path",
                          config, "--save_dir", str(out), "--max_shard_size", "20KB",
                          *(["--drop_config", str(tmp_path / "drop.txt")] if drop else [])])
    database = Database.open(database)
    for number, name in enumerate(database.layers):
        model.get_submodule(name).weight.data.copy_(database.weight(name, number % 3 - 1))
    searched = families.dropped_copy(model, dropped)
    tokens = torch.randint(3, families.VOCABULARY, (2, 16))
    loaded = reload(out, tokens)
    with torch.no_grad():
        assert torch.equal(loaded["logits"], searched(tokens).logits)
    assert loaded["logits"].dtype == torch.bfloat16                  # the checkpoint's own, also on a CPU
    assert torch.equal(loaded["cached"], loaded["uncached"])
    shards = sorted(out.glob("*.safetensors"))
    assert len(shards) > 1 and not any("lm_head.weight" in load_file(shard) for shard in shards)
    assert report["bytes"]["exported"] == sum(shard.stat().st_size for shard in shards)
    assert report["zeros"] > 0.3 * report["parameters"]["exported"]


# ---- the folder ------------------------------------------------------------------------------------------------------


def test_sizes_are_counted_from_what_was_written(depth_exports):
    _, out, _ = depth_exports[0]["llama"]
    report = json.loads((out / "export.json").read_text())
    tensors = load_file(out / "model.safetensors")
    assert report["parameters"]["exported"] == sum(tensor.numel() for tensor in tensors.values())
    assert report["bytes"]["exported"] == (out / "model.safetensors").stat().st_size
    block = sum(tensor.numel() for name, tensor in tensors.items() if ".layers.0." in name)
    assert report["parameters"]["dense"] - report["parameters"]["exported"] == 3 * block
    assert report["zeros"] == 0                                      # three whole blocks: no unpaired half


def test_card_has_the_command_and_says_when_nothing_was_measured(depth_exports):
    card = (depth_exports[0]["llama"][1] / "README.md").read_text()
    assert "python export.py --model_name_or_path" in card and "Not measured" in card and "ppl" not in card


@pytest.mark.parametrize("matching", [True, False])
def test_card_takes_the_searchs_own_measurements_and_no_other(tmp_path, checkpoint, matching):
    words = "attn none none none none mlp" if matching else "mlp none none none none mlp"
    summary = {"dropped": words, "evaluation": {"dense": {"text": {"ppl": 11.25, "kl": 0.0}},
                                                "search": {"text": {"ppl": 13.75, "kl": 0.125}}}}
    (tmp_path / "summary.json").write_text(json.dumps(summary))
    dropped = [(True, False), *[(False, False)] * 4, (False, True)]
    card = (export_dropped(tmp_path, checkpoint, dropped) / "README.md").read_text()
    assert ("13.75" in card) == matching and ("Not measured" in card) != matching


def test_card_takes_what_eval_config_wrote(tmp_path, checkpoint):
    (tmp_path / "e.json").write_text('{"dense": {"text": {"ppl": 17.5, "kl": 0.0}}, "average_accuracy": 31.25, '
                                     '"tasks": {"arc_easy": {"acc,none": 0.3125}}}')
    out = export_dropped(tmp_path, checkpoint, DROPPED, "--evaluation", str(tmp_path / "e.json"))
    assert "17.50" in (out / "README.md").read_text()


def test_existing_folder_needs_overwrite_and_is_replaced_whole(tmp_path, checkpoint, capsys):
    out = export_dropped(tmp_path, checkpoint, DROPPED)
    (out / "stale.txt").write_text("")
    with pytest.raises(SystemExit, match=r"--save_dir .*add --overwrite"):
        export_dropped(tmp_path, checkpoint, DROPPED)
    assert (out / "stale.txt").exists()
    export_dropped(tmp_path, checkpoint, DROPPED, "--overwrite")
    assert (out / "config.json").exists() and not (out / "stale.txt").exists()
    assert sorted(path.name for path in tmp_path.iterdir()) == ["drop.txt", out.name]


def test_overwrite_deletes_nothing_but_exports(tmp_path, checkpoint):
    out = tmp_path / f"out-{Path(checkpoint).name}"
    out.mkdir()
    (out / "thesis.txt").write_text("years of work")
    with pytest.raises(SystemExit, match="replaces only finished exports"):
        export_dropped(tmp_path, checkpoint, DROPPED, "--overwrite")
    assert (out / "thesis.txt").read_text() == "years of work"
    (out / "thesis.txt").replace(tmp_path / "thesis.txt")
    out.rmdir()
    (tmp_path / "thesis.txt").replace(out)               # a file of that name
    with pytest.raises(SystemExit, match="replaces only finished exports"):
        export_dropped(tmp_path, checkpoint, DROPPED, "--overwrite")
    assert out.read_text() == "years of work"


def test_overwrite_does_not_delete_what_it_reads(tmp_path, checkpoint):
    first = export_dropped(tmp_path, checkpoint, DROPPED)
    write_drop_config(first / "drop.txt", [(True, False)] * 6)
    with pytest.raises(SystemExit, match="would delete"):
        export.main(["--model_name_or_path", checkpoint, "--drop_config", str(first / "drop.txt"), "--save_dir",
                     str(first), "--overwrite"])


def test_failed_export_leaves_nothing_and_the_old_one_whole(tmp_path, checkpoint, monkeypatch):
    out = export_dropped(tmp_path, checkpoint, DROPPED)
    before = {path.name: path.read_bytes() for path in out.iterdir()}

    def full_disk(*args):
        raise OSError(errno.ENOSPC, "No space left on device", "README.md")
    monkeypatch.setattr(export, "model_card", full_disk)
    with pytest.raises(SystemExit,
                       match="^error: README.md: No space left on device; what was finished before is intact"):
        export_dropped(tmp_path, checkpoint, [(True, False)] * 6, "--overwrite")
    assert {path.name: path.read_bytes() for path in out.iterdir()} == before
    assert sorted(path.name for path in tmp_path.iterdir()) == ["drop.txt", out.name]


def test_a_disk_too_small_is_refused_before_anything_is_written(tmp_path, checkpoint, monkeypatch):
    monkeypatch.setattr(export.shutil, "disk_usage", lambda path: SimpleNamespace(free=1000))
    with pytest.raises(SystemExit, match=r"--save_dir .*: needs 0\.00 GB at least, but its disk has only 0\.00 left"):
        export_dropped(tmp_path, checkpoint, DROPPED)
    assert [path.name for path in tmp_path.iterdir()] == ["drop.txt"]


def test_killed_export_leaves_nothing_that_looks_finished_and_the_next_one_cleans_up(tmp_path, checkpoint):
    write_drop_config(tmp_path / "drop.txt", DROPPED)
    out = tmp_path / f"out-{Path(checkpoint).name}"
    command = ["--model_name_or_path", checkpoint, "--drop_config", str(tmp_path / "drop.txt"), "--save_dir", str(out),
               "--device", "cpu"]                        # which a fork can use
    partial, written = out.with_name(f".{out.name}.partial"), tmp_path / "written"

    def halted():                # killed while it sleeps: tqdm's lock, one for parent and fork, is locked by neither
        export.model_card = lambda *args: (written.touch(), time.sleep(600))
        export.main(command)

    process = multiprocessing.get_context("fork").Process(target=halted)
    process.start()
    while process.is_alive() and not written.exists():
        time.sleep(0.01)
    process.kill()
    process.join()
    assert not out.exists() and (partial / "model.safetensors").exists() and not (partial / "export.json").exists()
    export.main(command)
    assert (out / "export.json").exists() and not partial.exists()


def test_two_exports_into_one_folder_are_refused(tmp_path, checkpoint, monkeypatch):
    """The second while the first is at work, and where the first has finished after the second had looked."""
    write_drop_config(tmp_path / "drop.txt", DROPPED)
    out = tmp_path / "out"
    command = ["--model_name_or_path", checkpoint, "--drop_config", str(tmp_path / "drop.txt"), "--save_dir", str(out),
               "--device", "cpu"]
    partial = tmp_path / ".out.partial"
    partial.mkdir()
    (partial / "model.safetensors").touch()
    with partial_locked(partial), pytest.raises(SystemExit, match="--save_dir .*: another process is at work there"):
        export.main(command)
    assert [file.name for file in partial.iterdir()] == ["model.safetensors"]
    check_room = export.check_room

    def meanwhile(*args):
        out.mkdir()
        (out / "export.json").write_text("{}")
        check_room(*args)

    monkeypatch.setattr(export, "check_room", meanwhile)
    with pytest.raises(SystemExit, match="--save_dir .*: is there already; add --overwrite"):
        export.main(command)
    assert [file.name for file in out.iterdir()] == ["export.json"]


@contextmanager
def partial_locked(folder):
    """As another process has it."""
    handle = os.open(folder, os.O_RDONLY)
    fcntl.flock(handle, fcntl.LOCK_EX)
    yield
    os.close(handle)


# ---- user errors -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("flags, message", [
    (["--fuse", "none"], "nothing to export"),
    (["--drop_config", "DROP", "--format", "compressed-tensors"], "--format compressed-tensors: holds quantized"),
    (["--drop_config", "DROP", "--fuse", "promote"], "--fuse promote: is for"),
    (["--drop_config", "DROP", "--max_shard_size", "5"], "--max_shard_size 5: not a size"),
    (["--drop_config", "DROP", "--evaluation", "nowhere.json"], "--evaluation nowhere.json: not the JSON"),
    (["--drop_config", "nowhere.txt"], "nowhere.txt: cannot be read"),
    (["--drop_config", "DROP", "--quant_weights_path", "db"], "a configuration needs its database"),
])
def test_user_errors_are_one_sentence_before_the_model_is_loaded(tmp_path, checkpoint, monkeypatch, flags, message):
    write_drop_config(tmp_path / "drop.txt", DROPPED)
    monkeypatch.setattr(export, "load_decoder", lambda *args, **kwargs: pytest.fail("the model was loaded"))
    flags = [flag.replace("DROP", str(tmp_path / "drop.txt")) for flag in flags]
    with pytest.raises(SystemExit) as error:
        export.main(["--model_name_or_path", checkpoint, "--save_dir", str(tmp_path / "out"), *flags])
    assert message in str(error.value) and "\n" not in str(error.value)
    assert not (tmp_path / "out").exists()
