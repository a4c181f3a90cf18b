"""Every language and code, stage by stage: what comes out is what went in, or what the documents say of it."""

import csv
import json
import unicodedata
from itertools import combinations
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tiny_bert import word_pieces

from configs.load import load
from configs.schema.data import SourceSettings
from configs.schema.tasks import TaskSpec
from trainer.data.cleaning import changed, normalise
from trainer.data.languages import SAMPLES, count_unknown, losses
from trainer.data.packing import VALIDATION_TOKENS, TokenFile, stored_dtype, train_tokens
from trainer.data.prepare import prepare
from trainer.data.sources import ReadCounts, read_rows
from trainer.data.tokenizer import load_tokenizer, train_tokenizer
from trainer.tasks.chat import ChatTask
from trainer.tasks.entities import EntitiesTask
from trainer.tasks.fields import Answers
from trainer.tasks.qa import AnswersTask
from trainer.tasks.text import CausalTask
from trainer.tasks.text_to_text import TranslationTask

XQUAD = Path(__file__).parents[5] / "shared/data/xquad"
FORMS = {
    "as it is": lambda text: text,
    "NFC": lambda text: unicodedata.normalize("NFC", text),
    "NFD": lambda text: unicodedata.normalize("NFD", text),
    "lines of Windows": lambda text: text.replace("\n", "\r\n"),
    "special tokens spelt": lambda text: f"<|endoftext|>{text}<|mask|>",
}
WORDS = {
    language: list(text.replace(" ", "").replace("\u3000", "")) if language == "Chinese" else text.split()
    for language, text in SAMPLES.items()
}
ANSWERS = {
    "English": "waited",
    "German": "Straße nach Köln",
    "Spanish": "señora",
    "Chinese": "热茶",
    "Hindi": "क़लम",
    "Arabic": "النافذةَ",
    "code": "sum(values)",
    "emoji": "🇩🇪",
}
languages = pytest.mark.parametrize("language", SAMPLES)


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory):
    """Learnt from English alone: of the other languages it has seen no letter."""
    folder = tmp_path_factory.mktemp("tokenizer")
    train_tokenizer([SAMPLES["English"]] * 3, 300, folder, "masked", 64)
    return load_tokenizer(folder)


@pytest.fixture(scope="module")
def pieces():
    return word_pieces([SAMPLES["English"], SAMPLES["code"], "ada lovelace wrote a resume", "if a: b"])


# Reading


def as_jsonl(path, text):
    path.with_suffix(".jsonl").write_text(json.dumps({"text": text}, ensure_ascii=False) + "\n", encoding="utf-8")
    return path.with_suffix(".jsonl")


def as_escapes(path, text):
    path.with_suffix(".json").write_text(json.dumps([{"text": text}]), encoding="ascii")
    return path.with_suffix(".json")


def as_csv(path, text):
    with path.with_suffix(".csv").open("w", encoding="utf-16", newline="") as file:
        csv.writer(file).writerows([["text"], [text]])
    return path.with_suffix(".csv")


def as_text(path, text):
    path.with_suffix(".txt").write_text(text, encoding="utf-8", newline="")
    return path.with_suffix(".txt")


def as_parquet(path, text):
    pq.write_table(pa.table({"text": [text]}), path.with_suffix(".parquet"))
    return path.with_suffix(".parquet")


@languages
@pytest.mark.parametrize("form", FORMS)
def test_a_file_of_each_kind_is_read_as_it_was_written(language, form, tmp_path):
    text = FORMS[form](SAMPLES[language])
    for write in (as_jsonl, as_escapes, as_csv, as_text, as_parquet):
        counts = ReadCounts()
        rows = list(read_rows(SourceSettings(source=str(write(tmp_path / "file", text))), [], counts))
        assert rows == [{"text": text}]
        assert counts.numbers() == ReadCounts(rows=1).numbers()


# Cleaning


@languages
@pytest.mark.parametrize("form", FORMS)
def test_cleaning_keeps_case_marks_blanks_and_indentation(language, form):
    text = FORMS[form](SAMPLES[language])
    clean = normalise(text)
    assert clean == unicodedata.normalize("NFC", text).replace("\r\n", "\n").rstrip("\n")
    assert not changed(unicodedata.normalize("NFC", text), clean)


def test_what_cleaning_takes_from_code_is_written_down():
    """Blanks at the ends of lines and more than two blank lines; nothing inside a line."""
    assert normalise("  a:\t\tb \n\n\n\n\n\tc  d\t\n") == "  a:\t\tb\n\n\n\tc  d"


# Preparation: from a file to windows and back


def documents():
    """Enough of them to fill a batch, each with two languages; no two are copies."""
    pairs = [f"{SAMPLES[one]}\n{SAMPLES[other]}" for one, other in combinations(SAMPLES, 2)]
    return [*pairs, *(f"<|endoftext|> is a text in {text}" for text in SAMPLES.values())]


@pytest.mark.parametrize("packing", ["concatenate", "documents"])
def test_a_prepared_corpus_reads_back_as_its_documents(packing, tmp_path):
    path, run = tmp_path / "text.jsonl", tmp_path / "run"
    path.write_text("".join(json.dumps({"text": text}) + "\n" for text in documents()))
    changes = [
        f'data.public.source="{path}"', f'data.packing="{packing}"', "data.near_duplicate_similarity=0.95",
        "tokenizer.vocab_size=300", "model.context_length=256", "pretrain.batch_size=8",
        "data.validation_fraction=0.2",
    ]  # fmt: skip
    metadata = prepare(load("tiny", changes), run).metadata
    assert metadata["cleaning"]["kept"] == metadata["cleaning"]["read"] == len(documents())
    tokenizer, found = load_tokenizer(run / "tokenizer"), []
    for name in (train_tokens("public"), VALIDATION_TOKENS):
        stream = np.fromfile(run / "corpus" / name, stored_dtype(run / "corpus"))
        ends = np.flatnonzero(stream == tokenizer.eos_token_id)
        found += [tokenizer.decode(ids[:-1]) for ids in np.split(stream, ends + 1) if len(ids) > 1]
        assert TokenFile(run / "corpus" / name, 256, stored_dtype(run / "corpus")).num_windows > 0
    assert sorted(found) == sorted(map(normalise, documents()))


# Tokenizers


@languages
@pytest.mark.parametrize("form", FORMS)
def test_the_trained_tokenizer_gives_every_text_back(language, form, tokenizer):
    text = FORMS[form](SAMPLES[language])
    encoded = CausalTask(tokenizer, 4096).encode(text)
    assert tokenizer.decode(encoded.ids, skip_special_tokens=True) == text
    assert encoded.characters == len(text)
    assert losses(tokenizer) == []


@settings(deadline=None)
@given(st.text(st.characters(exclude_categories=["Cs"])))
def test_the_trained_tokenizer_gives_any_text_back(text):
    tokenizer = learnt(tuple(SAMPLES.values()))
    ids = CausalTask(tokenizer, 10**6).encode(text).ids
    assert tokenizer.decode(ids, skip_special_tokens=True) == text


def test_what_word_pieces_lose_is_said(pieces):
    alike, unknown = losses(pieces)
    assert "case, accents, line ends and indentation alone" in alike  # of vowel signs it knows no letter
    assert "Chinese" in unknown
    assert "Arabic" in unknown
    assert "English" not in unknown
    ids = pieces.encode("a ship 热茶", add_special_tokens=False)
    assert count_unknown(pieces, ids) == (2, len(ids))


# Tasks


@languages
def test_every_word_has_its_own_tag(language, tokenizer, pieces):
    words, labels = WORDS[language], ("O", "B-A", "I-A", "B-B", "I-B")
    tags = tuple(number % 5 for number in range(len(words)))
    for one in (tokenizer, pieces):
        (example,) = EntitiesTask(one, 512, TaskSpec(name="entities", labels=labels)).examples(
            [{"tokens": words, "tags": tags}]
        )
        assert [tag for tag in example.target if tag >= 0] == list(tags)


@languages
@pytest.mark.parametrize("form", ["NFC", "NFD", "lines of Windows"])
def test_an_answer_is_found_where_its_characters_are(language, form, tokenizer, pieces):
    """Its place counts code points, also behind emoji, marks and line ends of two characters."""
    context, answer = (FORMS[form](text) for text in (SAMPLES["emoji"] + "\n" + SAMPLES[language], ANSWERS[language]))
    start = context.rindex(answer)
    row = {"context": context, "question": "?", "answer": Answers((answer,), (start,))}
    assert AnswersTask.misfit(row) == ""
    for one in (tokenizer, pieces):
        (window,) = AnswersTask(one, 512, TaskSpec(name="qa")).examples([row])
        first, last = (window.spans[place - window.first] for place in window.target)
        assert context[first[0] : last[1]] == answer


@languages
def test_what_is_asked_and_answered_reads_back(language, tokenizer):
    text = SAMPLES[language]
    chat = ChatTask(tokenizer, 1024, TaskSpec(name="chat", template="{question}\n{answer}"))
    translation = TranslationTask(tokenizer, 1024, TaskSpec(name="translation"))
    rows = {"question": text, "answer": text}, {"source": text, "target": text}
    for task, row, gap in ((chat, rows[0], "\n"), (translation, rows[1], "\n\n")):
        (example,) = task.examples([row])
        assert tokenizer.decode(example.ids, skip_special_tokens=True) == f"{text}{gap}{text}"
        assert task.references([example]) == [text.strip()]


# Real texts


@pytest.mark.skipif(not XQUAD.is_dir(), reason="the shared data is not there")
def test_real_questions_and_their_translations_pass_every_stage(tokenizer):
    for name in ("parallel_en_de", "parallel_en_es"):
        rows = [json.loads(line) for line in (XQUAD / f"{name}.jsonl").read_text().splitlines()]
        for text in (row[side] for row in rows for side in ("source", "target")):
            assert normalise(text) == unicodedata.normalize("NFC", text).rstrip()
            assert tokenizer.decode(tokenizer.encode(text, add_special_tokens=False)) == text
    for line in (XQUAD / "qa.jsonl").read_text().splitlines():
        row = json.loads(line)
        answers = Answers(*zip(*((one["text"], one["start"]) for one in row["answers"]), strict=True))
        assert AnswersTask.misfit({**row, "answer": answers}) == ""


def learnt(texts, kept={}):  # noqa: B006  (one tokenizer for all examples)
    from tempfile import TemporaryDirectory

    if texts not in kept:
        with TemporaryDirectory() as folder:
            kept[texts] = train_tokenizer(texts, 400, Path(folder))
    return kept[texts]
