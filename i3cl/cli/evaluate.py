"""Score result files against truth by a named protocol, or a checkpoint on labelled images.

Files:       python jobs/evaluate.py --protocol icdar --truth gt.zip --results det.zip [--json OUT]
Checkpoint:  python jobs/evaluate.py --config RECIPE.yaml label.members.NAME=CHECKPOINT   (polygon IoU and COCO mask AP)

Truth and results are recognised by their content: text files in a zip or folder, ArT/LSVT json, COCO json, Parquet.
docs/evaluation.md lists protocols and formats.
"""

import argparse
import json
import sys
import time
from dataclasses import fields
from typing import Any

from i3cl import storage
from i3cl.cli.command_line import run
from i3cl.config import Settings
from i3cl.errors import UserError


def work(settings: Settings, options: argparse.Namespace) -> None:
    """Scores files when --truth and --results are given, else checkpoints."""
    if options.truth or options.results:
        if not options.truth or not options.results:
            raise UserError("--truth and --results belong together: give both, or neither for a checkpoint")
        _files(settings, options)
    else:
        _checkpoints(settings, options)


def _files(settings: Settings, options: argparse.Namespace) -> None:
    """Scores --results against --truth by --protocol, prints, and writes --json and --report."""
    from i3cl.evaluation.command import Options, check_over_ray, evaluate_files, evaluate_over_ray

    given = {each.name: getattr(options, each.name) for each in fields(Options)}
    inputs = options.truth, options.results, options.against, *(options.choose_threshold_on or ())
    for written in filter(None, (options.json, options.report)):
        storage.refuse_to_overwrite(written, *inputs)
    asked = Options(**given | {"report": bool(options.report), "skip_bad": settings.data.skip_bad})
    if options.ray:
        check_over_ray(asked)
        _connect()
        result = evaluate_over_ray(asked, _Progress())
    else:
        result = evaluate_files(asked)
    for warning in result.warnings:
        print(f"warning: {warning}", file=sys.stderr)
    print("\n".join(result.lines))
    _write_json(options.json, result.values)
    if options.report and result.scored is not None:
        from i3cl.report.evaluation import write_evaluation_report

        upright = settings.data.upright
        write_evaluation_report(options.report, result.scored, result.values, result.rival, options.images, upright=upright)
        print(f"report: {options.report}")


def _connect() -> None:
    from i3cl.runtime.cluster import connect, quiet

    connect()
    import ray

    quiet(ray.data.DataContext.get_current())


class _Progress:
    """Prints every ten seconds how many parts are done, and at the end."""

    def __init__(self) -> None:
        self.started = self.said = time.monotonic()

    def __call__(self, done: int, every: int) -> None:
        from i3cl.runtime.pace import duration

        now = time.monotonic()
        if now - self.said > 10 or done == every:
            left = (now - self.started) / done * (every - done)
            print(f"{done} of {every} parts, {duration(left)} left", flush=True)
            self.said = now


def _checkpoints(settings: Settings, options: argparse.Namespace) -> None:
    """Scores label.members on data.validation by polygon IoU and COCO mask AP."""
    from i3cl.data.loading.ingest import read_source
    from i3cl.labelling.scoring import score_checkpoints

    if settings.data.validation is None:
        raise UserError(
            "data.validation: names no labelled images; add {annotations: FILE.json, images: FOLDER}, "
            "or score files with --truth and --results"
        )
    if not settings.label.members:
        raise UserError("label.members: names no checkpoint; add label.members.NAME=CHECKPOINT_DIRECTORY")
    truth = read_source(settings.data.validation, settings.data_root, settings.data.skip_bad)
    out = storage.join(storage.absolute(settings.storage), settings.name, "predictions", "validation")
    result = {}
    for name, measured in score_checkpoints(truth, settings.label.members, settings, out, "evaluate").members.items():
        score = measured.score
        result[name] = vars(score)
        print(
            f"{name}: R {score.recall:.4f}  P {score.precision:.4f}  F {score.hmean:.4f}  (short side >= "
            f"{settings.evaluate.small_side:g} px: F {score.hmean_large:.4f})  mask AP50 {score.mask_ap50:.4f}"
        )
        print(f"  {score.rules}")
    _write_json(options.json, result)


def _write_json(path: str | None, values: dict[str, Any]) -> None:
    if path:
        storage.write_text_atomic(path, json.dumps(values, indent=1) + "\n")
        print(f"numbers: {path}")


def arguments(parser: argparse.ArgumentParser) -> None:
    """Adds the options of this command."""
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
        help="choose the threshold with the best F on a share of the images (0.2), on those a file lists, or on TRUTH RESULTS; "
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
    add("--ray", action="store_true", help="spread over Ray; truth as Parquet, any number of images")


def main() -> None:
    """Run the command line."""
    run(work, __doc__, arguments, resumes=False)
