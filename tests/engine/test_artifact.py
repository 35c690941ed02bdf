"""Program files: the bits that were written come back, and a damaged file is refused in words, never run."""
import json
import re
import struct
import zlib
from pathlib import Path

import numpy as np
import pytest
import timm
import torch
import torch.nn as nn
from conftest import EACH_MODEL, randomise
from every_step import every_step, image

import timm_el
from timm_el import engine
from timm_el.engine import table
from timm_el.engine.artifact import read_program, write_program
from timm_el.engine.program import Output, Program
from timm_el.engine.steps import Kind, Step, Unary
from timm_el.engine.structure import filled, plain

METADATA = {'name': 'every step', 'labels': None, 'outputs': {'tuple': [0, 1]}}


@pytest.fixture(autouse=True)
def _restore():
    yield
    engine.use_isa(None)


@pytest.fixture(scope='module')
def file(tmp_path_factory):
    path = tmp_path_factory.mktemp('program') / 'every.program'
    write_program(every_step(), path, METADATA)
    return path


@pytest.fixture(scope='module')
def net():
    return timm_el.deploy(randomise(timm.create_model('el_resnet18', num_classes=10)).eval())


# ---------------------------------------------------------------------------------------------------------------------
# What was written comes back


@pytest.mark.parametrize('name', EACH_MODEL)
@torch.no_grad()
def test_a_file_gives_the_bits_of_the_deployed_network(name, tmp_path):
    model = timm_el.deploy(randomise(timm.create_model(name)).eval())
    size = timm_el.export(model, tmp_path / 'net.program', size=(64, 64))
    assert size == (tmp_path / 'net.program').stat().st_size
    program = timm_el.load_program(tmp_path / 'net.program')
    x = torch.randn(2, 3, 64, 64)
    assert torch.equal(program(x), model(x))
    assert np.array_equal(program(x.numpy()), model(x).numpy())
    assert program.metadata['name'] == name
    assert program.labels[3] == {10: 'cat', 1000: 'tiger shark, Galeocerdo cuvieri'}[model.num_classes]


@torch.no_grad()
def test_a_latent_network_is_deployed_for_the_file(tmp_path):
    model = randomise(timm.create_model('el_resnet18', num_classes=10)).eval()
    timm_el.export(model, tmp_path / 'net.program', size=(64, 64))
    x = torch.randn(1, 3, 96, 64)  # another size than that of the recording
    assert torch.equal(timm_el.load_program(tmp_path / 'net.program')(x), timm_el.deploy(model)(x))


@torch.no_grad()
def test_outputs_come_in_the_lists_and_dicts_of_the_network(tmp_path):
    model = timm_el.deploy(randomise(timm.create_model('el_resnet18', features_only=True)).eval())
    timm_el.export(model, tmp_path / 'net.program', size=(64, 64))
    x = torch.randn(1, 3, 64, 64)
    found, expected = timm_el.load_program(tmp_path / 'net.program')(x), model(x)
    assert type(found) is list and len(found) == len(expected) == 5
    assert all(torch.equal(a, b) for a, b in zip(found, expected))


@pytest.mark.parametrize('outputs', [0, [0], (1, 0, 1), {'a': [0, {'b': ()}], 'c': 1}])
def test_structures_survive_json(outputs):
    def put(structure):
        if isinstance(structure, dict):
            return {key: put(value) for key, value in structure.items()}
        return 'xy'[structure] if isinstance(structure, int) else type(structure)(map(put, structure))

    found = filled(json.loads(json.dumps(plain(outputs))), 'xy')
    assert found == put(outputs) and type(found) is type(put(outputs))


@pytest.mark.parametrize('outputs', [None, 'x', {1: 0}, torch.Size([1]), True])
def test_structures_that_json_cannot_hold_are_refused(outputs):
    with pytest.raises(ValueError, match=f'outputs: found {type(outputs).__name__}, expected tensors in lists'):
        plain([outputs])


@pytest.mark.parametrize('structure', [2, -1, {'list': [0], 'tuple': [1]}, {'set': [0]}, None, 'x'])
def test_structures_that_a_file_cannot_have_are_refused(structure):
    with pytest.raises(ValueError, match='outputs: found'):
        filled(structure, 'xy')


@pytest.mark.parametrize('body', [*engine.info()['available'], 'reference'])
def test_every_kind_of_step_survives_with_every_instruction_set(file, body):
    engine.use_isa('reference')
    expected = every_step().run([image()])
    engine.use_isa(body)
    found = read_program(file)(image())
    assert type(found) is tuple
    assert all(torch.equal(a.nan_to_num(7.), b.nan_to_num(7.)) for a, b in zip(found, expected))
    assert {step.kind for step in read_program(file).program.steps} == set(Kind)


def test_tensors_that_steps_share_are_written_once(tmp_path):
    shift = torch.ones(8)
    steps = [Step(Kind.AFFINE, (i,), (None, shift)) for i in range(3)]
    write_program(Program(steps, [Output(3)], [8]), tmp_path / 'a', {'outputs': 0})
    assert struct.unpack_from('<I', (tmp_path / 'a').read_bytes(), 32) == (1,)
    assert torch.equal(read_program(tmp_path / 'a')(image()), image() + 1 + 1 + 1)


def test_a_program_for_one_size_says_so(tmp_path):
    program = every_step()
    write_program(Program(program.steps, program.outputs, program.channels, (9, 9)), tmp_path / 'a', METADATA)
    read_program(tmp_path / 'a')(image())
    with pytest.raises(ValueError, match=r'a: found an input of shape \(2, 8, 9, 8\), expected \(N, 8, 9, 9\)'):
        read_program(tmp_path / 'a')(image()[..., :8])


@pytest.mark.parametrize('x, kind, message', [
    (torch.zeros(2, 8, 9, 9, dtype=torch.float16), TypeError, 'found an input of torch.float16, expected float32'),
    (np.zeros((2, 8, 9, 9)), TypeError, 'found an input of torch.float64, expected float32'),
    (torch.zeros(8, 9, 9), ValueError, r'shape \(8, 9, 9\), expected \(N, 8, H, W\)'),
    (torch.zeros(2, 3, 9, 9), ValueError, r'shape \(2, 3, 9, 9\), expected \(N, 8, H, W\)'),
    (torch.zeros(2, 8, 1, 1), ValueError, 'found 1 x 1 pixels, too few')])
def test_inputs_that_do_not_fit_are_named(file, x, kind, message):
    with pytest.raises(kind, match=message) as error:
        read_program(file)(x)
    assert str(file) in str(error.value)


def test_the_reader_of_the_documentation_lists_what_was_written(file, tmp_path):
    """The page is enough to read a file; its checks see damage."""
    page = (Path(__file__).parents[2] / 'docs' / 'program.md').read_text()
    code = next(block for block in re.findall(r'```python\n(.*?)```', page, re.DOTALL) if 'def read(' in block)
    namespace = {}
    exec(code.partition('\n\n\nfor ')[0], namespace)
    found, program = namespace['read'](file), every_step()
    tensors = table.Tensors(program.steps)
    assert found['metadata'] == METADATA and found['inputs'] == [(8, 0, 0)]
    assert found['outputs'] == [(out.value, out.form) for out in program.outputs]
    for (kind, sources, indices, ints, constants), step in zip(found['steps'], program.steps, strict=True):
        assert kind == step.kind.name.lower() and sources == [-1 if v is None else v for v in step.sources]
        assert [i for i in indices if i >= 0] == [tensors.index(t) for t in step.tensors if t is not None]
        assert ints == (*step.ints, *[0] * (30 - len(step.ints)))
        assert constants == pytest.approx((*step.constants, *[0.] * (4 - len(step.constants))))
    for (dtype, offset, size), tensor in zip(found['tensors'], tensors.all, strict=True):
        assert dtype == {torch.float32: 'float32', torch.uint8: 'bits', torch.int32: 'int32', torch.int8: 'int8'}[
            tensor.dtype]
        assert file.read_bytes()[offset:offset + size] == tensor.numpy().tobytes()
    with pytest.raises(AssertionError):
        namespace['read'](rewritten(file, tmp_path, put('<B', len(file.read_bytes()) - 1, 0)))


# ---------------------------------------------------------------------------------------------------------------------
# Writing is whole or not at all


def test_a_write_that_fails_leaves_the_old_file(file, tmp_path, monkeypatch):
    path = tmp_path / 'net.program'
    path.write_bytes(b'old')
    monkeypatch.setattr(type(path), 'replace', lambda *_: (_ for _ in ()).throw(OSError('disk full')))
    with pytest.raises(OSError, match='disk full'):
        write_program(every_step(), path, METADATA)
    assert path.read_bytes() == b'old' and list(tmp_path.iterdir()) == [path]


def test_a_network_that_is_refused_leaves_the_old_file(tmp_path):
    class Sorted(nn.Module):
        def forward(self, x):
            return x.flatten(1).sort().values

    path = tmp_path / 'net.program'
    path.write_bytes(b'old')
    model = randomise(timm.create_model('el_resnet18', num_classes=10)).eval()
    model.fc = Sorted().eval()
    with pytest.raises(ValueError, match='fc.* own forward'):
        timm_el.export(model, path, size=(64, 64))
    assert path.read_bytes() == b'old' and list(tmp_path.iterdir()) == [path]


# ---------------------------------------------------------------------------------------------------------------------
# Damage


def rewritten(file, tmp_path, change, mend=True):
    """Return the path of a file whose table `change` altered; `mend` gives it its checksum."""
    data = bytearray(file.read_bytes())
    change(data)
    size, = struct.unpack_from('<I', data, 12)
    if mend and 96 <= size <= len(data):
        data[:size] = table.with_crc(bytes(data[:size]))
    path = tmp_path / 'bad.program'
    path.write_bytes(data)
    return path


def put(fmt, offset, value):
    return lambda data: struct.pack_into(fmt, data, offset, value)


HEADER = {
    'version': (8, '<I'), 'table_bytes': (12, '<I'), 'n_inputs': (16, '<I'), 'n_outputs': (20, '<I'),
    'n_steps': (24, '<I'), 'n_wires': (28, '<I'), 'n_tensors': (32, '<I'), 'meta_offset': (40, '<Q'),
    'meta_bytes': (48, '<Q'), 'file_bytes': (56, '<Q'), 'meta_crc': (64, '<I')}


@pytest.mark.parametrize('body', [None, 'reference'])
@pytest.mark.parametrize('value', [0, 1 << 31, 'more', 'less'])
@pytest.mark.parametrize('field', HEADER)
def test_each_field_of_the_header_is_checked(file, tmp_path, field, value, body):
    """With a checksum that fits, as a faulty writer would leave it."""
    engine.use_isa(body)
    offset, fmt = HEADER[field]
    old, = struct.unpack_from(fmt, file.read_bytes(), offset)
    new = {'more': old + 1, 'less': old - 1}.get(value, value)
    path = rewritten(file, tmp_path, put(fmt, offset, new))
    with pytest.raises(ValueError) as error:
        read_program(path)
    assert str(error.value).startswith(f'{path}: ')


@pytest.mark.parametrize('change, message', [
    (put('<8s', 0, b'PK\3\4abcd'), r"found b'PK.*expected b'timm_el.x01': it is no program file"),
    (put('<I', 8, 2), 'found version 2, expected 1 at most; update timm_el'),
    (put('<I', 200, 12345), r'checksum of its table is \w{8}, expected \w{8}; the file is damaged, fetch it again')])
def test_what_is_found_is_said(file, tmp_path, change, message):
    with pytest.raises(ValueError, match=message):
        read_program(rewritten(file, tmp_path, change, mend=False))


@pytest.mark.parametrize('keep', [0, 1, 95, 96, 1000, -1000, -1])
def test_a_file_that_is_cut_short_is_refused(file, tmp_path, keep):
    path = tmp_path / 'short.program'
    path.write_bytes(file.read_bytes()[:keep])
    with pytest.raises(ValueError, match='short.program: found .* bytes, expected'):
        read_program(path)


def test_what_is_no_file_is_named(tmp_path):
    with pytest.raises(FileNotFoundError, match='nowhere.program'):
        read_program(tmp_path / 'nowhere.program')


def test_each_bit_of_the_metadata_counts(file, tmp_path):
    offset, = struct.unpack_from('<Q', file.read_bytes(), 40)
    with pytest.raises(ValueError, match='the checksum of its metadata is'):
        read_program(rewritten(file, tmp_path, put('<B', offset + 3, 0)))


@pytest.mark.parametrize('metadata', [{}, {'outputs': 2}, {'outputs': 'x'}])
def test_metadata_that_does_not_fit_the_outputs_is_refused(tmp_path, metadata):
    write_program(every_step(), tmp_path / 'a', metadata)
    with pytest.raises(ValueError, match='a: its table or metadata is no program of version 1: outputs: found'):
        read_program(tmp_path / 'a')


def test_metadata_that_is_nested_without_end_is_refused(tmp_path):
    write_program(every_step(), tmp_path / 'a', METADATA | {'name': 'x' * 200_000})
    at, size = struct.unpack_from('<QQ', (tmp_path / 'a').read_bytes(), HEADER['meta_offset'][0])

    def nest(data):
        data[at:at + size] = b'[' * size
        put('<I', HEADER['meta_crc'][0], zlib.crc32(b'[' * size))(data)

    with pytest.raises(ValueError, match='its metadata is no JSON object'):
        read_program(rewritten(tmp_path / 'a', tmp_path, nest))


@pytest.mark.parametrize('body', [None, 'reference'])
def test_a_program_of_two_inputs_is_no_file_of_a_network(tmp_path, body):
    engine.use_isa(body)
    step = Step(Kind.UNARY, (1,), (), (int(Unary.ABS),), (0., 0.))
    write_program(Program([step], [Output(2)], [8, 8]), tmp_path / 'two.program', {'outputs': 0})
    with pytest.raises(ValueError, match='two.program: .*found 2 inputs, expected one'):
        read_program(tmp_path / 'two.program')
    with pytest.raises(ValueError, match='inputs: found 1, expected 2'):
        Program([step], [Output(2)], [8, 8]).run([torch.ones(1, 8, 2, 2)])


@pytest.mark.parametrize('body', [None, 'reference'])
def test_a_damaged_tensor_is_found_at_the_first_call_and_again(file, tmp_path, body):
    engine.use_isa(body)
    program = read_program(rewritten(file, tmp_path, put('<B', len(file.read_bytes()) - 1, 0)))
    for _ in range(2):
        with pytest.raises(ValueError, match=r'checksum of tensor \d+ is \w+, expected \w+; the file is damaged'):
            program(image())


@pytest.mark.parametrize('body', [None, 'reference'])
def test_no_number_in_the_table_does_more_than_raise_a_value_error(file, tmp_path, body):
    """Each number in turn, under a checksum that fits: the file is opened or refused."""
    engine.use_isa(body)
    size, = struct.unpack_from('<I', file.read_bytes(), 12)
    refused = 0
    for i, offset in enumerate(range(96, size, 20)):
        path = rewritten(file, tmp_path, put('<i', offset, (-2, 5, 1 << 20)[i % 3]))
        try:
            read_program(path)
        except ValueError as e:
            assert str(e).startswith(f'{path}: '), e
            refused += 1
    assert refused > size / 20 / 10


@pytest.mark.parametrize('kind', [14, -1, 1 << 30])
@pytest.mark.parametrize('body', [None, 'reference'])
def test_a_kind_of_step_that_is_unknown_is_named(file, tmp_path, kind, body):
    engine.use_isa(body)
    with pytest.raises(ValueError, match=f'bad.program: .*step 0.* kind (is )?{kind}, expected'):
        read_program(rewritten(file, tmp_path, put('<i', 96 + 16 + 2 * 16, kind)))
