"""Serve a page on this machine to try a detector on: choose a photograph, see the texts, download the labels."""

import argparse
from typing import TYPE_CHECKING

from i3cl.cli.command_line import run
from i3cl.config import Settings
from i3cl.model.shipped import DEFAULT

if TYPE_CHECKING:
    from i3cl.deploy.demo import Detector


def work(settings: Settings, options: argparse.Namespace) -> None:
    from i3cl.errors import UserError

    try:
        from i3cl.deploy.demo import serve
    except ModuleNotFoundError as error:
        if error.name not in ("starlette", "uvicorn"):
            raise
        raise UserError(f"the page needs the package {error.name}: pip install 'i3cl[demo]'") from error
    serve(_detector(options.checkpoint, settings), options.checkpoint, options.port, _tell)


def _detector(checkpoint: str, settings: Settings) -> "Detector":
    if checkpoint.endswith(".onnx"):
        from i3cl.deploy import OnnxPredictor

        predictor = OnnxPredictor(checkpoint)
        return lambda image: predictor.detect(image, 0.0)
    import i3cl
    from i3cl.inference.device import choose_device

    model = i3cl.load(checkpoint, choose_device(settings.cluster.gpu))
    return lambda image: i3cl.detect(model, [image], 0.0)[0]


def _tell(address: str) -> None:
    print(f"open {address} in a browser on this machine; Ctrl-C ends it", flush=True)


def arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--checkpoint",
        default=DEFAULT,
        metavar="DIR",
        help=f"directory that training wrote, or a file of i3cl export-onnx (default: {DEFAULT} of the package)",
    )
    parser.add_argument("--port", type=int, choices=range(65536), default=8000, metavar="N", help="0: a free one (default 8000)")


def main() -> None:
    run(work, __doc__, arguments)
