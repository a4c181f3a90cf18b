"""Batches of texts: reproducible, resumable, each record once, and as many for each condition."""

import json
from collections import Counter

import pytest
import torch
from taught_models import CONTEXT, a_taught_model

from configs.errors import InputError
from configs.schema.data import RecordSettings
from configs.schema.tasks import TaskSpec
from trainer.data.tokenizer import load_tokenizer
from trainer.inference.decoding import Decoding
from trainer.inference.generation import draw, write
from trainer.models.load import load_model
from trainer.synthesis import drawing as module
from trainer.synthesis.conditions import Form
from trainer.synthesis.drawing import BATCH, Drawing, Fruitless, _Kept, synthesise
from trainer.tasks.task import kind_of

SPEC = TaskSpec(name="chat", template="{label}: {text}")
DRAWN = Decoding(64, temperature=1.0, seed=3)


@pytest.fixture(scope="module")
def written(tmp_path_factory):
    folder = a_taught_model(tmp_path_factory.mktemp("model"))
    return load_model(folder).eval(), load_tokenizer(folder)


def drawing(written, number=40, given=("label=old", "label=red"), decoding=DRAWN, context=CONTEXT):
    model, tokenizer = written
    form = Form(kind_of("chat")(tokenizer, context, SPEC), SPEC, RecordSettings(source="x"))
    return Drawing(model, tokenizer, context, form, form.conditions(given), decoding, number)


@pytest.fixture(autouse=True)
def one_thread():
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


def test_each_condition_gets_as_many_records_and_none_comes_twice(written, tmp_path):
    seen = []
    found = synthesise(drawing(written, 41), tmp_path / "part", {}, lambda *one: seen.append(one))
    assert Counter(record["label"] for record in found.records) == {"old": 21, "red": 20}
    assert len({record["text"] for record in found.records}) == 41
    assert [record["label"] for record in found.records[:4]] == ["old", "red"] * 2
    assert found.drawn == 41 + sum(found.dropped.values())
    assert found.drawn % BATCH == 0
    assert seen[-1] == (41, 41)


def test_the_same_seed_draws_the_same_and_another_one_others(written, tmp_path):
    first, again = (synthesise(drawing(written), tmp_path / name, {}) for name in "ab")
    other = synthesise(drawing(written, decoding=Decoding(64, temperature=1.0, seed=4)), tmp_path / "c", {})
    assert first == again
    assert not {record["text"] for record in first.records} & {record["text"] for record in other.records}


def test_an_interrupted_call_goes_on_and_ends_the_same(written, tmp_path, monkeypatch):
    whole = synthesise(drawing(written, 150), tmp_path / "whole", {})
    real, asked = module.draw, []

    def failing(*arguments):
        asked.append(1)
        if len(asked) == 3:
            raise KeyboardInterrupt
        return real(*arguments)

    monkeypatch.setattr(module, "draw", failing)
    with pytest.raises(KeyboardInterrupt):
        synthesise(drawing(written, 150), tmp_path / "part", {})
    with (tmp_path / "part").open("ab") as part:
        part.write(b'[["half a li')
    again = synthesise(drawing(written, 150), tmp_path / "part", {})
    assert again.records == whole.records
    assert (again.drawn, again.dropped, again.resumed) == (whole.drawn, whole.dropped, 2 * BATCH)
    assert len(asked) == 3 + whole.drawn // BATCH - 2
    assert (tmp_path / "part").read_bytes() == (tmp_path / "whole").read_bytes()


@pytest.mark.parametrize(
    "other",
    [{"number": 41}, {"given": ["label=old"]}, {"decoding": Decoding(64, temperature=0.9, seed=3)}],
)
def test_another_calls_batches_are_refused(written, tmp_path, other):
    synthesise(drawing(written), tmp_path / "part", {"model": "a"})
    with pytest.raises(InputError, match="was begun with another input, model or settings"):
        synthesise(drawing(written, **other), tmp_path / "part", {"model": "a"})
    with pytest.raises(InputError, match="was begun with another input, model or settings"):
        synthesise(drawing(written), tmp_path / "part", {"model": "b"})


def test_a_damaged_part_is_refused(written, tmp_path):
    synthesise(drawing(written), tmp_path / "part", {})
    head, *lines = (tmp_path / "part").read_bytes().splitlines(keepends=True)
    for damage in (b"{]\n", b"7\n", b'[["one"]]\n'):
        (tmp_path / "part").write_bytes(b"".join([head, damage, *lines]))
        with pytest.raises(InputError, match="is damaged; delete it, and give the command again"):
            synthesise(drawing(written), tmp_path / "part", {})


def test_copies_are_dropped_whatever_label_they_have(written):
    kept = _Kept(drawing(written, 10))
    text = "it was a fine day and the old ship sailed to the island in the north of the bay with all its men"
    kept.add(0, [(text, ""), (text, ""), (f"{text} again", ""), ("a text of quite another kind than those", "")])
    kept.add(1, [(text.upper(), ""), ("dropped before", "no end")])
    assert kept.dropped == {"an exact copy": 1, "a near copy": 2, "no end": 1}
    assert len(kept.records()) == 2


def test_a_model_of_which_nothing_can_be_kept_is_an_error_that_says_why(written, tmp_path):
    short = drawing(written, decoding=Decoding(3, temperature=1.0))
    why = r"label=old: of the last 640 texts none could be kept, after 0 records; of all 1280 texts .* no end"
    with pytest.raises(Fruitless, match=why) as said:
        synthesise(short, tmp_path / "part", {})
    assert "\n" not in str(said.value)


def test_the_likeliest_text_again_and_again_is_refused(written):
    with pytest.raises(InputError, match="temperature=0: every text would be the same"):
        drawing(written, decoding=Decoding(8))


def test_what_is_drawn_together_is_what_one_text_alone_would_be(written):
    """Each row goes on from the same opening, and ends where it ends, at a stop string too."""
    model, tokenizer = written
    opening = drawing(written).conditions[0].opening
    rows = draw(model, tokenizer, opening, CONTEXT, Decoding(64), 3)
    alone = write(model, tokenizer, opening, CONTEXT, Decoding(64))
    assert {row.text for row in rows} == {alone}
    cut = Decoding(64, temperature=1.0, stop=("e",))
    for row in draw(model, tokenizer, opening, CONTEXT, cut, 8):
        assert "e" not in row.text
        assert row.ended or len(row.ids) == CONTEXT - len(opening.ids)
    ended = [row for row in draw(model, tokenizer, opening, CONTEXT, cut, 64) if row.ended]
    assert ended


def test_lines_are_json_of_texts_and_reasons(written, tmp_path):
    found = synthesise(drawing(written), tmp_path / "part", {})
    _, *lines = (tmp_path / "part").read_text().splitlines()
    reasons = Counter(fault for line in lines for _, fault in json.loads(line) if fault)
    assert reasons.items() <= found.dropped.items()
