"""Label unlabelled images with an ensemble: `predict` (GPU actors, Parquet out), `select` (thresholds, COCO json or Parquet out),
and `trust` (fused predictions of labelled images against their truth: report, calibration.json, disputed.json)."""

import argparse

from i3cl.cli.command_line import run
from i3cl.config import Settings
from i3cl.errors import UserError


def work(settings: Settings, options: argparse.Namespace) -> None:
    from i3cl import storage
    from i3cl.data.loading.ingest import read_source
    from i3cl.labelling.predict import predict
    from i3cl.labelling.pseudo import make_pseudo_labels, pseudo_path

    folder = storage.join(storage.absolute(settings.storage), settings.name)
    predictions = storage.join(folder, "predictions", "unlabelled")
    if options.step in ("predict", "all"):
        if settings.label.source is None:
            raise UserError("label.source: names no images; add {annotations: FILE.json, images: FOLDER}")
        # A missing image is one line of errors.csv here, no reason to stop.
        dataset = read_source(settings.label.source, settings.data_root, settings.data.skip_bad, check_files=False)
        if dataset.problems:
            print(dataset.summary())
        predict(dataset, settings.label.members, settings, predictions, "predict")
        print(f"predictions: {predictions}")
    if options.step in ("select", "all"):
        out = pseudo_path(folder, predictions, settings.label)
        source = settings.label.source
        root = storage.absolute(storage.join(settings.data_root, source.images)) if source else ""
        counts = make_pseudo_labels(predictions, settings.label, out, root)
        print("  ".join(f"{key} {value:.3f}" if isinstance(value, float) else f"{key} {value}" for key, value in counts.items()))
        print(f"pseudo labels: {out}")

    if options.step == "trust":
        trust(settings, options, folder)


def trust(settings: Settings, options: argparse.Namespace, folder: str) -> None:
    from i3cl import storage
    from i3cl.config import SourceSettings
    from i3cl.data.loading.ingest import read_source
    from i3cl.labelling.calibration import write_calibration
    from i3cl.labelling.trust import measure_trust, write_disputed
    from i3cl.report.trust import write_trust_report

    source = settings.data.validation
    if options.truth or options.images:
        if not (options.truth and options.images):
            raise UserError("--truth and --images: give both, a COCO json and the folder of its images")
        source = SourceSettings(annotations=storage.absolute(options.truth), images=storage.absolute(options.images))
    if source is None:
        raise UserError("--truth: names no labelled set; give --truth SET.json --images FOLDER or data.validation")
    dataset = read_source(source, settings.data_root, settings.data.skip_bad)
    predictions = options.predictions or storage.join(folder, "predictions", "validation")
    found = measure_trust(predictions, dataset.records, settings.label, settings.evaluate)
    out = options.out or storage.join(folder, "trust")
    write_calibration(storage.join(out, "calibration.json"), found.calibration)
    write_disputed(storage.join(out, "disputed.json"), found.disputed)
    write_trust_report(storage.join(out, "report.html"), found, dataset.images_root, f"Trust in the labels: {settings.name}")
    for row in [found.ensemble, *found.members]:
        print(f"{row.name}: R {row.recall:.4f}  P {row.precision:.4f}  F {row.hmean:.4f}  (score > {row.threshold:.2f})")
    gain, low, high = (100 * value for value in found.gain)
    print(f"ensemble over its best member: {gain:+.1f} points (95 % of bootstrap draws {low:+.1f} to {high:+.1f})")
    print(f"report, calibration.json, disputed.json: {out}")


def arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("step", choices=("predict", "select", "all", "trust"), help="what to do; select and trust need no GPU")
    parser.add_argument("--truth", metavar="SET.json", help="trust: labelled images, COCO json; default data.validation")
    parser.add_argument("--images", metavar="FOLDER", help="trust: images of --truth")
    parser.add_argument("--predictions", metavar="FOLDER", help="trust: stored predictions of the labelled images")
    parser.add_argument("--out", metavar="FOLDER", help="trust: where its files go; default <run>/trust")


def main() -> None:
    run(work, __doc__, arguments, resumes=lambda options: options.step in ("predict", "all"))
