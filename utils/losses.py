"""What a candidate's logits lose at every token: against the uncompressed model's, or against the text."""
from collections.abc import Sequence

import torch
import torch.nn.functional as F

from utils.kernels import kernels

KERNEL = "utils.kl_kernel"
Teacher = tuple[torch.Tensor, torch.Tensor | None]   # log-probabilities and probabilities, or logits and None


def teacher_distribution(logits: torch.Tensor, kinds: Sequence[str]) -> Teacher:
    """What `token_losses` of these kinds compares with, of the uncompressed model's logits [tokens, vocabulary]: once,
    for all candidates."""
    if fused(logits.device, logits.dtype) and "sparse_kl" not in kinds:
        return logits, None
    log_p = log_probabilities(logits)
    return log_p, log_p.exp() if "kl" in kinds else None


def token_losses(logits: torch.Tensor, teacher: Teacher | None, targets: torch.Tensor, kinds: Sequence[str],
                 kl_topk: int) -> torch.Tensor:
    """Of each kind (see `Fitness.measure`) at each token, float64 [tokens, kinds], from a candidate's logits [tokens,
    vocabulary]; `targets` [tokens] are the text's. "ppl" is the loss, of which perplexity is the exponential."""
    of_logits = teacher is not None and teacher[1] is None
    log_q = None if of_logits and set(kinds) == {"kl"} else log_probabilities(logits)
    losses = torch.empty(len(logits), len(kinds), dtype=torch.float64, device=logits.device)
    for k, kind in enumerate(kinds):
        if kind == "ppl":
            losses[:, k] = F.nll_loss(log_q, targets, reduction="none")
        elif kind == "sparse_kl":
            top, indices = teacher[0].topk(min(kl_topk, logits.shape[-1]), dim=-1)
            top = top.log_softmax(-1)
            losses[:, k] = (top.exp() * (top - log_q.gather(-1, indices).log_softmax(-1))).sum(-1)
        elif of_logits:
            losses[:, k] = kernels(KERNEL, logits.device).divergence(teacher[0], logits)
        else:
            losses[:, k] = plain_kl(*teacher, log_q)
    return losses


def plain_kl(log_p: torch.Tensor, p: torch.Tensor, log_q: torch.Tensor) -> torch.Tensor:
    """KL(p ‖ q) in nats at every token, from log-probabilities [tokens, vocabulary]."""
    return torch.linalg.vecdot(p, log_p - log_q)


def log_probabilities(logits: torch.Tensor) -> torch.Tensor:
    """float32 (float64 for a float64 model): half precision loses the small divergences that matter here."""
    return logits.to(torch.promote_types(logits.dtype, torch.float32)).log_softmax(-1)


def fused(device: torch.device, dtype: torch.dtype) -> bool:
    """Whether divergences are computed from logits, by one kernel."""
    return dtype != torch.float64 and kernels(KERNEL, device) is not None
