"""Time and peak memory of building all levels of some layers: here, and the plain way in the same run.

    python benchmarks/database.py                 17 sparse levels and 5 bitwidths of a 1024×1024 layer, two threads
    python benchmarks/database.py --block         all layers of a Llama-3 block of hidden size 1024
    python benchmarks/database.py --device cuda --block --size 4096     a block of Llama-3-8B

Weights and inputs are random: bfloat16 on a GPU, float32 on a CPU. The plain way: a Hessian for every layer in full
float32, then level after level, vectorised over rows, with lazy updates of --block_size columns. Both ways end with
every level's output error and its packed tensors. Every measurement has a process of its own, the ways alternate, and
the fastest of --repeats counts. FLOPs counted, in both ways alike: 2 · tokens · in² for every Hessian that is made,
out · in² a level for the solve.
"""
import argparse
import multiprocessing
import resource
import sys
import time
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path

import torch

sys.path[0] = str(Path(__file__).resolve().parent.parent)    # this file's own folder would hide the database package
from database import gptq, sparsegpt
from database.hessian import add_outer_products
from database.packing import pack_quantized, pack_sparse
from database.solver import inverse_factor
from utils.report import format_table

BITWIDTHS = [2, 3, 4, 5, 6]
MICROBATCH = 8192                # tokens


def llama_3_block(hidden: int) -> dict[str, tuple[int, int, str]]:
    """Layer -> (out, in, name of its input) in the proportions of Llama-3-8B."""
    return {"q_proj": (hidden, hidden, "attention"), "k_proj": (hidden // 4, hidden, "attention"),
            "v_proj": (hidden // 4, hidden, "attention"), "o_proj": (hidden, hidden, "heads"),
            "gate_proj": (7 * hidden // 2, hidden, "mlp"), "up_proj": (7 * hidden // 2, hidden, "mlp"),
            "down_proj": (hidden, 7 * hidden // 2, "gated")}


def plain_hessian(x: torch.Tensor, tokens: int) -> torch.Tensor:
    hessian = torch.zeros(x.shape[1], x.shape[1], device=x.device)
    for _ in range(tokens // MICROBATCH):
        batch = x.float()
        hessian += batch.T @ batch
    return hessian / tokens


def plain_factor(hessian: torch.Tensor) -> torch.Tensor:
    damped = hessian + 0.01 * hessian.diagonal().mean() * torch.eye(len(hessian), device=hessian.device)
    inverse = torch.cholesky_inverse(torch.linalg.cholesky(damped))
    return torch.linalg.cholesky(inverse, upper=True)


def plain_prune(weight: torch.Tensor, u: torch.Tensor, kept: int, block_size: int) -> torch.Tensor:
    w = weight.clone()
    for start in range(0, w.shape[1], block_size):
        block = slice(start, min(start + block_size, w.shape[1]))
        w1, u1 = w[:, block].clone(), u[block, block]
        errors = torch.zeros_like(w1)
        scores = w1 ** 2 / u1.diagonal() ** 2
        pruned = scores.numel() - round(scores.numel() * kept / w.numel())
        threshold = scores.flatten().kthvalue(pruned).values if pruned else -1.0
        mask = scores <= threshold
        for j in range(w1.shape[1]):
            q = w1[:, j].masked_fill(mask[:, j], 0)
            errors[:, j] = (w1[:, j] - q) / u1[j, j]
            w1[:, j:] -= errors[:, j:j + 1] @ u1[j:j + 1, j:]
            w1[:, j] = q
        w[:, block] = w1
        w[:, block.stop:] -= errors @ u[block, block.stop:]
    return w


def plain_quantize(weight: torch.Tensor, u: torch.Tensor, bits: int, block_size: int, group_size: int):
    w, codes, scales, zeros = weight.clone(), torch.empty_like(weight, dtype=torch.uint8), [], []
    top = 2**bits - 1
    for start in range(0, w.shape[1], block_size):
        block = slice(start, min(start + block_size, w.shape[1]))
        w1, u1 = w[:, block].clone(), u[block, block]
        errors = torch.zeros_like(w1)
        for j in range(w1.shape[1]):
            if (start + j) % group_size == 0:
                group = w1[:, j:j + group_size]
                low, high = group.amin(1).clamp(max=0), group.amax(1).clamp(min=0)
                scale = ((high - low) / top).half().float()
                zero = (-low / scale).round()
                scales.append(scale)
                zeros.append(zero)
            code = ((w1[:, j] / scale).round() + zero).clamp(0, top)
            q = (code - zero) * scale
            errors[:, j] = (w1[:, j] - q) / u1[j, j]
            w1[:, j:] -= errors[:, j:j + 1] @ u1[j:j + 1, j:]
            w1[:, j], codes[:, start + j] = q, code
        w[:, block] = w1
        w[:, block.stop:] -= errors @ u[block, block.stop:]
    return w, codes, torch.stack(scales, 1).half(), torch.stack(zeros, 1).byte()


class Stopwatch:
    """Seconds by phase, the device's work included."""

    def __init__(self, device: torch.device):
        self.device, self.seconds, self._last = device, {}, time.perf_counter()

    def lap(self, phase: str | None) -> None:
        if self.device.type == "cuda":
            torch.cuda.synchronize()
        now = time.perf_counter()
        if phase:
            self.seconds[phase] = self.seconds.get(phase, 0.0) + now - self._last
        self._last = now


def measure(way: str, method: str, layers: dict, tokens: int, block_size: int, group_size: int, device: str,
            threads: int) -> tuple[dict[str, float], int]:
    """(seconds by phase, peak bytes beyond weights and activations) of one way of building all levels of `layers`."""
    torch.set_num_threads(threads)
    device = torch.device(device)
    generator = torch.Generator(device).manual_seed(0)
    dtype = torch.bfloat16 if device.type == "cuda" else torch.float32
    weights = {name: torch.randn(out, columns, device=device, generator=generator, dtype=dtype) * 0.02
               for name, (out, columns, _) in layers.items()}
    inputs = {source: torch.randn(MICROBATCH, columns, device=device, generator=generator, dtype=dtype)
              * torch.rand(columns, device=device, generator=generator).to(dtype)
              for _, columns, source in layers.values()}
    args = argparse.Namespace(block_size=block_size, group_size=group_size)
    warm_up = torch.randn(256, 256, device=device)
    plain_factor(warm_up @ warm_up.T)
    inverse_factor(warm_up @ warm_up.T, 0.01)
    if device.type == "cuda":    # compiles the kernels
        sparsegpt.prune(warm_up, warm_up @ warm_up.T, [100]), gptq.quantize(warm_up, warm_up @ warm_up.T, [4])
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.max_memory_allocated()
    else:
        before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
    watch = Stopwatch(device)
    (plain if way == "plain" else here)(method, layers, weights, inputs, tokens, args, watch)
    after = (torch.cuda.max_memory_allocated() if device.type == "cuda"
             else resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024)
    return watch.seconds, after - before


def plain(method: str, layers: dict, weights: dict, inputs: dict, tokens: int, args: argparse.Namespace,
          watch: Stopwatch) -> None:
    for name, (out, columns, source) in layers.items():
        watch.lap(None)
        hessian = plain_hessian(inputs[source], tokens)
        watch.lap("Hessian")
        w = weights[name].float()
        u = plain_factor(hessian)
        energy = ((w @ hessian) * w).sum()
        for level in levels_of(method, out * columns, args):
            watch.lap("solve")
            if method == "sparse":
                q = plain_prune(w, u, level, args.block_size)
                watch.lap("solve")
                pack_sparse(q.half(), q != 0)
            else:
                q, *quantized = plain_quantize(w, u, level, args.block_size, args.group_size)
                watch.lap("solve")
                pack_quantized(*quantized, level)
            float((((w - q) @ hessian) * (w - q)).sum() / energy)
            watch.lap("errors, packing")


def here(method: str, layers: dict, weights: dict, inputs: dict, tokens: int, args: argparse.Namespace,
         watch: Stopwatch) -> None:
    hessians: dict[str, torch.Tensor] = {}
    for name, (out, columns, source) in layers.items():
        watch.lap(None)
        if source not in hessians:
            upper = torch.zeros(columns, columns, device=watch.device)
            for _ in range(tokens // MICROBATCH):
                add_outer_products(upper, inputs[source])
            upper.triu_().div_(tokens)
            hessians[source] = upper.add_(upper.triu(1).T)
        hessian, w = hessians[source], weights[name].float()
        watch.lap("Hessian")
        levels = levels_of(method, out * columns, args)
        if method == "sparse":
            pruned, keep, _ = sparsegpt.prune(w, hessian, levels, 0.01, args.block_size)
            watch.lap("solve")
            sparsegpt.pack_levels(weights[name], hessian, dict(enumerate(levels)), pruned, keep)
        else:
            *quantized, _ = gptq.quantize(w, hessian, levels, args.group_size, block_size=args.block_size)
            watch.lap("solve")
            gptq.pack_levels(weights[name], hessian, levels, *quantized)
        watch.lap("errors, packing")


def levels_of(method: str, size: int, args: argparse.Namespace) -> list[int]:
    """Numbers of weights kept, or bitwidths."""
    return list(sparsegpt.kept_weights(size, 0.5, 8, size // 32).values()) if method == "sparse" else BITWIDTHS


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", default="cpu", help="cpu or cuda (default: cpu)")
    parser.add_argument("--size", type=int, default=1024, help="inputs and outputs of the layer (default: 1024)")
    parser.add_argument("--block", action="store_true", help="all layers of a Llama-3 block of hidden size --size")
    parser.add_argument("--tokens", type=int, default=MICROBATCH, help=f"a multiple of {MICROBATCH}, the default")
    parser.add_argument("--block_size", type=int, default=128)
    parser.add_argument("--group_size", type=int, default=128)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--repeats", type=int, default=3)
    args = parser.parse_args()
    layers = llama_3_block(args.size) if args.block else {"layer": (args.size, args.size, "input")}
    print(format_table(compare(layers, args)))


def compare(layers: dict, args: argparse.Namespace) -> list[list]:
    """Rows of (what, plain, here, ratio, FLOP/s of both) for both methods, the header first."""
    processes = multiprocessing.get_context("forkserver")
    processes.set_forkserver_preload(["database.sparsegpt", "database.gptq"])
    shared = {source: columns for _, columns, source in layers.values()}
    hessian_flops = {"plain": sum(2 * args.tokens * columns**2 for _, columns, _ in layers.values()),
                     "here": sum(2 * args.tokens * columns**2 for columns in shared.values())}
    rows = [["", "plain s", "here s", "ratio", "plain GFLOP/s", "here GFLOP/s"]]
    for method, title in (("sparse", "17 sparse levels"), ("quantized", "5 bitwidths")):
        count = 17 if method == "sparse" else len(BITWIDTHS)
        runs: dict[str, list] = {"plain": [], "here": []}
        for _ in range(args.repeats):
            for way, turns in runs.items():
                with ProcessPoolExecutor(1, mp_context=processes) as pool:
                    turns.append(pool.submit(measure, way, method, layers, args.tokens, args.block_size,
                                             args.group_size, args.device, args.threads).result())
        solve_flops = sum(count * out * columns**2 for out, columns, _ in layers.values())
        best = {way: {phase: min(seconds[phase] for seconds, _ in measured) for phase in measured[0][0]}
                for way, measured in runs.items()}
        for phase, flops in (("Hessian", hessian_flops), ("solve", dict.fromkeys(runs, solve_flops)),
                             ("errors, packing", None)):
            plain, ours = best["plain"][phase], best["here"][phase]
            rates = [flops[way] / best[way][phase] / 1e9 for way in runs] if flops else [None, None]
            rows.append([f"{title}: {phase}", plain, ours, plain / ours, *rates])
        for name, phases in (("Hessian and solve", ("Hessian", "solve")), ("all", tuple(best["plain"]))):
            plain, ours = (sum(best[way][phase] for phase in phases) for way in runs)
            rows.append([f"{title}: {name}", plain, ours, plain / ours, None, None])
        plain, ours = (max(peak for _, peak in runs[way]) / 1e6 for way in runs)
        rows.append([f"{title}: peak memory, MB", plain, ours, plain / ours, None, None])
    return rows


if __name__ == "__main__":
    main()
