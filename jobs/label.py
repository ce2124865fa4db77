"""Label unlabelled images with an ensemble: `predict` (GPU actors, Parquet out) and `select` (thresholds, COCO json out)."""

import argparse

from i3cl.config import Settings, UserError
from i3cl.job import run


def work(settings: Settings, options: argparse.Namespace) -> None:
    from i3cl import storage
    from i3cl.data.ingest import read_source
    from i3cl.labelling.predict import predict
    from i3cl.labelling.pseudo import make_pseudo_labels, pseudo_path

    folder = storage.join(storage.absolute(settings.storage), settings.name)
    predictions = storage.join(folder, "predictions", "unlabelled")
    if options.step in ("predict", "all"):
        if settings.label.source is None:
            raise UserError("label.source: names no images; add {annotations: FILE.json, images: FOLDER}")
        dataset = read_source(settings.label.source, settings.data_root, settings.data.skip_bad)
        predict(dataset, settings.label.members, settings, predictions, "predict")
        print(f"predictions: {predictions}")
    if options.step in ("select", "all"):
        out = pseudo_path(folder, predictions, settings.label)
        source = settings.label.source
        root = storage.absolute(storage.join(settings.data_root, source.images)) if source else ""
        counts = make_pseudo_labels(predictions, settings.label, out, root)
        print(
            "  ".join(
                f"{key} {value:.3f}" if isinstance(value, float) else f"{key} {value}" for key, value in counts.items()
            )
        )
        print(f"pseudo labels: {out}")


def arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("step", choices=("predict", "select", "all"), help="what to do; select needs no GPU")


if __name__ == "__main__":
    run(work, __doc__, arguments)
