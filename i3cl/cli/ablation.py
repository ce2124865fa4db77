"""Train all variants of a recipe (the other files of its folder) with several seeds and print a table of their scores."""

import argparse
from pathlib import Path

from i3cl.cli.command_line import run
from i3cl.config import Settings, load_settings
from i3cl.errors import UserError


def work(settings: Settings, options: argparse.Namespace) -> None:
    """Run the command."""
    from i3cl import storage
    from i3cl.ablation import ablation, table

    if not options.config:
        raise UserError("--config: names no recipe; give the baseline, e.g. configs/ablation/plain.yaml")
    baseline = Path(options.config)
    others = sorted(path for path in baseline.parent.glob("*.yaml") if path.name != baseline.name)
    variants = {path.stem: load_settings(path, options.overrides) for path in others}
    print(table(ablation({baseline.stem: settings, **variants}, options.seeds)), end="")
    print(f"results: {storage.join(settings.storage, settings.name, 'ablation.json')}")


def _seeds(text: str) -> list[int]:
    return [int(seed) for seed in text.split(",")]


def arguments(parser: argparse.ArgumentParser) -> None:
    """Add the arguments of this command."""
    parser.add_argument("--seeds", type=_seeds, default=[0, 1, 2], metavar="0,1,2", help="seeds of every variant")


def main() -> None:
    """Entry point of jobs/ablation.py."""
    run(work, __doc__, arguments)
