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


def _out(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--out", required=True, metavar="FOLDER", help="local folder or s3:// URL")


COMMANDS = {
    "convert": Command(convert, "make a checkpoint of an original I3CL or mmdetection Mask R-CNN file", _convert_arguments),
    "synthetic": Command(synthetic, "write a labelled, an unlabelled and a validation set of synthetic scene text", _out),
}

if __name__ == "__main__":
    run_commands(COMMANDS, __doc__)
