"""Train a network, stage by stage, and resume where it stopped.

For what timm's train.py cannot say: attention matching, several stages one after another, clipped latent weights, and
a record of what binary layers do. A config holds fields of `FitConfig`, under the names of train.py where it has them,
and perhaps `stages`, a list of changes with a `name` each, run in order in a folder each. In a stage, `initial_stage`
and `teacher_stage` name an earlier one, whose weights it starts from or is taught by.

A run folder holds args.yaml, timm's checkpoints (last, best), log.jsonl and telemetry.jsonl. Run the same command again
and it goes on behind the last finished epoch, to the same weights as if it had never stopped.
"""
from ..experiments.config import load_config
from ..experiments.fit import fit_stages
from ._arguments import add_changes, add_places, parser_of


def main(argv: list[str]) -> None:
    """Train what a YAML says."""
    parser = parser_of('fit', __doc__)
    parser.add_argument('config', help='YAML with fields of FitConfig, and perhaps stages')
    add_places(parser)
    add_changes(parser)
    args = parser.parse_args(argv)
    result = fit_stages(
        load_config(args.config, args.set), args.output, args.data_dir, cache=args.cache, device=args.device,
        workers=args.workers)
    print(f"top-1 {result['top1']:.2f} % after {result['epoch'] + 1} epochs, {result['seconds']:.0f} s")
