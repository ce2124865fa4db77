"""The labelling step: an ensemble predicts unlabelled images, and thresholds make pseudo labels of the predictions.

The circle, studies, the search and `label.py` all label through this file, so that the same rules hold everywhere: where the
images are, which form the labels have, and that a missing image is an error row and not the end of the job.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from i3cl import observe, storage
from i3cl.config import LabelSettings, MemberSettings, Settings
from i3cl.data.formats.records import Dataset
from i3cl.data.loading.ingest import read_source
from i3cl.errors import UserError
from i3cl.inference.recipe import Given
from i3cl.labelling.fused import FusedStore
from i3cl.labelling.member_scores import MemberScores, scores_by_agreement, write_member_scores
from i3cl.labelling.predict import predict
from i3cl.labelling.pseudo import make_pseudo_labels, pseudo_path, spread_parts

_LEARNED = 5000
"""Images from which agreement is learned: enough for a curve, and few enough for one process."""


@dataclass(frozen=True)
class PseudoLabels:
    """Pseudo labels on disk or S3."""

    path: str
    """COCO json, or a folder of Parquet shards."""
    images_root: str
    """Folder that their file names are relative to."""
    counts: dict[str, Any]
    """As `SelectionSummary.summary` has them."""

    def checked(self) -> PseudoLabels:
        """Themselves. UserError when there is not a single label."""
        if not self.counts["instances"]:
            raise UserError("label.select: no prediction passed the thresholds; lower label.select.low or train longer")
        return self

    def say(self) -> None:
        """One line: how many labels there are, and on how many images."""
        counts = self.counts
        observe.say(
            f"labels: {counts['instances']} instances on {counts['images_with_labels']} of {counts['images']} images, "
            f"mean weight {counts['mean_weight']:.2f}",
            **counts,
        )


def unlabelled_images(settings: Settings) -> Dataset:
    """The images of label.source. Whether the files exist is not checked: a missing one becomes an error row.

    UserError when label.source is not set or its annotation file cannot be read.
    """
    if settings.label.source is None:
        raise UserError("label.source: names no unlabelled images; add {annotations: FILE.json, images: FOLDER}")
    return read_source(settings.label.source, settings.data_root, settings.data.skip_bad, check_files=False)


def unlabelled_root(settings: Settings) -> str:
    """Folder of the images of label.source; empty when that is not set."""
    source = settings.label.source
    return storage.absolute(storage.join(settings.data_root, source.images)) if source else ""


def select_labels(
    predictions: str,
    settings: LabelSettings,
    folder: str,
    images_root: str,
    name: str = "pseudo",
    store: FusedStore | None = None,
) -> PseudoLabels:
    """Pseudo labels of stored predictions as <folder>/<name>.json or, as label.select.format says, Parquet in <folder>/<name>."""
    path = pseudo_path(folder, predictions, settings, name)
    return PseudoLabels(path, images_root, make_pseudo_labels(predictions, settings, path, images_root, store))


def learn_agreement(predictions: str, settings: LabelSettings) -> MemberScores:
    """What the members' scores mean, learned without truth from some thousands of the images; errors as `scores_by_agreement`."""
    return scores_by_agreement(spread_parts(predictions, _LEARNED), settings.fusion)


def label_images(
    images: Dataset,
    members: Mapping[str, str | MemberSettings],
    settings: Settings,
    folder: str,
    title: str,
    *,
    part: str = "unlabelled",
    name: str = "pseudo",
    given: Given | None = None,
    earlier: str | None = None,
) -> PseudoLabels:
    """Predict and select: pseudo labels of `images` by an ensemble. The same call continues where it was stopped.

    With label.agreement, what the members' scores mean is learned between the two and written to <folder>/<name>.members.json.

    Args:
        images: As `unlabelled_images` reads them.
        members: Name -> detector, or in its place a checkpoint directory.
        settings: The whole recipe; `label` and `cluster.gpu` count.
        folder: Run directory, for <folder>/predictions/<part>/ and the labels.
        title: Begins the lines of progress.
        part: Name of the predictions.
        name: Name of the labels, without ending.
        given: As for `predict`.
        earlier: Run directory of an earlier round, whose predictions are taken where they would be the same.

    Raises:
        UserError: As `predict` raises it, or no prediction passed the thresholds.
    """
    before = None if earlier is None else storage.join(earlier, "predictions", part)
    predictions = predict(images, members, settings, storage.join(folder, "predictions", part), title, given, before)
    label = settings.label
    if label.agreement and len(members) > 1:
        found = learn_agreement(predictions, label)
        path = storage.join(folder, f"{name}.members.json")
        write_member_scores(path, found)
        each = ", ".join(f"{member} {share:.2f}" for member, share in found.confirmed.items())
        observe.say(f"{title}: share of findings that other members confirm: {each}", stage=title)
        label = label.model_copy(update={"fusion": label.fusion.model_copy(update={"member_scores": path})})
    return select_labels(predictions, label, folder, images.images_root, name).checked()
