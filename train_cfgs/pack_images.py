"""Write an ImageFolder as one tar.gz of small WebP files, to be carried to where it is trained on.

    python train_cfgs/pack_images.py imagenette imagenette-128.tar.gz --size 128

The shorter side is scaled to --size and a square out of the middle is kept. The archive holds one folder, named as
DATA, with the same splits, classes and files. `timm-el fit` reads it when it is unpacked.
"""
import argparse
import io
import os
import tarfile
from pathlib import Path

from PIL import Image
from timm.data import create_transform
from timm.data.readers import get_img_extensions
from torchvision.transforms.functional import to_pil_image

from timm_el.experiments.images import UNREADABLE


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument('data', type=Path, help='folder of splits of folders of images per class')
    parser.add_argument('tar', type=Path, help='file to write')
    parser.add_argument('--size', type=int, default=128, help='pixels (default: 128)')
    parser.add_argument('--quality', type=int, default=75, help="of WebP (default: 75)")
    parser.add_argument('--limit', type=int, help='images of a class and split (default: all)')
    args = parser.parse_args()
    scale = create_transform((3, args.size, args.size), crop_pct=1.0, interpolation='bicubic', normalize=False)
    part = args.tar.with_name(args.tar.name + '.part')
    with tarfile.open(part, 'w:gz') as tar:  # for the sake of the headers, a fifth of the whole
        for folder in sorted(path for path in args.data.glob('*/*') if path.is_dir()):
            files = sorted(file for file in folder.iterdir() if file.suffix.lower() in get_img_extensions())
            for file in files[:args.limit]:
                data = io.BytesIO()
                try:
                    image = Image.open(file).convert('RGB')
                except UNREADABLE as e:
                    raise SystemExit(f'{file}: cannot be read as an image: {e}') from e
                to_pil_image(scale(image)).save(data, 'webp', quality=args.quality, method=4)
                name = file.relative_to(args.data)  # with its ending, as a.jpg may stand beside a.png
                name = name.with_name(f'{name.name}.webp') if name.suffix != '.webp' else name
                member = tarfile.TarInfo((args.data.resolve().name / name).as_posix())
                member.size = data.tell()
                data.seek(0)
                tar.addfile(member, data)
    os.replace(part, args.tar)


if __name__ == '__main__':
    main()
