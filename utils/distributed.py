"""Several processes for one search or one database build, started by torchrun. In a single process nothing is done.

    torchrun --nproc_per_node 4 evo_quant.py ...                                              one machine, a GPU each
    torchrun --nnodes 2 --nproc_per_node 8 --rdzv_backend c10d --rdzv_endpoint HOST:29500 evo_quant.py ...

All processes run the same program on the same random numbers and hold the same state; they differ in which part of
the work they do. Only the first one writes shared files and prints. Host tensors travel by gloo, those of GPUs by nccl.
Several machines need a file system in common.
"""
import os
import sys
import time
from collections.abc import Callable, Sequence
from datetime import timedelta
from functools import wraps
from typing import TypeVar

import torch
import torch.distributed as dist
from torch.distributed.elastic.multiprocessing.errors import record

Result = TypeVar("Result")
TIMEOUT = timedelta(hours=2)     # of one process waiting for another that neither comes nor dies
GRACE = 30.0                     # seconds in which torchrun stops a process after another has failed

_waited = 0.0                    # seconds that this process has waited for others


def launch(main: Callable[[], object]) -> None:
    """Run a program's `main`, together with the processes that torchrun started beside this one, if it did.

    An error in one process ends all of them: torchrun stops the others. Only the first to fail tells why, since the
    others make the same mistake, or only miss the first.
    """
    if not dist.is_torchelastic_launched() or int(os.environ["WORLD_SIZE"]) == 1:
        main()
        return
    if torch.cuda.is_available() and local_rank() < torch.cuda.device_count():
        torch.cuda.set_device(local_rank())
    store, rank, world_size = next(dist.rendezvous("env://"))
    dist.init_process_group("cpu:gloo,cuda:nccl" if torch.cuda.is_available() else "gloo", timeout=TIMEOUT,
                            store=dist.PrefixStore("group", store), rank=rank, world_size=world_size)
    if not is_main():
        sys.stdout = open(os.devnull, "w")
    try:
        record(main)()
    except BaseException:
        if store.add("failed", 1) > 1:
            time.sleep(GRACE)
            sys.exit(1)
        raise
    dist.destroy_process_group()


def rank() -> int:
    return dist.get_rank() if dist.is_initialized() else 0


def world_size() -> int:
    return dist.get_world_size() if dist.is_initialized() else 1


def local_rank() -> int:
    """Number of this process on its machine, which is also that of its GPU."""
    return int(os.environ.get("LOCAL_RANK", "0"))


def is_main() -> bool:
    """Whether this is the process that writes and prints."""
    return rank() == 0


# ---- work ------------------------------------------------------------------------------------------------------------


def shares(costs: Sequence[float], parts: int | None = None) -> list[int]:
    """The process (or the one of `parts`) that each of some items in a line is for: contiguous, of about equal cost."""
    parts = parts or world_size()
    total, before, owners = sum(costs), 0.0, []
    for cost in costs:
        owners.append(min(int(parts * (before + cost / 2) / total), parts - 1))
        before += cost
    return owners


def report_idle(seconds: float) -> None:
    """Print the share of `seconds`, the time the work took, that processes spent waiting for the slowest of them."""
    if world_size() > 1:
        waited = torch.tensor([_waited], dtype=torch.float64)
        dist.all_reduce(waited)
        print(f"{world_size()} processes, idle {float(waited) / world_size() / seconds:.1%} of the time")


# ---- exchange --------------------------------------------------------------------------------------------------------


def from_main(compute: Callable[..., Result]) -> Callable[..., Result]:
    """A function whose result the main process computes and sends to the others. All have to call it."""
    @wraps(compute)
    def computed_once(*args, **kwargs) -> Result:
        if world_size() == 1:
            return compute(*args, **kwargs)
        result = [compute(*args, **kwargs) if is_main() else None]
        dist.broadcast_object_list(result, device=torch.device("cpu"))
        return result[0]
    return computed_once


def main_only(function: Callable[..., Result]) -> Callable[..., Result | None]:
    """A function that only the main process runs, such as one that writes a file; None in the others."""
    @wraps(function)
    def run_once(*args, **kwargs) -> Result | None:
        return function(*args, **kwargs) if is_main() else None
    return run_once


def gather(item: Result) -> list[Result]:
    """Every process's item, in the order of their ranks; of any kind, but small."""
    items = [item] * world_size()
    if world_size() > 1:
        _timed(dist.all_gather_object, items, item)
    return items


def broadcast(tensor: torch.Tensor | None, source: int, device: torch.device) -> torch.Tensor:
    """The tensor of process `source`, where it is on `device`; the others' `tensor` is not looked at."""
    if world_size() == 1:
        return tensor
    if rank() == source:
        tensor = tensor.contiguous()                     # what is not is sent in another order, without an error
    form = [(tensor.shape, tensor.dtype) if rank() == source else None]
    _timed(dist.broadcast_object_list, form, source, device=torch.device("cpu"))
    if rank() != source:
        tensor = torch.empty(form[0][0], dtype=form[0][1], device=device)
    dist.broadcast(tensor.view(torch.uint8), source)     # bytes: not every backend knows every type
    return tensor


def collect(tensor: torch.Tensor, destination: int) -> list[torch.Tensor]:
    """Every process's tensor, all of one shape, in the order of their ranks; an empty list but in `destination`."""
    if world_size() == 1:
        return [tensor]
    tensors = [torch.empty_like(tensor) for _ in range(world_size())] if rank() == destination else None
    _timed(dist.gather, tensor, tensors, destination)
    return tensors or []


def merge_(tensor: torch.Tensor) -> torch.Tensor:
    """Sum over processes, in place, of a tensor whose every element is zero in all of them but one: hence exact."""
    if world_size() > 1:
        _timed(dist.all_reduce, tensor)
    return tensor


def _timed(collective: Callable, *args, **kwargs) -> None:
    global _waited
    if torch.cuda.is_initialized():
        torch.cuda.synchronize()                         # own work is not waiting
    began = time.perf_counter()
    collective(*args, **kwargs)
    _waited += time.perf_counter() - began
