"""The documentation: code blocks run, commands parse, links and names exist, and the site builds."""
import importlib
import importlib.util
import inspect
import os
import re
import shlex
import socket
import subprocess
import sys
from pathlib import Path
from types import ModuleType

import pytest
import torch

import timm_el
import timm_el.recipes
import timm_el.training

ROOT = Path(__file__).resolve().parent.parent
DOCS = sorted((ROOT / 'docs').glob('*.md'))
PAGES = [ROOT / 'README.md', *DOCS, ROOT / 'train_cfgs' / 'README.md']
BLOCK = re.compile(r'^( *)```(\w*)\n(.*?)^\1```$', re.MULTILINE | re.DOTALL)


def load_hooks() -> ModuleType:
    """Import docs/hooks.py, which is in no package."""
    spec = importlib.util.spec_from_file_location('docs_hooks', ROOT / 'docs' / 'hooks.py')
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


hooks = load_hooks()


def name_of(page: Path) -> str:
    return page.relative_to(ROOT).as_posix()


def blocks(page: Path, *languages: str) -> list[str]:
    """Return the code blocks of a page in some languages, each after as many empty lines as stand before it there."""
    text = page.read_text()
    return ['\n' * (text.count('\n', 0, found.start()) + 1) + found[3] for found in BLOCK.finditer(text)
            if found[2] in languages]


def prose(page: Path) -> str:
    return BLOCK.sub('', page.read_text())


def test_readme_is_short():
    assert len((ROOT / 'README.md').read_text().splitlines()) <= 150


# ---------------------------------------------------------------------------------------------------------------------
# Python


@pytest.fixture
def alone(tmp_path, monkeypatch):
    """An empty folder, no network, and the engine as it was afterwards."""
    def refuse(*args):
        raise OSError('the documentation needs no network')

    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(socket.socket, 'connect', refuse)
    torch.manual_seed(0)
    yield
    timm_el.engine.use_isa(os.environ.get('TIMM_EL_ISA') or None)


@pytest.mark.parametrize('page', [page for page in PAGES if blocks(page, 'python')], ids=name_of)
def test_python_blocks_run(page, alone):
    namespace = {'__name__': 'documentation'}
    for block in blocks(page, 'python'):
        exec(compile(block, str(page), 'exec'), namespace)


def test_python_blocks_that_are_shown_only_compile():
    for page in PAGES:
        for block in blocks(page, 'py'):
            compile(block, str(page), 'exec')


@pytest.mark.parametrize('page', DOCS, ids=name_of)
def test_a_page_starts_with_its_purpose_and_something_to_run(page):
    title, purpose, first, *_ = re.split(r'\n\n(?=\S)', page.read_text(), maxsplit=3)
    assert title.startswith('# ') and not purpose.startswith(('#', '```', '|'))
    assert first.startswith(('```python\n', '```sh\n'))


# ---------------------------------------------------------------------------------------------------------------------
# Commands


def commands(page: Path) -> list[list[str]]:
    """Return the words behind `timm-el`, or `-m timm_el`, in each command of a page's code blocks."""
    found = []
    for block in blocks(page, 'sh', ''):
        for line in block.replace('\\\n', ' ').splitlines():
            for part in line.split('&&'):
                words = shlex.split(part, comments=True)
                if 'timm-el' in words:
                    found.append(words[words.index('timm-el') + 1:])
                elif 'timm_el' in words and words[words.index('timm_el') - 1] == '-m':
                    found.append(words[words.index('timm_el') + 1:])
    return found


def spans(page: Path) -> list[list[str]]:
    """Return the words behind `timm-el` in the code spans of a page's prose."""
    return [span.split()[1:] for span in re.findall(r'`([^`]+)`', prose(page)) if re.match(r'timm-el [a-z]', span)]


def parser_of(words: list[str]):
    """Return what is left of the words, and the parser that is to read them, None if the verb has none."""
    verb, *rest = words
    assert verb in hooks.verbs(), f'no verb {verb!r}'
    parsers = hooks.parsers(verb)
    if rest and f'{verb} {rest[0]}' in parsers:
        return rest[1:], parsers[f'{verb} {rest[0]}']
    return rest, parsers.get(verb)


@pytest.mark.parametrize('page', [page for page in PAGES if commands(page) or spans(page)], ids=name_of)
def test_commands_name_verbs_and_options_that_exist(page, capsys):
    for words in filter(None, commands(page)):
        rest, parser = parser_of(words)
        try:
            parser is None or parser.parse_args(rest)
        except SystemExit:
            pytest.fail(f'timm-el {shlex.join(words)}: {capsys.readouterr().err.splitlines()[-1]}')
    for words in spans(page):
        rest, parser = parser_of(words)
        options = parser._option_string_actions if parser else ()
        unknown = {word for word in rest if word.startswith('--')} - set(options)
        assert not unknown, f'timm-el {" ".join(words)}: no options {unknown}'


def test_commands_are_found():
    assert ['demo'] in commands(ROOT / 'README.md')
    assert any(words[:1] == ['run'] for words in commands(ROOT / 'train_cfgs' / 'README.md'))
    assert ['fit'] in spans(ROOT / 'docs' / 'train.md')


def test_verbs_are_typed_as_timm_el():
    for page in PAGES:
        assert not re.search(r'python3? -m timm_el \w', page.read_text()), page


def test_an_unknown_option_is_seen(tmp_path, capsys):
    page = tmp_path / 'page.md'
    page.write_text('```sh\ntimm-el summary el_resnet18 --no-such-option\n```\n')
    with pytest.raises(pytest.fail.Exception, match='--no-such-option'):
        test_commands_name_verbs_and_options_that_exist(page, capsys)


@pytest.mark.parametrize('page', PAGES, ids=name_of)
def test_files_that_are_named_exist(page):
    """Those of train_cfgs/, but for placeholders in capitals."""
    for path in re.findall(r'\btrain_cfgs/[\w./]*\w', page.read_text()):
        assert re.search('[A-Z]{3}', path) or (ROOT / path).exists() or path.endswith('/README'), path


# ---------------------------------------------------------------------------------------------------------------------
# Links and names


@pytest.mark.parametrize('page', [*PAGES, ROOT / 'hub' / 'README.md'], ids=name_of)
def test_relative_links_resolve(page):
    """Links to sections are checked where the site is built."""
    for target in hooks.LINK.findall(prose(page)):
        assert (page.parent / target).exists(), target


def test_the_recipes_page_describes_every_recipe():
    text = (ROOT / 'docs' / 'recipes.md').read_text()
    missing = [name for name in timm_el.RECIPES if f'`{name}`' not in text]
    assert not missing and '<!-- generated: recipes -->' in text


def test_the_table_of_recipes_has_a_row_for_each():
    head, rule, *rows = hooks.expand('<!-- generated: recipes -->').splitlines()
    assert [row.split('`')[1] for row in rows] == list(timm_el.RECIPES)
    assert {row.count('|') for row in (head, rule, *rows)} == {head.count('|')}


def test_the_command_line_page_has_every_verb():
    text = hooks.expand((ROOT / 'docs' / 'cli.md').read_text())
    for verb in hooks.verbs():
        assert f'\n## {verb}\n' in text and f'usage: timm-el {verb}' in text
    assert '### plot gamma' in text and '<!--' not in text


def test_the_engine_page_names_every_instruction_set():
    text = (ROOT / 'docs' / 'engine.md').read_text()
    for name in (*timm_el.engine.info()['available'], 'reference'):
        assert f'| `{name}` |' in text, name


def documented() -> list[str]:
    return re.findall(r'^::: (\S+)$', (ROOT / 'docs' / 'reference.md').read_text(), re.MULTILINE)


def object_of(name: str) -> object:
    module, _, attribute = name.rpartition('.')
    return getattr(importlib.import_module(module), attribute)


def test_the_reference_names_what_exists_once():
    names = documented()
    assert len(set(names)) == len(names)
    for name in names:
        assert object_of(name) is not None


@pytest.mark.parametrize('module', ['', '.engine', '.layers', '.training', '.recipes'])
def test_the_reference_has_every_public_name(module):
    module = importlib.import_module(f'timm_el{module}')
    known = {id(object_of(name)) for name in documented()}
    public = {name: getattr(module, name) for name in module.__all__ if name != '__version__'}
    missing = [n for n, thing in public.items() if not isinstance(thing, ModuleType) and id(thing) not in known]
    assert not missing


def arguments_in(docstring: str) -> list[str]:
    """Return the names in the section Args of a docstring; an entry may name several."""
    section = re.search(r'^Args:\n((?:    .*\n?|\n)+)', inspect.cleandoc(docstring), re.MULTILINE)
    entries = re.findall(r'^    ([\w, ]+):', section[1], re.MULTILINE) if section else []
    return [name for entry in entries for name in entry.split(', ')]


def test_documented_arguments_are_those_of_the_signature():
    seen = 0
    for name in documented():
        thing = object_of(name)
        arguments = arguments_in(thing.__doc__) if callable(thing) else []
        assert not arguments or set(arguments) <= set(inspect.signature(thing).parameters), name
        seen += len(arguments)
    assert seen > 100


def test_the_readme_links_every_page():
    linked = set(hooks.LINK.findall((ROOT / 'README.md').read_text()))
    assert {name_of(page) for page in DOCS} <= {*linked, 'docs/index.md'}


def test_every_committed_picture_is_shown_below_its_command():
    text = ''.join((ROOT / 'docs' / page).read_text() for page in ('pictures.md', 'results.md'))
    files = sorted((ROOT / 'assets').iterdir())
    assert files
    for file in files:
        assert file.stat().st_size < 150_000
        name = f'assets/{re.escape(file.name)}'
        assert re.search(rf'timm-el plot \w+ .*--output {name}\n```\n\n!\[.+\]\(\.\./{name}\)', text), name


# ---------------------------------------------------------------------------------------------------------------------
# The site


def test_the_site_builds_without_warnings_and_network(tmp_path):
    pytest.importorskip('mkdocs')
    nowhere = dict.fromkeys(('http_proxy', 'https_proxy', 'HTTP_PROXY', 'HTTPS_PROXY'), 'http://localhost:9')
    built = subprocess.run(
        [sys.executable, '-m', 'mkdocs', 'build', '--strict', '--site-dir', str(tmp_path / 'site')], cwd=ROOT,
        capture_output=True, text=True, env={**os.environ, **nowhere, 'no_proxy': '', 'NO_MKDOCS_2_WARNING': '1'})
    assert built.returncode == 0, built.stdout + built.stderr
    pages = {path.relative_to(tmp_path / 'site').as_posix() for path in (tmp_path / 'site').rglob('*.html')}
    assert {'index.html', 'engine/index.html', 'train_cfgs/index.html'} <= pages
    reference = (tmp_path / 'site' / 'reference' / 'index.html').read_text()
    assert 'id="timm_el.binarize"' in reference and 'fonts.googleapis.com' not in reference
