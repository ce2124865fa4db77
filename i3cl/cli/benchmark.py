"""Times the network, labelling and fusion, and what happens at scale; every command has its own --help."""

from __future__ import annotations

import argparse
from typing import Any

from i3cl.cli.command_line import Parser, called, complete, exit_status


def step(options: argparse.Namespace) -> str:
    """A training step beside torchvision's Mask R-CNN."""
    from i3cl.model.benchmark import step_report

    return step_report(options.runs, options.side, options.threads)


def model(options: argparse.Namespace) -> str:
    """Images per second and peak memory of the network."""
    import torch

    from i3cl.config import BackboneSettings, ModelSettings
    from i3cl.errors import UserError
    from i3cl.model.benchmark import model_report

    if options.device == "cuda" and not torch.cuda.is_available():
        raise UserError("--device cuda: torch sees no GPU here; use --device cpu")
    torch.set_num_threads(options.threads)
    trained: dict[str, Any] = {"frozen_stages": 0, "norm_eval": False} if options.backbone == "vitaev2_s" else {}
    backbone = BackboneSettings(name=options.backbone, checkpointing=options.checkpointing, **trained)
    settings = ModelSettings(backbone=backbone, num_classes=1, compile=options.compile)
    return model_report(settings, options.side, options.batch, options.device, options.runs, options.precision)


def label(options: argparse.Namespace) -> str:
    """Images per second of the labelling pipeline."""
    from i3cl.config import LabelSettings
    from i3cl.labelling.benchmark import label_report

    settings = LabelSettings(batch=options.batch, actors=options.actors, threads=options.threads)
    return label_report(options.checkpoint, options.images, options.count, options.runs, settings)


def fusion(options: argparse.Namespace) -> str:
    """Seconds to fuse the predictions of an ensemble."""
    from i3cl.labelling.fusion_benchmark import fusion_report

    return fusion_report(options.threads)


def gpu(options: argparse.Namespace) -> str:
    """Everything that is worth knowing of one GPU, in less than ten minutes."""
    import torch

    from i3cl.errors import UserError
    from i3cl.training.gpu_benchmark import PAPER, gpu_report

    if not torch.cuda.is_available():
        raise UserError("benchmark gpu: torch sees no GPU here; use benchmark model --device cpu")
    lines = gpu_report(PAPER, "cuda", options.out, lambda line: print(line, flush=True))
    return f"{len(lines)} lines in {options.out}, {sum('error' in line for line in lines)} of them errors"


def scale(options: argparse.Namespace) -> str:
    """Labelling with GPUs that come, go, slow down and hang, ten million images, a thousand trials, requests to S3."""
    from i3cl.scale import scale_report

    print("| row | measured | limit | within |\n|---|---|---|---|", flush=True)
    rows = scale_report(options.only, options.s3, options.out, lambda line: print(line, flush=True))
    return f"{sum(row.get('passed', False) for row in rows)} of {len(rows)} rows are within their limits; {options.out}"


COMMANDS = {
    "step": (step, "a training step beside torchvision's Mask R-CNN"),
    "model": (model, "images per second, peak memory and the share of each part"),
    "label": (label, "images per second of the labelling pipeline beside a plain loop over decoded images"),
    "fusion": (fusion, "seconds to fuse an ensemble's predictions of 1,000 images"),
    "scale": (scale, "pretended GPUs that come, go, slow down and hang; ten million images, a thousand trials, requests"),
    "gpu": (gpu, "parity, training beside torchvision, waits, labelling and resumption on one GPU, as JSON"),
}


def parser() -> Parser:
    """The command line of all of them."""
    parser = Parser(prog=called(), description=__doc__)
    commands = parser.add_subparsers(required=True, metavar="COMMAND", dest="command")
    for name, (work, text) in COMMANDS.items():
        command = commands.add_parser(name, help=text, description=text)
        command.set_defaults(work=work)
        if name in ("gpu", "scale"):
            command.add_argument("--out", default=f"docs/{name}.json", metavar="FILE", help="where the lines go")
            if name == "scale":
                command.add_argument("--only", nargs="*", default=[], metavar="ROW", help="names of rows, e.g. joins slow")
                text = "also count requests, in new folders below this one, which are removed afterwards"
                command.add_argument("--s3", metavar="URL", help=text)
            continue
        command.add_argument("--threads", type=int, default=0 if name == "label" else 2, help="CPU threads")
        if name != "fusion":
            command.add_argument("--runs", type=int, default=5 if name == "step" else 3, help="timed runs, of each in turn")
        if name in ("step", "model"):
            command.add_argument("--side", type=int, default=640, help="image side in pixels")
        if name in ("model", "label"):
            command.add_argument("--batch", type=int, default=1 if name == "model" else 4, help="images at once")
        if name == "model":
            command.add_argument("--backbone", default="resnet50", help="as model.backbone.name; vitaev2_s trains everything")
            command.add_argument("--device", choices=["cpu", "cuda"], default="cpu")
            command.add_argument("--precision", choices=["float32", "bfloat16"], default="float32")
            command.add_argument("--checkpointing", action="store_true", help="as model.backbone.checkpointing")
            command.add_argument("--compile", default="none", help="as model.compile")
        if name == "label":
            command.add_argument("--checkpoint", required=True, metavar="DIR")
            command.add_argument("--images", required=True, metavar="FOLDER")
            command.add_argument("--count", type=int, default=400, metavar="N", help="images of one run")
            command.add_argument("--actors", type=int, default=0, help="as label.actors")
    return parser


def main() -> None:
    """Parse the arguments, time, print."""
    from i3cl import observe

    options_of = parser()
    complete(options_of)
    options = options_of.parse_args()
    with exit_status(f"{options_of.prog} {options.command}", resumes=False), observe.console():
        print(options.work(options))
