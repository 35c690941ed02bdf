"""Arguments that several verbs have."""
import argparse


def parser_of(verb: str, doc: str) -> argparse.ArgumentParser:
    """Return the parser of a verb, described by the docstring of its module."""
    return argparse.ArgumentParser(
        prog=f'timm-el {verb}', description=doc, formatter_class=argparse.RawDescriptionHelpFormatter)


def positive(text: str) -> int:
    """Return a positive integer, or raise ArgumentTypeError; the type of an argument."""
    if not text.isdecimal() or int(text) == 0:
        raise argparse.ArgumentTypeError(f'found {text!r}, expected a positive integer')
    return int(text)


def natural(text: str) -> int:
    """Return an integer that is not negative, or raise ArgumentTypeError; the type of an argument."""
    if not text.isdecimal():
        raise argparse.ArgumentTypeError(f'found {text!r}, expected 0 or a positive integer')
    return int(text)


def add_json(parser: argparse.ArgumentParser) -> None:
    """Add the argument that prints data."""
    parser.add_argument('--json', action='store_true', help='print data in place of text')


def add_threads(parser: argparse.ArgumentParser) -> None:
    """Add the number of threads."""
    parser.add_argument('--threads', type=positive, help="threads of every contestant (default: torch's own choice)")


def set_threads(threads: int | None) -> None:
    """Set the number of threads that was asked for, if any."""
    import torch
    if threads is not None:
        torch.set_num_threads(threads)


def add_places(parser: argparse.ArgumentParser, required: bool = True) -> None:
    """Add the arguments that say where a run takes place."""
    parser.add_argument('--data-dir', required=required, help='ImageFolder with train/ and validation/')
    parser.add_argument('--output', required=required, help='folder of the run, which is resumed if it is there')
    parser.add_argument('--cache', help='folder for decoded images (default: OUTPUT)')
    parser.add_argument('--device', default='cpu', help='default: cpu')
    parser.add_argument(
        '--workers', type=int, default=2,
        help="processes of timm's loader, each with random numbers of its own (default: 2)")


def add_changes(parser: argparse.ArgumentParser) -> None:
    """Add the argument that changes fields of the config."""
    parser.add_argument(
        '--set', nargs='+', action='extend', default=[], metavar='FIELD=VALUE', help='fields to change, as YAML')
