"""Blocks that live in host memory and visit the device one after another: for models larger than its memory."""
import weakref
from collections.abc import Callable, Sequence
from contextlib import suppress

import numpy as np
import torch
from torch import nn

ALIGNMENT = 256                  # bytes, of a tensor in its block's buffer, as torch's allocators have it
PAGE = 4096


class OffloadedBlocks:
    """Two blocks at most are on the device: the one in use, and the one after it, copied while that one computes.

    A block is one buffer, on the host and on the device. It arrives with the weights it had when it was offloaded: what
    is written to them during a visit is forgotten, and `on_leave` is told the block's index.
    """

    def __init__(self, modules: Sequence[nn.Module], device: torch.device):
        self.device = device
        self.current: int | None = None
        self.on_leave: Callable[[int], None] = lambda index: None
        self._tensors = [[*module.parameters(), *module.buffers()] for module in modules]
        self._host: list[torch.Tensor] = []                              # a buffer each
        self._side = torch.cuda.Stream(device) if device.type == "cuda" else None
        self._visiting: dict[int, torch.Tensor] = {}
        failure = None
        for index, tensors in enumerate(self._tensors):
            pages = _pages(sum(_aligned(tensor.nbytes) for tensor in tensors))
            self._host.append(torch.from_numpy(pages))
            for tensor, place in zip(tensors, _views(self._host[-1], tensors)):
                place.copy_(tensor.data)
            if self._side and not failure:
                failure = pin(pages, device)
            self._leave(index)
        if failure:
            total = sum(buffer.nbytes for buffer in self._host) / 1e9
            print(f"--cpu_offload_modules: {total:.1f} GB of host memory cannot be pinned ({failure}), so copies from "
                  f"there do not run beside computations, which is slower; free host memory, or raise what ulimit -l "
                  f"allows", flush=True)

    @property
    def bytes_on_device(self) -> int:
        return sum(buffer.nbytes for buffer in self._visiting.values())

    def bring(self, index: int) -> None:
        """Let block `index` be used, and no other."""
        if index == self.current:
            return
        self.current = None
        self._await_copies()
        for other in [other for other in self._visiting if other != index]:
            self._leave(other)
        self._fetch(index)
        self._await_copies()
        self._use(index, self._visiting[index])
        self.current = index
        self._fetch((index + 1) % len(self._host))

    def restore(self) -> None:
        """Give all blocks the weights they had when they were offloaded, in host memory: for saving the model."""
        self._visiting.clear()
        self.current = None
        for index, buffer in enumerate(self._host):
            self._use(index, buffer)

    def original(self, index: int) -> list[torch.Tensor]:
        """A block's parameters and buffers as they were when it was offloaded, in host memory."""
        return _views(self._host[index], self._tensors[index])

    def _use(self, index: int, buffer: torch.Tensor) -> None:
        for tensor, place in zip(self._tensors[index], _views(buffer, self._tensors[index])):
            tensor.data = place

    def _fetch(self, index: int) -> None:
        """Begin to copy a block to the device."""
        if index in self._visiting:
            return
        buffer = torch.empty_like(self._host[index], device=self.device)
        if self._side:       # that memory may have been another block's until what is queued by now is done
            self._side.wait_stream(torch.cuda.current_stream(self.device))
        with torch.cuda.stream(self._side):          # None: does nothing
            buffer.copy_(self._host[index], non_blocking=True)
        self._visiting[index] = buffer

    def _await_copies(self) -> None:
        if self._side:
            torch.cuda.current_stream(self.device).wait_stream(self._side)

    def _leave(self, index: int) -> None:
        """Free a block's memory. Its weights become NaN of no size, which nothing can write to."""
        self._visiting.pop(index, None)
        for tensor, host in zip(self._tensors[index], self.original(index)):
            absent = host.new_tensor(torch.nan) if host.is_floating_point() else host.new_zeros(())
            tensor.data = absent.expand(host.shape)
        self.on_leave(index)


def pin(pages: np.ndarray, device: torch.device) -> str | None:
    """Lock what `_pages` gave into host memory: only from there do copies run beside computations. Returns what was
    said where that fails.

    torch's own pin_memory rounds every tensor up to a power of two: 153 GB instead of 137 for a 70B model.
    """
    cudart = torch.cuda.cudart()
    failure = int(cudart.cudaHostRegister(pages.ctypes.data, pages.nbytes, 0))
    if failure:
        with suppress(RuntimeError):         # the next launch is blamed for it: have that be one that does not matter
            torch.zeros(1, device=device)
        return str(cudart.cudaGetErrorString(cudart.cudaError(failure)))
    weakref.finalize(pages, cudart.cudaHostUnregister, pages.ctypes.data).atexit = False
    return None


def _pages(num_bytes: int) -> np.ndarray:
    """Whole pages of memory, uint8 [at least num_bytes]."""
    whole = -(-num_bytes // PAGE) * PAGE
    memory = np.empty(whole + PAGE, dtype=np.uint8)
    start = -memory.ctypes.data % PAGE
    return memory[start:start + whole]


def _views(buffer: torch.Tensor, tensors: Sequence[torch.Tensor]) -> list[torch.Tensor]:
    """Where some tensors lie in their block's buffer."""
    views, start = [], 0
    for tensor in tensors:
        views.append(buffer[start:start + tensor.nbytes].view(tensor.dtype).view(tensor.shape))
        start += _aligned(tensor.nbytes)
    return views


def _aligned(num_bytes: int) -> int:
    return -(-num_bytes // ALIGNMENT) * ALIGNMENT
