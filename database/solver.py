"""Optimal-brain-surgeon sweep over a layer's columns, for all its levels at once (SparseGPT, GPTQ).

Levels are stacked: a layer's weight is held transposed, [in, levels * out], so that a column of every level is one
contiguous row of memory. Compressing column j leaves the error e = (w_j - q_j) / U_jj, which the later columns make up
for by -e U_j,: with U the upper Cholesky factor of the inverse Hessian. Those updates are applied lazily in two nested
blocks of columns, `block_size` and then a few, so that nearly all of them are matrix products. Neither stacking nor
laziness changes the result.
"""
from collections.abc import Iterable, Iterator

import torch

from utils.kernels import kernels

MAX_RELATIVE_DAMPING = 1.0
KERNELS = "database.kernels"
NOISE = 1e-7                     # of the mean diagonal: smaller pivots are rounding errors of the float32 Hessian


def inverse_factor(hessian: torch.Tensor, rel_damp: float) -> tuple[torch.Tensor, float]:
    """Upper Cholesky factor U of the damped inverse, UᵀU = (H + λI)⁻¹, float64 [in, in], and the relative damping used.

    λ is `rel_damp` times the mean diagonal of H, and ten times more as long as H + λI is not positive definite.
    A Hessian of zeros (no input ever seen) gives the identity: rounding to nearest, pruning by magnitude.
    Raises ValueError when even λ = the mean diagonal does not help, or H has values that are not finite.
    """
    if not torch.isfinite(hessian).all():
        raise ValueError("the Hessian has values that are not finite")
    identity = torch.eye(len(hessian), dtype=torch.float64, device=hessian.device)
    scale = hessian.diagonal().double().mean()
    if scale == 0:
        return identity, rel_damp
    damping = rel_damp
    while damping <= max(rel_damp, MAX_RELATIVE_DAMPING):
        # reversing rows and columns turns H = LLᵀ into H = VVᵀ with V upper triangular, and U = V⁻¹ follows without
        # the inverse ever being formed; float64 because pivots of nearly dependent inputs are small differences
        reverse = (hessian.double() + damping * scale * identity).flip(0, 1)
        lower, failed = torch.linalg.cholesky_ex(reverse)
        if not failed and lower.diagonal().min() ** 2 > NOISE * scale:
            return torch.linalg.solve_triangular(lower.flip(0, 1), identity, upper=True).contiguous(), damping
        damping = max(10 * damping, 1e-6)
    raise ValueError(f"the Hessian is not positive definite even with a damping of {MAX_RELATIVE_DAMPING} times its "
                     f"mean diagonal; use other or more calibration data")


def spans(start: int, end: int, size: int, group_size: int | None = None) -> Iterator[slice]:
    """Consecutive spans of at most `size` columns. Those of groups no larger than that hold whole groups; of larger
    groups, a span holds a part of one: when a group is reached, all its columns lie in spans not begun yet."""
    step = size if group_size is None else max(size // group_size, 1) * group_size
    for outer in range(start, end, step):
        for inner in range(outer, min(outer + step, end), size):
            yield slice(inner, min(inner + size, outer + step, end))


def lazy_sweep(w: torch.Tensor, u: torch.Tensor, block_size: int, group_size: int | None = None
               ) -> Iterator[tuple[slice, slice, torch.Tensor]]:
    """Walk the columns of `w` [in, rows]; yields (block, columns, err) when w[columns] is up to date.

    The consumer compresses w[columns] in place and fills err [columns, rows] (see `prune_columns`). At a block's first
    columns the whole block is up to date, and at a group's first column the whole group.
    """
    inner = 128 if kernels(KERNELS, w.device) else 16
    blocks = list(spans(0, len(w), block_size, group_size))
    buffer = w.new_empty(max(block.stop - block.start for block in blocks), w.shape[1])
    for block in blocks:
        errors = buffer[:block.stop - block.start]
        for columns in spans(block.start, block.stop, min(inner, group_size or inner), group_size):
            err = errors[columns.start - block.start:columns.stop - block.start]
            yield block, columns, err
            w[columns.stop:block.stop].addmm_(u[columns, columns.stop:block.stop].T, err, alpha=-1)
        w[block.stop:].addmm_(u[block, block.stop:].T, errors, alpha=-1)


def prune_columns(w: torch.Tensor, u: torch.Tensor, keep: torch.Tensor, err: torch.Tensor) -> None:
    """Zero what is not kept, column after column. w [n, rows] and err [n, rows] are written; u [n, n], keep bool."""
    if module := kernels(KERNELS, w.device):
        return module.prune_columns(w, u, keep, err)
    for j, (weight, kept, e, d) in enumerate(zip(w, keep, err, u.diagonal())):
        column = torch.addmm(weight[None], u[:j, j:j + 1].T, err[:j], alpha=-1)[0]
        torch.mul(column, kept, out=weight)
        torch.sub(column, weight, out=e).div_(d)


def quantize_columns(w: torch.Tensor, u: torch.Tensor, scale: torch.Tensor, zero: torch.Tensor, top: torch.Tensor,
                     err: torch.Tensor, codes: torch.Tensor) -> None:
    """Round to the grid scale * (code - zero), code in 0..top, column after column.

    w, err and codes (uint8) [n, rows] are written; u [n, n]; scale and zero float32 [n, rows]; top float32 [rows].
    """
    if module := kernels(KERNELS, w.device):
        return module.quantize_columns(w, u, scale, zero, top, err, codes)
    steps = torch.empty_like(w)      # of the grid, counted from zero
    for j, (weight, step, least, most, e, d) in enumerate(zip(w, steps, -zero, top - zero, err, u.diagonal())):
        column = torch.addmm(weight[None], u[:j, j:j + 1].T, err[:j], alpha=-1)[0]
        torch.div(column, scale[j], out=step).round_().clamp_(least, most)
        torch.mul(step, scale[j], out=weight)
        torch.sub(column, weight, out=e).div_(d)
    codes.copy_(steps.add_(zero))


def output_errors(w: torch.Tensor, levels: Iterable[torch.Tensor], hessian: torch.Tensor) -> list[float]:
    """Relative output error ‖(w−ŵ)ᵀX‖² / ‖wᵀX‖² of every level ŵ; w and ŵ [in, out]."""
    # H is symmetric: with the products above its diagonal doubled, those below it can be left out
    doubled = hessian.triu().mul_(2)
    doubled.diagonal().div_(2)

    def energy(delta: torch.Tensor) -> torch.Tensor:
        return sum(torch.sum((doubled[rows, rows.start:] @ delta[rows.start:]).mul_(delta[rows]), dtype=torch.float64)
                   for rows in spans(0, len(delta), max(128, len(delta) // 16)))

    energies = torch.stack([energy(w)] + [energy(w - level) for level in levels]).tolist()
    return [error / energies[0] if energies[0] > 0 else 0.0 for error in energies[1:]]
