"""Training of binarized networks: losses, a task in the style of `timm.task`, latent weights, telemetry.

| scheme | how |
|---|---|
| two stages (Bi-Real Net, ReActNet) | `real_weights=True`, then all binary from its checkpoint: the keys are equal |
| distributional loss (ReActNet) | `DistillationTask(loss_type='distributional', task_loss_weight=0.)` |
| attention and logit matching (Real-to-Binary) | `DistillationTask(attention_loss_weight=30., ...)`, step by step |

`timm-el fit` runs such schemes, one stage after another, from a YAML. timm's `train.py` runs them but for attention
matching: its logit distillation has the same gradient as the distributional loss.
"""
from .distillation import DistillationTask, residual_blocks
from .latent import binary_layers, clip_latent_weights
from .losses import attention_loss, attention_map, distributional_loss, logit_loss
from .telemetry import JsonLines, Telemetry

__all__ = [
    'attention_map', 'attention_loss', 'logit_loss', 'distributional_loss', 'residual_blocks', 'DistillationTask',
    'binary_layers', 'clip_latent_weights', 'JsonLines', 'Telemetry',
]
