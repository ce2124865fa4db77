"""A recipe that asks for the synthetic set: make it, and put it where the recipe names its data sets."""

from __future__ import annotations

from typing import Any

from i3cl import storage
from i3cl.config import Settings, with_overrides
from i3cl.data.synthetic.plain_set import write_synthetic_set


def use_synthetic(settings: Settings, folder: str) -> Settings:
    """Write the set of `settings.synthetic` into `folder` (once) and return settings that use it."""
    assert settings.synthetic is not None
    write_synthetic_set(settings.synthetic, folder)

    def source(name: str, images: str) -> dict[str, Any]:
        return {"annotations": storage.join(folder, f"{name}.json"), "images": storage.join(folder, images)}

    return with_overrides(
        settings,
        {
            "data.train": [source("labelled", "labelled")],
            "data.validation": source("validation", "validation"),
            "label.source": source("unlabelled", "unlabelled"),
            "selftrain.unlabelled_truth": source("unlabelled_truth", "unlabelled"),
        },
        "synthetic",
    )
