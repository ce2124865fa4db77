"""Times the network and the pipelines; every command has its own --help."""

import argparse
import sys


def step(options: argparse.Namespace) -> str:
    from i3cl.model.benchmark import step_report

    return step_report(options.runs, options.side, options.threads)


def label(options: argparse.Namespace) -> str:
    from i3cl.config import LabelSettings
    from i3cl.labelling.benchmark import label_report

    settings = LabelSettings(batch=options.batch, actors=options.actors, threads=options.threads)
    return label_report(options.checkpoint, options.images, options.count, options.runs, settings)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    commands = parser.add_subparsers(required=True, metavar="COMMAND")

    text = "a training step beside torchvision's Mask R-CNN"
    command = commands.add_parser("step", help=text, description=text)
    command.set_defaults(work=step)
    command.add_argument("--runs", type=int, default=5, help="timed runs of each, in turn")
    command.add_argument("--side", type=int, default=640, help="image side in pixels")
    command.add_argument("--threads", type=int, default=2, help="CPU threads")

    text = "images a second of the labelling pipeline beside a plain loop over decoded images"
    command = commands.add_parser("label", help=text, description=text)
    command.set_defaults(work=label)
    command.add_argument("--checkpoint", required=True, metavar="DIR")
    command.add_argument("--images", required=True, metavar="FOLDER")
    command.add_argument("--count", type=int, default=400, metavar="N", help="images of one run")
    command.add_argument("--runs", type=int, default=3, help="timed runs of each, in turn")
    command.add_argument("--batch", type=int, default=4, help="images at once")
    command.add_argument("--actors", type=int, default=0, help="as label.actors")
    command.add_argument("--threads", type=int, default=0, help="as label.threads")

    options = parser.parse_args()
    from i3cl.config import UserError

    try:
        print(options.work(options))
    except UserError as error:
        print(f"benchmark.py: {error}", file=sys.stderr)
        sys.exit(2)
