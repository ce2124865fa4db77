"""Times the network, labelling and fusion; every command has its own --help."""

import argparse
import sys
from typing import Any


def step(options: argparse.Namespace) -> str:
    from i3cl.model.benchmark import step_report

    return step_report(options.runs, options.side, options.threads)


def model(options: argparse.Namespace) -> str:
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
    from i3cl.config import LabelSettings
    from i3cl.labelling.benchmark import label_report

    settings = LabelSettings(batch=options.batch, actors=options.actors, threads=options.threads)
    return label_report(options.checkpoint, options.images, options.count, options.runs, settings)


def fusion(options: argparse.Namespace) -> str:
    from i3cl.labelling.fusion_benchmark import fusion_report

    return fusion_report(options.threads)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    commands = parser.add_subparsers(required=True, metavar="COMMAND")
    for work, text in (
        (step, "a training step beside torchvision's Mask R-CNN"),
        (model, "images a second, peak memory and each part's share"),
        (label, "images a second of the labelling pipeline beside a plain loop over decoded images"),
        (fusion, "seconds to fuse an ensemble's predictions of 1,000 images"),
    ):
        command = commands.add_parser(work.__name__, help=text, description=text)
        command.set_defaults(work=work)
        command.add_argument("--threads", type=int, default=0 if work is label else 2, help="CPU threads")
        if work is not fusion:
            command.add_argument("--runs", type=int, default=5 if work is step else 3, help="timed runs, of each in turn")
        if work in (step, model):
            command.add_argument("--side", type=int, default=640, help="image side in pixels")
        if work in (model, label):
            command.add_argument("--batch", type=int, default=1 if work is model else 4, help="images at once")
        if work is model:
            command.add_argument("--backbone", default="resnet50", help="as model.backbone.name; vitaev2_s trains everything")
            command.add_argument("--device", choices=["cpu", "cuda"], default="cpu")
            command.add_argument("--precision", choices=["float32", "bfloat16"], default="float32")
            command.add_argument("--checkpointing", action="store_true", help="as model.backbone.checkpointing")
            command.add_argument("--compile", default="none", help="as model.compile")
        if work is label:
            command.add_argument("--checkpoint", required=True, metavar="DIR")
            command.add_argument("--images", required=True, metavar="FOLDER")
            command.add_argument("--count", type=int, default=400, metavar="N", help="images of one run")
            command.add_argument("--actors", type=int, default=0, help="as label.actors")
    options = parser.parse_args()
    from i3cl.errors import UserError

    try:
        print(options.work(options))
    except UserError as error:
        print(f"benchmark.py: {error}", file=sys.stderr)
        sys.exit(2)
