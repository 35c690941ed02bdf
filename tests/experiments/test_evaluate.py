"""The eval verb: what it counts, with what it compares, which nets it takes, what it refuses."""
import dataclasses
import json

import pytest
import timm
import torch
import yaml
from conftest import randomise
from PIL import Image

import timm_el
from timm_el.__main__ import main
from timm_el.cli.eval import show
from timm_el.experiments import evaluate as verb
from timm_el.experiments.config import FitConfig
from timm_el.experiments.evaluate import as_packed
from timm_el.experiments.fit import fit
from timm_el.experiments.images import open_folder
from timm_el.experiments.nets import Net
from timm_el.experiments.photos import label_names, prepare
from timm_el.models._pretrained import SHIPPED

# The folders of its classes, and their names.
SYNSETS = ('n01440764', 'n02102040', 'n02979186', 'n03000684', 'n03028079', 'n03394916', 'n03417042', 'n03425413',
           'n03445777', 'n03888257')
CLASSES = ('tench', 'English springer', 'cassette player', 'chain saw', 'church', 'French horn', 'garbage truck',
           'gas pump', 'golf ball', 'parachute')
MODEL = 'el_resnet26.imagenette'
TINY = {'layers': [1, 1, 1, 1], 'channels': [8, 8, 16, 16]}
# timm's reader leaves it to the garbage collector to close what it opened.
pytestmark = pytest.mark.filterwarnings('ignore:unclosed file:ResourceWarning')


@pytest.fixture(scope='module')
def shipped():
    return timm.create_model(MODEL, pretrained=True).eval()


@pytest.fixture(scope='module')
def folder(tmp_path_factory, shipped):
    """Noise in ten classes: of 20 images the shipped net puts 10 into the class that their folder names."""
    def draw(i: int) -> Image.Image:
        coarse = torch.rand(3, 1 + i % 5, 1 + i % 3)[None]
        pixels = torch.nn.functional.interpolate(coarse, (32, 32))[0].mul(255).byte().permute(1, 2, 0).numpy()
        return Image.fromarray(pixels)

    def guess(image: Image.Image) -> int:
        with torch.no_grad():
            return shipped(prepare(shipped, image)[None]).argmax().item()

    root = tmp_path_factory.mktemp('noise')
    torch.manual_seed(0)
    for i in range(20):
        image, label = draw(i), i
        while i < 10 and guess(image) == label:  # one wrong image in every class
            image = draw(i)
        label = label if i < 10 else guess(image)
        (root / 'validation' / SYNSETS[label]).mkdir(parents=True, exist_ok=True)
        image.save(root / 'validation' / SYNSETS[label] / f'{i}.png')
    return root


def evaluate(capsys, *argv) -> dict:
    assert main(['eval', *map(str, argv), '--json']) == 0
    return json.loads(capsys.readouterr().out)


def test_all_forms_of_the_shipped_net_are_counted_right(folder, shipped, capsys):
    top1 = json.loads((SHIPPED / 'manifest.json').read_text())[MODEL]['top1']
    found = evaluate(capsys, 'el_resnet26', '--data-dir', folder, '--batch-size', 7)
    assert found['images'] == 20 and found['size'] == list(shipped.pretrained_cfg['input_size'][1:])
    assert found['forms']['latent']['top1'] == found['forms']['packed']['top1'] == 50
    assert 50 <= found['forms']['latent']['top5'] <= 100
    assert found['same_top1']['latent = packed'] == 100
    assert abs(found['forms']['deployed']['top1'] - 50) <= 10 and found['same_top1']['latent = deployed'] >= 90
    assert found['recorded'] == {'top1': top1} and found['engine']['body']
    text = '\n'.join(show(found))
    assert f'recorded: top-1 {top1:.2f}' in text and text.count('NOT within 0.1 points') == 2
    assert 'NOT within 0.3 points' in text


def test_a_part_of_the_images_is_spread_over_the_classes_and_not_compared(folder, capsys):
    found = evaluate(capsys, MODEL, '--data-dir', folder, '--limit', 5, '--forms', 'latent')
    assert found['images'] == 5 and list(found['forms']) == ['latent'] and found['same_top1'] == {}
    assert 'of all validation images at the own size; not compared' in '\n'.join(show(found))
    loader = verb.load_images(timm.create_model(MODEL), str(folder), limit=5)
    labels = torch.cat([y for _, y in loader]).tolist()
    assert len(set(labels)) > 1 and labels == sorted(labels)


def test_a_top1_like_the_cards_is_said_to_be_within():
    result = {
        'net': 'net', 'images': 10_000, 'size': [32, 32], 'damaged': [], 'impossible': {}, 'comparable': True,
        'recorded': {'top1': 60.0}, 'same_top1': {},
        'forms': {'latent': {'top1': 59.9, 'top5': 90.}, 'deployed': {'top1': 60.31, 'top5': 90.}},
        'engine': {'body': 'avx2'}, 'machine': {'cpu': 'a processor', 'threads': 1}}
    lines = list(show(result))
    assert lines[-2].endswith('-0.10   within 0.1 points') and lines[-1].endswith('+0.31   NOT within 0.3 points')
    assert 'no top-1 is recorded' in list(show({**result, 'recorded': {}}))[-1]


def test_the_packed_form_computes_with_what_is_in_the_file(monkeypatch):
    model = randomise(timm.create_model('el_resnet18', num_classes=10)).eval()
    x = torch.randn(2, 3, 32, 32)
    with torch.no_grad():
        assert torch.equal(as_packed(model)(x), model(x))
        other = randomise(timm.create_model('el_resnet18', num_classes=10), seed=1).eval()
        monkeypatch.setattr(verb, 'save_packed', lambda model, path: timm_el.save_packed(other, path))
        assert torch.equal(as_packed(model)(x), other(x))


def test_nets_come_from_checkpoints_hub_folders_and_recipes(tmp_path):
    torch.manual_seed(0)
    model = randomise(timm.create_model('el_resnet18', num_classes=7, recipe='bireal')).eval()
    x = torch.randn(2, 3, 32, 32)
    expected = model(x)
    torch.save({'state_dict': model.state_dict()}, tmp_path / 'last.pth.tar')
    timm_el.save_for_hub(model, tmp_path / 'hub', metrics={'top1': 12.5}, pretrained_cfg={'input_size': (3, 32, 32)})
    for net in (Net.parse(f'el_resnet18:bireal@{tmp_path / "last.pth.tar"}'), Net.parse(str(tmp_path / 'hub'))):
        loaded = net.build()
        assert not loaded.training and torch.allclose(loaded(x), expected)
    assert net.recorded(loaded) == {'top1': 12.5} and net.label == 'hub'
    assert Net.parse('resnet18:el').build().binarize_report.recipe.name == 'el'
    assert Net.parse('resnet18').build().num_classes == 1000


def test_a_folder_with_weights_behind_it_has_those(colours, tmp_path):
    config = FitConfig(model='el_resnet18', model_kwargs=TINY, num_classes=3, batch_size=8, epochs=1, pad_crop=4)
    run = tmp_path / 'run'
    fit(config, str(run), str(colours))
    other = randomise(timm.create_model('el_resnet18', num_classes=3, **TINY), seed=1).eval()
    torch.save(other.state_dict(), tmp_path / 'other.pth')
    timm_el.save_for_hub(other, tmp_path / 'hub', pretrained_cfg={'input_size': (3, 32, 32)})
    x = torch.randn(2, 3, 32, 32)
    for folder in (run, tmp_path / 'hub'):
        file = str(tmp_path / 'other.pth')
        for net in (Net.parse(f'{folder}@{file}'), Net.parse(str(folder), file)):
            model = net.build()
            assert torch.equal(model(x), other(x)) and net.recorded(model) == {}
    own = Net.parse(str(run)).build()
    assert not torch.equal(own(x), other(x))
    assert torch.equal(Net.parse(f'{run}@pretrained').build()(x), own(x))
    with pytest.raises(ValueError, match="found the recipe 'bireal', expected none, as the folder has its own"):
        Net.parse(f'{run}:bireal')


def test_a_card_says_nothing_of_a_file_that_lies_beside_it(tmp_path):
    model = randomise(timm.create_model('el_resnet20', num_classes=3)).eval()
    timm_el.save_for_hub(model, tmp_path, metrics={'top1': 50})
    torch.save(model.state_dict(), tmp_path / 'mine.pth')
    assert Net.parse(f'el_resnet20@{tmp_path / "model.safetensors"}').recorded(model) == {'top1': 50}
    assert Net.parse(f'el_resnet20@{tmp_path / "mine.pth"}').recorded(model) == {}
    other = timm.create_model('el_resnet18', num_classes=3)
    assert Net.parse(f'el_resnet18@{tmp_path / "model.safetensors"}').recorded(other) == {}


def test_a_form_that_the_network_does_not_take_is_left_out_and_named(colours, tmp_path, capsys):
    config = FitConfig(
        model='el_resnet18', recipe='twn', model_kwargs=TINY, num_classes=3, batch_size=8, epochs=1, pad_crop=4)
    fit(config, str(tmp_path / 'run'), str(colours))
    assert 'there is no packed.safetensors: ' in capsys.readouterr().out  # and the run has ended well
    found = evaluate(capsys, tmp_path / 'run', '--data-dir', colours)
    assert 'latent' in found['forms'] and 'packed' not in found['forms']
    assert 'found weights of 2 bits' in found['impossible']['packed']
    assert any(line.startswith('not packed: ') for line in show(found))
    assert main(['eval', str(tmp_path / 'run'), '--data-dir', str(colours), '--forms', 'packed']) == 2
    assert 'forms: the network cannot be packed: ' in capsys.readouterr().err


def test_folders_with_the_names_of_the_labels_have_the_order_of_the_labels(tmp_path):
    labels = ['tench', 'church', 'Gas pump']
    for i, name in enumerate(labels):
        (tmp_path / name.lower()).mkdir()
        Image.new('RGB', (8, 8), (80 * i, 0, 0)).save(tmp_path / name.lower() / f'{i}.png')
    model = timm.create_model('el_resnet20', num_classes=3, pretrained_cfg_overlay={'label_names': labels})
    (images, found), = verb.load_images(model, str(tmp_path))
    red = images[:, 0].mean((1, 2))
    assert sorted(found.tolist()) == [0, 1, 2] and red.argsort().tolist() == found.argsort().tolist()


def test_a_folder_of_train_py_is_evaluated_as_it_was_trained_and_pushed_with_its_log(tmp_path, capsys):
    args = {'model': 'el_resnet18', 'model_kwargs': {'recipe': 'bireal'}, 'num_classes': 10, 'input_size': [3, 48, 48],
            'img_size': None, 'mean': [0.1, 0.2, 0.3], 'std': [0.4, 0.5, 0.6], 'crop_pct': 1.0,
            'interpolation': 'bilinear', 'epochs': 2, 'amp': False}
    run = tmp_path / 'run'
    run.mkdir()
    (run / 'args.yaml').write_text(yaml.safe_dump(args))
    with pytest.raises(ValueError, match='found no last.pth.tar, expected a run of at least one epoch'):
        Net.parse(str(run)).build()
    torch.manual_seed(0)
    model = randomise(timm.create_model('el_resnet18', num_classes=10, recipe='bireal')).eval()
    torch.save({'state_dict': model.state_dict()}, run / 'last.pth.tar')
    (run / 'summary.csv').write_text('epoch,train_loss,eval_loss,eval_top1\n0,2.5,2.25,12\n1,2.0,1.75,34\n')
    loaded = Net.parse(str(run)).build()
    x = torch.randn(2, 3, 48, 48)
    assert torch.equal(loaded(x), model(x))
    assert prepare(loaded, Image.new('RGB', (60, 60)))[:, 0, 0].tolist() == pytest.approx([-0.25, -0.4, -0.5])
    argv = ['push', 'me/net', '--model', str(run), '--folder', str(tmp_path / 'hub'), '--dry-run']
    assert main([*argv, '--pretrained-cfg', json.dumps({'tag': 'imagenette', 'label_names': CLASSES})]) == 0
    card = (tmp_path / 'hub' / 'README.md').read_text()
    assert '| 0 | 2.500 | 2.250 | 12.00 |\n| 1 | 2.000 | 1.750 | 34.00 |' in card
    pushed = timm_el.from_hub(tmp_path / 'hub').eval()
    assert torch.allclose(pushed(x), model(x)) and label_names(pushed) == list(CLASSES)
    assert pushed.pretrained_cfg['input_size'] == (3, 48, 48) and pushed.pretrained_cfg['tag'] == 'imagenette'


def test_a_folder_of_fit_is_evaluated_to_what_its_log_says_and_pushed(colours, tmp_path, capsys):
    run = tmp_path / 'run'
    config = FitConfig(
        model='resnet26', recipe='bireal', model_kwargs={'layers': [1, 1, 1, 1], 'channels': [8, 8, 16, 16]},
        num_classes=3, mean=[0.1, 0.2, 0.3], std=[0.4, 0.5, 0.6], pad_crop=4, batch_size=8, epochs=2)
    top1 = fit(config, str(run), str(colours))['top1']
    capsys.readouterr()
    found = evaluate(capsys, run, '--data-dir', colours)
    assert found['recorded'] == {'top1': top1} and found['size'] == [32, 32] and found['images'] == 15
    assert found['forms']['latent']['top1'] == found['forms']['packed']['top1'] == pytest.approx(top1)
    twin = dataclasses.replace(config, recipe='host', epochs=1)
    top1_of_twin = fit(twin, str(tmp_path / 'float'), str(colours))['top1']
    capsys.readouterr()
    forms = evaluate(capsys, tmp_path / 'float', '--data-dir', colours)['forms']
    assert list(forms) == ['latent'] and forms['latent']['top1'] == pytest.approx(top1_of_twin)
    argv = ['push', 'me/net', '--model', str(run), '--folder', str(tmp_path / 'hub'), '--dry-run']
    assert main([*argv, '--pretrained-cfg', json.dumps({'label_names': ['red', 'green', 'blue']})]) == 0
    card = (tmp_path / 'hub' / 'README.md').read_text()
    assert '`timm-el fit`: model resnet26, recipe bireal, model_kwargs' in card and f'{top1:.2f} |' in card
    pushed, x = timm_el.from_hub(tmp_path / 'hub').eval(), torch.randn(2, 3, 32, 32)
    assert torch.allclose(pushed(x), Net.parse(str(run)).build()(x)) and label_names(pushed)[1] == 'green'
    assert tuple(pushed.pretrained_cfg['mean']) == (0.1, 0.2, 0.3)


@pytest.mark.parametrize('argv, message', [
    (['el_resnet18', '--data-dir', '.'], 'No pretrained weights exist for el_resnet18'),
    (['el_resnet18@nowhere.pth', '--data-dir', '.'], "found no file 'nowhere.pth'"),
    ([MODEL, '--data-dir', 'nowhere'], "data-dir: found no folder 'nowhere'"),
])
def test_what_cannot_be_evaluated_is_named(argv, message, capsys):
    assert main(['eval', *argv]) == 2
    assert message in capsys.readouterr().err


@pytest.mark.parametrize('labels, folders, message', [
    (['tench', 'church'], ['n01440764', 'n03028079'], None),      # what ImageNet's synsets stand for
    (['Gas Pump', 'golf_ball'], ['gas_pump', 'golf ball'], None),
    (['tench', 'church'], ['0', '1'], None),                      # numbers say nothing
    ([], ['n02086240', 'n02087394'], None),                       # nor do weights without names
    (['tench', 'church'], ['n02086240', 'n02087394'], "found 'Shih-Tzu' for class 0 in .*, expected 'tench'"),
    (['tench', 'church'], ['airplane', 'tench'], "found 'airplane' for class 0 .* expected 'tench', as the weights"),
    (['tench', 'church'], ['n01440764', 'n99999999'], "found 'n99999999' for class 1 in .*, expected 'church'"),
])
def test_a_folder_of_other_classes_than_the_weights_name_is_refused(tmp_path, labels, folders, message):
    for name in folders:
        (tmp_path / name).mkdir()
        Image.new('RGB', (8, 8)).save(tmp_path / name / 'a.png')
    model = timm.create_model('el_resnet20', num_classes=2, pretrained_cfg_overlay={'label_names': labels})
    if message is None:
        assert len(verb.load_images(model, str(tmp_path))) == 1
        return
    with pytest.raises(ValueError, match=f'data-dir: {message}'):
        verb.load_images(model, str(tmp_path))


@pytest.mark.parametrize('options', [['--img-size', 32], ['--split', 'train'], ['--limit', 7]])
def test_a_top1_of_other_images_or_another_size_is_not_compared(options, colours, tmp_path, capsys):
    config = FitConfig(
        model='el_resnet18', model_kwargs=TINY, num_classes=3, input_size=[3, 48, 48], pad_crop=4, batch_size=8,
        epochs=1)
    fit(config, str(tmp_path / 'run'), str(colours))
    capsys.readouterr()
    argv = ['eval', str(tmp_path / 'run'), '--data-dir', str(colours), '--forms', 'latent']
    assert main(argv) == 0 and 'within' in capsys.readouterr().out
    assert main([*argv, *map(str, options)]) == 0
    text = capsys.readouterr().out
    assert 'not compared' in text and 'within' not in text


@pytest.mark.parametrize('workers', [0, 1])
def test_damaged_images_are_left_out_counted_and_named(workers, tmp_path, capsys):
    for name in ('n01440764', 'n03028079'):
        (tmp_path / 'validation' / name).mkdir(parents=True)
        for i in range(3):
            Image.new('RGB', (40, 40)).save(tmp_path / 'validation' / name / f'{i}.png')
    damaged = tmp_path / 'validation' / 'n01440764' / '1.png'
    damaged.write_bytes(damaged.read_bytes()[:60])
    model = timm.create_model('el_resnet20', num_classes=2)
    images = verb.load_images(model, str(tmp_path), workers=workers, batch_size=2)
    assert torch.cat([y for _, y in images]).tolist() == [0, 0, 1, 1, 1]
    assert images.damaged == ['n01440764/1.png']
    result = verb.count_right({'latent': model.eval()}, images)
    assert result['images'] == 5 and images.damaged == ['n01440764/1.png']  # as often as they are read
    run = {'net': 'net', 'size': [32, 32], 'limit': None, 'comparable': True, 'recorded': {}, 'impossible': {},
           'damaged': images.damaged, 'engine': {'body': 'avx2'}, 'machine': {'cpu': 'a processor', 'threads': 1},
           **result}
    assert 'left out 1 files that cannot be read: n01440764/1.png' in '\n'.join(show(run))
    with pytest.raises(ValueError, match='data-dir: found no image that can be read'):
        verb.count_right({'latent': model}, verb.Images([(str(damaged), 0)], 1, 0))


@pytest.mark.parametrize('folders, split, message', [
    (('train', 'test'), None, "found no folder 'validation' in .*, but test, train; expected one for each split"),
    (('train', 'validation'), 'tset', "found no folder 'tset' in .*, but train, validation"),
    (('train', 'val'), None, None), (('train', 'test'), 'test', None), ((), None, None)])
def test_images_of_another_split_are_never_taken_for_the_one_asked_for(folders, split, message, tmp_path):
    for folder in folders or ('.',):
        for name in ('0', '1'):
            (tmp_path / folder / name).mkdir(parents=True)
            Image.new('RGB', (8, 8)).save(tmp_path / folder / name / 'a.png')
    model = timm.create_model('el_resnet20', num_classes=2)
    if message is None:
        assert sum(len(y) for _, y in verb.load_images(model, str(tmp_path), split)) == 2
        return
    with pytest.raises(ValueError, match=f'data-dir: {message}'):
        verb.load_images(model, str(tmp_path), split)
    with pytest.raises(ValueError, match=f'data-dir: {message}'):
        open_folder(str(tmp_path), split or 'validation', 2)


def test_the_number_of_classes_is_read_from_weights_of_either_form(tmp_path):
    model = randomise(timm.create_model('el_resnet18', num_classes=7)).eval()
    for dtype in (torch.float16, torch.int8):
        timm_el.save_packed(model, tmp_path / 'net.safetensors', float_dtype=dtype)
        assert Net.parse(f'el_resnet18@{tmp_path / "net.safetensors"}').build().num_classes == 7


def test_a_run_on_other_classes_than_its_models_own_is_evaluated(colours, tmp_path, capsys):
    """el_resnet20 is made for CIFAR-10; its weights, once trained on other classes, say nothing of those."""
    config = FitConfig(model='el_resnet20', num_classes=3, batch_size=8, epochs=1, pad_crop=4)
    fit(config, str(tmp_path / 'run'), str(colours))
    assert not Net.parse(str(tmp_path / 'run')).build().pretrained_cfg.get('label_names')
    assert main(['eval', str(tmp_path / 'run'), '--data-dir', str(colours), '--forms', 'latent']) == 0


def test_other_classes_and_unknown_forms_are_refused(tmp_path, capsys):
    (tmp_path / 'one').mkdir()
    Image.new('RGB', (8, 8)).save(tmp_path / 'one' / 'a.png')
    assert main(['eval', MODEL, '--data-dir', str(tmp_path)]) == 2
    assert 'found 1 classes' in capsys.readouterr().err
    for option, message in ((['--forms', 'latent,fast'], "unknown form 'fast'"), (['--limit', '0'], "found '0'")):
        with pytest.raises(SystemExit):
            main(['eval', MODEL, '--data-dir', str(tmp_path), *option])
        assert message in capsys.readouterr().err


def test_a_folder_that_is_no_run_is_named(tmp_path, capsys):
    (tmp_path / 'args.yaml').write_text('model: el_resnet20\n')
    (tmp_path / 'last.pth.tar').write_bytes(b'')
    assert main(['eval', str(tmp_path), '--data-dir', str(tmp_path)]) == 2
    assert "found no 'num_classes' in args.yaml, expected a run" in capsys.readouterr().err
    (tmp_path / 'plain').mkdir()
    assert main(['eval', str(tmp_path / 'plain'), '--data-dir', str(tmp_path)]) == 2
    assert 'found no config.json, expected a folder that save_for_hub wrote' in capsys.readouterr().err
