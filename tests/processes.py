"""What tests/test_distributed.py has torchrun start: several programs, one after the other, in the same processes.

    torchrun --nproc_per_node 2 tests/processes.py '[["evo_drop", "--sparsity", ...], ...]'
"""
import importlib
import json
import os
import sys
from pathlib import Path

os.environ["HF_HUB_OFFLINE"] = os.environ["HF_DATASETS_OFFLINE"] = "1"
sys.path.insert(0, str(Path(__file__).parents[1]))

import torch

from database.hessian import InputHessians
from utils import distributed, files


def run(command: list[str]) -> None:
    """A program's name and its arguments; database builds take theirs parsed."""
    name, *arguments = command
    if name == "hessians":
        return hessians(*arguments)
    program = importlib.import_module(name)
    program.main(program.make_parser().parse_args(arguments) if name.startswith("database.") else arguments)
    while files._locked:                                 # as if the process had ended
        os.close(files._locked.popitem()[1])


def hessians(file: str) -> None:
    """The Hessians of a mixture of experts of which some chunks, and so some processes, see only a part."""
    generator = torch.Generator().manual_seed(0)
    layers = {name: torch.nn.Linear(8, 4) for name in ("all", "last", "shared", "none")}
    inputs, count = InputHessians(layers), distributed.world_size()
    chunks = torch.randn(5, 20, 8, generator=generator)
    for first in range(0, len(chunks), count):
        for chunk in range(first, min(first + count, len(chunks)))[distributed.rank():][:1]:
            with torch.no_grad():
                layers["all"](chunks[chunk])
                if chunk == len(chunks) - 1:
                    x = chunks[chunk] ** 2
                    layers["last"](x)
                    layers["shared"](x)
            inputs.end_microbatch()
        inputs.end_chunk()
    found = {}
    for part in distributed.gather({name: hessian if hessian is None else hessian.tolist()
                                    for name, hessian in inputs.finish().items()}):
        assert not found.keys() & part.keys()
        found.update(part)
    if distributed.is_main():
        Path(file).write_text(json.dumps(found, sort_keys=True))


def fail_in_one() -> None:
    """The last process fails while the others wait for it."""
    if distributed.rank() == distributed.world_size() - 1:
        raise ZeroDivisionError("the last process failed")
    distributed.gather(None)


def fail_in_all() -> None:
    raise SystemExit("error: --flag 3: too many")


def main() -> None:
    for command in json.loads(sys.argv[1]):
        {"fail_in_one": fail_in_one, "fail_in_all": fail_in_all}.get(command[0], lambda: run(command))()


if __name__ == "__main__":
    distributed.launch(main)
