"""Hub folders: packed weights, timm's config.json and a model card, written, checked, uploaded and loaded again.

A folder is one that timm reads: `timm.create_model("hf-hub:user/repo", pretrained=True)` after `import timm_el`, with
any argument. A net that `binarize` converted has `timm_el_converted` for its architecture there, and its host's name
and the plan of the conversion among its arguments, so that timm alone cannot take it for the float host.
"""
import copy
import hashlib
import json
import numbers
import os
import tempfile
from pathlib import Path
from typing import Any

import timm
import torch
import torch.nn as nn
from timm.models import is_model, model_entrypoint
from timm.models._hub import save_config_for_hf

from .dry_run import own_input_size, undisturbed
from .models.converted import CONVERTED
from .recipes import Recipe
from .summary import summarize
from .weights.files import read_packed, save_packed
from .weights.loading import load_packed
from .weights.packed import pack_state_dict

WEIGHTS, CONFIG, CARD = 'model.safetensors', 'config.json', 'README.md'
FOLDER_VERSION = 2  # of folders of converted nets; in the first one the architecture was the host's


def file_facts(path: str | os.PathLike) -> dict[str, Any]:
    """Return the SHA-256 and the size in bytes of a file, as the manifest has them."""
    data = Path(path).read_bytes()
    return {'sha256': hashlib.sha256(data).hexdigest(), 'size': len(data)}


def read_metrics(folder: str | os.PathLike) -> dict[str, float]:
    """Return the metrics in the model card of a Hub folder by name, such as top1; empty without a card."""
    from huggingface_hub import ModelCard
    card = Path(folder) / CARD
    if not card.is_file():
        return {}
    return {result.metric_name: result.metric_value for result in ModelCard.load(card).data.eval_results or []}


def _read_config(path: str | os.PathLike) -> dict[str, Any]:
    """Return the config.json of a Hub folder, or raise ValueError if it is none of `save_for_hub`."""
    try:
        config = json.loads(Path(path).read_text(encoding='utf-8'))
    except ValueError as e:
        raise ValueError(f'{path}: this is no JSON, or a damaged file ({e}); fetch it again') from e
    if not isinstance(config, dict) or not isinstance(config.get('timm_el'), dict):
        raise ValueError(
            f'{path}: found no entry timm_el, expected a folder that save_for_hub wrote; timm.create_model loads those '
            f'of timm')
    return config


def _host(config: dict[str, Any]) -> str:
    """Return the name of the registered model, or of the host that was converted."""
    return (config.get('model_args') or {}).get('host', config['architecture'])


def is_hub_weights(file: str | os.PathLike[str], model: nn.Module) -> bool:
    """Return whether a file is the weights of a Hub folder for the architecture of a model."""
    file = Path(file)
    if file.name != WEIGHTS or not (file.parent / CONFIG).is_file():
        return False
    try:
        return _host(_read_config(file.parent / CONFIG)) == _architecture(model)
    except ValueError:  # a folder of timm alone
        return False


def _architecture(model: nn.Module) -> str:
    return (getattr(model, 'pretrained_cfg', None) or {}).get('architecture', '')


def _is_registered(model: nn.Module) -> bool:
    name = _architecture(model)
    return is_model(name) and name != CONVERTED and model_entrypoint(name).__module__.startswith(f'{__package__}.')


def save_for_hub(
        model: nn.Module,
        folder: str | os.PathLike[str],
        *,
        float_dtype: torch.dtype | None = None,
        metrics: dict[str, float] | None = None,
        dataset: str | None = None,
        details: str = '',
        repo_id: str = 'USER/REPO',
        model_args: dict[str, Any] | None = None,
        pretrained_cfg: dict[str, Any] | None = None,
) -> Path:
    """Write a Hub folder and check it by loading it back.

    Args:
        model: A registered model of this package, or a timm model that `binarize` converted.
        folder: Folder to write; it is made if need be.
        float_dtype: As for `save_packed`.
        metrics: Name and value, for the card, such as {'top1': 71.2}.
        dataset: Name of the training data, for the card.
        details: Description of its training, for the card (Markdown).
        repo_id: Name on the Hub, for the card's snippet.
        model_args: Arguments of `timm.create_model` that the folder shall carry beside those that timm recorded.
        pretrained_cfg: Changes to timm's pretrained config: input_size, mean, std and so on.

    Returns:
        The folder.

    Raises:
        ValueError: The model is not binarized, or timm does not know it; a metric is no number; or the folder does not
            load back to the same outputs. An older folder stays as it was.
    """
    _check_rebuildable(model)
    metrics = _checked_metrics(metrics or {})
    folder = Path(folder)
    pack_state_dict(model, float_dtype)  # what cannot be packed is refused before anything is written
    folder.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=folder, prefix='.hub-') as name:
        new = Path(name)
        save_packed(model, new / WEIGHTS, float_dtype)
        save_config_for_hf(model, new / CONFIG, **_config(model, model_args or {}, pretrained_cfg or {}))
        _verify(model, new)
        (new / CARD).write_text(_card(model, metrics, dataset, details, repo_id, new), encoding='utf-8')
        (folder / CARD).unlink(missing_ok=True)  # a folder with a card is one whose files belong together
        for file in (WEIGHTS, CONFIG, CARD):
            os.replace(new / file, folder / file)
    return folder


def _checked_metrics(metrics: dict[str, float]) -> dict[str, float]:
    """Return metrics, or raise ValueError if one is no number."""
    for name, value in metrics.items():
        if isinstance(value, bool) or not isinstance(value, numbers.Real):
            raise ValueError(f'metrics: found {value!r} for {name!r}, expected a number')
    return {name: float(value) for name, value in metrics.items()}


def _check_rebuildable(model: nn.Module) -> None:
    """Raise ValueError for a model that `from_hub` could not build again."""
    name = type(model).__name__
    if not _is_registered(model) and getattr(model, 'binarize_report', None) is None:
        raise ValueError(f'model: {name} is neither registered by timm_el nor converted by timm_el.binarize')
    if not is_model(_architecture(model)):
        raise ValueError(f'model: {name} was not made by timm.create_model, from_hub could not build its host')
    if not hasattr(model, 'num_classes'):
        raise ValueError(
            f'model: found a {name} of features_only=True, expected the whole net; from_hub and timm.create_model take '
            f'features_only=True for its folder')


def _config(model: nn.Module, model_args: dict[str, Any], pretrained_cfg: dict[str, Any]) -> dict[str, Any]:
    """Return arguments of `save_config_for_hf`: our facts, changes of the config, constructor arguments."""
    args = {k: v.to_dict() if isinstance(v, Recipe) else v
            for k, v in {**getattr(model, '_model_args', {}), **model_args}.items()}
    registered, report = _is_registered(model), getattr(model, 'binarize_report', None)
    facts: dict[str, Any] = {'format_version': 1, 'converted': not registered}
    cfg = dict(pretrained_cfg)
    if not registered:
        facts['format_version'], cfg['architecture'] = FOLDER_VERSION, CONVERTED
        # A model that was loaded from a folder has its host among its arguments.
        args = {'host': _architecture(model), **args, 'plan': report.plan()}
    elif report is not None:
        facts['plan'] = report.plan()
    return {'model_config': {'timm_el': facts, 'pretrained_cfg': cfg}, 'model_args': args}


def _verify(model: nn.Module, folder: Path) -> None:
    """Raise ValueError unless the folder, loaded as a user would, gives the outputs of the model with its tensors."""
    with undisturbed(model), torch.no_grad():
        loaded = from_hub(folder).eval()
        twin = load_packed(copy.deepcopy(model), folder / WEIGHTS).eval()
        weight = next(twin.parameters())
        x = torch.randn((2, *own_input_size(loaded)), generator=torch.Generator().manual_seed(0))
        place = weight.device, weight.dtype
        expected, found = twin(x.to(*place)), loaded.to(*place)(x.to(*place))
    if not torch.equal(expected, found):
        raise ValueError(
            f'model: its folder would load to other outputs (largest difference '
            f'{(expected - found).abs().max().item():.3g}); was the model changed after timm made it? '
            f'Pass model_args with what timm.create_model needs')


def from_hub(
        repo: str | os.PathLike,
        *,
        revision: str | None = None,
        cache_dir: str | os.PathLike | None = None,
        **kwargs: Any,
) -> nn.Module:
    """Load a network from a Hub repository or a folder of the same form.

    Args:
        repo: 'user/repo', with or without 'hf-hub:', or a folder.
        revision: Branch, tag or commit on the Hub.
        cache_dir: Folder of downloads.
        kwargs: As for `timm.create_model`: num_classes, in_chans, features_only and so on.

    Returns:
        The model, with latent weights of +-alpha.

    Raises:
        ValueError: The repository was not written by `save_for_hub`.
        CheckpointError: Its weights are damaged or do not fit.
    """
    from huggingface_hub import hf_hub_download
    from huggingface_hub.errors import HFValidationError
    if os.path.isdir(repo):
        fetch = {name: os.path.join(repo, name) for name in (CONFIG, WEIGHTS)}
        if not os.path.isfile(fetch[CONFIG]):
            raise ValueError(f'{repo}: found no {CONFIG}, expected a folder that save_for_hub wrote')
    else:
        name = str(repo)[len('hf-hub:'):] if str(repo).startswith('hf-hub:') else str(repo)
        where = dict(revision=revision, cache_dir=cache_dir)
        try:
            fetch = {file: hf_hub_download(name, file, **where) for file in (CONFIG, WEIGHTS)}
        except HFValidationError as e:
            raise ValueError(
                f'repo: found {str(repo)!r}, which is no folder, expected one, or user/repo on the Hub') from e
    config = _read_config(fetch[CONFIG])
    facts = config['timm_el']
    if facts.get('format_version', 0) > FOLDER_VERSION:
        raise ValueError(
            f'{repo}: found format version {facts["format_version"]}, expected at most {FOLDER_VERSION}; '
            f'pip install -U timm-el')
    read_packed(fetch[WEIGHTS])  # timm would not say which file is damaged
    if facts.get('converted') and config['architecture'] != CONVERTED:
        cfg = {**config['pretrained_cfg'], 'num_classes': config['num_classes'], 'file': os.fspath(fetch[WEIGHTS])}
        args = {**(config.get('model_args') or {}), 'host': config['architecture'], 'plan': facts['plan'], **kwargs}
        return timm.create_model(CONVERTED, pretrained=True, pretrained_cfg=cfg, **args)
    return timm.create_model(f'local-dir:{os.path.dirname(fetch[CONFIG])}', pretrained=True, **kwargs)


def push_to_hub(
        folder: str | os.PathLike, repo_id: str, *, private: bool = False, token: str | None = None) -> str:
    """Upload a folder that `save_for_hub` wrote, and return its address.

    Raises:
        ValueError: One of its files is missing. Nothing was uploaded.
        CheckpointError: Its weights are damaged. Nothing was uploaded.
    """
    from huggingface_hub import HfApi
    for file in (WEIGHTS, CONFIG, CARD):
        if not (Path(folder) / file).is_file():
            raise ValueError(f'folder: found no {file} in {os.fspath(folder)!r}, expected a folder of save_for_hub')
    _read_config(Path(folder) / CONFIG)
    read_packed(Path(folder) / WEIGHTS)
    api = HfApi(token=token, library_name='timm_el')
    url = api.create_repo(repo_id, private=private, exist_ok=True)
    api.upload_folder(repo_id=url.repo_id, folder_path=folder, allow_patterns=[WEIGHTS, CONFIG, CARD],
                      commit_message='Packed binarized network')
    return str(url)


def _card(
        model: nn.Module, metrics: dict[str, float], dataset: str | None, details: str, repo_id: str, folder: Path,
) -> str:
    """Return the model card of a folder that holds weights and config."""
    from huggingface_hub import EvalResult, ModelCardData
    cfg, report = model.pretrained_cfg, getattr(model, 'binarize_report', None)
    config = _read_config(folder / CONFIG)
    name, size = _host(config), tuple(config['pretrained_cfg']['input_size'])
    summary = summarize(model, size)
    on = dataset or 'unknown'
    results = [
        EvalResult(
            task_type='image-classification', dataset_type=on.lower(), dataset_name=on,
            metric_type='accuracy' if key.startswith('top') else key, metric_name=key, metric_value=value)
        for key, value in metrics.items()]
    data = ModelCardData(
        library_name='timm', license=cfg.get('license', 'apache-2.0'), pipeline_tag='image-classification',
        tags=['image-classification', 'timm', 'timm_el', 'binary-neural-network'],
        datasets=[dataset.lower()] if dataset else None, model_name=name, eval_results=results or None)
    create = (f'model = timm.create_model("hf-hub:{repo_id}", pretrained=True).eval()' if _is_registered(model)
              else f'model = timm_el.from_hub("{repo_id}").eval()')
    rows: list[str] = [f'| {key} | {value:.2f} |' for key, value in metrics.items()]
    facts = [
        *([('recipe', report.recipe.name)] if report is not None else []),  # a ReActNet is not converted
        ('image', 'x'.join(map(str, size))),
        ('file', f'{(folder / WEIGHTS).stat().st_size / 1e6:.2f} MB, one bit per binary weight'),
        ('parameters', f'{summary.params:,}, of which {summary.bit_params:,} are one bit'),
        ('OPs', f'{summary.ops / 1e6:.1f} M = {summary.real_macs / 1e6:.1f} M float MACs + '
                f'{summary.binary_macs / 1e6:.1f} M binary MACs / 64'),
        ('license', cfg.get('license', 'apache-2.0'))]
    return '\n'.join([
        '---', data.to_yaml().strip(), '---', f'# {name}, binarized', '',
        'A network with 1-bit weights and activations, made with timm_el (Elastic-Link, arXiv:2112.10149).', '',
        '```python', 'import timm_el', 'import timm', '', create, '```', '',
        '| | |', '|---|---|', *(f'| {key} | {value} |' for key, value in facts), *rows, '', details, ''])
