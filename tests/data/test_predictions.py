import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from i3cl.config import UserError
from i3cl.data import predictions
from i3cl.data.predictions import PREDICTION_SCHEMA, read_batches, read_predictions, read_table, to_table

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
        pq.write_table(to_table(rows), folder / f"{i:03d}.parquet")
    return str(folder)


def test_round_trip(tmp_path):
    url = write(tmp_path / "p", [row(1), row(1, "b", n=1)], [row(2, n=0)])
    (tmp_path / "p" / "done.json").write_text("{}")
    (tmp_path / "p" / "_metadata.parquet").write_text("not a part")
    first, second = read_predictions(url)
    assert (first.image_id, first.file_name, first.height, first.width, first.error) == (
        1,
        "1.jpg",
        10,
        20,
        None,
    )
    assert [(r.member, r.view, len(r.polygons)) for r in first.rows] == [
        ("a", "default", 2),
        ("b", "default", 1),
    ]
    seen = first.rows[0]
    assert seen.polygons[1].dtype == np.float32 and seen.scores.dtype == np.float32
    np.testing.assert_array_equal(seen.polygons[1], TRIANGLE + 1)
    np.testing.assert_array_equal(seen.scores, [0.25, 0.75])
    assert second.image_id == 2 and second.rows[0].polygons == [] and second.rows[0].scores.shape == (0,)


def test_a_single_file_is_a_url_too(tmp_path):
    write(tmp_path / "p", [row(1)])
    assert [p.image_id for p in read_predictions(str(tmp_path / "p" / "000.parquet"))] == [1]


def test_polygons_may_be_flat_and_view_may_be_absent(tmp_path):
    made = row(1, polygons=[[0, 0, 4, 0, 4, 3]], scores=[1])
    del made["view"], made["error"]
    (image,) = read_predictions(write(tmp_path / "p", [made]))
    np.testing.assert_array_equal(image.rows[0].polygons[0], [[0, 0], [4, 0], [4, 3]])
    assert image.rows[0].view == ""


def test_an_image_whose_rows_are_spread_comes_once_and_whole(tmp_path):
    url = write(tmp_path / "p", [row(1), row(2)], [row(3, "b"), row(2, "b")], [row(1, "b"), row(3)])
    images = list(read_predictions(url))
    assert [image.image_id for image in images] == [2, 1, 3]
    assert all(sorted(r.member for r in image.rows) == ["a", "b"] for image in images)


def test_a_row_written_twice_counts_once(tmp_path):
    url = write(tmp_path / "p", [row(1), row(1, "b")], [row(1)])
    (image,) = read_predictions(url)
    assert [r.member for r in image.rows] == ["a", "b"]


def test_views_of_one_member_are_kept_apart(tmp_path):
    (image,) = read_predictions(write(tmp_path / "p", [row(1), row(1, view="s800")]))
    assert [r.view for r in image.rows] == ["default", "s800"]


def test_unreadable_images_carry_their_reason(tmp_path):
    failed = {"height": 0, "width": 0, "error": "1.jpg: the file is empty", "n": 0}
    url = write(tmp_path / "p", [row(1, "a", **failed), row(1, "b", **failed), row(2)])
    first, second = read_predictions(url)
    assert first.error == "1.jpg: the file is empty" and first.rows == () and second.error is None


def test_columns(tmp_path):
    url = write(tmp_path / "p", [row(1), row(2)], [row(3)])
    table = read_table(url, ["image_id", "error"])
    assert table.column_names == ["image_id", "error"]
    assert table["image_id"].to_pylist() == [1, 2, 3]
    assert read_table(url).schema == PREDICTION_SCHEMA
    assert sum(batch.num_rows for batch in read_batches(url)) == 3


def test_batches_are_small(tmp_path, monkeypatch):
    monkeypatch.setattr(predictions, "_ROWS", 7)
    url = write(tmp_path / "p", [row(i, n=i % 4) for i in range(50)])
    assert max(batch.num_rows for batch in read_batches(url)) == 7
    images = list(read_predictions(url))
    assert [len(image.rows[0].polygons) for image in images] == [i % 4 for i in range(50)]
    for image in images:
        for i, polygon in enumerate(image.rows[0].polygons):
            np.testing.assert_array_equal(polygon, TRIANGLE + i)


def test_wider_types_of_other_writers_are_cast(tmp_path):
    wide = pa.schema(
        [
            PREDICTION_SCHEMA.field(i).with_type(kind)
            for i, kind in enumerate(
                [
                    pa.int32(),
                    pa.large_string(),
                    pa.int64(),
                    pa.int64(),
                    pa.string(),
                    pa.string(),
                    pa.large_list(pa.list_(pa.float64())),
                    pa.list_(pa.float64()),
                    pa.string(),
                ]
            )
        ]
    )
    pq.write_table(to_table([row(1)]).cast(wide), tmp_path / "0.parquet")
    (image,) = read_predictions(str(tmp_path))
    np.testing.assert_array_equal(image.rows[0].polygons[0], TRIANGLE)


def test_as_many_scores_as_polygons():
    with pytest.raises(ValueError, match="image 4: 2 polygons, 1 scores"):
        to_table([row(4, scores=[0.5])])


def test_no_rows():
    assert to_table([]).schema == PREDICTION_SCHEMA


def broken(kind, path):
    table = to_table([row(1)])
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


@pytest.mark.parametrize(
    "kind", ["text", "cut off", "no column", "other type", "no id", "odd", "short", "nan", "count"]
)
def test_a_broken_part_is_named(tmp_path, kind):
    broken(kind, tmp_path / "0.parquet")
    with pytest.raises(UserError, match=str(tmp_path)) as caught:
        list(read_predictions(str(tmp_path)))
    assert "\n" not in str(caught.value)


def test_nothing_to_read(tmp_path):
    for path in (tmp_path, tmp_path / "none"):
        with pytest.raises(UserError, match="holds no Parquet part"):
            list(read_predictions(str(path)))
