"""Checked reading of the texts that labels come in. Every fault is a UserError that names the place; nothing takes more than
linear time."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator, Sequence
from typing import Any
from xml.etree.ElementTree import Element, ParseError

import numpy as np
from defusedxml import DefusedXmlException
from defusedxml.ElementTree import fromstring
from numpy.typing import NDArray

from i3cl.errors import UserError

MAX_COORDINATE = 1_000_000
"""Pixels; beyond any image, so a mistake."""
MAX_POINTS = 128
"""Of one polygon; the most in a public set is about 30, and untangling a ring takes the cube of them."""
_NUMBER = re.compile(r"[+-]?(?:[0-9]{1,20}(?:\.[0-9]{0,20})?|\.[0-9]{1,20})(?:[eE][+-]?[0-9]{1,3})?")


def decode(data: bytes, where: str) -> str:
    """UTF-8 text, with or without byte order mark."""
    try:
        return data.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        line = data.count(b"\n", 0, error.start) + 1
        raise UserError(f"{where}: line {line}: not UTF-8 text (byte {error.start}); save it as UTF-8") from None


def lines(data: bytes, where: str) -> Iterator[tuple[str, str]]:
    """(place, line) of every line that is not blank. Only LF and CRLF end a line: transcriptions hold other separators."""
    for number, line in enumerate(decode(data, where).split("\n"), 1):
        line = line.removesuffix("\r")
        if line.strip():
            yield f"{where}: line {number}", line


def is_number(token: str) -> bool:
    """Whether a token, blanks and tabs around it apart, is a plain decimal number."""
    return len(token) <= 64 and _NUMBER.fullmatch(token.strip(" \t")) is not None


def points(numbers: Sequence[Any], where: str, minimum: int = 3) -> NDArray[np.float32]:
    """(N, 2) float32 of flat x0, y0, x1, y1, ...: numbers or number tokens. UserError, too, when N < `minimum`."""
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
    """(4, 2) float32 and a string for each of `names`, from `x1,y1,...,x4,y4` and as many fields; the last keeps its commas."""
    fields = line.split(",", 7 + len(names))
    if len(fields) != 8 + len(names):
        raise UserError(f"{where}: {len(fields)} fields; expected x1,y1,x2,y2,x3,y3,x4,y4,{','.join(names)}")
    return points(fields[:8], where), *fields[8:]


def unquoted(text: str) -> str:
    """Without blanks around and without one pair of double quotes."""
    text = text.strip()
    return text[1:-1] if len(text) >= 2 and text.startswith('"') and text.endswith('"') else text


def parse_json(data: bytes | str, where: str) -> Any:
    """A json value. UserError for broken text, a key that occurs twice, and nesting that no label file has."""
    text = decode(data, where) if isinstance(data, bytes) else data

    def unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        result = dict(pairs)
        if len(result) != len(pairs):
            seen: set[str] = set()
            twice = next(key for key, _ in pairs if key in seen or seen.add(key))  # type: ignore[func-returns-value]
            raise UserError(f"{where}: key {shown(twice)} occurs twice; correct the file")
        return result

    try:
        return json.loads(text, object_pairs_hook=unique)
    except json.JSONDecodeError as error:
        place = f"line {error.lineno} column {error.colno}"
        raise UserError(f"{where}: {place}: not valid JSON ({error.msg}); is the file complete?") from None
    except RecursionError:
        raise UserError(f"{where}: JSON nested too deeply for a label file") from None
    except ValueError as error:  # e.g. an integer of thousands of digits
        raise UserError(f"{where}: not usable JSON ({' '.join(str(error).split())})") from None


def a_list(value: Any, where: str) -> list[Any]:
    """The value, which has to be a list."""
    if not isinstance(value, list):
        raise UserError(f"{where}: is {shown(value)}; expected a list")
    return value


def an_object(value: Any, where: str) -> dict[str, Any]:
    """The value, which has to be a json object."""
    if not isinstance(value, dict):
        raise UserError(f"{where}: is {shown(value)}; expected an object")
    return value


def a_text(entry: dict[str, Any], key: str, where: str) -> str:
    """entry[key], which has to be a string."""
    value = entry.get(key)
    if not isinstance(value, str):
        raise UserError(f"{where}: {key} is {shown(value)}; expected text")
    return value


def a_flag(entry: dict[str, Any], key: str, where: str) -> bool:
    """entry[key], which has to be true, false, 0 or 1."""
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


def shown(value: Any) -> str:
    """A value for a message: short, on one line, printable whatever it holds."""
    if value is None:
        return "missing"
    if isinstance(value, list | dict):
        return f"{'a list' if isinstance(value, list) else 'an object'} of {len(value)}"
    if isinstance(value, int) and abs(value) >= 10**30:
        return "a huge number"
    text = ascii(value[:100] if isinstance(value, str) else value)
    return text if len(text) <= 60 else text[:57] + "..."
