"""Train one recipe with Ray Train; the same command continues a run that was stopped."""

import argparse

from i3cl.cli.command_line import run
from i3cl.config import Settings


def work(settings: Settings, options: argparse.Namespace) -> None:
    """Run the command."""
    from i3cl.training.launch import train

    result = train(settings)
    score = f", F {result.metrics['hmean']:.3f}" if "hmean" in result.metrics else ""
    print(f"best checkpoint (step {result.metrics.get('step')}{score}): {result.checkpoint}")


def main() -> None:
    """Entry point of jobs/train.py."""
    run(work, __doc__)
