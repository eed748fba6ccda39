"""OWL and dynamic programming against their formulas written out on whole models, and against enumeration."""
import itertools
import math
from types import SimpleNamespace

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

import families
from baselines import dp, owl
from database import gptq, sparsegpt
from database.store import Database
from utils.configs import read_level_config
from utils.data import calibration_documents
from utils.decoder import Decoder

SHORT = ["--calibration_data", "stdlib", "--calibration_sequence_length", "40"]


# ---- models and databases --------------------------------------------------------------------------------------------


def plain_model(checkpoint, num_tokens):
    """The checkpoint and the documents that the flags of SHORT stand for."""
    tokenizer = AutoTokenizer.from_pretrained(checkpoint)
    return (AutoModelForCausalLM.from_pretrained(checkpoint).eval(),
            calibration_documents("stdlib", tokenizer, num_tokens, 40))


def at_levels(checkpoint, database, levels):
    """The model with some layers at a level, as a plain dense model."""
    model = AutoModelForCausalLM.from_pretrained(checkpoint).eval()
    for name, level in levels.items():
        model.get_submodule(name).weight.data.copy_(database.weight(name, level))
    return model


def build_database(builder, folder, checkpoint, *flags):
    builder.main(builder.make_parser().parse_args(["--model_name_or_path", checkpoint, *SHORT, "--calibration_tokens",
                                                   "400", "--save_dir", str(folder), *flags]))
    return Database.open(folder)


@pytest.fixture(scope="session")
def sparse_database(tmp_path_factory, checkpoint):
    """All layers of all blocks."""
    return build_database(sparsegpt, tmp_path_factory.mktemp("sparse"), checkpoint, "--sparsity", "0.5",
                          "--num_levels", "6", "--weights_diff", "64")


FOUR_LAYERS = r".*layers\.[14].*(k_proj|down_proj)$"     # of 512 and 1,536 weights: few enough to enumerate


@pytest.fixture(scope="session")
def small_sparse_database(tmp_path_factory, checkpoint):
    return build_database(sparsegpt, tmp_path_factory.mktemp("small_sparse"), checkpoint, "--sparsity", "0.5",
                          "--num_levels", "3", "--weights_diff", "100", "--prunable_modules", FOUR_LAYERS)


@pytest.fixture(scope="session")
def small_quant_database(tmp_path_factory, checkpoint):
    return build_database(gptq, tmp_path_factory.mktemp("small_quant"), checkpoint, "--group_size", "16",
                          "--perchannel", "--quantizable_modules", FOUR_LAYERS)


# ---- OWL -------------------------------------------------------------------------------------------------------------


def plain_owl_scores(model, documents):
    """|W_ij| ‖X_j‖₂ of all weights of every block, from the inputs that hooks see."""
    inputs, hooks = {}, []
    for layer in model.modules():
        if isinstance(layer, torch.nn.Linear):
            hooks.append(layer.register_forward_pre_hook(
                lambda module, args: inputs.setdefault(module, []).append(args[0][0].double())))
    families.plain_logits(model, documents)
    for hook in hooks:
        hook.remove()
    return [torch.cat([(layer.weight.double().abs() * torch.cat(inputs[layer]).norm(dim=0)).flatten()
                       for layer in block.modules() if layer in inputs]) for block in families.blocks_of(model)]


def plain_owl_sparsities(block_scores, sparsity, spread, m):
    """OWL's sparsity of every block of equal size."""
    shares = torch.stack([(scores > m * scores.mean()).double().mean() for scores in block_scores])
    density = (shares - shares.min()) / (shares.max() - shares.min()) * 2 * spread
    return (1 - (density - density.mean() + 1 - sparsity)).tolist()


def test_owl_counts_every_token_once_where_memory_runs_out(checkpoint, sparse_database, tmp_path, monkeypatch):
    run_block, loaded, runs = Decoder.run_block, owl.decoder_of, []

    def dying(self, *arguments):
        runs.append(None)
        if len(runs) == 8:                               # of six blocks, in the second microbatch
            raise torch.OutOfMemoryError("CUDA out of memory")
        return run_block(self, *arguments)

    def run(folder: str) -> dict:
        return owl.main(["--model_name_or_path", checkpoint, *SHORT, "--calibration_tokens", "200",
                         "--microbatch_tokens", "128", "--sparse_weights_path", str(sparse_database.path),
                         "--owl_lambda", "0.1", "--owl_m", "2", "--save_dir", str(tmp_path / folder)])["outliers"]["2"]

    whole = run("whole")
    monkeypatch.setattr(owl, "decoder_of", lambda args: (loaded(args), monkeypatch.setattr(
        Decoder, "run_block", dying))[0])                # which runs blocks, too
    assert run("again") == pytest.approx(whole, abs=1e-4) and len(runs) > 8


def test_owl_follows_the_share_of_outliers_and_keeps_the_average_exactly(checkpoint, sparse_database, tmp_path):
    result = owl.main(["--model_name_or_path", checkpoint, *SHORT, "--calibration_tokens", "200",
                       "--sparse_weights_path", str(sparse_database.path), "--owl_lambda", "0.02", "0.1",
                       "--owl_m", "3", "5", "--select_by", "kl", "--save_dir", str(tmp_path)])
    model, documents = plain_model(checkpoint, 200)
    block_scores = plain_owl_scores(model, documents)
    names = sparse_database.layers
    kept_uniform = sum(sparse_database.kept(name, 0) for name in names)
    sizes = {name: math.prod(sparse_database.shape(name)) for name in names}
    divergences = {}
    for spread, m in itertools.product((0.02, 0.1), (3, 5)):
        expected = plain_owl_sparsities(block_scores, 0.5, spread, m)
        point = next(point for point in result["grid"] if (point["lambda"], point["m"]) == (spread, m))
        assert point["asked"] == pytest.approx(expected, abs=1e-6)
        assert max(expected) - min(expected) == pytest.approx(2 * spread)
        levels = read_level_config(tmp_path / f"owl-{spread:g}-{m}.txt")
        assert sorted(levels) == sorted(names)
        assert sum(sparse_database.kept(name, level) for name, level in levels.items()) == kept_uniform
        for name, level in levels.items():           # a step is 64 weights; the exact average may move one level
            sparsity = expected[int(name.split(".")[2])]
            assert abs(sparse_database.kept(name, level) - (1 - sparsity) * sizes[name]) <= 64
        divergences[f"owl-{spread:g}-{m}.txt"] = point["kl"]

    best = min(divergences, key=divergences.get)
    assert result["best"] == best
    assert read_level_config(tmp_path / "owl.txt") == read_level_config(tmp_path / best)
    compressed = at_levels(checkpoint, sparse_database, read_level_config(tmp_path / best))
    plain = families.plain_values(families.plain_logits(model, documents),
                                  families.plain_logits(compressed, documents), documents)
    assert divergences[best] == pytest.approx(plain["kl"], rel=1e-3)


def test_owl_reports_layers_whose_levels_do_not_reach(small_sparse_database):
    names = small_sparse_database.layers
    levels, beyond = owl.nearest_levels(small_sparse_database, dict(zip(names, (0.5, 0.95, 0.5, 0.1))))
    assert beyond == 2
    assert sum(levels.values()) == 0


def test_owl_with_equal_shares_is_uniform():
    assert owl.block_sparsities([0.01, 0.01], [10, 30], 0.6, 0.1) == [0.6, 0.6]
    low, high = owl.block_sparsities([0.02, 0.01], [10, 30], 0.6, 0.1)
    assert high - low == pytest.approx(0.2) and (10 * low + 30 * high) / 40 == pytest.approx(0.6)


# ---- dynamic programming ---------------------------------------------------------------------------------------------


def best_by_enumeration(database, errors, cost, meets):
    """Levels with the least sum of errors among all combinations whose total cost `meets` the budget."""
    combinations = itertools.product(*[database.levels(name) for name in database.layers])
    return min((dict(zip(database.layers, levels)) for levels in combinations
                if meets(sum(cost(name, level) for name, level in zip(database.layers, levels)))),
               key=lambda levels: sum(errors[name][level] for name, level in levels.items()))


def test_dp_for_bits_is_the_best_of_all_combinations_never_above_the_target(checkpoint, small_quant_database, tmp_path):
    database = small_quant_database
    targets = ["2.25", "2.5371", "3", "4"]
    flags = ["--model_name_or_path", checkpoint, "--quant_weights_path", str(database.path), "--save_dir",
             str(tmp_path)]
    dp.main([*flags, "--target_bitwidth", *targets])
    errors = {name: {level: database.error(name, level) for level in database.levels(name)} for name in database.layers}
    weights = sum(math.prod(database.shape(name)) for name in database.layers)
    for target in targets:
        expected = best_by_enumeration(database, errors, database.bits, lambda bits: bits <= float(target) * weights)
        assert read_level_config(tmp_path / f"dp-manifest-{target}.txt") == expected

    dp.main([*flags, "--target_bitwidth", "5.4", "--count_overhead"])
    expected = best_by_enumeration(database, errors, lambda name, level: database.bits(name, level, overhead=True),
                                   lambda bits: bits <= 5.4 * weights)
    assert read_level_config(tmp_path / "dp-manifest-5.4.txt") == expected


def test_dp_for_sparsity_keeps_exactly_what_level_0_does_or_just_reaches_the_target(checkpoint, small_sparse_database,
                                                                                   tmp_path):
    database = small_sparse_database
    flags = ["--model_name_or_path", checkpoint, "--sparse_weights_path", str(database.path), "--save_dir",
             str(tmp_path)]
    dp.main(flags)
    dp.main([*flags, "--target_sparsity", "0.52", "0.47"])
    errors = {name: {level: database.error(name, level) for level in database.levels(name)} for name in database.layers}
    weights = sum(math.prod(database.shape(name)) for name in database.layers)
    uniform = sum(database.kept(name, 0) for name in database.layers)
    for file, meets in (("0.5", lambda kept: kept == uniform),
                        ("0.52", lambda kept: 0.48 * weights - 100 < kept <= 0.48 * weights),
                        ("0.47", lambda kept: 0.53 * weights - 100 < kept <= 0.53 * weights)):
        expected = best_by_enumeration(database, errors, database.kept, meets)
        assert read_level_config(tmp_path / f"dp-manifest-{file}.txt") == expected


def test_dp_for_sparsity_meets_the_budget_even_where_pruning_more_seems_better(small_sparse_database):
    """Measured errors are noisy: they need not grow with sparsity."""
    database = small_sparse_database
    errors = {name: {level: 5.0 - level for level in database.levels(name)} for name in database.layers}
    assert sum(dp.solve(database, errors, None).values()) == 0


@pytest.mark.parametrize("kind", ["sparse", "quant"])
def test_dp_over_measured_divergences(kind, checkpoint, small_sparse_database, small_quant_database, tmp_path):
    database = small_sparse_database if kind == "sparse" else small_quant_database
    flags = ["--target_sparsity", "0.49"] if kind == "sparse" else ["--target_bitwidth", "2.6"]
    result = dp.main(["--model_name_or_path", checkpoint, f"--{kind}_weights_path", str(database.path), *SHORT,
                      "--calibration_tokens", "120", "--errors", "kl", *flags, "--save_dir", str(tmp_path)])
    model, documents = plain_model(checkpoint, 120)
    logits = families.plain_logits(model, documents)
    for name in database.layers:
        for level in database.levels(name):
            alone = families.plain_logits(at_levels(checkpoint, database, {name: level}), documents)
            plain = families.plain_values(logits, alone, documents)["kl"]
            assert result["errors"][name][level] == pytest.approx(plain, rel=1e-3, abs=1e-7)
    weights = sum(math.prod(database.shape(name)) for name in database.layers)
    cost, meets = ((database.kept, lambda kept: 0.51 * weights - 100 < kept <= 0.51 * weights) if kind == "sparse" else
                   (database.bits, lambda bits: bits <= 2.6 * weights))
    expected = best_by_enumeration(database, result["errors"], cost, meets)
    assert read_level_config(tmp_path / result["solutions"][0]["file"]) == expected


def test_measured_levels_are_the_grid_within_what_a_layer_has():
    assert dp.levels_to_measure([-8, -4, -1, 0, 2, 4, 8], [-8, 0, 8]) == [-8, 0, 8]
    assert dp.levels_to_measure([-3, -2, -1, 0, 1, 2], [-8, -4, 0, 4, 8]) == [-3, 0, 2]
    assert dp.levels_to_measure([2, 3, 4, 5, 6], [2, 3, 4, 5]) == [2, 3, 4, 5]
    assert dp.levels_to_measure([3], [2, 3]) == [3]
    with pytest.raises(ValueError, match="--measured_levels 3: 1 of a layer's levels 2 3 4"):
        dp.levels_to_measure([2, 3, 4], [3])


# ---- bad input -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind, flags, message", [
    ("quant", [], "--quant_weights_path: its budget is --target_bitwidth"),
    ("quant", ["--target_bitwidth", "7"], "--target_bitwidth 7.0: the database's levels allow averages from 2 to 6"),
    ("quant", ["--target_bitwidth", "nan"], "--target_bitwidth nan: an average of 0 or more"),
    ("sparse", ["--target_bitwidth", "3"], "--sparse_weights_path: its budget is --target_sparsity"),
    ("sparse", ["--target_sparsity", "0.99"], "--target_sparsity 0.99: the database's levels allow averages from 0."),
    ("sparse", ["--measured_levels", "0", "1"], "--measured_levels 0 1: nothing is measured; add --errors kl"),
])
def test_dp_refuses_bad_flags_in_one_sentence(kind, flags, message, checkpoint, small_sparse_database,
                                              small_quant_database, tmp_path):
    database = small_sparse_database if kind == "sparse" else small_quant_database
    with pytest.raises(SystemExit) as stop:
        dp.main(["--model_name_or_path", checkpoint, f"--{kind}_weights_path", str(database.path), *flags, "--save_dir",
                 str(tmp_path)])
    assert str(stop.value).startswith(f"error: {message}")


def test_a_target_is_asked_for_where_levels_have_no_zero():
    database = SimpleNamespace(method="sparsegpt", path="db", layers=["a"], shape=lambda name: (4, 4),
                               levels=lambda name: [1], kept=lambda name, level: 7)
    with pytest.raises(ValueError, match="--target_sparsity: db has layers without level 0, .*; give one"):
        dp.solve(database, {"a": {1: 0.5}}, None)
    assert dp.solve(database, {"a": {1: 0.5}}, 9 / 16) == {"a": 1}


def test_owl_refuses_a_database_of_bits_and_a_range_of_nothing(checkpoint, small_quant_database, tmp_path):
    flags = ["--model_name_or_path", checkpoint, "--calibration_data", "stdlib", "--sparse_weights_path",
             str(small_quant_database.path), "--save_dir", str(tmp_path)]
    with pytest.raises(SystemExit, match="holds gptq levels; build one with python -m database.sparsegpt"):
        owl.main(flags)
    with pytest.raises(SystemExit, match="--owl_lambda 0: must be above 0"):
        owl.main([*flags, "--owl_lambda", "0"])
