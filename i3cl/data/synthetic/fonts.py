"""Typefaces for synthetic text: from installed font packages, DejaVu, and the user's own folder."""

from __future__ import annotations

import importlib
import importlib.resources
from dataclasses import dataclass
from functools import cache, lru_cache
from pathlib import Path

from matplotlib import get_data_path
from matplotlib.ft2font import FT2Font
from PIL import ImageFont

from i3cl.errors import UserError

LATIN_PACKAGES = (
    "font_roboto",
    "font_caladea",
    "font_source_sans_pro",
    "font_source_serif_pro",
    "font_amatic_sc",
    "font_fredoka_one",
    "fontpkg_abril_fatface",
    "fontpkg_anton",
    "fontpkg_bebas_neue",
    "fontpkg_black_ops_one",
    "fontpkg_bungee",
    "fontpkg_caveat",
    "fontpkg_dancing_script",
    "fontpkg_lobster",
    "fontpkg_montserrat",
    "fontpkg_oswald",
    "fontpkg_permanent_marker",
    "fontpkg_playfair_display",
)
"""Modules of the packages of the extra `fonts`; each family is drawn equally often."""
CJK_PACKAGE = "manimgx_fonts_cjk"
_SUFFIXES = (".ttf", ".otf", ".ttc")
# Japanese, Korean, simplified and traditional Chinese forms share one collection; 2 is simplified Chinese.
_CJK_INDEX = 2


@dataclass(frozen=True, slots=True)
class Face:
    """One typeface at one weight."""

    path: str
    index: int = 0
    """Number of the typeface in a collection."""
    weight: int | None = None
    """Weight of a variable typeface; None: the typeface has only one."""


@dataclass(frozen=True, slots=True)
class Faces:
    """The typefaces to draw with, grouped in families, so that a family with many cuts is not drawn more often."""

    latin: tuple[tuple[Face, ...], ...]
    cjk: tuple[tuple[Face, ...], ...]
    missing: tuple[str, ...]
    """Packages of the extra `fonts` that are not installed."""


@cache
def find_faces(folder: str | None = None) -> Faces:
    """The typefaces of the installed packages, of matplotlib (DejaVu) and of `folder` (.ttf, .otf, .ttc at any depth).

    UserError when `folder` holds no typeface that has letters or Chinese characters.
    """
    missing: list[str] = []
    latin: list[tuple[Face, ...]] = []
    cjk: list[tuple[Face, ...]] = []
    for package in LATIN_PACKAGES:
        files = _package_files(package)
        if files is None:
            missing.append(package)
        else:
            latin.append(_family(files))
    files = _package_files(CJK_PACKAGE)
    if files is None:
        missing.append(CJK_PACKAGE)
    else:
        cjk.append(tuple(Face(str(file), _CJK_INDEX, weight) for file in files for weight in (300, 500, 700, 900)))
    latin.append(_family(dejavu_files()))
    if folder is not None:
        for file in _files(Path(folder)):
            characters = _characters(str(file))
            if ord("a") in characters and ord("1") in characters:
                latin.append(_family([file]))
            if ord("中") in characters:
                cjk.append((Face(str(file)),))
        if not _files(Path(folder)):
            raise UserError(f"{folder}: holds no .ttf, .otf or .ttc file; correct scene_text.fonts")
    return Faces(tuple(latin), tuple(cjk), tuple(missing))


@cache
def dejavu_files() -> list[Path]:
    """The DejaVu typefaces that matplotlib brings along, sorted."""
    # The Display faces hold only a few symbols.
    return sorted(f for f in (Path(get_data_path()) / "fonts" / "ttf").glob("DejaVu*.ttf") if "Display" not in f.name)


@lru_cache(maxsize=2048)
def font(face: Face, size: int) -> ImageFont.FreeTypeFont:
    """The typeface at `size` pixels an em."""
    # Basic layout: the optional Raqm engine would make pixels depend on the machine.
    made = ImageFont.truetype(face.path, size, index=face.index, layout_engine=ImageFont.Layout.BASIC)
    if face.weight is not None:
        made.set_variation_by_axes([face.weight])
    return made


def covers(face: Face, text: str) -> bool:
    """Whether the typeface has every character of the text."""
    return all(ord(character) in _characters(face.path) for character in text)


@cache
def _characters(path: str) -> frozenset[int]:
    try:
        return frozenset(FT2Font(path).get_charmap())
    except (RuntimeError, OSError) as error:
        raise UserError(f"{path}: not a readable typeface ({error}); remove it from the folder") from None


def _package_files(package: str) -> list[Path] | None:
    try:
        importlib.import_module(package)
    except ImportError:
        return None
    with importlib.resources.as_file(importlib.resources.files(package)) as folder:
        return _files(folder)


def _is_typeface(file: Path) -> bool:
    return file.suffix.lower() in _SUFFIXES and not file.name.startswith("._")


def _files(folder: Path) -> list[Path]:
    """Typefaces in a folder, sorted; of a face that is there as .ttf and .otf, the first."""
    found = {file.stem: file for file in sorted(folder.rglob("*"), reverse=True) if _is_typeface(file)}
    return sorted(found.values())


def _family(files: list[Path]) -> tuple[Face, ...]:
    faces: list[Face] = []
    for file in sorted(files):
        try:
            axes = ImageFont.truetype(str(file), 20).get_variation_axes()
        except OSError:
            axes = []
        if len(axes) == 1:
            low, high = int(axes[0]["minimum"] or 0), int(axes[0]["maximum"] or 0)
            faces += [Face(str(file), 0, weight) for weight in sorted({low, (low + high) // 2, high})]
        else:
            faces.append(Face(str(file)))
    return tuple(faces)
