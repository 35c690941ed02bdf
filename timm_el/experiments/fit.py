"""Trainer of one network, stage by stage, that goes on where it stopped.

A run folder holds args.yaml, timm's checkpoints (last, best), log.jsonl, telemetry.jsonl and, of a binarized network,
packed.safetensors, which is written when training ends.
"""
import argparse
import dataclasses
import itertools
import math
import os
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.nn as nn
from timm.optim import create_optimizer_v2
from timm.scheduler import create_scheduler_v2
from timm.task import ClassificationTask, TrainingTask, load_task_ema_checkpoint, resume_task_checkpoint
from timm.utils import CheckpointSaver, random_seed, unwrap_model

from ..models.factory import create
from ..training.distillation import DistillationTask
from ..training.latent import clip_latent_weights
from ..training.telemetry import JsonLines, Telemetry
from ..weights.files import save_packed
from ..weights.loading import load_checkpoint
from ..weights.packed import binary_weight_layers
from .config import FitConfig, plan_stages
from .images import Batch, create_images, epoch_seed
from .lease import Lease, LeaseEnded, epochs_within, hand_over
from .runs import ARGS, LAST, LOG, PACKED, read_args, write_args

PACE_SECONDS = 3  # of steps, by which a pace is measured
WARMUP_PART = 4  # a warm-up takes at most this part of the epochs that a lease has time for

# ---------------------------------------------------------------------------------------------------------------------
# One run

def create_network(config: FitConfig) -> nn.Module:
    """Return the network of a config, drawn from its seed, with the weights of `initial_checkpoint` if it names one."""
    random_seed(config.seed)
    model = create(
        config.model, config.recipe, num_classes=config.num_classes, pretrained_cfg_overlay=_own_cfg(config),
        **config.model_kwargs)
    if config.initial_checkpoint is not None:
        load_checkpoint(model, config.initial_checkpoint)
    return model


def _own_cfg(config: FitConfig) -> dict[str, Any]:
    return dict(mean=tuple(config.mean), std=tuple(config.std), input_size=tuple(config.input_size))


def _create_teacher(config: FitConfig) -> nn.Module | str | None:
    if config.teacher_checkpoint is None:
        return config.teacher  # with its pretrained weights, or no teacher at all
    teacher = create(
        config.teacher, config.teacher_recipe, num_classes=config.num_classes,
        pretrained_cfg_overlay=_own_cfg(config), **config.teacher_kwargs)
    load_checkpoint(teacher, config.teacher_checkpoint)
    return teacher


def create_task(config: FitConfig, device: torch.device) -> TrainingTask:
    """Return the task of a config: labels alone, or a `DistillationTask` if it names a teacher or matches attention."""
    model = create_network(config).to(device, memory_format=torch.channels_last)
    criterion = nn.CrossEntropyLoss(label_smoothing=config.smoothing)
    if config.teacher is None and not config.attention_loss_weight:
        task = ClassificationTask(model, criterion, device=device, verbose=False)
    else:
        task = DistillationTask(
            model, _create_teacher(config), attention_loss_weight=config.attention_loss_weight,
            match_layers=config.match_layers, attention_norm=config.attention_norm, loss_type=config.kd_loss_type,
            criterion=criterion, task_loss_weight=config.task_loss_weight,
            distill_loss_weight=config.distill_loss_weight, temperature=config.kd_temperature, device=device,
            verbose=False).to(device)
    if config.torchcompile is not None:
        task.compile(backend=config.torchcompile)
    return task


def eval_model(task: TrainingTask) -> nn.Module:
    """Return the network of a task in eval mode, with averaged weights where there are such."""
    return unwrap_model(task.get_eval_model(ema=task.has_ema())).eval()


@torch.inference_mode()
def evaluate(task: TrainingTask, images, device: torch.device) -> dict[str, float]:
    """Return the validation loss, and top-1 and top-5 in percent, of the averaged weights where there are such."""
    model = eval_model(task)
    evaluator = task.create_evaluator()
    for x, y in images.epoch(0):
        evaluator.update(model(x.to(device)), y.to(device))
    return dict(evaluator.summary())


def has_begun(output: str) -> bool:
    """Return whether a folder holds a run with something to go on from, or to keep: a validated epoch."""
    return os.path.exists(os.path.join(output, ARGS)) and (
        os.path.exists(os.path.join(output, LAST)) or bool(JsonLines.read(os.path.join(output, LOG))))


def check_resumable(config: FitConfig, output: str) -> None:
    """Raise ValueError if a run has begun in the folder `output` with other arguments."""
    path = os.path.join(output, ARGS)
    if not has_begun(output):
        return
    found = FitConfig.from_dict(read_args(output)).to_dict()
    for name, value in config.to_dict().items():
        if found[name] != value:
            raise ValueError(
                f'{name}: found {found[name]!r} in {path}, the run to resume, expected {value!r} as now; '
                f'use the same value, or another --output')


def fit(
        config: FitConfig, output: str, data_dir: str, cache: str | None = None, device: str = 'cpu', workers: int = 2,
        stop_after: int | None = None, lease: Lease | None = None) -> dict[str, float]:
    """Train one run, or go on with it, and return its last record.

    Random numbers of an epoch depend on the seed and the epoch alone, and schedules on the step alone, so that model,
    averaged model, optimizer and epoch, which timm's checkpoint holds, are all that there is to resume.

    Args:
        config: Settings of the run.
        output: The run's folder.
        data_dir: An ImageFolder with the folders `train_split` and `val_split`.
        cache: Folder for decoded images (`images: memory`); `output` if None.
        device: As for torch.
        workers: Processes that read images.
        stop_after: Stop as if interrupted, before the epoch of this index.
        lease: Time for it; None: as much as it takes.

    Returns:
        The last line of log.jsonl: epoch, train_loss, loss, top1, top5, lr, and seconds, those of all epochs.

    Raises:
        ValueError: The folder holds a run with other arguments, or the config makes no sense.
        LeaseEnded: The time is over. packed.safetensors is that of the last step, last.pth.tar that of the last
            validation, from where the run can go on.
    """
    run = _Run(config, output, data_dir, cache or output, torch.device(device), workers)
    try:
        for epoch in range(run.start, run.epochs if stop_after is None else min(stop_after, run.epochs)):
            run.train_epoch(epoch, lease or Lease())
    except LeaseEnded:
        run.save_weights()
        raise
    run.save_weights()
    return JsonLines.read(run.log.path)[-1]


def epochs_in_time(
        config: FitConfig, share: float, lease: Lease, output: str, data_dir: str, cache: str | None = None,
        device: str = 'cpu', workers: int = 2) -> int:
    """Return the number of epochs that a run gets done in its share of a lease, at most `config.epochs`.

    The pace is that of some steps of a run that is thrown away. A run that has begun keeps its number.

    Args:
        config, output, data_dir, cache, device, workers: As for `fit`.
        share: Of the time that the lease has left, measuring included.
        lease: The lease.

    Raises:
        LeaseEnded: It ended before the pace was known.
    """
    if has_begun(output):
        return read_args(output)['epochs']
    at_end = (1 - share) * lease.left()
    with tempfile.TemporaryDirectory() as folder:
        run = _Run(config, folder, data_dir, cache or output, torch.device(device), workers)
        of_training, of_validation = run.pace(lease)
    left = lease.left() - at_end
    epochs = epochs_within(left, config.epochs, of_training, of_validation, config.val_interval)
    print(f'{output}: {len(run.images) * config.batch_size / of_training:.0f} images/s, {of_validation:.1f} s for a '
          f'validation, {left:.0f} s for {epochs} of {config.epochs} epochs', flush=True)
    return epochs


def _now(device: torch.device) -> float:
    """Return seconds at a time when the device has done all that it was told to do."""
    if device.type == 'cuda':
        torch.cuda.synchronize(device)
    return time.monotonic()


class _Run:
    """A run at the epoch where it begins or goes on; the arguments are those of `fit`."""

    def __init__(
            self, config: FitConfig, output: str, data_dir: str, cache: str, device: torch.device, workers: int,
    ) -> None:
        check_resumable(config, output)
        self.config, self.output, self.device = config, output, device
        if device.type == 'cuda':
            torch.backends.cudnn.benchmark = True  # as train.py does
        self.task = create_task(config, device)
        self.model = unwrap_model(self.task.get_trainable_module())
        self.images, self.validation = (
            create_images(config, data_dir, cache, workers, training, device) for training in (True, False))
        if not len(self.images):
            raise ValueError(
                f'batch_size: found {config.batch_size}, more than there are images in {config.train_split}')
        self.optimizer = create_optimizer_v2(
            self.model, opt=config.opt, lr=config.lr, weight_decay=config.weight_decay, **config.opt_kwargs)
        if config.model_ema:
            self.task.setup_ema(decay=config.model_ema_decay)
        os.makedirs(output, exist_ok=True)
        self.saver = CheckpointSaver(
            self.model, self.optimizer, argparse.Namespace(**config.to_dict()), checkpoint_dir=output,
            recovery_dir=output, max_history=1, task=self.task)
        self.start = self._resume()
        self.scheduler, self.epochs = create_scheduler_v2(
            self.optimizer, config.sched, config.epochs, decay_milestones=config.decay_milestones,
            decay_rate=config.decay_rate, min_lr=config.min_lr, warmup_lr=config.warmup_lr,
            warmup_epochs=config.warmup_epochs, step_on_epochs=not config.sched_on_updates,
            updates_per_epoch=len(self.images))
        self.scheduler.step_update(self.start * len(self.images))
        self.scheduler.step(self.start)
        if not has_begun(output):  # now that nothing is left that could refuse the arguments
            write_args(output, config.to_dict())
        self.log = JsonLines(os.path.join(output, LOG), self.start)
        self.telemetry = Telemetry(self.model, os.path.join(output, 'telemetry.jsonl'), self.start)
        self.began, self.before = time.monotonic(), sum(line['seconds'] for line in JsonLines.read(self.log.path)[-1:])

    def _resume(self) -> int:
        """Load the last checkpoint, if there is one, and return the epoch to begin with."""
        last = os.path.join(self.output, LAST)
        if not os.path.exists(last):
            return 0
        start = resume_task_checkpoint(self.task, last, self.optimizer, log_info=False)
        self.saver.load_state_dict_from_checkpoint(last)
        if self.config.model_ema:
            load_task_ema_checkpoint(self.task, last)
        return start

    def save_weights(self) -> None:
        """Write packed.safetensors, with float16 for what is not binary (bfloat16 beyond its range).

        Nothing of a float network; of one that cannot be packed, such as ternary weights, a line that says why.
        """
        model, path, error = eval_model(self.task), os.path.join(self.output, PACKED), None
        if not binary_weight_layers(model):
            return
        for dtype in (torch.float16, torch.bfloat16):
            try:
                return save_packed(model, path, dtype)
            except ValueError as e:
                error = e
        Path(path).unlink(missing_ok=True)  # of an earlier end
        print(f'{self.output}: there is no {PACKED}: {error}', flush=True)

    def pace(self, lease: Lease) -> tuple[float, float]:
        """Take some steps, and return the seconds of an epoch's training, and of a validation with what it writes."""
        def mean_seconds(images, work: Callable[[torch.Tensor, torch.Tensor], Any]) -> float:
            began, count = 0.0, -2  # two that do not count
            for batch in itertools.chain.from_iterable(images.epoch(i) for i in itertools.count()):
                lease.check()
                if count == 0:
                    began = _now(self.device)
                work(*self._placed(batch))
                count += 1
                if count > 0 and _now(self.device) - began > PACE_SECONDS:
                    return (_now(self.device) - began) / count

        self.task.train()
        of_step = mean_seconds(self.images, lambda x, y: self._step(x, y, 1))
        model = eval_model(self.task)
        with torch.inference_mode():
            of_batch = mean_seconds(self.validation, lambda x, y: model(x))
        began = _now(self.device)
        self.saver.save_checkpoint(0, 0.0)
        return of_step * len(self.images), of_batch * len(self.validation) + _now(self.device) - began

    def _placed(self, batch: Batch) -> Batch:
        return batch[0].to(self.device, memory_format=torch.channels_last), batch[1].to(self.device)

    def train_epoch(self, epoch: int, lease: Lease) -> None:
        """Train one epoch; where it ends with a validation, write log, telemetry and a checkpoint.

        Raises:
            LeaseEnded: The lease ended in its middle; what its steps made of the weights stays.
        """
        config, steps = self.config, len(self.images)
        update, total = epoch * steps, torch.zeros((), dtype=torch.float64, device=self.device)
        random_seed(epoch_seed(config.seed, epoch))
        self.task.train()
        for batch in self.images.epoch(epoch):
            lease.check()
            x, y = self._placed(batch)
            update += 1
            total += self._step(x, y, update)
            if config.telemetry_interval and update % config.telemetry_interval == 0:
                self.telemetry.record(epoch, update, x)
        lr = self.optimizer.param_groups[0]['lr']
        self.scheduler.step(epoch + 1)
        if (epoch + 1) % config.val_interval == 0 or epoch + 1 == self.epochs:
            self.telemetry.record(epoch, update, x)
            self._validate(epoch, train_loss=_rounded(total.item() / steps), lr=lr)

    def _validate(self, epoch: int, **trained: float | None) -> None:
        """Write a line of the log and a checkpoint; `trained` is what the line says of the training."""
        metrics = evaluate(self.task, self.validation, self.device)
        row = dict(
            epoch=epoch, train_loss=trained['train_loss'], loss=_rounded(metrics['loss']), top1=metrics['top1'],
            top5=metrics['top5'], lr=trained['lr'], seconds=round(self.before + time.monotonic() - self.began, 1))
        self.log.write(row)
        print(f'{self.output}: {row}', flush=True)
        self.saver.save_checkpoint(epoch, metrics['top1'])

    def _step(self, x: torch.Tensor, y: torch.Tensor, update: int) -> torch.Tensor:
        """Take optimizer step number `update` on images (N, C, H, W) and labels (N,), and return the loss."""
        with torch.autocast(self.device.type, torch.bfloat16, enabled=self.config.amp):
            loss = self.task(x, y)['loss']
        loss.backward()
        self.optimizer.step()
        self.optimizer.zero_grad()
        if self.config.clip_latent is not None:
            clip_latent_weights(self.model, self.config.clip_latent)
        self.task.update_ema(step=update)
        self.scheduler.step_update(update)
        return loss.detach()


def _rounded(value: float) -> float | None:
    return round(value, 5) if math.isfinite(value) else None  # JSON knows no NaN


# ---------------------------------------------------------------------------------------------------------------------
# Stages


def fit_stages(
        data: dict[str, Any], output: str, data_dir: str, lease: Lease | None = None, hand_over_to: str | None = None,
        **places: Any) -> dict[str, float]:
    """Run or resume all stages, passing over those that are finished, and return the result of the last one.

    Args:
        data: Fields of the YAML.
        output: Folder of a folder for each stage.
        data_dir, places: As for `fit`.
        lease: Time for all of them together. Each stage has as many epochs, at most its own number, as there is time
            for in its `share` of what is left. None: as much time as it takes.
        hand_over_to: Folder for what each stage made, written when it is done, as `hand_over` says.

    Raises:
        ValueError: As for `fit`.
        LeaseEnded: The time was over before all stages were finished; what was made of that one is handed over.
    """
    result: dict[str, float] = {}
    stages = plan_stages(data, output)
    for folder, _ in stages:
        if hand_over_to is not None and os.path.abspath(folder) == os.path.abspath(hand_over_to):
            raise ValueError(f'hand-over: found {hand_over_to!r}, the folder of a run, expected another one')
    for i, (folder, config) in enumerate(stages):
        share = config.share / sum(other.share for _, other in stages[i:])
        try:
            result = _fit_stage(config, share, folder, data_dir, lease, **places)
        except LeaseEnded:
            if hand_over_to is not None and os.path.exists(os.path.join(folder, ARGS)):
                hand_over(folder, hand_over_to)
            raise
        if hand_over_to is not None:
            hand_over(folder, hand_over_to)
    return result


def _fit_stage(
        config: FitConfig, share: float, folder: str, data_dir: str, lease: Lease | None, **places: Any,
) -> dict[str, float]:
    """Run or resume one stage, with the number of epochs that its share of a lease gives."""
    if lease is not None:
        lease.check()
        torch.compiler.reset()  # graphs of the stages before
        epochs = epochs_in_time(config, share, lease, folder, data_dir, **places)
        # A warm-up is for a run of full length; of a short one it would be most.
        warmup = min(config.warmup_epochs, epochs // WARMUP_PART)
        config = dataclasses.replace(config, epochs=epochs, warmup_epochs=warmup)
    return fit(config, folder, data_dir, lease=lease, **places)
