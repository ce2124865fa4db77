"""Train the arms of a study with several seeds, measure them on the same images and print the differences with intervals."""

import argparse

from i3cl.cli.command_line import run
from i3cl.config import Settings


def work(settings: Settings, options: argparse.Namespace) -> None:
    from i3cl import storage
    from i3cl.report.study import write_study_figure
    from i3cl.study import study, table

    summary = study(settings)
    folder = storage.join(storage.absolute(settings.storage), settings.name)
    write_study_figure(storage.join(folder, "study.png"), summary)
    print(table(summary), end="")
    print(f"results: {folder}/study.json, study.txt, study.png")


def main() -> None:
    """Entry point of jobs/study.py."""
    run(work, __doc__, resumes=True)
