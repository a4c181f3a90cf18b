"""Labels of texts: how records are read, what a model learns of them, and that no record's numbers depend on others."""

import json
import math

import numpy as np
import pytest
import torch
from evaluations import bounds_for
from hypothesis import given
from hypothesis import strategies as st
from per_record import alike_here, assert_equal, clipped, fixed, oracle
from tokenizers.processors import TemplateProcessing
from transformers import BertConfig, BertModel, LlamaConfig, LlamaForCausalLM

from configs.errors import InputError
from configs.schema.data import RecordSettings
from configs.schema.tasks import TaskSpec
from configs.storage.manifests import Manifest, commit_manifest
from federated.evaluation.private_sums import figures, private_sums
from privacy.clipping.clipping import clipping
from privacy.clipping.independence import Together
from privacy.mechanism.streams import Streams
from trainer.data.reading.counts import ReadCounts
from trainer.data.tokenizer import load_tokenizer, train_tokenizer
from trainer.models.adapters import add_adapter, head_names, trainable
from trainer.models.load import Head, load_model, model_class
from trainer.models.recurrent import RecurrentConfig
from trainer.tasks.fields import FieldReader
from trainer.tasks.task import task_of

LABELS = ("negative", "neutral", "positive")
ONE, MANY = (TaskSpec(name=name, labels=LABELS) for name in ("classification", "multilabel"))
MEAN = TaskSpec(name="classification", labels=LABELS, pooling="mean")
TEXTS = ["A fine film.", "It is long, and nothing happens in it at all, twice.", "[CLS] was said </s>", "so so"]
CONTEXT, VOCABULARY = 48, 300
TASKS = {}  # for properties, which take no fixtures


@pytest.fixture(scope="module", params=["encoder", "decoder"])
def folder(request, tmp_path_factory):
    """A small model of random weights, as a run has it."""
    place = tmp_path_factory.mktemp(request.param)
    torch.manual_seed(3)
    sizes = {"hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 24}
    none = {"hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0}
    tokenizer = train_tokenizer(TEXTS * 9, VOCABULARY, place)
    if request.param == "encoder":
        tokenizer.backend_tokenizer.post_processor = TemplateProcessing(
            single="<|endoftext|> $A <|endoftext|>", special_tokens=[("<|endoftext|>", 0)]
        )
        tokenizer.save_pretrained(place)
        model = BertModel(BertConfig(vocab_size=VOCABULARY, max_position_embeddings=64, **sizes, **none))
    else:
        model = LlamaForCausalLM(LlamaConfig(vocab_size=VOCABULARY, max_position_embeddings=64, **sizes))
    model.save_pretrained(place)
    commit_manifest(place, Manifest("model", "", metadata={"context_length": CONTEXT}))
    return place


def wrapped(folder, task):
    return add_adapter(load_model(folder, head=task.head), 4, 8.0, seed=0, head=task.head).train()


def moved(model):
    """Weights such as an adapter has after some training."""
    generator = torch.Generator().manual_seed(5)
    with torch.no_grad():
        for value in trainable(model).values():
            value.add_(0.2 * torch.randn(value.shape, generator=generator))
    return model


def rows(spec):
    given = {"label": lambda number: number % 3, "labels": lambda number: tuple(range(number % 4))}
    field = "labels" if spec is MANY else "label"
    return [{"text": text, field: given[field](number)} for number, text in enumerate(TEXTS)]


@pytest.mark.parametrize("spec", [ONE, MANY, MEAN])
def test_clipped_gradients_are_those_of_single_records(folder, spec):
    task = task_of(spec, folder)
    model = moved(wrapped(folder, task))
    units = list(task.examples(rows(spec)))

    def losses(batch):
        return task.record_losses(model, task.collate(batch))

    assert {name.rsplit(".", 2)[-2] for name in trainable(model) if "lora" not in name} == {"default"}
    assert_equal(clipped(model, losses, [units[:3], units[3:]], 0.3), oracle(model, losses, units, fixed(0.3)))


@pytest.mark.parametrize("spec", [ONE, MANY, MEAN])
def test_records_of_one_shape_are_computed_together_to_the_same_bits(folder, spec):
    task = task_of(spec, folder)
    model = wrapped(folder, task)

    def losses(batch):
        return task.record_losses(model, task.collate(batch))

    with clipping(model, 1.0) as clipper:
        together = Together(clipper, losses, task.shape, task.made_up, 16)
        sizes = [len(part) for part in together.cut(task.made_up(16, 16))]
    assert sizes == [16] or not alike_here(model, losses, task.made_up(16, 16))


def test_a_head_trains_whole_and_starts_alike_everywhere(folder):
    task = task_of(ONE, folder)
    first, second = (load_model(folder, head=task.head) for _ in range(2))
    (name,) = head_names(first)
    assert name in ("classifier", "score")
    assert torch.equal(getattr(first, name).weight, getattr(second, name).weight)
    of_head = [parameter for parameter in trainable(wrapped(folder, task)) if f".{name}." in parameter]
    assert of_head
    assert not any("lora" in parameter for parameter in of_head)


def test_the_mean_is_over_a_texts_own_tokens(folder, tmp_path):
    """By hand, from the body's hidden states; and what is saved is loaded as the same model."""
    task = task_of(MEAN, folder)
    model = load_model(folder, head=task.head)
    (example,) = task.examples([{"text": TEXTS[1], "label": 0}])
    body = getattr(model, model.base_model_prefix)
    with torch.no_grad():
        ids = torch.tensor([example.ids])
        hidden_TD = body(input_ids=ids, attention_mask=torch.ones_like(ids)).last_hidden_state[0]
        found = model(**{name: task.collate([example])[name] for name in ("input_ids", "attention_mask")}).logits[0]
        by_hand = model.classifier(hidden_TD.mean(dim=0))
    np.testing.assert_allclose(found, by_hand, atol=1e-5)
    model.save_pretrained(tmp_path)
    again = load_model(tmp_path)
    assert again.state_dict().keys() == model.state_dict().keys()
    assert all(torch.equal(value, model.state_dict()[name]) for name, value in again.state_dict().items())


def test_a_family_without_a_body_of_transformers_has_no_mean():
    with pytest.raises(InputError, match="no siloweave-recurrent with a head for classification"):
        model_class(RecurrentConfig(), "here", Head("classification", 2, 0, pooling="mean"))


@pytest.mark.parametrize("spec", [ONE, MEAN])
def test_padding_and_neighbours_change_no_answer(folder, spec):
    task = task_of(spec, folder)
    model = wrapped(folder, task).eval()
    examples = task.examples(rows(ONE))
    with torch.no_grad():
        together = task.record_scores(model, examples)
        alone = torch.cat([task.record_scores(model, [example]) for example in examples])
    np.testing.assert_allclose(together, alone, atol=1e-5)


def test_special_tokens_come_from_the_tokenizer_alone(folder):
    task, tokenizer = task_of(ONE, folder), load_tokenizer(folder)
    (example,) = task.examples([{"text": "<|endoftext|> is a word", "label": 0}])
    inner = example.ids[1:-1] if tokenizer.backend_tokenizer.post_processor else example.ids
    assert 0 not in inner
    assert (example.truncated, task.examples([{"text": "word " * 99, "label": 0}])[0].truncated) == (False, True)
    assert len(task.examples([{"text": "word " * 99, "label": 0}])[0].ids) == CONTEXT


def test_a_template_makes_a_text_of_columns(folder):
    spec = TaskSpec(name="classification", labels=LABELS, template="{title}: {{{body}}}")
    task, plain = task_of(spec, folder), task_of(ONE, folder)
    made = task.examples([{"title": "A", "body": "b", "label": 2}])
    assert made == plain.examples([{"text": "A: {b}", "label": 2}])


# How records are read


def read(spec, row, **data):
    reader = FieldReader(RecordSettings(source="x", **data), spec)
    return reader.read({name: row.get(name) for name in reader.columns}, "notes.csv, line 7", ReadCounts())


@pytest.mark.parametrize(
    ("row", "expected"),
    [
        ({"text": "t", "label": "positive"}, 2),
        ({"text": "t", "label": "pos"}, 2),
        ({"text": "t", "label": 1}, 1),
        ({"text": "t", "label": 1.0}, 1),
        ({"text": "t", "label": " negative "}, 0),
    ],
)
def test_a_silos_words_are_mapped_to_the_federations(row, expected):
    assert read(ONE, row, labels={"pos": "positive", "1": "neutral"})["label"] == expected


@pytest.mark.parametrize(
    ("found", "expected"),
    [
        (["negative", "positive"], (0, 2)),
        ("positive, negative", (0, 2)),
        ([], ()),
        (None, ()),
        ("", ()),
        ("neutral", (1,)),
    ],
)
def test_several_labels_come_as_a_list_or_with_commas(found, expected):
    assert read(MANY, {"text": "t", "labels": found})["labels"] == expected


def test_columns_have_the_silos_names():
    data = {"text": "satz", "columns": {"label": "klasse"}}
    assert read(ONE, {"satz": "gut", "klasse": "positive"}, **data) == {"text": "gut", "label": 2}


@pytest.mark.parametrize(
    ("row", "data", "said"),
    [
        ({"text": "t", "label": "good"}, {}, "notes.csv, line 7: column 'label' holds 'good', which is none of the 3"),
        ({"text": "t", "label": "x" * 41}, {}, "holds a text of 41 characters, which is none"),
        ({"text": "t", "label": None}, {}, "the label column 'label' holds nothing"),
        ({"text": "t", "label": ["positive"]}, {}, "holds a value of the type list"),
        ({"text": 7, "label": "positive"}, {}, "the text column 'text' holds a number"),
        (
            {},
            {"columns": {"lable": "y"}},
            "columns.lable: the task 'classification' has no such field; it has text, label",
        ),
        ({}, {"labels": {"pos": "posit"}}, "labels: 'pos' is mapped to 'posit', which is no label of the task"),
    ],
)
def test_what_has_no_place_is_refused_by_name(row, data, said):
    with pytest.raises(InputError) as caught:
        read(ONE, row, **data)
    assert said in str(caught.value)
    assert "\n" not in str(caught.value)


# Private evaluation


class Answers:
    """A model whose logits are given."""

    def __init__(self, logits):
        self.logits = logits

    def __call__(self, **_):
        return self


@given(st.lists(st.floats(width=32), min_size=3, max_size=3), st.integers(0, 7), st.integers(1, 3))
def test_no_unit_moves_the_sums_by_more_than_the_sensitivity(logits, truth, examples):
    for spec in (ONE, MANY):
        task = TASKS[spec.name]
        row = {"text": "a", "label": truth % 3, "labels": tuple(label for label in range(3) if truth >> label & 1)}
        bounds = bounds_for(CONTEXT, spec=spec)
        model = Answers(torch.tensor([logits]))
        unit = task.examples([row] * examples)
        sums = private_sums(model, task, [unit], [], bounds, 1e-12, Streams(bytes(32), "ab" * 32))
        assert np.isfinite(sums).all()
        assert np.linalg.norm(sums) <= bounds.sensitivity + 1e-9


@pytest.fixture(scope="module", autouse=True)
def tasks(folder):
    TASKS.update({spec.name: task_of(spec, folder) for spec in (ONE, MANY)})


def test_figures_are_those_of_a_confusion_matrix_by_hand():
    bounds = bounds_for(CONTEXT, spec=ONE)
    task = TASKS[ONE.name]
    answers, truths = [0, 0, 1, 2, 2, 2, 1, 0], [0, 1, 1, 2, 0, 2, 2, 0]
    sums = np.zeros(bounds.num_sums)
    for answer, truth in zip(answers, truths, strict=True):
        logits = torch.full((1, 3), -20.0)
        logits[0, answer] = 20.0
        unit = task.examples([{"text": "a", "label": truth}])
        sums += private_sums(Answers(logits), task, [unit], [], bounds, 1e-12, Streams(bytes(32), "ab" * 32))
    found = figures([sums], bounds, 1e-12)
    assert found["accuracy"] == pytest.approx(5 / 8)
    f1 = {"negative": 2 * 2 / (2 * 2 + 1 + 1), "neutral": 2 / (2 + 1 + 1), "positive": 2 * 2 / (2 * 2 + 1 + 1)}
    assert {label: one["f1"] for label, one in found["f1_by_label"].items()} == pytest.approx(f1)
    assert found["macro_f1"] == pytest.approx(sum(f1.values()) / 3)
    assert found["loss"] == pytest.approx(3 / 8 * 8.0, rel=1e-3)  # a mistake of 40 nats counts as 8


def test_the_stated_error_covers_what_noise_does():
    """At least 90 of 100 within two standard errors: with this seed, 96."""
    bounds = bounds_for(CONTEXT, spec=ONE)
    exact = np.array([700.0, 120.0, 1000.0, 300, 200, 200, 100, 120, 80, 110, 100, 90])
    true = bounds.measures.figures(exact)
    generator, noise = np.random.default_rng(7), 2.0
    within = 0
    for _ in range(100):
        drawn = exact / bounds.scale + noise * bounds.sensitivity * generator.standard_normal(bounds.num_sums)
        found = figures([drawn], bounds, noise)
        within += all(abs(found[name] - true[name]) <= 2 * found[f"{name}_error"] for name in ("accuracy",))
    assert within >= 90
    assert math.isclose(bounds.sensitivity, math.sqrt(3 + 2))
    assert json.dumps(true)
