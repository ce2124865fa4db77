"""Label unlabelled images with an ensemble.

predict   the members predict the images: GPU actors, Parquet out
select    thresholds turn the predictions into pseudo labels: COCO json or Parquet out
all       both
trust     compare fused predictions of labelled images with their truth: report, calibration.json, disputed.json
"""

import argparse

from i3cl.cli.command_line import run
from i3cl.config import Settings
from i3cl.errors import UserError


def work(settings: Settings, options: argparse.Namespace) -> None:
    """Run the command."""
    from i3cl import storage
    from i3cl.labelling.label import select_labels, unlabelled_images, unlabelled_root
    from i3cl.labelling.predict import predict

    folder = storage.join(storage.absolute(settings.storage), settings.name)
    predictions = storage.join(folder, "predictions", "unlabelled")
    if options.step in ("predict", "all"):
        images = unlabelled_images(settings)
        if images.problems:
            print(images.summary())
        predict(images, settings.label.members, settings, predictions, "predict")
        print(f"predictions: {predictions}")
    if options.step in ("select", "all"):
        labels = select_labels(predictions, settings.label, folder, unlabelled_root(settings))
        shown = [f"{key} {value:.3f}" if isinstance(value, float) else f"{key} {value}" for key, value in labels.counts.items()]
        print("  ".join(shown))
        print(f"pseudo labels: {labels.path}")
    if options.step == "trust":
        trust(settings, options, folder)


def trust(settings: Settings, options: argparse.Namespace, folder: str) -> None:
    """Measure how far the labels can be trusted; write the report, calibration.json and disputed.json."""
    from i3cl import storage
    from i3cl.config import SourceSettings
    from i3cl.data.loading.ingest import read_source
    from i3cl.labelling.calibration import write_calibration
    from i3cl.labelling.trust import exif_of_predictions, measure_trust, write_disputed
    from i3cl.report.trust import write_trust_report

    source = settings.data.validation
    if options.truth or options.images:
        if not (options.truth and options.images):
            raise UserError("--truth and --images: give both: a COCO json and the folder of its images")
        source = SourceSettings(annotations=storage.absolute(options.truth), images=storage.absolute(options.images))
    if source is None:
        raise UserError("--truth: names no labelled set; give --truth SET.json --images FOLDER or data.validation")
    dataset = read_source(source, settings.data_root, settings.data.skip_bad)
    predictions = options.predictions or storage.join(folder, "predictions", "validation")
    exif = exif_of_predictions(predictions, settings)
    found = measure_trust(predictions, dataset.records, settings.label, settings.evaluate)
    out = options.out or storage.join(folder, "trust")
    write_calibration(storage.join(out, "calibration.json"), found.calibration)
    write_disputed(storage.join(out, "disputed.json"), found.disputed)
    title = f"Trust in the labels: {settings.name}"
    write_trust_report(storage.join(out, "report.html"), found, dataset.images_root, title, upright=exif == "upright")
    for row in [found.ensemble, *found.members]:
        print(f"{row.name}: R {row.recall:.4f}  P {row.precision:.4f}  F {row.hmean:.4f}  (score > {row.threshold:.2f})")
    gain, low, high = (100 * value for value in found.gain)
    print(f"ensemble over its best member: {gain:+.1f} points (95 % of bootstrap draws {low:+.1f} to {high:+.1f})")
    print(f"report, calibration.json, disputed.json: {out}")


def arguments(parser: argparse.ArgumentParser) -> None:
    """Add the arguments of this command."""
    parser.add_argument(
        "step", choices=("predict", "select", "all", "trust"), help="what to do (see above); select and trust need no GPU"
    )
    parser.add_argument("--truth", metavar="SET.json", help="trust: labelled images, COCO json; default data.validation")
    parser.add_argument("--images", metavar="FOLDER", help="trust: folder of the images of --truth")
    parser.add_argument("--predictions", metavar="FOLDER", help="trust: stored predictions of the labelled images")
    parser.add_argument("--out", metavar="FOLDER", help="trust: folder for its files; default <run>/trust")


def main() -> None:
    """Entry point of jobs/label.py."""
    run(work, __doc__, arguments, resumes=lambda options: options.step in ("predict", "all"))
