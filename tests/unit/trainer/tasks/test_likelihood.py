"""Labels without a head: a decoder answers with the one that it holds likeliest after the text."""

import json

import numpy as np
import pytest
import torch
from evaluations import bounds_for
from hypothesis import given, settings
from hypothesis import strategies as st
from per_record import assert_equal, clipped, fixed, length, one_by_one, oracle
from transformers import BertConfig, BertForMaskedLM, LlamaConfig, LlamaForCausalLM, T5Config

from configs.errors import InputError
from configs.schema.federated import FederatedSettings
from configs.schema.silo import SiloPolicy
from configs.schema.tasks import TaskSpec
from configs.storage.manifests import MANIFEST, Manifest, commit_manifest
from federated.evaluation.private_sums import private_sums
from privacy.clipping.clipping import clipping
from privacy.clipping.independence import Together
from privacy.mechanism.streams import Streams
from trainer.data.tokenizer import load_tokenizer, train_tokenizer
from trainer.models.adapters import Adaptation, adapted, trainable
from trainer.models.load import load_model
from trainer.scoring.score import score
from trainer.tasks.likelihood import LikelihoodTask
from trainer.tasks.task import IGNORED, WritingTask, task_of

LABELS = ("good", "not good", "good indeed, for all that it is worth")  # one begins with another one's tokens
TEXTS = ["A fine film.", "It is long, and nothing happens.", "It says <|endoftext|> good", "so so"]
ROWS = [{"text": text, "label": number % 3} for number, text in enumerate(TEXTS)]
CONTEXT, VOCABULARY = 48, 300


def spec(**changes):
    return TaskSpec(**{"name": "classification", "labels": LABELS, "pooling": "likelihood", **changes})


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A small decoder of random weights, with biases, as a run has it."""
    place = tmp_path_factory.mktemp("model")
    train_tokenizer([*TEXTS, *LABELS] * 9, VOCABULARY, place)
    torch.manual_seed(3)
    sizes = {"hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 24}
    config = LlamaConfig(vocab_size=VOCABULARY, max_position_embeddings=64, attention_bias=True, **sizes)
    LlamaForCausalLM(config).save_pretrained(place)
    commit_manifest(place, Manifest("model", "", metadata={"context_length": CONTEXT}))
    return place


@pytest.fixture(scope="module")
def tokenizer(folder):
    return load_tokenizer(folder)


@pytest.fixture(scope="module")
def task(folder):
    return task_of(spec(), folder)


def losses_of(task, model):
    return lambda examples: task.record_losses(model, task.collate(examples))


def whole(tokenizer, row, label):
    """A text with a label, by the tokenizer alone: its tokens, and how many stand before the label."""
    before, end = f"{row['text']}\n\n", tokenizer.eos_token_id
    plain = {"add_special_tokens": False, "split_special_tokens": True}
    ids, asked = tokenizer.encode(before + LABELS[label], **plain), tokenizer.encode(before, **plain)
    return [end, *ids, end], 1 + len(asked)


# What is read and learnt


def test_the_right_label_and_its_end_are_learnt(task, tokenizer):
    for row, example in zip(ROWS, task.examples(ROWS), strict=True):
        ids, asked = whole(tokenizer, row, row["label"])
        assert example.ids == tuple(ids)
        assert example.target == (*[IGNORED] * asked, *ids[asked:])
        assert not example.truncated
    assert isinstance(task, LikelihoodTask)
    assert task.head is None


@pytest.mark.parametrize(
    ("template", "expected"),
    [
        ("Review: {text}\nMood:", "Review: so so\nMood: good"),
        ("Review: {text}\nMood: ", "Review: so so\nMood: good"),
        ("{{{text}}} is{label}!", "{so so} isgood!"),
        ("{text} {label}", "so so good"),
    ],
)
def test_a_template_says_where_the_label_stands(folder, tokenizer, template, expected):
    made = task_of(spec(template=template), folder)
    (example,) = made.examples([{"text": "so so", "label": 0}])
    assert tokenizer.decode(example.ids) == f"<|endoftext|>{expected}<|endoftext|>"
    learnt = tokenizer.decode([token for token in example.target if token != IGNORED])
    assert learnt.strip(" ") == expected[expected.index("good") :] + "<|endoftext|>"


def test_words_are_text_whatever_they_spell(task, tokenizer):
    example = task.examples(ROWS)[2]
    assert example.ids.count(tokenizer.eos_token_id) == 2


def test_a_text_too_long_is_cut_before_the_templates_last_words(folder, tokenizer):
    """And the label changes nothing of what is read before it."""
    made = task_of(spec(template="{title}: {text}\nMood:"), folder)
    for title, text in (("T", "word " * 99), ("é" * 99, "x"), ("<|endoftext|>" * 30, "word")):
        rows = [{"title": title, "text": text, "label": label} for label in range(3)]
        examples, choices = made.examples(rows), made.scored(rows)
        for label, example in enumerate(examples):
            assert example.truncated and len(example.ids) <= CONTEXT
            assert tokenizer.decode(example.ids).endswith(f"\nMood: {LABELS[label]}<|endoftext|>")
            assert choices[0].ended(label).ids == example.ids
        assert len({example.ids[: example.target.count(IGNORED)] for example in examples}) == 1
        assert max(len(example.ids) for example in examples) >= CONTEXT - 3  # no more is cut than need be


def test_choices_differ_from_the_first_token_on_that_labels_do(task):
    for row, choice in zip(ROWS, task.scored(ROWS), strict=True):
        assert choice.target == (row["label"],)
        assert len({ending[0] for ending in choice.endings}) > 1
        assert len(set(choice.endings)) == 3


# Losses, gradients, answers


@pytest.mark.parametrize("train", ["lora", "full", "bitfit"])
def test_clipped_gradients_are_those_of_single_records(folder, task, train):
    model = adapted(load_model(folder), Adaptation(3, 6.0, train), seed=0).train()
    with torch.no_grad():
        for name, parameter in trainable(model).items():
            parameter.add_(0.1 * torch.randn(parameter.shape, generator=torch.Generator().manual_seed(len(name))))
    examples, losses = task.examples(ROWS), losses_of(task, model)
    assert len({sum(token != IGNORED for token in example.target) for example in examples}) == 3
    norm = torch.stack([length(found) for found in one_by_one(model, losses, examples)]).median().item()
    found = clipped(model, losses, [examples[:3], examples[3:]], norm)
    assert_equal(found, oracle(model, losses, examples, fixed(norm)), tolerance=3e-4)


def test_the_loss_is_nats_per_token_of_the_right_label(folder, task):
    model = load_model(folder)
    for example in task.examples(ROWS):
        expected = model(input_ids=torch.tensor([example.ids]), labels=torch.tensor([example.target])).loss
        torch.testing.assert_close(losses_of(task, model)([example])[0], expected, rtol=1e-5, atol=1e-6)


def test_records_of_one_shape_are_computed_together_to_the_same_bits(folder, task):
    model = adapted(load_model(folder), Adaptation(3, 6.0), seed=0).train()
    with clipping(model, 1.0) as clipper:
        together = Together(clipper, losses_of(task, model), task.shape, task.made_up, 16)
        assert [len(part) for part in together.cut(task.made_up(16, 16))] == [16]


def test_the_answer_is_the_likeliest_of_whole_texts(folder, task, tokenizer):
    """By transformers alone, over all tokens: what labels share adds the same to each."""
    model = load_model(folder)
    with torch.no_grad():
        for value in model.parameters():  # so that labels differ by far more than rounding
            value.mul_(4)
        found = task.label_nats(model, task.scored(ROWS))
        for row, nats_L in zip(ROWS, found, strict=True):
            by_hand = []
            for label in range(3):
                ids = torch.tensor([whole(tokenizer, row, label)[0]])
                by_hand.append(model(input_ids=ids, labels=ids).loss * (ids.numel() - 1))
            expected_L = torch.stack(by_hand)
            torch.testing.assert_close(nats_L - nats_L[0], expected_L - expected_L[0], rtol=1e-4, atol=1e-4)
    scores = task.record_scores(model, task.scored(ROWS))
    chosen = [int(nats_L.argmin()) for nats_L in found]
    assert scores[:, 0].tolist() == [float(row["label"] == answer) for row, answer in zip(ROWS, chosen, strict=True)]
    answered = scores[:, 3:6] + scores[:, 6:9]  # true and false positives
    assert answered.argmax(dim=1).tolist() == chosen


def test_padding_and_neighbours_change_no_answer(folder, task):
    model, choices = load_model(folder), task.scored(ROWS)
    with torch.no_grad():
        together = task.record_scores(model, choices)
        alone = torch.cat([task.record_scores(model, [choice]) for choice in choices])
    np.testing.assert_allclose(together, alone, atol=1e-5)


def test_what_was_learnt_is_answered_also_where_one_label_begins_with_another(folder, task):
    model = adapted(load_model(folder), Adaptation(3, 6.0, "full"), seed=0)
    rows = [{"text": text, "label": label} for label, text in enumerate(TEXTS[:3])]
    examples, optimizer = task.examples(rows), torch.optim.Adam(model.parameters(), 1e-2)
    for _ in range(60):
        optimizer.zero_grad()
        losses_of(task, model)(examples).sum().backward()
        optimizer.step()
    found = score(model.eval(), task, task.scored(rows), 2).figures
    assert found["accuracy"] == found["macro_f1"] == 1.0
    assert found["loss"] < 0.1
    assert isinstance(task, WritingTask)
    assert json.dumps(found)


# Private evaluation


class Says:
    """A model that says the same of each token of every text."""

    def __init__(self, logits_V):
        self._logits_V = logits_V

    def __call__(self, input_ids):
        self.logits = self._logits_V.expand(*input_ids.shape, len(self._logits_V))
        return self


TASKS = {}  # for a property, which takes no fixtures


@pytest.fixture(scope="module", autouse=True)
def tasks(task):
    TASKS[task.name] = task


@settings(max_examples=50)
@given(st.lists(st.floats(width=32), min_size=5, max_size=5), st.integers(0, 2), st.integers(1, 3))
def test_no_unit_moves_the_sums_by_more_than_the_sensitivity(logits, truth, examples):
    task, bounds = TASKS["classification"], bounds_for(CONTEXT, spec=spec())
    unit = task.scored([{"text": "a", "label": truth}] * examples)
    model = Says(torch.tensor(logits * (VOCABULARY // 5)))
    sums = private_sums(model, task, [unit], [], bounds, 1e-12, Streams(bytes(32), "ab" * 32))
    assert np.isfinite(sums).all()
    assert np.linalg.norm(sums) <= bounds.sensitivity + 1e-9
    assert bounds.measures == task.measures


# Refusals


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"labels": ("good", "ÿ" * 60)}, r"^labels: 'ÿÿÿ.*' takes \d+ tokens with the template's last words"),
        ({"template": "{text} " + "and so on " * 40}, "context has 48; give a shorter one, or a longer context"),
    ],
)
def test_labels_that_no_context_holds_are_refused(folder, changes, said):
    with pytest.raises(InputError, match=said) as refused:
        task_of(spec(**changes), folder)
    assert "\n" not in str(refused.value)


def test_labels_of_the_same_tokens_are_refused(folder):
    from tokenizers.normalizers import Lowercase

    blind = load_tokenizer(folder)
    blind.backend_tokenizer.normalizer = Lowercase()
    with pytest.raises(InputError, match="'Good' and 'good' are the same tokens to the model; give others"):
        LikelihoodTask(blind, CONTEXT, spec(labels=("good", "Good")))


@pytest.mark.parametrize("other", ["encoder", "encoder-decoder"])
def test_a_model_that_does_not_go_on_with_a_text_is_refused(folder, tmp_path, other):
    sizes = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 24}
    if other == "encoder":
        BertForMaskedLM(BertConfig(vocab_size=VOCABULARY, **sizes)).save_pretrained(tmp_path)
    else:
        T5Config(architectures=["T5ForConditionalGeneration"]).save_pretrained(tmp_path)
    load_tokenizer(folder).save_pretrained(tmp_path)
    (tmp_path / MANIFEST).write_text((folder / MANIFEST).read_text())
    with pytest.raises(InputError, match=r"^pooling is 'likelihood': the base model is a (BertFor|T5For)\w+, which"):
        task_of(spec(), tmp_path)


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"train": "head"}, "federated.train is 'head': with federated.pooling 'likelihood' there is no head"),
        ({"task": "multilabel"}, "federated.pooling is 'likelihood': it finds one label"),
        ({"task": "qa", "labels": ()}, "federated.pooling is 'likelihood': the task 'qa' has no use for it"),
        ({"template": "{label}: {text}"}, "federated.template is '{label}: {text}': it would tell the label"),
        ({"template": "{text} {label} {label}"}, "it would tell the label that is asked for; leave {label} out"),
        ({"template": "is it {label}"}, "it names no field by which that could be told"),
        ({"template": "{text} {label}", "pooling": "model"}, "it would tell the label that is asked for"),
    ],
)
def test_settings_that_do_not_fit_are_refused(changes, said):
    given = {"task": "classification", "labels": LABELS, "pooling": "likelihood", **changes}
    with pytest.raises(ValueError) as refused:
        FederatedSettings(**given)
    assert said in str(refused.value)


def test_factors_of_a_product_may_train_since_there_is_no_head():
    given = {"labels": LABELS, "pooling": "likelihood"}
    assert FederatedSettings(task="classification", adapters="product", **given).task_spec.in_words
    assert SiloPolicy(tasks=("classification",), budget_epsilon=1, budget_delta=1e-5, **given).task_spec == spec()
