"""Files as an earlier state of the package wrote them, for `tests/weights/test_old_files.py`.

    git worktree add ../old dd84043
    python tests/data/make_old_checkpoints.py ../old

It runs the code of that checkout. What it writes to `tests/data/old` is kept as it is: files of users do not change
with the code either. To test another state of the package, write to another folder.
"""
import argparse
import json
import math
import sys
import zlib
from pathlib import Path

import numpy as np
import timm
import torch
from PIL import Image
from timm.utils import CheckpointSaver

OLD = Path(__file__).parent / 'old'
SMALL = dict(layers=[1, 1], channels=[8, 8], small_stem=True, num_classes=3)
FOREIGN = dict(layers=[1, 1, 1, 1], channels=[4, 8, 4, 8], stem_type='deep', stem_width=4, num_classes=3)
# A file is there for each kind of block and of layer. `convert` is the recipe of a foreign net.
NETS = {
    'basic': dict(model='el_resnet18', kwargs=SMALL),
    'bottleneck': dict(model='el_resnet26', kwargs=dict(SMALL, recipe='el_r2b_rprelu', channels=[4, 8])),
    'stage_one': dict(model='el_resnet18', kwargs=dict(SMALL, recipe='bireal', real_weights=True)),
    'mobilenet': dict(model='el_mobilenet_v1', kwargs=dict(channel_multiplier=1 / 64, num_classes=3)),
    'reactnet': dict(model='el_reactnet_c', kwargs=dict(stem_chs=8, depths=(1, 1), num_classes=3)),
    'converted': dict(model='resnet18', kwargs=FOREIGN, convert='xnor'),
    'ternary': dict(model='el_resnet18', kwargs=dict(SMALL, recipe='ttq')),
    'bases': dict(model='el_resnet18', kwargs=dict(SMALL, recipe='abc_5_5')),
}
UNPACKED = ('stage_one', 'ternary', 'bases')  # have no packed file
HUB_HOST = 'test_efficientnet'  # traced, with new norms
RUN = dict(
    model='el_resnet18', model_kwargs=dict(layers=[1, 1], channels=[4, 8], small_stem=True), num_classes=3,
    batch_size=8, epochs=2, lr=0.01, pad_crop=4, model_ema=True, model_ema_decay=0.9)


def build(model: str, kwargs: dict, convert: str | None = None) -> torch.nn.Module:
    """Return a net of the table with fresh weights."""
    import timm_el
    net = timm.create_model(model, **kwargs)
    return timm_el.binarize(net, convert) if convert else net


def fill(model: torch.nn.Module) -> torch.nn.Module:
    """Give every float tensor drawn values, by its key: none is 0 or 1, and variances are positive."""
    g = torch.Generator().manual_seed(0)
    for key, tensor in sorted(model.state_dict().items()):
        if tensor.is_floating_point():
            low = -0.5 if tensor.dim() > 1 or key.endswith(('bias', 'running_mean', 'shift_in', 'shift_out')) else 0.5
            tensor.copy_(torch.rand(tensor.shape, generator=g) + low)
    return model.eval()


def images(size: int = 64) -> torch.Tensor:
    """Return two images (2, 3, size, size) by a formula."""
    n = 2 * 3 * size * size
    return torch.tensor([2 * math.sin(0.7 * i + i * i / n) for i in range(n)]).view(2, 3, size, size)


def logits(model: torch.nn.Module, size: int = 64) -> list[list[float]]:
    """Return the outputs for `images`."""
    with torch.no_grad():
        return model.eval()(images(size)).tolist()


def checksum(state: dict[str, torch.Tensor]) -> int:
    """Return CRC-32 of the keys and the bytes of all tensors."""
    total = 0
    for key, tensor in sorted(state.items()):
        total = zlib.crc32(key.encode() + tensor.contiguous().numpy().tobytes(), total)
    return total


def write_colours(folder: Path) -> Path:
    """Write an ImageFolder of three classes, 8 training and 4 validation images each: noise around a colour."""
    rng = np.random.RandomState(0)
    for split, count in (('train', 8), ('validation', 4)):
        for c, name in enumerate(('red', 'green', 'blue')):
            (folder / split / name).mkdir(parents=True)
            for i in range(count):
                image = rng.randint(0, 100, (32, 32, 3), dtype=np.uint8)
                image[:, :, c] += 120
                Image.fromarray(image).save(folder / split / name / f'{i}.png')
    return folder


def write_net(name: str, folder: Path) -> dict:
    """Write the checkpoint of `train.py` and the packed file of a net; return what they hold."""
    import timm_el
    torch.manual_seed(0)
    model = fill(build(**NETS[name]))
    optimizer = torch.optim.SGD(model.parameters(), 0.1)
    saver = CheckpointSaver(
        model, optimizer, argparse.Namespace(model=NETS[name]['model']), checkpoint_dir=str(folder), max_history=1)
    saver.save_checkpoint(0, 12.5)
    (folder / 'last.pth.tar').replace(folder / f'{name}.pth.tar')
    for left in folder.glob('*-0.pth.tar'), folder.glob('model_best*'):
        for path in left:
            path.unlink()
    recipe = getattr(model, 'binarize_report', None)
    facts = dict(
        recipe=recipe.recipe.to_dict() if recipe else None, state=checksum(model.state_dict()), logits=logits(model))
    if name not in UNPACKED:
        timm_el.save_packed(model, folder / f'{name}.safetensors')
        packed = timm_el.load_packed(build(**NETS[name]), folder / f'{name}.safetensors')
        facts.update(packed_state=checksum(packed.state_dict()), packed_logits=logits(packed))
    return facts


def write_hub(folder: Path) -> dict:
    """Write the Hub folder of a foreign net; return what it holds."""
    import timm_el
    torch.manual_seed(0)
    model = fill(timm_el.binarize(timm.create_model(HUB_HOST, num_classes=3), keep=('blocks.1.0.conv_exp',)))
    timm_el.save_for_hub(model, folder, float_dtype=torch.float16, metrics={'top1': 12.5}, dataset='CIFAR10')
    loaded = timm_el.from_hub(folder)
    return dict(
        recipe=loaded.binarize_report.recipe.to_dict(), state=checksum(loaded.state_dict()), logits=logits(loaded))


def write_run(folder: Path, images: Path) -> dict:
    """Train one epoch of two into `folder`; return the checkpoint's sum, and the result of both epochs elsewhere."""
    from timm_el.cli._config import FitConfig

    from timm_el.cli.fit import fit
    config, whole = FitConfig.from_dict(RUN), images.parent / 'whole'
    fit(config, str(folder), str(images), workers=0, stop_after=1)
    for path in folder.iterdir():
        if path.name not in ('args.yaml', 'last.pth.tar', 'log.jsonl', 'telemetry.jsonl'):
            path.unlink()
    result = fit(config, str(whole), str(images), workers=0)
    state = torch.load(folder / 'last.pth.tar', weights_only=False)['state_dict']
    return dict(state=checksum(state), result=result)


def dumped(facts: dict) -> str:
    """Return JSON with a net and a recipe a line."""
    parts = [f'"{name}": {{\n' + ',\n'.join(f'{json.dumps(k)}: {json.dumps(v)}' for k, v in part.items()) + '\n}'
             for name, part in facts.items()]
    return '{\n' + ',\n'.join(parts) + '\n}\n'


def main() -> None:
    """Write all files with the code of the checkout that the command line names."""
    old = Path(sys.argv[1]).resolve()
    sys.path.insert(0, str(old))
    import tempfile

    import timm_el
    assert Path(timm_el.__file__).is_relative_to(old), timm_el.__file__
    torch.set_num_threads(1)
    OLD.mkdir()
    facts = {'nets': {name: write_net(name, OLD) for name in NETS}, 'hub': write_hub(OLD / 'hub')}
    with tempfile.TemporaryDirectory() as folder:
        facts['run'] = write_run(OLD / 'run', write_colours(Path(folder) / 'images'))
    facts['recipes'] = {name: dict(code=r.code, data=r.to_dict()) for name, r in timm_el.RECIPES.items()}
    (OLD / 'facts.json').write_text(dumped(facts))


if __name__ == '__main__':
    main()
