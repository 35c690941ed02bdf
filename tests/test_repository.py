"""Rules of the house: style, one-way imports, a cheap and quiet import, names that stay."""
import ast
import importlib
import inspect
import pathlib
import subprocess
import sys

import pytest

import timm_el

ROOT = pathlib.Path(__file__).resolve().parent.parent


def run(*command: str) -> subprocess.CompletedProcess:
    return subprocess.run(command, cwd=ROOT, capture_output=True, text=True)


def test_ruff():
    result = run(sys.executable, '-m', 'ruff', 'check', '.')
    assert result.returncode == 0, result.stdout


def test_imports_run_one_way():
    result = run(sys.executable, '-c', 'from importlinter.cli import lint_imports; raise SystemExit(lint_imports())')
    assert result.returncode == 0, result.stdout


def test_import_is_quiet_and_brings_nothing_heavy():
    """What `import timm_el` adds to `import timm` is its own modules: no output, no third package, no thread."""
    code = '''
import sys, threading, timm
before = set(sys.modules)
import timm_el
new = {m.partition('.')[0] for m in set(sys.modules) - before}
print(sorted(m for m in new if m not in sys.stdlib_module_names))
print(threading.active_count())
'''
    result = run(sys.executable, '-W', 'error', '-c', code)
    assert result.stdout.split('\n')[:2] == ["['timm_el']", '1'] and result.stderr == '', result


@pytest.mark.parametrize('name, place', [
    ('packed', 'weights.packed'), ('checkpoints', 'weights.loading'), ('bits', 'weights.bits'), ('shapes', 'dry_run')])
def test_modules_that_moved_say_where_they_are(name, place):
    with pytest.raises(ModuleNotFoundError, match=f'timm_el.{name} is timm_el.{place} now'):
        importlib.import_module(f'timm_el.{name}')
    with pytest.raises(AttributeError, match=f'timm_el.{name} is timm_el.{place} now'):
        getattr(timm_el, name)
    importlib.import_module(f'timm_el.{place}')


PUBLIC = {
    'timm_el': '__version__ binarize CheckpointError deploy engine export from_hub load_float load_packed '
               'load_program models pack_state_dict push_to_hub Recipe RECIPES save_for_hub save_packed summarize '
               'unpack_state_dict',
    'timm_el.engine': 'DeployedConv DeployedLinear DeployedPool DeployedUnit FusedUnit LinkUnit ProgramFile '
                      'SlowEngineWarning SplitUnit chip_rate count_rate deploy export info program_of read_program '
                      'runner use_isa',
    'timm_el.layers': 'BinaryConv2d BinaryLinear BinaryUnit ElasticLink HOST_ATTRIBUTES RPReLU RSign Shift '
                      'StandardizedBinaryConv2d ZeroShortcut check_own_tensors check_tensors check_unwrapped '
                      'expected_statistics guard_input input_scale input_sign_shares real_weights same_pads '
                      'weight_scale',
    'timm_el.training': 'DistillationTask JsonLines Telemetry attention_loss attention_map binary_layers '
                        'clip_latent_weights distributional_loss logit_loss residual_blocks',
}
SIGNATURES = {
    'binarize': "(model, recipe='el', *, keep=(), example_input=None, real_weights=False, strict=False, like=None)",
    'deploy': '(model, *, float_dtype=torch.float32, fuse_blocks=True)',
    'export': '(model, path, *, size=None)',
    'from_hub': '(repo, *, revision=None, cache_dir=None, **kwargs)',
    'load_float': '(model, checkpoint)',
    'load_packed': '(model, path, assign=False)',
    'save_packed': '(model, path, float_dtype=None)',
    'summarize': '(model, input_size=None)',
}


@pytest.mark.parametrize('module', PUBLIC)
def test_public_names_stay(module):
    found = importlib.import_module(module)
    assert sorted(found.__all__) == sorted(PUBLIC[module].split())
    assert all(hasattr(found, name) for name in found.__all__)


@pytest.mark.parametrize('name', SIGNATURES)
def test_public_signatures_stay(name):
    signature = inspect.signature(getattr(timm_el, name))
    bare = [p.replace(annotation=p.empty) for p in signature.parameters.values()]
    assert str(signature.replace(parameters=bare, return_annotation=signature.empty)) == SIGNATURES[name]


QUESTIONS = ('What', 'How', 'Where', 'Which', 'Who', 'Whether', 'It', 'They')
SOURCES = [*ROOT.glob('timm_el/**/*.py'), *ROOT.glob('build_tools/*.py'), ROOT / 'setup.py']


def unfit_docstrings(source: str) -> list[str]:
    """Return the first lines of docstrings that begin with a question or a pronoun, or a function's with an article.

    A property is a thing, not an action, and may be named.
    """
    found = []
    for node in ast.walk(ast.parse(source)):
        if not isinstance(node, (ast.Module, ast.ClassDef, ast.FunctionDef)) or not ast.get_docstring(node):
            continue
        first = ast.get_docstring(node).splitlines()[0]
        articles = ('The', 'A', 'An') if isinstance(node, ast.FunctionDef) else ()
        if first.split()[0] in (*QUESTIONS, *articles):
            found.append(first)
    return found


@pytest.mark.parametrize('path', [*SOURCES, ROOT / 'docs' / 'hooks.py'], ids=lambda path: str(path.relative_to(ROOT)))
def test_docstrings_name_a_thing_or_begin_with_a_command(path):
    assert unfit_docstrings(path.read_text(encoding='utf-8')) == []


def test_unfit_docstrings_are_found():
    source = '"""What this is."""\nclass A:\n    """The thing."""\n    def f(self):\n        """The result."""\n'
    assert unfit_docstrings(source) == ['What this is.', 'The result.']


# The same part of an interface in several modules: a shell verb, a picture, a model file of timm.
INTERFACES = {
    'main', 'HELP', 'add_arguments', 'draw', 'checkpoint_filter_fn', 'default_cfgs', '_cfg', '__all__', '__getattr__'}


def names_of(tree: ast.Module) -> set[str]:
    """Return the names that a module defines at its top level."""
    names = set()
    for node in tree.body:
        if isinstance(node, (ast.FunctionDef, ast.ClassDef)):
            names.add(node.name)
        elif isinstance(node, (ast.Assign, ast.AnnAssign)):
            targets = node.targets if isinstance(node, ast.Assign) else [node.target]
            names.update(n.id for target in targets for n in ast.walk(target) if isinstance(n, ast.Name))
    return names


def test_a_name_means_one_thing():
    places: dict[str, list[str]] = {}
    for path in SOURCES:
        if 'engine' in path.parts:  # its tables of kinds have a function of the same name for each kind
            continue
        for name in names_of(ast.parse(path.read_text(encoding='utf-8'))) - INTERFACES:
            places.setdefault(name, []).append(str(path.relative_to(ROOT)))
    assert {name: found for name, found in places.items() if len(found) > 1} == {}
