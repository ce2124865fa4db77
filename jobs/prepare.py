"""Make data and starting weights; every command has its own --help."""

from __future__ import annotations

import argparse
from typing import TYPE_CHECKING

from i3cl.config import Settings, SyntheticSettings
from i3cl.job import Command, run_commands

if TYPE_CHECKING:
    from i3cl.data.coco import Dataset


def synthetic(settings: Settings, options: argparse.Namespace) -> None:
    from i3cl import storage
    from i3cl.data.synthetic_set import write_synthetic_set

    out = storage.absolute(options.out)
    write_synthetic_set(settings.synthetic or SyntheticSettings(), out)
    print(f"data set: {out}")


def scene_text(settings: Settings, options: argparse.Namespace) -> None:
    from i3cl import storage
    from i3cl.data.scenes.write import write_scene_text

    out = storage.absolute(options.out)
    done = write_scene_text(settings.scene_text, out, options.images, options.seed, table=options.parquet)
    print(f"data set: {done}, images relative to {out}")


def degrade(settings: Settings, options: argparse.Namespace) -> None:
    from i3cl import storage
    from i3cl.data.degrade import write_degraded

    out = storage.absolute(options.out)
    done = write_degraded(options.kind, _dataset(settings, options), out, options.seed, skip_bad=settings.data.skip_bad)
    print(f"data set: {done}, images relative to {storage.join(out, 'images')}")


def sheet(settings: Settings, options: argparse.Namespace) -> None:
    from i3cl.report.sheet import write_contact_sheet

    write_contact_sheet(options.out, _dataset(settings, options), options.count, options.columns)
    print(f"contact sheet: {options.out}")


def _dataset(settings: Settings, options: argparse.Namespace) -> Dataset:
    from i3cl import storage
    from i3cl.data.coco import read_coco

    return read_coco(storage.absolute(options.source), storage.absolute(options.images), skip_bad=settings.data.skip_bad)


def _out(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--out", required=True, metavar="FOLDER", help="local folder or s3:// URL")


def _scene_text(parser: argparse.ArgumentParser) -> None:
    _out(parser)
    parser.add_argument("--images", required=True, type=int, metavar="N")
    parser.add_argument("--seed", default=0, type=int, metavar="S", help="another seed makes another set (default 0)")
    parser.add_argument("--parquet", action="store_true", help="annotations as a Parquet folder only, no set.json")


def _source(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--source", required=True, metavar="SET.json", help="COCO json, or its Parquet twin")
    parser.add_argument("--images", required=True, metavar="FOLDER", help="images root of the source")


def _degrade(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("kind", choices=("light", "noise", "sig"), metavar="KIND", help="light, noise or sig")
    _source(parser)
    _out(parser)
    parser.add_argument("--seed", default=0, type=int, metavar="S")


def _sheet(parser: argparse.ArgumentParser) -> None:
    _source(parser)
    parser.add_argument("--out", required=True, metavar="FILE.jpg")
    parser.add_argument("--count", default=12, type=int, metavar="N", help="images, evenly over the set (default 12)")
    parser.add_argument("--columns", default=3, type=int, metavar="N")


COMMANDS = {
    "synthetic": Command(synthetic, "write a labelled, an unlabelled and a validation set of synthetic scene text", _out),
    "scene-text": Command(scene_text, "write synthetic street photographs with text, for pre-training", _scene_text),
    "degrade": Command(degrade, "write copies of a set in bad light, with noise or flat contrast; polygons stay", _degrade),
    "sheet": Command(sheet, "draw a contact sheet of a set with its outlines", _sheet),
}

if __name__ == "__main__":
    run_commands(COMMANDS, __doc__)
