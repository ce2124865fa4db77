"""Checked reading of label texts: lines, numbers, json, xml.

Every fault is a UserError that names the place; nothing takes more than linear time.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from typing import Any
from xml.etree.ElementTree import Element, ParseError

import numpy as np
from defusedxml import DefusedXmlException
from defusedxml.ElementTree import fromstring
from numpy.typing import NDArray

from i3cl.data.formats import checks
from i3cl.data.formats.checks import shown
from i3cl.errors import UserError

MAX_COORDINATE = 1_000_000
"""Pixels; a larger coordinate lies beyond any image, so it is a mistake."""
MAX_POINTS = 128
"""Most points of one polygon; public sets have about 30 at most, and the time to untangle a ring grows with their cube."""
_NUMBER = re.compile(r"[+-]?(?:[0-9]{1,20}(?:\.[0-9]{0,20})?|\.[0-9]{1,20})(?:[eE][+-]?[0-9]{1,3})?")


def decode(data: bytes, where: str) -> str:
    """UTF-8 text, with or without byte order mark."""
    try:
        return data.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        line = data.count(b"\n", 0, error.start) + 1
        raise UserError(f"{where}: line {line}: not UTF-8 text (byte {error.start}); save it as UTF-8") from None


def lines(data: bytes, where: str) -> Iterator[tuple[str, str]]:
    """(place, line) of every line that is not blank. Only LF and CRLF end a line: transcriptions may hold other separators.

    UserError for CR within a line: it ends the lines of old Macintosh files, which would be one line here.
    """
    for number, line in enumerate(decode(data, where).split("\n"), 1):
        line = line.rstrip("\r")
        if "\r" in line:
            raise UserError(f"{where}: line {number}: holds a CR, the line end of old Macintosh files; save it with LF or CRLF")
        if line.strip():
            yield f"{where}: line {number}", line


def is_number(token: str) -> bool:
    """Whether a token is a plain decimal number; blanks and tabs around it do not count."""
    return len(token) <= 64 and _NUMBER.fullmatch(token.strip(" \t")) is not None


def points(numbers: Sequence[Any], where: str, minimum: int = 3) -> NDArray[np.float32]:
    """(N, 2) float32 of flat x0, y0, x1, y1, ..., given as numbers or as texts of numbers. UserError when N < `minimum`."""
    if len(numbers) % 2 or len(numbers) < 2 * minimum:
        raise UserError(f"{where}: {len(numbers)} coordinates; a polygon needs x, y pairs of at least {minimum} points")
    if len(numbers) > 2 * MAX_POINTS:
        raise UserError(f"{where}: a polygon of {len(numbers) // 2} points; correct it")
    values = []
    for number in numbers:
        if isinstance(number, str):
            if not is_number(number):
                raise UserError(f"{where}: {shown(number)} is not a number; correct the coordinate")
            number = float(number.strip(" \t"))
        elif type(number) not in (int, float):
            raise UserError(f"{where}: {shown(number)} is not a number; correct the coordinate")
        # False for NaN too, and before any conversion that a huge number could break.
        if not -MAX_COORDINATE <= number <= MAX_COORDINATE:
            raise UserError(f"{where}: a coordinate is not finite or beyond any image; correct it")
        values.append(number)
    return np.array(values, np.float32).reshape(-1, 2)


def quadrilateral(line: str, where: str, *names: str) -> tuple[Any, ...]:
    """(4, 2) float32 and one string per name, from a line `x1,y1,...,x4,y4` and those fields; the last one keeps its commas."""
    fields = line.split(",", 7 + len(names))
    if len(fields) != 8 + len(names):
        raise UserError(f"{where}: {len(fields)} fields; expected x1,y1,x2,y2,x3,y3,x4,y4,{','.join(names)}")
    return points(fields[:8], where), *fields[8:]


def unquoted(text: str) -> str:
    """The text without blanks around it and without one pair of double quotes."""
    text = text.strip()
    return text[1:-1] if len(text) >= 2 and text.startswith('"') and text.endswith('"') else text


def parse_json(data: bytes | str, where: str) -> Any:
    """A json value. UserError for broken text, a key that occurs twice, and nesting deeper than any label file has."""
    return checks.parse_json(decode(data, where) if isinstance(data, bytes) else data, where)


def a_list(value: Any, where: str) -> list[Any]:
    """The value, which must be a list. UserError when it is not."""
    if not isinstance(value, list):
        raise UserError(f"{where}: is {shown(value)}; expected a list")
    return value


def an_object(value: Any, where: str) -> dict[str, Any]:
    """The value, which must be a json object. UserError when it is not."""
    if not isinstance(value, dict):
        raise UserError(f"{where}: is {shown(value)}; expected an object")
    return value


def a_text(entry: dict[str, Any], key: str, where: str) -> str:
    """entry[key], which must be a string. UserError when it is not."""
    value = entry.get(key)
    if not isinstance(value, str):
        raise UserError(f"{where}: {key} is {shown(value)}; expected text")
    return value


def a_flag(entry: dict[str, Any], key: str, where: str) -> bool:
    """entry[key] as a bool; it must be true, false, 0 or 1. UserError when it is not."""
    value = entry.get(key)
    if not isinstance(value, bool | int) or value not in (0, 1):
        raise UserError(f"{where}: {key} is {shown(value)}; expected true or false")
    return bool(value)


def parse_xml(data: bytes, where: str) -> Element:
    """The root of an XML file. Document types, entities and outside references are refused."""
    try:
        root = fromstring(data.removeprefix(b"\xef\xbb\xbf"), forbid_dtd=True)
    except DefusedXmlException:
        raise UserError(f"{where}: declares a document type or entities, which labels never need; remove them") from None
    except ParseError as error:
        line, column = error.position
        raise UserError(f"{where}: line {line} column {column}: not valid XML; is the file complete?") from None
    except (LookupError, ValueError) as error:
        raise UserError(f"{where}: not usable XML ({' '.join(str(error).split())}); save it as UTF-8") from None
    assert isinstance(root, Element)
    return root
