"""Hub folders, and the real huggingface_hub client against a Hub on loopback."""
import json
import os
import subprocess
import sys

import pytest
import timm
import torch
import yaml
from conftest import randomise
from local_hub import Hub

import timm_el
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
    with pytest.raises((RuntimeError, ValueError)):  # timm alone would build the float host
        timm.create_model(f'local-dir:{folder}', pretrained=True)
    with pytest.raises(ValueError, match='num_classes: .* is a converted net, which takes no arguments'):
        timm_el.from_hub(folder, num_classes=3)


def test_what_is_no_binarized_net_of_timm_is_refused(tmp_path):
    with pytest.raises(ValueError, match='neither registered by timm_el nor converted'):
        timm_el.save_for_hub(timm.create_model('resnet18'), tmp_path / 'a')
    net = torch.nn.Sequential(torch.nn.Conv2d(3, 4, 3), torch.nn.BatchNorm2d(4), torch.nn.Conv2d(4, 4, 3))
    with pytest.raises(ValueError, match='was not made by timm.create_model'):
        timm_el.save_for_hub(timm_el.binarize(net, example_input=torch.randn(2, 3, 16, 16)), tmp_path / 'b')
    (tmp_path / 'config.json').write_text('{"architecture": "resnet18"}')
    (tmp_path / 'model.safetensors').write_bytes(b'')
    with pytest.raises(ValueError, match='no entry timm_el'):
        timm_el.from_hub(tmp_path)
    (tmp_path / 'config.json').write_text('{"architecture": "resnet18", "timm_el": {"format_version": 9}}')
    with pytest.raises(ValueError, match='found format version 9, expected at most 1'):
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
    converted=out(timm_el.from_hub("hf-hub:user/other")))
print(json.dumps(facts))
'''


def run(code, *args, **env):
    result = subprocess.run(
        [sys.executable, '-W', 'ignore', *code, *args], env={**os.environ, 'HF_TOKEN': 'hf_local', **env},
        capture_output=True, text=True, timeout=300)
    assert result.returncode == 0, result.stderr[-3000:]
    return result.stdout


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


def test_pretrained_takes_the_shipped_weights_and_says_so(caplog):
    model = timm.create_model('el_resnet26', pretrained=True)
    assert 'there are no ImageNet weights yet' in caplog.text
    assert model.num_classes == 10 and model.pretrained_cfg['tag'] == 'cifar10'
    assert torch.equal(outputs(model, 32), outputs(timm.create_model('el_resnet26.cifar10', pretrained=True), 32))
    assert torch.equal(outputs(model, 32), outputs(timm_el.from_hub(SHIPPED / 'el_resnet26.cifar10'), 32))
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
