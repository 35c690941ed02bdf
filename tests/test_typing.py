"""Types of the public names, as a user's type checker sees them."""
import ast
import importlib
import inspect
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from types import ModuleType

import pytest
import typed_user

import timm_el

ROOT = Path(__file__).resolve().parent.parent
PUBLIC = ('timm_el', 'timm_el.engine', 'timm_el.layers', 'timm_el.training')


def test_a_users_program_passes_a_strict_checker():
    """Its mistakes are marked as such, and a mark where the checker sees nothing fails too."""
    result = subprocess.run([sys.executable, '-m', 'mypy'], cwd=ROOT, capture_output=True, text=True)
    assert result.returncode == 0, result.stdout + result.stderr


def test_the_types_that_the_program_states_are_those_at_run_time(tmp_path):
    typed_user.main(tmp_path)


@pytest.mark.parametrize('module', PUBLIC)
def test_the_program_uses_every_public_name(module):
    alias = module.rpartition('.')[2]
    used = {node.attr for node in ast.walk(ast.parse(Path(typed_user.__file__).read_text()))
            if isinstance(node, ast.Attribute) and isinstance(node.value, ast.Name) and node.value.id == alias}
    imported = {'engine'} if module == 'timm_el' else set()
    assert set(importlib.import_module(module).__all__) <= used | imported


def test_the_package_says_that_it_is_typed():
    assert (Path(timm_el.__file__).parent / 'py.typed').is_file()


def functions(module: ModuleType) -> Iterator[tuple[str, Callable]]:
    """Public functions of a module, and public methods that its classes have from this package, by name."""
    for name in module.__all__:
        thing = getattr(module, name)
        if inspect.isfunction(thing):
            yield name, thing
        for owner in inspect.getmro(thing) if inspect.isclass(thing) else ():
            for key, value in vars(owner).items() if owner.__module__.startswith('timm_el.') else ():
                value = value.fget if isinstance(value, property) else getattr(value, '__func__', value)
                is_own = inspect.isfunction(value) and value.__module__.startswith('timm_el.')  # a dataclass has others
                if is_own and (key in ('__init__', '__call__') or not key.startswith('_')):
                    yield f'{name}.{key}', value


@pytest.mark.parametrize('module', [*PUBLIC, 'timm_el.models.resnet', 'timm_el.models.efficientnet',
                                    'timm_el.models.reactnet', 'timm_el.models.converted'])
def test_public_signatures_are_annotated(module):
    found = list(functions(importlib.import_module(module)))
    assert found
    for name, function in found:
        signature = inspect.signature(function)
        bare = [p.name for p in signature.parameters.values()
                if p.annotation is p.empty and p.name not in ('self', 'cls')]
        assert bare == [] and signature.return_annotation is not signature.empty, f'{module}.{name}: {bare}'
