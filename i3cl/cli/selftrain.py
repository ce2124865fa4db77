"""The whole circle: teachers, pseudo labels, student, evaluation, report. The same command continues where it stopped."""

import argparse

from i3cl.cli.command_line import run
from i3cl.config import Settings


def work(settings: Settings, options: argparse.Namespace) -> None:
    """Run the command."""
    from i3cl import storage
    from i3cl.circle import print_table, selftrain

    summary = selftrain(settings)
    print_table(summary)
    print(f"report: {storage.join(storage.absolute(settings.storage), settings.name, 'report.html')}")


def main() -> None:
    """Entry point of jobs/selftrain.py."""
    run(work, __doc__)
