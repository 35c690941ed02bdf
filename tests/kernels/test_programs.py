"""Programs in C: random ones agree with an interpreter, faults are seen, damage does no harm, the runner prints."""
import functools
import re
import shutil
import subprocess
from collections.abc import Sequence
from pathlib import Path

import compiled
import numpy as np
import pytest
from compiled import FLAGS, KERNELS, SANITIZERS, needs_compiler, run

from timm_el import engine

pytestmark = needs_compiler
build = functools.partial(compiled.build, helpers=('net', 'naive', 'draws'))


def test_random_programs_agree_with_the_interpreter_on_every_instruction_set(tmp_path):
    out = run(build(tmp_path, 'programs'), '200', '7')
    assert ': 0 wrong' in out and ' '.join(engine.info()['available']) in out


def test_what_is_wrong_with_a_program_is_named(tmp_path):
    assert ': 0 wrong' in run(build(tmp_path, 'refusals'))


FAULTS = {  # file: what stands there, and what a slip would have made of it
    'steps.c': [
        ('case EL_SUB_FROM: EACH(b[i] - a[i])', 'case EL_SUB_FROM: EACH(a[i] - b[i])'),
        ('b += bs->w == 1 ? 0 : cb', 'b += cb'),
        ('x[i] >= 0.f ? x[i]', 'x[i] > 0.5f ? x[i]'),
        ('row - ints[2]', 'row'),
        ('x >= 0 && x < p->w)', 'x >= 0 && x < p->w - 1)'),
    ],
    'isa/unary.h': [('2. * e, y', '3. * e, y'), ('x > 20.', 'x > 1.'), ('1. / 24.', '1. / 25.')],
    'over_images.c': [
        ('half = 4; half', 'half = 2; half'), ('double sums[BLOCK]', 'float sums[BLOCK]')],
    'ready.c': [
        ('until[v->node] == number', 'until[v->node] >= number - number'),
        ('blocks[i].until >= group', 'blocks[i].until > group'),
        ('last_use[i] >= end', 'last_use[i] > end'),
        ('more.after > r->after', 'more.after < r->after'),
    ],
    'run.c': [('v->shape.n == 1 ? 0', 'v->shape.n >= 1 ? 0'), ('from != outputs[i]', 'from == outputs[i]')],
    'shapes.c': [('total / 2', '(total + 1) / 2'), ('if (ceil && (*out - 1)', 'if (0 && (*out - 1)')],
    'int8.c': [('y >= 0 && y < p->h', 'y > 0 && y < p->h'), ('i % runs * w->dw', 'i % runs')],
    'check.c': [('channel == last->from + last->count', 'channel >= last->from + last->count')],
}


@pytest.mark.slow
@pytest.mark.parametrize('file, right, wrong', [(f, *pair) for f, pairs in FAULTS.items() for pair in pairs])
def test_the_random_programs_see_a_fault(tmp_path, file, right, wrong):
    kernels = tmp_path / 'kernels'
    shutil.copytree(KERNELS, kernels)
    text = (kernels / file).read_text()
    assert text.count(right) == 1
    (kernels / file).write_text(text.replace(right, wrong))
    program = build(tmp_path, 'programs', '-O1', kernels=kernels)
    assert subprocess.run([program, '300', '3'], capture_output=True).returncode != 0


@pytest.mark.slow
@pytest.mark.parametrize('kind', ['address,undefined', 'thread'])
def test_sanitizers_find_nothing_in_random_programs(tmp_path, kind):
    program = build(tmp_path, 'programs', *SANITIZERS, f'-fsanitize={kind}')
    assert ': 0 wrong' in run(program, '300' if kind != 'thread' else '60', '11')


def damage(folder: Path, variants: int, seeds: Sequence[int]) -> None:
    """Assert that damaged variants of the file of each seed, `variants` in all, open with an error or run."""
    write = build(folder, 'write')
    program = build(folder, 'damage', *SANITIZERS, '-fsanitize=address,undefined')
    for seed in seeds:
        run(write, str(folder), str(seed))
        out = run(program, str(folder / 'net.program'), str(variants // len(seeds)), str(seed))
        opened, ready, ran, silent = map(int, re.findall(r' (\d+) ', out.split(',', 1)[1].replace(',', ' , ')))
        assert opened >= ready >= ran > variants // len(seeds) // 10 and silent == 0, out


def test_damaged_files_do_no_harm(tmp_path):
    damage(tmp_path, 500, [3, 4])


@pytest.mark.slow
def test_a_hundred_thousand_damaged_files_do_no_harm(tmp_path):
    damage(tmp_path, 100_000, range(3, 43))


# ---------------------------------------------------------------------------------------------------------------------


@pytest.fixture(scope='module')
def written(tmp_path_factory) -> Path:
    """Return a folder with net.program, image.npy and expected.txt."""
    folder = tmp_path_factory.mktemp('written')
    run(build(folder, 'write'), str(folder), '5')
    return folder


def runner(folder: Path, *arguments: str) -> str:
    return run(str(engine.runner()), *arguments, str(folder / 'net.program'), str(folder / 'image.npy'))


def test_the_runner_prints_what_the_interpreter_computes(written):
    assert runner(written) == (written / 'expected.txt').read_text()


def test_the_runner_takes_an_image_without_a_batch(written):
    image = np.load(written / 'image.npy')
    np.save(written / 'single.npy', image[0])
    out = run(str(engine.runner()), str(written / 'net.program'), str(written / 'single.npy'))
    assert out == (written / 'expected.txt').read_text()


def test_the_runner_names_the_likeliest_labels(written):
    logits = np.array((written / 'expected.txt').read_text().split(), dtype=np.float64)
    chances = np.exp(logits - logits.max()) / np.exp(logits - logits.max()).sum()
    best = int(chances.argmax())
    label = ('first', 'sécond [2], {', 'third 😀', *map(str, range(3, logits.size)))[best]
    first = runner(written, '--top', '2').splitlines()[0]
    assert first.startswith(label) and first.endswith(f'{chances[best]:.4f}')


def test_the_runner_times_itself_and_checks_the_file(written):
    out = runner(written, '--bench', '5', '--threads', '2')
    assert re.search(r'median [\d.]+ ms, min [\d.]+ ms of 5 runs, 2 threads', out)
    assert 'checksums right' in run(str(engine.runner()), '--verify', str(written / 'net.program'))


def refused(*arguments: str) -> str:
    result = subprocess.run([str(engine.runner()), *arguments], capture_output=True, text=True)
    assert result.returncode == 1
    return result.stderr


def test_the_runner_names_the_file_and_what_it_expected(written, tmp_path):
    net, image = str(written / 'net.program'), str(written / 'image.npy')
    whole = Path(net).read_bytes()
    bad = tmp_path / 'bad.program'
    bad.write_bytes(whole[:-64])
    assert f'bad.program: found a file of {len(whole) - 64} bytes, expected {len(whole)}' in refused(str(bad), image)
    at = len(whole.rstrip(b'\0')) - 1  # behind it is what fills up the file
    bad.write_bytes(whole[:at] + bytes([whole[at] ^ 1]) + whole[at + 1:])
    assert 'checksum' in refused('--verify', str(bad))
    np.save(tmp_path / 'doubles.npy', np.load(image).astype('f8'))
    assert "doubles.npy: found the type '<f8'" in refused(net, str(tmp_path / 'doubles.npy'))
    np.save(tmp_path / 'wide.npy', np.zeros((1, 3, 4, 5), 'f4'))
    assert 'wide.npy: input 0 has 4 x 5 pixels of 3 channels, expected' in refused(net, str(tmp_path / 'wide.npy'))
    np.save(tmp_path / 'bytes.npy', np.zeros((4, 5, 3), 'u1'))
    assert 'does not say how a picture becomes numbers' in refused(net, str(tmp_path / 'bytes.npy'))
    hollow = (b"{'descr': '<f4', 'fortran_order': False, 'shape': (0, 2147483648, 2147483648), }".ljust(117) + b'\n')
    (tmp_path / 'hollow.npy').write_bytes(b'\x93NUMPY\x01\x00' + len(hollow).to_bytes(2, 'little') + hollow)
    assert 'hollow.npy: ' in refused(net, str(tmp_path / 'hollow.npy'))
    assert 'absent.npy: the file cannot be read' in refused(net, str(tmp_path / 'absent.npy'))
    assert '--top: found x, expected a number' in refused('--top', 'x', net, image)


def test_the_runner_is_small():
    assert engine.runner().stat().st_size < 400_000


@pytest.mark.slow
@pytest.mark.skipif(
    not (shutil.which('aarch64-linux-gnu-gcc') and shutil.which('qemu-aarch64')),
    reason='needs Debian\'s gcc-aarch64-linux-gnu, libc6-dev-arm64-cross and qemu-user')
def test_the_runner_and_random_programs_are_right_under_an_emulator(written, tmp_path):
    compiler = ['aarch64-linux-gnu-gcc', '-static']
    out = run('qemu-aarch64', build(tmp_path, 'programs', compiler=compiler), '100', '3')
    assert 'instruction sets neondot neon portable: 0 wrong' in out
    program = str(tmp_path / 'timm-el-run')
    sources = [*sorted(KERNELS.rglob('*.c')), *sorted((KERNELS.parent / 'runner').glob('*.c'))]
    files = [str(path) for path in sources if path.name != 'driver.c']
    subprocess.run([*compiler, *FLAGS, f'-I{KERNELS}', '-o', program, *files, '-lm', '-ldl'], check=True)
    out = run('qemu-aarch64', program, str(written / 'net.program'), str(written / 'image.npy'))
    assert out == (written / 'expected.txt').read_text()
