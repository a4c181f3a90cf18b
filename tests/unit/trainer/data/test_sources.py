import json

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from datasets import Dataset

from configs.errors import InputError
from configs.load import load
from configs.schema.data import SourceSettings
from trainer.data.prepare import prepare
from trainer.data.sources import ReadCounts, read_rows

ROWS = [{"text": f"row {i}", "silo": "ab"[i % 2], "unit": f"u{i // 2}"} for i in range(6)]


def write_jsonl(folder):
    path = folder / "data.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in ROWS))
    return str(path)


def write_csv(folder):
    path = folder / "data.csv"
    path.write_text("text,silo,unit\n" + "".join(f"{row['text']},{row['silo']},{row['unit']}\n" for row in ROWS))
    return str(path)


def write_parquet(folder):
    path = folder / "data.parquet"
    pq.write_table(pa.Table.from_pylist(ROWS), path)
    return str(path)


def write_folder(folder):
    (folder / "parts").mkdir()
    for number in (0, 3):
        lines = "".join(json.dumps(row) + "\n" for row in ROWS[number : number + 3])
        (folder / "parts" / f"{number}.jsonl").write_text(lines)
    return str(folder / "parts")


def write_hugging_face(folder):
    # The layout of a dataset on the hub: data/SPLIT-*.parquet. The same loading code reads it from the hub.
    (folder / "set" / "data").mkdir(parents=True)
    Dataset.from_list(ROWS).to_parquet(folder / "set" / "data" / "train-00000-of-00001.parquet")
    return f"hf:{folder / 'set'}"


@pytest.mark.parametrize("write", [write_jsonl, write_csv, write_parquet, write_folder, write_hugging_face])
def test_every_kind_of_source_gives_the_same_rows(tmp_path, write):
    counts = ReadCounts()
    rows = list(read_rows(SourceSettings(source=write(tmp_path)), ["silo", "unit"], counts))
    assert [{key: row[key] for key in ROWS[0]} for row in rows] == ROWS
    assert counts == ReadCounts(rows=6)


def test_text_files_are_records_and_bad_utf8_is_replaced_and_counted(tmp_path):
    (tmp_path / "a.txt").write_bytes(b"fine")
    (tmp_path / "b.txt").write_bytes(b"caf\xe9")
    counts = ReadCounts()
    rows = list(read_rows(SourceSettings(source=str(tmp_path)), [], counts))
    assert [row["text"] for row in rows] == ["fine", "caf\ufffd"]
    assert counts.invalid_bytes == 1


def test_bad_utf8_in_jsonl_and_csv_is_replaced_and_counted(tmp_path):
    (tmp_path / "a.jsonl").write_bytes(b'{"text": "caf\xe9"}\n')
    (tmp_path / "b.csv").write_bytes(b"text\ncaf\xe9\n")
    counts = ReadCounts()
    rows = list(read_rows(SourceSettings(source=str(tmp_path)), [], counts))
    assert [row["text"] for row in rows] == ["caf\ufffd", "caf\ufffd"]
    assert counts.invalid_bytes == 2


def test_empty_texts_are_left_out_and_counted(tmp_path):
    (tmp_path / "a.jsonl").write_text('{"text": " "}\n{"text": null}\n{"text": "x"}\n')
    counts = ReadCounts()
    assert len(list(read_rows(SourceSettings(source=str(tmp_path)), [], counts))) == 1
    assert counts.empty == 2


@pytest.mark.parametrize(
    ("source", "content", "message"),
    [
        ("nowhere.jsonl", None, "no such file"),
        ("folder", "", "no .jsonl, .json, .csv"),
        ("a.doc", "x", "unknown kind of file"),
        ("a.jsonl", "{", "line 1 is not JSON"),
        ("a.jsonl", "[1]", "line 1 is not a JSON object"),
        ("a.parquet", "nonsense", "not Parquet"),
        ("a.jsonl", '{"body": "x"}', "line 1: no column 'text' among the 1 there; name"),
        ("embedded:nothing", None, "there is python-docs, plays"),
        ("hf:nowhere/nothing", None, "can't be loaded"),
    ],
)
def test_bad_sources_are_one_clear_line(tmp_path, source, content, message):
    path = tmp_path / source
    if source == "folder":
        path.mkdir()
    elif content is not None:
        path.write_text(content)
    name = source if ":" in source else str(path)
    with pytest.raises(InputError) as caught:
        list(read_rows(SourceSettings(source=name), [], ReadCounts()))
    assert message in str(caught.value)
    assert "\n" not in str(caught.value)


def test_unreadable_file_is_an_input_error(tmp_path):
    (tmp_path / "a.jsonl").mkdir()
    with pytest.raises(InputError):
        list(read_rows(SourceSettings(source=str(tmp_path / "a.jsonl")), [], ReadCounts()))


@pytest.mark.parametrize(("lines", "message"), [(0, "no document is left"), (1, "fewer than the")])
def test_an_empty_or_tiny_corpus_is_refused_and_leaves_no_manifest(tmp_path, lines, message):
    (tmp_path / "c.jsonl").write_text('{"text": "' + "some public words " * 5 + '"}\n' * lines)
    if not lines:
        (tmp_path / "c.jsonl").write_text('{"text": "short"}\n')
    config = load("tiny", [f"run.storage={tmp_path}", f'data.public.source="{tmp_path / "c.jsonl"}"'])
    with pytest.raises(InputError, match=message):
        prepare(config, tmp_path)
    assert not (tmp_path / "corpus" / "manifest.json").exists()
