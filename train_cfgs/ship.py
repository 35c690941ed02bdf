"""Take Hub folders over into hub/, whose networks the package carries, and note them in its manifest.

python train_cfgs/ship.py runs/imagenette/hub/el_resnet26.imagenette ... --dataset "Imagenette, 3,925 images" \
    --training "train_cfgs/imagenette.sh imagenette runs/imagenette"

A folder of the same network with another tag is replaced. The card of a shipped network creates it without the Hub.
"""
import argparse
import json
import shutil
from pathlib import Path

from timm_el.hub import CARD, CONFIG, WEIGHTS, file_facts, from_hub, read_metrics

HUB = Path(__file__).parents[1] / 'hub'


def main() -> None:
    """Check the folders, then copy them."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument('folders', nargs='+', type=Path)
    parser.add_argument('--dataset', required=True, help='what top-1 was measured on; the size is added')
    parser.add_argument('--training', required=True, help='the command that trained them')
    args = parser.parse_args()
    facts = {folder.name: entry(folder, args.dataset, args.training) for folder in args.folders}
    manifest = HUB / 'manifest.json'
    if inside := [str(folder) for folder in args.folders if folder.resolve().parent == HUB]:
        parser.error(f'folders: found {inside[0]!r}, which is shipped already, expected one elsewhere')
    replaced = {name.partition('.')[0] for name in facts}
    kept = {}
    for name, fact in json.loads(manifest.read_text()).items():
        if name.partition('.')[0] in replaced:
            shutil.rmtree(HUB / name)
        else:
            kept[name] = fact
    for folder in args.folders:
        (HUB / folder.name).mkdir()
        for file in (CONFIG, WEIGHTS):
            shutil.copyfile(folder / file, HUB / folder.name / file)
        card = (folder / CARD).read_text(encoding='utf-8')
        (HUB / folder.name / CARD).write_text(card.replace(f'hf-hub:USER/{folder.name}', folder.name), encoding='utf-8')
    manifest.write_text(json.dumps(dict(sorted({**kept, **facts}.items())), indent=2) + '\n')


def entry(folder: Path, dataset: str, training: str) -> dict:
    """Return what the manifest says of a folder, which is loaded first."""
    model, metrics = from_hub(folder), read_metrics(folder)
    if 'top1' not in metrics:
        raise SystemExit(f'{folder}: found no top1 on its card, expected one: timm-el push --metric top1=NUMBER')
    report = getattr(model, 'binarize_report', None)  # a ReActNet is not converted
    return {
        **file_facts(folder / WEIGHTS), 'top1': round(metrics['top1'], 2),
        'dataset': f'{dataset}, {model.pretrained_cfg["input_size"][-1]} px',
        'recipe': report.recipe.name if report else model.pretrained_cfg['architecture'], 'training': training}


if __name__ == '__main__':
    main()
