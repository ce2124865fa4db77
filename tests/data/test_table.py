"""Data sets in Parquet: the same checks as of a json, without ever holding the whole."""

import itertools
import tracemalloc

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import shapely

from i3cl.config import SourceSettings
from i3cl.data.formats.coco import read_coco, write_coco
from i3cl.data.formats.records import (
    Dataset,
    ImageRecord,
    Instance,
    TableRecords,
    record_table,
)
from i3cl.data.formats.table import write_parquet, write_shards
from i3cl.data.loading.ingest import mix, read_source
from i3cl.errors import UserError

BOX = np.array([[5, 50], [30, 50], [30, 60], [5, 60]], np.float32)


def record(i: int) -> ImageRecord:
    instances = tuple(Instance(BOX + k, ignore=k == 1, score=0.5, votes=k, text=f"t{k}") for k in range(i % 4))
    return ImageRecord(i, f"d/{i}.jpg", 80, 120, instances, "art" if i % 2 else None)


def same(a: ImageRecord, b: ImageRecord) -> bool:
    def values(r: ImageRecord):
        head = (r.id, r.file_name, r.height, r.width, r.source)
        return head, [(i.polygon.tolist(), i.ignore, i.lossweight, i.score, i.votes, i.text, i.language) for i in r.instances]

    return values(a) == values(b)


def test_shards_are_a_sequence(tmp_path):
    out = str(tmp_path / "set")
    assert write_shards(out, map(record, range(3000)), rows_per_shard=1200) == 3000
    assert [pq.read_metadata(p).num_rows for p in sorted((tmp_path / "set").iterdir())] == [1024, 1024, 952]
    data = read_coco(out, "root", check_files=False)
    records = data.records
    assert len(data) == len(records) == 3000 and data.summary() == "set: 3000 images, 3000 instances, 1500 ignore regions"
    assert same(records[2999], record(2999)) and same(records[-1], record(2999)) and data.path(records[7]) == "root/d/7.jpg"
    with pytest.raises(IndexError):
        records[3000]
    part = records[10:2000:7]
    assert isinstance(part, TableRecords) and len(part) == 285
    assert same(part[3], record(31)) and same(part[1:][::-1][0], record(1998))
    for found, wanted in zip(part, range(10, 2000, 7), strict=True):
        assert same(found, record(wanted))
    assert sum(1 for _ in records) == 3000 and not len(records[5:5]) and list(records[5:5]) == []
    rows = np.array([2500, 3, 3, 1024, 0])
    assert records.take(rows)["image_id"].to_pylist() == rows.tolist()
    assert records.take(np.zeros(0, np.int64)).num_rows == 0


def test_shard_sizes_and_an_empty_set(tmp_path):
    assert write_shards(str(tmp_path / "a"), map(record, range(10)), rows_per_shard=4) == 10
    assert len(list((tmp_path / "a").iterdir())) == 3
    assert write_shards(str(tmp_path / "b"), []) == 0 and len(read_coco(str(tmp_path / "b"), "")) == 0
    with pytest.raises(ValueError, match="two records have the id 1"):
        write_shards(str(tmp_path / "c"), [record(1), record(1)])
    assert not (tmp_path / "c").exists()
    with pytest.raises(UserError, match="exists already"):
        write_shards(str(tmp_path / "a"), [])


def test_memory_does_not_grow_with_the_set(tmp_path):
    sizes = 10_000, 40_000
    python, held = [], []
    for size in sizes:
        write_shards(str(tmp_path / f"{size}"), map(record, range(size)))
        before = pa.total_allocated_bytes()
        tracemalloc.start()
        data = read_coco(str(tmp_path / f"{size}"), "root", check_files=False)
        python.append(tracemalloc.get_traced_memory()[1])
        tracemalloc.stop()
        held.append(pa.total_allocated_bytes() - before)
        assert len(data) == size
        del data
    more = sizes[1] - sizes[0]
    # Ids, hashes of names and flags: a row costs about 90 bytes while it is read, as Python objects more than 1,000.
    assert (python[1] - python[0]) / more < 120, f"{python} bytes of Python memory for {sizes} rows"
    assert (held[1] - held[0]) / more < 1, f"{held} bytes of Arrow memory: the table lies in its file"
    assert python[1] < 12 << 20


def test_crossed_and_repeating_rings_are_repaired_as_in_a_json(tmp_path):
    crossed = np.array([[10, 10], [50, 10], [10, 30], [50, 30]], np.float32)
    repeated = np.concatenate([BOX[:1], BOX])
    records = [record(0), ImageRecord(1, "a.jpg", 80, 120, (Instance(crossed), Instance(repeated), Instance(BOX))), record(2)]
    write_coco(str(tmp_path / "s.json"), records)
    write_parquet(str(tmp_path / "s.parquet"), records, "")
    table, json = (read_coco(str(tmp_path / name), "", check_files=False) for name in ("s.parquet", "s.json"))
    assert all(map(same, table.records, json.records))
    assert [p.kind for p in table.problems] == [p.kind for p in json.problems] == ["crossing", "repeated"]
    assert shapely.Polygon(table.records[1].instances[0].polygon).area == 800


def test_a_row_of_unreadable_labels_is_not_one_without_text(tmp_path):
    line = Instance(np.array([[1, 1], [5, 5], [9, 9]], np.float32))
    write_parquet(str(tmp_path / "s.parquet"), [ImageRecord(1, "a.jpg", 80, 120, (line,)), record(3)], "")
    data = read_coco(str(tmp_path / "s.parquet"), "", check_files=False, skip_bad=True)
    assert [r.id for r in data.records] == [3] and [p.kind for p in data.problems] == ["zero area", "no label readable"]


def test_companions_of_another_system_are_no_parts(tmp_path):
    write_shards(str(tmp_path / "set"), [record(1)])
    (tmp_path / "set/._00000.parquet").write_bytes(b"\0\5\26\7")
    (tmp_path / "set/__MACOSX").mkdir()
    (tmp_path / "set/__MACOSX/00000.parquet").write_bytes(b"x")
    assert len(read_coco(str(tmp_path / "set"), "", check_files=False)) == 1


SOUND = dict(ignore=False, lossweight=1.0, score=None, votes=None, text=None, language=None)
BAD = [
    (dict(polygon=[1, 1, 9, 1, 9]), "5 numbers"),
    (dict(polygon=[]), "0 numbers"),
    (dict(polygon=None), "has no polygon"),
    (dict(polygon=[1, 1, 9, 1, 9, float("nan")]), "not finite"),
    (dict(polygon=[1, 1, 9, 1, 9, None]), "list of numbers"),
    (dict(polygon=[1, 1, 5, 5, 9, 9]), "no area"),
    (dict(polygon=[200, 1, 210, 1, 210, 9]), "outside the image"),
    (dict(lossweight=-1.0), "lossweight is -1"),
    (dict(lossweight=float("nan")), "lossweight is nan"),
    (dict(score=1.5), "score is 1.5"),
    (dict(votes=-2), "votes is -2"),
    (None, "is null"),
]


@pytest.mark.parametrize(("change", "message"), BAD)
def test_one_bad_instance_among_many(change, message, tmp_path):
    table = record_table([record(i) for i in range(6)], "")
    instance = None if change is None else {"polygon": BOX.ravel().tolist(), **SOUND, **change}
    cells = table["instances"].to_pylist()
    cells[3].insert(1, instance)
    cells = pa.array(cells, table.schema.field("instances").type)
    pq.write_table(table.set_column(5, "instances", cells), tmp_path / "s.parquet")
    path = str(tmp_path / "s.parquet")
    with pytest.raises(UserError, match=rf"s\.parquet: image 3, instance 2: .*{message}"):
        read_coco(path, "", check_files=False)
    data = read_coco(path, "", check_files=False, skip_bad=True)
    assert [p.left_out for p in data.problems] == [True] and all(map(same, data.records, map(record, range(6))))


def test_repaired_instances_and_bad_images_as_in_a_json(tmp_path):
    wide = Instance(np.array([[100, 10], [140, 10], [140, 30], [100, 30]], np.float32), lossweight=0.5)
    closed = Instance(np.concatenate([BOX, BOX[:1]]))
    records = [record(0), ImageRecord(1, "./a//b.jpg", 80, 120, (wide, closed)), ImageRecord(2, "../x.jpg", 80, 120), record(3)]
    records += [ImageRecord(3, "again.jpg", 80, 120), ImageRecord(5, "z.jpg", 0, 120)]
    write_parquet(str(tmp_path / "s.parquet"), records, "")
    data = read_coco(str(tmp_path / "s.parquet"), "r", check_files=False, skip_bad=True)
    assert [r.id for r in data.records] == [0, 1, 3] and data.records[1].file_name == "a/b.jpg"
    assert [p.kind for p in data.problems] == ["clipped", "file name", "duplicate image id", "image size"]
    first, second = data.records[1].instances
    assert first.polygon.max() == 120 and len(second.polygon) == 4
    write_coco(str(tmp_path / "s.json"), [records[0], records[1], records[3]])
    from_json = read_coco(str(tmp_path / "s.json"), "r", check_files=False)
    assert all(map(same, data.records, from_json.records))


def test_missing_files_are_told_of_a_table_too(tmp_path):
    write_parquet(str(tmp_path / "s.parquet"), [record(0), record(1)], "")
    (tmp_path / "d").mkdir()
    (tmp_path / "d" / "1.jpg").touch()
    with pytest.raises(UserError, match=r"image 0: .*d/0\.jpg is not there"):
        read_coco(str(tmp_path / "s.parquet"), str(tmp_path))
    assert [r.id for r in read_coco(str(tmp_path / "s.parquet"), str(tmp_path), skip_bad=True).records] == [1]


def test_tables_of_other_writers(tmp_path):
    heads = {"image_id": pa.array([1, 2], pa.int32()), "file_name": pa.array(["a.jpg", "b.jpg"], pa.large_string())}
    heads |= {"height": pa.array([80, 80]), "width": pa.array([120, 120]), "more": pa.array([0, 0])}
    pq.write_table(pa.table(heads), tmp_path / "unlabelled.parquet")
    assert [r.instances for r in read_coco(str(tmp_path / "unlabelled.parquet"), "", check_files=False).records] == [(), ()]
    cells = pa.array([[{"polygon": BOX.ravel().astype(float).tolist()}], None])
    pq.write_table(pa.table(heads | {"instances": cells}), tmp_path / "few.parquet")
    first, second = read_coco(str(tmp_path / "few.parquet"), "", check_files=False).records
    assert first.instances[0].lossweight == 1 and not first.instances[0].ignore and second.instances == ()


def test_training_order_is_that_of_the_json(tmp_path):
    records = [record(i) for i in range(2100)]
    write_coco(str(tmp_path / "s.json"), records)
    write_shards(str(tmp_path / "s"), records)
    sources = [SourceSettings(annotations=str(tmp_path / n), images="x", lossweight=0.25) for n in ("s.json", "s")]
    json, table = (mix([source, source], ".", check_files=False) for source in sources)
    order = json.order(1000, 500, seed=3)
    assert np.array_equal(order, table.order(1000, 500, seed=3))
    assert json.rows(order).to_pylist() == table.rows(order).to_pylist()
    instances = itertools.chain.from_iterable(r.instances for r in read_source(sources[1], ".", check_files=False).records)
    assert {i.lossweight for i in instances} == {0.25}


def test_a_subset_of_a_table_stays_a_table(tmp_path):
    """Records of ten million images, one by one, would fill the memory of the driver."""
    records = [ImageRecord(k, f"{k}.jpg", 40, 60) for k in range(1, 8)]
    write_parquet(str(tmp_path / "set.parquet"), records, "/i")
    table = read_coco(str(tmp_path / "set.parquet"), "/i", check_files=False)
    listed = Dataset("set", "/i", tuple(records))
    for whole in (table, listed):
        part = whole.subset(np.array([1, 3, 6]), "three")
        assert [record.id for record in part.records] == [2, 4, 7] and part.name == "three"
        assert isinstance(part.records, type(whole.records))
        assert len(whole.subset(np.zeros(0, np.int64), "none")) == 0
