"""I3CL on Ray: find text of any shape in photographs, label with ensembles, train on the labels."""

import logging
import os
import sys
from typing import Any

__version__ = "0.1.0"
__all__ = ["Detections", "detect", "load"]


def __getattr__(name: str) -> Any:
    # Torch takes seconds to import: jobs that only print settings or usage must not wait for it.
    if name == "Detections":
        from i3cl.detections import Detections

        return Detections
    if name in ("load", "detect"):
        from i3cl.inference import api

        return getattr(api, name)
    raise AttributeError(f"module 'i3cl' has no attribute {name!r}")


# As a library the package shows nothing until its user configures logging. Commands and their Ray workers do: i3cl/observe.py.
logging.getLogger(__name__).addHandler(logging.NullHandler())
if os.environ.get("I3CL_RUN") and "ray" in sys.modules:
    from i3cl import observe

    observe.worker_lines()
