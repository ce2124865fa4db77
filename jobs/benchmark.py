"""Times the network, or fusion: python jobs/benchmark.py step --runs 7"""

import argparse

if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    meanings = "step: a training step beside torchvision's Mask R-CNN; fusion: fusing an ensemble's predictions"
    parser.add_argument("what", choices=["step", "fusion"], help=meanings)
    parser.add_argument("--runs", type=int, default=5, help="timed runs of each, in turn")
    parser.add_argument("--side", type=int, default=640, help="image side in pixels")
    parser.add_argument("--threads", type=int, default=2, help="CPU threads")
    options = parser.parse_args()
    if options.what == "fusion":
        from i3cl.labelling.benchmark import fusion_report

        print(fusion_report(options.threads))
        raise SystemExit
    from i3cl.model.benchmark import step_report

    print(step_report(options.runs, options.side, options.threads))
