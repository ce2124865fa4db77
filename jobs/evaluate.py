"""Score result files against truth by a named protocol, or a checkpoint on labelled images.

Files:       python jobs/evaluate.py --protocol icdar --truth gt.zip --results det.zip [--json OUT]
Checkpoint:  python jobs/evaluate.py --config RECIPE.yaml label.members.NAME=CHECKPOINT   (polygon IoU and COCO mask AP)

Truth and results are recognised by their content: text files in a zip or folder, ArT/LSVT json, COCO json, Parquet.
docs/evaluation.md lists protocols and formats.
"""

from i3cl.cli.evaluate import main

if __name__ == "__main__":
    main()
