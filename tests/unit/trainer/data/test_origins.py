"""A corpus is what its sources hold: it is made anew when they change, and never of two versions of them."""

import json
import os
import shutil

import pytest

from configs.errors import InputError
from configs.load import load
from configs.storage.manifests import read_manifest
from trainer.data import origins
from trainer.data.parts import one_after_the_other
from trainer.data.prepare import prepare


def lines(first, count):
    rows = [
        f"public text number {i} about subject {i % 7} and its {i * i} neighbours" for i in range(first, first + count)
    ]
    return "".join(json.dumps({"text": row}) + "\n" for row in rows)


class Prepared:
    """A folder with two files, a run that is prepared from it, and what was said."""

    def __init__(self, tmp_path):
        self.run, self.source = tmp_path / "run", tmp_path / "source"
        self.source.mkdir(parents=True)
        (self.source / "a.jsonl").write_text(lines(0, 150))
        (self.source / "b.jsonl").write_text(lines(150, 150))
        values = [f'data.public.source="{self.source}"', "tokenizer.vocab_size=300", "model.context_length=32"]
        self.config = load("tiny", [*values, "data.near_duplicate_similarity=0.95"])

    def prepare(self, map_parts=one_after_the_other, on_changed=lambda _: None):
        self.notes, self.changed = [], []

        def changed(found):
            self.changed.extend(found)
            on_changed(found)

        return prepare(self.config, self.run, None, map_parts, lambda *_: None, self.notes.append, changed)

    def afresh(self, tmp_path):
        """What a run without a past would have."""
        other = Prepared(tmp_path / "afresh")
        shutil.rmtree(other.source)
        shutil.copytree(self.source, other.source)
        return other.prepare()


@pytest.fixture
def prepared(tmp_path):
    return Prepared(tmp_path)


def change(source):
    with (source / "a.jsonl").open("a") as file:
        file.write(lines(900, 60))


def same_size_and_another_text(source):
    content = (source / "a.jsonl").read_text()
    (source / "a.jsonl").write_text(content.replace("public text number 1 ", "public text number 7 "))


def add(source):
    (source / "c.jsonl").write_text(lines(300, 150))


def remove(source):
    (source / "b.jsonl").unlink()


def another_folder(source):
    shutil.rmtree(source)
    source.mkdir()
    (source / "z.jsonl").write_text(lines(5000, 300))


@pytest.mark.parametrize(
    ("how", "said"),
    [
        (change, "1 changed (a.jsonl)"),
        (same_size_and_another_text, "1 changed (a.jsonl)"),
        (add, "1 new (c.jsonl)"),
        (remove, "1 gone (b.jsonl)"),
        (another_folder, "1 new (z.jsonl), 2 gone (a.jsonl, b.jsonl)"),
    ],
)
def test_a_corpus_whose_files_changed_is_made_anew_with_its_tokenizer(prepared, tmp_path, how, said):
    first = prepared.prepare()
    assert prepared.notes == [f"data.public.source: {prepared.source}: files read: 2; left out: none"]
    how(prepared.source)
    again = prepared.prepare()
    assert prepared.changed == [f"data.public.source '{prepared.source}': other files than were prepared: {said}"]
    expected = prepared.afresh(tmp_path)
    assert again.content_digest == expected.content_digest != first.content_digest
    assert again.inputs == expected.inputs != first.inputs
    tokenizers = [read_manifest(run / "tokenizer", "tokenizer") for run in (prepared.run, tmp_path / "afresh" / "run")]
    assert tokenizers[0].content_digest == tokenizers[1].content_digest
    assert prepared.prepare() == again and not prepared.changed


def test_files_that_were_only_touched_or_moved_about_are_the_same(prepared):
    first = prepared.prepare()
    os.utime(prepared.source / "a.jsonl", (1, 1))
    (prepared.source / "_hidden.jsonl").write_text(lines(0, 5))
    prepared.source.rename(prepared.source.with_name("aside"))
    shutil.copytree(prepared.source.with_name("aside"), prepared.source, copy_function=shutil.copy)
    assert prepared.prepare() == first
    assert not prepared.changed and not prepared.notes


def test_without_its_files_a_corpus_is_used_as_it_is_and_that_is_said(prepared):
    first = prepared.prepare()
    shutil.rmtree(prepared.source)
    assert prepared.prepare() == first
    (note,) = prepared.notes
    assert "can't be compared with what was prepared" in note and note.endswith("the corpus as prepared is used")
    prepared.source.mkdir()  # the place of a disk that is not mounted
    assert prepared.prepare() == first


def test_a_refusal_leaves_the_corpus_as_it_is(prepared):
    first = prepared.prepare()
    add(prepared.source)

    def refuse(_):
        raise InputError("trained on")

    with pytest.raises(InputError, match="trained on"):
        prepared.prepare(on_changed=refuse)
    assert read_manifest(prepared.run / "corpus", "corpus") == first
    (prepared.source / "c.jsonl").unlink()
    assert prepared.prepare(on_changed=refuse) == first


class Killed(Exception):
    pass


@pytest.mark.parametrize("limit", [0, 1])
def test_parts_read_before_a_kill_are_not_mixed_with_files_that_changed_since(prepared, tmp_path, limit):
    """Killed while cleaning, or while tokenising, when the tokenizer is already there."""
    done = []

    def killed(function, numbers):
        for number in one_after_the_other(function, numbers):
            if len(done) == limit:
                raise Killed
            done.append(number)
            yield number

    with pytest.raises(Killed):
        prepared.prepare(killed)
    change(prepared.source)
    assert prepared.prepare().content_digest == prepared.afresh(tmp_path).content_digest


def test_a_new_tokenizer_is_never_beside_the_old_corpus(prepared, tmp_path):
    prepared.prepare()
    change(prepared.source)
    done = []

    def killed(function, numbers):
        if done:
            raise Killed
        done.append(function)
        return one_after_the_other(function, numbers)

    with pytest.raises(Killed):
        prepared.prepare(killed)
    assert read_manifest(prepared.run / "tokenizer", "tokenizer") is not None
    assert read_manifest(prepared.run / "corpus", "corpus") is None
    assert prepared.prepare().content_digest == prepared.afresh(tmp_path).content_digest


def test_an_embedded_text_of_another_version_is_told_and_used(monkeypatch):
    config = load("tiny")
    known = {"public": origins.origin("embedded:python-docs", None)}
    assert origins.since(config, known) == origins.Since((), ())
    monkeypatch.setattr(origins, "version_of", lambda _: "Python 9.9")
    (line,) = origins.since(config, known).unknown
    assert line.startswith(
        "data.public.source 'embedded:python-docs': is of Python 9.9 here, and was prepared of Python 3"
    )
