"""Make data and starting weights; every command has its own --help."""

import argparse

from i3cl.config import Settings, SyntheticSettings
from i3cl.job import Command, run_commands


def synthetic(settings: Settings, options: argparse.Namespace) -> None:
    from i3cl import storage
    from i3cl.data.synthetic_set import write_synthetic_set

    out = storage.absolute(options.out)
    write_synthetic_set(settings.synthetic or SyntheticSettings(), out)
    print(f"data set: {out}")


def import_public(settings: Settings, options: argparse.Namespace) -> None:
    from i3cl.data.importers.run import import_dataset

    summary = import_dataset(
        options.name,
        options.source,
        options.out,
        split=options.split,
        parquet=options.parquet,
        skip_bad=settings.data.skip_bad,
    )
    print("\n".join(summary.lines()))


def _import(parser: argparse.ArgumentParser) -> None:
    from i3cl.data.importers import IMPORTERS

    parser.add_argument("name", choices=IMPORTERS, metavar="NAME", help=", ".join(IMPORTERS))
    parser.add_argument("--source", required=True, help="folder of the download (local or s3://), or its .zip, .tar, .tar.gz")
    parser.add_argument("--split", choices=("train", "test"), default="train")
    parser.add_argument("--parquet", action="store_true", help="write Parquet parts instead of one COCO json")
    _out(parser)


def _out(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--out", required=True, metavar="FOLDER", help="local folder or s3:// URL")


COMMANDS = {
    "import": Command(import_public, "turn a public data set into COCO json or Parquet; see docs/datasets.md", _import),
    "synthetic": Command(synthetic, "write a labelled, an unlabelled and a validation set of synthetic scene text", _out),
}

if __name__ == "__main__":
    run_commands(COMMANDS, __doc__)
