"""Nothing that is read can run code or lead out of its folder: no pickle, no shell, no code of a model's own
unasked."""
import json
import pickle
import re
import shutil
import sys
from pathlib import Path

import pytest
import torch

import eval_config
import evo_drop
import evo_quant
import export
from conftest import ROOT
from database import gptq
from database.store import Database, read_manifest, write_manifest
from utils.configs import read_drop_config, write_level_config
from utils.model import load_config, load_decoder, load_tokenizer

TEXT = ["--calibration_sequence_length", "32", "--calibration_tokens", "256", "--calibration_data"]
SEARCH = ["--no_eval", "--initially_generated", "2", "--initial_tokens", "64", "--generations", "1", "--offspring", "2",
          "--survivors_per_selection", "1", "--tokens_per_selection", "64"]
FORBIDDEN = ("pickle.find_class", "subprocess.Popen", "os.system", "os.exec", "os.posix_spawn", "os.spawn")
watched: list[str] = []
watching = False
sys.addaudithook(lambda event, args: watched.append(event) if watching and event.startswith(FORBIDDEN) else None)


@pytest.fixture
def events():
    """Names of what was unpickled or started since the test began, as the interpreter itself reports it."""
    global watching
    watched.clear()
    watching = True
    yield watched
    watching = False


def test_a_database_a_search_an_evaluation_and_an_export_unpickle_and_start_nothing(checkpoint, text, tmp_path, events):
    model = ["--model_name_or_path", checkpoint, "--device", "cpu"]       # on a GPU Triton starts compilers
    gptq.main(gptq.make_parser().parse_args([*model, *TEXT, text, "--bitwidth_options", "2", "3",
                                             "--calibration_bitwidth", "3", "--save_dir", str(tmp_path / "db")]))
    evo_quant.main([*model, *TEXT, text, *SEARCH, "--quant_weights_path", str(tmp_path / "db"), "--target_bitwidth",
                    "2.5", "--output_dir", str(tmp_path / "run"), "--configuration_name", "found.txt"])
    found = ["--quant_weights_path", str(tmp_path / "db"), "--quant_config_path", str(tmp_path / "run" / "found.txt")]
    eval_config.main([*model, *found, "--eval_datasets", text, "--eval_tokens", "64", "--eval_sequence_length", "32"])
    export.main([*model, *found, "--save_dir", str(tmp_path / "out"), "--format", "dense"])
    assert events == []
    pickle.loads(pickle.dumps(Path("x")))
    assert "pickle.find_class" in events                              # the hook does see it


def test_no_source_file_names_a_way_to_unpickle_or_to_start_a_shell():
    forbidden = re.compile(r"\b(pickle|joblib|dill|marshal|shelve)\b|torch\.(load|save)\b|shell=True|os\.(system|popen)"
                           r"|(?<![\w.])(eval|exec)\(")
    sources = [path for path in ROOT.rglob("*.py") if not {"tests", ".venv", "results", "runs"} & set(path.parts)]
    assert len(sources) > 30
    assert [f"{path}: {line}" for path in sources for line in path.read_text().splitlines()
            if forbidden.search(line.partition("#")[0])] == []


# ---- a model's own code ----------------------------------------------------------------------------------------------


@pytest.fixture
def own_code(checkpoint, tokenizer, tmp_path):
    """Folder of a model whose configuration, weights and tokenizer name a Python file beside them; it leaves a mark."""
    folder = tmp_path / "own_code"
    folder.mkdir()
    (folder / "own.py").write_text(f"open({str(tmp_path / 'mark')!r}, 'w').close()\n"
                                   "from transformers import LlamaConfig\n"
                                   "class OwnConfig(LlamaConfig):\n    model_type = 'own'\n")
    config = json.loads((Path(checkpoint) / "config.json").read_text())
    config |= {"model_type": "own", "auto_map": {"AutoConfig": "own.OwnConfig", "AutoModelForCausalLM": "own.OwnConfig",
                                                 "AutoTokenizer": ["own.OwnConfig", None]}}
    (folder / "config.json").write_text(json.dumps(config))
    (folder / "tokenizer_config.json").write_text(json.dumps({"auto_map": {"AutoTokenizer": ["own.OwnConfig", None]}}))
    return folder


def test_code_that_comes_with_a_model_runs_only_when_asked_for(own_code, text, tmp_path):
    for load in (load_config, load_tokenizer, lambda name: load_decoder(name, device="cpu")):
        with pytest.raises(ValueError, match=f"{own_code}: cannot be loaded .*custom code which must be executed"):
            load(str(own_code))
    with pytest.raises(SystemExit, match="custom code"):
        evo_drop.main(["--model_name_or_path", str(own_code), "--sparsity", "0.5", *TEXT, text, *SEARCH])
    assert not (tmp_path / "mark").exists()
    load_config(str(own_code), trust_remote_code=True)
    assert (tmp_path / "mark").exists()


def test_pickled_weights_are_not_loaded(checkpoint, tmp_path):
    class Mark:
        def __reduce__(self):
            return open, (str(tmp_path / "mark"), "w")

    folder = tmp_path / "pickled"
    folder.mkdir()
    (folder / "config.json").write_text((Path(checkpoint) / "config.json").read_text())
    torch.save({"model.norm.weight": Mark()}, folder / "pytorch_model.bin")
    with pytest.raises(ValueError, match=f"--model_name_or_path {folder}: cannot be loaded .* in safetensors"):
        load_decoder(str(folder), device="cpu")
    assert not (tmp_path / "mark").exists()


def test_weights_that_are_missing_are_not_drawn_at_random(checkpoint, tmp_path):
    folder = tmp_path / "deeper"
    folder.mkdir()
    for file in Path(checkpoint).iterdir():
        (folder / file.name).write_bytes(file.read_bytes())
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | {"num_hidden_layers": 7}))
    with pytest.raises(ValueError, match=r"its weights lack model\.layers\.6\."):
        load_decoder(str(folder), device="cpu")


# ---- paths -----------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def built(checkpoint, text, tmp_path_factory):
    folder = tmp_path_factory.mktemp("built") / "db"
    gptq.main(gptq.make_parser().parse_args(
        ["--model_name_or_path", checkpoint, *TEXT, text, "--bitwidth_options", "2", "3", "--calibration_bitwidth", "3",
         "--quantizable_modules", r"layers\.0\.mlp", "--save_dir", str(folder)]))
    return folder


@pytest.fixture
def database(built, tmp_path):
    return Path(shutil.copytree(built, tmp_path / "db"))


@pytest.mark.parametrize("name", ["../outside", "/etc/passwd", "a/b", "..", "a\0b", ".hidden", "x" * 300, ""])
def test_a_layers_name_in_a_manifest_leads_nowhere(database, name):
    manifest = read_manifest(database)
    manifest["layers"][name] = next(iter(manifest["layers"].values()))
    write_manifest(database, manifest)
    with pytest.raises(ValueError, match="manifest.json: .* is not a layer's name"):
        Database.open(database)


def test_a_name_in_a_configuration_is_a_layers_or_refused(checkpoint, database, tmp_path):
    levels = dict.fromkeys(Database.open(database).layers, 3)
    write_level_config(tmp_path / "levels.txt", {"../../etc/passwd": 3, **levels})
    with pytest.raises(SystemExit, match=r"levels.txt: .*\.\./\.\./etc/passwd: 3 \(no such layer\)"):
        eval_config.main(["--model_name_or_path", checkpoint, "--quant_weights_path", str(database),
                          "--quant_config_path", str(tmp_path / "levels.txt")])
    (tmp_path / "drop.txt").write_text("../../etc/passwd\n" * 6)
    with pytest.raises(ValueError, match="drop.txt: line 1"):
        read_drop_config(tmp_path / "drop.txt")


@pytest.mark.parametrize("name", ["../found.txt", "/tmp/found.txt", "..", "manifest.json", "checkpoint.json",
                                  "model.layers.0.mlp.up_proj.safetensors", "a\0.txt"])
def test_a_configurations_name_is_no_other_files(checkpoint, text, database, tmp_path, name):
    before = {path: path.read_bytes() for path in database.iterdir()}
    with pytest.raises(SystemExit, match="--configuration_name .*: a file name ending in .txt is needed"):
        evo_quant.main(["--model_name_or_path", checkpoint, *TEXT, text, *SEARCH, "--quant_weights_path", str(database),
                        "--target_bitwidth", "2.5", "--output_dir", str(tmp_path / "run"),
                        "--configuration_name", name])
    assert {path: path.read_bytes() for path in database.iterdir()} == before
