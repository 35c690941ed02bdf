"""Parts of the site that follow from the code: the table of recipes and the help of each verb.

A page asks for a part with an HTML comment, `<!-- generated: recipes -->` or `<!-- generated: verbs -->`. Files of the
repository outside docs/ that a page links to (train_cfgs/README.md, pictures) become files of the site.
"""
import argparse
import contextlib
import io
import os
import posixpath
import re
from collections.abc import Callable, Iterator
from pathlib import Path
from unittest import mock

ROOT = Path(__file__).resolve().parent.parent
DOCS = 'docs'
LINK = re.compile(r'\]\((?!\w+:|#)([^)#\s]+)')


class _Parsed(BaseException):
    """Carries the parser of a verb out of the verb, before it does anything."""


def _capture(parser: argparse.ArgumentParser, *_) -> None:
    raise _Parsed(parser)


def _main(*words: str) -> str:
    """Return what `timm-el WORDS` prints."""
    from timm_el.__main__ import main
    with contextlib.redirect_stdout(io.StringIO()) as printed, contextlib.suppress(SystemExit):
        main(list(words))
    return printed.getvalue()


def verbs() -> dict[str, str]:
    """Return each verb of the command line and its line of help."""
    return dict(re.findall(r'^  ([a-z]\w*) +(\S.*)$', _main('--help'), re.MULTILINE))


def parsers(verb: str) -> dict[str, argparse.ArgumentParser]:
    """Return the parser of a verb and those of its sub-commands by what is typed, none for a verb without a parser."""
    with mock.patch.object(argparse.ArgumentParser, 'parse_known_args', _capture):
        try:
            _main(verb, '--help')
        except _Parsed as parsed:
            parser, = parsed.args
        else:
            return {}
    found = {verb: parser}
    for action in parser._actions:
        if isinstance(action, argparse._SubParsersAction):
            found.update((f'{verb} {name}', sub) for name, sub in action.choices.items())
    return found


def _helps(verb: str) -> dict[str, str]:
    """Return the help of a verb and of its sub-commands by what is typed."""
    helps = {}
    with mock.patch.dict(os.environ, COLUMNS='100', NO_COLOR='1'):
        for words, parser in parsers(verb).items():
            parser.prog = f'timm-el {words}'
            helps[words] = parser.format_help()
    return helps or {verb: _main(verb, '--help')}


def verbs_section() -> str:
    """Return a section for each verb, and for each sub-command: its line and its help."""
    lines = []
    for verb, line in verbs().items():
        lines += [f'## {verb}', '', f'{line[0].upper()}{line[1:]}.', '']
        for words, text in _helps(verb).items():
            lines += [f'### {words}', ''] * (words != verb)
            lines += ['```text', text.strip().replace('python -m timm_el', 'timm-el'), '```', '']
    return '\n'.join(lines)


def _roles(roles: tuple[str, ...]) -> str:
    from timm_el.recipes import ROLES
    return 'all' if set(roles) == set(ROLES) else ', '.join(roles) or '-'


def recipes_section() -> str:
    """Return the table of `timm_el.RECIPES`, one row each."""
    from timm_el import RECIPES
    head = ('recipe', 'inputs', 'weights', 'alpha', 'K on', 'links on', 'gamma', 'before the sign', 'activations',
            'output scale', 'float', 'left out', 'host shortcut', 'the paper, top-1')
    lines = [f'| {" | ".join(head)} |', f'|{"---|" * len(head)}']
    for name, r in RECIPES.items():
        inputs, weights = r.input_quantizer or 'real', r.weight_quantizer or 'real'
        alpha = '-' if not r.scale_weight or weights not in ('ste', 'approx') else 'yes'
        if r.bases:
            weights, inputs = (f'{n} {"basis" if n == 1 else "bases"}' for n in r.bases)
        cells = (
            f'`{name}`', inputs, weights, 'with gradient' if alpha == 'yes' and r.scale_weight_grad else alpha,
            _roles(r.scale_input), _roles(r.link) if r.elastic else f'{_roles(r.link)} (identity only)',
            r.gamma if r.link and r.elastic else '-', r.pre or '-', r.act, r.scale_output or '-', _roles(r.real),
            _roles(r.omit), 'yes' if r.residual else 'no', '' if r.paper_top1 is None else f'{r.paper_top1}')
        lines.append(f'| {" | ".join(cells)} |')
    return '\n'.join(lines)


PARTS: dict[str, Callable[[], str]] = {'recipes': recipes_section, 'verbs': verbs_section}


def expand(markdown: str) -> str:
    """Return a page with its generated parts filled in."""
    return re.sub(r'<!-- generated: (\w+) -->', lambda found: PARTS[found[1]](), markdown)


# ---------------------------------------------------------------------------------------------------------------------
# Files outside docs/


def linked_files(page: Path) -> Iterator[str]:
    """Yield the files that a page links to, as paths from the root of the repository."""
    folder = page.parent.relative_to(ROOT).as_posix()
    for target in LINK.findall(page.read_text(encoding='utf-8')):
        yield posixpath.normpath(posixpath.join(folder, target))


def _place(path: str) -> str:
    """Return where a file of the repository is in the site's sources."""
    return posixpath.relpath(path, DOCS) if path.startswith(f'{DOCS}/') else path


def on_files(files, config):
    """Add the files outside docs/ that pages link to."""
    from mkdocs.structure.files import File
    outside = {path for page in (ROOT / DOCS).glob('*.md') for path in linked_files(page)}
    for path in sorted(path for path in outside if not path.startswith(f'{DOCS}/')):
        files.append(File.generated(config, path, abs_src_path=str(ROOT / path)))
    return files


def on_page_markdown(markdown, page, config, files):
    """Fill in generated parts, and let links between docs/ and other folders fit the site's layout."""
    place = page.file.src_uri
    source = f'{DOCS}/{place}' if (ROOT / DOCS / place).exists() else place

    def moved(found: re.Match) -> str:
        target = posixpath.normpath(posixpath.join(posixpath.dirname(source), found[1]))
        return f']({posixpath.relpath(_place(target), posixpath.dirname(place) or ".")}'

    return LINK.sub(moved, expand(markdown))
