"""Scaling: the same database builds and searches by 1, 2 and 4 processes of one thread each, and whether files are
equal.

    python benchmarks/scaling.py --out results/scaling
    python benchmarks/scaling.py --device cuda --model_name_or_path meta-llama/Llama-3.2-1B       a GPU each

Seconds are those of the blocks of a build and of the generations of a search, without starting up and the final
evaluation. On a machine with fewer cores than processes nothing can be gained: look at the idle share, which tells how
evenly the work is dealt.
"""
import argparse
import json
import os
import re
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
sys.path[0] = str(ROOT)
from utils.report import format_table


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model_name_or_path", default=str(ROOT / "demo" / "model"))
    parser.add_argument("--data", default="stdlib", help="calibration text")
    parser.add_argument("--calibration_tokens", type=int, default=16384)
    parser.add_argument("--sequence_length", type=int, default=256)
    parser.add_argument("--generations", type=int, default=3)
    parser.add_argument("--offspring", type=int, default=32)
    parser.add_argument("--processes", type=int, nargs="+", default=[1, 2, 4])
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--out", type=Path, default=Path("results/scaling"), help="its contents are overwritten")
    return parser.parse_args()


def commands(args: argparse.Namespace, databases: Path, out: Path) -> dict[str, list[object]]:
    """Program -> its command line, writing to out/<program>; searches read the same databases, in `databases`."""
    common = ["--model_name_or_path", args.model_name_or_path, "--calibration_data", args.data,
              "--calibration_sequence_length", args.sequence_length, "--calibration_tokens", args.calibration_tokens,
              "--device", args.device]
    search = [*common, "--no_eval", "--generations", args.generations, "--offspring", args.offspring,
              "--survivors_per_selection", 4, 1, "--tokens_per_selection", 1024, 8192, "--initial_tokens", 1024]
    programs = {"database.sparsegpt": ["-m", "database.sparsegpt", *common, "--sparsity", 0.5, "--num_levels", 3,
                                       "--save_dir"],
                "database.gptq": ["-m", "database.gptq", *common, "--bitwidth_options", 2, 3, 4, "--group_size", 128,
                                  "--perchannel", "--save_dir"],
                "evo_drop": ["evo_drop.py", *search, "--sparsity", 0.25, "--output_dir"],
                "evo_unstructured": ["evo_unstructured.py", *search, "--sparse_weights_path",
                                     databases / "database.sparsegpt", "--output_dir"],
                "evo_quant": ["evo_quant.py", *search, "--quant_weights_path", databases / "database.gptq",
                              "--target_bitwidth", 2.5, "--output_dir"]}
    return {name: [*command, out / name] for name, command in programs.items()}


def run(command: list[object], processes: int) -> str:
    """Run a command by so many processes; returns what it printed."""
    torchrun = ["-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={processes}"]
    arguments = [*(torchrun if processes > 1 else []), *map(str, command)]
    done = subprocess.run([sys.executable, *arguments], cwd=ROOT, capture_output=True, text=True,
                          env=dict(os.environ, OMP_NUM_THREADS="1", TRANSFORMERS_VERBOSITY="error"))
    if done.returncode:
        raise SystemExit(f"{' '.join(arguments)}\n{done.stderr}\nfailed")
    return done.stdout


def seconds(name: str, folder: Path, printed: str) -> float:
    if name.startswith("database"):
        return sum(float(a) + float(b) for a, b in re.findall(r"calibration ([\d.]+) s,.*levels ([\d.]+) s", printed))
    return json.loads((folder / "timing.jsonl").read_text().splitlines()[-1])["seconds"]


def results(folder: Path) -> dict[str, bytes]:
    """The files that must not depend on the number of processes."""
    return {file.name: file.read_bytes() for file in folder.iterdir()
            if file.suffix in (".txt", ".safetensors") or file.name in ("log.jsonl", "manifest.json")}


def cores() -> str:
    path = Path("/proc/cpuinfo")
    info = path.read_text() if path.exists() else ""
    packages = re.findall(r"physical id\s*: (\d+)", info), re.findall(r"core id\s*: (\d+)", info)
    physical = len(set(zip(*packages)))
    return f"{os.cpu_count()} logical cores" + (
        f", {physical} physical, as far as the system tells" if physical else "")


def main() -> None:
    args = parse_arguments()
    out = args.out.resolve()
    rows = [["program", "processes", "seconds", "times faster", "idle %", "files"]]
    for name in commands(args, out, out):
        reference = None
        for processes in args.processes:
            folder = out / str(processes) / name
            if folder.exists():
                for file in folder.iterdir():
                    file.unlink()
            databases = out / str(args.processes[0])
            printed = run(commands(args, databases, out / str(processes))[name], processes)
            took, found = seconds(name, folder, printed), results(folder)
            idle = re.search(r"idle ([\d.]+)%", printed)
            reference = reference or (took, found)
            rows.append([name, processes, took, reference[0] / took, float(idle[1]) if idle else None,
                         "identical" if found == reference[1] else "DIFFERENT"])
            print(f"{name} by {processes}: {took:.1f} s", flush=True)
    print(f"\n{args.model_name_or_path} on {args.device}, one thread a process, {cores()}:")
    print(format_table(rows))


if __name__ == "__main__":
    main()
