"""timm's own scripts drive our models, unmodified, on real images.

TIMM_SCRIPTS names the folder that holds train.py, validate.py and the others (the root of timm's repository);
CIFAR10_DIR may name an ImageFolder of CIFAR-10 with train/ and validation/, else scikit-learn's digits are used.
"""
import csv
import json
import math
import os
import pathlib
import shutil
import signal
import subprocess
import sys
import time

import pytest
import timm
import torch

import timm_el

SCRIPTS = os.environ.get('TIMM_SCRIPTS')
pytestmark = pytest.mark.skipif(not SCRIPTS, reason='TIMM_SCRIPTS does not name a folder with the scripts of timm')

ROOT = pathlib.Path(__file__).resolve().parents[2]
NET = dict(layers=[1, 1, 1, 1], channels=[16, 16, 32, 32])
NET_ARGS = ['layers=[1,1,1,1]', 'channels=[16,16,32,32]']
TEACHER = '''
from timm.models import register_model, generate_default_cfgs, build_model_with_cfg
from timm.models.resnet import ResNet, BasicBlock
default_cfgs = generate_default_cfgs({{'tiny_teacher.local': dict(
    file={file!r}, num_classes=10, input_size=(3, 32, 32), first_conv='conv1', classifier='fc',
    mean=(0.5, 0.5, 0.5), std=(0.5, 0.5, 0.5))}})

@register_model
def tiny_teacher(pretrained=False, **kwargs):
    args = dict(block=BasicBlock, layers=[1, 1, 1, 1], channels=[16, 16, 32, 32])
    return build_model_with_cfg(ResNet, 'tiny_teacher', pretrained, **dict(args, **kwargs))
'''

CPU_DDP = '''
import torch.nn.parallel as parallel

class CpuDDP(parallel.DistributedDataParallel):
    def __init__(self, module, device_ids=None, **kwargs):
        super().__init__(module, **kwargs)

parallel.DistributedDataParallel = CpuDDP
'''


@pytest.fixture(scope='session')
def scripts(tmp_path_factory) -> pathlib.Path:
    """A copy of the scripts alone: beside them lies another timm, which would shadow the one installed."""
    folder = tmp_path_factory.mktemp('scripts')
    for file in pathlib.Path(SCRIPTS).glob('*.py'):
        shutil.copy(file, folder)
    return folder


@pytest.fixture(scope='session')
def images(tmp_path_factory) -> pathlib.Path:
    """An ImageFolder of ten classes: 16 training and 4 validation images of each."""
    folder = tmp_path_factory.mktemp('images')
    source = os.environ.get('CIFAR10_DIR')
    for split, count in (('train', 16), ('validation', 4)):
        if source:
            for cls in sorted(os.listdir(f'{source}/{split}')):
                (folder / split / cls).mkdir(parents=True)
                for file in sorted((pathlib.Path(source) / split / cls).iterdir())[:count]:
                    shutil.copy(file, folder / split / cls / f'{cls}_{file.name}')
        else:
            import numpy as np
            from PIL import Image
            from sklearn.datasets import load_digits
            data = load_digits()
            for digit in range(10):
                (folder / split / str(digit)).mkdir(parents=True)
                chosen = np.flatnonzero(data.target == digit)
                chosen = chosen[:count] if split == 'train' else chosen[-count:]
                for i in chosen:
                    image = Image.fromarray((data.images[i] * 255 / 16).astype('uint8')).resize((32, 32))
                    image.convert('RGB').save(folder / split / str(digit) / f'{i}.jpg')
    return folder


def run(*command, check: bool = True, **kwargs) -> subprocess.CompletedProcess:
    env = {**os.environ, 'PYTHONPATH': os.pathsep.join([str(ROOT), *kwargs.pop('path', [])]), 'OMP_NUM_THREADS': '2'}
    env.update(kwargs.pop('env', {}))
    result = subprocess.run([str(c) for c in command], capture_output=True, text=True, env=env, **kwargs)
    assert not check or result.returncode == 0, result.stdout[-3000:] + result.stderr[-3000:]
    return result


def train_args(images, output, *extra, model='el_resnet26', net=NET_ARGS):
    return [
        '--data-dir', images, '--device', 'cpu', '--num-classes', '10', '--input-size', '3', '32', '32', '-b', '16',
        '--epochs', '1', '--workers', '0', '--opt', 'adam', '--lr', '1e-3', '--warmup-epochs', '0',
        '--model', model, *(['--model-kwargs', *net] if net else []), '--output', output, '--experiment', 'run', *extra]


def train(scripts, images, output, *extra, **kwargs) -> pathlib.Path:
    """Run train.py; returns its output folder, after a look at the losses."""
    path = kwargs.pop('path', [])
    modules = ['timm_el', *kwargs.pop('modules', [])]
    run(sys.executable, scripts / 'train.py', '--device-modules', *modules,
        *train_args(images, output, *extra, **kwargs), cwd=output, path=path)
    return look_at(output)


def look_at(output) -> pathlib.Path:
    folder = output / 'run'
    with open(folder / 'summary.csv') as f:
        rows = list(csv.DictReader(f))
    assert rows and all(math.isfinite(float(row[key])) for row in rows for key in ('train_loss', 'eval_loss'))
    assert (folder / 'last.pth.tar').exists()
    return folder


def checkpoint(folder) -> dict:
    return torch.load(folder / 'last.pth.tar', weights_only=False)


@pytest.mark.parametrize('options', [
    ['--amp', '--amp-dtype', 'bfloat16'], ['--model-ema', '--model-ema-decay', '0.9'], ['--grad-accum-steps', '2'],
    ['--channels-last'], ['--torchcompile'], ['--grad-checkpointing'],
    ['--split-bn', '--aug-splits', '2', '--aa', 'rand-m3', '--resplit'], ['--mixup', '0.2', '--smoothing', '0.1'],
    ['--clip-grad', '1.0'], ['--layer-decay', '0.8'], ['--torchscript'], ['--bce-loss'],
], ids=lambda options: options[0])
def test_train_option(scripts, images, tmp_path, options):
    folder = train(scripts, images, tmp_path, *options)
    state = checkpoint(folder)
    fresh = timm.create_model('el_resnet26', num_classes=10, **NET)
    weights = {k.replace('_orig_mod.', ''): v for k, v in state['state_dict'].items()}
    if options[0] != '--split-bn':  # it adds norms
        fresh.load_state_dict(weights, strict=True)
    assert any(k.endswith('link.gamma') and v != v.round() for k, v in weights.items())  # gammas have learned
    if options[0] == '--model-ema':
        assert any(not torch.equal(v, weights[k]) for k, v in state['state_dict_ema'].items() if k.endswith('weight'))


@pytest.mark.parametrize('model', ['el_resnet18', 'el_mobilenet_v1', 'el_reactnet_c'])
def test_train_other_models(scripts, images, tmp_path, model):
    train(scripts, images, tmp_path, '--drop', '0.1', model=model, net=None)


def test_train_with_a_yaml_of_train_cfgs(scripts, images, tmp_path):
    run(sys.executable, scripts / 'train.py', '-c', ROOT / 'train_cfgs' / 'el_resnet26_cifar10_short.yaml',
        '--data-dir', images, '--device', 'cpu', '--epochs', '1', '--workers', '0', '-b', '16', '--warmup-epochs', '0',
        '--output', tmp_path, '--experiment', 'run', '--model-kwargs', *NET_ARGS, cwd=tmp_path)
    look_at(tmp_path)


@pytest.fixture(scope='session')
def imagenet(tmp_path_factory) -> pathlib.Path:
    """ImageNet's shape in small: synset folders of landscape and portrait JPEGs, and the same images in two shards."""
    import numpy as np
    from PIL import Image
    folder = tmp_path_factory.mktemp('imagenet')
    random = np.random.RandomState(0)
    for split, count in (('train', 8), ('validation', 2)):
        for label in range(4):
            synset = folder / 'images' / split / f'n{1440764 + label:08d}'
            synset.mkdir(parents=True)
            for i in range(count):
                size = (375, 500, 3) if i % 2 else (500, 375, 3)
                Image.fromarray(random.randint(0, 255, size, dtype=np.uint8)).save(synset / f'{synset.name}_{i}.JPEG')
    return folder


def shards(imagenet) -> pathlib.Path:
    import webdataset
    for split in ('train', 'validation'):
        files = sorted((imagenet / 'images' / split).glob('*/*.JPEG'))
        for shard in range(2):
            with webdataset.TarWriter(str(imagenet / f'imagenet1k-{split}-{shard:04d}.tar')) as tar:
                for file in files[shard::2]:
                    label = int(file.parent.name[1:]) - 1440764
                    tar.write({'__key__': file.stem, 'jpg': file.read_bytes(), 'cls': label})
    return imagenet


@pytest.mark.parametrize('source', ['folder', 'wds', 'hfids'])
def test_imagenet_is_read_from_folders_shards_and_streams(scripts, imagenet, tmp_path, source):
    """The commands of train_cfgs/README.md, with a small net and few images; all of them are seen."""
    count = ['--train-num-samples', '32', '--val-num-samples', '8']
    if source == 'folder':
        args = ['--data-dir', imagenet / 'images']
    elif source == 'wds':
        args = ['--dataset', 'wds/imagenet', '--data-dir', shards(imagenet), *count,
                '--train-split', 'imagenet1k-train-{0000..0001}.tar',
                '--val-split', 'imagenet1k-validation-{0000..0001}.tar']
    else:
        args = ['--dataset', f'hfids/{imagenet / "images"}', '--data-dir', tmp_path / 'cache', *count]
    result = run(
        sys.executable, '-m', 'timm_el', 'run', scripts / 'train.py',
        '-c', ROOT / 'train_cfgs' / 'el_resnet26_in1k.yaml', *args, '--model-kwargs', *NET_ARGS, '--device', 'cpu',
        '-b', '8', '--epochs', '1', '--workers', '1', '--num-classes', '4', '--log-interval', '1',
        '--output', tmp_path, '--experiment', 'run', cwd=tmp_path,
        env={'HF_HUB_OFFLINE': '1', 'HF_HOME': str(tmp_path / 'home')})
    look_at(tmp_path)
    log = result.stdout + result.stderr
    assert '[   3/4 (100%)]' in log and 'Test: [   0/0]' in log  # 4 batches of 8 images, then one


@pytest.mark.parametrize('tag, last_label', [('cifar10', 'truck'), ('imagenette', 'parachute')])
def test_a_job_of_weights_goes_on_where_it_was_stopped(scripts, images, tmp_path, tag, last_label):
    """Two runs of the job: the first ends early, the second takes up its checkpoint; a third has nothing to train."""
    def job(epochs: int) -> str:
        path = os.pathsep.join([os.path.dirname(sys.executable), os.environ['PATH']])
        result = run(
            'bash', ROOT / 'train_cfgs' / f'{tag}.sh', images, tmp_path / 'out', '--device', 'cpu', '--workers', '0',
            '-b', '16', '--input-size', '3', '32', '32', '--warmup-epochs', '0', '--epochs', epochs,
            '--torchcompile=', '--model-kwargs', *NET_ARGS, cwd=tmp_path,
            env={'NETS': 'el_resnet26', 'SIZES': '32 48', 'TIMM_SCRIPTS': str(scripts), 'PATH': path})
        return result.stdout + result.stderr

    job(1)
    saved = checkpoint(tmp_path / 'out' / 'el_resnet26')
    # As if it had been stopped before the end.
    for name in ('finished', 'eval.json', 'size_32.json', 'size_48.json'):
        (tmp_path / 'out' / 'el_resnet26' / name).unlink()
    shutil.rmtree(tmp_path / 'out' / 'hub')
    log = job(2)
    again = checkpoint(tmp_path / 'out' / 'el_resnet26')
    assert (saved['epoch'], again['epoch']) == (0, 1) and 'Train: 1 ' in log and 'Train: 0 ' not in log
    assert 'Train: ' not in job(2)
    found = json.loads((tmp_path / 'out' / 'el_resnet26' / 'eval.json').read_text())
    assert list(found['forms']) == ['latent', 'packed', 'deployed', 'int8'] and found['images'] == 40
    model = timm_el.from_hub(tmp_path / 'out' / 'hub' / f'el_resnet26.{tag}')
    assert model.pretrained_cfg['tag'] == tag and model.pretrained_cfg['label_names'][9] == last_label
    by_size = {size: json.loads((tmp_path / 'out' / 'el_resnet26' / f'size_{size}.json').read_text())['forms'][
        'deployed']['top1'] for size in (32, 48)}
    best = max(by_size, key=by_size.get)
    assert found['size'] == [best, best] == list(model.pretrained_cfg['input_size'][1:])
    card = (tmp_path / 'out' / 'hub' / f'el_resnet26.{tag}' / 'README.md').read_text()
    assert '| epoch | training loss | loss | top-1 |\n| --- | --- | --- | --- |\n| 0 |' in card and '\n| 1 | ' in card


@pytest.mark.parametrize('kind', ['logit', 'feature'])
def test_distillation_from_a_registered_float_teacher(scripts, images, tmp_path, kind):
    torch.manual_seed(0)
    teacher = timm.create_model('resnet18', num_classes=10, layers=[1, 1, 1, 1], channels=[16, 16, 32, 32])
    torch.save(teacher.state_dict(), tmp_path / 'teacher.pth')
    (tmp_path / 'tiny_teacher_plugin.py').write_text(TEACHER.format(file=str(tmp_path / 'teacher.pth')))
    train(
        scripts, images, tmp_path, '--kd-model-name', 'tiny_teacher', '--kd-distill-type', kind,
        '--kd-temperature', '1.0', '--distill-loss-weight', '1.0', '--task-loss-weight', '0.5',
        modules=['tiny_teacher_plugin'], path=[str(tmp_path)])


def test_two_stage_training(scripts, images, tmp_path):
    """Binary inputs and real weights first, then all binary from its checkpoint; strict, same keys."""
    one, two = tmp_path / 'one', tmp_path / 'two'
    one.mkdir(), two.mkdir()
    first = train(scripts, images, one, net=[*NET_ARGS, 'real_weights=True'])
    second = train(scripts, images, two, '--initial-checkpoint', first / 'last.pth.tar', '--lr', '1e-9')
    before, after = checkpoint(first)['state_dict'], checkpoint(second)['state_dict']
    assert list(before) == list(after)
    key = 'layer3.0.conv2.conv.weight'
    torch.testing.assert_close(before[key], after[key], rtol=0, atol=1e-6)


def test_float_checkpoint_through_pretrained_path(scripts, images, tmp_path):
    host = timm.create_model('resnet26', num_classes=10, **NET)
    torch.save(host.state_dict(), tmp_path / 'host.pth')
    folder = train(
        scripts, images, tmp_path, '--pretrained', '--pretrained-path', tmp_path / 'host.pth', '--lr', '1e-9')
    latent = checkpoint(folder)['state_dict']['layer2.0.conv2.conv.weight']
    torch.testing.assert_close(latent, host.layer2[0].conv2.weight.data, rtol=0, atol=1e-6)


def test_unfit_checkpoints_end_with_a_clear_error(scripts, images, tmp_path):
    for source, message in (
            (timm.create_model('resnet26', num_classes=10, **NET), 'timm_el.load_float'),
            (timm.create_model('el_resnet26', num_classes=10, recipe='bireal', **NET), 'another recipe')):
        torch.save(source.state_dict(), tmp_path / 'wrong.pth')
        result = run(
            sys.executable, scripts / 'train.py', '--device-modules', 'timm_el',
            *train_args(images, tmp_path, '--initial-checkpoint', tmp_path / 'wrong.pth'), cwd=tmp_path, check=False)
        assert result.returncode != 0 and message in result.stderr


def test_resume_after_the_process_was_killed_in_mid_epoch(scripts, images, tmp_path):
    args = [sys.executable, str(scripts / 'train.py'), '--device-modules', 'timm_el', *map(str, train_args(
        images, tmp_path, '--log-interval', '1'))]
    args[args.index('--epochs') + 1] = '400'
    process = subprocess.Popen(
        args, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL, cwd=tmp_path,
        env={**os.environ, 'PYTHONPATH': str(ROOT)})
    summary = tmp_path / 'run' / 'summary.csv'
    deadline = time.time() + 120
    while time.time() < deadline and (not summary.exists() or len(summary.read_text().splitlines()) < 3):
        time.sleep(0.05)
    time.sleep(0.1)
    process.send_signal(signal.SIGKILL)
    process.wait()
    done = len(summary.read_text().splitlines()) - 1
    assert done >= 2
    saved = checkpoint(tmp_path / 'run')
    # At most the running epoch is lost, and the one before it if it was logged and not yet saved.
    assert saved['epoch'] in (done - 2, done - 1, done)
    again = tmp_path / 'again'
    again.mkdir()
    args[args.index('--epochs') + 1] = str(saved['epoch'] + 3)
    args[args.index('--output') + 1] = str(again)
    result = run(*args, '--resume', tmp_path / 'run' / 'last.pth.tar', cwd=again)
    assert f"'epoch': {saved['epoch'] + 1}" in result.stderr or f'Train: {saved["epoch"] + 1} ' in result.stderr
    look_at(again)
    resumed = checkpoint(again / 'run')
    assert resumed['epoch'] == saved['epoch'] + 2


def torchrun(*args, **kwargs):
    return run(
        sys.executable, '-m', 'torch.distributed.run', '--nproc_per_node', '2', '--standalone', *args,
        env={'OMP_NUM_THREADS': '1'}, **kwargs)


@pytest.mark.parametrize('model', ['el_resnet26', 'resnet26'])
def test_two_processes_train_with_gloo(scripts, images, tmp_path, model):
    """On a CPU train.py hands its device to DDP, which refuses it for any model; without that it runs to its end."""
    (tmp_path / 'cpu_ddp.py').write_text(CPU_DDP)
    torchrun(
        '-m', 'timm_el', 'run', scripts / 'train.py', '--device-modules', 'cpu_ddp',
        *train_args(images, tmp_path, model=model), cwd=tmp_path, path=[str(tmp_path)])
    look_at(tmp_path)


def test_gradients_of_two_processes_equal_those_of_one(tmp_path):
    assert 'gradients agree' in torchrun(ROOT / 'tests' / 'scripts' / 'two_processes.py', cwd=tmp_path).stdout


# ------------------------------------------------------------------------------- scripts that have no --device-modules

@pytest.fixture(scope='session')
def trained(tmp_path_factory) -> pathlib.Path:
    """A checkpoint of the whole el_resnet26 with ten classes, and random norm statistics."""
    from conftest import randomise
    torch.manual_seed(0)
    file = tmp_path_factory.mktemp('trained') / 'el_resnet26.pth'
    torch.save(randomise(timm.create_model('el_resnet26', num_classes=10)).state_dict(), file)
    return file


def launched(*args, **kwargs):
    return run(sys.executable, '-m', 'timm_el', 'run', *args, **kwargs)


def test_validate_and_inference(scripts, images, trained, tmp_path):
    common = ['--model', 'el_resnet26', '--num-classes', '10', '--input-size', '3', '64', '64', '--device', 'cpu',
              '--checkpoint', trained, '--workers', '0']
    launched(
        'validate.py', '--data-dir', images, '--split', 'validation', '-b', '20', *common, '--results-file', 'v.json',
        '--results-format', 'json', cwd=tmp_path, env={'TIMM_SCRIPTS': str(scripts)})
    assert '"top1"' in (tmp_path / 'v.json').read_text()
    launched(
        scripts / 'inference.py', '--data-dir', images / 'validation', '-b', '20', *common, '--results-dir', tmp_path,
        '--topk', '1', cwd=tmp_path)
    assert list(tmp_path.glob('el_resnet26*.csv'))


def test_benchmark_and_bulk_runner(scripts, tmp_path):
    args = ['--device', 'cpu', '-b', '2', '--img-size', '32', '--num-warm-iter', '1', '--num-bench-iter', '10']
    launched(scripts / 'benchmark.py', '--model', 'el_resnet18', '--bench', 'both', *args,
             '--results-file', 'b.json', '--results-format', 'json', cwd=tmp_path)
    assert 'infer_samples_per_sec' in (tmp_path / 'b.json').read_text()
    launched(scripts / 'bulk_runner.py', '--model-list', 'el_resnet?8', '--results-file', 'bulk.csv',
             scripts / 'benchmark.py', '--bench', 'inference', *args, cwd=tmp_path)
    assert 'el_resnet18' in (tmp_path / 'bulk.csv').read_text()


@pytest.mark.parametrize('dynamo', [False, True])
def test_onnx_export_runs_in_onnxruntime(scripts, images, trained, tmp_path, dynamo):
    for package in ('onnx', 'onnxscript', 'onnxruntime'):
        pytest.importorskip(package, reason=f'{package} is in the extra "scripts"')
    import numpy as np
    import onnxruntime
    from PIL import Image
    launched(
        scripts / 'onnx_export.py', 'net.onnx', '--model', 'el_resnet26', '--num-classes', '10', '--img-size', '64',
        '-b', '1', '--checkpoint', trained, *(['--dynamo'] if dynamo else []), cwd=tmp_path)
    session = onnxruntime.InferenceSession(str(tmp_path / 'net.onnx'), providers=['CPUExecutionProvider'])
    model = timm.create_model('el_resnet26', num_classes=10, checkpoint_path=str(trained)).eval()
    files = sorted((images / 'validation').glob('*/*.jpg'))
    same = 0
    for file in files:
        image = np.asarray(Image.open(file).convert('RGB').resize((64, 64)), dtype=np.float32) / 255
        x = ((image - timm_el.models.resnet.IMAGENET_DEFAULT_MEAN) / timm_el.models.resnet.IMAGENET_DEFAULT_STD)
        x = x.astype(np.float32).transpose(2, 0, 1)[None]
        theirs = session.run(None, {session.get_inputs()[0].name: x})[0]
        with torch.inference_mode():
            ours = model(torch.from_numpy(x)).numpy()
        same += int(theirs.argmax() == ours.argmax())
    assert same == len(files)


def test_launcher_names_what_it_cannot_find(tmp_path):
    result = run(sys.executable, '-m', 'timm_el', 'run', 'nope.py', check=False)
    assert result.returncode != 0 and "no file 'nope.py'" in result.stderr and 'TIMM_SCRIPTS' in result.stderr
