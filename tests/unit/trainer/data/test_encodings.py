"""Bytes to text: byte order marks, declared encodings, stray bytes, and files in another encoding."""

import json
from io import BufferedReader, BytesIO

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from pydantic import ValidationError

from configs.errors import InputError
from configs.load import load
from configs.schema.data import SourceSettings
from federated.silo.units import rows_of
from federated.simulation.simulated_places import simulated_silo
from trainer.data.reading.counts import Changed, mended, of_corpora, table
from trainer.data.reading.encodings import first_character, read_lines, read_text
from trainer.data.sources import ReadCounts, read_rows

TEXT = "Zo\u00eb said \u201cna\u00efve caf\u00e9\u201d, and went home"
CYRILLIC = "\u041c\u0430\u043c\u0430 \u043c\u044b\u043b\u0430 \u0440\u0430\u043c\u0443, \u0438 \u0432\u0441\u0451"
CHINESE = "\u4eca\u5929\u5929\u6c14\u5f88\u597d\uff0c\u6211\u4eec\u53bb\u516c\u56ed\u6563\u6b65\u3002"


def read(path, encoding="utf-8"):
    counts = ReadCounts()
    rows = list(read_rows(SourceSettings(source=str(path), encoding=encoding), [], counts))
    return [row["text"] for row in rows], counts


def jsonl(*texts):
    return "".join(json.dumps({"text": text}, ensure_ascii=False) + "\n" for text in texts)


@pytest.mark.parametrize("encoding", ["utf-8-sig", "utf-16", "utf-32"])
def test_a_byte_order_mark_goes_before_the_settings(tmp_path, encoding):
    (tmp_path / "a.jsonl").write_bytes(jsonl(TEXT, CHINESE).encode(encoding))
    (tmp_path / "b.csv").write_bytes(f'text,x\r\n"{TEXT}",1\r\n"{CHINESE}",2\r\n'.encode(encoding))
    (tmp_path / "c.txt").write_bytes(TEXT.encode(encoding))
    for declared in ("utf-8", "latin-1", "utf-16-be"):
        for name, found in (("a.jsonl", [TEXT, CHINESE]), ("b.csv", [TEXT, CHINESE]), ("c.txt", [TEXT])):
            assert read(tmp_path / name, declared) == (found, ReadCounts(rows=len(found)))


@pytest.mark.parametrize("order", ["be", "le"])
@pytest.mark.parametrize("width", ["16", "32"])
def test_marks_of_both_byte_orders_and_wide_files_without_one(tmp_path, width, order):
    # U+010A and U+0A00 have the byte of a line end inside.
    texts = [TEXT, "\u010abc", "\u0a15\u0a00"]
    content = jsonl(*texts).encode(f"utf-{width}-{order}")
    path = tmp_path / "a.jsonl"
    path.write_bytes("\ufeff".encode(f"utf-{width}-{order}") + content)
    assert read(path)[0] == texts
    path.write_bytes(content)
    assert read(path, f"utf-{width}-{order}")[0] == texts
    with pytest.raises(InputError, match=r'a\.jsonl: .*encoding = "utf-16-le"'):
        read(path)
    with pytest.raises(InputError, match=f'no byte order mark; .* encoding = "utf-{width}-le"'):
        read(path, f"UTF{width}")


@pytest.mark.parametrize("text", [TEXT, CYRILLIC, CHINESE, "\u0939\u093f\u0928\u094d\u0926\u0940 \u092e\u0947\u0902."])
@pytest.mark.parametrize("suffix", ["txt", "csv", "jsonl"])
def test_utf_16_without_a_mark_never_passes_for_utf_8(tmp_path, text, suffix):
    lines = {"txt": f"{text}\n" * 20, "csv": "text\n" + f'"{text}"\n' * 20, "jsonl": jsonl(*[text] * 20)}
    path = tmp_path / f"a.{suffix}"
    path.write_bytes(lines[suffix].encode("utf-16-le"))
    with pytest.raises(InputError, match=r"encoding = ") as refused:
        read(path)
    assert str(path) in str(refused.value)
    assert "\n" not in str(refused.value)
    assert len(read(path, "utf-16-le")[0]) == (1 if suffix == "txt" else 20)


@pytest.mark.parametrize(
    ("text", "encoding"),
    [
        (TEXT, "cp1252"),
        ("Gr\u00fc\u00dfe aus K\u00f6ln", "latin-1"),
        (CYRILLIC, "cp1251"),
        (CYRILLIC, "koi8-r"),
        (CHINESE, "gb18030"),
        ("\u65e5\u672c\u8a9e\u306e\u30c6\u30ad\u30b9\u30c8", "shift_jis"),
        ("\ud55c\uad6d\uc5b4 \ubb38\uc7a5", "euc_kr"),
    ],
)
@pytest.mark.parametrize("suffix", ["txt", "csv", "jsonl"])
def test_a_file_of_another_encoding_is_refused_with_the_fix_and_read_as_declared(tmp_path, text, encoding, suffix):
    content = {"txt": text * 9, "csv": "text\n" + f'"{text}"\n' * 9, "jsonl": jsonl(*[text] * 9)}
    path = tmp_path / f"a.{suffix}"
    path.write_bytes(content[suffix].encode(encoding))
    with pytest.raises(InputError, match=r'set the encoding .*encoding = "latin-1"') as refused:
        read(path)
    assert str(path) in str(refused.value)
    assert text[:3] not in str(refused.value)
    found, counts = read(path, encoding)
    assert text in found[0]
    assert counts == ReadCounts(rows=len(found))


@pytest.mark.parametrize("encoding", ["utf-8-sig", "utf-16", "utf-16-be", "utf-32-le", "latin-1"])
def test_an_array_of_json_is_read_in_every_encoding(tmp_path, encoding):
    text = TEXT if encoding != "latin-1" else "Zo\u00eb"
    content = json.dumps([{"text": text}, {"text": "b"}], ensure_ascii=False, indent=1).encode(encoding)
    (tmp_path / "a.json").write_bytes(content)
    assert read(tmp_path / "a.json", encoding)[0] == [text, "b"]
    with pytest.raises(InputError, match="no byte order mark"):
        (tmp_path / "a.json").write_bytes(b"[]")
        read(tmp_path / "a.json", "utf-16")


ENCODINGS = "utf-8 utf-16-le utf-16-be utf-32-le latin-1 cp1252 shift_jis euc_jp gb18030 big5hkscs johab ascii cp1251"


@settings(deadline=None, max_examples=300)
@given(
    st.binary(max_size=40) | st.text(st.sampled_from("a\n\r\xe9\x81\0\xff")).map(lambda text: text.encode("latin-1")),
    st.sampled_from([b"", b"\xef\xbb\xbf", b"\xff\xfe", b"\xfe\xff", b"\xff\xfe\0\0", b"\0\0\xfe\xff"]),
    st.sampled_from(ENCODINGS.split()),
)
def test_whatever_bytes_there_are_become_text_or_a_refusal(content, mark, encoding):
    def opened():
        return BufferedReader(BytesIO(mark + content))

    try:
        text = read_text(opened(), "f", encoding)
    except InputError as refused:
        assert str(refused).startswith("f: ") and "encoding = " in str(refused)
        return
    assert "".join(read_lines(opened(), "f", encoding, "\n")) == text
    assert text.lstrip()[:1] == first_character(opened(), "f", encoding) or "\udc80" in text
    counts = ReadCounts()
    mended(text, counts).encode()
    assert counts.invalid_bytes == ("\udc80" in text)
    assert counts.half_characters == 0


def test_stray_bytes_in_utf_8_are_replaced_where_they_stand_and_counted(tmp_path):
    path = tmp_path / "a.jsonl"
    lines = [jsonl(f"{TEXT} {i}").encode() for i in range(300)]
    stray = [7, 8, 9, 250, 299]
    for i in stray:
        lines[i] = lines[i].replace(b"home", b"h\x92m\x80")
    path.write_bytes(b"".join(lines))
    found, counts = read(path)
    assert counts == ReadCounts(rows=300, invalid_bytes=5)
    assert [i for i, text in enumerate(found) if "\ufffd" in text] == stray
    assert found[7] == f"{TEXT.removesuffix('home')}h\ufffdm\ufffd 7"


def test_a_character_cut_at_the_end_of_every_field_is_no_other_encoding(tmp_path):
    """Databases cut fields by bytes; there is far more that is valid."""
    path = tmp_path / "a.csv"
    path.write_bytes(b"text\n" + b"".join(CHINESE.encode()[:-1] + b"\n" for _ in range(50)))
    found, counts = read(path)
    assert counts == ReadCounts(rows=50, invalid_bytes=50)
    assert set(found) == {CHINESE[:-1] + "\ufffd"}


def test_a_file_is_refused_for_what_comes_late_too(tmp_path, monkeypatch):
    monkeypatch.setattr("trainer.data.reading.encodings._BEGINNING", 1000)
    path = tmp_path / "a.jsonl"
    path.write_bytes(jsonl(*["plain"] * 100).encode() + jsonl(*["gr\u00fc\u00dfe"] * 100).encode("latin-1"))
    with pytest.raises(InputError, match="not utf-8"):
        read(path)


def test_where_the_beginning_ends_inside_a_character_nothing_is_lost(tmp_path, monkeypatch):
    path = tmp_path / "a.txt"
    path.write_bytes(CHINESE.encode())
    for size in range(1, 9):
        monkeypatch.setattr("trainer.data.reading.encodings._BEGINNING", size)
        assert read(path) == ([CHINESE], ReadCounts(rows=1))


def test_half_characters_and_nul_are_replaced_and_counted(tmp_path):
    path = tmp_path / "a.jsonl"
    rows = ["half \\ud83d", "whole \\ud83d\\ude00", "nul \\u0000\\u0000", "both \\ud800\\udc00\\ude00 \\u0000"]
    path.write_bytes("".join(f'{{"text": "{row}"}}\n' for row in rows).encode() + b'{"text": "\\ud83d\xff\\ude00"}\n')
    found, counts = read(path)
    assert found == [
        "half \ufffd",
        "whole \U0001f600",
        "nul \ufffd\ufffd",
        "both \U00010000\ufffd \ufffd",
        "\ufffd\ufffd\ufffd",
    ]
    assert counts == ReadCounts(rows=5, half_characters=3, nul=2, invalid_bytes=1)


def test_what_was_replaced_before_is_not_counted_again(tmp_path):
    (tmp_path / "a.txt").write_text("lost \ufffd before", encoding="utf-8")
    assert read(tmp_path / "a.txt") == (["lost \ufffd before"], ReadCounts(rows=1))


def test_lines_of_jsonl_end_at_line_feeds_alone(tmp_path):
    texts = ["a\u2028b\u2029c\x85d", "plain", "a\x7fb"]
    path = tmp_path / "a.jsonl"
    path.write_bytes("".join(json.dumps({"text": t}, ensure_ascii=False) + "\r\n" for t in texts).encode())
    assert read(path)[0] == texts


@pytest.mark.parametrize("end", ["\n", "\r\n", "\r"])
def test_lines_of_csv_end_as_on_any_system_and_go_on_inside_quotes(tmp_path, end):
    path = tmp_path / "a.csv"
    path.write_bytes(end.join(["text,n", f'"one{end}two\u2028three",1', "four\u2028five\x85,2", ""]).encode())
    assert read(path)[0] == [f"one{end}two\u2028three", "four\u2028five\x85"]


NO_TEXT = "base64 rot13 hex zip quopri klingon ../x a\0b \u00e9 undefined cp037"
NOT_AS_IT_STANDS = "idna punycode utf-7 hz iso2022_jp unicode_escape raw_unicode_escape"


@pytest.mark.parametrize("name", ["", *NO_TEXT.split(), *NOT_AS_IT_STANDS.split()])
def test_an_encoding_in_which_text_may_stand_for_something_else_is_refused_at_load(name):
    with pytest.raises(ValidationError, match="is no encoding that text files are read in"):
        SourceSettings(source="x", encoding=name)


def test_the_table_has_every_line_and_warns_above_one_percent():
    lines = [Changed("replaced: a", 1, 100), Changed("dropped: b", 2, 100), Changed("shortened: c", 0, 0)]
    shown = [" ".join(line.split()) for line in table("text", lines)]
    assert shown == [
        "text",
        "replaced: a 1 of 100 1.00%",
        "dropped: b 2 of 100 2.00%",
        "shortened: c 0 of 0 -",
        "warning: dropped: b: 2.00%, which is more than 1%; look at the data",
    ]


def test_what_an_earlier_version_prepared_has_no_table():
    assert of_corpora({"replaced_utf8": 3, "empty": 0, "cleaning": {"read": 3}}) == []


def test_a_simulated_silo_reads_in_the_encoding_of_the_run(tmp_path):
    (tmp_path / "d.csv").write_bytes(f'text,silo\n"{TEXT}",north\n'.encode("cp1252"))
    private = [f'data.private.source="{tmp_path}/d.csv"', "data.private.encoding=cp1252"]
    silo = simulated_silo(load("tiny", private), "north", tmp_path)
    assert rows_of(silo.data).by_silo == {"north": (("", {"text": TEXT}),)}
