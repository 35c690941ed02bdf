"""Train a network, stage by stage, and resume where it stopped.

For what timm's train.py cannot say: attention matching, several stages one after another, clipped latent weights, and
a record of what binary layers do. A config holds fields of `FitConfig`, under the names of train.py where it has them,
and perhaps `stages`, a list of changes with a `name` each, run in order in a folder each. In a stage, `initial_stage`
and `teacher_stage` name an earlier one, whose weights it starts from or is taught by.

A run folder holds args.yaml, timm's checkpoints (last, best), log.jsonl, telemetry.jsonl and, at the end, the packed
weights of a binarized network. Run the same command again and it goes on behind the last validated epoch, to the same
weights as if it had never stopped.

With --budget all stages share so many seconds: each has as many epochs, at most its own number, as its pace allows in
its share of what is left. SIGTERM ends the budget early. With --hand-over, what each stage made is in that folder as
soon as it is done (STAGE.tar.gz, summary.csv), and of a stage that was cut what there is, marked as unfinished.
"""
import contextlib

from ..experiments.config import load_config
from ..experiments.fit import fit_stages
from ..experiments.lease import Lease, LeaseEnded
from ._arguments import add_changes, add_places, parser_of, positive


def main(argv: list[str]) -> None:
    """Train what a YAML says."""
    parser = parser_of('fit', __doc__)
    parser.add_argument('config', help='YAML with fields of FitConfig, and perhaps stages')
    add_places(parser)
    add_changes(parser)
    parser.add_argument('--budget', type=positive, metavar='SECONDS', help='time for all stages (default: no limit)')
    parser.add_argument('--hand-over', metavar='FOLDER', help='where to put what each stage made')
    args = parser.parse_args(argv)
    lease = None if args.budget is None else Lease(args.budget)
    try:
        with contextlib.nullcontext() if lease is None else lease.ended_by():
            result = fit_stages(
                load_config(args.config, args.set), args.output, args.data_dir, lease=lease,
                hand_over_to=args.hand_over, cache=args.cache, device=args.device, workers=args.workers)
    except LeaseEnded:
        print('the time is over; the same command goes on where it stopped')
        return
    print(f"top-1 {result['top1']:.2f} % after {result['epoch'] + 1} epochs, {result['seconds']:.0f} s")
