"""eval_config.py: lm-eval on compressed models equals the harness on the same weights; skipped attentions generate."""
import inspect
import json
import textwrap

import lm_eval
import pytest
import torch
from lm_eval.models.huggingface import HFLM
from lm_eval.tasks import TaskManager
from lm_eval.tasks import manager as harness_manager
from tokenizers import Tokenizer
from transformers import PreTrainedTokenizerFast

import eval_config
import export
import families
from database.store import Database
from utils.configs import write_drop_config, write_level_config
from utils.decoder import Decoder
from utils.model import load_decoder
from utils.tasks import average_accuracy

DROPPED = [(True, False), (False, True), (True, True), (False, False), (True, False), (False, False)]
TASKS = "choice,rolling"


@pytest.fixture(scope="session")
def tasks(tmp_path_factory):
    """Folder of a multiple-choice and a perplexity task in YAML, with their data."""
    folder = tmp_path_factory.mktemp("tasks")
    words = textwrap.__doc__.split() + inspect.getdoc(textwrap.wrap).split() + inspect.getdoc(textwrap.fill).split()
    rows = {"choice": [{"question": " ".join(words[i:i + 6]), "choices": [words[i + 6], words[i + 1], words[-i - 1]],
                        "answer": i % 3} for i in range(24)],
            "rolling": [{"text": inspect.getdoc(f)} for f in (textwrap.wrap, textwrap.dedent, textwrap.fill)],
            "writing": [{"text": " ".join(words[i:i + length])} for i, length in ((0, 3), (9, 12))]}
    rows |= {name: rows["choice"][start::3] for start, name in enumerate(("one", "two", "three"))}
    own = {"choice": "output_type: multiple_choice\ndoc_to_text: '{{question}}'\ndoc_to_choice: '{{choices}}'\n"
                     "doc_to_target: answer\nmetric_list: [{metric: acc}, {metric: acc_norm}]\n",
           "rolling": "output_type: loglikelihood_rolling\ndoc_to_text: ''\ndoc_to_target: '{{text}}'\n"
                      "metric_list: [{metric: word_perplexity}, {metric: byte_perplexity}]\n",
           "writing": "output_type: generate_until\ndoc_to_text: '{{text}}'\ndoc_to_target: '{{text}}'\n"
                      "generation_kwargs: {until: ['.'], max_gen_toks: 8}\nmetric_list: [{metric: exact_match}]\n"}
    own |= dict.fromkeys(("one", "two", "three"), own["choice"])
    for group, members, mean in (("many", "[one, few]", True), ("few", "[two, three]", True),
                                 ("several", "[one, two]", False)):
        (folder / f"{group}.yaml").write_text(f"group: {group}\ntask: {members}\n" + (
            "aggregate_metric_list: [{metric: acc, weight_by_size: true}]\n" if mean else ""))
    for name, lines in rows.items():
        data = folder / f"{name}.jsonl"
        data.write_text("".join(json.dumps(row) + "\n" for row in lines))
        (folder / f"{name}.yaml").write_text(
            f"task: {name}\ndataset_path: json\ndataset_kwargs: {{data_files: {{validation: {data}}}}}\n"
            f"validation_split: validation\nfewshot_split: validation\n{own[name]}")
    return folder


def harness(folder, tasks, **options) -> dict:
    """{task: metrics} of the checkpoint in `folder`, which the harness loads by itself."""
    model = HFLM(pretrained=str(folder), dtype="float32", device="cpu", batch_size=8)
    return lm_eval.simple_evaluate(model, tasks=TASKS.split(","), log_samples=False,
                                   task_manager=TaskManager(include_path=str(tasks), include_defaults=False),
                                   **options)["results"]


def ours(checkpoint, tasks, *more: str) -> dict:
    return eval_config.main(["--model_name_or_path", str(checkpoint), "--tasks", TASKS, "--include_path", str(tasks),
                             "--no_perplexity", "--batch_size", "8", *more])


def check_same(results, expected) -> None:
    for task, metric in (("choice", "acc,none"), ("choice", "acc_norm,none"), ("rolling", "word_perplexity,none"),
                         ("rolling", "byte_perplexity,none")):
        assert results["tasks"][task][metric] == pytest.approx(expected[task][metric], rel=1e-5), (task, metric)


@pytest.fixture(scope="session")
def dense(checkpoint, tasks):
    return harness(checkpoint, tasks)


# ---- tasks -----------------------------------------------------------------------------------------------------------


def test_tasks_on_the_dense_model_give_what_the_harness_gives(checkpoint, tasks, dense, tmp_path, capsys):
    results = ours(checkpoint, tasks, "--output", str(tmp_path / "results.json"))
    check_same(results, dense)
    assert results["average_accuracy"] == pytest.approx(100 * dense["choice"]["acc,none"])
    assert json.loads((tmp_path / "results.json").read_text()) == results
    header, _, row = capsys.readouterr().out.strip().splitlines()[-3:]
    assert [cell.strip() for cell in header.split("|")[2:-1]] == ["choice", "rolling", "average accuracy"]
    assert row.split("|")[1].strip() == "dense" and f"{results['average_accuracy']:.2f}" in row


@pytest.mark.parametrize("named, shown", [
    ("choice,many", ["choice", "many"]), ("several", ["one", "two"])])
def test_a_group_counts_once_in_the_average(checkpoint, tasks, named, shown):
    results = ours(checkpoint, tasks, "--tasks", named)
    accuracy = {task: metrics["acc,none"] for task, metrics in results["tasks"].items() if "acc,none" in metrics}
    assert sorted(accuracy) == sorted(shown)
    assert results["average_accuracy"] == pytest.approx(100 * sum(accuracy.values()) / len(shown))
    if "choice" in shown:                # whose questions are the group's
        assert accuracy["many"] == pytest.approx(accuracy["choice"])


def test_limit_and_few_shot_are_those_of_the_harness(checkpoint, tasks):
    expected = harness(checkpoint, tasks, limit=10, num_fewshot=2)
    check_same(ours(checkpoint, tasks, "--limit", "10", "--num_fewshot", "2"), expected)


def save_copy(checkpoint, tokenizer, folder, change) -> str:
    """A dense checkpoint of the model after `change(model)`."""
    model = load_decoder(str(checkpoint), dtype="float32", device="cpu").model
    model = change(model) or model
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return str(folder)


def test_tasks_on_a_drop_configuration_equal_the_harness_on_zeroed_weights(checkpoint, tokenizer, tasks, dense,
                                                                           tmp_path):
    write_drop_config(tmp_path / "drop.txt", DROPPED)
    folder = save_copy(checkpoint, tokenizer, tmp_path / "dense", lambda model: families.dropped_copy(model, DROPPED))
    results = ours(checkpoint, tasks, "--drop_config", str(tmp_path / "drop.txt"))
    check_same(results, harness(folder, tasks))
    assert results["tasks"]["rolling"] != dense["rolling"]


def test_tasks_run_with_a_tokenizer_that_has_neither_bos_nor_eos(checkpoint, tokenizer, tasks, tmp_path, capsys):
    plain = PreTrainedTokenizerFast(tokenizer_object=Tokenizer.from_str(tokenizer.backend_tokenizer.to_str()))
    plain.backend_tokenizer.post_processor = None
    folder = save_copy(checkpoint, plain, tmp_path / "plain", lambda model: None)
    results = ours(folder, tasks, "--tasks", f"{TASKS},writing")
    assert 0 <= results["tasks"]["choice"]["acc,none"] <= 1 and "exact_match,none" in results["tasks"]["writing"]
    assert results["tasks"]["rolling"]["byte_perplexity,none"] < 1e3
    assert "no BOS and no EOS token: a text without context is scored after token 1 " in capsys.readouterr().out


@pytest.mark.parametrize("kind, uniform", [("sparse", None), ("quant", None), ("sparse", 2), ("quant", 3)])
def test_tasks_on_levels_equal_the_harness_on_the_same_weights(
        checkpoint, tokenizer, databases, tasks, dense, tmp_path, kind, uniform):
    database = Database.open(databases[kind])
    levels = {name: database.levels(name)[i % 3] if uniform is None else uniform
              for i, name in enumerate(database.layers)}
    write_level_config(tmp_path / "levels.txt", levels)

    def compress(model):
        for name, level in levels.items():
            model.get_submodule(name).weight.data.copy_(database.weight(name, level, torch.device("cpu")))

    folder = save_copy(checkpoint, tokenizer, tmp_path / "dense", compress)
    results = ours(checkpoint, tasks, f"--{kind}_weights_path", str(databases[kind]), f"--{kind}_config_path",
                   str(tmp_path / "levels.txt" if uniform is None else uniform))
    check_same(results, harness(folder, tasks))
    assert results["tasks"]["rolling"] != dense["rolling"]


def test_perplexities_and_tasks_of_one_run_are_those_of_two(checkpoint, tasks, tmp_path):
    write_drop_config(tmp_path / "drop.txt", DROPPED)
    text = ["--eval_datasets", "stdlib", "--eval_tokens", "512", "--eval_sequence_length", "32"]
    drop = ["--drop_config", str(tmp_path / "drop.txt")]
    perplexities = eval_config.main(["--model_name_or_path", str(checkpoint), *text, *drop])
    both = eval_config.main(["--model_name_or_path", str(checkpoint), *text, *drop, "--tasks", TASKS,
                             "--batch_size", "8", "--include_path", str(tasks)])
    assert both == perplexities | ours(checkpoint, tasks, *drop)
    assert set(perplexities) == {"dense", "compressed"}


def test_average_is_over_the_tasks_that_have_an_accuracy():
    results = {"a": {"acc,none": 0.5, "acc_norm,none": 0.9}, "b": {"acc,none": 0.25},
               "c": {"word_perplexity,none": 9.0}}
    assert average_accuracy(results) == pytest.approx(37.5)
    assert average_accuracy({"c": results["c"]}) is None


@pytest.mark.parametrize("more, sentence", [
    (["--tasks", "choise"], "--tasks choise: no such task; did you mean choice"),
    (["--tasks", "broken"], "--tasks broken: its data cannot be loaded"),
    (["--tasks", "many,two"], "--tasks many,two: Duplicate task 'two'.*; leave out one of them"),
    (["--num_fewshot", "-1"], "--num_fewshot -1: must be 0 or more"),
    (["--batch_size", "0"], "--batch_size 0: must be auto or at least 1"),
    (["--limit", "0"], "--limit 0: must be above 0"),
    (["--include_path", "nowhere"], "--include_path nowhere: is not a folder"),
    (["--tasks", ""], "--no_perplexity: leaves nothing to evaluate"),
    (["--quant_budget", "2.5"], "--quant_budget 2.5: there is no quant configuration to hold to it"),
    (["--drop_budget", "0.25"], "--drop_budget 0.25: there is no drop configuration to hold to it"),
])
def test_bad_input_ends_in_one_sentence_before_the_model_is_loaded(checkpoint, tasks, tmp_path, monkeypatch, more,
                                                                   sentence):
    monkeypatch.setattr(harness_manager, "__file__", str(tmp_path / "none" / "manager.py"))    # 14,000 files to read
    (tmp_path / "none").mkdir()
    monkeypatch.setattr("utils.inputs.load_decoder", None)
    (tmp_path / "tasks").mkdir()
    for file in tasks.iterdir():
        (tmp_path / "tasks" / file.name).write_text(file.read_text())
    broken = (tasks / "choice.yaml").read_text().replace("choice.jsonl", "gone.jsonl")
    (tmp_path / "tasks" / "broken.yaml").write_text(broken.replace("task: choice", "task: broken"))
    with pytest.raises(SystemExit, match=sentence):
        ours(checkpoint, tmp_path / "tasks", *more)


@pytest.mark.parametrize("flag, value", [("eval_tokens", 0), ("eval_sequence_length", 1), ("microbatch_tokens", 0)])
def test_evaluation_that_makes_no_sense_is_refused(checkpoint, flag, value, monkeypatch):
    monkeypatch.setattr("utils.inputs.load_decoder", None)
    with pytest.raises(SystemExit, match=f"--{flag} {value}: must be at least"):
        eval_config.main(["--model_name_or_path", str(checkpoint), "--eval_datasets", "stdlib", f"--{flag}",
                          str(value)])


# ---- generation with a cache -----------------------------------------------------------------------------------------

SKIPPING = {"first attention": [(True, False), (False, True), (True, True), (False, False)],
            "every other attention": [(True, False), (False, False)] * 2,
            "all attentions": [(True, False)] * 4}


@pytest.mark.parametrize("states", SKIPPING.values(), ids=SKIPPING)
@pytest.mark.parametrize("family", families.FAMILIES)
@torch.no_grad()
def test_skipped_attentions_generate_with_a_cache_as_zeroed_ones_do(family, states):
    model = families.build(family)
    zeroed = families.dropped_copy(model, states)
    for block, state in zip(Decoder(model).blocks, states):
        block.drop(*state)
    tokens = torch.randint(3, families.VOCABULARY, (2, 20), generator=torch.Generator().manual_seed(0))

    caches = [m(input_ids=tokens[:, :12], use_cache=True).past_key_values for m in (model, zeroed)]
    logits = [m(input_ids=tokens[:, 12:], past_key_values=cache).logits for m, cache in zip((model, zeroed), caches)]
    assert torch.allclose(*logits, atol=1e-4)

    mask = torch.ones_like(tokens)
    mask[0, :7] = 0                                          # the first prompt is shorter, padded on the left
    options = dict(attention_mask=mask, max_new_tokens=8, do_sample=False, use_cache=True, pad_token_id=0,
                   eos_token_id=None, output_logits=True, return_dict_in_generate=True)
    generated, expected = (m.generate(tokens, **options) for m in (model, zeroed))
    assert torch.equal(generated.sequences, expected.sequences)
    assert torch.allclose(torch.stack(generated.logits), torch.stack(expected.logits), atol=1e-4)


def test_what_is_no_checkpoint_is_refused_by_its_flag(checkpoint, text, databases, tmp_path):
    model = ["--model_name_or_path", str(checkpoint), "--eval_datasets", text]
    with pytest.raises(SystemExit, match="--checkpoint .*: is a database; give it as --quant_weights_path or"):
        eval_config.main([*model, "--checkpoint", str(databases["quant"])])
    with pytest.raises(SystemExit, match="error: --checkpoint .*none: cannot be loaded"):
        eval_config.main([*model, "--checkpoint", str(tmp_path / "none")])


def test_a_checkpoint_is_measured_as_the_configuration_it_was_exported_from(checkpoint, text, tmp_path):
    write_drop_config(tmp_path / "drop.txt", DROPPED)
    model = ["--model_name_or_path", str(checkpoint)]
    export.main([*model, "--drop_config", str(tmp_path / "drop.txt"), "--save_dir", str(tmp_path / "out")])
    evaluation = [*model, "--eval_datasets", text, "--eval_tokens", "512", "--eval_sequence_length", "32"]
    found, expected = (eval_config.main([*evaluation, *flags])["compressed"][text] for flags in (
        ["--checkpoint", str(tmp_path / "out")], ["--drop_config", str(tmp_path / "drop.txt")]))
    assert found["kl"] == pytest.approx(expected["kl"], rel=1e-5) and found["kl"] > 0.01
    assert found["ppl"] == pytest.approx(expected["ppl"], rel=1e-5)


def test_a_checkpoint_of_another_vocabulary_is_refused(checkpoint, text, tokenizer, tmp_path):
    families.build("llama", vocab_size=len(tokenizer) + 8, num_hidden_layers=1).save_pretrained(tmp_path)
    with pytest.raises(SystemExit, match="its vocabulary has .* give a checkpoint that was made from this model"):
        eval_config.main(["--model_name_or_path", str(checkpoint), "--eval_datasets", text, "--eval_tokens", "512",
                          "--eval_sequence_length", "32", "--checkpoint", str(tmp_path)])
