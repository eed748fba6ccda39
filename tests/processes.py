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

from utils import distributed  # noqa: E402


def run(command: list[str]) -> None:
    """A program's name and its arguments; database builds take theirs parsed."""
    name, *arguments = command
    program = importlib.import_module(name)
    program.main(program.make_parser().parse_args(arguments) if name.startswith("database.") else arguments)


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
