"""How binarized networks are taught: losses, a task in the style of `timm.task`, and what is watched while they train.

| scheme | how |
|---|---|
| two stages (Bi-Real Net, ReActNet) | `real_weights=True`, then all binary from its checkpoint: the keys are equal |
| distributional loss (ReActNet) | `DistillationTask(loss_type='distributional', task_loss_weight=0.)` |
| attention and logit matching (Real-to-Binary) | `DistillationTask(attention_loss_weight=30., ...)`, step by step |

`python -m timm_el fit` runs such schemes, one stage after another, from a YAML. timm's `train.py` runs them but for
attention matching: its logit distillation has the same gradient as the distributional loss.
"""
import json
import os
from typing import Any, Dict, List, Optional, Sequence, Tuple, Union

import torch
import torch.nn as nn
import torch.nn.functional as F
from timm.task import DistillationTeacher, LogitDistillationTask
from timm.utils import unwrap_model

from .layers import BinaryConv2d, BinaryLinear, ElasticLink

__all__ = [
    'attention_map', 'attention_loss', 'logit_loss', 'distributional_loss', 'residual_blocks', 'DistillationTask',
    'binary_layers', 'clip_latent_weights', 'JsonLines', 'Telemetry',
]

NORMS = ('l2', 'max')


def attention_map(features: torch.Tensor, norm: str = 'l2') -> torch.Tensor:
    """Where a layer looks: Q = sum over channels of squared features, flattened and divided by its norm.

    Zagoruyko and Komodakis (ICLR 2017), as used in Real-to-Binary (Martinez et al., ICLR 2020, section 4.2).

    Args:
        features: (N, C, H, W).
        norm: 'l2', of the paper, or 'max', of larq's training.

    Returns:
        Tensor (N, H * W); all zero where the features are.

    Raises:
        ValueError: `norm` is another, or the features are not 4-D.
    """
    if norm not in NORMS:
        raise ValueError(f'norm: found {norm!r}, expected one of {NORMS}')
    if features.dim() != 4:
        raise ValueError(f'features: found shape {tuple(features.shape)}, expected (N, C, H, W)')
    q = features.square().sum(1).flatten(1)
    size = torch.linalg.vector_norm(q, dim=1, keepdim=True) if norm == 'l2' else q.amax(1, keepdim=True)
    return q / size.clamp_min(torch.finfo(q.dtype).tiny)


def attention_loss(
        student: Sequence[torch.Tensor],
        teacher: Sequence[torch.Tensor],
        norm: str = 'l2',
) -> torch.Tensor:
    """Distance of the attention maps of matched layers.

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
    """T^2 KL( softmax(teacher / T) || softmax(student / T) ), mean over images (Hinton et al., 2015).

    Shapes: student and teacher (N, classes) -> ().
    """
    of_student = F.log_softmax(student / temperature, -1)
    of_teacher = F.log_softmax(teacher.detach() / temperature, -1)
    return F.kl_div(of_student, of_teacher, reduction='batchmean', log_target=True) * temperature ** 2


def distributional_loss(student: torch.Tensor, teacher: torch.Tensor, temperature: float = 1.0) -> torch.Tensor:
    """ReActNet's loss: T^2 times the mean of -sum_c softmax(teacher / T)_c log softmax(student / T)_c (eq. 5, T = 1).

    It is `logit_loss` plus the teacher's entropy, which has no gradient.

    Shapes: student and teacher (N, classes) -> ().
    """
    of_teacher = F.softmax(teacher.detach() / temperature, -1)
    return F.cross_entropy(student / temperature, of_teacher) * temperature ** 2


KD_LOSSES = {'kl': logit_loss, 'distributional': distributional_loss}


def residual_blocks(model: nn.Module) -> List[str]:
    """Paths of the blocks of a timm model's stages, Real-to-Binary's transfer points ('layer1.0', 'layer1.1', ...)."""
    stages = [info['module'] for info in getattr(model, 'feature_info', [])]
    stages = [path for path in stages if isinstance(dict(model.named_modules()).get(path), nn.Sequential)]
    return [f'{path}.{name}' for path in stages for name, _ in model.get_submodule(path).named_children()]


def _check_layers(model: nn.Module, paths: Sequence[str], whose: str) -> None:
    known = dict(model.named_modules())
    for path in paths:
        if path not in known:
            hint = ', '.join(residual_blocks(model)) or ', '.join(name for name, _ in model.named_children())
            raise ValueError(
                f'match_layers: the {whose} has no layer {path!r}, expected some of its modules, as {hint}; '
                f"where names differ write 'STUDENT=TEACHER'")


class _Tap:
    """The outputs of some layers of a model, while it runs inside `with`."""

    def __init__(self, model: nn.Module, paths: Sequence[str]) -> None:
        self.model, self.paths = model, paths
        self.outputs: Dict[str, torch.Tensor] = {}

    def __enter__(self) -> '_Tap':
        # Only while it runs: a copy of the model, as EMA takes one, must not write here.
        self.handles = [
            self.model.get_submodule(path).register_forward_hook(
                lambda module, args, output, path=path: self.outputs.__setitem__(path, output))
            for path in self.paths]
        return self

    def __exit__(self, *exception) -> None:
        for handle in self.handles:
            handle.remove()


class DistillationTask(LogitDistillationTask):
    """A real or less binary network teaches a binarized one: labels, logits and attention maps.

    loss = task_loss_weight * criterion(student, labels) + distill_loss_weight * logit term
           + attention_loss_weight * `attention_loss` of the matched layers

    with the logit term `logit_loss` ('kl') or `distributional_loss` ('distributional'). Real-to-Binary's weights
    (task, attention, logits) are 1, 30, 3 while activations become binary and 1, 0, 0.8 while weights do, with the
    'max' norm; ReActNet's are 0, 0, 1 with loss_type='distributional'.

    The teacher stays in evaluation mode and gets no gradient. With `torch.compile` only without attention matching.

    Args:
        student_model: The network to train.
        teacher_model: A module, or the name of a timm model whose pretrained weights have the student's classes.
        attention_loss_weight: Weight of attention matching, 0 for none.
        match_layers: Module paths whose outputs (N, C, H, W) are matched, 'PATH', or 'STUDENT=TEACHER' where the names
            differ; all blocks of the student's stages if None.
        attention_norm: As for `attention_map`.
        loss_type: 'kl' or 'distributional'.
        kwargs: As for timm's `LogitDistillationTask`: criterion, task_loss_weight, distill_loss_weight, temperature...

    Returns (forward):
        Dict with 'loss', 'output' (the student's logits), 'task_loss', 'kd_loss', and 'attention_loss' if it is used.

    Raises:
        ValueError: There is no teacher, it has another number of classes, a layer to match does not exist, or the
            features of two matched layers differ in size (the last in forward).
    """

    def __init__(
            self,
            student_model: nn.Module,
            teacher_model: Union[str, nn.Module, DistillationTeacher, None],
            attention_loss_weight: float = 0.0,
            match_layers: Optional[Sequence[str]] = None,
            attention_norm: str = 'l2',
            loss_type: str = 'kl',
            **kwargs,
    ) -> None:
        if teacher_model is None:
            raise ValueError(
                'teacher_model: found None, distillation and attention matching need a teacher; pass a trained module '
                'or the name of a pretrained model, or use timm.task.ClassificationTask')
        if loss_type not in KD_LOSSES:
            raise ValueError(f'loss_type: found {loss_type!r}, expected one of {tuple(KD_LOSSES)}')
        if attention_norm not in NORMS:
            raise ValueError(f'attention_norm: found {attention_norm!r}, expected one of {NORMS}')
        super().__init__(student_model, teacher_model, **kwargs)
        self.loss_type = loss_type
        self.attention_loss_weight = attention_loss_weight
        self.attention_norm = attention_norm
        student, teacher = unwrap_model(student_model), unwrap_model(self.teacher.model)
        self.teacher.requires_grad_(False)
        # timm gives a pretrained model of other classes a new head, which teaches noise.
        found = teacher.pretrained_cfg['num_classes'] if isinstance(teacher_model, str) \
            and not kwargs.get('teacher_pretrained_path') else getattr(teacher, 'num_classes', student.num_classes)
        if found != student.num_classes:
            raise ValueError(
                f'teacher_model: found {found} classes, expected {student.num_classes}, those of the student; '
                f'train the teacher on these classes and pass it as a module, or with its checkpoint')
        self.match_layers: List[Tuple[str, str]] = []
        if attention_loss_weight:
            names = residual_blocks(student) if match_layers is None else match_layers
            if isinstance(names, str) or not names:
                raise ValueError(f'match_layers: found {names!r}, expected a list of module paths')
            for name in names:
                of_student, _, of_teacher = name.partition('=')
                self.match_layers.append((of_student, of_teacher or of_student))
            _check_layers(student, [s for s, _ in self.match_layers], 'student')
            _check_layers(teacher, [t for _, t in self.match_layers], 'teacher')

    def compile(self, *args, **kwargs) -> nn.Module:
        """As timm's; refused with attention matching, whose hooks a compiled model does not run."""
        if self.attention_loss_weight:
            raise ValueError(
                f'attention_loss_weight: found {self.attention_loss_weight}, a compiled student hides the layers to '
                f'match; expected 0, or train without torch.compile')
        return super().compile(*args, **kwargs)

    def forward(self, input: torch.Tensor, target: torch.Tensor) -> Dict[str, torch.Tensor]:
        with _Tap(unwrap_model(self.trainable_module), [s for s, _ in self.match_layers]) as of_student:
            logits = self.trainable_module(input)
        teacher_input = self.teacher.normalize_input(input, self.student_mean, self.student_std).detach()
        with torch.no_grad(), _Tap(unwrap_model(self.teacher.model), [t for _, t in self.match_layers]) as of_teacher:
            teacher_logits = self.teacher(teacher_input)
        task_loss = self.criterion(logits, target)
        kd_loss = KD_LOSSES[self.loss_type](logits, teacher_logits, self.temperature)
        result = {
            'loss': self.task_loss_weight * task_loss + self.distill_loss_weight * kd_loss,
            'output': logits, 'task_loss': task_loss, 'kd_loss': kd_loss}
        if self.match_layers:
            result['attention_loss'] = self._attention_loss(of_student.outputs, of_teacher.outputs)
            result['loss'] = result['loss'] + self.attention_loss_weight * result['attention_loss']
        return result

    def _attention_loss(self, student: Dict[str, torch.Tensor], teacher: Dict[str, torch.Tensor]) -> torch.Tensor:
        pairs = [(student[s], teacher[t]) for s, t in self.match_layers]
        for (s, t), (x, y) in zip(self.match_layers, pairs):
            if x.shape[2:] != y.shape[2:]:
                raise ValueError(
                    f'match_layers: {s!r} of the student gives {tuple(x.shape)}, {t!r} of the teacher '
                    f"{tuple(y.shape)}; expected equal height and width, match others by 'STUDENT=TEACHER'")
        return attention_loss(*zip(*pairs), self.attention_norm)


# ---------------------------------------------------------------------------------------------------------------------
# Latent weights

def binary_layers(model: nn.Module) -> Dict[str, nn.Module]:
    """The layers of a model that sign their input or their weight, by path."""
    return {
        path: module for path, module in model.named_modules()
        if isinstance(module, (BinaryConv2d, BinaryLinear))
        and (module.weight_quantizer is not None or module.input_quantizer is not None)}


@torch.no_grad()
def clip_latent_weights(model: nn.Module, bound: float = 1.0) -> None:
    """W <- clip(W, -bound, bound) in every layer whose weight is quantized, to be called after an optimizer's step.

    Outside [-1, 1] the estimator has no gradient, and a latent weight could not come back (BinaryConnect, XNOR-Net).
    """
    for layer in binary_layers(model).values():
        if layer.weight_quantizer is not None:
            layer.weight.clamp_(-bound, bound)


# ---------------------------------------------------------------------------------------------------------------------
# Telemetry

class JsonLines:
    """A file of JSON lines, one record each. Reopened at an epoch, it forgets that epoch and what came after.

    Args:
        path: The file.
        epoch: First epoch that is still to come; records with a smaller 'epoch' stay.
    """

    def __init__(self, path: str, epoch: int = 0) -> None:
        self.path = path
        kept = [record for record in self.read(path) if record['epoch'] < epoch]
        with open(path, 'w') as f:
            f.writelines(json.dumps(record) + '\n' for record in kept)

    @staticmethod
    def read(path: str) -> List[Dict[str, Any]]:
        """All records; a last line that was cut short by an interruption is left out."""
        if not os.path.exists(path):
            return []
        with open(path) as f:
            return [json.loads(line) for line in f if line.endswith('\n')]

    def write(self, record: Dict[str, Any]) -> None:
        """Append a record."""
        with open(self.path, 'a') as f:
            f.write(json.dumps(record) + '\n')


class Telemetry:
    """What binary layers do while they train, one JSON line a record.

    A record has 'epoch', 'update', 'gamma' (path of each Elastic-Link with one -> value), 'histogram_edges', and
    'layers', path -> what follows; rows without meaning (no binary weight, no binary input, no images) are left out.

    | field | meaning |
    |---|---|
    | flip_ratio | share of weights whose sign differs from the record before, or from the start |
    | weight_positive | share of weights whose sign is +1 |
    | input_positive | share of inputs whose sign is +1, on the images given |
    | alpha | mean over output channels of alpha = mean(abs(W)) |
    | histogram | share of latent weights W / mean(abs(W)) per bin; the outer bins hold what lies beyond |

    Args:
        model: The network.
        path: The file.
        epoch: First epoch that is still to come, as for `JsonLines`.
        bins: Number of bins, from -reach to reach.
        reach: In units of mean(abs(W)).
    """

    def __init__(self, model: nn.Module, path: str, epoch: int = 0, bins: int = 24, reach: float = 3.0) -> None:
        self.model = model
        self.layers = binary_layers(model)
        self.lines = JsonLines(path, epoch)
        self.edges = torch.linspace(-reach, reach, bins + 1)
        self.signs = self._signs()

    @torch.no_grad()
    def _signs(self) -> Dict[str, torch.Tensor]:
        return {
            path: layer.latent_weight() >= 0 for path, layer in self.layers.items()
            if layer.weight_quantizer is not None}

    @torch.no_grad()
    def _input_shares(self, images: torch.Tensor) -> Dict[str, float]:
        shares: Dict[str, float] = {}
        handles = [
            layer.register_forward_pre_hook(
                lambda module, args, path=path: shares.__setitem__(path, (args[0] >= 0).float().mean().item()))
            for path, layer in self.layers.items() if layer.input_quantizer is not None]
        training = self.model.training
        try:
            self.model.eval()(images)
        finally:
            self.model.train(training)
            for handle in handles:
                handle.remove()
        return shares

    @torch.no_grad()
    def _histogram(self, weight: torch.Tensor) -> List[float]:
        scaled = (weight / weight.abs().mean().clamp_min(torch.finfo(weight.dtype).tiny)).flatten().float().cpu()
        inside = scaled.clamp(self.edges[0].item(), self.edges[-1].item())
        counts = torch.histogram(inside, self.edges).hist
        return [round(share, 5) for share in (counts / scaled.numel()).tolist()]

    @torch.no_grad()
    def record(self, epoch: int, update: int, images: Optional[torch.Tensor] = None) -> Dict[str, Any]:
        """Write a record and return it.

        Args:
            epoch: Index of the epoch.
            update: Optimizer steps taken so far.
            images: A batch (N, C, H, W) for `input_positive`; the model runs on it in evaluation mode.
        """
        inputs = {} if images is None else self._input_shares(images)
        signs = self._signs()
        rows: Dict[str, Dict[str, Any]] = {path: {} for path in self.layers}
        for path, sign in signs.items():
            weight = self.layers[path].weight
            rows[path].update(
                flip_ratio=round((sign != self.signs[path]).float().mean().item(), 6),
                weight_positive=round(sign.float().mean().item(), 6),
                alpha=weight.abs().mean().item(), histogram=self._histogram(weight))
        for path, share in inputs.items():
            rows[path]['input_positive'] = round(share, 6)
        self.signs = signs
        gammas = {
            path: link.gamma.item() for path, link in self.model.named_modules()
            if isinstance(link, ElasticLink) and link.gamma is not None}
        record = dict(
            epoch=epoch, update=update, gamma=gammas, layers=rows,
            histogram_edges=[round(edge, 4) for edge in self.edges.tolist()])
        self.lines.write(record)
        return record
