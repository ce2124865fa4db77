"""The whole circle: teachers, pseudo labels, student, evaluation, report. The same command continues where it stopped.

Without a labelled set in data.train, the detectors of selftrain.members label, and a student learns from their labels alone.
"""

import argparse

from i3cl.cli.command_line import run
from i3cl.config import Settings


def work(settings: Settings, options: argparse.Namespace) -> None:
    """Run the command."""
    from i3cl import storage

    if not settings.data.train and settings.synthetic is None:
        from i3cl.circle_unlabelled import print_summary, selftrain_without_labels

        print_summary(selftrain_without_labels(settings))
        return
    from i3cl.circle import print_table, selftrain

    print_table(selftrain(settings))
    print(f"report: {storage.join(storage.absolute(settings.storage), settings.name, 'report.html')}")


def main() -> None:
    """Entry point of jobs/selftrain.py."""
    run(work, __doc__)
