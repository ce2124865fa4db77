"""Make data: `synthetic` writes a labelled, an unlabelled and a validation set of synthetic scene text."""

import argparse

from i3cl.config import Settings, SyntheticSettings
from i3cl.job import run


def work(settings: Settings, options: argparse.Namespace) -> None:
    from i3cl import storage
    from i3cl.data.synthetic_set import write_synthetic_set

    out = storage.absolute(options.out)
    write_synthetic_set(settings.synthetic or SyntheticSettings(), out)
    print(f"data set: {out}")


def arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("what", choices=("synthetic",))
    parser.add_argument("--out", required=True, metavar="FOLDER", help="local folder or s3:// URL")


if __name__ == "__main__":
    run(work, __doc__, arguments)
