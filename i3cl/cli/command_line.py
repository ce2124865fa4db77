"""What every command shares: its arguments, its messages and its exit status.

Exit status: 0 done; 2 the user's mistake, one line on stderr that names the file or key and the remedy; 130 interrupted;
141 the reader of stdout has closed it (as when SIGPIPE ends a program); 1 anything else.
"""

from __future__ import annotations

import argparse
import difflib
import os
import select
import signal
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from io import TextIOWrapper
from pathlib import Path
from typing import Any, NoReturn

Work = Callable[[Any, argparse.Namespace], None]
Arguments = Callable[[argparse.ArgumentParser], None]
Resumes = bool | Callable[[argparse.Namespace], bool]


@dataclass(frozen=True)
class Command:
    """One of several commands in a file: ``i3cl prepare COMMAND …``."""

    work: Work
    description: str
    arguments: Arguments | None = None
    resumes: Resumes = False
    """Whether the same line continues after an interruption, instead of starting from the beginning."""


class Parser(argparse.ArgumentParser):
    """A parser whose errors are one line with the nearest right word."""

    def error(self, message: str) -> NoReturn:
        """End the process with status 2 and one line on stderr."""
        lost = message.removeprefix("unrecognized arguments: ")
        if lost != message:
            message += nearest(lost.split()[0].partition("=")[0], [o for o in self._option_string_actions if len(o) > 2])
        self.exit(2, f"{self.prog}: {message}; see {self.prog} --help\n")

    def _check_value(self, action: argparse.Action, value: Any) -> None:
        if action.choices is not None and value not in action.choices:
            choices = [str(choice) for choice in action.choices]
            hint = nearest(str(value), choices) or f"; choose from {', '.join(choices)}"
            raise argparse.ArgumentError(action, f"{value!r} is not known{hint}")


def nearest(word: str, known: Sequence[str]) -> str:
    """``; did you mean X?`` for the known word that is most like `word`, or nothing."""
    near = difflib.get_close_matches(word, known, n=1, cutoff=0.5)
    return f"; did you mean {near[0]}?" if near else ""


def called() -> str:
    """How the command was called, for messages: ``i3cl train`` or ``train.py``."""
    return Path(sys.argv[0]).name


def run_commands(commands: Mapping[str, Command], description: str) -> None:
    """Like `run`, for a command whose first argument says what to do; without it, print the list."""
    width = max(map(len, commands))
    listing = "\n".join(f"  {name:{width}}  {command.description}" for name, command in commands.items())
    parser = Parser(
        prog=called(), description=f"{description}\n\n{listing}", formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("command", choices=list(commands), metavar="COMMAND")
    name = completed_word(parser, commands) or parser.parse_args(sys.argv[1:2]).command
    chosen = commands[name]
    run(chosen.work, chosen.description, chosen.arguments, sys.argv[2:], f"{called()} {name}", resumes=chosen.resumes)


def run(
    work: Work,
    description: str,
    arguments: Arguments | None = None,
    argv: Sequence[str] | None = None,
    prog: str | None = None,
    *,
    resumes: Resumes = True,
) -> None:
    """Parse ``--config RECIPE [key=value …] [--dry-run]``, call `work`, and end the process with the status above on an error.

    Args:
        work: gets the settings and the parsed options.
        description: text of ``--help``.
        arguments: adds further options to the parser.
        argv: the arguments; None: those of the process.
        prog: the name in messages; None: as the process was called.
        resumes: whether the same line continues after an interruption; the interrupted message says so.
    """
    from i3cl.config import load_settings, to_yaml
    from i3cl.config.loading import find_recipe

    parser = Parser(prog=prog or called(), description=description, formatter_class=argparse.RawDescriptionHelpFormatter)
    config = parser.add_argument("--config", metavar="RECIPE", help="YAML file, or the name of a recipe in configs/")
    config.completer = _complete_recipe  # type: ignore[attr-defined]  # read by argcomplete
    parser.add_argument("--dry-run", action="store_true", help="print the resolved settings and start nothing")
    parser.add_argument("--skip-bad", action="store_true", help="list and count bad images and annotations, and go on")
    if arguments:
        arguments(parser)
    overrides = parser.add_argument("overrides", nargs="*", metavar="key=value", help="any setting, e.g. train.steps=500")
    overrides.completer = _complete_setting  # type: ignore[attr-defined]
    complete(parser)
    with streams():
        options = parser.parse_intermixed_args(argv)
        _refuse_empty(parser, options)
    with exit_status(parser.prog, resumes(options) if callable(resumes) else resumes):
        if options.config is not None:
            options.config = str(find_recipe(options.config))
        settings = load_settings(options.config, options.overrides)
        if options.skip_bad:
            settings = settings.model_copy(update={"data": settings.data.model_copy(update={"skip_bad": True})})
        if options.dry_run:
            print(to_yaml(settings), end="")
            return
        from i3cl import observe

        observe.begin(settings.name, parser.prog.split()[-1].removesuffix(".py"))
        with observe.console():
            work(settings, options)


def _refuse_empty(parser: Parser, options: argparse.Namespace) -> None:
    """End the process when an option is the empty text, as from a shell variable that is not set: as a path it is this folder."""
    for action in parser._actions:
        given = getattr(options, action.dest, None)
        if action.option_strings and action.default != "" and "" in (given if isinstance(given, list) else [given]):
            parser.error(f"argument {action.option_strings[0]}: is empty; give a value")


@contextmanager
def exit_status(prog: str, resumes: bool) -> Iterator[None]:
    """End the process with one line and the status of this module when what is inside fails."""
    from i3cl.errors import UserError, inside

    try:
        with streams():
            # `ray job stop`, and a machine that goes down, send SIGTERM some seconds before they kill.
            signal.signal(signal.SIGTERM, signal.default_int_handler)
            yield
    except KeyboardInterrupt:
        then = "the same command continues where it stopped" if resumes else "the same command starts from the beginning"
        _complain(f"{prog}: interrupted; {then}")
        sys.exit(130)
    except Exception as error:
        from i3cl.storage import NoAnswer

        # Also one that Ray wrapped on its way from a worker.
        if mistake := inside(error, UserError):
            _complain(f"{prog}: {mistake}")
            sys.exit(2)
        lost = inside(error, NoAnswer)
        if lost is None:
            raise
        _complain(f"{prog}: {lost}")
        sys.exit(1)


@contextmanager
def streams() -> Iterator[None]:
    """Inside, any text can be printed, and a reader that closes stdout ends the process quietly with status 141.

    File names that are not UTF-8 and characters that the terminal lacks are printed as escapes.
    """
    if sys.stdout is None:  # started with stdout closed: otherwise the next file that is opened would become stdout
        sys.stdout = open(os.devnull, "w")  # noqa: SIM115  # stays open to the end
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, TextIOWrapper):
            stream.reconfigure(errors="backslashreplace")
    try:
        try:
            yield
        finally:
            sys.stdout.flush()
    except OSError as error:
        # A broken pipe can also be a connection of Ray or of S3.
        if not isinstance(error, BrokenPipeError) or not _reader_is_gone():
            raise
        _discard_output()
        sys.exit(141)


def _reader_is_gone() -> bool:
    try:
        poll = select.poll()
        poll.register(sys.stdout.fileno(), 0)
        return bool(poll.poll(0))
    except (OSError, ValueError):
        return False


def _discard_output() -> None:
    """Keep the interpreter from complaining about the closed stdout when it flushes at its end."""
    null = os.open(os.devnull, os.O_WRONLY)
    os.dup2(null, sys.stdout.fileno())
    os.close(null)


def _complain(message: str) -> None:
    from i3cl import observe

    with suppress(BrokenPipeError):
        observe.complain(message)


# -------------------------------------------------------------------------------------------------------------- completion


def complete(parser: argparse.ArgumentParser) -> None:
    """Answer the shell and end the process when it asks for completions (``eval "$(register-python-argcomplete i3cl)"``)."""
    if "_ARGCOMPLETE" in os.environ:
        import argcomplete

        argcomplete.autocomplete(parser)


def completed_word(parser: argparse.ArgumentParser, known: Mapping[str, Any]) -> str | None:
    """While the shell asks for completions: the command that is already typed in full, so that its own parser answers.

    Without one, `parser` answers. None when the shell asks for nothing.
    """
    if "_ARGCOMPLETE" not in os.environ:
        return None
    typed, position = os.environ["COMP_LINE"][: int(os.environ["COMP_POINT"])].split(" "), int(os.environ["_ARGCOMPLETE"])
    words = [word for word in typed[:-1] if word]
    if len(words) > position and words[position] in known:
        os.environ["_ARGCOMPLETE"] = str(position + 1)
        return words[position]
    complete(parser)
    return None


def _complete_recipe(prefix: str, **_: Any) -> list[str]:
    from i3cl.config.loading import recipe_names

    files = [str(path) for path in Path().glob(f"{prefix}*") if path.suffix == ".yaml" or path.is_dir()] if prefix else []
    return [*recipe_names(), *files]


def _complete_setting(prefix: str, **_: Any) -> list[str]:
    from i3cl.config.loading import setting_names

    return [f"{name}=" for name in setting_names()]
