"""Hidden states that travel beside the computations, or live in files, are those that stay where they are."""
import errno
import os
import re

import pytest
import torch

import families
from database import gptq, hessian, hidden_states, sparsegpt
from database.hessian import Calibration
from database.hidden_states import HiddenStates, Transfers
from test_database_hessian import make_documents
from utils.decoder import Decoder


class Deferred:
    """Stands in for a side stream where there is no GPU: a copy is made when somebody waits for it, and not before."""

    def __init__(self, device):
        self.queue, self.most, self.copied = [], 0, 0

    def host_buffer(self, elements, dtype):
        return self.device_buffer(torch.empty(elements, dtype=dtype))

    def device_buffer(self, like):
        return torch.full_like(like, torch.nan if like.is_floating_point() else 0)

    def copy(self, destination, source, computed=False):
        stream = self

        class Event:
            def synchronize(self):
                while self in stream.queue:
                    stream.queue.pop(0).run()

            def run(self):
                stream.copied += 1
                destination.copy_(source)

        self.queue.append(Event())
        self.most = max(self.most, len(self.queue))
        return self.queue[-1]

    def let_wait(self, tensor, event):
        event.synchronize()


@pytest.fixture
def beside(monkeypatch):
    """All hidden states take the way over the side stream; beside[0] is that of the last calibration."""
    streams, allocate = [], HiddenStates._allocate
    monkeypatch.setattr(hidden_states, "SideStream", lambda device: streams.append(Deferred(device)) or streams[-1])

    def allocate_and_travel(self, like):
        if not self._transfers:
            self._transfers = Transfers(self.device, self._largest * like.shape[-1], like.dtype)
        return allocate(self, like)

    monkeypatch.setattr(HiddenStates, "_allocate", allocate_and_travel)
    return streams


def hessians(**options):
    decoder = Decoder(families.build("llama"))
    calibration = Calibration(decoder, make_documents((40, 17, 23, 40, 9, 40, 40, 31)), decoder.device, 40, **options)
    return {name: value for block in decoder.blocks for name, value in calibration.measure(block.layers, True).items()}


def test_what_travels_beside_the_computations_arrives_whole(monkeypatch, request):
    monkeypatch.setattr(hessian, "CHUNKS", 2)                            # of several microbatches each
    expected = hessians()
    streams = request.getfixturevalue("beside")
    travelled = hessians()
    assert all(torch.equal(travelled[name], expected[name]) for name in expected)
    assert streams[0].copied > 20 and streams[0].most > 1               # and something was under way meanwhile


def test_arrivals_are_begun_one_ahead(monkeypatch):
    monkeypatch.setattr(hidden_states, "SideStream", Deferred)
    sources = [torch.full((2, 3), float(i)) for i in range(5)]
    transfers = Transfers(torch.device("cpu"), 6, torch.float32)
    for i, arrived in enumerate(transfers.arrivals(sources)):
        assert torch.equal(arrived, sources[i]) and len(transfers._side.queue) == (i < 4)


@pytest.mark.parametrize("fails_at", [3, 9])
def test_a_chunk_that_does_not_fit_is_begun_again(fails_at, monkeypatch, request, capsys):
    monkeypatch.setattr(hessian, "CHUNKS", 2)
    run_block, calls = Decoder.run_block, []

    def failing(self, *arguments):
        calls.append(arguments)
        if len(calls) == fails_at:
            raise torch.OutOfMemoryError("CUDA out of memory")
        return run_block(self, *arguments)

    def found():
        calls.clear()
        decoder = Decoder(families.build("llama"))
        calibration = Calibration(decoder, make_documents([20] * 16), decoder.device, 80)
        with monkeypatch.context() as patch:
            patch.setattr(Decoder, "run_block", failing)
            return {name: value for block in decoder.blocks
                    for name, value in calibration.measure(block.layers, True).items()}

    expected = found()
    request.getfixturevalue("beside")
    travelled = found()
    assert all(torch.equal(travelled[name], expected[name]) for name in expected)
    assert capsys.readouterr().out.count("out of memory: from now on at most 40 tokens") == 2


@pytest.mark.parametrize("method", ["gptq", "sparsegpt"])
def test_a_database_is_the_same_to_the_byte(method, checkpoint, text, tmp_path, request, monkeypatch):
    module = {"gptq": gptq, "sparsegpt": sparsegpt}[method]
    levels = {"gptq": ["--bitwidth_options", "3", "4", "--calibration_bitwidth", "3"],
              "sparsegpt": ["--sparsity", "0.5", "--num_levels", "1", "--weights_diff", "100"]}[method]

    def build(folder, *more):
        module.main(module.make_parser().parse_args(
            ["--model_name_or_path", checkpoint, "--calibration_data", text, "--calibration_sequence_length", "32",
             "--calibration_tokens", "512", "--microbatch_tokens", "64", *levels, "--save_dir", str(tmp_path / folder),
             "--device", "cpu", *more]))
        return {file.name: file.read_bytes() for file in (tmp_path / folder).iterdir()}

    expected = build("plain")
    mapped, from_file = [], torch.from_file
    monkeypatch.setattr(torch, "from_file", lambda path, **options: mapped.append(path) or from_file(path, **options))
    assert build("in_files", "--activations_dir", str(tmp_path / "activations")) == expected
    assert mapped and not any((tmp_path / "activations").iterdir())      # their names are gone from the beginning
    request.getfixturevalue("beside")
    assert build("beside") == expected
    assert build("beside_in_files", "--activations_dir", str(tmp_path / "activations")) == expected


def test_a_disk_without_room_for_them_is_named(tmp_path, monkeypatch):
    def full(*arguments):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(os, "posix_fallocate", full)
    with pytest.raises(OSError, match=f"No space left.*--activations_dir {re.escape(str(tmp_path))}"):
        hessians(activations_dir=tmp_path)
    assert not any(tmp_path.iterdir())
