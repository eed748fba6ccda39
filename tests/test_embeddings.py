"""Quantized embeddings and heads: levels like any layer's, in the database, the fitness, finishing, and the file."""
import importlib.util
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from transformers import AutoModelForCausalLM

import export
import families
import finish
from database import gptq
from database.levels import LevelSwitcher
from database.store import MANIFEST, Database
from exports import save_model, search_bits
from plain_solvers import round_to_nearest
from utils.configs import read_level_config, write_level_config
from utils.decoder import Decoder
from utils.fitness import Fitness

needs_gguf = pytest.mark.skipif(importlib.util.find_spec("gguf") is None, reason=(
    "the gguf package is not installed: pip install -r requirements-gguf.txt"))
needs_mlx = pytest.mark.skipif(not all(map(importlib.util.find_spec, ("mlx", "mlx_lm"))), reason=(
    "no MLX is installed to load the export: make test-runtimes, or pip install -r requirements-mlx.txt"))
SIZES = dict(hidden_size=64, num_hidden_layers=3, intermediate_size=128, max_position_embeddings=64)
EMBEDDING, HEAD = "model.embed_tokens", "lm_head"


def build(model: str, folder: Path, text: str, *flags: str) -> Database:
    grid = () if "--grid" in flags else ("--group_size", "32", "--perchannel")
    gptq.main(gptq.make_parser().parse_args([
        "--model_name_or_path", model, "--calibration_data", text, "--calibration_sequence_length", "32",
        "--calibration_tokens", "256", "--bitwidth_options", "2", "3", "4", *grid, "--save_dir", str(folder), *flags]))
    return Database.open(folder)


@pytest.fixture(scope="module", params=[True, False], ids=["tied", "untied"])
def quantized(request, tmp_path_factory, tokenizer, text):
    """(folder of a model, its database, embeddings and head included)."""
    folder = tmp_path_factory.mktemp("embeddings")
    model = save_model(folder / "m", families.build("llama", vocab_size=len(tokenizer), **SIZES,
                                                    tie_word_embeddings=request.param), tokenizer)
    return model, build(model, folder / "db", text, "--embedding_bitwidths", "4", "8")


def mixed(database: Database) -> dict[str, float]:
    """A level for every layer, different ones for embedding and head."""
    return {name: {EMBEDDING: 4, HEAD: 8}.get(name, 2 + number % 3) for number, name in enumerate(database.layers)}


def reference(model: str, database: Database, levels: dict[str, float]) -> AutoModelForCausalLM:
    """transformers' own model with the weights of these levels put in."""
    plain = AutoModelForCausalLM.from_pretrained(model, dtype=torch.float32)
    for name, level in levels.items():
        plain.get_submodule(name).weight.data.copy_(database.weight(name, level))
    return plain


def documents(model: str, count: int = 3) -> list[torch.Tensor]:
    vocabulary = AutoModelForCausalLM.from_pretrained(model).config.vocab_size
    generator = torch.Generator().manual_seed(0)
    return [torch.randint(3, vocabulary, (16 + i,), generator=generator) for i in range(count)]


def test_levels_are_those_asked_for_rounded_to_nearest(quantized):
    model, database = quantized
    own = AutoModelForCausalLM.from_pretrained(model, dtype=torch.float32)
    ends = [name for name in database.layers if database.is_end(name)]
    assert ends == ([EMBEDDING] if own.config.tie_word_embeddings else [EMBEDDING, HEAD])
    for name in ends:
        weight = own.get_submodule(name).weight.detach()
        assert database.levels(name) == [4, 8] and database.shape(name) == tuple(weight.shape)
        for bits in (4, 8):
            expected = round_to_nearest(weight, bits, group_size=32)
            assert torch.equal(database.weight(name, bits), expected.float()), (name, bits)
            error = float((expected - weight).square().sum() / weight.square().sum())
            assert database.error(name, bits) == pytest.approx(error, rel=1e-3)


def test_databases_without_them_know_nothing_of_them(quantized, tmp_path, text):
    model, database = quantized
    plain = build(model, tmp_path / "db", text)
    assert "embedding_bitwidths" not in plain.manifest["flags"]
    assert plain.layers == [name for name in database.layers if not database.is_end(name)]
    for name in plain.layers:
        assert (plain.path / f"{name}.safetensors").read_bytes() == (
            database.path / f"{name}.safetensors").read_bytes()


def test_lost_ends_are_built_again(quantized, tmp_path, text):
    model, database = quantized
    shutil.copytree(database.path, tmp_path / "db")
    (tmp_path / "db" / f"{EMBEDDING}.safetensors").unlink()
    again = build(model, tmp_path / "db", text, "--embedding_bitwidths", "4", "8")
    assert again.sha256 == database.sha256 and again.manifest == database.manifest
    with pytest.raises(ValueError, match="embedding_bitwidths"):
        build(model, tmp_path / "db", text, "--embedding_bitwidths", "4")
    with pytest.raises(ValueError, match="--embedding_bitwidths 4 9: must be from 1 to 8 bits"):
        build(model, tmp_path / "other", text, "--embedding_bitwidths", "4", "9")


@pytest.mark.parametrize("offloaded", [False, True])
@torch.no_grad()
def test_fitness_is_that_of_the_model_with_these_weights(quantized, offloaded):
    model, database = quantized
    texts, own = documents(model), AutoModelForCausalLM.from_pretrained(model, dtype=torch.float32)
    decoder = Decoder(AutoModelForCausalLM.from_pretrained(model, dtype=torch.float32),
                      torch.device("cpu") if offloaded else None)
    switcher = LevelSwitcher(decoder, database, 0.0)
    fitness = Fitness(decoder, texts, switcher.set_block)
    first = mixed(database)
    candidates = [first, {**first, EMBEDDING: 8}, dict.fromkeys(first, 4), {**dict.fromkeys(first, 3), EMBEDDING: 4,
                  **({HEAD: 4} if HEAD in first else {})}, first]
    states = [switcher.states(levels) for levels in candidates]
    measured = fitness.measure(states, kinds=("kl", "ppl"))
    for levels, (kl, ppl) in zip(candidates, measured):
        compressed, divergences, losses = reference(model, database, levels), [], []
        for document in texts:
            p, q = (m(document[None]).logits[0, :-1].double().log_softmax(-1) for m in (own, compressed))
            divergences.append((p.exp() * (p - q)).sum(-1))
            losses.append(-q.gather(1, document[1:, None])[:, 0])
        assert kl == pytest.approx(float(torch.cat(divergences).mean()), rel=1e-4)
        assert ppl == pytest.approx(float(torch.cat(losses).mean().exp()), rel=1e-5)
    assert [fitness.measure([state], kinds=("kl", "ppl"))[0] for state in states] == measured
    # whatever was measured last, the teacher's own embedding and head are there again
    for name, end in decoder.ends.items():
        assert torch.equal(end.weight, own.get_submodule(name).weight)
    sums, changes = fitness.changes(states[:2], [(0, 16)], states[0], 64)
    assert not changes[:, 0].any() and changes[:, 1].any()
    assert sums.shape == (1, 2)


def search(model: str, database: Database, text: str, out: Path, *flags: str) -> dict:
    return search_bits(model, database, text, out, "--init", "measured", "--group_rule", "none", *flags)


def exported(model: str, database: Database, out: Path, bits: float, *flags: str) -> Path:
    """The folder of what was found, exported, in as many bits a parameter as promised."""
    report = export.main(["--model_name_or_path", model, "--quant_weights_path", str(database.path),
                          "--quant_config_path", str(out / "run" / "found.txt"), "--save_dir", str(out / "out"),
                          *flags])
    assert report["bytes"]["exported"] <= bits * report["parameters"]["dense"] / 8
    return out / "out"


def test_searched_along_and_refused_where_no_runtime_reads_them(quantized, text, tmp_path):
    model, database = quantized
    found = search(model, database, text, tmp_path, "--target_bitwidth", "3.6")
    weights = {name: np.prod(database.shape(name)) for name in database.layers}
    levels = read_level_config(tmp_path / "run" / "found.txt")
    assert {*levels} == {*weights} and found["levels"] == levels
    assert sum(weights[name] * level for name, level in levels.items()) <= 3.6 * sum(weights.values())
    for flags in (["--for_format", "compressed-tensors"], ["--for_format", "compressed-tensors", "--count_everything"]):
        with pytest.raises(SystemExit, match="model.embed_tokens has quantized rows of an embedding"):
            search(model, database, text, tmp_path / "refused", "--target_bitwidth", "9", *flags)
    with pytest.raises(SystemExit, match="use --format mlx or gguf"):
        export.main(["--model_name_or_path", model, "--quant_weights_path", str(database.path), "--quant_config_path",
                     str(tmp_path / "run" / "found.txt"), "--save_dir", str(tmp_path / "out")])


def test_dense_export_is_the_searched_model(quantized, tmp_path):
    model, database = quantized
    write_level_config(tmp_path / "levels.txt", mixed(database))
    export.main(["--model_name_or_path", model, "--quant_weights_path", str(database.path), "--quant_config_path",
                 str(tmp_path / "levels.txt"), "--format", "dense", "--save_dir", str(tmp_path / "out")])
    found = AutoModelForCausalLM.from_pretrained(tmp_path / "out", dtype=torch.float32).state_dict()
    for name, expected in reference(model, database, mixed(database)).state_dict().items():
        assert torch.equal(found[name], expected), name


@needs_mlx
def test_mlx_has_them_to_the_bit_in_a_file_as_large_as_promised(quantized, text, tmp_path):
    import mlx.core as mx
    from mlx_lm.utils import load_model
    model, database = quantized
    levels = search(model, database, text, tmp_path, "--for_format", "mlx", "--count_everything", "--target_bitwidth",
                    "6")["levels"]
    loaded = load_model(exported(model, database, tmp_path, 6, "--format", "mlx"))[0]
    tokens = documents(model)[0]
    logits = torch.from_numpy(np.array(loaded(mx.array(tokens.numpy())[None]).astype(mx.float32)))
    plain = reference(model, database, levels)
    with torch.no_grad():
        assert torch.allclose(logits, plain(tokens[None]).logits, atol=1e-4)
    for name in filter(database.is_end, database.layers):
        end = loaded.model.embed_tokens if name == EMBEDDING else loaded.lm_head
        found = mx.dequantize(end.weight, end.scales, end.biases, group_size=end.group_size, bits=end.bits)
        assert np.array_equal(np.array(found), database.weight(name, levels[name]).numpy())


@needs_gguf
def test_gguf_has_k_quant_embeddings_byte_for_byte(tmp_path, tokenizer, text):
    import gguf
    model = save_model(tmp_path / "m", families.build(
        "llama", vocab_size=len(tokenizer), **SIZES | dict(hidden_size=256), tie_word_embeddings=True), tokenizer)
    database = build(model, tmp_path / "db", text, "--grid", "k-quant", "--embedding_bitwidths", "4", "6", "8")
    assert database.levels(EMBEDDING) == [4.5, 6.5625, 8.5]
    levels = search(model, database, text, tmp_path, "--for_format", "gguf", "--count_everything", "--target_bitwidth",
                    "4.5")["levels"]
    folder = exported(model, database, tmp_path, 4.5, "--format", "gguf")
    stored = {tensor.name: tensor for tensor in gguf.GGUFReader(folder / "model.gguf").tensors}
    embedding = stored["token_embd.weight"]
    assert embedding.tensor_type.name == database.type(EMBEDDING, levels[EMBEDDING]) and "output.weight" not in stored
    assert np.array_equal(embedding.data, database.packed(EMBEDDING, levels[EMBEDDING])["blocks"].numpy())


def test_finishing_trains_on_the_quantized_embedding_and_keeps_it(quantized, text, tmp_path, monkeypatch):
    model, database = quantized
    write_level_config(tmp_path / "levels.txt", mixed(database))
    firsts = []
    train, through, divergences = finish.HiddenStates.train, finish.HiddenStates._backward_through, []

    def seen(self, index, weights, states, *rest):
        if index == 0:
            firsts.append(states)
            firsts.append(self)
        return train(self, index, weights, states, *rest)

    def checked(self, weights, states, teacher, batch, *rest):
        """The loss that is trained is that of the model whose embedding and head are quantized, too."""
        dense, plain = (AutoModelForCausalLM.from_pretrained(model, dtype=torch.float32) for _ in range(2))
        plain.load_state_dict(self.decoder.model.state_dict())
        for name in filter(database.is_end, database.layers):
            plain.get_submodule(name).weight.data.copy_(database.weight(name, mixed(database)[name]))
        loss = through(self, weights, states, teacher, batch, *rest)
        with torch.no_grad():
            p, q = (torch.cat([one(self.documents[i][None]).logits[0, :-1].log_softmax(-1) for number in batch
                               for row in self.rows[number] for i, _ in row]) for one in (dense, plain))
        divergences.append((loss, float((p.exp() * (p - q)).sum(-1).mean())))
        return loss

    monkeypatch.setattr(finish.HiddenStates, "train", seen)
    monkeypatch.setattr(finish.HiddenStates, "_backward_through", checked)
    finish.main(["--model_name_or_path", model, "--calibration_data", text, "--calibration_tokens", "128",
                 "--calibration_sequence_length", "32", "--batch_size", "2", "--steps", "2",
                 "--end_to_end_steps", "2", "--quant_weights_path",
                 str(database.path), "--quant_config_path", str(tmp_path / "levels.txt"), "--save_dir",
                 str(tmp_path / "finished")])
    assert len(divergences) == 2 and all(loss == pytest.approx(plain, rel=1e-4) for loss, plain in divergences)
    states, calibration = firsts
    embedded = database.weight(EMBEDDING, 4)
    for rows, given in zip(calibration.rows, states, strict=True):
        tokens = torch.stack([torch.cat([calibration.documents[i][:length] for i, length in row]) for row in rows])
        assert torch.equal(given.hidden_states.cpu(), embedded[tokens])
    finished = Database.open(tmp_path / "finished")
    assert finished.layers == database.layers and (tmp_path / "finished" / MANIFEST).is_file()
    changed = 0
    for name, level in mixed(database).items():
        same = torch.equal(finished.weight(name, level), database.weight(name, level))
        assert finished.is_end(name) == database.is_end(name) and (same or not database.is_end(name)), name
        changed += not same
    assert changed
