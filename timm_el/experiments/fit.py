"""Trainer of one network, stage by stage, that goes on where it stopped.

A run folder holds args.yaml, timm's checkpoints (last, best), log.jsonl and telemetry.jsonl.
"""
import argparse
import math
import os
import time
from typing import Any

import torch
import torch.nn as nn
import yaml
from timm.models import load_checkpoint
from timm.optim import create_optimizer_v2
from timm.scheduler import create_scheduler_v2
from timm.task import ClassificationTask, TrainingTask, load_task_ema_checkpoint, resume_task_checkpoint
from timm.utils import CheckpointSaver, random_seed, unwrap_model

from ..models.factory import create
from ..training.distillation import DistillationTask
from ..training.latent import clip_latent_weights
from ..training.telemetry import JsonLines, Telemetry
from .config import FitConfig, plan_stages
from .images import create_images, epoch_seed

# ---------------------------------------------------------------------------------------------------------------------
# One run

def create_network(config: FitConfig) -> nn.Module:
    """The network of a config, drawn from its seed, with the weights of `initial_checkpoint` if it names one."""
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
    """The task of a config: labels alone, or a `DistillationTask` where it names a teacher or attention matching."""
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


@torch.inference_mode()
def evaluate(task: TrainingTask, images, device: torch.device) -> dict[str, float]:
    """Loss and top-1 in percent, of the averaged weights where there are such."""
    model = unwrap_model(task.get_eval_model(ema=task.has_ema())).eval()
    evaluator = task.create_evaluator()
    for x, y in images.epoch(0):
        evaluator.update(model(x.to(device)), y.to(device))
    return dict(evaluator.summary())


def check_resumable(config: FitConfig, output: str) -> None:
    """Raise ValueError if there is a run in the folder `output` with other arguments."""
    path = os.path.join(output, 'args.yaml')
    if not os.path.exists(path):
        return
    with open(path) as f:
        found = FitConfig.from_dict(yaml.safe_load(f)).to_dict()
    for name, value in config.to_dict().items():
        if found[name] != value:
            raise ValueError(
                f'{name}: found {found[name]!r} in {path}, the run to resume, expected {value!r} as now; '
                f'use the same value, or another --output')


def fit(
        config: FitConfig,
        output: str,
        data_dir: str,
        cache: str | None = None,
        device: str = 'cpu',
        workers: int = 2,
        stop_after: int | None = None,
) -> dict[str, float]:
    """Train, or go on with, one run.

    What is random in an epoch depends on the seed and the epoch alone, and schedules on the step alone, so that model,
    averaged model, optimizer and epoch, which timm's checkpoint holds, are all that there is to resume.

    Args:
        config: What to train.
        output: The run's folder.
        data_dir: An ImageFolder with the folders `train_split` and `val_split`.
        cache: Folder for decoded images (`pad_crop`); `output` if None.
        device: As for torch.
        workers: Processes of timm's loader.
        stop_after: Stop as if interrupted, before the epoch of this index.

    Returns:
        The last line of log.jsonl: epoch, train_loss, loss, top1, top5, lr, and seconds, those of all epochs.

    Raises:
        ValueError: The folder holds a run with other arguments, or the config makes no sense.
    """
    last, device = os.path.join(output, 'last.pth.tar'), torch.device(device)
    check_resumable(config, output)
    task = create_task(config, device)
    model = unwrap_model(task.get_trainable_module())
    os.makedirs(output, exist_ok=True)
    with open(os.path.join(output, 'args.yaml'), 'w') as f:
        yaml.safe_dump(config.to_dict(), f, sort_keys=False)
    cache = cache or output
    train, val = (create_images(config, data_dir, cache, workers, training) for training in (True, False))
    optimizer = create_optimizer_v2(
        model, opt=config.opt, lr=config.lr, weight_decay=config.weight_decay, **config.opt_kwargs)
    if config.model_ema:
        task.setup_ema(decay=config.model_ema_decay)
    saver = CheckpointSaver(
        model, optimizer, argparse.Namespace(**config.to_dict()), checkpoint_dir=output, recovery_dir=output,
        max_history=1, task=task)
    start = 0
    if os.path.exists(last):
        start = resume_task_checkpoint(task, last, optimizer, log_info=False)
        saver.load_state_dict_from_checkpoint(last)
        if config.model_ema:
            load_task_ema_checkpoint(task, last)
    steps = len(train)
    scheduler, epochs = create_scheduler_v2(
        optimizer, config.sched, config.epochs, decay_milestones=config.decay_milestones,
        decay_rate=config.decay_rate, min_lr=config.min_lr, warmup_lr=config.warmup_lr,
        warmup_epochs=config.warmup_epochs, step_on_epochs=not config.sched_on_updates, updates_per_epoch=steps)
    scheduler.step_update(start * steps)
    scheduler.step(start)
    log = JsonLines(os.path.join(output, 'log.jsonl'), start)
    telemetry = Telemetry(model, os.path.join(output, 'telemetry.jsonl'), start)

    for epoch in range(start, epochs if stop_after is None else min(stop_after, epochs)):
        began, total, update = time.perf_counter(), 0.0, epoch * steps
        random_seed(epoch_seed(config.seed, epoch))
        task.train()
        for x, y in train.epoch(epoch):
            x, y = x.to(device, memory_format=torch.channels_last), y.to(device)
            with torch.autocast(device.type, torch.bfloat16, enabled=config.amp):
                loss = task(x, y)['loss']
            loss.backward()
            optimizer.step()
            optimizer.zero_grad()
            if config.clip_latent is not None:
                clip_latent_weights(model, config.clip_latent)
            update += 1
            task.update_ema(step=update)
            scheduler.step_update(update)
            total += loss.item()
            if config.telemetry_interval and update % config.telemetry_interval == 0:
                telemetry.record(epoch, update, x)
        lr = optimizer.param_groups[0]['lr']
        scheduler.step(epoch + 1)
        telemetry.record(epoch, update, x)
        metrics = evaluate(task, val, device)
        before = sum(line['seconds'] for line in JsonLines.read(log.path)[-1:])
        row = dict(
            epoch=epoch, train_loss=_rounded(total / steps), loss=_rounded(metrics['loss']), top1=metrics['top1'],
            top5=metrics['top5'], lr=lr, seconds=round(before + time.perf_counter() - began, 1))
        log.write(row)
        print(f'{output}: {row}', flush=True)
        saver.save_checkpoint(epoch, metrics['top1'])
    return JsonLines.read(log.path)[-1]


def _rounded(value: float) -> float | None:
    return round(value, 5) if math.isfinite(value) else None  # JSON knows no NaN


# ---------------------------------------------------------------------------------------------------------------------
# Stages


def fit_stages(data: dict[str, Any], output: str, data_dir: str, **places: Any) -> dict[str, float]:
    """Run or resume all stages; those that are finished are passed over. Returns the last one's result."""
    result: dict[str, float] = {}
    for folder, config in plan_stages(data, output):
        result = fit(config, folder, data_dir, **places)
    return result
