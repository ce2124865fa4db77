"""Find text in images with a checkpoint: an ArT submission json, COCO results and drawn pictures."""

import argparse
import json
import re
from pathlib import Path

from i3cl.cli.command_line import run
from i3cl.config import Settings
from i3cl.errors import UserError

SUFFIXES = {".jpg", ".jpeg", ".png", ".bmp", ".webp", ".tif", ".tiff"}


def work(settings: Settings, options: argparse.Namespace) -> None:
    import cv2

    from i3cl import storage
    from i3cl.data.loading.images import ImageError, decode_image
    from i3cl.inference.device import choose_device
    from i3cl.inference.predictor import Predictor
    from i3cl.inference.recipe import describe_sizes, given_size

    files: list[str] = []
    for given in options.images:
        if not storage.exists(given):
            raise UserError(f"{given}: no such image or folder")
        names = storage.list_dir(given) if storage.is_dir(given) else [""]
        files += [storage.join(given, name) for name in names if not name or Path(name).suffix.lower() in SUFFIXES]
    if not files:
        raise UserError(f"{options.images[0]}: has no image ({', '.join(sorted(SUFFIXES))})")
    given = given_size(settings)
    predictor = Predictor.load(options.checkpoint, choose_device(settings.cluster.gpu), given)
    print(describe_sizes({options.checkpoint: predictor.recipe}, given))
    out = options.out
    storage.make_dirs(out)
    art: dict[str, list] = {}
    coco: list[dict] = []
    bad: list[str] = []
    for number, file in enumerate(files, 1):
        try:
            image = decode_image(file)
        except ImageError as error:
            bad.append(str(error))
            continue
        found = predictor.detect([image], options.score)[0]
        stem = Path(file).stem
        digits = re.findall(r"\d+", stem)
        art[f"res_{digits[-1] if digits else stem}"] = found.to_art(options.score)
        coco += found.to_coco(int(digits[-1]) if digits else number)
        drawn = cv2.cvtColor(found.draw(image), cv2.COLOR_RGB2BGR)
        storage.write_bytes_atomic(storage.join(out, "pictures", f"{stem}.jpg"), cv2.imencode(".jpg", drawn)[1].tobytes())
        print(f"{number}/{len(files)} {Path(file).name}: {len(found)} texts", flush=True)
    storage.write_text_atomic(storage.join(out, "art.json"), json.dumps(art))
    storage.write_text_atomic(storage.join(out, "coco.json"), json.dumps(coco))
    for reason in bad:
        print(f"skipped {reason}")
    print(f"{len(files) - len(bad)} images, {len(coco)} texts: {out}")


def arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--checkpoint", required=True, metavar="DIR")
    parser.add_argument("--images", required=True, nargs="+", metavar="PATH", help="images or folders of images")
    parser.add_argument("--out", default="runs/predict", metavar="FOLDER")
    parser.add_argument("--score", type=float, default=0.45, help="lowest score, 0-1 (default 0.45)")


def main() -> None:
    run(work, __doc__, arguments)
