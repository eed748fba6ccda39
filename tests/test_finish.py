"""finish.py: training a found configuration lowers its loss and changes neither budget nor format."""
import json
import os
import shutil
from pathlib import Path
from unittest.mock import Mock

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

import eval_config
import export
import families
import finish
from benchmarks.families import FAMILIES
from database.packing import pack_quantized, pack_sparse, unpack_bits, unpack_quantized, unpack_sparse
from database.store import Database
from database.trained import DenseWeight, QuantizedWeight, SparseWeight
from database.tuning import HiddenStates
from utils.configs import write_drop_config, write_level_config
from utils.decoder import Decoder
from utils.errors import RunError
from utils.model import save_pretrained

DROPPED = [(False, False), (True, False), (False, True), (True, True), (False, False), (False, False)]


@pytest.fixture(scope="module")
def configurations(databases, tmp_path_factory):
    """{"sparse": file, "quant": file, "drop": file}: levels that differ from layer to layer."""
    folder = tmp_path_factory.mktemp("configurations")
    files = {kind: folder / f"{kind}.txt" for kind in ("sparse", "quant", "drop")}
    for kind, levels in (("sparse", (-1, 0, 2)), ("quant", (2, 3))):
        names = Database.open(databases[kind]).layers
        write_level_config(files[kind], {name: levels[i % len(levels)] for i, name in enumerate(names)})
    write_drop_config(files["drop"], DROPPED)
    return files


@pytest.fixture(scope="module")
def finished(checkpoint, text, databases, configurations, tmp_path_factory):
    """finished(kind, folder, *flags) runs finish.py; finished.flags(kind) are those of a configuration."""
    def flags(kind: str) -> list[str]:
        if kind == "drop":
            return ["--drop_config", str(configurations["drop"])]
        return [f"--{kind}_weights_path", str(databases[kind]), f"--{kind}_config_path", str(configurations[kind])]

    def run(kind: str, folder, *more: str):
        finish.main(["--model_name_or_path", str(checkpoint), "--calibration_data", text, "--calibration_tokens", "768",
                     "--calibration_sequence_length", "32", "--batch_size", "4", "--steps", "30",
                     "--microbatch_tokens", "32",        # on a GPU a block is run to find that out
                     "--save_dir", str(folder), *flags(kind), *more])
        return folder

    run.flags = flags
    run.folders = {}

    def once(kind: str):
        if kind not in run.folders:
            run.folders[kind] = run(kind, tmp_path_factory.mktemp("finished") / kind)
        return run.folders[kind]

    run.once = once
    return run


def contents(folder) -> dict[str, bytes]:
    return {str(file.relative_to(folder)): file.read_bytes() for file in sorted(folder.rglob("*")) if file.is_file()}


def divergence(checkpoint, text, *flags: str) -> float:
    results = eval_config.main(["--model_name_or_path", str(checkpoint), "--eval_datasets", text, "--eval_tokens",
                                "512", "--eval_sequence_length", "32", *map(str, flags)])
    return results["compressed"][text]["kl"]


# ---- what comes of it ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["sparse", "quant"])
def test_finishing_lowers_the_divergence_of_a_mixture(finished, checkpoint, text, configurations, kind):
    before = divergence(checkpoint, text, *finished.flags(kind))
    after = divergence(checkpoint, text, f"--{kind}_weights_path", finished.once(kind), f"--{kind}_config_path",
                       configurations[kind])
    assert 0 < after < 0.8 * before


def test_a_finished_depth_checkpoint_has_fewer_blocks_and_diverges_less(finished, checkpoint, text):
    dense = AutoModelForCausalLM.from_pretrained(checkpoint)
    model, found = AutoModelForCausalLM.from_pretrained(finished.once("drop"), output_loading_info=True)
    assert not found["missing_keys"] and not found["unexpected_keys"]
    assert model.config.num_hidden_layers == 5          # of six: 0, 1's MLP, 2's attention, 4, 5
    assert sum(p.numel() for p in model.parameters()) < sum(p.numel() for p in dense.parameters())
    after = divergence(checkpoint, text, "--checkpoint", finished.once("drop"))
    assert 0 < after < 0.9 * divergence(checkpoint, text, *finished.flags("drop"))
    assert not list(finished.once("drop").glob("block-*"))


def test_a_block_makes_up_for_those_that_are_dropped_after_it(checkpoint, text, finished, monkeypatch, tmp_path):
    """It is trained to give what the last of them gave; where those are the last of the model, no other block could."""
    goals, train = {}, HiddenStates.train

    def spy(self, index: int, weights, states, targets, *rest):
        goals[index] = targets
        return train(self, index, weights, states, targets, *rest)

    outputs, run = {}, HiddenStates.run

    def run_and_keep(self, states, index: int):
        kept = run(self, states, index)
        outputs.setdefault(index, kept)                  # the first time, the uncompressed block's
        return kept

    monkeypatch.setattr(HiddenStates, "train", spy)
    monkeypatch.setattr(HiddenStates, "run", run_and_keep)
    config = tmp_path / "drop.txt"
    write_drop_config(config, [(False, True), (True, True), (False, False), (True, False), (True, True), (True, True)])
    folder = finished("drop", tmp_path / "out", "--drop_config", str(config))
    assert [*goals] == [0, 2, 3]
    for index, last in ((0, 1), (2, 2), (3, 5)):
        assert all(torch.equal(goal.hidden_states, output.hidden_states)
                   for goal, output in zip(goals[index], outputs[last]))
    monkeypatch.undo()
    assert divergence(checkpoint, text, "--checkpoint", folder) < 0.9 * divergence(checkpoint, text, "--drop_config",
                                                                                   config)


def test_a_finished_depth_checkpoint_is_of_the_dtype_of_its_model(checkpoint, tokenizer, finished, tmp_path):
    model = AutoModelForCausalLM.from_pretrained(checkpoint, dtype=torch.bfloat16)
    save_pretrained(model, tokenizer, tmp_path / "model")
    for flags, dtype in (([], torch.bfloat16), (["--dtype", "float32"], torch.float32)):
        folder = finished("drop", tmp_path / str(dtype), "--model_name_or_path", str(tmp_path / "model"), "--steps",
                          "1", *flags)
        assert {value.dtype for value in load_file(folder / "model.safetensors").values()} == {dtype}
        assert AutoModelForCausalLM.from_pretrained(folder).dtype == dtype
        assert {file.stat().st_mode & 0o777 for file in folder.iterdir()} == {0o644}


def test_codes_stay_in_range_and_nothing_that_costs_bits_changes(finished, databases, configurations):
    source, result = Database.open(databases["quant"]), Database.open(finished.once("quant"))
    changed = 0
    for name in source.layers:
        [level] = result.levels(name)
        before, after = source.packed(name, level), result.packed(name, level)
        assert {part: (t.shape, t.dtype) for part, t in before.items()} == {
            part: (t.shape, t.dtype) for part, t in after.items()}
        assert torch.equal(before["zeros"], after["zeros"]) and (after["scales"] > 0).all()
        assert int(unpack_bits(after["codes"], level, 64).max()) < 2**level
        assert result.bits(name, level, overhead=True) == source.bits(name, level, overhead=True)
        changed += not torch.equal(before["codes"], after["codes"])
    assert changed == len(source.layers)


def test_what_is_pruned_stays_pruned(finished, databases):
    source, result = Database.open(databases["sparse"]), Database.open(finished.once("sparse"))
    for name in source.layers:
        [level] = result.levels(name)
        before, after = source.packed(name, level), result.packed(name, level)
        assert torch.equal(before["mask"], after["mask"]) and result.kept(name, level) == source.kept(name, level)
        assert before["values"].dtype == after["values"].dtype and not torch.equal(before["values"], after["values"])


def test_an_export_of_a_finished_database_has_its_weights_to_the_bit(finished, checkpoint, configurations, tmp_path):
    folder = finished.once("quant")
    export.main(["--model_name_or_path", str(checkpoint), "--quant_weights_path", str(folder), "--quant_config_path",
                 str(configurations["quant"]), "--save_dir", str(tmp_path / "out")])
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "out", dtype=torch.float32)
    database = Database.open(folder)
    with torch.no_grad():
        model(torch.zeros(1, 2, dtype=torch.int64))     # compressed-tensors decompresses at the first forward
    for name in database.layers:
        assert torch.equal(model.get_submodule(name).weight, database.weight(name, database.levels(name)[0])), name


def test_errors_are_those_of_the_finished_levels(finished, checkpoint, text):
    database = Database.open(finished.once("sparse"))
    decoder = Decoder(AutoModelForCausalLM.from_pretrained(checkpoint))
    inputs, name = [], database.layers[0]
    hook = decoder.layers[name].register_forward_pre_hook(lambda layer, args: inputs.append(args[0].flatten(0, -2)))
    flags = finish.parse_arguments(["--model_name_or_path", str(checkpoint), "--calibration_data", text,
                                    "--calibration_tokens", "768", "--calibration_sequence_length", "32",
                                    "--save_dir", "-"])
    config = decoder.config
    documents = finish.documents_of(flags, config, finish.tokenizer_of(flags))
    with torch.no_grad():
        for document in documents:
            decoder.model(document[None])
    hook.remove()
    x, weight = torch.cat(inputs), decoder.layers[name].weight
    [level] = database.levels(name)
    delta = database.weight(name, level, dtype=torch.float32) - weight
    expected = (x @ delta.T).square().sum() / (x @ weight.T).square().sum()
    assert database.error(name, level) == pytest.approx(float(expected), rel=0.1)    # of the first microbatches


def test_a_drop_configuration_may_go_with_levels(finished, checkpoint, text, configurations, databases, tmp_path):
    both = [*finished.flags("drop"), *finished.flags("quant")]
    folder = finished("quant", tmp_path / "both", *finished.flags("drop"))
    after = divergence(checkpoint, text, *finished.flags("drop"), "--quant_weights_path", folder, "--quant_config_path",
                       configurations["quant"])
    assert after < 0.8 * divergence(checkpoint, text, *both)
    source, result = Database.open(databases["quant"]), Database.open(folder)
    for name in source.layers:                           # what nobody runs is as it was
        [level] = result.levels(name)
        same = torch.equal(source.packed(name, level)["codes"], result.packed(name, level)["codes"])
        assert same == (".3." in name or (".1." in name and "attn" in name) or (".2." in name and "mlp" in name)), name


def test_a_finished_database_is_finished_again_from_its_codes(finished, checkpoint, text, configurations, tmp_path):
    flags = ["--quant_weights_path", str(finished.once("quant")), "--quant_config_path", str(configurations["quant"])]
    finish.main(["--model_name_or_path", str(checkpoint), "--calibration_data", text, "--calibration_tokens", "768",
                 "--calibration_sequence_length", "32", "--steps", "20", "--batch_size", "4", "--learning_rate",
                 "0.005", *flags, "--save_dir", str(tmp_path / "again")])
    after = divergence(checkpoint, text, "--quant_weights_path", tmp_path / "again", *flags[2:])
    assert after < 1.1 * divergence(checkpoint, text, *flags)
    once, again = Database.open(finished.once("quant")), Database.open(tmp_path / "again")
    same = [(once.codes(name, level)[0] == again.codes(name, level)[0]).float().mean()
            for name in once.layers for level in once.levels(name)]
    assert min(same) > 0.9                               # 0.85 where it begins at the nearest codes


# ---- all blocks together ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["sparse", "quant", "drop"])
def test_end_to_end_steps_lower_the_divergence_further(finished, databases, checkpoint, text, configurations, tmp_path,
                                                       kind):
    def after(folder) -> float:
        return divergence(checkpoint, text, *(["--checkpoint", folder] if kind == "drop" else [
            f"--{kind}_weights_path", folder, f"--{kind}_config_path", configurations[kind]]))

    more = ["--end_to_end_steps", "30"]
    folder = finished(kind, tmp_path / "together", *more)
    assert after(folder) < 0.99 * after(finished.once(kind))
    with pytest.raises(SystemExit, match="differs in --end_to_end_steps None .it was 30"):
        finished(kind, folder)
    if kind == "quant":                                  # codes and zeros stay those of the blocks; scales do not
        apart, together = Database.open(finished.once(kind)), Database.open(folder)
        for name in apart.layers:
            [level] = apart.levels(name)
            before, trained = apart.packed(name, level), together.packed(name, level)
            assert [torch.equal(before[part], trained[part]) for part in ("codes", "zeros", "scales")] == [
                True, True, False]
            assert apart.error(name, level) == together.error(name, level)


@pytest.mark.parametrize("kind", ["quant", "drop"])
def test_killed_while_all_are_trained_it_leaves_the_same_bytes(finished, tmp_path, monkeypatch, capsys, kind):
    more = ["--steps", "3", "--end_to_end_steps", "4"]
    whole = contents(finished(kind, tmp_path / "whole", *more))
    together, written = HiddenStates._backward_through, []

    def dying(self, *args):
        if len(written) == 2:
            written.append(None)
            raise KeyboardInterrupt
        written.append(None)
        return together(self, *args)

    if kind == "quant":                                  # for which blocks may have been finished alone
        finished(kind, tmp_path / "killed", *more[:2])
    monkeypatch.setattr(HiddenStates, "_backward_through", dying)
    with pytest.raises(KeyboardInterrupt):
        finished(kind, tmp_path / "killed", *more)
    if kind == "quant":                                  # and once more while the result is written
        manifest = finish.FinishedDatabase._write

        def half(self, packed, errors):
            if any(".2." in name for name in packed):
                raise KeyboardInterrupt
            return manifest(self, packed, errors)
        monkeypatch.setattr(finish.FinishedDatabase, "_write", half)
        with pytest.raises(KeyboardInterrupt):
            finished(kind, tmp_path / "killed", *more)
        monkeypatch.setattr(finish.FinishedDatabase, "_write", manifest)
    finished(kind, tmp_path / "killed", *more)
    assert contents(tmp_path / "killed") == whole
    capsys.readouterr()
    finished(kind, tmp_path / "killed", *more)
    assert capsys.readouterr().out.strip().endswith("finished")


def test_damaged_after_all_were_trained_together_it_is_the_same_again(finished, tmp_path, capsys):
    folder, more = tmp_path / "database", ["--steps", "3", "--end_to_end_steps", "2"]
    whole = contents(finished("quant", folder, *more))
    min(folder.glob("*.safetensors")).unlink()
    finished("quant", folder, *more)
    assert "blocks were trained together, so all are trained again" in capsys.readouterr().out
    assert contents(folder) == whole


SHARING = {name: FAMILIES[name] for name in ("gemma3n_text", "gemma4_text")}       # keys and values among blocks


@pytest.mark.parametrize("name", [*families.FAMILIES, *SHARING])
def test_gradients_through_all_blocks_are_those_of_the_whole_model(name):
    decoder = Decoder(families.build(name, dtype=torch.float64, **SHARING.get(name, {})))
    assert decoder.shares_notes == (name in SHARING)
    documents = [torch.randint(3, families.VOCABULARY, (length,), generator=torch.Generator().manual_seed(length))
                 for length in (16, 16, 11)]
    calibration = HiddenStates(decoder, documents, 16, torch.device("cpu"))
    teacher = None
    for block in decoder.blocks:
        teacher = calibration.run(teacher, block.index)
    with torch.no_grad():
        expected = [decoder.model(document[None]).logits[0, :-1].log_softmax(-1) for document in documents]
        for block in decoder.blocks:
            for number, parameter in enumerate(block.module.parameters()):
                parameter.mul_(1 + 0.1 * (-1) ** number)
    decoder.blocks[1].drop(True, False)
    weights = [{name: DenseWeight(parameter) for name, parameter in block.module.named_parameters()
                if parameter.is_floating_point()} for block in decoder.blocks]
    loss = calibration._backward_through(weights, None, teacher, list(range(len(calibration.rows))))
    parameters = {(block.index, name): parameter.requires_grad_() for block in decoder.blocks
                  for name, parameter in block.module.named_parameters() if parameter.is_floating_point()}
    own = [decoder.model(document[None], use_cache=False).logits[0, :-1].log_softmax(-1) for document in documents]
    plain = sum((p.exp() * (p - q)).sum() for p, q in zip(expected, own)) / sum(len(d) - 1 for d in documents)
    gradients = torch.autograd.grad(plain, list(parameters.values()), allow_unused=True)
    assert loss == pytest.approx(float(plain.detach()), rel=1e-6)
    for (index, own), gradient in zip(parameters, gradients):
        found = weights[index][own].trained[0].grad
        gradient = torch.zeros_like(parameters[index, own]) if gradient is None else gradient
        assert torch.allclose(found.double(), gradient, rtol=1e-4, atol=1e-5 * float(gradient.abs().max() + 1e-9)), own


# ---- a trained weight ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("keep_codes", [True, False])
def test_a_quantized_weight_is_trained_as_what_is_stored(databases, checkpoint, keep_codes):
    database, model = Database.open(databases["quant"]), AutoModelForCausalLM.from_pretrained(checkpoint)
    for name in database.layers[:7]:
        for level in (2, 3, 8):
            packed = database.packed(name, level)
            weight = QuantizedWeight(model.get_submodule(name).weight, packed, level, 16, keep_codes)
            assert torch.equal(weight.packed()["codes"], packed["codes"]) or not keep_codes
            with torch.no_grad():
                weight.steps.add_(torch.randn(weight.steps.shape, generator=torch.Generator().manual_seed(0)))
                weight.growth.sub_(0.03)
            stored = weight.packed()
            assert not torch.equal(stored["codes"], packed["codes"])
            assert torch.allclose(weight.value(), unpack_quantized(stored, database.shape(name), level, 16), rtol=1e-6,
                                  atol=0)


@pytest.mark.parametrize("keep_codes", [True, False])
def test_imported_scales_below_zero_or_zero_are_trained_as_they_are(keep_codes):
    """As llama.cpp writes them for its types without a minimum, and for groups of zeros."""
    scales = torch.tensor([[0.5, -0.25], [-0.125, 0.0]])
    codes = torch.randint(0, 16, (2, 32), generator=torch.Generator().manual_seed(0), dtype=torch.uint8)
    packed = pack_quantized(codes, scales.half(), torch.full((2, 2), 8, dtype=torch.uint8), 4)
    stored = unpack_quantized(packed, (2, 32), 4, 16)
    weight = QuantizedWeight(stored + 0.001, packed, 4, 16, keep_codes)
    assert torch.allclose(weight.value(), stored) and torch.equal(weight.packed()["scales"], scales.half())
    weight.value().square().sum().backward()
    assert all(tensor.grad.isfinite().all() for tensor in weight.trained)


def test_together_with_others_a_quantized_weight_trains_its_scales_alone_and_keeps_codes_in_a_byte(databases):
    database = Database.open(databases["quant"])
    name = database.layers[0]
    for level, itemsize in ((2, 1), (3, 1), (8, 2)):     # codes less zeros: of 8 bits they need a sign more
        packed = database.packed(name, level)
        dequantized = database.weight(name, level)
        weight = QuantizedWeight(dequantized, packed, level, 16, keep_codes=True, together=True)
        assert [tensor.shape for tensor in weight.trained] == [packed["scales"].shape]
        assert weight.steps.element_size() == itemsize
        assert torch.equal(weight.value(), dequantized)
        assert all(torch.equal(part, packed[key]) for key, part in weight.packed().items())


def test_a_sparse_weight_is_trained_as_what_is_stored(databases):
    database = Database.open(databases["sparse"])
    name = database.layers[0]
    weight = SparseWeight(database.packed(name, 0), database.shape(name))
    with torch.no_grad():
        weight.trained[0].add_(1.0)                      # what is pruned, too
    stored = unpack_sparse(weight.packed(), database.shape(name)).float()
    assert torch.allclose(weight.value(), stored, rtol=1e-3) and (stored == 0).any()


def test_every_microbatch_is_seen_before_any_is_seen_again(checkpoint):
    decoder = Decoder(AutoModelForCausalLM.from_pretrained(checkpoint))
    documents = [torch.zeros(length, dtype=torch.int64) for length in [16] * 12 + [9, 7]]
    calibration = HiddenStates(decoder, documents, 32, torch.device("cpu"))
    batches, seen = calibration._batches(64, torch.Generator().manual_seed(0)), []
    while len(seen) < 3 * len(calibration.rows):
        batch = next(batches)
        assert sum(map(calibration.tokens, batch)) >= 64 > sum(map(calibration.tokens, batch[:-1]))
        seen += batch
    for start in range(0, 3 * len(calibration.rows), len(calibration.rows)):
        assert sorted(seen[start:start + len(calibration.rows)]) == list(range(len(calibration.rows)))


def test_pieces_of_one_text_are_not_trained_on_together(checkpoint):
    decoder = Decoder(AutoModelForCausalLM.from_pretrained(checkpoint))
    pieces = [torch.zeros(16, dtype=torch.int64)] * 64           # of eight texts, one after the other
    calibration = HiddenStates(decoder, pieces, 64, torch.device("cpu"))
    texts = [{i // 8 for row in rows for i, _ in row} for rows in calibration.rows]
    assert sum(map(len, texts)) / len(texts) > 3                 # of at most four
    assert calibration.rows == HiddenStates(decoder, pieces, 64, torch.device("cpu")).rows


def test_every_token_counts_alike_however_large_its_hidden_state_is(checkpoint):
    decoder = Decoder(AutoModelForCausalLM.from_pretrained(checkpoint))
    documents = [torch.arange(3 + i, 19 + i) for i in range(8)]
    calibration = HiddenStates(decoder, documents, 32, torch.device("cpu"))
    targets, block = calibration.run(None, 0), decoder.blocks[0]
    for target in targets:
        target.hidden_states[..., 0, :] *= 3000                  # as first tokens are in models of today
    block.drop(False, True)
    outputs = calibration.run(None, 0)
    errors = torch.cat([((a.hidden_states - b.hidden_states).square().sum(-1) /
                         b.hidden_states.square().sum(-1)).flatten() for a, b in zip(outputs, targets)])
    weights = {name: DenseWeight(value) for name, value in block.module.named_parameters()}
    first, last = calibration.train(0, weights, None, targets, 10, 8 * 16, 0)
    assert first == pytest.approx(float(errors.mean()), rel=1e-4)
    assert errors.min() < 0.9 and last < first


def test_gradients_of_many_tokens_are_within_half_precision(checkpoint):
    """They add up over a microbatch: of these, without a scale, beyond what float16 holds."""
    losses = []
    for dtype in (torch.float32, torch.float16):
        decoder = Decoder(AutoModelForCausalLM.from_pretrained(checkpoint, dtype=dtype))
        documents = list(torch.randint(3, 99, (256, 32), generator=torch.Generator().manual_seed(0)))
        calibration = HiddenStates(decoder, documents, 8192, torch.device("cpu"))
        targets, block = calibration.run(None, 0), decoder.blocks[0]
        weights = {name: DenseWeight(1.5 * value) for name, value in block.module.named_parameters()}
        losses.append(calibration.train(0, weights, None, targets, 4, 8192, 0))
    assert losses[1] == pytest.approx(losses[0], rel=0.02)


def test_a_gradient_that_is_not_finite_ends_training_in_a_sentence(checkpoint):
    decoder = Decoder(AutoModelForCausalLM.from_pretrained(checkpoint))
    calibration = HiddenStates(decoder, [torch.arange(3, 19)] * 4, 32, torch.device("cpu"))
    targets = calibration.run(None, 0)
    targets[0].hidden_states[0, 3] = torch.inf
    weights = {name: DenseWeight(value) for name, value in decoder.blocks[0].module.named_parameters()}
    with pytest.raises(RunError, match="a gradient is beyond what torch.float32 holds; use --dtype bfloat16"):
        calibration.train(0, weights, None, targets, 2, 64, 0)
    every = [weights, *[{}] * (len(decoder.blocks) - 1)]
    with pytest.raises(RunError, match="a gradient is beyond what torch.float32 holds; use --dtype bfloat16"):
        [*calibration.train_together(every, None, targets, 1, 64, 0)]


def test_values_of_wider_layers_are_trained_by_smaller_steps_unless_the_rate_is_given():
    def rates(columns: int, *given: float) -> list[float]:
        weight = torch.full((4, columns), -2.0)
        sparse = pack_sparse(weight.half(), torch.ones_like(weight, dtype=torch.bool))
        return DenseWeight(weight, *given).learning_rates + SparseWeight(sparse, weight.shape, *given).learning_rates

    assert rates(64) == pytest.approx([2 * rate for rate in rates(256)])
    assert rates(64, 0.03) == rates(256, 0.03) == pytest.approx([0.06, 0.06])
    assert DenseWeight(torch.ones(4, 64), 0.03, together=True).learning_rates[0] < 0.03


def test_a_block_that_has_nothing_to_make_up_for_is_left_as_it_is(checkpoint):
    decoder = Decoder(AutoModelForCausalLM.from_pretrained(checkpoint))
    calibration = HiddenStates(decoder, [torch.arange(3, 19)] * 4, 32, torch.device("cpu"))
    targets = calibration.run(None, 0)
    weights = {name: DenseWeight(value) for name, value in decoder.blocks[0].module.named_parameters()}
    steps = Mock(side_effect=calibration._backward)
    calibration._backward = steps
    assert calibration.train(0, weights, None, targets, 10, 32, 0) == (0, 0) and steps.call_count == 1
    assert all(torch.equal(weights[name].value(), value) for name, value in decoder.blocks[0].module.named_parameters())


@pytest.mark.parametrize("name", families.FAMILIES)
def test_any_family_is_trained_where_a_half_of_a_block_is_dropped(name):
    decoder = Decoder(families.build(name))
    generator = torch.Generator().manual_seed(0)
    documents = [torch.randint(3, families.VOCABULARY, (16,), generator=generator) for _ in range(24)]
    calibration = HiddenStates(decoder, documents, 64, torch.device("cpu"))
    given = calibration.run(None, 0)
    targets, block = calibration.run(given, 1), decoder.blocks[1]
    before = {parameter: value.clone() for parameter, value in block.module.named_parameters()}
    gone = {id(value) for module in block.attn.modules for value in module.parameters()}
    weights = {parameter: DenseWeight(value) for parameter, value in block.module.named_parameters()
               if id(value) not in gone}
    block.drop(True, False)
    untrained = calibration.run(given, 1)
    calibration.train(1, weights, given, targets, 40, 128, 0)
    with torch.no_grad():
        for parameter, value in block.module.named_parameters():
            assert torch.equal(value, before[parameter])         # until it is loaded
            if parameter in weights:
                value.copy_(weights[parameter].value())
    error = {key: sum(float((a.hidden_states - b.hidden_states).square().sum()) for a, b in zip(states, targets))
             for key, states in (("before", untrained), ("after", calibration.run(given, 1)))}
    assert error["after"] < 0.9 * error["before"]


# ---- killed, and mistakes --------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["sparse", "quant", "drop"])
def test_killed_and_resumed_it_leaves_the_same_bytes(finished, tmp_path, monkeypatch, capsys, kind):
    whole, train, calls = contents(finished.once(kind)), HiddenStates.train, []

    def dying(self, *args):
        calls.append(args)
        if len(calls) in (2, 4):
            raise KeyboardInterrupt
        return train(self, *args)

    monkeypatch.setattr(HiddenStates, "train", dying)
    for _ in range(2):
        with pytest.raises(KeyboardInterrupt):
            finished(kind, tmp_path / kind)
    finished(kind, tmp_path / kind)
    assert contents(tmp_path / kind) == whole
    capsys.readouterr()
    finished(kind, tmp_path / kind)
    assert capsys.readouterr().out.strip().endswith("finished") and len(calls) == 6 + 2 - (kind == "drop")


@pytest.mark.parametrize("damage", [
    lambda content: content[:-1], lambda content: content[:-1] + bytes([content[-1] ^ 1]), None])
def test_damaged_blocks_of_a_checkpoint_are_named_and_trained_again(finished, tmp_path, monkeypatch, capsys, damage):
    folder, whole, train, calls = tmp_path / "drop", contents(finished.once("drop")), HiddenStates.train, []

    def dying(self, *args):
        calls.append(args)
        if len(calls) == 3:
            raise KeyboardInterrupt
        return train(self, *args)

    monkeypatch.setattr(HiddenStates, "train", dying)
    with pytest.raises(KeyboardInterrupt):
        finished("drop", folder)
    file = folder / "block-001.safetensors"
    file.write_bytes(damage(file.read_bytes())) if damage else file.unlink()
    finished("drop", folder)
    assert f"{file}: {'not the file that was written' if damage else 'missing'}" in capsys.readouterr().out
    assert len(calls) == 3 + 4 and contents(folder) == whole


def test_killed_while_the_checkpoint_takes_its_place_it_is_the_same(finished, tokenizer, checkpoint, tmp_path,
                                                                     monkeypatch):
    """Anywhere among its files, with some in a folder of their own, and after the last of them."""
    model = tmp_path / "model"
    shutil.copytree(checkpoint, model)
    (model / "additional_chat_templates").mkdir()
    (model / "additional_chat_templates" / "tool.jinja").write_text("{{ messages }}")
    (model / "chat_template.jinja").write_text("{{ messages }}")
    more = ["--model_name_or_path", str(model), "--steps", "1"]
    whole = contents(finished("drop", tmp_path / "whole", *more))
    assert "additional_chat_templates/tool.jinja" in whole
    replace, unlink, moved = os.replace, Path.unlink, []

    def dying(source, target):
        if ".model" in str(source):
            moved.append(source)
            if len(moved) in (2, 5):
                raise KeyboardInterrupt
        replace(source, target)

    monkeypatch.setattr(os, "replace", dying)
    for _ in range(2):
        with pytest.raises(KeyboardInterrupt):
            finished("drop", tmp_path / "killed", *more)
    monkeypatch.setattr(Path, "unlink", Mock(side_effect=KeyboardInterrupt))
    with pytest.raises(KeyboardInterrupt):
        finished("drop", tmp_path / "killed", *more)
    assert list((tmp_path / "killed").glob("block-*"))
    monkeypatch.setattr(Path, "unlink", unlink)
    finished("drop", tmp_path / "killed", *more)
    assert contents(tmp_path / "killed") == whole


@pytest.mark.parametrize("kind", ["quant", "drop"])
def test_a_model_larger_than_the_device_is_probed_there_block_by_block(finished, tmp_path, monkeypatch, kind):
    run_block, offloaded = Decoder.run_block, []
    monkeypatch.setattr(Decoder, "run_block", lambda self, *arguments: (
        offloaded.append(self.offloaded is not None), run_block(self, *arguments))[1])
    folder = finished(kind, tmp_path / "offloaded", "--cpu_offload_modules")
    assert kind == "drop" or {*offloaded} == {True}      # what is saved of depth is probed once more
    assert contents(folder) == contents(finished.once(kind))


def test_a_folder_of_another_run_is_refused(finished, tmp_path):
    for kind, found in (("quant", "--steps 31"), ("drop", "--steps 31"), ("sparse", "--learning_rate 0.5")):
        with pytest.raises(SystemExit, match=f"holds another build, which differs in {found}"):
            finished(kind, finished.once(kind), *found.split())
    with pytest.raises(SystemExit, match="method sparsegpt"):
        finished("sparse", finished.once("quant"))
    (tmp_path / "notes.txt").touch()
    with pytest.raises(SystemExit, match="is not empty, and not from finish.py; name another folder"):
        finished("drop", tmp_path)


@pytest.mark.parametrize("flags, named", [
    ([], "nothing to finish; give a configuration"),
    (["quant", "--steps", "0"], "--steps 0: must be at least 1"),
    (["quant", "--learning_rate", "0"], "--learning_rate 0: must be above 0"),
    (["quant", "--end_to_end_steps", "-1"], "--end_to_end_steps -1: must be at least 0"),
    (["quant", "--end_to_end_steps", "9", "--cpu_offload_modules"], "--end_to_end_steps 9: trains the whole model on"),
    (["quant", "--batch_size", "99"], "--batch_size 99: takes 99 documents of 32 tokens, more than"),
    (["quant", "--quant_budget", "2.1"], "misses --quant_budget 2.1"),
])
def test_mistakes_end_in_a_sentence_before_the_model_is_loaded(finished, checkpoint, text, tmp_path, monkeypatch, flags,
                                                               named, capsys):
    monkeypatch.setattr(finish, "decoder_of", lambda *args: pytest.fail("the model was loaded"))
    kind, own = (flags[0], flags[1:]) if flags[:1] == ["quant"] else (None, flags)
    with pytest.raises(SystemExit, match=named):
        finish.main(["--model_name_or_path", str(checkpoint), "--calibration_data", text, "--calibration_tokens", "768",
                     "--calibration_sequence_length", "32", *(finished.flags(kind) if kind else ()), "--save_dir",
                     str(tmp_path / "new"), *own])


def test_the_manifest_says_what_it_was_finished_from(finished, databases):
    manifest = json.loads((finished.once("quant") / "manifest.json").read_text())
    assert manifest["flags"]["finished_from"] == Database.open(databases["quant"]).sha256
    assert manifest["flags"]["group_size"] == 16 and manifest["flags"]["steps"] == 30


def test_too_little_memory_ends_in_a_sentence_and_loses_nothing(finished, tmp_path, monkeypatch):
    train, calls = HiddenStates.train, []

    def full(self, *args):
        calls.append(args)
        if len(calls) == 3:
            raise torch.OutOfMemoryError("out of memory: tried to allocate 2 GB")
        return train(self, *args)

    monkeypatch.setattr(HiddenStates, "train", full)
    with pytest.raises(SystemExit, match="tried to allocate 2 GB; to go on, run the same command with a smaller"):
        finished("sparse", tmp_path / "sparse")
    finished("sparse", tmp_path / "sparse", "--microbatch_tokens", "32")
    assert len(calls) == 3 + 4                           # two of six blocks were there
