"""The page of an audit of labels: what contradicts them, with the most contradicted images."""

from __future__ import annotations

from i3cl import storage
from i3cl.data.loading.images import decode_image
from i3cl.labelling.audit import KINDS, Audit, AuditedImage
from i3cl.report.html import embedded, render_page, svg_points

_PICTURES = 24
_LABELS = "given labels"
_COLOURS = {_LABELS: "#22b455", "missing": "#1e78c8", "unsupported": "#cd2328", "loose": "#f08228"}


def write_audit_report(path: str, audit: Audit, images_root: str, title: str, upright: bool = False) -> None:
    """Write one self-contained HTML file to a local path or s3:// URL; decodes only the pictures that it shows.

    upright: whether the polygons are in the pictures as their EXIF orientation turns them.
    """
    pictures = []
    for item in audit.ranking[:_PICTURES]:
        image = decode_image(storage.join(images_root, item.record.file_name), upright=upright)
        named = ", ".join(f"{problem.kind} {problem.score:.2f}" for problem in item.problems)
        pictures.append(embedded(f"{item.record.file_name}: {named}", image) | {"outlines": _outlines(item)})
    page = render_page(
        "audit.html.j2",
        {},
        title=title,
        audit=audit,
        kinds=KINDS,
        counts=audit.counts(),
        colours=_COLOURS,
        pictures=pictures,
    )
    storage.write_text_atomic(path, page)


def _outlines(item: AuditedImage) -> list[tuple[str, bool, list[str]]]:
    """Name of a colour, whether dashed, and SVG points: dashed is what the ensemble found, solid is what the labels say."""
    named = {problem.label for problem in item.problems}
    fine = [svg_points(label.polygon) for k, label in enumerate(item.record.instances) if k not in named]
    outlines = [(_LABELS, False, fine)]
    for kind in KINDS:
        own = [problem for problem in item.problems if problem.kind == kind]
        outlines.append((kind, False, [svg_points(p.polygon) for p in own if p.label is not None]))
        outlines.append((kind, True, [svg_points(p.found) for p in own if p.found is not None]))
    return [entry for entry in outlines if entry[2]]
