"""Search score thresholds, loss weights or any other settings with Ray Tune; the same command continues a sweep."""

import argparse

from i3cl.cli.command_line import run
from i3cl.config import Settings


def work(settings: Settings, options: argparse.Namespace) -> None:
    """Run the command."""
    from i3cl import storage
    from i3cl.report.search import write_search_page
    from i3cl.search.sweep import search

    outcome = search(settings, options.config, write_search_page)
    summary = outcome.summary
    for title, part in (("found", summary["best"]), ("present", summary["default"])):
        values = "  ".join(f"{key}={value}" for key, value in part["values"].items())
        print(f"{title:8} held-out F {part['held_out']['hmean']:.4f}  {values}")
    print(f"difference of F, 95 %: {summary['bootstrap']['difference']}  trials: {summary['trials']}")
    print(f"page: {storage.join(outcome.run, 'dashboard.html')}")
    print(f"next: {summary['next']}")


def main() -> None:
    """Entry point of jobs/search.py."""
    run(work, __doc__)
