"""Make data and starting weights; every command has its own --help."""

from __future__ import annotations

import argparse
from typing import TYPE_CHECKING

from i3cl.cli.command_line import Command, run_commands
from i3cl.config import Settings, SyntheticSettings

if TYPE_CHECKING:
    from i3cl.data.formats.records import Dataset


def synthetic(settings: Settings, options: argparse.Namespace) -> None:
    from i3cl import storage
    from i3cl.data.synthetic.plain_set import write_synthetic_set

    out = storage.absolute(options.out)
    write_synthetic_set(settings.synthetic or SyntheticSettings(), out)
    print(f"data set: {out}")


def convert(_settings: Settings, options: argparse.Namespace) -> None:
    from i3cl import storage
    from i3cl.model.convert import convert_original

    out = storage.absolute(options.out)
    print(convert_original(options.source, out, options.classes))
    print(f"checkpoint: {out}")


def _convert_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--source", required=True, metavar="FILE.pth", help="weights file, local or s3:// URL")
    parser.add_argument("--classes", type=int, metavar="N", help="keep the first N classes only (1: text); default: all")
    _out(parser)


def halve(_settings: Settings, options: argparse.Namespace) -> None:
    from i3cl import storage
    from i3cl.model.convert import halve_checkpoint

    out = storage.absolute(options.out)
    size = halve_checkpoint(options.source, out)
    print(f"checkpoint: {out} ({size / 1e6:.1f} MB of weights)")


def _halve_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--source", required=True, metavar="DIR", help="checkpoint directory that training wrote")
    _out(parser)


def export(settings: Settings, options: argparse.Namespace) -> None:
    from i3cl.data.exports.common import ExportOptions
    from i3cl.data.exports.export import export_labels

    printed = export_labels(
        options.format,
        options.source,
        options.out,
        score=options.score,
        member=options.member,
        skip_bad=settings.data.skip_bad,
        join=options.join_same_files,
        options=ExportOptions(options.image_url_prefix, not options.no_confidence, options.from_name, options.to_name),
    )
    print(f"{printed}: {options.out}")


def _export(parser: argparse.ArgumentParser) -> None:
    from i3cl.data.exports.registry import FORMATS

    parser.add_argument("format", choices=FORMATS, metavar="FORMAT", help=", ".join(FORMATS))
    parser.add_argument("--source", required=True, metavar="PATH", help="COCO json, Parquet table or folder of predictions")
    parser.add_argument("--out", required=True, metavar="PATH", help="file, or folder of labelme and parquet")
    parser.add_argument("--score", type=float, metavar="T", help="leave out scores up to T (default 0.45 for art, else none)")
    parser.add_argument("--member", metavar="NAME", help="whose predictions, where the folder holds several")
    parser.add_argument("--image-url-prefix", default="", metavar="PREFIX", help="stands before the file names in review formats")
    join = "join image entries that are the same file: their labels together, each once"
    parser.add_argument("--join-same-files", action="store_true", help=join)
    parser.add_argument("--no-confidence", action="store_true", help="icdar: lines without the score")
    parser.add_argument("--from-name", default="label", help="label-studio: name of the labels in its interface")
    parser.add_argument("--to-name", default="image", help="label-studio: name of the image in its interface")


def import_corrections(settings: Settings, options: argparse.Namespace) -> None:
    from i3cl.data.exports.corrections import import_corrections

    done = import_corrections(
        options.format,
        options.source,
        options.base,
        options.out,
        only_corrected=options.only_corrected,
        prefix=options.image_url_prefix,
        skip_bad=settings.data.skip_bad,
    )
    for problem in done.problems:
        print(problem)
    print(
        f"{done.corrected} corrected images with {done.instances} instances and {done.ignored} ignore regions instead of "
        f"{done.removed} labels; {done.images} images: {options.out}"
    )


def _import_corrections(parser: argparse.ArgumentParser) -> None:
    from i3cl.data.exports.registry import REVIEW_FORMATS

    parser.add_argument("format", choices=REVIEW_FORMATS, metavar="FORMAT", help=", ".join(REVIEW_FORMATS))
    parser.add_argument("--source", required=True, metavar="PATH", help="what the other tool has exported")
    parser.add_argument("--base", required=True, metavar="PATH", help="COCO json or Parquet table that was reviewed")
    parser.add_argument("--out", required=True, metavar="PATH", help="COCO json (.json) or folder of Parquet shards")
    parser.add_argument("--only-corrected", action="store_true", help="leave out images that nobody has annotated")
    parser.add_argument("--image-url-prefix", default="", metavar="PREFIX", help="as given to export")


def split(settings: Settings, options: argparse.Namespace) -> None:
    from i3cl.data.tools.splits import write_splits

    counts = write_splits(
        options.source,
        options.out,
        fractions=options.fractions,
        seed=options.seed,
        remove=options.remove,
        skip_bad=settings.data.skip_bad,
    )
    for name, count in counts.items():
        print(f"{name}: {count} images")
    print(f"splits: {options.out}")


def _split(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--source", required=True, metavar="PATH", help="COCO json or Parquet table")
    parser.add_argument("--out", required=True, metavar="FOLDER", help="new folder for NAME.json, or NAME/ of a table's shards")
    shares = "add up to 1 (default train=0.9 val=0.1)"
    parser.add_argument("--fractions", nargs="+", metavar="NAME=SHARE", default=["train=0.9", "val=0.1"], help=shares)
    parser.add_argument("--seed", type=int, default=0)
    removal = "files (or FILE:COLUMN) with ids of images to leave out"
    parser.add_argument("--remove", nargs="+", metavar="LIST", default=[], help=removal)


def duplicates(settings: Settings, options: argparse.Namespace) -> None:
    from i3cl.data.tools.splits import report_duplicates

    against = options.against or options.source
    images = [*options.images, *options.images][:2]
    sets = (options.source, images[0]), (against, images[1])
    data = settings.data
    pairs = report_duplicates(*sets, options.distance, options.out, skip_bad=data.skip_bad, upright=data.upright)
    print(f"{pairs} pairs within {options.distance} of 64 bits" + (f": {options.out}" if options.out else ""))


def _duplicates(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--source", required=True, metavar="PATH", help="COCO json or Parquet table")
    parser.add_argument("--against", metavar="PATH", help="another set; left out: pairs within the source")
    parser.add_argument("--images", required=True, action="append", metavar="FOLDER", help="images root; again for --against")
    parser.add_argument("--distance", type=int, default=4, help="largest Hamming distance of two hashes, 0-16 (default 4)")
    parser.add_argument("--out", metavar="FILE", help="list of pairs, tab-separated; left out: printed")


def import_public(settings: Settings, options: argparse.Namespace) -> None:
    from i3cl.data.importers.import_set import import_dataset

    summary = import_dataset(
        options.name,
        options.source,
        options.out,
        split=options.split,
        parquet=options.parquet,
        skip_bad=settings.data.skip_bad,
        upright=settings.data.upright,
    )
    print("\n".join(summary.lines()))


def _import(parser: argparse.ArgumentParser) -> None:
    from i3cl.data.importers.registry import IMPORTERS

    parser.add_argument("name", choices=IMPORTERS, metavar="NAME", help=", ".join(IMPORTERS))
    parser.add_argument("--source", required=True, help="folder of the download (local or s3://), or its .zip, .tar, .tar.gz")
    parser.add_argument("--split", choices=("train", "test"), default="train")
    parser.add_argument("--parquet", action="store_true", help="write Parquet parts instead of one COCO json")
    _out(parser)


def scene_text(settings: Settings, options: argparse.Namespace) -> None:
    from i3cl import storage
    from i3cl.data.synthetic.street_set import write_scene_text

    out = storage.absolute(options.out)
    done = write_scene_text(settings.scene_text, out, options.images, options.seed, table=options.parquet)
    print(f"data set: {done}, images relative to {out}")


def degrade(settings: Settings, options: argparse.Namespace) -> None:
    from i3cl import storage
    from i3cl.data.tools.degrade import write_degraded

    out = storage.absolute(options.out)
    dataset, data = _dataset(settings, options), settings.data
    done = write_degraded(options.kind, dataset, out, options.seed, skip_bad=data.skip_bad, upright=data.upright)
    print(f"data set: {done}, images relative to {storage.join(out, 'images')}")


def sheet(settings: Settings, options: argparse.Namespace) -> None:
    from i3cl.report.sheet import write_contact_sheet

    dataset = _dataset(settings, options)
    write_contact_sheet(options.out, dataset, options.count, options.columns, upright=settings.data.upright)
    print(f"contact sheet: {options.out}")


def _dataset(settings: Settings, options: argparse.Namespace) -> Dataset:
    from i3cl import storage
    from i3cl.data.formats.coco import read_for_command

    annotations, images = storage.absolute(options.source), storage.absolute(options.images)
    return read_for_command(annotations, images, skip_bad=settings.data.skip_bad, check_files=True)


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
    "convert": Command(convert, "make a checkpoint of an original I3CL or mmdetection Mask R-CNN file", _convert_arguments),
    "halve": Command(halve, "write a checkpoint with weights of half the size, to hand it on", _halve_arguments),
    "import": Command(import_public, "turn a public data set into COCO json or Parquet; see docs/datasets.md", _import),
    "synthetic": Command(synthetic, "write a labelled, an unlabelled and a validation set of synthetic scene text", _out),
    "export": Command(export, "labels or predictions in the format of another tool", _export),
    "import-corrections": Command(import_corrections, "labels that people have corrected in another tool", _import_corrections),
    "split": Command(split, "divide a data set by the hash of the file name, and leave images out", _split),
    "duplicates": Command(duplicates, "list images that look the same, within a set or between two", _duplicates),
    "scene-text": Command(scene_text, "write synthetic street photographs with text, for pre-training", _scene_text),
    "degrade": Command(degrade, "write copies of a set in bad light, with noise or flat contrast; polygons stay", _degrade),
    "sheet": Command(sheet, "draw a contact sheet of a set with its outlines", _sheet),
}


def main() -> None:
    run_commands(COMMANDS, __doc__)
