"""Losses that teach a binarized network: attention maps, logits, class distributions."""
from collections.abc import Sequence

import torch
import torch.nn.functional as F

ATTENTION_NORMS = ('l2', 'max')


def attention_map(features: torch.Tensor, norm: str = 'l2') -> torch.Tensor:
    """Return attention maps: Q = sum over channels of squared features, flattened and divided by its norm.

    Zagoruyko and Komodakis (ICLR 2017), as used in Real-to-Binary (Martinez et al., ICLR 2020, section 4.2).

    Args:
        features: (N, C, H, W).
        norm: 'l2', as in the paper, or 'max', as in larq's training.

    Returns:
        Tensor (N, H * W); all zero where the features are.

    Raises:
        ValueError: `norm` is another, or the features are not 4-D.
    """
    if norm not in ATTENTION_NORMS:
        raise ValueError(f'norm: found {norm!r}, expected one of {ATTENTION_NORMS}')
    if features.dim() != 4:
        raise ValueError(f'features: found shape {tuple(features.shape)}, expected (N, C, H, W)')
    q = features.square().sum(1).flatten(1)
    size = torch.linalg.vector_norm(q, dim=1, keepdim=True) if norm == 'l2' else q.amax(1, keepdim=True)
    return q / size.clamp_min(torch.finfo(q.dtype).tiny)


def attention_loss(student: Sequence[torch.Tensor], teacher: Sequence[torch.Tensor], norm: str = 'l2') -> torch.Tensor:
    """Return the distance of the attention maps of matched layers.

    'l2':  sum over layers of  mean over images of  || Q_s - Q_t ||_2      (Real-to-Binary, eq. 4)
    'max': mean over layers of  mean over images and positions of  (Q_s - Q_t)^2      (larq's training; weight 30)

    Args:
        student, teacher: Features (N, C, H, W) of each layer; channels may differ.
        norm: As for `attention_map`.

    Returns:
        0-D tensor.
    """
    distances = []
    for s, t in zip(student, teacher):
        difference = attention_map(s, norm) - attention_map(t.detach(), norm)
        distances.append(
            torch.linalg.vector_norm(difference, dim=1).mean() if norm == 'l2' else difference.square().mean())
    total = torch.stack(distances)
    return total.sum() if norm == 'l2' else total.mean()


def logit_loss(student: torch.Tensor, teacher: torch.Tensor, temperature: float = 1.0) -> torch.Tensor:
    """Return T^2 KL( softmax(teacher / T) || softmax(student / T) ), mean over images (Hinton et al., 2015).

    Shapes: student and teacher (N, classes) -> ().
    """
    of_student = F.log_softmax(student / temperature, -1)
    of_teacher = F.log_softmax(teacher.detach() / temperature, -1)
    return F.kl_div(of_student, of_teacher, reduction='batchmean', log_target=True) * temperature ** 2


def distributional_loss(student: torch.Tensor, teacher: torch.Tensor, temperature: float = 1.0) -> torch.Tensor:
    """Return ReActNet's loss, the mean of -T^2 sum_c softmax(teacher / T)_c log softmax(student / T)_c (eq. 5, T = 1).

    It is `logit_loss` plus the teacher's entropy, which has no gradient.

    Shapes: student and teacher (N, classes) -> ().
    """
    of_teacher = F.softmax(teacher.detach() / temperature, -1)
    return F.cross_entropy(student / temperature, of_teacher) * temperature ** 2

KD_LOSSES = {'kl': logit_loss, 'distributional': distributional_loss}
