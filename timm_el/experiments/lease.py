"""A lease: seconds that the stages of a run share, and what is handed over of each, whole, when it ends."""
import csv
import io
import math
import os
import signal
import tarfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from ..training.telemetry import JsonLines
from .runs import ARGS, LOG, PACKED, read_args

SPARE = 0.05  # of a share: what the measured pace does not show


class LeaseEnded(Exception):
    """Signal that the time is over; a run stops between two of its steps."""


class Lease:
    """Time that runs may take.

    Args:
        seconds: Length, from now on.
        clock: Function that returns seconds.
    """

    def __init__(self, seconds: float = math.inf, clock: Callable[[], float] = time.monotonic) -> None:
        self.clock, self.until = clock, clock() + seconds

    def left(self) -> float:
        """Return the seconds that are left, 0 or more."""
        return max(0.0, self.until - self.clock())

    def check(self) -> None:
        """Raise LeaseEnded if no time is left."""
        if not self.left():
            raise LeaseEnded

    @contextmanager
    def ended_by(self, number: int = signal.SIGTERM) -> Iterator['Lease']:
        """End the lease when the process gets this signal, in place of the process."""
        def end(*received: object) -> None:
            self.until = -math.inf

        before = signal.signal(number, end)
        try:
            yield self
        finally:
            signal.signal(number, before)


def epochs_within(
        seconds: float, most: int, of_training: float, of_validation: float, val_interval: int) -> int:
    """Return the number of epochs for which there is time, at least 1.

    Args:
        seconds: Time for all of them; some is spared.
        most: Number that is not exceeded.
        of_training: Seconds of an epoch without validation.
        of_validation: Seconds of a validation and what is written with it.
        val_interval: Epochs between two validations; the last epoch has one, too.
    """
    def cost(epochs: int) -> float:
        return epochs * of_training + math.ceil(epochs / val_interval) * of_validation

    return max((n for n in range(1, most + 1) if cost(n) <= (1 - SPARE) * seconds), default=1)


def hand_over(run: str, folder: str) -> Path:
    """Write FOLDER/NAME.tar.gz with what a run made, NAME being its folder's, and bring FOLDER/summary.csv up to date.

    The archive holds the folder NAME: args.yaml, log.jsonl, telemetry.jsonl, packed.safetensors of a binarized network,
    and an empty file that is called finished or unfinished, as the log says. Unpacked, that of a binarized network is a
    run that `timm-el eval` and `timm-el push` take.
    A file of either name is there as a whole or not at all.

    Args:
        run: The run's folder.
        folder: Where to write.
    """
    name = os.path.basename(os.path.normpath(run))
    log = JsonLines.read(os.path.join(run, LOG))
    last = log[-1] if log else {'epoch': -1}
    state = 'finished' if last['epoch'] + 1 == read_args(run)['epochs'] else 'unfinished'
    os.makedirs(folder, exist_ok=True)
    path = Path(folder) / f'{name}.tar.gz'
    with _whole(path) as part, tarfile.open(part, 'w:gz') as archive:
        for file in (ARGS, LOG, 'telemetry.jsonl', PACKED):
            if (Path(run) / file).is_file():
                archive.add(Path(run) / file, f'{name}/{file}')
        archive.addfile(tarfile.TarInfo(f'{name}/{state}'), io.BytesIO())
    _add_to_summary(Path(folder) / 'summary.csv', name, state, last)
    return path


def _add_to_summary(path: Path, name: str, state: str, last: dict[str, Any]) -> None:
    rows = list(csv.DictReader(path.read_text(encoding='utf-8').splitlines())) if path.is_file() else []
    row = dict(name=name, state=state, epochs=last['epoch'] + 1, **{
        key: last.get(key) for key in ('train_loss', 'loss', 'top1', 'top5', 'seconds')})
    with _whole(path) as part, open(part, 'w', newline='') as f:
        writer = csv.DictWriter(f, list(row))
        writer.writeheader()
        writer.writerows([*(other for other in rows if other['name'] != name), row])


@contextmanager
def _whole(path: Path) -> Iterator[Path]:
    """Give a path to write to, and move what was written to `path` when all of it is there."""
    part = path.with_name(path.name + '.part')
    try:
        yield part
        os.replace(part, path)
    finally:
        part.unlink(missing_ok=True)
