"""All figures of a score: by the libraries themselves on the same answers, with intervals, and what is missing."""

import json
import math
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from chat_templates import VOCABULARY, tokenizer_of
from tiny_bert import CONTEXT, word_pieces
from transformers import LlamaConfig, LlamaForCausalLM

from configs.schema.tasks import CAUSAL, TaskSpec
from trainer.data.tokenizer import load_tokenizer
from trainer.metrics import inputs
from trainer.scoring.in_full import _MADE, OWN, in_full
from trainer.scoring.score import Score, score_in_full
from trainer.tasks.fields import Answers
from trainer.tasks.task import _tasks, kind_of

LABELS = ("calm", "urgent", "unknown")
TAGS = ("O", "B-PER", "I-PER", "B-LOC", "I-LOC")
PIECES = word_pieces(["a b c d e f g h in the house of a friend went to"] * 2, 60)
TEXTS = ["a", "the house", "a b c d e f g h", "in the house of a friend", "b", "c d", "went to the house", "d"]
CHOSEN, RIGHT = (0, 1, 1, 2, 0, 1, 0, 0), (0, 1, 2, 2, 1, 1, 0, 1)


class Says:
    """A model that says something of its own to each text, whatever else is in the batch."""

    config = SimpleNamespace(type_vocab_size=2)

    def __init__(self, size, factor=1.0):
        self.size, self.factor = size, factor

    def __call__(self, input_ids, attention_mask, token_type_ids=None):
        rows = []
        for ids, mask in zip(input_ids, attention_mask, strict=True):
            generator = torch.Generator().manual_seed(int((ids * mask).sum()) + 31 * int(mask.sum()))
            rows.append(torch.randn((int(mask.sum()), self.size), generator=generator))
        logits = torch.nn.utils.rnn.pad_sequence(rows, batch_first=True) * self.factor
        logits = torch.nn.functional.pad(logits, (0, 0, 0, input_ids.shape[1] - logits.shape[1]))
        if token_type_ids is not None:
            return SimpleNamespace(start_logits=logits[..., 0], end_logits=logits[..., 1])
        return SimpleNamespace(logits=logits)


class OfATextAsAWhole(Says):
    def __call__(self, input_ids, attention_mask):
        return SimpleNamespace(logits=super().__call__(input_ids, attention_mask).logits[:, 0])


def spec_of(name):
    labels = {"classification": LABELS, "multilabel": LABELS, "entities": TAGS}.get(name, ())
    return TaskSpec(name=name, labels=labels)


def scored(name, rows, model, units=None):
    """Each row alone is a unit, unless said otherwise."""
    task = kind_of(name)(PIECES, CONTEXT, spec_of(name))
    groups = [[row] for row in rows] if units is None else units
    return task, score_in_full(model, task, [task.scored(unit) for unit in groups], 3, 5)


def full(name, score, language="en"):
    found = in_full(score, spec_of(name), language, seed=1)
    assert json.loads(json.dumps(found, allow_nan=False)) == found
    return found


def values(found, by):
    return {name: figure["value"] for name, figure in found["figures"][by].items()}


def test_labels_by_scikit_learn():
    metrics = pytest.importorskip("sklearn.metrics")
    rows = [{"text": text, "label": right} for text, right in zip(TEXTS, RIGHT, strict=True)]
    task, score = scored("classification", rows, model := OfATextAsAWhole(3))
    logits = torch.cat([model(**inputs_of(task, text)).logits for text in TEXTS])
    chosen, likely = logits.argmax(dim=1).numpy(), logits.double().softmax(dim=1).max(dim=1).values.numpy()
    assert [answer.given.answer for answer in score.answers] == [LABELS[one] for one in chosen]
    assert [answer.right for answer in score.answers] == [LABELS[one] for one in RIGHT]
    found = full("classification", score)
    library = values(found, "scikit-learn")
    assert library["accuracy"] == pytest.approx(np.mean(chosen == np.array(RIGHT)))
    for average in ("micro", "macro"):
        wanted = metrics.precision_recall_fscore_support(RIGHT, chosen, average=average, zero_division=0)
        names = (f"precision_{average}", f"recall_{average}", f"f1_{average}")
        assert [library[name] for name in names] == pytest.approx(list(wanted[:3]))
    assert values(found, OWN)["macro_f1"] == pytest.approx(library["f1_macro"])
    assert found["confusion"] == metrics.confusion_matrix(RIGHT, chosen, labels=range(3)).tolist()
    means, frequencies, counts = map(np.array, zip(*found["reliability"], strict=True))
    assert counts.sum() == len(TEXTS)
    assert (counts * means).sum() == pytest.approx(likely.sum())
    assert (counts * frequencies).sum() == (chosen == np.array(RIGHT)).sum()
    error = (counts * abs(means - frequencies)).sum() / counts.sum()
    assert library["expected_calibration_error"] == pytest.approx(error)


def inputs_of(task, text):
    return task.inputs(task.scored([{"text": text, "label": 0}]))


def test_several_labels_by_scikit_learn():
    metrics = pytest.importorskip("sklearn.metrics")
    rows = [{"text": text, "labels": tuple(range(number % 4))} for number, text in enumerate(TEXTS)]
    task, score = scored("multilabel", rows, model := OfATextAsAWhole(3))
    logits = torch.cat([model(**task.inputs(task.scored([row]))).logits for row in rows])
    truth = np.array([[label < number % 4 for label in range(3)] for number in range(len(TEXTS))])
    found = full("multilabel", score)
    library = values(found, "scikit-learn")
    assert library["f1_macro"] == pytest.approx(metrics.f1_score(truth, (logits > 0).numpy(), average="macro"))
    assert library["accuracy"] == pytest.approx(((logits > 0).numpy() == truth).all(axis=1).mean())
    assert score.answers[3].right == LABELS
    probabilities = torch.tensor([answer.given.probabilities for answer in score.answers])
    torch.testing.assert_close(probabilities.float(), logits.sigmoid())
    assert sum(count for *_, count in found["reliability"]) == truth.size
    assert "confusion" not in found


def test_entities_by_seqeval():
    pytest.importorskip("seqeval")
    rows = [
        {"tokens": ["the", "friend", "went", "to", "a", "house"], "tags": (0, 1, 0, 0, 3, 4)},
        {"tokens": ["a", "b"], "tags": (1, 2)},
        # The tokenizer sees nothing of the first word: what is left of its entity begins nowhere.
        {"tokens": ["\u200b", "house", "of", "b"], "tags": (1, 2, 0, 3)},
    ]
    _, score = scored("entities", rows, Says(5))
    assert [len(answer.given.answer) for answer in score.answers] == [6, 2, 3]
    assert [answer.right for answer in score.answers][1:] == [("B-PER", "I-PER"), ("O", "O", "B-LOC")]
    found = full("entities", score)
    assert values(found, "seqeval")["f1"] == pytest.approx(values(found, OWN)["entity_f1"], abs=1e-12)
    assert set(values(found, "seqeval")) == {"precision", "recall", "f1", "f1_PER", "f1_LOC"}


def test_answers_by_squads_rules():
    rows = [
        {"context": "a friend went to the house", "question": "who went", "answer": Answers(("a friend",), (0,))},
        {
            "context": "b c d in the house of a friend " * 3,
            "question": "where",
            "answer": Answers(("the house", "in"), (-1, -1)),
        },
    ]
    _, score = scored("qa", rows, Says(2))
    assert score.answers[1].right == ("the house", "in")
    assert all(answer.given.answer in row["context"] for answer, row in zip(score.answers, rows, strict=True))
    found = full("qa", score)
    own, squad = values(found, OWN), values(found, "SQuAD")
    assert (own["answer_f1"], own["exact_match"]) == (squad["f1"], squad["exact_match"])


@pytest.fixture(scope="module")
def writer(tmp_path_factory):
    folder = tmp_path_factory.mktemp("writer")
    tokenizer_of(folder)
    torch.manual_seed(1)
    sizes = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 24}
    config = LlamaConfig(vocab_size=VOCABULARY, bos_token_id=0, eos_token_id=0, **sizes)
    return load_tokenizer(folder), LlamaForCausalLM(config).eval()


PAIRS = [("What is it?", "It is a file of the module."), ("No", "None of all"), ("A longer one, here", "an object")]


def written(writer, name, most):
    tokenizer, model = writer
    task = kind_of(name)(tokenizer, 64, TaskSpec(name=name, template="{asked} {answer}"))
    units = [task.scored([{"asked": asked, "answer": answer}]) for asked, answer in PAIRS]
    return score_in_full(model, task, units, 2, most)


@pytest.mark.parametrize("name", ["translation", "chat", "summarisation"])
def test_texts_by_the_libraries_on_what_is_written(writer, name):
    sacrebleu, rouge = pytest.importorskip("sacrebleu"), pytest.importorskip("rouge_score.rouge_scorer")
    score = written(writer, name, 8)
    given, right = [answer.given.answer for answer in score.answers], [answer for _, answer in PAIRS]
    assert [answer.right for answer in score.answers] == right
    found = full(name, score)
    mean = np.mean(
        [sacrebleu.sentence_chrf(*pair).score / 100 for pair in zip(given, [[one] for one in right], strict=True)]
    )
    assert values(found, OWN)["answer_chrf"] == pytest.approx(mean)
    assert "nats_per_token" in found["figures"][OWN]
    if name == "summarisation":
        scorer = rouge.RougeScorer(["rougeL"], use_stemmer=True)
        expected = np.mean([scorer.score(one, mine)["rougeL"].fmeasure for one, mine in zip(right, given, strict=True)])
        assert values(found, "rouge-score")["rougeL"] == pytest.approx(expected)
    else:
        assert values(found, "sacrebleu")["chrf"] == pytest.approx(sacrebleu.corpus_chrf(given, [right]).score / 100)
        assert values(found, "sacrebleu")["bleu"] == pytest.approx(
            sacrebleu.corpus_bleu(given, [right], force=True).score / 100
        )


def test_a_model_that_may_write_nothing_has_its_other_figures(writer):
    found = full("translation", written(writer, "translation", None))
    assert found["figures"].keys() == {OWN}
    assert found["figures"][OWN].keys() == {"nats_per_token", "accuracy"}
    assert found["missing"] == []


def test_texts_have_perplexity_and_bits_per_character(writer):
    tokenizer, model = writer
    task = kind_of("causal")(tokenizer, 64, CAUSAL)
    units = [task.scored([{"text": text}]) for text in ("A file.", "Of all modules, this one.", "And a third")]
    score = score_in_full(model, task, units, 2, 5)
    nats = tokens = characters = 0
    for ((record,),) in zip(units):
        ids = torch.tensor([record.ids])
        nats += model(ids, labels=ids).loss.item() * (len(record.ids) - 1)
        tokens, characters = tokens + len(record.ids) - 1, characters + record.characters
    found = values(full("causal", score), OWN)
    assert found["perplexity"] == pytest.approx(math.exp(nats / tokens), rel=1e-4)
    assert found["bits_per_char"] == pytest.approx(nats / math.log(2) / characters, rel=1e-4)
    assert found.keys() == {"bits_per_char", "accuracy", "perplexity"}


# Whatever the task


def test_every_task_says_who_makes_its_figures():
    assert _MADE.keys() == _tasks().keys()


def labelled(units=None, factor=1.0):
    rows = [{"text": text, "label": right} for text, right in zip(TEXTS, RIGHT, strict=True)]
    return scored(
        "classification", rows, OfATextAsAWhole(3, factor), units and [[rows[at] for at in unit] for unit in units]
    )[1]


def test_intervals_are_of_whole_units():
    pytest.importorskip("sklearn")
    alone, in_pairs = labelled(), labelled([(0, 1, 2, 3), (4, 5, 6, 7)])
    for score, units in ((alone, 8), (in_pairs, 2)):
        found = full("classification", score)
        assert (found["records"], found["units"]) == (8, units)
        for figure in found["figures"]["scikit-learn"].values():
            low, high = figure["interval"]
            assert 0 <= low <= high <= 1
    # Of two units every draw is one of three: the interval ends at their own figures.
    halves = [
        np.mean([answer.given.answer == answer.right for answer in in_pairs.answers[part]])
        for part in (slice(4), slice(4, 8))
    ]
    assert full("classification", in_pairs)["figures"][OWN]["accuracy"]["interval"] == pytest.approx(sorted(halves))


def test_scores_of_several_silos_add_up_and_nobody_is_in_two():
    one, other = labelled([(0, 1), (2,)]), labelled([(3,), (4, 5), (6, 7)])
    both = one + other
    assert both.units == (0, 0, 1, 2, 3, 3, 4, 4)
    assert both.answers == one.answers + other.answers == labelled().answers
    np.testing.assert_array_equal(both.rows, labelled().rows)


def test_a_library_that_is_not_installed_is_named_and_our_own_figures_are_there(monkeypatch):
    def not_there(name):
        raise ModuleNotFoundError(name=name)

    monkeypatch.setattr(inputs, "import_module", not_there)
    found = full("classification", labelled())
    assert found["missing"] == [
        "sklearn is not installed, which this metric is made with; pip install 'siloweave[tasks]'"
    ]
    assert found["figures"].keys() == {OWN}
    assert found["figures"][OWN]["accuracy"]["interval"]


def test_what_has_no_figure_or_no_interval_says_so():
    nothing = Score(labelled().measures, np.zeros((0, len(labelled().rows[0]))))
    assert full("classification", nothing) == {"records": 0, "units": 0, "figures": {}, "missing": []}
    one = full("classification", labelled([tuple(range(8))]))
    assert {figure["interval"] for figure in one["figures"][OWN].values()} == {None}
    diverged = full("classification", labelled(factor=math.nan))
    assert diverged["figures"][OWN]["loss"] == {"value": None, "interval": None}
    assert diverged["figures"]["scikit-learn"]["accuracy"]["value"] is not None
    assert "expected_calibration_error" not in diverged["figures"]["scikit-learn"]
    assert diverged["reliability"] == []
