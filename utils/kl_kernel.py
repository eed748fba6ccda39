"""Triton kernel of the KL divergence between two rows of logits, in one pass over them: same function as `plain_kl` of
losses.py, which is its check. torch's own operations read and write a row of float32 ten times."""
import torch
import triton
import triton.language as tl

TILE = 2048                      # of the vocabulary


def divergence(teacher: torch.Tensor, logits: torch.Tensor) -> torch.Tensor:
    """KL(teacher ‖ candidate) in nats of every token, float32 [tokens]; both are logits [tokens, vocabulary] of 16 or
    32 bits."""
    tokens, vocabulary = logits.shape
    values = torch.empty(tokens, dtype=torch.float32, device=logits.device)
    _divergence[(tokens,)](teacher.contiguous(), logits.contiguous(), values, vocabulary, TILE, num_warps=8)
    return values


def try_out(device: torch.device) -> None:
    """Compile and launch the kernel on one token; raises what that raises."""
    logits = torch.zeros(1, 8, dtype=torch.bfloat16, device=device)
    divergence(logits, logits)
    torch.cuda.synchronize(device)


@triton.jit
def _divergence(teacher, logits, values, vocabulary, TILE: tl.constexpr):
    """With p ∝ exp(z_p) and q ∝ exp(z_q): Σ p (z_p − z_q) less the difference of the logarithms of the two sums of
    exponentials. Those are relative to the largest logit so far, or float32 would lose the small differences."""
    row = tl.program_id(0).to(tl.int64) * vocabulary
    most_p, most_q, sum_p, sum_q, moved = -float("inf"), -float("inf"), 0.0, 0.0, 0.0
    for start in range(0, vocabulary, TILE):
        column = start + tl.arange(0, TILE)
        inside = column < vocabulary
        z_p = tl.load(teacher + row + column, mask=inside, other=-float("inf")).to(tl.float32)
        z_q = tl.load(logits + row + column, mask=inside, other=-float("inf")).to(tl.float32)
        higher_p, higher_q = tl.maximum(most_p, tl.max(z_p, 0)), tl.maximum(most_q, tl.max(z_q, 0))
        p = tl.exp(z_p - higher_p)
        sum_p = sum_p * tl.exp(most_p - higher_p) + tl.sum(p, 0)
        moved = moved * tl.exp(most_p - higher_p) + tl.sum(tl.where(inside, p * (z_p - z_q), 0.0), 0)
        sum_q = sum_q * tl.exp(most_q - higher_q) + tl.sum(tl.exp(z_q - higher_q), 0)
        most_p, most_q = higher_p, higher_q
    tl.store(values + tl.program_id(0), moved / sum_p - (most_p - most_q) - (tl.log(sum_p) - tl.log(sum_q)))
