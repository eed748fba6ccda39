"""What the benchmarks that run whole programs share."""
import json
import os
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]


def run(arguments: list[object], log: Path) -> None:
    """Run Python with these arguments, on one thread and offline; what it prints goes to `log`. Raises SystemExit
    where it fails."""
    log.parent.mkdir(parents=True, exist_ok=True)
    environment = dict(os.environ, OMP_NUM_THREADS="1", HF_HUB_OFFLINE="1", HF_DATASETS_OFFLINE="1")
    with log.open("w") as stream:
        done = subprocess.run([sys.executable, *map(str, arguments)], cwd=ROOT, stdout=stream, stderr=stream,
                              env=environment)
    if done.returncode:
        raise SystemExit(f"{' '.join(map(str, arguments))}\nfailed, see {log}")


def sparsity_step(model: str) -> int:
    """1/16 of a square layer, in weights: in relation to the layers about what a step of 1,000,000 is in the paper."""
    return json.loads((Path(model) / "config.json").read_text())["hidden_size"]**2 // 16
