"""Run or resume a table of ablations, or print it beside the paper's.

A table is a config of `fit` with `rows`, and `contrasts` that are named before anything runs. A row is the name of a
recipe, or a mapping with a `name`, the fields that it changes, and perhaps `paper`, the paper's figure (if it is left
out, that of the table, or else the recipe's own). `published` maps the names of other works to their figures. All rows
of one seed start from the same weights of the host and see the same images in the same order, so that rows are compared
in pairs. Seeds run one after another, within a seed the rows as they are listed.

Each finished run is a line of OUTPUT/results.jsonl, and is not run again. `--report` prints such a file as Markdown.
"""
import os

from ..experiments.ablation import picked, plan_rows, report, run_table
from ..experiments.config import load_config
from ..training import JsonLines
from ._arguments import add_changes, add_places, parser_of, positive


def main(argv: list[str]) -> None:
    """Run, resume or print a table."""
    parser = parser_of('ablate', __doc__)
    parser.add_argument('table', help='YAML with rows')
    parser.add_argument('--report', metavar='RESULTS', help='print this results.jsonl and run nothing')
    parser.add_argument('--seeds', type=positive, default=3, help='seeds 0, 1, ... (default: 3)')
    parser.add_argument('--rows', nargs='+', help='run these rows only')
    add_changes(parser)
    add_places(parser, required=False)
    args = parser.parse_args(argv)
    table = load_config(args.table, args.set)
    if args.report:
        if not os.path.isfile(args.report):
            raise ValueError(f'--report: found no file {args.report!r}, expected results.jsonl of a table')
        print(report(table, JsonLines.read(args.report)))
        return
    for name in ('data_dir', 'output'):
        if getattr(args, name) is None:
            raise ValueError(f'--{name.replace("_", "-")}: found none, expected a folder, or --report RESULTS')
    plan_rows(table)
    run_table(
        args.table, picked(table, args.rows), range(args.seeds), args.output, args.data_dir, cache=args.cache,
        device=args.device, workers=args.workers, changes=args.set)
    print(report(table, JsonLines.read(os.path.join(args.output, 'results.jsonl'))))
