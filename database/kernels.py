"""Triton kernels of the sequential part of the sweep: one launch for a whole block of columns.

Same functions as `prune_columns` and `quantize_columns` of solver.py, which are their check. A program owns a tile of
rows and keeps to it: each of its threads reads back only the errors that it wrote itself, out of the L1 cache.
"""
import torch
import triton
import triton.language as tl

TILE = 128                       # rows of a program: with 4 warps, one a thread


def prune_columns(w: torch.Tensor, u: torch.Tensor, keep: torch.Tensor, err: torch.Tensor) -> None:
    """Zero what is not kept, column after column. w [n, rows] and err [n, rows] are written; u [n, n], keep bool."""
    columns, rows = w.shape
    _prune[(triton.cdiv(rows, TILE),)](w, u, keep.view(torch.uint8), err, columns, rows, w.stride(0), u.stride(0),
                                       keep.stride(0), err.stride(0), TILE, num_warps=4)


def quantize_columns(w: torch.Tensor, u: torch.Tensor, scale: torch.Tensor, zero: torch.Tensor, top: torch.Tensor,
                     err: torch.Tensor, codes: torch.Tensor) -> None:
    """Round to the grid scale * (code - zero), code in 0..top, column after column.

    w, err and codes (uint8) [n, rows] are written; u [n, n]; scale and zero float32 [n, rows]; top float32 [rows].
    """
    columns, rows = w.shape
    top = top.contiguous()       # one bitwidth's is one number, expanded
    _quantize[(triton.cdiv(rows, TILE),)](w, u, scale, zero, top, err, codes, columns, rows, w.stride(0), u.stride(0),
                                          scale.stride(0), zero.stride(0), err.stride(0), codes.stride(0), TILE,
                                          num_warps=4)


def try_out(device: torch.device) -> None:
    """Compile and launch both kernels on one column; raises what that raises."""
    w, err, scale, zero = torch.ones(4, 1, 8, device=device).unbind()
    bytes_ = torch.zeros(1, 8, dtype=torch.uint8, device=device)
    quantize_columns(w, scale[:, :1], scale, zero, scale[0], err, bytes_)
    prune_columns(w, scale[:, :1], bytes_.view(torch.bool), err)
    torch.cuda.synchronize(device)


@triton.jit
def _updated_column(w, u, err, j, row, inside, w_stride, u_stride, err_stride):
    column = tl.load(w + j * w_stride + row, mask=inside, other=0.0)
    for i in range(j):
        column -= tl.load(u + i * u_stride + j) * tl.load(err + i * err_stride + row, mask=inside, other=0.0)
    return column


@triton.jit
def _prune(w, u, keep, err, columns, rows, w_stride, u_stride, keep_stride, err_stride, TILE: tl.constexpr):
    row = tl.program_id(0) * TILE + tl.arange(0, TILE)
    inside = row < rows
    for j in range(columns):
        column = _updated_column(w, u, err, j, row, inside, w_stride, u_stride, err_stride)
        kept = tl.where(tl.load(keep + j * keep_stride + row, mask=inside, other=1) != 0, column, 0.0)
        tl.store(w + j * w_stride + row, kept, mask=inside)
        tl.store(err + j * err_stride + row, tl.div_rn(column - kept, tl.load(u + j * u_stride + j)), mask=inside)
        tl.debug_barrier()       # the errors must be there when the next column reads them


@triton.jit
def _quantize(w, u, scale, zero, top, err, codes, columns, rows, w_stride, u_stride, scale_stride, zero_stride,
              err_stride, codes_stride, TILE: tl.constexpr):
    row = tl.program_id(0) * TILE + tl.arange(0, TILE)
    inside = row < rows
    t = tl.load(top + row, mask=inside, other=1.0)
    for j in range(columns):
        column = _updated_column(w, u, err, j, row, inside, w_stride, u_stride, err_stride)
        s = tl.load(scale + j * scale_stride + row, mask=inside, other=1.0)
        z = tl.load(zero + j * zero_stride + row, mask=inside, other=0.0)
        steps = tl.minimum(tl.maximum(tl.div_rn(column, s), -z), t - z)
        steps = (steps + 12582912.0) - 12582912.0    # 1.5 * 2**23: rounds halves to even, as torch.round does
        tl.store(codes + j * codes_stride + row, (steps + z).to(tl.uint8), mask=inside)
        rounded = steps * s
        tl.store(w + j * w_stride + row, rounded, mask=inside)
        tl.store(err + j * err_stride + row, tl.div_rn(column - rounded, tl.load(u + j * u_stride + j)), mask=inside)
        tl.debug_barrier()       # the errors must be there when the next column reads them
