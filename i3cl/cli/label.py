"""Label unlabelled images with an ensemble.

predict     the members predict the images: GPU actors, Parquet out
add-member  one more member for predictions that are there: `i3cl label add-member NAME --results FILES`, or the detector that
            label.members.NAME says
select      thresholds turn the predictions into pseudo labels: COCO json or Parquet out
all         predict and select
trust       compare fused predictions of labelled images with their truth: report, calibration.json, members.json, disputed.json
agree       what the members' scores mean, learned without truth from how often members confirm each other: members.json
checked     recall, precision and F, with intervals, from the answers that a page of `i3cl selftrain` without labels has saved
audit       find given labels that an ensemble contradicts which has not seen the images: report, audit.json, audit.csv
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from dataclasses import replace
from typing import TYPE_CHECKING

from i3cl.cli.command_line import run
from i3cl.config import Settings
from i3cl.errors import UserError

if TYPE_CHECKING:
    from i3cl.data.formats.records import Dataset
    from i3cl.labelling.member_scores import MemberScores


def work(settings: Settings, options: argparse.Namespace) -> None:
    """Run the command."""
    from i3cl import storage
    from i3cl.labelling.estimate import estimate
    from i3cl.labelling.label import select_labels, unlabelled_images, unlabelled_root
    from i3cl.labelling.predict import predict

    folder = storage.join(storage.absolute(settings.storage), settings.name)
    predictions = storage.join(folder, "predictions", "unlabelled")
    if options.step == "add-member":
        add_member(settings, options, predictions)
    if options.step in ("predict", "all"):
        images = unlabelled_images(settings)
        if images.problems:
            print(images.summary())
        if options.estimate:
            print("\n".join(estimate(images, settings.label.members, settings, predictions).lines()))
            return
        predict(images, settings.label.members, settings, predictions, "predict")
        print(f"predictions: {predictions}")
    if options.step in ("select", "all"):
        labels = select_labels(predictions, settings.label, folder, unlabelled_root(settings))
        shown = [f"{key} {value:.3f}" if isinstance(value, float) else f"{key} {value}" for key, value in labels.counts.items()]
        print("  ".join(shown))
        print(f"pseudo labels: {labels.path}")
    if options.step == "checked":
        checked(options)
    if options.step == "agree":
        agree(settings, options, folder)
    if options.step == "trust":
        trust(settings, options, folder)
    if options.step == "audit":
        audit(settings, options, folder)


def add_member(settings: Settings, options: argparse.Namespace, predictions: str) -> None:
    """Add a member to the job in the folder `predictions`, or begin one with it."""
    from i3cl.config import MemberSettings
    from i3cl.labelling import predict
    from i3cl.labelling.label import unlabelled_images

    name = options.name
    if not name:
        raise UserError("add-member: names no member; write i3cl label add-member NAME --results FILES")
    if options.results:
        chosen = {"results": options.results, "format": options.format, "granularity": options.granularity}
        member = MemberSettings.model_validate(chosen)
    elif name in settings.label.members:
        member = settings.label.members[name]
    else:
        raise UserError(
            f"--results: names no file; give one, or say what {name} is with label.members.{name}.use=… or .weights=…"
        )
    images = unlabelled_images(settings)
    if images.problems:
        print(images.summary())
    predict.add_member(images, name, member, settings, predictions, f"add {name}")
    print(f"predictions: {predictions}")


def agree(settings: Settings, options: argparse.Namespace, folder: str) -> None:
    """Learn from agreement what the members' scores mean; write members.json."""
    from i3cl import storage
    from i3cl.labelling.label import learn_agreement
    from i3cl.labelling.member_scores import write_member_scores

    given = options.predictions
    if len(given) > 1:
        raise UserError("--predictions: agree takes one folder; several belong to audit")
    found = learn_agreement(given[0] if given else storage.join(folder, "predictions", "unlabelled"), settings.label)
    path = storage.join(options.out or storage.join(folder, "agreement"), "members.json")
    write_member_scores(path, found)
    _show(found)
    print(f"{path}: use it with label.fusion.member_scores={path}")


def checked(options: argparse.Namespace) -> None:
    """Print the estimate that a person's answers yield."""
    from i3cl.report.check import estimate

    if not options.answers:
        raise UserError("--answers: names no file; give what the page's “Save answers” has written")
    found = estimate(options.answers)
    for name in ("recall", "precision", "hmean"):
        interval = getattr(found, f"{name}_interval")
        title = "F" if name == "hmean" else name
        print(f"{title}: {getattr(found, name):.3f}  (95 % interval {interval.low:.3f} to {interval.high:.3f})")
    print(f"of what has a score above {found.threshold:g}, from {found.images} images checked by eye")


def _show(found: MemberScores) -> None:
    """One line for each member: what its scores mean."""
    what = "right" if found.learned_from == "truth" else "confirmed by others"
    for name, own in found.members.items():
        row = "score: expected precision  " + "  ".join(f"{s:.1f}: {own([s])[0]:.2f}" for s in (0.1, 0.3, 0.5, 0.7, 0.9))
        if name in found.unlearned:
            row = "too few to learn from, the scores stay as they are"
        print(f"{name}: {own.instances} findings, {found.confirmed[name]:.2f} {what}; {row}")


def trust(settings: Settings, options: argparse.Namespace, folder: str) -> None:
    """Measure how far the labels can be trusted; write the report, calibration.json and disputed.json."""
    from i3cl import storage
    from i3cl.labelling.calibration import write_calibration
    from i3cl.labelling.member_scores import scores_by_truth, write_member_scores
    from i3cl.labelling.trust import diverse_order, exif_of_predictions, measure_trust, write_disputed
    from i3cl.report.trust import write_trust_report

    dataset = _labelled(settings, options)
    given = options.predictions
    if len(given) > 1:
        raise UserError("--predictions: trust takes one folder; several belong to audit")
    predictions = given[0] if given else storage.join(folder, "predictions", "validation")
    exif = exif_of_predictions(predictions, settings)
    found = measure_trust(predictions, dataset.records, settings.label, settings.evaluate)
    out = options.out or storage.join(folder, "trust")
    write_calibration(storage.join(out, "calibration.json"), found.calibration)
    if settings.label.trust.order == "diverse":
        turned = exif == "upright"
        found = replace(found, disputed=diverse_order(found.disputed, len(found.members), dataset.images_root, upright=turned))
    write_disputed(storage.join(out, "disputed.json"), found.disputed)
    meaning = scores_by_truth(predictions, dataset.records, settings.evaluate)
    write_member_scores(storage.join(out, "members.json"), meaning)
    title = f"Trust in the labels: {settings.name}"
    write_trust_report(storage.join(out, "report.html"), found, dataset.images_root, title, upright=exif == "upright")
    for row in [found.ensemble, *found.members]:
        print(f"{row.name}: R {row.recall:.4f}  P {row.precision:.4f}  F {row.hmean:.4f}  (score > {row.threshold:.2f})")
    gain, low, high = (100 * value for value in found.gain)
    print(f"ensemble over its best member: {gain:+.1f} points (95 % of bootstrap draws {low:+.1f} to {high:+.1f})")
    _show(meaning)
    print(f"report, calibration.json, members.json, disputed.json: {out}")


def audit(settings: Settings, options: argparse.Namespace, folder: str) -> None:
    """Find labels that the ensemble contradicts; write the report, audit.json and audit.csv."""
    from i3cl import storage
    from i3cl.labelling.audit import audit_labels, write_audit, write_audit_table
    from i3cl.labelling.trust import exif_of_predictions
    from i3cl.report.audit import write_audit_report

    dataset = _labelled(settings, options)
    folders = options.predictions
    if not folders:
        raise UserError("--predictions: names no folder; give one for each fold, of members trained without it")
    made = {exif_of_predictions(each, settings) for each in folders}
    if len(made) > 1:
        raise UserError("--predictions: were made with different data.exif; predict again with one")
    found = audit_labels(folders, dataset.records, settings.label)
    out = options.out or storage.join(folder, "audit")
    write_audit(storage.join(out, "audit.json"), found)
    write_audit_table(storage.join(out, "audit.csv"), found)
    title = f"Audit of the labels: {settings.name}"
    write_audit_report(storage.join(out, "report.html"), found, dataset.images_root, title, upright=made == {"upright"})
    for title, names in (("without predictions", found.unpredicted), ("that could not be read", found.unreadable)):
        if names:
            more = f" and {len(names) - 5} more" if len(names) > 5 else ""
            print(f"not compared: {len(names)} images {title}: {', '.join(names[:5])}{more}")
    print("  ".join(f"{kind} {count}" for kind, count in found.counts().items()))
    print(f"{found.labels} labels in {found.images} images compared; {len(found.ranking)} images with a problem")
    print(f"report, audit.json, audit.csv: {out}")


def _labelled(settings: Settings, options: argparse.Namespace) -> Dataset:
    """The set of --truth and --images, else data.validation."""
    from i3cl import storage
    from i3cl.config import SourceSettings
    from i3cl.data.loading.ingest import read_source

    source = settings.data.validation
    if options.truth or options.images:
        if not (options.truth and options.images):
            raise UserError("--truth and --images: give both: a COCO json and the folder of its images")
        source = SourceSettings(annotations=storage.absolute(options.truth), images=storage.absolute(options.images))
    if source is None:
        raise UserError("--truth: names no labelled set; give --truth SET.json --images FOLDER or data.validation")
    return read_source(source, settings.data_root, settings.data.skip_bad)


def arguments(parser: argparse.ArgumentParser) -> None:
    """Add the arguments of this command."""
    parser.add_argument(
        "step",
        choices=("predict", "add-member", "select", "all", "agree", "trust", "checked", "audit"),
        help="what to do (see above); select, agree, trust and audit need no GPU",
    )
    parser.add_argument("--name", help=argparse.SUPPRESS)
    text = "predict: label 50 images, say what the whole job will take (time, GPU-hours, money, requests, bytes), and end"
    parser.add_argument("--estimate", action="store_true", help=text)
    parser.add_argument(
        "--results",
        nargs="+",
        action="extend",
        default=[],
        metavar="FILE",
        help="add-member: what another program has found in the same images",
    )
    parser.add_argument(
        "--format",
        default="auto",
        metavar="FORMAT",
        help="add-member: auto, or a format of `i3cl prepare export`: labelme, paddle, cvat, ...",
    )
    parser.add_argument("--granularity", choices=("word", "line"), help="add-member: what one polygon encloses (word)")
    parser.add_argument("--answers", metavar="FILE", help="checked: what the page has saved")
    parser.add_argument("--truth", metavar="SET.json", help="trust, audit: labelled images, COCO json; default data.validation")
    parser.add_argument("--images", metavar="FOLDER", help="trust, audit: folder of the images of --truth")
    stored = "stored predictions; trust: of the labelled images; audit: of each fold, by members trained without it"
    parser.add_argument("--predictions", nargs="+", action="extend", default=[], metavar="FOLDER", help=stored)
    place = "agree, trust, audit: folder for the files; default <run>/agreement, <run>/trust, <run>/audit"
    parser.add_argument("--out", metavar="FOLDER", help=place)


def ordered(words: Sequence[str]) -> list[str]:
    """The command line as the parser wants it.

    --name goes before the word that follows add-member and is not a setting; settings go before a list of --results or
    --predictions, which would take them for files.
    """
    words = list(words)
    if "add-member" in words:
        place = words.index("add-member") + 1
        if place < len(words) and not words[place].startswith("-") and not _is_setting(words[place]):
            words.insert(place, "--name")
    found: list[str] = []
    before: int | None = None
    for word in words:
        if word.startswith("-"):
            before = len(found) if word in ("--results", "--predictions") else None
        if before is not None and _is_setting(word):
            found.insert(before, word)
            before += 1
        else:
            found.append(word)
    return found


def _is_setting(word: str) -> bool:
    return "=" in word and word.partition("=")[0].partition(".")[0] in Settings.model_fields


def main() -> None:
    """Entry point of jobs/label.py."""
    run(work, __doc__, arguments, ordered(sys.argv[1:]), resumes=lambda options: options.step in ("predict", "all", "add-member"))
