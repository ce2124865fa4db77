"""Print what a run was made from, back to its sources, and what of it is stale.

RUN is the folder or the name of a training, a labelling, a selftrain circle or a study, on disk or s3://; or a checkpoint, a
folder of predictions, pseudo labels. Every line names an input, its place and the first letters of its recorded SHA-256.
stale: it is no longer what it was, or was made from something stale. missing: it is gone. not recorded: by an earlier version.
Exit status: 0 nothing is stale or missing, 1 something is.
"""

import argparse
import json
import sys

from i3cl.cli.command_line import run
from i3cl.config import Settings


def work(settings: Settings, options: argparse.Namespace) -> None:
    from i3cl import storage
    from i3cl.lineage import lineage

    folder = storage.absolute(options.run)
    if "/" not in options.run and not storage.exists(folder):
        folder = storage.join(storage.absolute(settings.storage), options.run)
    found = lineage(folder)
    print(json.dumps(found.as_json(), indent=1) if options.json else "\n".join(found.lines()))
    if not found.fresh:
        sys.exit(1)


def arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("run", metavar="RUN", help="folder or name of a run (see above)")
    parser.add_argument("--json", action="store_true", help="print the tree as JSON")


def main() -> None:
    run(work, __doc__, arguments, resumes=False)
