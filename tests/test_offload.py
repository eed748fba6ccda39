"""Models larger than the device: two blocks at most are on it, and nothing else changes."""
import random
from copy import deepcopy
from types import SimpleNamespace

import pytest
import torch
from transformers import AutoModelForCausalLM

import eval_config
import evo_drop
import evo_quant
import families
from database.levels import LevelSwitcher
from database.store import Database
from families import NUM_BLOCKS
from test_fitness import MICROBATCH_TOKENS, MINIBATCH, documents, drop, random_candidates
from test_hidden_states import Deferred
from utils import offload as offloading
from utils.configs import write_drop_config
from utils.decoder import Decoder
from utils.fitness import Fitness, microbatches
from utils.model import load_decoder

CPU = torch.device("cpu")        # plays the device here: an absent block's weights are unusable all the same
DEVICES = [CPU, *[torch.device("cuda")] * torch.cuda.is_available()]


def buffers(decoder: Decoder) -> list[int]:
    """Bytes of every block, as offloaded."""
    return [buffer.nbytes for buffer in decoder.offloaded._host]


def watch(decoder: Decoder, monkeypatch) -> list[int]:
    """Bytes of the blocks on the device at every run of a block; checks that the weights of the others are nowhere."""
    seen = []
    run_block = decoder.run_block

    def watching(index, *arguments):
        output = run_block(index, *arguments)
        tensors = [tensor for block in decoder.blocks for tensor in block.module.parameters()]
        storages = {tensor.untyped_storage().data_ptr(): tensor.untyped_storage().nbytes() for tensor in tensors}
        assert sum(storages.values()) <= max(buffers(decoder)) + 4 * len(tensors)
        seen.append(decoder.offloaded.bytes_on_device)
        return output

    monkeypatch.setattr(decoder, "run_block", watching)
    return seen


@pytest.mark.parametrize("device", DEVICES, ids=str)
@pytest.mark.parametrize("family", sorted(families.FAMILIES))
def test_walk_is_the_same_with_two_blocks_on_the_device(family, device, monkeypatch):
    model = families.build(family)
    candidates, kinds = random_candidates(6), ("kl", "ppl", "sparse_kl")
    decoder, offloaded = Decoder(deepcopy(model).to(device)), Decoder(model)
    expected = Fitness(decoder, documents(), drop(decoder), microbatch_tokens=MICROBATCH_TOKENS)
    offloaded.offload_blocks(device)
    seen = watch(offloaded, monkeypatch)
    fitness = Fitness(offloaded, documents(), drop(offloaded), microbatch_tokens=MICROBATCH_TOKENS)
    values = fitness.measure(candidates, MINIBATCH, kinds)
    assert values == expected.measure(candidates, MINIBATCH, kinds)
    assert 0 < max(seen) <= 2 * max(buffers(offloaded)) < sum(buffers(offloaded))


def test_the_mask_that_the_head_is_given_moves_with_it():
    """On a GPU the first test here sees it, with OPT, whose positions are made of the mask."""
    decoder, moved = Decoder(families.build("opt")), []
    assert [*decoder._unmasked] == ["attention_mask"]
    decoder._unmasked["attention_mask"] = SimpleNamespace(to=moved.append)
    decoder.offload_blocks(CPU)
    assert moved == [CPU]


def test_a_block_comes_once_for_all_candidates_of_a_microbatch(monkeypatch):
    decoder = Decoder(families.build("llama"))
    decoder.offload_blocks(CPU)
    fitness = Fitness(decoder, documents(), drop(decoder), teacher=False, microbatch_tokens=MICROBATCH_TOKENS)
    fetched = []
    fetch = decoder.offloaded._fetch
    monkeypatch.setattr(decoder.offloaded, "_fetch", lambda index: (
        index in decoder.offloaded._visiting or fetched.append(index), fetch(index)))
    # a block whose attention and MLP are both dropped is the identity, but the next one's turn all the same
    candidates = [tuple((False, (i >> block) & 1 == 1) for block in range(NUM_BLOCKS)) for i in range(2**NUM_BLOCKS)]
    fitness.measure(candidates, MINIBATCH, ("ppl",))
    batches = microbatches(MINIBATCH, MICROBATCH_TOKENS, decoder.packed_rows)
    assert len(batches) > 2
    assert fetched == [*range(NUM_BLOCKS)] * len(batches) + [0]          # one more is under way at the end
    assert fitness.blocks_run == len(batches) * sum(2**i for i in range(1, NUM_BLOCKS + 1))


def test_an_absent_block_can_neither_be_written_nor_used():
    decoder = Decoder(families.build("llama"))
    original = decoder.blocks[2].attn.parameters[0].data.clone()
    decoder.offload_blocks(CPU)
    decoder.bring(0)
    absent = decoder.blocks[2].attn.parameters[0]
    assert absent.shape == original.shape and absent.isnan().all()
    with pytest.raises(RuntimeError, match="single memory location"):
        absent.data.copy_(original)
    decoder.bring(2)
    assert torch.equal(absent, original)
    absent.data.zero_()                                                  # what is written during a visit is forgotten
    decoder.bring(0)
    decoder.bring(2)
    assert torch.equal(absent, original)
    decoder.offloaded.restore()
    assert torch.equal(absent, original)


class Cudart:
    """Stands in for the CUDA runtime: page-locks two buffers and no more."""

    def __init__(self):
        self.pinned: dict[int, int] = {}

    def cudaHostRegister(self, address, num_bytes, flags):
        if len(self.pinned) == 2:
            return 2
        assert address % offloading.PAGE == 0 == num_bytes % offloading.PAGE and flags == 0
        self.pinned[address] = num_bytes
        return 0

    def cudaHostUnregister(self, address):
        del self.pinned[address]

    def cudaGetErrorString(self, error):
        return {2: "out of memory"}[error]

    cudaError = int


def test_pinned_pages_are_a_blocks_own_and_are_given_back_before_their_memory(monkeypatch):
    cudart = Cudart()
    monkeypatch.setattr(torch.cuda, "cudart", lambda: cudart)
    tensors = [torch.arange(5.0), torch.tensor([True]), torch.arange(3), torch.randn(70, 3).bfloat16(), torch.ones(())]
    pages = offloading._pages(sum(offloading._aligned(tensor.nbytes) for tensor in tensors))
    assert pages.nbytes == offloading.PAGE and offloading.pin(pages, CPU) is None and len(cudart.pinned) == 1
    buffer = torch.from_numpy(pages)
    del pages
    views = offloading._views(buffer, tensors)
    for view, tensor in zip(views, tensors):
        view.copy_(tensor)
    del buffer
    assert all(torch.equal(view, tensor) for view, tensor in zip(views, tensors)) and len(cudart.pinned) == 1
    del views, view
    assert not cudart.pinned


def test_memory_that_cannot_be_pinned_is_one_sentence(monkeypatch, capsys):
    cudart, model = Cudart(), families.build("llama")
    monkeypatch.setattr(torch.cuda, "cudart", lambda: cudart)
    monkeypatch.setattr(torch.cuda, "Stream", lambda device: object())
    blocks = families.blocks_of(model)
    weights = [weight.clone() for weight in blocks[3].parameters()]
    launches = []

    def blamed(*arguments, **options):
        launches.append(arguments)
        raise RuntimeError("CUDA error: out of memory")

    monkeypatch.setattr(torch, "zeros", blamed)
    offloaded = offloading.OffloadedBlocks(blocks, SimpleNamespace(type="cuda"))
    printed = capsys.readouterr().out
    assert printed.startswith("--cpu_offload_modules: 0.0 GB of host memory cannot be pinned (out of memory), so")
    assert printed.count("\n") == 1 and len(cudart.pinned) == 2 and len(launches) == 1
    assert all(map(torch.equal, offloaded.original(3), weights))         # what is not pinned is there all the same


# ---- whole searches --------------------------------------------------------------------------------------------------


def search_flags(checkpoint, text, folder, *more: str) -> list[str]:
    return ["--model_name_or_path", checkpoint, "--calibration_data", text, "--calibration_sequence_length", "32",
            "--calibration_tokens", "512", "--initial_tokens", "64", "--initially_generated", "4", "--offspring", "6",
            "--survivors_per_selection", "2", "1", "--tokens_per_selection", "64", "256", "--generations", "2",
            "--microbatch_tokens", "64", "--no_eval", "--output_dir", str(folder), *more]


def test_levels_are_switched_as_without_offloading(checkpoint, text, databases, tmp_path):
    runs = {}
    for offload in ([], ["--cpu_offload_modules"]):
        folder = tmp_path / f"offloaded-{len(offload)}"
        evo_quant.main([*search_flags(checkpoint, text, folder, "--quant_weights_path", str(databases["quant"]),
                                      "--target_bitwidth", "2.5", "--init", "measured"), *offload])
        runs[len(offload)] = [(folder / name).read_bytes()
                              for name in ("log.jsonl", "evo-kl-configuration-2.5.txt")]
    assert runs[0] == runs[1]


def test_levels_are_forgotten_with_the_block_they_were_switched_in(checkpoint, databases):
    opened, rng = Database.open(databases["quant"]), random.Random(0)
    decoder = load_decoder(checkpoint, device="cpu", offload_blocks=True)
    original = {name: decoder.offloaded.original(0)[i].clone() for i, (name, _) in
                enumerate(decoder.blocks[0].module.named_parameters())}
    switcher = LevelSwitcher(decoder, opened, 1.0)
    levels = switcher.states({name: rng.choice(opened.levels(name)) for name in opened.layers})
    name = switcher.names[0][0]
    for _ in range(2):                                                   # twice: the second visit starts anew
        decoder.bring(0)
        assert torch.equal(decoder.layers[name].weight, original[f"{name}.weight".split(".", 3)[3]])
        switcher.set_block(0, levels[0])
        assert torch.equal(decoder.layers[name].weight, opened.weight(name, levels[0][0], dtype=torch.float32))
        decoder.bring(3)
        assert switcher.loaded == {}


def test_a_cache_that_holds_half_the_levels_spares_half_the_reading(checkpoint, databases, monkeypatch):
    opened = Database.open(databases["quant"])
    decoder = load_decoder(checkpoint, device="cpu", offload_blocks=True)
    switcher = LevelSwitcher(decoder, opened, 1.0)
    size = sum(t.nbytes for name in opened.layers for t in opened.packed(name, 3).values())
    switcher.cache.max_bytes = size // 2
    fitness = Fitness(decoder, documents(), switcher.set_block, teacher=False, microbatch_tokens=MICROBATCH_TOKENS)
    candidate = switcher.states(dict.fromkeys(opened.layers, 3))
    fitness.measure([candidate], MINIBATCH, ("ppl",))
    read, packed = [], Database.packed
    monkeypatch.setattr(Database, "packed", lambda self, *rest: read.append(rest) or packed(self, *rest))
    for count in (1, 2):
        fitness.measure([candidate], [(0, 37)], ("ppl",))                # blocks take turns: each once a microbatch
        assert 0.4 < len(read) / count / len(opened.layers) < 0.6


@pytest.mark.parametrize("kind", ["quant", "sparse"])
def test_levels_that_travel_beside_the_computations_arrive_whole(kind, checkpoint, databases):
    opened, rng = Database.open(databases[kind]), random.Random(0)
    decoder = load_decoder(checkpoint, device="cpu", offload_blocks=True)
    switcher = LevelSwitcher(decoder, opened, 0.0)
    fitness = Fitness(decoder, documents(), switcher.set_block, teacher=False, microbatch_tokens=MICROBATCH_TOKENS)
    candidates = [switcher.states({name: rng.choice(opened.levels(name)) for name in opened.layers}) for _ in range(3)]
    expected = fitness.measure(candidates, MINIBATCH, ("ppl",))
    switcher.cache._side = Deferred(CPU)
    before = switcher.switches
    assert fitness.measure(candidates, MINIBATCH, ("ppl",)) == expected
    parts = {"quant": 3, "sparse": 2}[kind]
    assert switcher.cache._side.copied == parts * (switcher.switches - before) > 100


def test_a_configuration_is_evaluated_as_without_offloading(checkpoint, text, databases, tmp_path, monkeypatch):
    offload_blocks, offloads = Decoder.offload_blocks, []

    def recording(self, device):
        offloads.append(device)
        return offload_blocks(self, device)

    monkeypatch.setattr(Decoder, "offload_blocks", recording)
    drop_config = tmp_path / "drop.txt"
    write_drop_config(drop_config, [(i == 1, i == 2) for i in range(6)])
    flags = ["--model_name_or_path", checkpoint, "--eval_datasets", text, "--eval_tokens", "512",
             "--eval_sequence_length", "32", "--microbatch_tokens", "64",
             "--quant_weights_path", str(databases["quant"]),
             "--quant_config_path", "3", "--drop_config", str(drop_config)]
    plain, offloaded = (eval_config.main([*flags, *more]) for more in ([], ["--cpu_offload_modules"]))
    assert len(offloads) == 1 and plain == offloaded and plain["compressed"][text]["kl"] > 0.01
    with pytest.raises(SystemExit, match="^error: --cpu_offload_modules: --tasks run the whole model at once"):
        eval_config.main([*flags, "--cpu_offload_modules", "--tasks", "piqa"])


def test_dropped_model_is_saved_whole(checkpoint, text, tmp_path):
    for offload in ([], ["--cpu_offload_modules"]):
        evo_drop.main([*search_flags(checkpoint, text, tmp_path / f"run-{len(offload)}", "--sparsity", "0.5",
                                     "--save_dir", str(tmp_path / f"model-{len(offload)}")), *offload])
    plain, offloaded = (AutoModelForCausalLM.from_pretrained(tmp_path / f"model-{i}").state_dict() for i in (0, 1))
    assert plain.keys() == offloaded.keys()
    assert all(torch.equal(plain[name], offloaded[name]) for name in plain)
    assert (tmp_path / "run-0" / "log.jsonl").read_bytes() == (tmp_path / "run-1" / "log.jsonl").read_bytes()
