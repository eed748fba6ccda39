"""Blocks that live in host memory and visit the device one after another: for models larger than its memory."""
from collections.abc import Callable, Sequence

import torch
from torch import nn


class OffloadedBlocks:
    """Two blocks at most are on the device: the one in use, and the one after it, copied while that one computes.

    A block arrives with the weights it had when it was offloaded: what is written to them during a visit is forgotten,
    and `on_leave` is told the block's index.
    """

    def __init__(self, modules: Sequence[nn.Module], device: torch.device):
        self.device = device
        self.current: int | None = None
        self.on_leave: Callable[[int], None] = lambda index: None
        self._tensors = [[*module.parameters(), *module.buffers()] for module in modules]
        self._host: list[list[torch.Tensor]] = []
        self._side = torch.cuda.Stream(device) if device.type == "cuda" else None
        self._visiting: dict[int, list[torch.Tensor]] = {}
        for index, tensors in enumerate(self._tensors):
            # only from pinned memory do copies run beside computations
            self._host.append([tensor.data.pin_memory() if self._side else tensor.data for tensor in tensors])
            self._leave(index)

    @property
    def bytes_on_device(self) -> int:
        return sum(tensor.nbytes for block in self._visiting.values() for tensor in block)

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
        for tensor, copy in zip(self._tensors[index], self._visiting[index]):
            tensor.data = copy
        self.current = index
        self._fetch((index + 1) % len(self._host))

    def restore(self) -> None:
        """Give all blocks the weights they had when they were offloaded, in host memory: for saving the model."""
        self._visiting.clear()
        self.current = None
        for tensors, host in zip(self._tensors, self._host):
            for tensor, original in zip(tensors, host):
                tensor.data = original

    def _fetch(self, index: int) -> None:
        """Begin to copy a block to the device."""
        if index in self._visiting:
            return
        copies = [torch.empty_like(tensor, device=self.device) for tensor in self._host[index]]
        if self._side:       # that memory may have been another block's until what is queued by now is done
            self._side.wait_stream(torch.cuda.current_stream(self.device))
        with torch.cuda.stream(self._side):          # None: does nothing
            for copy, tensor in zip(copies, self._host[index]):
                copy.copy_(tensor, non_blocking=True)
        self._visiting[index] = copies

    def _await_copies(self) -> None:
        if self._side:
            torch.cuda.current_stream(self.device).wait_stream(self._side)

    def _leave(self, index: int) -> None:
        """Free a block's memory. Its weights become NaN of no size, which nothing can write to."""
        self._visiting.pop(index, None)
        for tensor, host in zip(self._tensors[index], self._host[index]):
            absent = host.new_tensor(torch.nan) if host.is_floating_point() else host.new_zeros(())
            tensor.data = absent.expand(host.shape)
        self.on_leave(index)
