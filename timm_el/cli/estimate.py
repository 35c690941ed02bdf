"""python -m timm_el estimate CONFIG ...: hours and cost of a training from the time of one step.

CONFIG is a YAML for train.py, several are the stages of one training. The time of a step is the one that train.py
prints on the machine in question ("Time: 0.250s": --step-ms 250), or what `bench --train MODEL --batch B --size PIXELS
--json` wrote. Counted are the training steps; validation, start-up and waiting for data are not.
"""
import argparse
import json
from pathlib import Path
from typing import Any, Dict, List, Optional

IMAGENET = 1_281_167


def estimate(
        config: Dict[str, Any],
        step_ms: float,
        batch_size: Optional[int] = None,
        gpus: int = 1,
        images: int = IMAGENET,
        price: Optional[float] = None,
) -> Dict[str, Any]:
    """Steps, hours and cost of one stage.

    Args:
        config: Options of train.py by name.
        step_ms: Milliseconds of one step with `batch_size` images on each GPU.
        batch_size: Images on each GPU; None: the config's, shared among the GPUs.
        gpus: How many work together.
        images: In the training set.
        price: Of one GPU for one hour.

    Raises:
        ValueError: A number is not positive, or the config's batch cannot be shared evenly.
    """
    for name, value in (('step-ms', step_ms), ('batch-size', batch_size), ('gpus', gpus), ('images', images)):
        if value is not None and not value > 0:
            raise ValueError(f'{name}: found {value}, expected a positive number')
    if batch_size is None:
        batch_size, rest = divmod(config['batch_size'], gpus)
        if rest or not batch_size:
            raise ValueError(
                f'gpus: found {gpus}, which do not share a batch of {config["batch_size"]} evenly; '
                f'name the images on each by --batch-size')
    steps = config['epochs'] * (images // (batch_size * gpus))
    hours = steps * step_ms / 3.6e6
    return {
        'model': config['model'], 'epochs': config['epochs'], 'batch_size': batch_size, 'gpus': gpus, 'steps': steps,
        'step_ms': step_ms, 'hours': hours, 'gpu_hours': hours * gpus,
        'cost': None if price is None else hours * gpus * price}


def read_config(file: Path) -> Dict[str, Any]:
    """Options of train.py by name.

    Raises:
        ValueError: The file is not there, or is no YAML that names model, epochs, batch_size and input_size.
    """
    import yaml
    if not file.is_file():
        raise ValueError(f'configs: found no file {str(file)!r}, expected a YAML for train.py')
    try:
        config = yaml.safe_load(file.read_text())
    except yaml.YAMLError:
        config = None
    needed = ('model', 'epochs', 'batch_size', 'input_size')
    if not isinstance(config, dict) or set(needed) - set(config):
        raise ValueError(f'configs: {file} is no YAML with {", ".join(needed)}, expected one for train.py')
    return config


def step_of_bench(file: Path, config: Dict[str, Any], batch_size: int) -> float:
    """Milliseconds of a step that `bench --train --json` measured.

    Raises:
        ValueError: There is no such file, or it was another model, batch or image size than the config's.
    """
    if not file.is_file():
        raise ValueError(f'bench: found no file {str(file)!r}, expected what bench --train --json printed')
    found = json.loads(file.read_text())
    expected = {'model': config['model'], 'batch': batch_size, 'size': config['input_size'][-1]}
    for name, value in expected.items():
        if found.get(name) != value:
            raise ValueError(f'bench: found {name} {found.get(name)!r} in {file}, expected {value!r}; measure that one')
    return found['model_ms']


def main(argv: List[str]) -> None:
    """Estimate and print."""
    parser = argparse.ArgumentParser(
        prog='python -m timm_el estimate', description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument('configs', nargs='+', type=Path, metavar='CONFIG', help='YAML of train_cfgs/')
    step = parser.add_mutually_exclusive_group(required=True)
    step.add_argument('--step-ms', type=float, metavar='MS', help='measured milliseconds of one step')
    step.add_argument('--bench', type=Path, metavar='FILE', help='what bench --train --json printed')
    parser.add_argument('--batch-size', type=int, metavar='B',
                        help="images on each GPU in that step (default: the config's whole batch, shared among them)")
    parser.add_argument('--gpus', type=int, default=1, help='default: 1')
    parser.add_argument('--price', type=float, help='of one GPU for one hour')
    parser.add_argument('--images', type=int, default=IMAGENET, help='in the training set (default: ImageNet)')
    parser.add_argument('--json', action='store_true', help='print data in place of a table')
    args = parser.parse_args(argv)
    rows = []
    for file in args.configs:
        config = read_config(file)
        ms = args.step_ms
        if args.bench:
            ms = step_of_bench(args.bench, config, args.batch_size or config['batch_size'] // args.gpus)
        rows.append(estimate(config, ms, args.batch_size, args.gpus, args.images, args.price))
    if args.json:
        print(json.dumps(rows, indent=2))
        return
    print(f'{"model":20} {"epochs":>6} {"batch":>12} {"steps":>11} {"step, ms":>9} {"hours":>9} {"GPU hours":>10} '
          f'{"cost":>10}')
    for row in rows:
        cost = '-' if row['cost'] is None else f'{row["cost"]:.0f}'
        print(f'{row["model"]:20} {row["epochs"]:>6} {row["gpus"]:>5} x {row["batch_size"]:>4} {row["steps"]:>11,} '
              f'{row["step_ms"]:>9.1f} {row["hours"]:>9.1f} {row["gpu_hours"]:>10.1f} {cost:>10}')
    if len(rows) > 1:
        print(f'all: {sum(r["hours"] for r in rows):.1f} hours, {sum(r["gpu_hours"] for r in rows):.1f} GPU hours')
    print('training steps only: validation, start-up and waiting for data are not counted')
