"""Telemetry of binary layers in training, as JSON lines."""
import json
import os
from typing import Any

import torch
import torch.nn as nn

from ..layers import ElasticLink, input_sign_shares
from .latent import binary_layers


class JsonLines:
    """A file of JSON lines, one record each. Reopened at an epoch, it forgets that epoch and what came after.

    Args:
        path: The file.
        epoch: First epoch that is still to come; records with a smaller 'epoch' stay.
    """

    def __init__(self, path: str | os.PathLike[str], epoch: int = 0) -> None:
        self.path = path
        kept = [record for record in self.read(path) if record.get('epoch', -1) < epoch]
        part = f'{os.fspath(path)}.part'  # an interruption shall not cost what is there
        with open(part, 'w') as f:
            f.writelines(json.dumps(record) + '\n' for record in kept)
        os.replace(part, path)

    @staticmethod
    def read(path: str | os.PathLike[str]) -> list[dict[str, Any]]:
        """Return all records; a last line that was cut short by an interruption is left out.

        Raises:
            ValueError: Another line is no record.
        """
        if not os.path.exists(path):
            return []
        records = []
        with open(path) as f:
            for number, line in enumerate(f, 1):
                if not line.endswith('\n'):
                    break
                try:
                    record = json.loads(line)
                except ValueError:
                    record = None
                if not isinstance(record, dict):
                    raise ValueError(
                        f'{os.fspath(path)}, line {number}: found {line.strip()[:40]!r}, expected a JSON object; '
                        f'delete the line to go on without it')
                records.append(record)
        return records

    def write(self, record: dict[str, Any]) -> None:
        """Append a record."""
        self.append(self.path, record)

    @staticmethod
    def append(path: str | os.PathLike[str], record: dict[str, Any]) -> None:
        """Append a record to a file, in place of a last line that was cut short."""
        with open(path, 'ab+') as f:
            f.seek(0)
            f.truncate(f.read().rfind(b'\n') + 1)
            f.write(json.dumps(record).encode() + b'\n')


class Telemetry:
    """Telemetry of the binary layers of a network in training, one JSON line a record.

    A record has 'epoch', 'update', 'gamma' (path of each Elastic-Link with one -> value), 'histogram_edges', and
    'layers', path -> fields; those without meaning (no binary weight, no binary input, no images) are left out.

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

    def __init__(
            self,
            model: nn.Module,
            path: str | os.PathLike[str],
            epoch: int = 0,
            bins: int = 24,
            reach: float = 3.0,
    ) -> None:
        self.model = model
        self.layers = binary_layers(model)
        self.lines = JsonLines(path, epoch)
        self.edges = torch.linspace(-reach, reach, bins + 1, device='cpu')
        self.signs = self._signs()

    @torch.no_grad()
    def _signs(self) -> dict[str, torch.Tensor]:
        return {
            path: layer.latent_weight() >= 0 for path, layer in self.layers.items()
            if layer.weight_quantizer is not None}

    def _input_shares(self, images: torch.Tensor) -> dict[str, float]:
        modes = [(module, module.training) for module in self.model.modules()]  # some may be held in eval mode
        try:
            return input_sign_shares(self.model.eval(), images)
        finally:
            for module, training in modes:
                module.training = training

    @torch.no_grad()
    def _histogram(self, weight: torch.Tensor) -> list[float]:
        scaled = (weight / weight.abs().mean().clamp_min(torch.finfo(weight.dtype).tiny)).flatten().float().cpu()
        inside = scaled.clamp(self.edges[0].item(), self.edges[-1].item())
        counts = torch.histogram(inside, self.edges).hist
        return [round(share, 5) for share in (counts / scaled.numel()).tolist()]

    @torch.no_grad()
    def record(self, epoch: int, update: int, images: torch.Tensor | None = None) -> dict[str, Any]:
        """Write a record and return it.

        Args:
            epoch: Index of the epoch.
            update: Optimizer steps taken so far.
            images: A batch (N, C, H, W) for `input_positive`; the model runs on it in evaluation mode.
        """
        inputs = {} if images is None else self._input_shares(images)
        signs = self._signs()
        rows: dict[str, dict[str, Any]] = {path: {} for path in self.layers}
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
