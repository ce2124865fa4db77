"""The MATLAB 5 reader against files that scipy writes, and against damaged ones."""

from __future__ import annotations

import io
import struct

import numpy as np
import pytest

from i3cl.data.importers import matlab
from i3cl.data.importers.matlab import MatFile
from i3cl.errors import UserError

scipy_io = pytest.importorskip("scipy.io", reason="scipy writes the files")


def written(compressed: bool = True, **variables) -> bytes:
    file = io.BytesIO()
    scipy_io.savemat(file, variables, do_compression=compressed)
    return file.getvalue()


def opened(data: bytes) -> MatFile:
    return MatFile(lambda: io.BytesIO(data), "gt.mat")


@pytest.mark.parametrize("compressed", [False, True])
@pytest.mark.parametrize("dtype", ["i1", "u1", "i2", "u2", "i4", "u4", "i8", "u8", "f4", "f8"])
@pytest.mark.parametrize("shape", [(1, 1), (2, 4), (2, 4, 3), (1, 300)])
def test_numbers_of_every_type_and_shape(compressed, dtype, shape):
    value = np.arange(np.prod(shape)).reshape(shape).astype(dtype)
    found = opened(written(compressed, other=1, value=value)).read("value")
    assert found.dtype == dtype
    np.testing.assert_array_equal(found, value)


@pytest.mark.parametrize("compressed", [False, True])
def test_texts_and_cells(compressed):
    cells = np.empty((2, 2), object)
    cells[0] = ["abc", "永安 é"]
    cells[1] = [np.array(["ab", "c"]), np.zeros((0, 0))]
    found = opened(written(compressed, cells=cells)).read("cells")
    assert found.shape == (2, 2)
    assert [list(found[0, 0]), list(found[0, 1]), list(found[1, 0])] == [["abc"], ["永安 é"], ["ab", "c "]]
    assert found[1, 1].size == 0


def test_cells_come_one_at_a_time_in_order():
    cells = np.empty((1, 5000), object)
    cells[0] = [np.full((2, 4), i, float) for i in range(5000)]
    file = opened(written(cells=cells))
    assert file.count("cells") == 5000
    assert [int(cell[0, 0]) for cell in file.cells("cells")] == list(range(5000))


def test_a_big_endian_file():
    data = b"MATLAB".ljust(124) + struct.pack(">H", 0x100) + b"MI"
    body = struct.pack(">IIII", 6, 8, 6, 0) + struct.pack(">IIii", 5, 8, 1, 2) + struct.pack(">HH4s", 1, 1, b"v\0\0\0")
    body = body[:-8] + struct.pack(">I4s", 1 << 16 | 1, b"v\0\0\0") + struct.pack(">IIdd", 9, 16, 1.5, 2.5)
    found = opened(data + struct.pack(">II", 14, len(body)) + body).read("v")
    np.testing.assert_array_equal(found, [[1.5, 2.5]])


@pytest.mark.parametrize(
    ("data", "words"),
    [
        (b"", "is not a MATLAB 5 file"),
        (b"\x89HDF\r\n\x1a\n" + b"\0" * 200, "HDF5 (v7.3); save it in MATLAB with -v7"),
        (b"MATLAB 7.3 MAT-file".ljust(126) + b"IM", "HDF5 (v7.3)"),
        (written(a=1), "no variable wanted; there are: a"),
        (written(wanted={"a": 1}), "neither number nor text nor cells"),
        (written(wanted=np.array([1 + 2j])), "neither number nor text"),
        (written(a=1)[:150], "ends in the middle"),
        (b"MATLAB".ljust(126) + b"IM" + struct.pack("<II", 15, 8) + b"garbage!", "damaged"),
    ],
)
def test_what_cannot_be_read_is_said_in_one_line(data, words):
    with pytest.raises(UserError) as caught:
        opened(data).read("wanted")
    assert words in str(caught.value)
    assert "\n" not in str(caught.value)


def test_a_bomb_costs_no_memory(monkeypatch):
    """A compressed variable that declares, and unpacks to, far more than a label holds."""
    monkeypatch.setattr(matlab, "MAX_CELL_BYTES", 1 << 16)
    data = written(wanted=np.zeros((1, 1_000_000)))
    assert len(data) < 1 << 15
    with pytest.raises(UserError, match="larger than"):
        opened(data).read("wanted")
    cells = np.empty((1, 1), object)
    cells[0, 0] = np.zeros((1, 1_000_000))
    with pytest.raises(UserError, match="a cell of more than"):
        list(opened(written(wanted=cells)).cells("wanted"))


def test_more_cells_declared_than_there_are():
    cells = np.empty((1, 3), object)
    cells[0] = ["a", "b", "c"]
    data = bytearray(written(False, wanted=cells))
    at = data.index(struct.pack("<ii", 1, 3))
    data[at : at + 8] = struct.pack("<ii", 1, 40_000_000)
    with pytest.raises(UserError):
        opened(bytes(data)).read("wanted")
    with pytest.raises(UserError):
        list(opened(bytes(data)).cells("wanted"))
