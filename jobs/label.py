"""Label unlabelled images with an ensemble: `predict` (GPU actors, Parquet out), `select` (thresholds, COCO json or Parquet out),
and `trust` (fused predictions of labelled images against their truth: report, calibration.json, disputed.json)."""

from i3cl.cli.label import main

if __name__ == "__main__":
    main()
