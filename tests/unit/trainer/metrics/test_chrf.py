"""chrF of one answer against sacrebleu's, in any language."""

import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from trainer.metrics.chrf import chrf

texts = st.one_of(st.text(max_size=12), st.text(alphabet="ab c\n", max_size=40))


@given(texts, texts)
@example("", "")
@example(" \n", "a")
@example("Die Katze sitzt.", "Die Katze sass da.")
@example("\u732b\u5750\u5728\u57ab\u5b50\u4e0a", "\u732b\u5728\u57ab\u5b50\u4e0a")
def test_it_is_sacrebleus(prediction, reference):
    sacrebleu = pytest.importorskip("sacrebleu")
    expected = sacrebleu.sentence_chrf(prediction, [reference]).score / 100
    assert chrf(prediction, reference) == pytest.approx(expected, abs=1e-12)


@given(texts, texts)
def test_it_is_from_0_to_1(prediction, reference):
    assert 0 <= chrf(prediction, reference) <= 1
    assert chrf(reference, reference) == (1.0 if reference.split() else 0.0)


def test_by_hand():
    """One of two characters; no run of two: orders that one text is too short for don't count."""
    assert chrf("a", "ab") == pytest.approx(5 * 1 * 0.5 / (4 * 1 + 0.5))
    assert chrf("xyz", "ab") == 0.0
