"""Configuration of a run of `fit`: the fields of its YAML, checked, and its stages."""
import dataclasses
import os
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
import yaml

from ..fields import check_fields
from .images import FILTERS

RecipeField = str | dict[str, Any]
LENGTHS = {'input_size': 3, 'mean': 3, 'std': 3, 'scale': 2, 'ratio': 2}


@dataclass(frozen=True)
class FitConfig:
    """Settings that decide the result of a run. Names and meanings are train.py's where it has them.

    Args:
        recipe: Name or dict of a recipe; None for the model as it is.
        images: 'files': timm's loader and transforms read them in every epoch. 'memory': they are decoded once and kept
            on the device, which cuts random boxes out of them (`scale`, `ratio`), scales and mirrors them (`hflip`).
            None: 'memory' with `pad_crop`, else 'files'.
        pad_crop: In memory: crops out of images padded by so many pixels, in place of boxes.
        memory_size: In memory: pixels of the training images that are kept; None: those of `input_size`.
        teacher: Name of a timm model; with `teacher_recipe`, `teacher_kwargs`, and a `teacher_checkpoint`, without
            which its pretrained weights are used.
        kd_loss_type, attention_loss_weight, match_layers, attention_norm: As for `training.DistillationTask`.
        distill_loss_weight: Weight of the logit term; used if there is a teacher.
        amp, amp_dtype: Train under autocast, in bfloat16, where gradients need no scaling; validation is in float32.
        torchcompile: Backend of `torch.compile` for training, as 'inductor'; validation runs the model as it is.
        clip_latent: Clip latent weights to +- this after each step, None not to.
        share: Of the time of all stages, in a run with a budget of seconds; only its ratio to those of others matters.
        val_interval: Epochs between two validations; log, telemetry and checkpoint are written with each, and after the
            last epoch.
        telemetry_interval: Steps between two records of `training.Telemetry`, beside that of each validation.

    Raises:
        ValueError: An unknown field, a value of the wrong type, or a count that is not positive.
    """
    model: str = 'el_resnet26'
    recipe: RecipeField | None = None
    model_kwargs: dict[str, Any] = field(default_factory=dict)
    num_classes: int = 10
    input_size: Sequence[int] = (3, 32, 32)
    mean: Sequence[float] = (0.4914, 0.4822, 0.4465)
    std: Sequence[float] = (0.2470, 0.2435, 0.2616)
    initial_checkpoint: str | None = None
    seed: int = 0
    # images
    train_split: str = 'train'
    val_split: str = 'validation'
    batch_size: int = 64
    images: str | None = None
    pad_crop: int | None = None
    memory_size: int | None = None
    train_crop_mode: str | None = None
    scale: Sequence[float] = (0.08, 1.0)
    ratio: Sequence[float] = (3 / 4, 4 / 3)
    hflip: float = 0.5
    color_jitter: float = 0.0
    crop_pct: float = 1.0
    interpolation: str = 'bilinear'
    # optimization
    epochs: int = 10
    opt: str = 'adam'
    opt_kwargs: dict[str, Any] = field(default_factory=dict)
    lr: float = 1e-3
    weight_decay: float = 0.0
    sched: str = 'cosine'
    sched_on_updates: bool = True
    min_lr: float = 0.0
    warmup_epochs: int = 0
    warmup_lr: float = 1e-5
    decay_milestones: Sequence[int] = (90, 180, 270)
    decay_rate: float = 0.1
    smoothing: float = 0.0
    amp: bool = False
    amp_dtype: str = 'bfloat16'
    torchcompile: str | None = None
    clip_latent: float | None = None
    model_ema: bool = False
    model_ema_decay: float = 0.9998
    # teaching
    teacher: str | None = None
    teacher_recipe: RecipeField | None = None
    teacher_kwargs: dict[str, Any] = field(default_factory=dict)
    teacher_checkpoint: str | None = None
    task_loss_weight: float = 1.0
    distill_loss_weight: float = 1.0
    kd_loss_type: str = 'kl'
    kd_temperature: float = 1.0
    attention_loss_weight: float = 0.0
    match_layers: Sequence[str] | None = None
    attention_norm: str = 'l2'
    share: float = 1.0
    # records
    val_interval: int = 1
    telemetry_interval: int | None = None

    def __post_init__(self) -> None:
        check_fields(self, '; YAML takes 1e-3 for text, write 0.001 or 1.0e-3')
        for name in (
                'epochs', 'batch_size', 'num_classes', 'pad_crop', 'memory_size', 'val_interval', 'telemetry_interval'):
            value = getattr(self, name)
            if value is not None and value <= 0:
                raise ValueError(f'{name}: found {value}, expected a positive integer')
        for name, length in LENGTHS.items():
            if len(getattr(self, name)) != length:
                raise ValueError(f'{name}: found {list(getattr(self, name))}, expected {length} numbers')
        if self.warmup_epochs >= self.epochs:
            raise ValueError(
                f'warmup_epochs: found {self.warmup_epochs}, expected fewer than the {self.epochs} of epochs, or the '
                f'learning rate only rises')
        if self.share <= 0:
            raise ValueError(f'share: found {self.share}, expected a positive number')
        for name in ('teacher_recipe', 'teacher_kwargs', 'teacher_checkpoint'):
            if getattr(self, name) and (self.teacher is None or self.teacher_checkpoint is None):
                raise ValueError(
                    f'{name}: found {getattr(self, name)!r}, expected teacher and teacher_checkpoint beside it; the '
                    f'name of a pretrained model in teacher stands alone')
        self._check_images()
        if self.amp_dtype != 'bfloat16':
            raise ValueError(f"amp_dtype: found {self.amp_dtype!r}, expected 'bfloat16'; train.py has float16")
        if self.torchcompile is not None and self.torchcompile not in torch.compiler.list_backends(exclude_tags=()):
            raise ValueError(
                f'torchcompile: found {self.torchcompile!r}, expected a backend of torch.compile: '
                f'{", ".join(torch.compiler.list_backends())}')
        if self.sched in ('plateau', 'none'):  # it depends on what was measured; there is none
            raise ValueError(f"sched: found {self.sched!r}, expected another of timm's schedulers, such as 'constant'")

    @property
    def in_memory(self) -> bool:
        """Return whether the images are decoded once."""
        return self.images == 'memory' or self.pad_crop is not None

    def _check_images(self) -> None:
        if self.images not in (None, 'files', 'memory'):
            raise ValueError(f"images: found {self.images!r}, expected 'files' or 'memory'")
        if not self.in_memory and self.memory_size is not None:
            raise ValueError(f"memory_size: found {self.memory_size}, expected images: memory beside it")
        if self.images == 'files' and self.pad_crop is not None:
            raise ValueError(f"pad_crop: found {self.pad_crop} with images: files, expected images: memory")
        if self.pad_crop is not None and self.memory_size is not None:
            raise ValueError(f'memory_size: found {self.memory_size} with pad_crop, which keeps the input_size')
        if self.in_memory:
            if self.input_size[1] != self.input_size[2]:
                raise ValueError(
                    f'input_size: found {list(self.input_size)} with images in memory, which are square; expected '
                    f'equal height and width, or images: files')
            for name, known in (
                    ('color_jitter', (0,)), ('train_crop_mode', (None, 'rrc')), ('interpolation', tuple(FILTERS))):
                if getattr(self, name) not in known:
                    raise ValueError(
                        f'{name}: found {getattr(self, name)!r} with images in memory, expected '
                        f'{" or ".join(map(repr, known))}; images: files has others')

    @classmethod
    def from_dict(cls, data: dict[str, Any]) -> 'FitConfig':
        """Return the config of the plain data of a YAML; raise ValueError for an unknown field."""
        known = [f.name for f in dataclasses.fields(cls)]
        for key in data:
            if key not in known:
                raise ValueError(f'{key}: no such field, expected some of {", ".join(known)}')
        return cls(**data)

    def to_dict(self) -> dict[str, Any]:
        """Return plain data, as in a YAML."""
        return {k: list(v) if isinstance(v, tuple) else v for k, v in dataclasses.asdict(self).items()}


def merge(base: dict[str, Any], changes: dict[str, Any]) -> dict[str, Any]:
    """Return the fields of `base` with changes; dicts (model_kwargs, opt_kwargs, ...) are merged key by key."""
    merged = dict(base)
    for key, value in changes.items():
        both = isinstance(value, dict) and isinstance(base.get(key), dict)
        merged[key] = {**base[key], **value} if both else value
    return merged


def load_config(path: str, changes: Sequence[str] = ()) -> dict[str, Any]:
    """Read a YAML as plain data, with changes to its fields, each as FIELD=VALUE.

    Raises:
        ValueError: The file holds no fields, or a change is of another form.
    """
    with open(path, encoding='utf-8') as f:
        data = _parse(path, f.read())
    if not isinstance(data, dict):
        raise ValueError(f'{path}: found a {type(data).__name__}, expected the fields of a run')
    for change in changes:
        key, equals, value = change.partition('=')
        if not equals:
            raise ValueError(f'--set: found {change!r}, expected FIELD=VALUE')
        data = merge(data, {key: _parse(f'--set {key}', value)})
    return data


def _parse(where: str, text: str) -> Any:
    """Return the plain data of YAML; raise ValueError with `where` it stands if it is none."""
    try:
        return yaml.safe_load(text)
    except yaml.YAMLError as e:
        raise ValueError(f'{where}: found {text.strip()[:40]!r}, expected YAML: {" ".join(str(e).split())}') from e


def plan_stages(data: dict[str, Any], output: str) -> list[tuple[str, FitConfig]]:
    """Return the folder and the `FitConfig` of each stage, in order; without `stages` there is one, in `output` itself.

    Raises:
        ValueError: `stages` is no list, or a stage has no name or one that is taken, or refers to a stage that does not
            come before it.
    """
    base = {k: v for k, v in data.items() if k != 'stages'}
    if 'stages' not in data:
        return [(output, FitConfig.from_dict(base))]
    plan: dict[str, tuple[str, FitConfig]] = {}
    stages = data['stages']
    if not isinstance(stages, list) or not stages or not all(isinstance(stage, dict) for stage in stages):
        raise ValueError(f'stages: found {stages!r}, expected a list of mappings, each with a name')
    for stage in stages:
        changes = dict(stage)
        name = changes.pop('name', None)
        if not isinstance(name, str) or name in plan:
            raise ValueError(f'stages: found the name {name!r}, expected one of its own for each stage')
        fields = merge(base, changes)
        for key in ('initial_stage', 'teacher_stage'):
            earlier = fields.pop(key, None)
            if earlier is None:
                continue
            if earlier not in plan:
                raise ValueError(f'{key}: found {earlier!r}, expected an earlier stage than {name!r}: {list(plan)}')
            folder, config = plan[earlier]
            checkpoint = os.path.join(folder, 'last.pth.tar')
            if key == 'initial_stage':
                fields['initial_checkpoint'] = checkpoint
            else:
                fields.update(
                    teacher=config.model, teacher_recipe=config.recipe, teacher_kwargs=config.model_kwargs,
                    teacher_checkpoint=checkpoint)
        plan[name] = os.path.join(output, name), FitConfig.from_dict(fields)
    return list(plan.values())
