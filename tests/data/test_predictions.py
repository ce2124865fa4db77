import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from i3cl.data.formats import predictions
from i3cl.data.formats.predictions import (
    PREDICTION_SCHEMA,
    prediction_table,
    read_batches,
    read_predictions,
)
from i3cl.errors import UserError

TRIANGLE = np.array([[0.5, 0], [4, 0], [4, 3]], np.float32)


def row(image_id: int, member: str = "a", n: int = 2, **changes) -> dict:
    polygons = [TRIANGLE + i for i in range(n)]
    scores = np.linspace(0.25, 0.75, n, dtype=np.float32)
    return {
        "image_id": image_id,
        "file_name": f"{image_id}.jpg",
        "height": 10,
        "width": 20,
        "member": member,
        "view": "default",
        "polygons": polygons,
        "scores": scores,
        "error": None,
    } | changes


def write(folder, *parts) -> str:
    folder.mkdir(exist_ok=True)
    for i, rows in enumerate(parts):
        pq.write_table(prediction_table(rows), folder / f"{i:03d}.parquet")
    return str(folder)


def test_round_trip(tmp_path):
    url = write(tmp_path / "p", [row(1), row(1, "b", n=1)], [row(2, n=0)])
    (tmp_path / "p" / "done.json").write_text("{}")
    (tmp_path / "p" / "_metadata.parquet").write_text("not a part")
    first, second = read_predictions(url)
    head = ("image_id", "file_name", "height", "width", "view", "error")
    assert [first[0][name] for name in head] == [1, "1.jpg", 10, 20, "default", None]
    assert [(r["member"], len(r["polygons"])) for r in first] == [("a", 2), ("b", 1)]
    polygon, scores = first[0]["polygons"][1], first[0]["scores"]
    assert polygon.dtype == np.float32 and scores.dtype == np.float32
    np.testing.assert_array_equal(polygon, TRIANGLE + 1)
    np.testing.assert_array_equal(scores, [0.25, 0.75])
    assert second[0]["image_id"] == 2 and second[0]["polygons"] == [] and second[0]["scores"].shape == (0,)


def test_a_single_file_is_a_url_too(tmp_path):
    write(tmp_path / "p", [row(1)])
    assert [rows[0]["image_id"] for rows in read_predictions(str(tmp_path / "p" / "000.parquet"))] == [1]


def test_polygons_may_be_flat_and_view_may_be_absent(tmp_path):
    made = row(1, polygons=[[0, 0, 4, 0, 4, 3]], scores=[1])
    np.testing.assert_array_equal(predictions.polygons_of(made)[0], [[0, 0], [4, 0], [4, 3]])
    del made["view"], made["error"]
    ((read,),) = read_predictions(write(tmp_path / "p", [made]))
    np.testing.assert_array_equal(read["polygons"][0], [[0, 0], [4, 0], [4, 3]])
    assert read["view"] is None


def test_an_image_whose_rows_are_spread_comes_once_and_whole(tmp_path):
    url = write(tmp_path / "p", [row(1), row(2)], [row(3, "b"), row(2, "b")], [row(1, "b"), row(3)])
    images = list(read_predictions(url))
    assert [rows[0]["image_id"] for rows in images] == [2, 1, 3]
    assert all(sorted(r["member"] for r in rows) == ["a", "b"] for rows in images)


def test_a_row_written_twice_counts_once(tmp_path):
    url = write(tmp_path / "p", [row(1), row(1, "b")], [row(1)])
    assert [[r["member"] for r in rows] for rows in read_predictions(url)] == [["a", "b"]]


def test_views_of_one_member_are_kept_apart(tmp_path):
    (rows,) = read_predictions(write(tmp_path / "p", [row(1), row(1, view="s800")]))
    assert [r["view"] for r in rows] == ["default", "s800"]


def test_predictions_of_one_member(tmp_path):
    failed = {"height": 0, "width": 0, "error": "3.jpg: the file is empty", "n": 0}
    rows = [row(1), row(1, "b", n=1), row(1, "b", view="s800"), row(2, "b", n=0), row(3, "b", **failed)]
    found = predictions.member_predictions(write(tmp_path / "p", rows), "b")
    assert {image_id: len(polygons) for image_id, (polygons, _) in found.items()} == {1: 1, 2: 0}
    np.testing.assert_array_equal(found[1][1], [0.25])
    assert next(read_predictions(str(tmp_path / "p")))[0]["error"] is None


def test_batches_of_some_columns(tmp_path):
    url = write(tmp_path / "p", [row(1), row(2)], [row(3, error="3.jpg: gone")])
    table = pa.Table.from_batches(read_batches(url, ["image_id", "error"]))
    assert table.to_pydict() == {"image_id": [1, 2, 3], "error": [None, None, "3.jpg: gone"]}
    assert next(read_batches(url)).schema == PREDICTION_SCHEMA


def test_batches_are_small(tmp_path, monkeypatch):
    monkeypatch.setattr(predictions, "_ROWS", 7)
    url = write(tmp_path / "p", [row(i, n=i % 4) for i in range(50)])
    assert max(batch.num_rows for batch in read_batches(url)) == 7
    for i, (read,) in enumerate(read_predictions(url)):
        assert len(read["polygons"]) == len(read["scores"]) == i % 4
        for k, polygon in enumerate(read["polygons"]):
            np.testing.assert_array_equal(polygon, TRIANGLE + k)


def test_wider_types_of_other_writers_are_cast(tmp_path):
    points = pa.large_list(pa.list_(pa.float64()))
    kinds = [pa.int32(), pa.large_string(), pa.int64(), pa.int64(), pa.string(), pa.string(), points]
    wide = pa.schema([PREDICTION_SCHEMA.field(i).with_type(kind) for i, kind in enumerate(kinds)])
    wide = wide.append(pa.field("scores", pa.list_(pa.float64()))).append(PREDICTION_SCHEMA.field("error"))
    # The last columns are younger than some writers.
    pq.write_table(prediction_table([row(1)]).drop_columns(["granularity", "kind"]).cast(wide), tmp_path / "0.parquet")
    ((read,),) = read_predictions(str(tmp_path))
    np.testing.assert_array_equal(read["polygons"][0], TRIANGLE)
    assert read["granularity"] is None and read["kind"] is None


def test_as_many_scores_as_polygons():
    with pytest.raises(ValueError, match="image 4: 2 polygons, 1 scores"):
        prediction_table([row(4, scores=[0.5])])


def test_no_rows():
    assert prediction_table([]).schema == PREDICTION_SCHEMA


def broken(kind, path):
    table = prediction_table([row(1)])
    if kind == "text":
        path.write_text("no table")
    elif kind == "cut off":
        pq.write_table(table, path)
        path.write_bytes(path.read_bytes()[:-30])
    elif kind == "no column":
        pq.write_table(table.drop_columns(["scores"]), path)
    elif kind == "other type":
        pq.write_table(table.set_column(7, "scores", [["a"]]), path)
    elif kind == "no id":
        pq.write_table(table.set_column(0, "image_id", pa.array([None], pa.int64())), path)
    else:
        numbers = {"odd": [0.0] * 7, "short": [0.0] * 4, "nan": [float("nan")] * 6, "count": [0.0] * 6}[kind]
        scores = [0.5, 0.5] if kind == "count" else [0.5]
        table = table.set_column(6, "polygons", pa.array([[numbers]], PREDICTION_SCHEMA.field(6).type))
        pq.write_table(table.set_column(7, "scores", pa.array([scores], pa.list_(pa.float32()))), path)


@pytest.mark.parametrize("kind", ["text", "cut off", "no column", "other type", "no id", "odd", "short", "nan", "count"])
def test_a_broken_part_is_named(tmp_path, kind):
    broken(kind, tmp_path / "0.parquet")
    with pytest.raises(UserError, match=str(tmp_path)) as caught:
        list(read_predictions(str(tmp_path)))
    assert "\n" not in str(caught.value)


def test_nothing_to_read(tmp_path):
    for path in (tmp_path, tmp_path / "none"):
        with pytest.raises(UserError, match="holds no Parquet part"):
            list(read_predictions(str(path)))
