"""Files that no reader may take, of every format: a marker stands in every value, header and name that they hold.

Each is asked for the columns ``text``, ``patient`` and ``site``, and has the words that its refusal has to have.
"""

import base64
import io
from collections.abc import Iterator
from datetime import timedelta

import pyarrow as pa
import pyarrow.parquet as pq
from pyarrow.parquet import encryption

MARKER = "Qx7kZ"
M = MARKER.encode()
ROW = {"text": f"{MARKER} was ill", "patient": f"P{MARKER}", "site": f"S{MARKER}", MARKER: MARKER}
Bad = tuple[str, bytes, str]  # name of the file, its content, what the refusal says

_CSV = {
    "more fields, text first": (b"text,patient,site\nM, ill,M,M\n", "line 2: 4 fields, and the header has 3"),
    "more fields, text last": (b"patient,site,text\nM,M,M\n\nM,M,M, and M\n", "line 4: 4 fields, and the header has 3"),
    "fewer fields": (b"text,patient,site\nM,M,M\nM,M\n", "line 3: 2 fields, and the header has 3"),
    "an empty last field": (b"text,patient,site\nM,M,M,\n", "line 2: 4 fields, and the header has 3"),
    "a column twice": (b"text,M,text,patient,site\nM,M,M,M,M\n", "line 1: column 'text' stands there 2 times"),
    "an id's column twice": (b"text,patient,site,site\nM,M,M,M\n", "line 1: column 'site' stands there 2 times"),
    "no header": (b"M was ill,PM,SM\nM,M,M\n", "line 1: no column 'text' among the 3 there; the first line has to be"),
    "an empty file": (b"", "line 1: no column 'text' among the 0 there; the first line has to be"),
    "a title line": (b"M of 2026\ntext,patient,site\nM,M,M\n", "line 1: no column 'text' among the 1 there"),
    "semicolons": (b"text;patient;site;M\nM;M;M;M\n", "line 1: no column 'text' among the 1 there"),
    "a column in other case": (b" Text,patient,site,M\nM,M,M,M\n", "one differs from it in case or blanks alone"),
    "two files in one": (
        b"text,patient,site\nM,M,M\ntext,patient,site\nM,M,M\n",
        "line 3: the header stands there again",
    ),
    "an open quote": (b'text,patient,site\nM,M,M\n"M,M,M\nM,M,M\n', "line 3: not CSV (unexpected end of data)"),
    "a quote inside": (b'text,patient,site\n"M" M,M,M\n', "line 2: not CSV"),
}
_JSONL = {
    "a line cut short": (b'{"text": "M", "patient": "M", "site": "M"}\n{"text": "M', "line 2 is not JSON"),
    "no JSON at all": (b"M was ill\n", "line 1 is not JSON"),
    "bytes of no text": (b'{"text": "M\xff", "M\x00', "line 1 is not JSON"),
    "two objects": (b'{"text": "M"} {"text": "M"}\n', "line 1 is not a JSON object, or more than one"),
    "a list": (b'["M"]\n', "line 1 is not a JSON object"),
    "a key twice": (b'{"text": "M", "patient": "M", "site": "M", "text": "M"}', "line 1 has a key twice"),
    "a key twice, inside": (b'{"text": "M", "patient": "M", "site": "M", "x": {"M": 1, "M": 2}}', "line 1 has a key"),
    "no such key": (b'{"M": "M"}', "line 1: no column 'text' among the 1 there"),
    "a key in other case": (b'{"TEXT": "M", "M": "M"}', "one differs from it in case or blanks alone"),
    "an id's key is not there": (b'{"text": "M", "patient": "M", "M": "M"}', "line 1: no column 'site' among the 3"),
    "nested too deeply": (b'{"text": "M", "M": ' + b"[" * 100_000, "line 1 is nested too deeply"),
    "an integer of 5000 digits": (
        b'{"text": "M", "M": ' + b"7" * 5000 + b"}",
        "line 1 has a number of too many digits",
    ),
    "messages": (b'{"text": ["M"], "patient": "M", "site": "M"}', "line 1: the text column 'text' holds a list"),
    "an object": (
        b'{"text": {"M": "M"}, "patient": "M", "site": "M"}',
        "line 1: the text column 'text' holds an object",
    ),
    "a number": (b'\n{"text": 4711, "patient": "M", "site": "M"}', "line 2: the text column 'text' holds a number"),
    "a truth value": (
        b'{"text": true, "patient": "M", "site": "M"}',
        "line 1: the text column 'text' holds a truth value",
    ),
    "an id of another type": (
        b'{"text": "M", "patient": ["M"], "site": "M"}',
        "line 1: column 'patient' holds a value",
    ),
    "a lost character": (b'{"text": "M", "patient": "M\\ud800", "site": "M"}', "line 1: column 'patient' holds a char"),
}


def parquet(columns: dict[str, pa.Array], **options: object) -> bytes:
    """A Parquet file of these columns."""
    file = io.BytesIO()
    pq.write_table(pa.Table.from_arrays(list(columns.values()), list(columns)), file, **options)
    return file.getvalue()


def texts(*values: object) -> pa.Array:
    return pa.array(values or [f"{MARKER} {i}" for i in range(3)])


def _with(**columns: pa.Array) -> bytes:
    return parquet({"text": texts(), "patient": texts(), "site": texts(), MARKER: texts()} | columns)


class _Keys(encryption.KmsClient):
    """Wraps keys by nothing: what matters here is that the reader has none."""

    def wrap_key(self, key_bytes: bytes, _master_key: str) -> bytes:
        return base64.b64encode(key_bytes)

    def unwrap_key(self, wrapped_key: bytes, _master_key: str) -> bytes:
        return base64.b64decode(wrapped_key)


def encrypted(plaintext_footer: bool) -> bytes:
    """A Parquet file with encrypted columns, and with an encrypted footer or not."""
    settings = encryption.EncryptionConfiguration(
        footer_key="footer",
        column_keys={"columns": ["text", "patient", "site"]},
        plaintext_footer=plaintext_footer,
        cache_lifetime=timedelta(minutes=5),
    )
    properties = encryption.CryptoFactory(lambda _: _Keys()).file_encryption_properties(
        encryption.KmsConnectionConfig(), settings
    )
    return parquet({"text": texts(), "patient": texts(), "site": texts()}, encryption_properties=properties)


def _damaged() -> bytes:
    """The pages are no longer what the footer says."""
    content = bytearray(parquet({name: texts(*(f"{MARKER} {i}" for i in range(500))) for name in ROW}))
    content[4 : len(content) // 2] = b"\xa5" * (len(content) // 2 - 4)
    return bytes(content)


def _parquet() -> dict[str, tuple[bytes, str]]:
    no_utf8 = pa.array([M + b"\xff", M, M]).view(pa.string())
    far = pa.array([2**61] * 3, pa.int64()).view(pa.timestamp("us"))
    zone = pa.array([1, 2, 3], pa.timestamp("us", tz=f"{MARKER}/{MARKER}"))
    lists = pa.array([[MARKER]] * 3)
    return {
        "no Parquet": (M * 100, "not Parquet, or damaged or cut short"),
        "empty": (b"", "not Parquet, or damaged or cut short"),
        "cut short": (_with()[:-20], "not Parquet, or damaged or cut short"),
        "damaged pages": (_damaged(), "not Parquet, or damaged or cut short"),
        "encrypted": (encrypted(False), "encrypted Parquet can't be read"),
        "encrypted columns": (encrypted(True), "encrypted Parquet can't be read"),
        "no such column": (parquet({MARKER: texts()}), "no column 'text' among the 1 there"),
        "a column in other case": (parquet({"Text": texts()}), "one differs from it in case or blanks alone"),
        "a column twice": (
            _twice(["text", "patient", "site", "text"]),
            "column 'text' stands there 2 times; give each its own name",
        ),
        "messages": (_with(text=lists), "the text column 'text' holds the type list; give a column"),
        "numbers": (_with(text=pa.array([1, 2, 3])), "the text column 'text' holds the type int64"),
        "bytes": (_with(text=pa.array([M] * 3)), "the text column 'text' holds the type binary"),
        "times": (_with(text=zone), "the text column 'text' holds the type timestamp"),
        "objects": (_with(text=pa.array([{MARKER: MARKER}] * 3)), "the text column 'text' holds the type struct"),
        "categories of numbers": (
            _with(text=pa.array([1, 2, 3]).dictionary_encode()),
            "the text column 'text' holds the type int64;",
        ),
        "no UTF-8": (_with(text=no_utf8), "rows 1 to 3: column 'text' holds a value of the type string"),
        "a date beyond the year 9999": (_with(patient=far), "column 'patient' holds a value of the type timestamp"),
        "an unknown zone": (_with(patient=zone), "column 'patient' holds a value of the type timestamp"),
        "an id of another type": (_with(site=lists), "row 1: column 'site' holds a value of the type list"),
    }


def _twice(names: list[str]) -> bytes:
    file = io.BytesIO()
    pq.write_table(pa.Table.from_arrays([texts() for _ in names], names), file)
    return file.getvalue()


def bad_files() -> Iterator[tuple[str, Bad]]:
    """A name for people, and the file."""
    for kind, files in (("csv", _CSV), ("jsonl", _JSONL)):
        for name, (content, message) in files.items():
            yield f"{kind}: {name}", (f"data.{kind}", content.replace(b"M", M), message)
    for name, (content, message) in _parquet().items():
        yield f"parquet: {name}", ("data.parquet", content, message)
    yield "txt: another column", ("data.txt", M, "record 1: no column 'site' among the 3 there")
