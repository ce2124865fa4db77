"""Times the network: python jobs/benchmark.py step --runs 7"""

import argparse

if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("what", choices=["step"], help="step: a training step beside torchvision's Mask R-CNN")
    parser.add_argument("--runs", type=int, default=5, help="timed runs of each, in turn")
    parser.add_argument("--side", type=int, default=640, help="image side in pixels")
    parser.add_argument("--threads", type=int, default=2, help="CPU threads")
    options = parser.parse_args()
    from i3cl.model.benchmark import step_report

    print(step_report(options.runs, options.side, options.threads))
