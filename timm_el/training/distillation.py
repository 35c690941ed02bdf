"""Distillation task in the style of `timm.task`: logits, class distributions, attention maps."""
from collections.abc import Sequence
from typing import Any

import torch
import torch.nn as nn
from timm.task import DistillationTeacher, LogitDistillationTask
from timm.utils import unwrap_model

from .losses import ATTENTION_NORMS, KD_LOSSES, attention_loss


def residual_blocks(model: nn.Module) -> list[str]:
    """Return the paths of the blocks of a timm model's stages, Real-to-Binary's transfer points ('layer1.0', ...)."""
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
    """Outputs of some layers of a model that runs inside `with`."""

    def __init__(self, model: nn.Module, paths: Sequence[str]) -> None:
        self.model, self.paths = model, paths
        self.outputs: dict[str, torch.Tensor] = {}

    def __enter__(self) -> '_Tap':
        # Only while it runs: a copy of the model, as EMA takes one, must not write here.
        self.handles = [
            self.model.get_submodule(path).register_forward_hook(
                lambda module, args, output, path=path: self.outputs.__setitem__(path, output))
            for path in self.paths]
        return self

    def __exit__(self, *exception: object) -> None:
        for handle in self.handles:
            handle.remove()


class DistillationTask(LogitDistillationTask):
    """Task that distils a float or partly binarized teacher into a binarized student: labels, logits, attention maps.

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
            teacher_model: str | nn.Module | DistillationTeacher | None,
            attention_loss_weight: float = 0.0,
            match_layers: Sequence[str] | None = None,
            attention_norm: str = 'l2',
            loss_type: str = 'kl',
            **kwargs: Any,
    ) -> None:
        if teacher_model is None:
            raise ValueError(
                'teacher_model: found None, distillation and attention matching need a teacher; pass a trained module '
                'or the name of a pretrained model, or use timm.task.ClassificationTask')
        if loss_type not in KD_LOSSES:
            raise ValueError(f'loss_type: found {loss_type!r}, expected one of {tuple(KD_LOSSES)}')
        if attention_norm not in ATTENTION_NORMS:
            raise ValueError(f'attention_norm: found {attention_norm!r}, expected one of {ATTENTION_NORMS}')
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
        self.match_layers: list[tuple[str, str]] = []
        if attention_loss_weight:
            names = residual_blocks(student) if match_layers is None else match_layers
            if isinstance(names, str) or not names:
                raise ValueError(f'match_layers: found {names!r}, expected a list of module paths')
            for name in names:
                of_student, _, of_teacher = name.partition('=')
                self.match_layers.append((of_student, of_teacher or of_student))
            _check_layers(student, [s for s, _ in self.match_layers], 'student')
            _check_layers(teacher, [t for _, t in self.match_layers], 'teacher')

    def compile(self, *args: Any, **kwargs: Any) -> nn.Module:
        """Compile as timm's task does; raise ValueError with attention matching, whose hooks would not run."""
        if self.attention_loss_weight:
            raise ValueError(
                f'attention_loss_weight: found {self.attention_loss_weight}, a compiled student hides the layers to '
                f'match; expected 0, or train without torch.compile')
        return super().compile(*args, **kwargs)

    def forward(self, input: torch.Tensor, target: torch.Tensor) -> dict[str, torch.Tensor]:
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

    def _attention_loss(self, student: dict[str, torch.Tensor], teacher: dict[str, torch.Tensor]) -> torch.Tensor:
        pairs = [(student[s], teacher[t]) for s, t in self.match_layers]
        for (s, t), (x, y) in zip(self.match_layers, pairs):
            if x.shape[2:] != y.shape[2:]:
                raise ValueError(
                    f'match_layers: {s!r} of the student gives {tuple(x.shape)}, {t!r} of the teacher '
                    f"{tuple(y.shape)}; expected equal height and width, match others by 'STUDENT=TEACHER'")
        return attention_loss(*zip(*pairs), self.attention_norm)
