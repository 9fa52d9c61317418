"""What is trained for: the next token of a text, the logits of a teacher, or both."""

import torch
import torch.nn.functional as F
from torch import Tensor

__all__ = ["distillation_loss", "next_token_loss", "token_loss"]


def next_token_loss(logits_BLV: Tensor, ids_BL: Tensor) -> Tensor:
    """The mean negative log-likelihood of every token but a window's first, in nats, computed in float32 at least."""
    logits = logits_BLV[:, :-1].flatten(0, 1)
    return F.cross_entropy(_exact(logits), ids_BL[:, 1:].flatten())


def distillation_loss(logits_BLV: Tensor, teacher_BLV: Tensor) -> Tensor:
    """KL(teacher ‖ student) in nats, the mean over all positions (Hinton et al. 2015, arXiv 1503.02531, at
    temperature 1); no gradient goes to the teacher."""
    student = F.log_softmax(_exact(logits_BLV.flatten(0, -2)), dim=-1)
    teacher = F.log_softmax(_exact(teacher_BLV.detach().flatten(0, -2)), dim=-1)
    return F.kl_div(student, teacher, reduction="batchmean", log_target=True)


def token_loss(
    logits_BLV: Tensor, ids_BL: Tensor, teacher_BLV: Tensor | None = None, weight: float = 0.5
) -> Tensor:
    """(1 − weight) · next-token loss + weight · distillation loss; the former alone without a teacher."""
    if teacher_BLV is None:
        return next_token_loss(logits_BLV, ids_BL)
    distilled = distillation_loss(logits_BLV, teacher_BLV)
    if weight == 1:
        return distilled
    return (1 - weight) * next_token_loss(logits_BLV, ids_BL) + weight * distilled


def _exact(logits: Tensor) -> Tensor:
    return logits if logits.dtype == torch.float64 else logits.float()
