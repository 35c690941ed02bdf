"""Hub folders, pushed to a folder, and by the real huggingface_hub client to a Hub on loopback."""
import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import timm
import torch
import yaml
from conftest import randomise
from huggingface_hub import RepoUrl
from local_hub import Hub

import timm_el
from timm_el.__main__ import main
from timm_el.hub import file_facts
from timm_el.models._pretrained import SHIPPED


def outputs(model, size=64):
    x = torch.randn(2, 3, size, size, generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        return model.eval()(x)


def test_a_registered_model_comes_back_through_timm(tmp_path):
    torch.manual_seed(0)
    model = randomise(timm.create_model('el_resnet18', num_classes=7, recipe='bireal')).eval()
    folder = timm_el.save_for_hub(
        model, tmp_path / 'repo', metrics={'top1': 12.5}, dataset='CIFAR10', details='Trained by hand.',
        repo_id='me/net', pretrained_cfg=dict(input_size=(3, 64, 64)))
    loaded = timm.create_model(f'local-dir:{folder}', pretrained=True)
    assert torch.equal(outputs(loaded), outputs(model))
    assert torch.equal(outputs(timm_el.from_hub(folder)), outputs(model))
    assert loaded.binarize_report.recipe.name == 'bireal' and loaded.pretrained_cfg['input_size'][1] == 64
    config = json.loads((folder / 'config.json').read_text())
    assert config['architecture'] == 'el_resnet18' and config['model_args']['recipe'] == 'bireal'
    card = (folder / 'README.md').read_text()
    _, front, text = card.split('---\n', 2)
    meta = yaml.safe_load(front)
    assert meta['license'] == 'apache-2.0' and meta['library_name'] == 'timm' and meta['datasets'] == ['cifar10']
    assert meta['model-index'][0]['results'][0]['metrics'][0]['value'] == 12.5
    snippet = text.split('```python\n')[1].split('```')[0]
    assert snippet.startswith('import timm_el\n') and 'hf-hub:me/net' in snippet
    assert 'Trained by hand.' in text and 'M OPs' not in text and '| OPs |' in text and '| recipe | bireal |' in text


@pytest.mark.parametrize('name', ['regnetx_002', 'mobilevit_xxs', 'ghostnet_050'])
def test_a_converted_net_comes_back_with_its_norms_and_kept_layers(name, tmp_path):
    torch.manual_seed(0)
    first = [p for p, m in timm.create_model(name).named_modules() if isinstance(m, torch.nn.Conv2d)][5]
    model = randomise(timm_el.binarize(timm.create_model(name, num_classes=5), keep=(first,))).eval()
    folder = timm_el.save_for_hub(model, tmp_path, float_dtype=torch.float16)
    torch.manual_seed(1)
    loaded = timm_el.from_hub(folder)
    twin = timm_el.load_packed(model, folder / 'model.safetensors')
    assert torch.equal(outputs(loaded), outputs(twin))
    assert loaded.binarize_report.plan() == model.binarize_report.plan()
    assert 'timm_el.from_hub(' in (folder / 'README.md').read_text()


# ------------------------------------------------------------------------------------- folders of converted nets

HOSTS = {  # known blocks; traced, with new norms; linear layers on pixels; a last convolution without a norm
    'test_resnet': {}, 'test_efficientnet': dict(keep=('classifier', 'blocks.1.0.conv_exp')), 'test_convnext': {},
    'test_nfnet': {}}


@pytest.fixture(scope='module')
def folders(tmp_path_factory):
    """A converted net and its folder, by its host's name."""
    made = {}
    for name, kwargs in HOSTS.items():
        torch.manual_seed(0)
        model = randomise(timm_el.binarize(timm.create_model(name, num_classes=5), **kwargs))
        folder = timm_el.save_for_hub(model, tmp_path_factory.mktemp(name))
        made[name] = timm_el.load_packed(model, folder / 'model.safetensors').eval(), folder
    return made


def by_timm(folder, **kwargs):
    return timm.create_model(f'local-dir:{folder}', pretrained=True, **kwargs).eval()


def units(model):
    return sum(isinstance(m, timm_el.layers.BinaryUnit) for m in model.modules())


OPENERS = {'create_model': by_timm, 'from_hub': lambda folder, **kwargs: timm_el.from_hub(folder, **kwargs).eval()}


@pytest.mark.parametrize('name', HOSTS)
@pytest.mark.parametrize('opener', OPENERS)
def test_a_folder_of_a_converted_net_opens_with_any_argument_as_that_net(name, opener, folders):
    model, folder = folders[name]
    x, opened = torch.randn(2, 3, 64, 64), OPENERS[opener]
    with torch.no_grad():
        features, maps = model.forward_features(x), model.forward_intermediates(x, intermediates_only=True)
        for kwargs in ({}, dict(num_classes=5), dict(num_classes=3), dict(num_classes=0), dict(global_pool='max')):
            other = opened(folder, **kwargs)
            assert torch.equal(other.forward_features(x), features) and units(other) == units(model), kwargs
            classes = kwargs.get('num_classes', 5)
            assert other(x).shape == (2, classes or model.num_features) and other.num_classes == classes, kwargs
        assert torch.equal(opened(folder)(x), model(x))
        gray, weight = opened(folder, in_chans=1), model.pretrained_cfg['first_conv'] + '.weight'
        assert units(gray) == units(model) and gray(x[:, :1]).shape == (2, 5)
        for key, value in gray.state_dict().items():
            expected = model.state_dict()[key]
            assert torch.equal(value, expected.sum(1, keepdim=True) if key == weight else expected), key
        for kwargs in ({}, dict(feature_cls='fx'), dict(feature_cls='hook'), dict(feature_cls='getter')):
            found = opened(folder, features_only=True, **kwargs)(x)
            assert all(torch.equal(a, b) for a, b in zip(found, maps, strict=True)), kwargs
        two = opened(folder, features_only=True, out_indices=(1, 2))
        assert all(torch.equal(a, b) for a, b in zip(two(x), maps[1:3], strict=True))
        assert two.feature_info.channels() == [m.shape[1] for m in maps[1:3]]


def test_a_folder_of_a_converted_net_is_none_of_timms_own(folders, tmp_path):
    """Without this package its name is not known, and the error says it."""
    folder = folders['test_resnet'][1]
    code = f"""
import timm
try:
    timm.create_model('local-dir:{folder}', pretrained=True, num_classes=3)
except RuntimeError as e:
    print(e)
"""
    assert run(['-c', code]) == 'Unknown model (timm_el_converted)\n'
    assert json.loads((folder / 'config.json').read_text())['timm_el'] == {'format_version': 2, 'converted': True}


def test_a_net_from_a_folder_is_written_and_opened_again(folders, tmp_path):
    model, folder = folders['test_efficientnet']
    timm_el.save_for_hub(timm_el.from_hub(folder), tmp_path / 'again')
    assert file_facts(tmp_path / 'again' / 'model.safetensors') == file_facts(folder / 'model.safetensors')
    assert json.loads((tmp_path / 'again' / 'config.json').read_text())['model_args']['host'] == 'test_efficientnet'
    assert '# test_efficientnet, binarized' in (tmp_path / 'again' / 'README.md').read_text()
    narrow = by_timm(folder, num_classes=3)
    timm_el.save_for_hub(narrow, tmp_path / 'narrow')
    assert torch.equal(outputs(by_timm(tmp_path / 'narrow')), outputs(narrow))


@pytest.mark.parametrize('name', HOSTS)
def test_a_folder_of_the_first_version_opens_by_from_hub_with_any_argument(name, folders, tmp_path):
    """There the architecture was the host's, and the plan stood beside it."""
    model, folder = folders[name]
    config = json.loads((folder / 'config.json').read_text())
    plan, host = config['model_args'].pop('plan'), config['model_args'].pop('host')
    config.update(architecture=host, timm_el={'format_version': 1, 'plan': plan, 'converted': True})
    (tmp_path / 'config.json').write_text(json.dumps(config))
    (tmp_path / 'model.safetensors').write_bytes((folder / 'model.safetensors').read_bytes())
    assert torch.equal(outputs(timm_el.from_hub(tmp_path)), outputs(model))
    x = torch.randn(2, 3, 64, 64)
    with torch.no_grad():
        for kwargs in (dict(num_classes=3), dict(num_classes=0)):
            other = timm_el.from_hub(tmp_path, **kwargs).eval()
            assert torch.equal(other.forward_features(x), model.forward_features(x))
        last = timm_el.from_hub(tmp_path, features_only=True).eval()(x)[-1]
        assert torch.equal(last, model.forward_intermediates(x, intermediates_only=True)[-1])


def test_an_argument_that_makes_another_net_is_refused_and_not_half_loaded(folders, tmp_path):
    _, folder = folders['test_resnet']
    for name in ('config.json', 'model.safetensors'):
        (tmp_path / name).write_bytes((folder / name).read_bytes())
    for kwargs in (dict(layers=(1, 2, 1, 1), num_classes=3), dict(host='test_efficientnet', num_classes=3),
                   dict(recipe='el', plan={**timm_el.binarize(timm.create_model('test_resnet'), 'r2b').
                                           binarize_report.plan()}, num_classes=3)):
        with pytest.raises(timm_el.CheckpointError, match=r'load the folder without it: timm_el.from_hub\(folder\)'):
            by_timm(tmp_path, **kwargs)


@pytest.mark.parametrize('name', ['test_resnet', 'registered'])
def test_a_damaged_folder_is_called_that(name, folders, tmp_path):
    if name == 'registered':
        folder = timm_el.save_for_hub(timm.create_model('el_resnet20'), tmp_path / 'made')
    else:
        folder = folders[name][1]
    (tmp_path / 'config.json').write_bytes((folder / 'config.json').read_bytes())
    data = (folder / 'model.safetensors').read_bytes()
    for bad in (data[:-100], data[:-1] + bytes([data[-1] ^ 1])):
        (tmp_path / 'model.safetensors').write_bytes(bad)
        with pytest.raises(timm_el.CheckpointError, match=f'^{tmp_path}/model.safetensors: .*damaged'):
            timm_el.from_hub(tmp_path)


def test_features_of_a_net_are_no_folder(tmp_path):
    for model in (timm.create_model('el_resnet20', features_only=True),
                  timm_el.binarize(timm.create_model('test_resnet', features_only=True))):
        with pytest.raises(ValueError, match='features_only=True, expected the whole net'):
            timm_el.save_for_hub(model, tmp_path / 'x')
    assert not (tmp_path / 'x').exists()


def test_any_net_of_timm_is_there_by_name(tmp_path):
    torch.manual_seed(0)
    model = timm.create_model('timm_el_converted', host='test_resnet', recipe='bireal', num_classes=4)
    torch.manual_seed(0)
    twin = timm_el.binarize(timm.create_model('test_resnet', num_classes=4), 'bireal')
    assert torch.equal(outputs(model), outputs(twin)) and model.binarize_report.recipe.name == 'bireal'
    assert model.pretrained_cfg['input_size'] == twin.pretrained_cfg['input_size']
    with pytest.raises(RuntimeError, match='No pretrained weights exist for timm_el_converted'):
        timm.create_model('timm_el_converted', host='test_resnet', pretrained=True)


def test_what_is_no_binarized_net_of_timm_is_refused(tmp_path):
    with pytest.raises(ValueError, match='neither registered by timm_el nor converted'):
        timm_el.save_for_hub(timm.create_model('resnet18'), tmp_path / 'a')
    net = torch.nn.Sequential(torch.nn.Conv2d(3, 4, 3), torch.nn.BatchNorm2d(4), torch.nn.Conv2d(4, 4, 3))
    with pytest.raises(ValueError, match='was not made by timm.create_model'):
        timm_el.save_for_hub(timm_el.binarize(net, example_input=torch.randn(2, 3, 16, 16)), tmp_path / 'b')
    (tmp_path / 'config.json').write_text('{"architecture": "resnet18"}')
    (tmp_path / 'model.safetensors').write_bytes(b'')
    with pytest.raises(ValueError, match=r'config.json: found no entry timm_el'):
        timm_el.from_hub(tmp_path)
    (tmp_path / 'config.json').write_text('{"architecture": "resnet18", "timm_el": {"format_version": 9}}')
    with pytest.raises(ValueError, match='found format version 9, expected at most 2'):
        timm_el.from_hub(tmp_path)


PUSHES = '''
import json, sys
from timm_el.__main__ import main
for argv in json.loads(sys.argv[1]):
    assert main(argv) == 0
'''
CLIENT = '''
import json, os
import torch, timm, timm_el
from huggingface_hub import HfApi
x = torch.ones(1, 3, 32, 32)
def out(model):
    with torch.no_grad():
        return model.eval()(x).flatten().tolist()
facts = dict(
    files=sorted(HfApi().list_repo_files("user/net")) if "HF_HUB_OFFLINE" not in os.environ else None,
    timm=out(timm.create_model("hf-hub:user/net", pretrained=True)),
    again=out(timm.create_model("hf-hub:user/net", pretrained=True)),
    ours=out(timm_el.from_hub("user/net")),
    converted=out(timm_el.from_hub("hf-hub:user/other")),
    by_timm=out(timm.create_model("hf-hub:user/other", pretrained=True)),
    adapted=len(out(timm.create_model("hf-hub:user/other", pretrained=True, num_classes=7))))
print(json.dumps(facts))
'''


def run(code, *args, **env):
    result = subprocess.run(
        [sys.executable, '-W', 'ignore', *code, *args], env={**os.environ, 'HF_TOKEN': 'hf_local', **env},
        capture_output=True, text=True, timeout=300)
    assert result.returncode == 0, result.stderr[-3000:]
    return result.stdout


class LocalApi:
    """`HfApi` with a folder in place of the Hub; a name without a user is the user's own."""
    root: Path
    calls: list

    def __init__(self, **kwargs) -> None:
        self.calls.append(kwargs)

    def create_repo(self, repo_id: str, **kwargs) -> RepoUrl:
        self.calls.append(kwargs)
        return RepoUrl(f'https://huggingface.co/{repo_id if "/" in repo_id else f"me/{repo_id}"}')

    def upload_folder(self, repo_id: str, folder_path, allow_patterns: list, **kwargs) -> None:
        ignore = shutil.ignore_patterns(*set(os.listdir(folder_path)) - set(allow_patterns))
        shutil.copytree(folder_path, self.root / repo_id, ignore=ignore, dirs_exist_ok=True)


@pytest.mark.parametrize('options', [['--model', 'el_resnet18'], ['--model', 'test_resnet', '--recipe', 'el']])
def test_what_is_pushed_is_the_net_and_nothing_else(options, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(LocalApi, 'root', tmp_path / 'hub', raising=False)
    monkeypatch.setattr(LocalApi, 'calls', [], raising=False)
    monkeypatch.setattr('huggingface_hub.HfApi', LocalApi)
    folder = tmp_path / 'net'
    push = ['push', 'net', *options, '--model-kwargs', '{"num_classes": 3}', '--folder', str(folder), '--private']
    assert main([*push, '--dry-run']) == 0
    assert 'nothing was uploaded' in capsys.readouterr().out and not LocalApi.calls
    (folder / 'notes.txt').write_text('not for others')
    assert main(push) == 0
    said, pushed = capsys.readouterr().out, tmp_path / 'hub' / 'me' / 'net'
    assert f'sha256 {file_facts(folder / "model.safetensors")["sha256"]}' in said
    assert said.splitlines()[-1] == 'https://huggingface.co/me/net'
    assert LocalApi.calls == [{'token': None, 'library_name': 'timm_el'}, {'private': True, 'exist_ok': True}]
    assert set(os.listdir(pushed)) == {'README.md', 'config.json', 'model.safetensors'}
    expected = outputs(timm_el.from_hub(folder), 32)
    assert torch.equal(outputs(timm_el.from_hub(pushed), 32), expected)
    assert torch.equal(outputs(timm.create_model(f'local-dir:{pushed}', pretrained=True), 32), expected)


@pytest.mark.slow
def test_push_list_download_and_offline_reuse_with_the_real_client(tmp_path):
    small = ['--model-kwargs', '{"num_classes": 3}', '--pretrained-cfg', '{"input_size": [3, 32, 32]}']
    push = ['push', 'user/net', '--model', 'el_resnet18', '--float-dtype', 'float16', *small]
    other = ['push', 'user/other', '--model', 'resnet10t', '--recipe', 'el', *small]
    dry = [*push, '--dry-run', '--folder', str(tmp_path / 'net')]
    with Hub() as hub:
        env = {'HF_ENDPOINT': hub.url, 'HF_HOME': str(tmp_path / 'home'), 'HF_HUB_DISABLE_XET': '1'}
        said = run(['-c', PUSHES], json.dumps([dry, other]), **env)
        assert 'nothing was uploaded' in said and 'user/net' not in hub.files
        assert f'sha256 {file_facts(tmp_path / "net" / "model.safetensors")["sha256"]}' in said
        run(['-c', PUSHES], json.dumps([push]), **env)
        assert set(hub.files['user/net']) == {'README.md', 'config.json', 'model.safetensors'}
        first = json.loads(run(['-c', CLIENT], **env))
        assert set(first['files']) >= {'README.md', 'config.json', 'model.safetensors'}
        assert first['timm'] == first['ours'] == first['again'] and len(first['converted']) == 3
        assert first['by_timm'] == first['converted'] and first['adapted'] == 7
        downloads = [line for line in hub.log if line.startswith('GET') and 'model.safetensors' in line]
        assert len(downloads) == 2  # one for each net: the etag is the same, nothing is fetched again
    offline = json.loads(run(['-c', CLIENT], **{**env, 'HF_HUB_OFFLINE': '1'}))
    assert offline['timm'] == first['timm'] and offline['converted'] == first['converted']


# ------------------------------------------------------------------------------------------------------ shipped weights

def test_the_manifest_says_what_is_shipped():
    manifest = json.loads((SHIPPED / 'manifest.json').read_text())
    folders = sorted(p.name for p in SHIPPED.iterdir() if (p / 'config.json').is_file())
    assert sorted(manifest) == folders and folders
    for name, facts in manifest.items():
        assert set(facts) >= {'sha256', 'size', 'top1', 'recipe', 'training'}
        found = file_facts(SHIPPED / name / 'model.safetensors')
        assert found == {'sha256': facts['sha256'], 'size': facts['size']}
        assert f'{facts["top1"]:.2f}' in (SHIPPED / name / 'README.md').read_text()
        config = json.loads((SHIPPED / name / 'config.json').read_text())
        plan = config['timm_el'].get('plan')  # a ReActNet is not converted
        assert facts['recipe'] == (plan['recipe']['name'] if plan else config['architecture'])


def test_the_shipped_weights_are_small_and_documented_as_the_manifest_has_them():
    manifest = json.loads((SHIPPED / 'manifest.json').read_text())
    assert sum(facts['size'] for facts in manifest.values()) <= 16e6
    page = (SHIPPED.parent / 'docs' / 'hub.md').read_text()
    for name, facts in manifest.items():
        size = facts['dataset'].rpartition(', ')[2]
        assert f'| `{name}` | {facts["top1"]:.2f} % | {size} | {facts["size"] / 1e6:.1f} MB |' in page


def test_pretrained_takes_the_shipped_weights_and_says_so(caplog):
    model = timm.create_model('el_resnet26', pretrained=True)
    assert 'there are no ImageNet weights yet' in caplog.text
    assert model.num_classes == 10 and model.pretrained_cfg['tag'] == 'imagenette'
    assert torch.equal(outputs(model, 32), outputs(timm.create_model('el_resnet26.imagenette', pretrained=True), 32))
    assert torch.equal(outputs(model, 32), outputs(timm_el.from_hub(SHIPPED / 'el_resnet26.imagenette'), 32))
    assert timm.create_model('el_resnet26').num_classes == 1000  # the default is the ImageNet configuration
    assert timm.create_model('el_resnet26', pretrained=True, num_classes=4).fc.out_features == 4
    other = timm.create_model('el_resnet26', pretrained=True, recipe='el', in_chans=1)
    assert other.conv1.in_channels == 1


def test_no_default_config_names_a_repository():
    for name in timm.list_models():
        if timm.model_entrypoint(name).__module__.startswith('timm_el.'):
            for tag in timm.list_pretrained(f'{name}*'):
                cfg = timm.get_pretrained_cfg(tag)
                assert not cfg.hf_hub_id and not cfg.url and os.path.isfile(cfg.file)


@pytest.mark.slow
def test_a_wheel_carries_the_shipped_weights(tmp_path):
    """In a fresh environment, outside the checkout, without a network."""
    root = SHIPPED.parent
    run(['-m', 'pip', 'wheel', '--no-deps', '-w', str(tmp_path), str(root)])
    wheel = next(tmp_path.glob('*.whl'))
    run(['-m', 'venv', '--system-site-packages', str(tmp_path / 'venv')])
    python = str(tmp_path / 'venv' / 'bin' / 'python')
    site = tmp_path / 'site'
    subprocess.run([python, '-m', 'pip', 'install', '--no-deps', '--target', str(site), str(wheel)], check=True)
    paths = os.pathsep.join([str(site), *(p for p in sys.path if p.endswith('site-packages'))])
    code = ('import timm_el, timm; m = timm.create_model("el_resnet26", pretrained=True); '
            'print(timm_el.__file__, m.num_classes, m.pretrained_cfg["file"])')
    result = subprocess.run(
        [python, '-W', 'ignore', '-c', code], cwd=tmp_path, capture_output=True, text=True,
        env={**os.environ, 'HF_HUB_OFFLINE': '1', 'PYTHONPATH': paths})
    assert result.returncode == 0, result.stderr
    file, classes, weights = result.stdout.split()
    assert file.startswith(str(site)) and classes == '10' and weights.startswith(str(site))


@pytest.mark.parametrize('wrong, said', [
    (dict(model_args={'layers': object()}), 'not serializable'),
    (dict(metrics={'top1': None}), "metrics: found None for 'top1', expected a number"),
    (dict(metrics={'top1': '71.2'}), "metrics: found '71.2' for 'top1', expected a number")],
    ids=['argument', 'no metric', 'text'])
def test_a_folder_that_could_not_be_written_again_stays_as_it_was(wrong, said, tmp_path):
    """A card says that a folder was verified; the older one's must not stand beside other weights."""
    model = randomise(timm.create_model('el_resnet20', num_classes=3)).eval()
    timm_el.save_for_hub(model, tmp_path, metrics={'top1': 50})
    before = {path.name: path.read_bytes() for path in tmp_path.iterdir()}
    assert sorted(before) == ['README.md', 'config.json', 'model.safetensors']
    with pytest.raises(ValueError, match=said):
        timm_el.save_for_hub(randomise(model, seed=1), tmp_path, **wrong)
    assert {path.name: path.read_bytes() for path in tmp_path.iterdir()} == before
