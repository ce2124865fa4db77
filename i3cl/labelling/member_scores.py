"""What the scores of each member mean: from a member's score to the expected share of right findings.

Detectors score differently: .6 of one may be as good as .9 of another. Learned on labelled images, or without any from how often
the other members confirm a finding. `label.fusion.member_scores` names the file; fusion then works with these precisions.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

from i3cl import storage
from i3cl.config import EvaluateSettings, FusionSettings
from i3cl.data.formats.predictions import read_predictions
from i3cl.data.formats.records import ImageRecord
from i3cl.errors import UserError
from i3cl.evaluation.metrics.judge import DROPPED, assign
from i3cl.geometry import overlaps
from i3cl.labelling.calibration import Calibration, fit_calibration, knots_of

Source = Literal["truth", "agreement"]
_SUREST = 0.1
"""Share of a member's findings, by score, that agreement takes to be right."""
_FEWEST = 20
"""Findings of a member from which anything can be learned. The scores of one with fewer stay as they are."""
_FILLED = 0.25
"""Share of a line that words must fill for it to be a line of text."""


@dataclass(frozen=True)
class MemberScores:
    """Score -> expected precision, for each member."""

    learned_from: Source
    members: Mapping[str, Calibration]
    confirmed: Mapping[str, float]
    """Member -> share of its findings that is right, or with agreement: that other members confirm. 0 without findings."""
    source: str
    """The predictions from which it was learned, or the file that it was read from; for messages."""

    @property
    def unlearned(self) -> list[str]:
        """Members with so few findings that nothing was learned of them; their scores stay as they are."""
        return [name for name, own in self.members.items() if own.instances < _FEWEST]

    def __call__(self, member: str, scores: Any) -> NDArray[np.float64]:
        """(N,) expected precision of (N,) scores. UserError for a member of whom nothing was learned."""
        if member not in self.members:
            known = ", ".join(self.members)
            raise UserError(
                f"{self.source}: learned without {member} (there are {known}); learn it again with i3cl label trust or agree"
            )
        return self.members[member](scores)


def scores_by_truth(predictions: str, truth: Sequence[ImageRecord], evaluate: EvaluateSettings) -> MemberScores:
    """From stored predictions of labelled images.

    A word is right when the truth matches it by `evaluate.iou`, a line when words of the truth fill a quarter of it or more.
    Findings in don't-care regions do not count. The scores of a member with fewer than 20 findings stay as they are.
    """
    known = {record.id: record for record in truth}

    def verdicts() -> Iterator[tuple[str, NDArray[np.float64], NDArray[np.float64]]]:
        for rows in read_predictions(predictions):
            record = known.get(rows[0]["image_id"])
            if record is None:
                continue
            polygons = [i.polygon for i in record.instances]
            ignore = np.array([i.ignore for i in record.instances], bool)
            for row in _good(rows):
                if row["granularity"] == "line":
                    right = _filled(row["polygons"], polygons) >= _FILLED
                    counted = ~(_filled(row["polygons"], [p for p, i in zip(polygons, ignore, strict=True) if i]) > 0.5)
                else:
                    match = assign(polygons, ignore, row["polygons"], evaluate.iou, evaluate.matching)
                    right, counted = match >= 0, match != DROPPED
                yield row["member"], np.asarray(row["scores"], np.float64)[counted], right[counted].astype(np.float64)

    return _fitted("truth", verdicts(), predictions)


def scores_by_agreement(predictions: str | Sequence[str], fusion: FusionSettings) -> MemberScores:
    """From stored predictions of any images, a folder or several parts, without a truth.

    A finding is confirmed when a member of another kind has found the same: words by an IoU of `fusion.iou`, a word by a line
    that covers `fusion.line_cover` of it, a line by words that fill a quarter of it. A member that misses what is there cannot
    confirm it, so the share of confirmed findings is too low; it is divided by that of the member's surest tenth, which is
    taken to be right. Members that err together make it too high, which is why those of one kind (checkpoints of ours, say) do
    not confirm each other. The scores of a member with fewer than 20 findings stay as they are.

    UserError when all members are of one kind.
    """

    def verdicts() -> Iterator[tuple[str, NDArray[np.float64], NDArray[np.float64]]]:
        for rows in read_predictions(predictions):
            good = [row for row in _good(rows) if fusion.member_weights.get(row["member"], 1.0) > 0]
            for row in good:
                others = [other for other in good if _kind(other) != _kind(row)]
                if others:
                    confirmed = np.any([_confirms(row, other, fusion) for other in others], axis=0)
                    yield row["member"], np.asarray(row["scores"], np.float64), confirmed.astype(np.float64)

    return _fitted("agreement", verdicts(), predictions)


def _kind(row: Mapping[str, Any]) -> str:
    """A member whose kind is not known is one of its own."""
    return row["kind"] or f"member {row['member']}"


def _good(rows: Sequence[Mapping[str, Any]]) -> list[Mapping[str, Any]]:
    return [row for row in rows if row["error"] is None]


def _confirms(row: Mapping[str, Any], other: Mapping[str, Any], fusion: FusionSettings) -> NDArray[np.bool_]:
    """(N,) which findings of a row those of another member's row confirm."""
    mine, theirs = row["polygons"], other["polygons"]
    lines = row["granularity"] == "line", other["granularity"] == "line"
    if lines == (True, False):
        return _filled(mine, theirs) >= _FILLED
    common, areas, others = _common(mine, theirs)
    if lines == (False, True):
        return np.asarray((common >= fusion.line_cover * areas[:, None]).any(axis=1))
    return np.asarray((common >= fusion.iou * (areas[:, None] + others - common)).any(axis=1))


def _filled(lines: Sequence[NDArray[np.floating]], words: Sequence[NDArray[np.floating]]) -> NDArray[np.float64]:
    """(N,) share of each line that words cover."""
    common, areas, _ = _common(lines, words)
    return common.sum(axis=1) / np.maximum(areas, 1e-9)


def _common(
    mine: Sequence[NDArray[np.floating]], theirs: Sequence[NDArray[np.floating]]
) -> tuple[NDArray[np.float64], NDArray[np.float64], NDArray[np.float64]]:
    """(N, M) common areas, and the (N,) and (M,) areas."""
    found = overlaps(mine, theirs)
    return found.dense_intersection(), found.area_first, found.area_second


def _fitted(
    source: Source, verdicts: Iterator[tuple[str, NDArray[np.float64], NDArray[np.float64]]], predictions: str | Sequence[str]
) -> MemberScores:
    place = predictions if isinstance(predictions, str) else predictions[0]
    collected: dict[str, list[tuple[NDArray[np.float64], NDArray[np.float64]]]] = {}
    for member, scores, right in verdicts:
        collected.setdefault(member, []).append((scores, right))
    if source == "agreement" and not collected:
        raise UserError(
            f"{place}: all members are of one kind and make the same mistakes; agreement needs another detector: "
            "i3cl label add-member"
        )
    members, shares = {}, {}
    for member, parts in sorted(collected.items()):
        scores, right = (np.concatenate(column) for column in zip(*parts, strict=True))
        shares[member] = float(right.mean()) if len(right) else 0.0
        if len(scores) < _FEWEST:
            members[member] = Calibration((0.0, 1.0), (0.0, 1.0), (member,), instances=len(scores))
            continue
        found = fit_calibration(scores, right > 0, [member])
        precision = np.asarray(found.precision)
        if source == "agreement":
            surest = right[np.argsort(-scores, kind="stable")[: max(_FEWEST, int(_SUREST * len(scores)))]].mean()
            precision = np.minimum(precision / max(surest, 1e-9), 1.0)
        members[member] = Calibration(found.scores, tuple(precision.tolist()), (member,), instances=len(scores))
    return MemberScores(source, members, shares, place)


def off_by(guess: MemberScores, measured: MemberScores) -> dict[str, float]:
    """Member -> mean of |guess - measured| over scores 0-1, evenly spaced over the measured knots."""
    result = {}
    for member, own in measured.members.items():
        if member in guess.members:
            at = np.linspace(own.scores[0], own.scores[-1], 101)
            result[member] = float(np.abs(guess.members[member](at) - own(at)).mean())
    return result


def write_member_scores(path: str, found: MemberScores) -> None:
    """Write them as JSON, whole or not at all."""
    members = {
        name: {"scores": c.scores, "precision": c.precision, "instances": c.instances, "confirmed": found.confirmed[name]}
        for name, c in found.members.items()
    }
    content = {"learned_from": found.learned_from, "members": members}
    storage.write_text_atomic(path, json.dumps(content, indent=1) + "\n")


def read_member_scores(path: str) -> MemberScores:
    """Read what `write_member_scores` wrote. UserError when the file holds something else."""
    try:
        content: Any = json.loads(storage.read_text(path))
        members, shares = {}, {}
        for name, each in content["members"].items():
            members[name] = Calibration(*knots_of(each), (name,), instances=int(each["instances"]))
            shares[name] = float(each["confirmed"])
        if content["learned_from"] not in ("truth", "agreement"):
            raise ValueError("learned_from must be truth or agreement")
        return MemberScores(content["learned_from"], members, shares, path)
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        reason = " ".join(str(error).split())[:200]
        raise UserError(f"{path}: not the scores of members ({reason}); write them with i3cl label trust or agree") from None
