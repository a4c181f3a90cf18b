"""Which files of a source are read: each record once, and a word for every file that is not."""

import bz2
import gzip
import json
import lzma
import os
import shutil
import socket

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from users import another_user, folder_for_everybody

from configs.errors import InputError
from configs.schema.data import SourceSettings
from trainer.data.reading import rows
from trainer.data.reading.files import source_files
from trainer.data.sources import ReadCounts, read_rows

COMPRESS = {
    ".gz": gzip.compress,
    ".bz2": bz2.compress,
    ".xz": lzma.compress,
    ".zst": lambda content: pa.Codec("zstd").compress(content).to_pybytes(),
}


def lines(*texts):
    return "".join(json.dumps({"text": text}) + "\n" for text in texts).encode()


def fill(folder, files):
    for name, content in files.items():
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(content)


def read(source):
    counts = ReadCounts()
    texts = [row["text"] for row in read_rows(SourceSettings(source=str(source)), [], counts)]
    return texts, counts.files.note()


def test_what_is_hidden_is_left_out_and_named(tmp_path):
    fill(
        tmp_path,
        {
            "data.jsonl": lines("one"),
            "._data.jsonl": b"\x00\x05\x16\x07Mac OS X",
            ".ipynb_checkpoints/data-checkpoint.jsonl": lines("one", "two"),
            ".git/objects/a.jsonl": lines("three"),
            "_SUCCESS": b"",
            "_temporary/0/part.jsonl": lines("four"),
        },
    )
    texts, note = read(tmp_path)
    assert texts == ["one"]
    assert note == (
        f"{tmp_path}: files read: 1; left out: 5 hidden (._data.jsonl, .git/, .ipynb_checkpoints/ and 2 more)"
    )


def test_copies_of_other_programs_are_of_another_kind(tmp_path):
    names = ["data.jsonl~", "data.jsonl.bak", "data.jsonl.swp", "#data.jsonl#", "data.jsonl.crc", "LICENSE"]
    fill(tmp_path, {"data.jsonl": lines("one"), **dict.fromkeys(names, lines("one", "two"))})
    texts, note = read(tmp_path)
    assert texts == ["one"]
    assert "6 of another kind (#data.jsonl#, LICENSE, data.jsonl.bak and 3 more)" in note


def test_a_file_that_is_named_is_read_whatever_its_name(tmp_path):
    fill(tmp_path, {"._hidden.JSONL": lines("one"), "_a/_b.json": lines("two")})
    assert read(tmp_path / "._hidden.JSONL") == (["one"], None)
    with pytest.raises(InputError, match=r"no \.jsonl.* 1 hidden \(_b\.json\)"):
        read(tmp_path / "_a")
    assert read(tmp_path / "_a" / "_b.json") == (["two"], None)


@pytest.mark.parametrize("suffix", COMPRESS)
def test_compressed_files_are_read_by_suffix_in_any_case(tmp_path, suffix):
    compress = COMPRESS[suffix]
    fill(
        tmp_path,
        {
            f"a.jsonl{suffix}": compress(lines("a")),
            f"b.JSONL{suffix.upper()}": compress(lines("b")) + compress(lines("b2")),
            "c.JsonL": lines("c"),
        },
    )
    texts, note = read(tmp_path)
    assert texts == ["a", "b", "b2", "c"]
    assert note == f"{tmp_path}: files read: 3; left out: none"
    fill(tmp_path, {f"d.csv{suffix}": compress(b"text\nd\n"), f"e.txt{suffix}": compress(b"e")})
    assert read(tmp_path / f"d.csv{suffix}")[0] == ["d"]
    assert read(tmp_path / f"e.txt{suffix}")[0] == ["e"]


@pytest.mark.parametrize("suffix", COMPRESS)
@pytest.mark.parametrize("damage", [lambda content: content[: len(content) // 2], lambda _: b"secret, not packed"])
def test_a_damaged_compressed_file_is_refused_without_a_word_of_it(tmp_path, suffix, damage):
    fill(tmp_path, {f"a.jsonl{suffix}": damage(COMPRESS[suffix](lines(*map(str, range(3000)))))})
    with pytest.raises(InputError, match=rf"a\.jsonl\{suffix}: damaged, cut short, or no \{suffix} file") as caught:
        read(tmp_path / f"a.jsonl{suffix}")
    assert "secr" not in str(caught.value) and caught.value.__cause__ is None


def test_a_folder_as_spark_writes_it_is_read_and_zip_is_named(tmp_path):
    table = pa.table({"text": ["a", "b"]})
    (tmp_path / "data.parquet").mkdir()
    pq.write_table(table, tmp_path / "data.parquet" / "part-0000.snappy.parquet")
    fill(tmp_path, {"data.parquet/_SUCCESS": b"", "data.parquet/.part-0000.snappy.parquet.crc": b"crc", "x.zip": b"PK"})
    texts, note = read(tmp_path)
    assert texts == ["a", "b"]
    assert "2 hidden (data.parquet/.part-0000.snappy.parquet.crc, data.parquet/_SUCCESS)" in note
    assert "1 of another kind (x.zip)" in note
    (tmp_path / "data.parquet" / "_delta_log").mkdir()
    with pytest.raises(InputError, match="a Delta table keeps older versions of its rows"):
        read(tmp_path)


@pytest.mark.parametrize(
    ("content", "texts"),
    [
        (b'[{"text": "a"},\n {"text": "b"}]', ["a", "b"]),
        (b'\xef\xbb\xbf \n[\n{"text": "a"}]', ["a"]),
        (b"[]", []),
        (lines("a", "b"), ["a", "b"]),
        (b"", []),
    ],
)
def test_json_is_an_array_or_lines(tmp_path, content, texts):
    fill(tmp_path, {"a.json": content, "b.json.gz": gzip.compress(content)})
    assert read(tmp_path / "a.json")[0] == texts
    assert read(tmp_path / "b.json.gz")[0] == texts


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b'[{"text": "secret"}', "a.json: is not JSON"),
        (b'["secret"]', "a.json, object 1 is not a JSON object"),
        (b'[{"text": "secret", "text": "secret"}]', "has a key twice in one object"),
        (b"[" * 100_000, "is nested too deeply"),
        (b'[{"text": "secret"}]' + b" " * 200, "an array is in memory at once: write one object per line"),
    ],
)
def test_a_json_array_that_is_none_or_too_large_is_refused(tmp_path, monkeypatch, content, message):
    monkeypatch.setattr(rows, "LARGEST_RECORD", len(content) - 100 if b"  " in content else 10**6)
    fill(tmp_path, {"a.json": content})
    with pytest.raises(InputError, match=message) as caught:
        read(tmp_path / "a.json")
    assert "secret" not in str(caught.value)


def test_links_are_followed_once_and_real_names_come_first(tmp_path):
    fill(tmp_path, {"outside/x.jsonl": lines("x"), "data/sub/b.jsonl": lines("b"), "data/c.jsonl": lines("c")})
    data = tmp_path / "data"
    (data / "a-link").symlink_to(data / "sub", target_is_directory=True)
    (data / "b.jsonl").symlink_to(data / "c.jsonl")
    (data / "linked").symlink_to(tmp_path / "outside", target_is_directory=True)
    (data / "sub" / "loop").symlink_to(data, target_is_directory=True)
    os.link(data / "c.jsonl", data / "d.jsonl")
    texts, note = read(data)
    assert texts == ["c", "x", "b"]
    assert "4 reached before by another name (a-link/, b.jsonl, d.jsonl and 1 more)" in note
    (tmp_path / "whole").symlink_to(data, target_is_directory=True)
    assert read(tmp_path / "whole")[0] == texts


def test_a_link_that_leads_nowhere_is_refused_where_it_was_to_be_read(tmp_path):
    fill(tmp_path, {"a.jsonl": lines("a")})
    (tmp_path / "notes").symlink_to(tmp_path / "gone")
    assert read(tmp_path)[0] == ["a"]
    (tmp_path / "b.jsonl").symlink_to(tmp_path / "gone.jsonl")
    with pytest.raises(InputError, match=r"b\.jsonl: a link that leads nowhere"):
        read(tmp_path)


def test_a_file_with_the_same_rows_is_read_once_compressed_or_not(tmp_path):
    fill(
        tmp_path,
        {
            "data.jsonl": lines("a", "b"),
            "data (copy).jsonl": lines("a", "b"),
            "data-1.jsonl.gz": gzip.compress(lines("a", "b"), 1),
            "backup/data.json": lines("a", "b"),
            "z.jsonl": lines("b", "a"),
        },
    )
    texts, note = read(tmp_path)
    assert texts == ["a", "b", "b", "a"]
    assert "files read: 2; left out: 3 with the same rows as another" in note
    assert "data.jsonl as backup/data.json" in note


def test_no_digest_is_computed_of_a_file_that_can_have_no_copy(tmp_path, monkeypatch):
    fill(tmp_path, {"a.jsonl": lines("a"), "b.jsonl": lines("bb"), "c.jsonl": lines("cc")})
    hashed = []
    monkeypatch.setattr("hashlib.file_digest", lambda file, _: hashed.append(file.name) or pytest.fail("hashed"))
    assert next(iter(read_rows(SourceSettings(source=str(tmp_path)), [], ReadCounts())))["text"] == "a"
    assert not hashed


def test_equal_text_files_are_records_of_their_own(tmp_path):
    """Two people may have the same short note; if one went, the other's must not change."""
    fill(tmp_path, {"anna/note.txt": b"did not come", "bert/note.txt": b"did not come", "carl/other.txt": b"came"})
    (tmp_path / "carl" / "note.txt").hardlink_to(tmp_path / "anna" / "note.txt")  # as programs do that save space
    (tmp_path / "link").symlink_to(tmp_path / "anna")
    counts = ReadCounts()
    rows = list(read_rows(SourceSettings(source=str(tmp_path)), ["folder"], counts))
    assert [row["folder"] for row in rows] == ["anna", "bert", "carl", "carl"]
    assert counts.files.note().endswith("2 text files are equal to another and count as records")


def test_text_beside_rows_is_left_out_and_named(tmp_path):
    fill(tmp_path, {"data.csv": b"text\na\n", "more.jsonl": lines("b"), "README.md": b"About", "notes/x.txt": b"x"})
    texts, note = read(tmp_path)
    assert texts == ["a", "b"]
    assert note == f"{tmp_path}: files read: 2; left out: 2 text beside rows (README.md, notes/x.txt)"


@pytest.mark.parametrize("other", ["data.jsonl.gz", "data.json", "Data.CSV", "data.parquet"])
def test_the_same_name_in_another_form_is_refused(tmp_path, other):
    fill(tmp_path, {"data.jsonl": lines("a"), other: b"whatever it holds"})
    with pytest.raises(InputError, match="in another form, and they would be read twice; keep one of the two"):
        read(tmp_path)
    assert read(tmp_path / "data.jsonl")[0] == ["a"]


def test_pipes_and_sockets_never_block(tmp_path, monkeypatch):
    fill(tmp_path, {"a.jsonl": lines("a")})
    os.mkfifo(tmp_path / "pipe.jsonl")
    monkeypatch.chdir(tmp_path)  # a socket's path is short
    with socket.socket(socket.AF_UNIX) as server:
        server.bind("socket.jsonl")
        texts, note = read(tmp_path)
    assert texts == ["a"]
    assert "2 no regular file (pipe.jsonl, socket.jsonl)" in note
    with pytest.raises(InputError, match=r"pipe\.jsonl: a pipe, socket or device; give a file"):
        read(tmp_path / "pipe.jsonl")


def test_names_are_shown_on_one_line_and_a_null_character_is_no_name(tmp_path):
    fill(tmp_path, {"a.jsonl": lines("a"), "b\n\x1b[31m.doc": b"", os.fsdecode(b"c\xff.doc"): b""})
    note = read(tmp_path)[1]
    assert note.isprintable() and note.encode()
    with pytest.raises(InputError, match="no such file"):
        read("nul\0.jsonl")


def test_a_file_that_changes_while_it_is_read_is_refused(tmp_path):
    fill(tmp_path, {"a.jsonl": lines("a", "b")})
    rows = read_rows(SourceSettings(source=str(tmp_path)), [], ReadCounts())
    next(rows)
    with (tmp_path / "a.jsonl").open("ab") as file:
        file.write(lines("c"))
    with pytest.raises(InputError, match=r"a\.jsonl: changed while it was read"):
        list(rows)


@pytest.mark.parametrize("name", ["closed", "closed.jsonl"])
def test_what_may_not_be_read_below_a_folder_is_refused_by_name(name):
    with folder_for_everybody() as folder:
        fill(folder, {"a.jsonl": lines("a"), "closed/b.jsonl": lines("b"), "closed.jsonl": lines("c")})
        (folder / name).chmod(0)
        with another_user() as user, pytest.raises(InputError, match=f"user {user} may not read it") as caught:
            read(folder)
        assert str(caught.value).startswith(f"{folder / name}:")


def test_a_copy_of_a_tree_reads_the_same(tmp_path):
    fill(tmp_path, {"a/b.jsonl": lines("b"), "a/a.jsonl": lines("a"), "a/c/d.jsonl": lines("d")})
    shutil.copytree(tmp_path / "a", tmp_path / "z")
    files = [[file.name for file in source_files(tmp_path / name).files] for name in "az"]
    assert files[0] == files[1] == ["a.jsonl", "b.jsonl", "c/d.jsonl"]


def test_an_empty_name_is_no_source():
    with pytest.raises(ValueError, match="at least 1 character"):
        SourceSettings(source="")
