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


def _out(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--out", required=True, metavar="FOLDER", help="local folder or s3:// URL")


COMMANDS = {
    "synthetic": Command(synthetic, "write a labelled, an unlabelled and a validation set of synthetic scene text", _out),
}

if __name__ == "__main__":
    run_commands(COMMANDS, __doc__)
