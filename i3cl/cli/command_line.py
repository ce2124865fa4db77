"""What every command shares: its arguments and its exit status.

Exit status 0 done; 2 the user's mistake, one line on stderr that names the file or key and the remedy; 1 anything else.
"""

from __future__ import annotations

import argparse
import signal
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from i3cl import observe
from i3cl.config import Settings, load_settings, to_yaml
from i3cl.errors import UserError, inside
from i3cl.storage import NoAnswer

Work = Callable[[Settings, argparse.Namespace], None]
Arguments = Callable[[argparse.ArgumentParser], None]


@dataclass(frozen=True)
class Command:
    """One of a job's commands: ``python jobs/NAME.py COMMAND …``."""

    work: Work
    description: str
    arguments: Arguments | None = None


def run_commands(commands: Mapping[str, Command], description: str) -> None:
    """As `run`, for a job whose first argument names what to do; without one, the list of commands."""
    width = max(map(len, commands))
    listing = "\n".join(f"  {name:{width}}  {command.description}" for name, command in commands.items())
    parser = argparse.ArgumentParser(
        description=f"{description}\n\n{listing}", formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("command", choices=commands, metavar="COMMAND")
    name = parser.parse_args(sys.argv[1:2]).command
    chosen = commands[name]
    run(chosen.work, chosen.description, chosen.arguments, argv=sys.argv[2:], prog=f"{Path(sys.argv[0]).name} {name}")


def run(
    work: Work,
    description: str,
    arguments: Arguments | None = None,
    argv: Sequence[str] | None = None,
    prog: str | None = None,
) -> None:
    """Parse ``--config FILE [key=value …] [--dry-run]``, call `work`, end the process with the status above.

    argv, prog: arguments and name in messages; None: the process's own.
    """
    parser = argparse.ArgumentParser(prog=prog, description=description, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--config", metavar="FILE.yaml", help="recipe; see configs/")
    parser.add_argument("--dry-run", action="store_true", help="print the resolved settings and start nothing")
    parser.add_argument("--skip-bad", action="store_true", help="list and count bad images and annotations, and go on")
    if arguments:
        arguments(parser)
    parser.add_argument("overrides", nargs="*", metavar="key=value", help="any setting, e.g. train.steps=500")
    options = parser.parse_intermixed_args(argv)
    try:
        settings = load_settings(options.config, options.overrides)
        if options.skip_bad:
            settings = settings.model_copy(update={"data": settings.data.model_copy(update={"skip_bad": True})})
        if options.dry_run:
            print(to_yaml(settings), end="")
            return
        # `ray job stop`, and a machine that goes down, send SIGTERM some seconds before they kill.
        signal.signal(signal.SIGTERM, signal.default_int_handler)
        observe.begin(settings.name, parser.prog.split()[-1].removesuffix(".py"))
        with observe.console():
            work(settings, options)
    except KeyboardInterrupt:
        observe.complain(f"{parser.prog}: interrupted; the same command continues where it stopped")
        sys.exit(130)
    except Exception as error:
        if mistake := inside(error, UserError):
            observe.complain(f"{parser.prog}: {mistake}")
            sys.exit(2)
        lost = inside(error, NoAnswer)
        if lost is None:
            raise
        observe.complain(f"{parser.prog}: {lost}")
        sys.exit(1)
