"""What a column may hold, and that no other one is looked at."""

import datetime
import json
import subprocess
import sys

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from bad_files import parquet
from datasets import Dataset

from configs.errors import InputError
from configs.schema.data import SourceSettings
from trainer.data.reading import rows as limits
from trainer.data.sources import ReadCounts, read_rows

TEXTS = ["one", "two", None, "one", " ", "caf\u00e9"]
TEXT_TYPES = [pa.string(), pa.large_string(), pa.string_view()]


def read(path, *columns):
    counts = ReadCounts()
    return list(read_rows(SourceSettings(source=str(path)), columns, counts)), counts


def write(tmp_path, name, content):
    path = tmp_path / name
    path.write_bytes(content if isinstance(content, bytes) else content.encode())
    return path


def refusal(path, *columns):
    with pytest.raises(InputError) as refused:
        read(path, *columns)
    return str(refused.value).removeprefix(str(path))


@pytest.mark.parametrize(
    "column",
    [*(pa.array(TEXTS, kind) for kind in TEXT_TYPES), pa.array(TEXTS).dictionary_encode()],
    ids=lambda column: str(column.type),
)
def test_every_form_of_a_text_column_is_read_as_texts_and_a_missing_text_is_empty(tmp_path, column):
    rows, counts = read(write(tmp_path, "d.parquet", parquet({"text": column})))
    assert [row["text"] for row in rows] == ["one", "two", "one", "caf\u00e9"]
    assert (counts.rows, counts.empty) == (6, 2)


def test_categories_of_pandas_and_columns_without_any_value_are_read(tmp_path):
    table = pa.table({"text": TEXTS}).to_pandas().astype("category")
    table.to_parquet(tmp_path / "categories.parquet")
    assert len(read(tmp_path / "categories.parquet")[0]) == 4
    nothing = write(tmp_path, "nothing.parquet", parquet({"text": pa.nulls(5)}))
    assert (read(nothing)[0], read(nothing)[1].empty) == ([], 5)


def test_missing_texts_are_counted_in_jsonl_and_csv(tmp_path):
    rows, counts = read(write(tmp_path, "d.jsonl", '{"text": null}\n{"text": NaN}\n{"text": ""}\n{"text": "x"}\n'))
    assert (len(rows), counts.rows, counts.empty) == (1, 4, 3)
    rows, counts = read(write(tmp_path, "d.csv", 'text,id\n,1\n" ",2\nx,3\n\n'))
    assert (len(rows), counts.rows, counts.empty) == (1, 3, 2)


def test_texts_of_mixed_types_are_refused_where_the_first_other_one_stands(tmp_path):
    lines = '{"text": "x"}\n{"text": null}\n\n{"text": 7.5}\n{"text": ["x"]}\n'
    assert refusal(write(tmp_path, "d.jsonl", lines)).startswith(
        ", line 4: the text column 'text' holds a number; give"
    )


def test_a_dataset_of_hugging_face_is_read_by_the_same_rules(tmp_path):
    (tmp_path / "set" / "data").mkdir(parents=True)
    file = tmp_path / "set" / "data" / "train-00000-of-00001.parquet"
    Dataset.from_dict({"text": [["a", "b"]], "id": ["x"]}).to_parquet(file)
    with pytest.raises(InputError, match="the text column 'text' holds the type list"):
        read(f"hf:{tmp_path / 'set'}")


def test_ids_in_csv_are_not_read_by_a_library_that_moves_columns(tmp_path):
    """``datasets`` takes the first of four fields for an index, and so each field for its neighbour's."""
    write(tmp_path, "d.csv", "text,patient,site\na,b,P1,north\n")
    with pytest.raises(InputError, match="ids in CSV are not read by way of hf:; give the path"):
        read(f"hf:{tmp_path}", "site", "patient")


def test_a_column_that_nobody_asked_for_is_not_looked_at(tmp_path):
    far = pa.array([2**61, 1, 2], pa.int64()).view(pa.timestamp("us"))
    zone = pa.array([1, 2, 3], pa.timestamp("us", tz="Mars/Olympus"))
    broken = pa.array([b"\xff", b"\xfe", b"x"]).view(pa.string())
    texts = pa.array(["a", "b", "c"])
    content = parquet({"text": texts, "at": far, "zone": zone, "note": broken, "id": pa.array([3, 2, 1])})
    assert read(write(tmp_path, "d.parquet", content), "id")[0] == [
        {"text": text, "id": number} for text, number in zip("abc", (3, 2, 1), strict=True)
    ]
    rows, _ = read(write(tmp_path, "d.jsonl", '{"text": "a", "x": NaN, "y": [{"text": 1}], "id": 3}\n'), "id")
    assert rows == [{"text": "a", "id": 3}]
    rows, _ = read(write(tmp_path, "d.csv", "x,x,text,,\n1,2,a,3,4\n"))
    assert rows == [{"text": "a"}]


def test_a_record_may_say_what_the_only_column_is_called(tmp_path):
    assert len(read(write(tmp_path, "d.csv", "text\ntext\n"))[0]) == 1


def test_ids_keep_the_type_that_a_file_gives_them(tmp_path):
    day = datetime.date(2024, 1, 5)
    columns = {"text": pa.array(["a"]), "day": pa.array([day]), "id": pa.array(["p"]).dictionary_encode()}
    ((row,), _) = read(write(tmp_path, "d.parquet", parquet(columns)), "day", "id")
    assert row == {"text": "a", "day": day, "id": "p"}


def test_names_with_dots_and_nested_neighbours_are_told_apart(tmp_path):
    nested = pa.array([{"text": "wrong"}])
    content = parquet({"a": nested, "a.text": pa.array(["right"])})
    path = write(tmp_path, "d.parquet", content)
    (row,) = read_rows(SourceSettings(source=str(path), text="a.text"), (), ReadCounts())
    assert row == {"a.text": "right"}


def test_a_byte_order_mark_is_no_part_of_the_first_name_or_text(tmp_path):
    mark = b"\xef\xbb\xbf"
    for name, content in (("d.csv", b'"text",id\r\nx,1\r\n'), ("d.jsonl", b'{"text": "x"}\n'), ("d.txt", b"x")):
        assert [row["text"] for row in read(write(tmp_path, name, mark + content))[0]] == ["x"]


def test_quoted_texts_keep_their_commas_quotes_and_line_breaks(tmp_path):
    text = 'He said "no",\nand left.'
    quoted = text.replace('"', '""')
    path = write(tmp_path, "d.csv", f'id,text\n\n1,"{quoted}"\n2,x,y\n')
    assert refusal(path).startswith(", line 5: 3 fields, and the header has 2;")
    path.write_text(path.read_text().removesuffix(",y\n"))
    assert [row["text"] for row in read(path)[0]] == [text, "x"]


def test_a_long_document_fits_into_csv(tmp_path):
    """Python's own limit for a field is 131,072 characters."""
    text = "word " * 100_000
    assert read(write(tmp_path, "d.csv", f"text\n{text}\n"))[0] == [{"text": text}]


LARGE = "a record of more than 2,000 characters; "


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("d.jsonl", '{"text": "x"}\n{"text": "' + "x" * 3000, f", line 2: {LARGE}write one"),
        ("d.csv", "text,id\n1,2\n" + "x" * 3000, f", line 3: {LARGE}write one"),
        ("d.csv", 'text,id\n1,"2\n' + "x,y\n" * 3000, f", line 2: {LARGE}is a double quote"),
        ("d.txt", "x" * 3000, f": {LARGE}a text file is one record: cut it"),
    ],
)
def test_a_record_without_an_end_is_refused_before_it_fills_the_memory(tmp_path, monkeypatch, name, content, message):
    monkeypatch.setattr(limits, "LARGEST_RECORD", 2000)
    assert refusal(write(tmp_path, name, content)).startswith(message)


def peak_bytes(path):
    """The most that Arrow held at once and Python's process grew by, in a process of its own that reads all rows."""
    code = """
import json, resource, sys
import pyarrow as pa, pyarrow.parquet
from configs.schema.data import SourceSettings
from trainer.data.sources import ReadCounts, read_rows
size = lambda: resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
before = size()
count = sum(len(row["text"]) > 0 for row in read_rows(SourceSettings(source=sys.argv[1]), (), ReadCounts()))
print(json.dumps([count, pa.default_memory_pool().max_memory(), size() - before]))
"""
    done = subprocess.run([sys.executable, "-c", code, str(path)], capture_output=True, text=True, check=True)
    return json.loads(done.stdout)


def test_pictures_in_another_column_take_no_memory(tmp_path):
    pictures = [bytes([i % 256]) * 200_000 for i in range(1000)]
    table = pa.table({"text": [f"note {i}" for i in range(1000)], "picture": pictures})
    pq.write_table(table, tmp_path / "d.parquet", compression="none", use_dictionary=False)
    assert (tmp_path / "d.parquet").stat().st_size > 200e6
    count, arrow, grown = peak_bytes(tmp_path / "d.parquet")
    assert count == 1000
    assert arrow < 20e6
    assert grown < 100e6


def test_large_texts_are_read_some_megabytes_at_a_time(tmp_path):
    """One row group of 200 MB, which pyarrow would read ahead, and whose 1,000 rows are not too many for a batch."""
    table = pa.table({"text": [f"{i:06}" * 33_333 for i in range(1000)]})
    pq.write_table(table, tmp_path / "d.parquet", compression="none", use_dictionary=False, write_batch_size=5)
    count, arrow, grown = peak_bytes(tmp_path / "d.parquet")
    assert count == 1000
    assert arrow < 80e6
    assert grown < 150e6
