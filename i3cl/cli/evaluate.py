"""Score result files against truth by a named protocol, or a checkpoint on labelled images.

Files:       python jobs/evaluate.py --protocol icdar --truth gt.zip --results det.zip [--json OUT]
Checkpoint:  python jobs/evaluate.py --config RECIPE.yaml label.members.NAME=CHECKPOINT   (polygon IoU and COCO mask AP)

Truth and results are recognised by their content: text files in a zip or folder, ArT/LSVT json, COCO json, Parquet.
docs/evaluation.md lists protocols and formats.
"""

import argparse

from i3cl.cli.command_line import run
from i3cl.config import Settings
from i3cl.errors import UserError


def work(settings: Settings, options: argparse.Namespace) -> None:
    from i3cl.evaluation.command import evaluate_checkpoints, evaluate_files

    if options.truth or options.results:
        if not options.truth or not options.results:
            raise UserError("--truth and --results belong together: give both, or neither for a checkpoint")
        evaluate_files(settings, options)
    else:
        evaluate_checkpoints(settings, options)


def arguments(parser: argparse.ArgumentParser) -> None:
    from i3cl.evaluation.metrics.protocols import AP_PROTOCOLS, PROTOCOLS

    add = parser.add_argument
    add("--truth", metavar="T", help="truth: zip or folder of text files, ArT/LSVT json, COCO json, Parquet")
    add("--results", metavar="R", help="results: the same forms, a predictions folder, COCO results, ArT submission")
    add("--protocol", default="icdar", metavar="NAME", help=f"one of {', '.join([*PROTOCOLS, *AP_PROTOCOLS])} (icdar)")
    add("--json", metavar="OUT", help="also write the numbers here")
    add("--report", metavar="OUT.html", help="also write a page with tables, curves and the worst images")
    add("--images", metavar="ROOT", help="images root, for the report's pictures")
    add("--against", metavar="R2", help="a second result on the same truth: is the difference real?")
    add("--member", metavar="NAME", help="which of a predictions folder's members")
    add("--truth-format", metavar="NAME", help="read the truth with this data set's importer, e.g. totaltext, mlt")
    add("--truth-split", choices=["train", "test"], default="test", help="part of that data set (test)")
    add("--point-order", choices=["xy", "yx"], default="xy", help="yx: result files that list y first (official Total-Text)")
    add("--threshold", type=float, metavar="S", help="count detections with a score above this (all)")
    add(
        "--choose-threshold-on",
        nargs="+",
        metavar="PART",
        help="choose the threshold of the best F on a share of the images (0.2), on those a file lists, or on TRUTH RESULTS; "
        "then score the others with it",
    )
    add("--sweep", action="store_true", help="R, P and F over the score threshold (never a result to publish)")
    add("--details", action="store_true", help="kinds of error; recall and precision by size, aspect, curvature, language")
    add("--diagnose", action="store_true", help="try the usual mistakes of result files even when F is not low")
    add("--iou", type=float, help="IoU threshold in place of the protocol's")
    add("--matching", choices=["first", "best_gt", "max", "greedy"], help="matching order in place of the protocol's")
    add("--tr", type=float, help="DetEval: recall threshold (0.7)")
    add("--tp", type=float, help="DetEval: precision threshold (0.6)")
    add("--merge", choices=["python", "matlab"], help="DetEval: which script's rule for merges (python)")
    add("--repair", choices=["make_valid", "buffer0"], help="how self-intersecting polygons are repaired")
    add(
        "--pre-steps",
        choices=["none", "adelaidet"],
        default="none",
        help="adelaidet: score > 0.1, whole pixels, valid rings only",
    )
    add("--max-detections", type=int, metavar="N", help="coco: best detections used per image (that of the fullest image)")
    add("--ray", action="store_true", help="spread over Ray; truth and results as Parquet, any number of images")


def main() -> None:
    run(work, __doc__, arguments, resumes=False)
