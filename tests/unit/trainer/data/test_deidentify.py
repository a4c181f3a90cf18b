"""De-identification: what it finds, that each text is alone, and that it fails instead of passing something unseen."""

import importlib.util
import json
import logging
import os
import subprocess
import sys
import unicodedata
from pathlib import Path

import pytest
from repository import REPOSITORY

from configs.errors import InputError
from configs.load import load
from configs.schema.data import DeidentifySettings
from federated.silo.silo import Silo
from federated.silo.units import load_units, rows_of
from federated.simulation.simulated_places import simulated_silo
from trainer.data.deidentify import LONGEST, LOOK_BACK, WINDOW, Deidentifier, open_deidentifier
from trainer.data.prepare import prepare
from trainer.tasks.text import joined

pytest.importorskip("presidio_analyzer")
KEY = bytes(range(32))
ON = DeidentifySettings(enabled=True)


@pytest.fixture(scope="module")
def benchmark():
    path = REPOSITORY / "benchmarks" / "deidentification.py"
    spec = importlib.util.spec_from_file_location("deidentification_benchmark", path)
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module
    spec.loader.exec_module(module)
    return module


@pytest.fixture(scope="module")
def plain():
    return Deidentifier(ON)


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("mail j.doe@ward.hospital.internal.", "mail <EMAIL_ADDRESS>."),
        ("see https://intranet/ward/12, or www.example.com", "see <URL>, or <URL>"),
        ("call (212) 555-0173 now", "call <PHONE_NUMBER> now"),
        ("IBAN DE89 3704 0044 0532 0130 00 today", "IBAN <IBAN_CODE> today"),
        ("card 4111-1111-1111-1111", "card <CREDIT_CARD>"),
        ("from 10.20.30.40 and fe80::1", "from <IP_ADDRESS> and <IP_ADDRESS>"),
        ("seen 2021-03-04 and 3 March 2021", "seen <DATE_TIME> and <DATE_TIME>"),
        ("SSN 536-90-4399", "SSN <US_SSN>"),
        ("NHS number 943 476 5919", "NHS number <UK_NHS>"),
        ("MRN: 1234567; mrn#A-7654321", "MRN: <MEDICAL_RECORD_NUMBER>; mrn#<MEDICAL_RECORD_NUMBER>"),
        ("BP 120/80, pain.It went; os.path.name is 3.11.4", "BP 120/80, pain.It went; os.path.name is 3.11.4"),
        ("", ""),
        ("nothing \U0001f600 here\n\n", "nothing \U0001f600 here\n\n"),
    ],
)
def test_a_span_becomes_its_kind_and_the_rest_stays(plain, text, expected):
    assert plain(text) == expected


def test_precision_and_recall_stay_above_the_floor(benchmark, tmp_path):
    deidentify, examples = benchmark.open_with_names(tmp_path), benchmark.notes(200, seed=11)
    figures = benchmark.measure(examples, [deidentify(note.text) for note in examples])
    assert sum(figure["examples"] for figure in figures.values()) == sum(len(note.spans) for note in examples)
    for kind in [*benchmark.MAKERS, "PERSON"]:
        assert figures[kind]["examples"] >= 10
        assert figures[kind]["removed"] >= 0.97, kind
        assert figures[kind]["recall"] >= 0.9, kind
        assert figures[kind]["precision"] >= 0.85, kind
    assert figures["PERSON (not in the list)"]["recall"] == 0  # what the README says: a list knows its names


def test_the_floor_can_fail(benchmark):
    examples = benchmark.notes(100, seed=3)
    nothing = benchmark.measure(examples, [note.text for note in examples])
    assert all(figures["recall"] == figures["removed"] == 0 for figures in nothing.values())
    note = next(note for note in examples if note.spans)
    start, end, _ = note.spans[0]
    wrong = benchmark.measure([note], [f"{note.text[:start]}<NONSENSE>{note.text[end:]}"])
    assert wrong["NONSENSE"]["precision"] == 0
    assert wrong[note.spans[0][2]]["recall"] < 1


def test_names_come_from_the_list_as_written_and_in_capitals(tmp_path):
    (tmp_path / "names.txt").write_text("Will\nMary Ann Smith\n\nSmith\nÅse Ñandú\n")
    deidentify = Deidentifier(ON.model_copy(update={"names_file": str(tmp_path / "names.txt")}))
    assert deidentify("Will will see Mary Ann Smith's son") == "<PERSON> will see <PERSON>'s son"
    assert deidentify("SMITH, blacksmith: Åse Ñandú") == "<PERSON>, blacksmith: <PERSON>"
    assert deidentify.counts == {"PERSON": 4}


@pytest.mark.parametrize(
    "written",
    [
        "Anna M\u00fcller",
        "Anna Mu\u0308ller",
        "ANNA MU\u0308LLER",
        "Anna\nM\u00fcller",
        "Anna\u00a0 \tM\u00fcller",
        "\uff21nna M\u00fcl\u00adler",
        "O'Brien",
        "O\u2019Brien",
        "O\u02bcBRIEN",
        "Griffin-Vo Thi\u0323\u0302",
        "Gri\ufb03n\u2011Vo Thi\u0302\u0323",
    ],
)
@pytest.mark.parametrize("form", ["NFC", "NFD"])
def test_a_listed_name_is_found_in_every_form_of_its_characters(tmp_path, written, form):
    names = "Anna M\u00fcller\nO\u2019Brien\nGriffin-Vo Thi\u0302\u0323\nRene\n"
    (tmp_path / "names.txt").write_text(unicodedata.normalize(form, names), encoding="utf-8")
    deidentify = Deidentifier(ON.model_copy(update={"names_file": str(tmp_path / "names.txt")}))
    around = "It\u2019s \ufb01ne, Rene\u0301: "
    assert deidentify(f"{around}{written}, {written}.") == f"{around}<PERSON>, <PERSON>."


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("病人王小明今天来了。", "病人<PERSON>今天来了。"),
        ("山田がごさんは山田がござる", "<PERSON>さんは<PERSON>ざる"),
        ("คุณสมชายมาวันนี้", "คุณ<PERSON>มาวันนี้"),
        ("김철수가 왔다", "<PERSON>가 왔다"),
        ("अनिता आई, अनितापुर नहीं", "<PERSON> आई, अनितापुर नहीं"),
        ("Renee and Rene\u0301 saw Rene", "Renee and Rene\u0301 saw <PERSON>"),
    ],
)
def test_a_listed_name_is_found_where_a_script_has_no_spaces(tmp_path, text, expected):
    """Before: a name had to stand between characters that are no letters, as no name does in Chinese."""
    names = "Rene\n王小明\n山田がご\nสมชาย\n김철수\nअनिता\n"
    (tmp_path / "names.txt").write_text(names, encoding="utf-8-sig")  # as Windows writes it
    deidentify = Deidentifier(ON.model_copy(update={"names_file": str(tmp_path / "names.txt")}))
    assert deidentify(text) == expected


def test_names_come_from_a_spacy_model_that_is_there(tmp_path):
    import spacy

    pipeline = spacy.blank("en")
    pipeline.add_pipe("entity_ruler").add_patterns(
        [{"label": "PERSON", "pattern": "Zebulon"}, {"label": "ORG", "pattern": "Acme"}]
    )
    pipeline.to_disk(tmp_path / "model")
    deidentify = Deidentifier(ON.model_copy(update={"spacy_model": str(tmp_path / "model")}))
    assert deidentify("Zebulon works at Acme") == "<PERSON> works at Acme"
    assert deidentify.digest != Deidentifier(ON).digest


def test_each_text_is_treated_alone(benchmark, tmp_path):
    texts = [note.text for note in benchmark.notes(60, seed=5)]
    deidentify = benchmark.open_with_names(tmp_path)
    forwards = [deidentify(text) for text in texts]
    backwards = [deidentify(text) for text in reversed(texts)]
    assert forwards == backwards[::-1]
    assert Deidentifier(ON).counts == {}  # counts are one reader's, not the process'


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"names_file": "/nowhere/names"}, "names_file /nowhere/names: can't be read"),
        ({"names_file": "/dev/null"}, "names_file /dev/null: holds no name"),
        ({"spacy_model": "en_core_web_lg_typo"}, "spacy_model is 'en_core_web_lg_typo': not installed here"),
        ({"countries": ("us", "atlantis")}, "countries holds 'atlantis': Presidio knows"),
        ({"medical_record_pattern": "(MRN"}, r"medical_record_pattern '\(MRN': not a regular expression"),
    ],
)
def test_a_bad_setting_is_one_clear_line(change, message):
    with pytest.raises(InputError, match=message) as caught:
        Deidentifier(ON.model_copy(update=change))
    assert "\n" not in str(caught.value)


def run_python(code, **environment):
    return subprocess.run(
        [sys.executable, "-c", code],
        capture_output=True,
        text=True,
        check=False,
        env={**os.environ, **environment},
        timeout=120,
    )


PRELUDE = """
from configs.schema.data import DeidentifySettings
from trainer.data.deidentify import Deidentifier
"""


def test_without_the_extra_the_error_names_the_command():
    done = run_python(
        f"import sys; sys.modules['presidio_analyzer'] = None\n{PRELUDE}\n"
        "Deidentifier(DeidentifySettings(enabled=True))"
    )
    assert "InputError: data.deidentify.enabled is true: Presidio is not installed; `pip install" in done.stderr
    assert open_deidentifier(DeidentifySettings()) is None


def test_nothing_is_fetched_and_a_slow_pattern_is_an_error_that_quotes_nothing():
    """In a process that may not open a connection; a pattern that Presidio would give up after a second."""
    done = run_python(
        "import socket\n"
        "def refuse(*_): raise SystemExit('asked the network')\n"
        f"socket.socket.connect = socket.getaddrinfo = refuse\n{PRELUDE}\n"
        "d = Deidentifier(DeidentifySettings(enabled=True, medical_record_pattern=r'(?:\\w|\\w\\w)+[!]'))\n"
        "print(d('j.doe@example.org, www.example.com, +44 20 7946 0958'))\n"
        "d('SEC' * 40 + ' !')",
        REGEX_TIMEOUT_SECONDS="1",
    )
    assert done.stdout == "<EMAIL_ADDRESS>, <URL>, <PHONE_NUMBER>\n"
    assert "SiloweaveError: de-identification failed on a record (TimeoutError)" in done.stderr
    assert "SECSEC" not in done.stderr


ADVERSARIAL = {
    "words before an @": "a." * 10_000 + "@",
    "many @": "a@" * 10_000,
    "many hyphens": "a-" * 10_000,
    "digits": "1-" * 10_000,
    "one word": "a" * 20_000,
    "one address": "http://h/" + "a" * 20_000,
    "space": "Anna" + " " * 20_000,
    "marks": "Anna" + "\u0308" * 20_000,
}


@pytest.mark.parametrize("text", ADVERSARIAL.values(), ids=ADVERSARIAL)
def test_no_call_sees_more_than_a_window_and_all_together_grow_with_the_length(plain, monkeypatch, text):
    """What a call costs may grow with the square of what it sees: so that is bounded, whatever the text."""
    seen = []
    find = plain._find
    monkeypatch.setattr(plain, "_find", lambda piece: (seen.append(len(piece)), find(piece))[1])
    treated = plain(f"{text} j.doe@example.org")
    assert treated.endswith("<EMAIL_ADDRESS>")
    assert max(seen) <= WINDOW + LOOK_BACK
    assert sum(seen) <= 2 * len(text)


@pytest.mark.parametrize(
    ("identifier", "kind"),
    [
        ("j.doe@ward.hospital.internal", "EMAIL_ADDRESS"),
        ("DE89 3704 0044 0532 0130 00", "IBAN_CODE"),
        ("3 March 2021", "DATE_TIME"),
        ("Anna Maria Smith", "PERSON"),
        ("http://intranet/" + "ward/" * 40, "URL"),
    ],
)
@pytest.mark.parametrize("filler", ["so it was, ", "x"])
def test_a_window_cuts_no_identifier_wherever_it_lies(tmp_path, identifier, kind, filler):
    (tmp_path / "names.txt").write_text("Anna Maria Smith\n")
    deidentify = Deidentifier(ON.model_copy(update={"names_file": str(tmp_path / "names.txt")}))
    # A step that is no divisor of the places where a window can end, and shorter than what is looked for.
    for place in range(WINDOW - 2 * LONGEST - 2 * len(identifier), WINDOW + 8, max(7, len(identifier) - 5)):
        before = (filler * WINDOW)[:place]
        assert deidentify(f"{before} {identifier} {filler * 9}") == f"{before} <{kind}> {filler * 9}", place


def test_what_is_longer_than_a_window_is_taken_to_the_next_space(plain):
    long = "https://h/" + "ward/" * WINDOW
    assert plain(f"see {long} now, j.doe@example.org") == "see <URL> now, <EMAIL_ADDRESS>"
    assert plain.counts["URL"] >= 1


def test_a_long_text_is_treated_as_its_notes_are(benchmark, tmp_path):
    """Recall does not fall where a window ends: notes joined lose no more than notes alone."""
    deidentify, examples = benchmark.open_with_names(tmp_path), benchmark.notes(150, seed=17)
    alone = [deidentify(note.text) for note in examples]
    assert len("\n".join(alone)) > 4 * WINDOW
    assert deidentify("\n".join(note.text for note in examples)).split("\n") == alone


def test_the_library_may_not_log_what_quotes_text(plain):
    assert plain("4111 1111 1111 1111 is a card")
    assert logging.getLogger("presidio-analyzer").getEffectiveLevel() >= logging.WARNING


@pytest.fixture
def private_notes(tmp_path):
    rows = [{"text": f"Note {i}: call (212) 555-01{i % 100:02}, unit {i}", "silo": "north"} for i in range(60)]
    path = tmp_path / "notes.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    rows_of.cache_clear()
    return load(
        "tiny",
        [
            f'data.private.source="{path}"',
            "data.private.public_record_counts={north=100}",
            f"federated.state_dir={tmp_path / 'state'}",
            "data.deidentify.enabled=true",
        ],
    )


def test_units_are_treated_after_the_split_so_that_none_moves(private_notes, tmp_path):
    on = simulated_silo(private_notes, "north", tmp_path)
    off = on.model_copy(update={"data": on.data.model_copy(update={"deidentify": DeidentifySettings()})})
    treated, raw = load_units(on, KEY), load_units(off, KEY)

    def unit(rows):
        return joined(rows).rsplit(" ", 1)[1]

    assert list(map(unit, treated.held_out)) == list(map(unit, raw.held_out)) != []
    assert list(map(unit, treated.train)) == list(map(unit, raw.train))
    assert all(
        "555" not in text and "<PHONE_NUMBER>" in text for text in map(joined, [*treated.train, *treated.held_out])
    )
    assert treated.deidentified == {"PHONE_NUMBER": 60}
    assert raw.deidentified is None


def test_a_silo_writes_its_counts_to_its_own_log_alone(private_notes, tiny_model, tmp_path):
    config = simulated_silo(private_notes, "north", tiny_model)
    silo = Silo(config, frozenset())
    assert silo.workbench.records
    silo.close()
    log = Path(config.silo.state_dir) / "silo.log"
    assert "'PHONE_NUMBER': 60" in log.read_text()
    assert log.stat().st_mode & 0o077 == 0
    holding = [path for path in tmp_path.rglob("*") if path.is_file() and b"PHONE_NUMBER" in path.read_bytes()]
    assert holding == [log]


def test_the_public_corpus_is_treated_counted_and_bound_to_the_settings(tmp_path):
    rows = [
        {"text": f"Public text {i} on subject {i % 7}: write to p{i}@example.org about {i} things"} for i in range(300)
    ]
    (tmp_path / "c.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    common = [
        f'data.public.source="{tmp_path / "c.jsonl"}"',
        "tokenizer.vocab_size=300",
        "data.near_duplicate_similarity=0.95",
    ]
    off, on = load("tiny", common), load("tiny", [*common, "data.deidentify.enabled=true"])
    raw = prepare(off, tmp_path)
    with pytest.raises(ValueError, match="give prepare"):
        prepare(on, tmp_path)
    treated = prepare(on, tmp_path, open_deidentifier(on.data.deidentify))
    assert treated.metadata["deidentified"] == {"EMAIL_ADDRESS": 300}
    assert treated.config_digest != raw.config_digest
    assert treated.content_digest != raw.content_digest
    assert prepare(on, tmp_path, open_deidentifier(on.data.deidentify)) == treated
    other = on.data.deidentify.model_copy(update={"countries": ("us",)})
    assert open_deidentifier(other).digest != open_deidentifier(on.data.deidentify).digest
