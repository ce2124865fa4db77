"""Reading MATLAB 5 files as a stream: numbers, texts and cell arrays, one cell at a time.

scipy.io.loadmat loads a whole variable, which for SynthText's gt.mat means many gigabytes of small arrays, and has no limits on
what a broken file may declare. Format: "MAT-File Format", The MathWorks; level 5. Only what text labels need is read;
structures, objects and functions are refused.
"""

from __future__ import annotations

import struct
import zlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import IO, Any, Literal, Protocol

import numpy as np
from numpy.typing import NDArray

from i3cl.errors import UserError

MAX_CELL_BYTES = 16 << 20
"""Largest cell, or largest variable that is read at once, in bytes."""
_MAX_CELLS = 50_000_000
_MAX_DEPTH = 4
_BLOCK = 1 << 16

_MATRIX, _COMPRESSED, _UTF8, _UTF16, _UTF32 = 14, 15, 16, 17, 18
_NUMBERS = {1: "i1", 2: "u1", 3: "i2", 4: "u2", 5: "i4", 6: "u4", 7: "f4", 9: "f8", 12: "i8", 13: "u8"}
_CELL, _CHAR = 1, 4
_NUMERIC = range(6, 16)


class _Stream(Protocol):
    def read(self, count: int, /) -> bytes: ...


class MatFile:
    """A MATLAB 5 file. `opener` opens the file, seekable; it is called again for every variable."""

    def __init__(self, opener: Callable[[], IO[bytes]], where: str) -> None:
        self._opener, self.where = opener, where
        with opener() as file:
            header = file.read(128)
            mark = header[126:128]
            if mark not in (b"IM", b"MI") or header.startswith(b"MATLAB 7.3"):
                hint = "is HDF5 (v7.3)" if b"MATLAB 7.3" in header or header.startswith(b"\x89HDF") else "is not a MATLAB 5 file"
                raise UserError(f"{where}: {hint}; save it in MATLAB with -v7")
            self._order: Literal["<", ">"] = "<" if mark == b"IM" else ">"
            self._variables = self._index(file)

    def cells(self, name: str) -> Iterator[NDArray[Any]]:
        """The cells of a 1 x N or N x 1 cell array in order, each as ``read`` returns it; one is in memory at a time."""
        with self._opener() as file:
            stream, size = self._open(file, name)
            head = self._head(stream, size)
            if head.kind != _CELL:
                raise self._bad(f"{name} is not a cell array")
            for _ in range(head.count):
                yield self._element(stream, 1)

    def count(self, name: str) -> int:
        """Number of cells in a cell array, as the file declares it."""
        with self._opener() as file:
            stream, size = self._open(file, name)
            return self._head(stream, size).count

    def read(self, *names: str) -> NDArray[Any]:
        """The first of these variables that exists: numbers, text (one str per row) or an object array of such values."""
        name = next((n for n in names if n in self._variables), names[0])
        with self._opener() as file:
            stream, size = self._open(file, name)
            if size > MAX_CELL_BYTES:
                raise self._bad(f"{name} is larger than {MAX_CELL_BYTES >> 20} MiB")
            return self._matrix(stream, size, 0)

    # -------------------------------------------------------------------------------------------------- structure

    def _index(self, file: IO[bytes]) -> dict[str, int]:
        """Variable name -> offset of its element. Of a compressed element, only the beginning is unpacked."""
        found: dict[str, int] = {}
        offset = 128
        while True:
            file.seek(offset)
            tag = file.read(8)
            if len(tag) < 8 or len(found) > 1000:
                return found
            kind, size = struct.unpack(self._order + "II", tag)
            if kind not in (_MATRIX, _COMPRESSED):
                raise self._bad(f"an element of type {kind} where a variable should be")
            stream: _Stream = file
            if kind == _COMPRESSED:
                stream = _Inflated(file, size, self._bad)
                inner = self._exactly(stream, 8)
                if struct.unpack(self._order + "I", inner[:4])[0] != _MATRIX:
                    raise self._bad("a compressed element that is not a variable")
            found.setdefault(self._head(stream, size).name, offset)
            offset += 8 + size

    def _open(self, file: IO[bytes], name: str) -> tuple[_Stream, int]:
        """A stream at the beginning of the variable's body, and the body's size in bytes."""
        if name not in self._variables:
            shown = ", ".join(name if name.isidentifier() else ascii(name) for name in sorted(self._variables))[:200]
            raise self._bad(f"no variable {name}; there are: {shown or 'none'}")
        file.seek(self._variables[name])
        kind, size = struct.unpack(self._order + "II", file.read(8))
        if kind == _MATRIX:
            return file, size
        stream = _Inflated(file, size, self._bad)
        return stream, struct.unpack(self._order + "II", self._exactly(stream, 8))[1]

    def _element(self, stream: _Stream, depth: int) -> NDArray[Any]:
        kind, size = struct.unpack(self._order + "II", self._exactly(stream, 8))
        if kind != _MATRIX:
            raise self._bad(f"an element of type {kind} where a cell should be")
        if size > MAX_CELL_BYTES:
            raise self._bad(f"a cell of more than {MAX_CELL_BYTES >> 20} MiB")
        return self._matrix(stream, size, depth)

    def _matrix(self, stream: _Stream, size: int, depth: int) -> NDArray[Any]:
        if size == 0:
            return np.zeros((0, 0))
        body = _Bytes(self._exactly(stream, size))
        head = self._head(body, size)
        if head.kind == _CELL:
            if depth >= _MAX_DEPTH or head.count > size // 8:
                raise self._bad("cells nested too deeply, or more than there are")
            cells = np.empty(head.count, object)
            for i in range(head.count):
                cells[i] = self._element(body, depth + 1)
            return cells.reshape(head.shape, order="F")
        kind, data = self._data(body)
        if head.kind == _CHAR:
            return self._characters(kind, data, head.shape)
        if head.kind not in _NUMERIC or head.complex or kind not in _NUMBERS:
            raise self._bad("a value that is neither number nor text nor cells")
        dtype = np.dtype(_NUMBERS[kind]).newbyteorder(self._order)
        if len(data) != dtype.itemsize * head.count:
            raise self._bad(f"{len(data)} bytes for an array of {head.shape}")
        values = np.frombuffer(data, dtype).reshape(head.shape, order="F")
        return values.astype(dtype.newbyteorder("="))

    def _characters(self, kind: int, data: bytes, shape: tuple[int, ...]) -> NDArray[np.str_]:
        """(rows,) str: a text matrix keeps its rows padded with blanks."""
        codec = {1: "latin-1", 2: "latin-1", _UTF8: "utf-8", _UTF32: "utf-32"}.get(kind, "utf-16")
        if kind not in (1, 2, 4, _UTF8, _UTF16, _UTF32):
            raise self._bad(f"text stored as type {kind}")
        if codec.startswith("utf-") and codec != "utf-8":
            codec += "-le" if self._order == "<" else "-be"
        try:
            text = data.decode(codec)
        except UnicodeDecodeError:
            raise self._bad(f"text that is not {codec}") from None
        if len(shape) != 2 or not text:
            return np.array([text] if text else [], dtype=np.str_)
        rows = shape[0]
        if rows <= 1:
            return np.array([text])
        if len(text) != rows * shape[1]:
            raise self._bad(f"{len(text)} characters for a text of {shape}")
        return np.array([text[row::rows] for row in range(rows)])

    def _head(self, stream: _Stream, size: int) -> _Head:
        if size < 24:
            raise self._bad("a variable without a head")
        kind, flags = self._data(stream)
        if kind != 6 or len(flags) != 8:
            raise self._bad("a variable without array flags")
        flag = struct.unpack(self._order + "I", flags[:4])[0]
        kind, raw = self._data(stream)
        if kind != 5 or not 8 <= len(raw) <= 128 or len(raw) % 4:
            raise self._bad("a variable without dimensions")
        shape = struct.unpack(f"{self._order}{len(raw) // 4}i", raw)
        count = 1
        for side in shape:
            count *= side
        if min(shape) < 0 or not 0 <= count <= _MAX_CELLS:
            raise self._bad(f"dimensions {shape}")
        _, name = self._data(stream)
        return _Head(flag & 0xFF, bool(flag & 0x800), shape, count, name.decode("latin-1"))

    def _data(self, stream: _Stream) -> tuple[int, bytes]:
        """Type and bytes of a data element; up to 4 bytes are stored in the tag itself."""
        tag = self._exactly(stream, 8)
        kind, size = struct.unpack(self._order + "II", tag)
        if kind >> 16:
            small = kind >> 16
            if small > 4:
                raise self._bad(f"a small element of {small} bytes")
            return kind & 0xFFFF, tag[4 : 4 + small]
        if size > MAX_CELL_BYTES:
            raise self._bad(f"an element of {size} bytes")
        return kind, self._exactly(stream, size + -size % 8)[:size]

    def _exactly(self, stream: _Stream, count: int) -> bytes:
        data = stream.read(count)
        if len(data) < count:
            raise self._bad("ends in the middle of a value; is the file complete?")
        return data

    def _bad(self, problem: str) -> UserError:
        return UserError(f"{self.where}: not a readable MATLAB 5 file: {problem}")


@dataclass(frozen=True)
class _Head:
    kind: int
    complex: bool
    shape: tuple[int, ...]
    count: int
    name: str


class _Bytes:
    def __init__(self, data: bytes) -> None:
        self._data, self._at = data, 0

    def read(self, count: int, /) -> bytes:
        piece = self._data[self._at : self._at + count]
        self._at += len(piece)
        return piece


class _Inflated:
    """The unpacked bytes of a compressed element, made when they are read: a zip bomb costs only what is read of it."""

    def __init__(self, file: IO[bytes], size: int, bad: Callable[[str], UserError]) -> None:
        self._file, self._left, self._bad = file, size, bad
        self._inflate = zlib.decompressobj()
        self._ready = bytearray()
        self._at = 0

    def read(self, count: int, /) -> bytes:
        while len(self._ready) - self._at < count and self._more(count):
            pass
        piece = bytes(self._ready[self._at : self._at + count])
        self._at += len(piece)
        if self._at > 4 * _BLOCK:
            del self._ready[: self._at]
            self._at = 0
        return piece

    def _more(self, count: int) -> bool:
        packed = self._inflate.unconsumed_tail
        if not packed:
            packed = self._file.read(min(_BLOCK, self._left))
            self._left -= len(packed)
        if not packed or self._inflate.eof:
            return False
        try:
            self._ready += self._inflate.decompress(packed, max(_BLOCK, count))
        except zlib.error as error:
            raise self._bad(f"compressed data are damaged ({error})") from None
        return True
