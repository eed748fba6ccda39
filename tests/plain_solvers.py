"""SparseGPT and GPTQ as the papers tell them, one column and one level at a time, in float64: what database/ is checked
against. No Cholesky factor, no blocks of updates, no stacking: each column is eliminated from an explicit inverse."""
import torch


def plain_inverse(hessian: torch.Tensor, rel_damp: float) -> torch.Tensor:
    hessian = hessian.double()
    return torch.linalg.inv(hessian + rel_damp * hessian.diagonal().mean() * torch.eye(len(hessian)))


def pivots(inverse: torch.Tensor) -> torch.Tensor:
    """[H⁻¹]jj with the columns before j eliminated, for every j: the squared diagonal of the Cholesky factor."""
    inverse, diagonal = inverse.clone(), []
    for j in range(len(inverse)):
        diagonal.append(inverse[j, j].item())
        inverse -= torch.outer(inverse[:, j], inverse[j]) / inverse[j, j].item()
    return torch.tensor(diagonal, dtype=torch.float64)


def eliminate(w: torch.Tensor, inverse: torch.Tensor, j: int, q: torch.Tensor) -> None:
    """Set column j of w to q, let the columns after it make up for that, and take j out of the inverse Hessian."""
    w[:, j + 1:] -= torch.outer(w[:, j] - q, inverse[j, j + 1:]) / inverse[j, j]
    w[:, j] = q
    inverse -= torch.outer(inverse[:, j], inverse[j]) / inverse[j, j].item()


def plain_sparsegpt(weight: torch.Tensor, hessian: torch.Tensor, kept: int, rel_damp: float = 0.01,
                    block_size: int = 128) -> tuple[torch.Tensor, torch.Tensor]:
    """(pruned weight, mask of what is kept), both [out, in]."""
    w, inverse = weight.double().clone(), plain_inverse(hessian, rel_damp)
    rows, columns = w.shape
    saliency = pivots(inverse)
    keep = torch.ones_like(w, dtype=torch.bool)
    for j in range(columns):
        if j % block_size == 0:
            end = min(j + block_size, columns)
            count = (int(kept * end / columns + 0.5) - int(kept * j / columns + 0.5))
            order = (w[:, j:end] ** 2 / saliency[j:end]).flatten().argsort(descending=True)
            mask = torch.zeros(rows * (end - j), dtype=torch.bool)
            mask[order[:count]] = True
            keep[:, j:end] = mask.view(rows, -1)
        eliminate(w, inverse, j, w[:, j] * keep[:, j])
    return w, keep


def plain_gptq(weight: torch.Tensor, hessian: torch.Tensor, bits: int, group_size: int | None = None,
               perchannel: bool = True, sym: bool = False, act_order: bool = False, mse: bool = False,
               rel_damp: float = 0.01, block_size: int = 128) -> tuple[torch.Tensor, torch.Tensor]:
    """(dequantized weight, codes), both [out, in], columns in their own order. `block_size` plays no part."""
    columns = weight.shape[1]
    group_size = group_size or columns
    order = sorted(range(columns), key=lambda j: -hessian[j, j].item()) if act_order else list(range(columns))
    w, inverse = weight.double()[:, order].clone(), plain_inverse(hessian[order][:, order], rel_damp)
    importance = 1 / pivots(inverse)
    codes = torch.zeros(w.shape, dtype=torch.int64)
    static = act_order or group_size >= columns
    grids: dict[int, tuple] = {}
    for j in range(columns):
        group = order[j] // group_size
        if group not in grids:
            members = range(group * group_size, min((group + 1) * group_size, columns))
            values = weight.double()[:, list(members)] if static else w[:, list(members)]
            weights = importance[[order.index(member) for member in members]]
            rows = [plain_grid(row, bits, sym, mse, weights) for row in (values if perchannel else [values])]
            grids[group] = torch.tensor(rows, dtype=torch.float64).T
        scale, zero = grids[group]
        code = ((w[:, j] / scale).round() + zero).clamp(0, 2**bits - 1)
        codes[:, j] = code
        eliminate(w, inverse, j, scale * (code - zero))
    restored, restored_codes = torch.empty_like(w), torch.empty_like(codes)
    restored[:, order], restored_codes[:, order] = w, codes
    return restored, restored_codes


def plain_grid(values: torch.Tensor, bits: int, sym: bool, mse: bool, importance: torch.Tensor) -> tuple[float, int]:
    """(scale in half precision, zero) for `values` [in] or [out, in]."""
    top = 2**bits - 1
    low, high = min(values.min().item(), 0.0), max(values.max().item(), 0.0)
    if sym:
        high = max(-low, high)
        low = -high
    if low == high:
        low, high = -1.0, 1.0
    best = None
    for step in range(80 if mse else 1):
        shrink = 1 - step / 100
        scale = max(torch.tensor((high - low) * shrink / top).half().item(), 2.0**-24)
        zero = (top + 1) // 2 if sym else min(round(-low * shrink / scale), top)
        rounded = scale * ((values / scale).round().add(zero).clamp(0, top) - zero)
        error = ((rounded - values) ** 2 * importance).sum().item()
        if best is None or error < best[0]:
            best = error, scale, zero
    return best[1:]


def round_to_nearest(weight: torch.Tensor, bits: int, **grid) -> torch.Tensor:
    """Each weight on its own; the grids are those of `plain_gptq` with an identity for Hessian, where nothing is made
    up for."""
    return plain_gptq(weight, torch.eye(weight.shape[1]), bits, **grid)[0]


def magnitude_pruned(weight: torch.Tensor, kept: int) -> torch.Tensor:
    pruned = torch.zeros_like(weight).flatten()
    largest = weight.abs().flatten().argsort(descending=True)[:kept]
    pruned[largest] = weight.flatten()[largest]
    return pruned.view_as(weight)


def relative_error(weight: torch.Tensor, compressed: torch.Tensor, hessian: torch.Tensor) -> float:
    """‖(W−Ŵ)X‖² / ‖WX‖² from the Hessian XᵀX."""
    w, delta, hessian = weight.double(), weight.double() - compressed.double(), hessian.double()
    return (((delta @ hessian) * delta).sum() / ((w @ hessian) * w).sum()).item()
