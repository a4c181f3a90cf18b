"""Whatever bytes a file has, its reader gives rows or one line that names the file.

``SILOWEAVE_FUZZ_EXAMPLES=10000`` tries that many inputs per test.
"""

import os
import random

import pyarrow as pa
import pytest
from bad_files import encrypted, parquet
from hypothesis import given, settings
from hypothesis import strategies as st

from configs.errors import InputError
from configs.identities import IdentityColumn
from configs.schema.data import SourceSettings
from trainer.data.sources import ReadCounts, read_rows

EXAMPLES = int(os.environ.get("SILOWEAVE_FUZZ_EXAMPLES", "100"))
KINDS = ("csv", "jsonl", "parquet", "txt")
TEXTS = [f"note {i}, caf\u00e9" for i in range(9)]
IDS = {"id": pa.array(range(9)), "at": pa.array(range(9), pa.timestamp("us", tz="Europe/Berlin"))}
VALID = {
    "csv": [b'text,id\n"note, of ""a""",1\n"two\nlines",2\n', b"\xef\xbb\xbfid,text\r\n1,caf\xe9\r\n"],
    "jsonl": [
        b'{"text": "a \\ud83d\\ude00", "id": 17.0, "x": [{"y": null}, -1e5, "\\u00e9"]}\n{"text": null, "id": "P0"}\n',
        b'\xef\xbb\xbf{"id": true, "text": "caf\xc3\xa9"}\r\n\r\n{"id": NaN, "text": "b"}',
    ],
    "parquet": [
        parquet({"text": pa.array(TEXTS), **IDS}, compression="none"),
        parquet({"text": pa.array(TEXTS, pa.large_string()), **IDS}, compression="zstd", write_page_checksum=True),
        parquet({"text": pa.array(TEXTS), **IDS}, compression="snappy", use_dictionary=False, row_group_size=4),
        parquet(
            {"text": pa.array(TEXTS).dictionary_encode(), "id": pa.array(range(9), pa.decimal128(9, 2))},
            compression="gzip",
            data_page_version="2.0",
            store_schema=False,
        ),
        parquet({"text": pa.array(TEXTS), **IDS, "x": pa.array([[{"y": [1]}]] * 9)}),
    ],
    "txt": ["A text, caf\u00e9 \U0001f600.\n".encode()],
}
STARTS = {**VALID, "parquet": [*VALID["parquet"], encrypted(plaintext_footer=True)]}


def outcome(path, content):
    """What came of it; anything else than rows or a refusal that names the file is raised."""
    path.write_bytes(content)
    counts, ids = ReadCounts(), IdentityColumn("id")
    columns = () if path.suffix == ".txt" else ("id",)
    try:
        for row in read_rows(SourceSettings(source=str(path)), columns, counts):
            row["text"].encode()
            for column in columns:
                ids.canonical(row[column], counts.where)
    except InputError as error:
        assert str(error).startswith(str(path))
        assert "\n" not in str(error)
        return "refused"
    return "read"


def mutated(content, seed):
    """A few bytes are changed, left out, put in, moved or repeated, or the end is missing."""
    draw, content = random.Random(seed), bytearray(content)
    for _ in range(draw.choice((1, 1, 2, 3, 8))):
        at, length = draw.randrange(len(content) + 1), draw.choice((1, 1, 2, 4, 16, 100))
        taken = content[at : at + length]
        put = draw.choice(
            (draw.randbytes(length), b"", bytes(taken) * 2, bytes([draw.choice((0, 127, 128, 255))]) * length, b'"')
        )
        content[at : at + draw.choice((0, len(taken)))] = put
    return bytes(content[: draw.randrange(len(content) + 1)] if draw.random() < 0.05 else content)


@pytest.mark.parametrize("kind", KINDS)
def test_what_the_mutations_start_from_is_read(tmp_path, kind):
    assert {outcome(tmp_path / f"d.{kind}", content) for content in VALID[kind]} == {"read"}


@pytest.mark.parametrize("kind", KINDS)
def test_any_bytes_are_rows_or_a_refusal(tmp_path_factory, kind):
    path = tmp_path_factory.mktemp("any") / f"d.{kind}"

    @settings(max_examples=EXAMPLES, deadline=None)
    @given(st.binary(max_size=300), st.sampled_from([b"", *(content[:60] for content in STARTS[kind])]))
    def tried(content, start):
        outcome(path, start + content)

    tried()


@pytest.mark.parametrize("kind", KINDS)
def test_a_valid_file_with_some_bytes_changed_is_rows_or_a_refusal(tmp_path_factory, kind):
    path = tmp_path_factory.mktemp("any") / f"d.{kind}"
    found = set()

    @settings(max_examples=EXAMPLES, deadline=None)
    @given(st.sampled_from(STARTS[kind]), st.integers(0, 2**32))
    def tried(content, seed):
        found.add(outcome(path, mutated(content, seed)))

    tried()
    assert found == {"read", "refused"}


def test_a_compression_that_is_not_known_is_named(tmp_path):
    """Somewhere in the file stands the number of the codec, 1 for Snappy, as 2; LZO's would be 6."""
    content, found = parquet({"text": pa.array(TEXTS)}, compression="snappy"), []
    for at in range(len(content)):
        if content[at] == 2:
            (tmp_path / "d.parquet").write_bytes(content[:at] + b"\6" + content[at + 1 :])
            try:
                list(read_rows(SourceSettings(source=str(tmp_path / "d.parquet")), (), ReadCounts()))
            except InputError as error:
                found.append(str(error))
    assert [
        message for message in found if "a compression that can't be read here; write it anew, with zstd" in message
    ]
