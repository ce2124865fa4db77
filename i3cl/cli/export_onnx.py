"""Write a checkpoint as one ONNX file that finds text by onnxruntime, without torch: the whole network, all sizes of images."""

import argparse
import re

from i3cl.cli.command_line import run
from i3cl.config import Settings
from i3cl.model.shipped import DEFAULT


def work(settings: Settings, options: argparse.Namespace) -> None:
    from i3cl.deploy.export import export_onnx

    done = export_onnx(options.checkpoint, options.out, options.size, "float16" if options.half else "float32")
    shape = "images of any size" if options.size is None else f"images up to {options.size[0]} x {options.size[1]} pixels"
    print(f"{options.out}: {done.bytes / 1e6:.1f} MB, {done.nodes} operators, {shape}")
    if options.check:
        _check(options)
    print(f"next: i3cl demo --checkpoint {options.out}")


def _check(options: argparse.Namespace) -> None:
    from itertools import islice

    import torch

    import i3cl
    from i3cl import storage
    from i3cl.data.loading.endings import images_in
    from i3cl.data.loading.images import decode_image
    from i3cl.deploy import OnnxPredictor
    from i3cl.deploy.compare import compare

    names = images_in(options.check)
    torch.set_num_threads(options.threads)
    network, predictor = i3cl.load(options.checkpoint, device="cpu"), OnnxPredictor(options.out, options.threads)
    images = (decode_image(storage.join(options.check, name), upright=predictor.upright) for name in islice(names, 50))
    print(f"{options.threads} threads, {compare(network, predictor, images)}")


def arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "checkpoint",
        nargs="?",
        default=DEFAULT,
        metavar="CHECKPOINT",
        help=f"directory that training wrote, local or s3:// (default: {DEFAULT} of the package)",
    )
    parser.add_argument("--out", required=True, metavar="FILE.onnx")
    size = parser.add_mutually_exclusive_group()
    size.add_argument("--dynamic", action="store_true", help="images of any size (the default)")
    size.add_argument(
        "--size", type=_size, metavar="HxW", help="pad every image to HEIGHTxWIDTH pixels, multiples of 32, inside the graph"
    )
    parser.add_argument("--check", metavar="FOLDER", help="compare with PyTorch on up to 50 images of this folder")
    parser.add_argument("--threads", type=int, default=1, metavar="N", help="CPU threads of the comparison (default 1)")
    parser.add_argument("--half", action="store_true", help="store the weights as float16: half the file, the same speed")


def _size(text: str) -> tuple[int, int]:
    found = re.fullmatch(r"(\d{1,5})[xX](\d{1,5})", text)
    if not found:
        raise argparse.ArgumentTypeError(f"'{text}' is not HEIGHTxWIDTH, e.g. 640x1024")
    return int(found[1]), int(found[2])


def main() -> None:
    run(work, __doc__, arguments)
