"""The calibration documents' hidden states between two blocks: where they are kept, and how they come to the device."""
import os
import tempfile
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch


class HiddenStates:
    """Those of every chunk of documents, at the input of one block.

    A chunk's outputs are written beside its inputs, and take their place when all are there; the room of the inputs is
    then the next chunk's to write to, so that nothing is allocated after the first block.
    """

    def __init__(self, tokens: Sequence[int], storage: torch.device, device: torch.device, largest: int,
                 folder: Path | None = None):
        """`tokens` of every chunk, `largest` of a microbatch. They are kept on `storage`, with `folder` in files there,
        and computed with on `device`. A chunk's room is taken when it is first written to."""
        self.storage, self.device, self.folder = storage, device, folder
        self.chunks: list[torch.Tensor | None] = [None] * len(tokens)    # [tokens, hidden]
        self._room, self._largest = max(tokens), largest
        self._spare: torch.Tensor | None = None
        self._transfers: Transfers | None = None

    def arrivals(self, chunk: int, shapes: Sequence[tuple[int, int]]) -> Iterator[torch.Tensor | None]:
        """A chunk's hidden states on the device, cut into microbatches [rows, tokens, hidden] of these rows and tokens;
        None of each before any were written."""
        kept, start, views = self.chunks[chunk], 0, []
        for rows, tokens in shapes:
            views.append(None if kept is None else kept[start:start + rows * tokens].view(rows, tokens, -1))
            start += rows * tokens
        if kept is not None and self._transfers:
            return self._transfers.arrivals(views)
        return (None if view is None else view.to(self.device) for view in views)

    def depart(self, start: int, output: torch.Tensor) -> None:
        """Write a microbatch's outputs [rows, tokens, hidden] from the chunk's token `start` on."""
        if self._spare is None:
            self._spare = self._allocate(output)
            if self.storage.type == "cpu" and self.device.type == "cuda" and not self._transfers:
                self._transfers = Transfers(self.device, self._largest * output.shape[-1], output.dtype)
        destination = self._spare[start:start + output.shape[0] * output.shape[1]].view(output.shape)
        if self._transfers:
            self._transfers.depart(output, destination)
        else:
            destination.copy_(output)

    def advance(self, chunk: int) -> None:
        """What was written takes the place of the chunk's hidden states."""
        if self._transfers:
            self._transfers.finish()
        self.chunks[chunk], self._spare = self._spare, self.chunks[chunk]

    def abandon(self) -> None:
        """Forget what was written since."""
        if self._transfers:
            self._transfers.abandon()

    def _allocate(self, like: torch.Tensor) -> torch.Tensor:
        shape = (self._room, like.shape[-1])
        if self.folder is None:
            return torch.empty(shape, dtype=like.dtype, device=self.storage)
        handle, path = tempfile.mkstemp(dir=self.folder, prefix="hidden_states.")
        try:
            os.posix_fallocate(handle, 0, self._room * like.shape[-1] * like.element_size())   # or a full disk would be
            # found when a page is written back, which kills the process
            return torch.from_file(path, shared=True, size=self._room * like.shape[-1], dtype=like.dtype).view(shape)
        except OSError as error:
            raise OSError(error.errno, error.strerror, f"--activations_dir {self.folder}") from error
        finally:
            os.close(handle)
            os.unlink(path)      # it lives on until the process ends, however that ends


@dataclass
class Staging:
    """A pinned buffer, what is on its way through it, and where on the host that goes then."""
    buffer: torch.Tensor
    event: object = None
    source: torch.Tensor | None = None
    destination: torch.Tensor | None = None

    def view(self, shape: torch.Size) -> torch.Tensor:
        return self.buffer[:shape.numel()].view(shape)

    def finish(self) -> None:
        """Wait for what is on its way, and hand it on."""
        if self.event is not None:
            self.event.synchronize()
        if self.destination is not None:
            self.destination.copy_(self.view(self.destination.shape))
        self.event = self.source = self.destination = None


class Transfers:
    """Copies between host memory and the device beside its computations, which is only possible from pinned memory.

    That much cannot be pinned, so they go through two buffers each way: while microbatch i is computed, i + 1 arrives
    and i - 1 departs, and the host copies between the buffers and its memory.
    """

    def __init__(self, device: torch.device, elements: int, dtype: torch.dtype):
        """`elements`: of the largest tensor that will travel."""
        self._side = SideStream(device)
        self._inward, self._outward = ([Staging(self._side.host_buffer(elements, dtype)) for _ in range(2)]
                                       for _ in range(2))

    def arrivals(self, sources: Sequence[torch.Tensor]) -> Iterator[torch.Tensor]:
        """Each of some host tensors on the device, the one after it being on its way already."""
        begun: tuple | None = None
        for source in (*sources, None):
            following = None if source is None else self._begin(source)
            if begun:
                self._side.let_wait(*begun)
                yield begun[0]
            begun = following

    def depart(self, tensor: torch.Tensor, destination: torch.Tensor) -> None:
        """Copy what is being computed to the host; it is there after `finish`."""
        staging = _next(self._outward)
        staging.source, staging.destination = tensor, destination        # the source must live until it has been copied
        staging.event = self._side.copy(staging.view(tensor.shape), tensor, computed=True)

    def finish(self) -> None:
        for staging in self._outward:
            staging.finish()

    def abandon(self) -> None:
        for staging in (*self._inward, *self._outward):
            staging.destination = None
            staging.finish()

    def _begin(self, source: torch.Tensor) -> tuple[torch.Tensor, object]:
        staging = _next(self._inward)
        staged = staging.view(source.shape).copy_(source)
        arriving = self._side.device_buffer(source)
        staging.event = self._side.copy(arriving, staged)
        return arriving, staging.event


def on_host(tensor: torch.Tensor) -> torch.Tensor:
    """The tensor in the host's memory, where it comes from a GPU in pinned memory: copies to any other are 50 times as
    slow (1 GB/s on an H200's host)."""
    if not tensor.is_cuda:
        return tensor.cpu()
    return torch.empty(tensor.shape, dtype=tensor.dtype, pin_memory=True).copy_(tensor)


class SideStream:
    """A queue of copies that runs beside the device's computations."""

    def __init__(self, device: torch.device):
        self.device, self._stream = device, torch.cuda.Stream(device)

    def host_buffer(self, elements: int, dtype: torch.dtype) -> torch.Tensor:
        return torch.empty(elements, dtype=dtype, pin_memory=True)

    def device_buffer(self, like: torch.Tensor) -> torch.Tensor:
        """Of this stream: its memory is not handed out again while a copy into it is queued."""
        with torch.cuda.stream(self._stream):
            return torch.empty_like(like, device=self.device)

    def copy(self, destination: torch.Tensor, source: torch.Tensor, computed: bool = False) -> torch.cuda.Event:
        """Queue a copy, if the source is being `computed` after that. Returns what tells when it is done."""
        if computed:
            self._stream.wait_stream(torch.cuda.current_stream(self.device))
        with torch.cuda.stream(self._stream):
            destination.copy_(source, non_blocking=True)
        event = torch.cuda.Event()
        event.record(self._stream)
        return event

    def let_wait(self, tensor: torch.Tensor, event: torch.cuda.Event) -> None:
        """Have computations queued from now on wait for a copy into `tensor`."""
        current = torch.cuda.current_stream(self.device)
        current.wait_event(event)
        tensor.record_stream(current)


def _next(stagings: list[Staging]) -> Staging:
    """The one used longest ago, free."""
    staging = stagings.pop(0)
    stagings.append(staging)
    staging.finish()
    return staging
