"""The report on how far fused labels can be trusted: tables, calibration, and the images on which the members disagree most."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from markupsafe import Markup

from i3cl import storage
from i3cl.data.loading.images import decode_image
from i3cl.geometry import as_polygon
from i3cl.labelling.calibration import ReliabilityBin, expected_calibration_error
from i3cl.labelling.trust import Trust, dispute
from i3cl.report.curves import PALETTE, new_axes, to_svg
from i3cl.report.html import embedded, render_page, svg_points

_PICTURES = 16


def reliability_figure(raw: Sequence[ReliabilityBin], calibrated: Sequence[ReliabilityBin]) -> str:
    """Observed against expected precision, before and after calibration, as SVG; a perfect calibration is the diagonal."""
    figure, axes = new_axes(4.4, 4.0)
    axes.plot([0, 1], [0, 1], color="#7a7f87", linewidth=1, linestyle=(0, (4, 3)))
    for name, bins, colour in (("fused score", raw, PALETTE[1]), ("calibrated", calibrated, PALETTE[0])):
        x, y = [b.expected for b in bins], [b.observed for b in bins]
        axes.plot(x, y, "o-", color=colour, linewidth=1.8, markersize=4, label=name)
    axes.set(xlim=(0, 1), ylim=(0, 1.01), xlabel="Expected precision", ylabel="Observed precision", aspect="equal")
    axes.legend(loc="upper left", fontsize=8, frameon=False, labelcolor="linecolor")
    return to_svg(figure)


def write_trust_report(path: str, trust: Trust, images_root: str, title: str, *, upright: bool = False) -> None:
    """Write one self-contained HTML file to a local path or s3:// URL; decodes only the pictures that it shows.

    upright: turn them as their EXIF orientation says.
    """
    names = sorted(member.name for member in trust.members)
    colours = {name: PALETTE[place % len(PALETTE)] for place, name in enumerate(names)}
    pictures = []
    for item in trust.disputed[:_PICTURES]:
        image = decode_image(storage.join(images_root, item.file_name), upright=upright)
        # A member's doubtful detections would hide the ones of which it is sure.
        outlines = []
        for part in item.members:
            if part.member in colours:
                sure = np.flatnonzero(np.asarray(part.scores) >= 0.3).tolist()
                outlines.append((part.member, [svg_points(as_polygon(part.polygons[k])) for k in sure]))
        value = dispute(item.fused, len(names))
        pictures.append(embedded(f"{item.file_name}: dispute {value:.2f}", image) | {"outlines": outlines})
    page = render_page(
        "trust.html.j2",
        {"percent": lambda value: "-" if value != value else f"{100 * value:.1f}"},
        title=title,
        trust=trust,
        colours=colours,
        pictures=pictures,
        tables=[
            ("By score threshold", "Fused score from", trust.by_threshold),
            ("By votes", "Members that found it", trust.by_votes),
            ("By size, from the lower threshold on", "Short side", trust.by_size),
        ],
        figure=Markup(reliability_figure(trust.raw, trust.calibrated)),
        error_raw=expected_calibration_error(trust.raw),
        error_calibrated=expected_calibration_error(trust.calibrated),
    )
    storage.write_text_atomic(path, page)
