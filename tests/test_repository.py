"""Rules of the house: style, one-way imports, a cheap and quiet import."""
import pathlib
import subprocess
import sys

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
