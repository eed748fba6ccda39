"""Where Triton's kernels can run: each module of them is tried out once, before anything depends on it."""
from functools import cache
from importlib import import_module
from types import ModuleType

import torch


@cache
def kernels(name: str, device: torch.device) -> ModuleType | None:
    """The module `name` where its `try_out(device)` succeeds, else None: then torch's own operations do the same work.

    Importing Triton proves nothing. It compiles at the first launch, which fails without a C compiler, without
    Python's headers, or on a device that it does not know, each with an exception of another kind.
    """
    if device.type != "cuda":
        return None
    try:
        module = import_module(name)
        module.try_out(device)
    except Exception as error:
        reason = " ".join((str(error).strip() or type(error).__name__).splitlines()[0].split())[:200]
        print(f"{name}: Triton's kernels do not run here ({reason}), so torch does their work: slower, with the same "
              f"results; they need pip install triton, a C compiler and Python's headers", flush=True)
        return None
    return module
