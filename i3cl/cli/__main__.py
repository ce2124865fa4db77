"""The command `i3cl`: a map of the product; every command is one file of this package."""

# PYTHON_ARGCOMPLETE_OK
from __future__ import annotations

import importlib
import sys
from pathlib import Path

from i3cl.cli.command_line import Parser, completed_word, nearest, streams

GROUPS = {
    "data": {"prepare": "import, make, split, degrade, draw and export data sets; convert original weights"},
    "training": {
        "train": "train one recipe with Ray Train",
        "selftrain": "the whole circle: teachers, pseudo labels, student, evaluation, report",
        "study": "train the arms of a study with several seeds and compare them, with intervals",
    },
    "labels": {
        "label": "predict with an ensemble, select pseudo labels, measure how far to trust them, audit given labels",
        "members": "the detectors that can take part in an ensemble: licence, installed or not, options",
        "search": "search thresholds, loss weights or any other settings with Ray Tune",
    },
    "measuring": {
        "evaluate": "score results or checkpoints by the protocols of the field",
        "lineage": "what a run was made from: weights, predictions, labels; and what of it is stale",
        "benchmark": "time and memory of training, labelling and fusion",
    },
    "running": {
        "predict": "find text in images with a checkpoint",
        "demo": "a local page to try a checkpoint on photographs",
        "export-onnx": "a checkpoint as one ONNX file that runs without PyTorch",
    },
}
"""Group -> command -> what it does."""
COMMANDS = {name: line for group in GROUPS.values() for name, line in group.items()}


def page() -> str:
    """The text of ``i3cl --help``."""
    width = max(map(len, COMMANDS))
    lines = ["usage: i3cl COMMAND [--config RECIPE] [key=value ...]", ""]
    lines += ["Find text of any shape in photographs: train detectors, label with ensembles, train on the labels."]
    for group, commands in GROUPS.items():
        lines += ["", f"{group}:", *(f"  {name:{width}}  {line}" for name, line in commands.items())]
    lines += [
        "",
        "i3cl COMMAND --help says more; --dry-run prints the resolved settings and starts nothing.",
        "RECIPE is a YAML file or the name of one that is included: quickstart, realtext, r50/mixtrain, ...",
        "Settings: i3cl/config/settings.py lists all. i3cl --version prints the version.",
    ]
    return "\n".join(lines) + "\n"


def main() -> None:
    """Run the command that the first argument names."""
    parser = Parser(prog="i3cl", add_help=False)
    parser.add_argument("command", choices=list(COMMANDS), nargs="?")
    name = completed_word(parser, COMMANDS) or (sys.argv[1] if len(sys.argv) > 1 else "--help")
    name = Path(name).stem if name.endswith(".py") else name
    with streams():
        if name in ("-h", "--help", "help"):
            print(page(), end="")
            return
        if name in ("-V", "--version", "version"):
            from i3cl import __version__

            print(f"i3cl {__version__}")
            return
        if name not in COMMANDS:
            parser.exit(2, f"i3cl: no command {name!r}{nearest(name, list(COMMANDS))}; i3cl --help lists all\n")
    # Every command reads the process's arguments, so that jobs/*.py and this one share its code.
    sys.argv = [f"i3cl {name}", *sys.argv[2:]]
    importlib.import_module(f"i3cl.cli.{name.replace('-', '_')}").main()


if __name__ == "__main__":
    main()
