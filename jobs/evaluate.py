"""Score a checkpoint on labelled images: polygon IoU (ICDAR rules) and COCO mask AP."""

import argparse
import json

from i3cl.config import Settings, UserError
from i3cl.job import run


def work(settings: Settings, options: argparse.Namespace) -> None:
    from i3cl import storage
    from i3cl.data.ingest import read_source
    from i3cl.data.predictions import member_predictions
    from i3cl.evaluation.score import measure
    from i3cl.labelling.predict import predict

    if settings.data.validation is None:
        raise UserError("data.validation: names no labelled images; add {annotations: FILE.json, images: FOLDER}")
    if not settings.label.members:
        raise UserError("label.members: names no checkpoint; add label.members.NAME=CHECKPOINT_DIRECTORY")
    truth = read_source(settings.data.validation, settings.data_root, settings.data.skip_bad)
    out = storage.join(storage.absolute(settings.storage), settings.name, "predictions", "validation")
    predictions = predict(truth, settings.label.members, settings, out, "evaluate")
    result = {}
    for name in settings.label.members:
        score = measure(name, truth.records, member_predictions(predictions, name), settings.evaluate).score
        result[name] = vars(score)
        print(
            f"{name}: R {score.recall:.4f}  P {score.precision:.4f}  F {score.hmean:.4f}  (short side >= "
            f"{settings.evaluate.small_side:g} px: F {score.hmean_large:.4f})  mask AP50 {score.mask_ap50:.4f}"
        )
        print(f"  {score.rules}")
    if options.json:
        storage.write_text_atomic(options.json, json.dumps(result, indent=1) + "\n")


def arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--json", metavar="OUT", help="also write the numbers here")


if __name__ == "__main__":
    run(work, __doc__, arguments)
