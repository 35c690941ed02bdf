"""Images in memory: decoded once as timm prepares them, cut, scaled and mirrored as torchvision does it."""
import random
import shutil

import numpy as np
import pytest
import torch
from PIL import Image
from timm.data.transforms import RandomResizedCropAndInterpolation
from torchvision.transforms.functional import InterpolationMode, resized_crop

from timm_el.experiments.config import FitConfig
from timm_el.experiments.images import (
    create_images,
    cut_and_scale,
    decode,
    draw_boxes,
    open_folder,
    resampling,
    resized_crops,
)

pytestmark = pytest.mark.filterwarnings('ignore:unclosed file:ResourceWarning')
CPU = torch.device('cpu')
TINY = dict(model='el_resnet18', num_classes=3, batch_size=8)


@pytest.mark.parametrize('interpolation', ['bilinear', 'bicubic'])
@pytest.mark.parametrize('size', [(16, 16), (40, 24), (97, 97)], ids=str)
def test_a_box_is_cut_and_scaled_as_torchvision_does_it(interpolation, size):
    """Boxes at the edges, of one pixel, of the whole image; smaller and larger results; half of them mirrored."""
    boxes = [(0, 0, 48, 64), (0, 0, 1, 1), (47, 63, 1, 1), (5, 7, 16, 16), (20, 3, 28, 61), (0, 40, 48, 3)]
    images = torch.rand(len(boxes), 3, 48, 64, generator=torch.Generator().manual_seed(0)) * 255
    mirrored = torch.arange(len(boxes)) % 2 == 1
    found = cut_and_scale(images, torch.tensor(boxes).T, mirrored, size, interpolation)
    for image, box, mirror, result in zip(images, boxes, mirrored, found):
        expected = resized_crop(image, *box, list(size), InterpolationMode(interpolation), antialias=True).clamp(0, 255)
        assert torch.allclose(result, expected.flip(2) if mirror else expected, atol=2e-3)


def test_resampling_of_a_line_in_closed_form():
    """Pixels 1 and 2 of four become four: the outer ones keep their values, the inner ones lie at quarters."""
    (matrix,) = resampling(torch.tensor([1]), torch.tensor([2]), 4, 4, 'bilinear')
    assert torch.allclose(matrix, torch.tensor([[0, 1, 0, 0], [0, .75, .25, 0], [0, .25, .75, 0], [0, 0, 1, 0]]))
    (matrix,) = resampling(torch.tensor([0]), torch.tensor([4]), 4, 2, 'bilinear')  # the triangle is twice as wide
    assert torch.allclose(matrix, torch.tensor([[3, 3, 1, 0], [0, 1, 3, 3]]) / 7)


@pytest.mark.parametrize('height, width, scale, ratio', [
    (64, 64, (0.35, 1.0), (3 / 4, 4 / 3)),
    (48, 96, (0.08, 1.0), (3 / 4, 4 / 3)),
    (64, 64, (0.9, 1.0), (1.0, 1.0)),
    (20, 90, (0.8, 1.0), (0.5, 2.0)),  # most boxes do not fit: the largest one in the middle
])
def test_boxes_are_drawn_as_timm_draws_them(height, width, scale, ratio):
    n = 4000
    boxes = draw_boxes(n, height, width, scale, ratio, torch.Generator().manual_seed(0)).double()
    random.seed(0)
    image = Image.new('L', (width, height))
    of_timm = torch.tensor(
        [RandomResizedCropAndInterpolation.get_params(image, scale, ratio) for _ in range(n)]).T.double()
    top, left, h, w = boxes
    assert (top >= 0).all() and (left >= 0).all() and (top + h <= height).all() and (left + w <= width).all()
    for found, expected in zip([*boxes, h * w, w / h], [*of_timm, of_timm[2] * of_timm[3], of_timm[3] / of_timm[2]]):
        every = torch.cat([found, expected]).unique()
        gap = [torch.searchsorted(x.sort().values, every, right=True) / n for x in (found, expected)]
        assert (gap[0] - gap[1]).abs().max() < 1.95 * (2 / n) ** 0.5  # Kolmogorov and Smirnov, 0.1 %


def test_boxes_that_never_fit_are_the_largest_in_the_middle():
    generator = torch.Generator().manual_seed(0)
    wide = draw_boxes(3, 20, 90, (1.0, 1.0), (0.5, 2.0), generator)
    assert wide.T.tolist() == [[0, 25, 20, 40]] * 3
    assert draw_boxes(1, 90, 20, (1.0, 1.0), (0.5, 2.0), generator)[:, 0].tolist() == [25, 0, 40, 20]


def test_crops_depend_on_the_generator_alone_and_some_are_mirrored():
    images = (torch.arange(32) * 8).to(torch.uint8).expand(64, 3, 32, 32)  # rising from left to right
    args = dict(size=(16, 16), scale=(0.35, 1.0), ratio=(3 / 4, 4 / 3), interpolation='bilinear')
    first, again, other, never = (
        resized_crops(images, torch.Generator().manual_seed(seed), hflip=hflip, **args)
        for seed, hflip in ((0, 0.5), (0, 0.5), (1, 0.5), (0, 0.0)))
    assert torch.equal(first, again) and not torch.equal(first, other)
    falls = first[:, 0, 0, 0] > first[:, 0, 0, -1]
    assert 16 < falls.sum() < 48 and torch.equal(first[~falls], never[~falls])
    assert torch.allclose(first[falls], never[falls].flip(3), atol=1e-3)


@pytest.mark.parametrize('changes', [dict(input_size=[3, 24, 24]), dict(input_size=[3, 40, 40], crop_pct=0.8),
                                     dict(interpolation='bicubic', input_size=[3, 16, 16])], ids=str)
def test_validation_images_in_memory_are_those_of_timms_loader(colours, tmp_path, changes):
    files, memory = (
        create_images(FitConfig(**TINY, **changes, images=images), str(colours), str(tmp_path), 0, False, CPU)
        for images in ('files', 'memory'))
    assert len(files) == len(memory) == 2
    for (x, y), (u, v) in zip(files.epoch(0), memory.epoch(0)):
        assert torch.allclose(x, u, atol=1e-5) and torch.equal(y, v)


def test_training_images_are_kept_at_their_own_size_and_cut_to_the_inputs(colours, tmp_path):
    config = FitConfig(**TINY, images='memory', memory_size=32, input_size=[3, 16, 16], scale=[0.35, 1.0])
    images = create_images(config, str(colours), str(tmp_path), 2, True, CPU)
    assert images.images.shape == (36, 3, 32, 32) and images.images.dtype == torch.uint8 and len(images) == 4
    x, y = next(images.epoch(0))
    assert x.shape == (8, 3, 16, 16) and x.dtype == torch.float32
    means = (x * torch.tensor(config.std)[:, None, None] + torch.tensor(config.mean)[:, None, None]).mean((2, 3))
    assert torch.equal(means.argmax(1), 2 - y)  # labels in the order of the names: blue, green, red


def test_other_images_are_not_taken_out_of_the_cache(colours, tmp_path):
    kinds = [dict(size=16), dict(size=24), dict(size=16, interpolation='bicubic'), dict(size=16, crop_pct=0.5)]
    found = [decode(str(colours), 'train', cache=str(tmp_path), classes=3, **kind)[0] for kind in kinds]
    assert not any(torch.equal(found[0], other) for other in found[1:]) and len(list(tmp_path.glob('*.pt'))) == 4


@pytest.fixture
def damaged(tmp_path):
    """A folder of two classes; in one, half a JPEG, half a PNG, an empty file and a text by the name of an image."""
    noise = np.random.RandomState(0).randint(0, 255, (64, 64, 3), dtype=np.uint8)
    for split in ('train', 'validation'):
        for name in ('a', 'b'):
            (tmp_path / split / name).mkdir(parents=True)
            for i in range(2):
                Image.fromarray(noise).save(tmp_path / split / name / f'good{i}.webp')
        folder = tmp_path / split / 'a'
        for ending in ('jpg', 'png'):
            Image.fromarray(noise).save(folder / f'half.{ending}')
            data = (folder / f'half.{ending}').read_bytes()
            (folder / f'half.{ending}').write_bytes(data[:len(data) // 2])
        (folder / 'empty.png').touch()
        (folder / 'text.jpg').write_text('no image')
    return tmp_path


def test_damaged_images_are_left_out_counted_and_named(damaged, tmp_path):
    for _ in range(2):  # decoded, then from the cache
        message = 'left out 4 of 8 images of train.*empty.png.*half.jpg.*half.png.*text.jpg'
        with pytest.warns(UserWarning, match=message):
            images, labels = decode(str(damaged), 'train', 32, str(tmp_path / 'cache'), classes=2)
        assert images.shape == (4, 3, 32, 32) and labels.tolist() == [0, 0, 1, 1]
    assert (images.float().std((1, 2, 3)) > 10).all()
    for file in damaged.glob('train/*/good*'):
        file.unlink()
        file.with_suffix('.jpg').touch()
    with pytest.raises(ValueError, match='found no image that can be read in train'):
        decode(str(damaged), 'train', 32, str(tmp_path / 'other'), classes=2)
    assert not (tmp_path / 'other').exists()


@pytest.mark.parametrize('images', ['files', 'memory'])
def test_a_folder_of_other_classes_is_refused_before_anything_is_decoded(colours, tmp_path, images):
    config = FitConfig(**{**TINY, 'num_classes': 4}, images=images)
    for training in (True, False):
        with pytest.raises(ValueError, match='data-dir: found 3 classes in train of .*, expected the 4 of num_classes'):
            create_images(config, str(colours), str(tmp_path), 0, training, CPU)
    with pytest.raises(ValueError, match="data-dir: found no folder 'nowhere'"):
        create_images(config, 'nowhere', str(tmp_path), 0, True, CPU)
    assert not list(tmp_path.glob('*.pt'))


@pytest.mark.parametrize('changes, message', [
    (dict(images='disk'), "images: found 'disk', expected 'files' or 'memory'"),
    (dict(images='files', pad_crop=4), 'pad_crop: found 4 with images: files'),
    (dict(memory_size=40), 'memory_size: found 40, expected images: memory'),
    (dict(pad_crop=4, memory_size=40), 'memory_size: found 40 with pad_crop'),
    (dict(images='memory', color_jitter=0.4), 'color_jitter: found 0.4 with images in memory, expected 0'),
    (dict(images='memory', interpolation='random'), "interpolation: found 'random'.*'bilinear' or 'bicubic'"),
    (dict(images='memory', input_size=[3, 32, 24]), r'input_size: found \[3, 32, 24\].*equal height and width'),
    (dict(share=0.0), 'share: found 0.0, expected a positive number'),
])
def test_images_that_make_no_sense_are_refused_by_name(changes, message):
    with pytest.raises(ValueError, match=message):
        FitConfig(**changes)


def test_classes_of_validation_are_numbered_as_those_of_training(colours, tmp_path):
    """A class without an image to validate takes no number away from the others."""
    folder = tmp_path / 'data'
    shutil.copytree(colours, folder)
    first, *others = sorted((folder / 'validation').iterdir())
    shutil.rmtree(first)
    data = open_folder(str(folder), 'validation', 1 + len(others))
    assert {label for _, label in data.reader.samples} == set(range(1, 1 + len(others)))
    others[0].rename(folder / 'validation' / 'another')
    with pytest.raises(ValueError, match="found class 'another' in validation of .*, expected those of train"):
        open_folder(str(folder), 'validation', 1 + len(others))


def test_decoded_images_are_those_of_the_folder_as_it_is_now(colours, tmp_path):
    """Other files, in a folder of the same name, are decoded anew: names, sizes and labels of the files say so."""
    cache, old, new = tmp_path / 'cache', tmp_path / 'a' / 'images', tmp_path / 'b' / 'images'
    for folder in (old, new):
        shutil.copytree(colours, folder)
    size = dict(size=32, cache=str(cache), classes=3)
    before = decode(str(old), 'validation', **size)[0]
    Image.new('RGB', (32, 32)).save(new / 'validation' / 'red' / '0.png')
    after = decode(str(new), 'validation', **size)[0]
    changed = (before != after).flatten(1).any(1)
    assert changed.sum() == 1 and torch.equal(decode(str(old), 'validation', **size)[0], before)
    (new / 'validation' / 'red' / '0.png').unlink()
    assert len(decode(str(new), 'validation', **size)[0]) == len(before) - 1
    assert all(path.suffix == '.pt' for path in cache.iterdir())
