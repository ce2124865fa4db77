"""List the detectors that can take part in an ensemble: what they are, their licences, whether they can be used here.

They are named in label.members.NAME.use. Those of installed packages are listed too; one that cannot be imported is one line
that says why. docs/members.md explains members and how to add one.
"""

import argparse
import json

from i3cl.cli.command_line import run
from i3cl.config import Settings


def work(settings: Settings, options: argparse.Namespace) -> None:
    from i3cl.members.listing import listing

    found = listing()
    if options.json:
        print(json.dumps([kind.as_json() for kind in found], indent=1))
        return
    print("\n".join(line for kind in found for line in kind.lines()))


def arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--json", action="store_true", help="print the list as JSON")


def main() -> None:
    run(work, __doc__, arguments)
