"""Explanations: planted cues are found, numbers add up, and a model that has learnt nothing explains nothing."""

import dataclasses
import random

import pytest
import torch
from tokenizers import Tokenizer, models, pre_tokenizers, processors
from transformers import (
    BertConfig,
    BertForSequenceClassification,
    BertForTokenClassification,
    GPT2Config,
    GPT2LMHeadModel,
    PreTrainedTokenizerFast,
    T5Config,
    T5ForConditionalGeneration,
)

from configs.errors import InputError
from configs.schema.tasks import TaskSpec
from trainer.data.tokenizer import train_tokenizer
from trainer.explanation.aims import Aim, aims, logits
from trainer.explanation.attribution import attention_rollout, explain, integrated_gradients
from trainer.models.adapters import add_adapter
from trainer.models.recurrent import RecurrentConfig, RecurrentForCausalLM
from trainer.tasks.classification import ClassificationTask, MultilabelTask
from trainer.tasks.entities import EntitiesTask
from trainer.tasks.qa import AnswersTask
from trainer.tasks.text import CausalTask

CUES = [[f"{kind}{number}" for number in range(4)] for kind in ("bad", "good")]
FILLER = [f"word{number}" for number in range(24)]
WORDS = ["[PAD]", "[CLS]", "[SEP]", "[MASK]", *FILLER, *CUES[0], *CUES[1]]
LABELS = ("negative", "positive", "neutral")  # without a third, a label could be the absence of the other one's cues
SPEC = TaskSpec(name="classification", labels=LABELS)
SIZES = {"vocab_size": len(WORDS), "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2}
NONE = {"hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0}


@pytest.fixture(scope="module")
def tokenizer():
    own = Tokenizer(models.WordLevel({word: place for place, word in enumerate(WORDS)}, unk_token="[PAD]"))
    own.pre_tokenizer = pre_tokenizers.Whitespace()
    ends = {"single": "[CLS] $A [SEP]", "special_tokens": [("[CLS]", 1), ("[SEP]", 2)]}
    own.post_processor = processors.TemplateProcessing(**ends)
    named = {f"{name}_token": f"[{name.upper()}]" for name in ("pad", "cls", "sep", "mask")}
    return PreTrainedTokenizerFast(tokenizer_object=own, **named)


def bert(kind, seed, labels=3):
    torch.manual_seed(seed)
    config = BertConfig(**SIZES, **NONE, intermediate_size=48, max_position_embeddings=24, num_labels=labels)
    return kind(config).eval()


def planted(draw, label):
    """Ten words of which one decides, and where it stands; nothing stands for the third label."""
    words, place = draw.choices(FILLER, k=10), draw.randrange(10)
    if label < len(CUES):
        words[place] = draw.choice(CUES[label])
    return " ".join(words), place


@pytest.fixture(scope="module")
def learnt(tokenizer):
    """A classifier that has found out what the cues are, in a second or two."""
    draw, task = random.Random(2), ClassificationTask(tokenizer, 24, SPEC)
    model = bert(BertForSequenceClassification, 0)
    optimizer = torch.optim.Adam(model.parameters(), lr=5e-3)
    for _ in range(300):
        rows = [{"text": planted(draw, number % 3)[0], "label": number % 3} for number in range(33)]
        loss = task.record_losses(model, task.collate(task.examples(rows))).mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    assert loss < 0.05
    return model


def area(scores, place):
    """Of the curve of true against false positives, where one word alone is what is looked for."""
    others = [score for number, score in enumerate(scores) if number != place]
    return sum((scores[place] > other) + (scores[place] == other) / 2 for other in others) / len(others)


def mean_area(model, tokenizer, of, texts=20):
    draw, task = random.Random(5), ClassificationTask(tokenizer, 24, SPEC)
    areas = []
    for number in range(texts):
        text, place = planted(draw, number % 2)
        (found,) = explain(task, tokenizer, model, text)
        assert [piece.text.strip() for piece in found.pieces] == ["[CLS]", *text.split(), "[SEP]"]
        areas.append(area([of(piece) for piece in found.pieces[1:-1]], place))
    return sum(areas) / len(areas)


def test_a_planted_cue_is_what_speaks_for_the_answer(learnt, tokenizer):
    """Adebayo et al. 2018: and not where the model has learnt nothing."""
    assert mean_area(learnt, tokenizer, lambda piece: piece.gradients) >= 0.9
    for of in (lambda piece: piece.gradients, lambda piece: piece.attention):
        found = [mean_area(bert(BertForSequenceClassification, seed), tokenizer, of, 6) for seed in range(20, 28)]
        assert 0.4 <= sum(found) / len(found) <= 0.6


def test_pieces_add_up_to_what_the_text_makes_of_the_answer(learnt, tokenizer):
    (found,) = explain(ClassificationTask(tokenizer, 24, SPEC), tokenizer, learnt, "word1 good2 word3")
    assert found.answer == "positive"
    total = sum(piece.gradients for piece in found.pieces)
    assert found.nats - found.without == pytest.approx(total + found.unexplained)
    assert abs(found.unexplained) < 0.02 * (found.nats - found.without)
    ids = torch.tensor([[1, *map(WORDS.index, ("word1", "good2", "word3")), 2]])
    probability = logits(learnt, ids).detach().softmax(1)[0, 1]
    assert found.nats == pytest.approx(float(torch.logit(probability.double())), rel=1e-3)
    assert sum(piece.attention for piece in found.pieces) == pytest.approx(1)


def test_integrated_gradients_are_the_integral(tokenizer):
    """By hand: gradients at the midpoints of four times as many steps, between the two texts' embeddings."""
    model = bert(BertForSequenceClassification, 3)
    ids, baseline = (1, 7, 9, 30, 2), (1, 3, 3, 3, 2)
    (aim,) = aims(ClassificationTask(tokenizer, 24, SPEC), tokenizer, model, "word3 word5 bad2", 1)
    assert aim.ids == ids
    table, steps = model.get_input_embeddings().weight.detach(), 256
    start, end = table[list(baseline)], table[list(ids)]
    total = torch.zeros_like(start)
    for step in range(steps):
        at = (start + (step + 0.5) / steps * (end - start)).unsqueeze(0).requires_grad_()
        aim.value(model(inputs_embeds=at, attention_mask=torch.ones(1, 5)).logits).sum().backward()
        total += at.grad[0] / steps
    wanted = ((end - start) * total).sum(dim=1).double()
    torch.testing.assert_close(integrated_gradients(model, aim, baseline), wanted, rtol=1e-3, atol=1e-5)


def test_rollout_is_the_product_of_the_layers(tokenizer):
    model = bert(BertForSequenceClassification, 4)
    (aim,) = aims(ClassificationTask(tokenizer, 24, SPEC), tokenizer, model, "word3 word5 bad2", 1)
    before = model.config._attn_implementation
    found = attention_rollout(model, aim)
    assert model.config._attn_implementation == before
    model.set_attn_implementation("eager")
    first, second = model(torch.tensor([aim.ids]), output_attentions=True).attentions
    half = [(layer[0].mean(0).double() + torch.eye(5)) / 2 for layer in (first, second)]
    torch.testing.assert_close(found, (half[1] @ half[0])[0].detach(), check_dtype=False)
    mean = dataclasses.replace(aim, places=(0, 1, 2, 3, 4))
    torch.testing.assert_close(attention_rollout(model, mean), (half[1] @ half[0]).mean(0).detach(), check_dtype=False)


def test_each_chosen_label_and_each_entity_is_explained_by_itself(tokenizer):
    many = TaskSpec(name="multilabel", labels=("a", "b", "c"))
    model = bert(BertForSequenceClassification, 6, labels=3)
    with torch.no_grad():
        model.classifier.bias.copy_(torch.tensor([9.0, -9.0, 9.0]))
    assert [one.answer for one in explain(MultilabelTask(tokenizer, 24, many), tokenizer, model, "word1")] == ["a", "c"]
    with torch.no_grad():
        model.classifier.bias.copy_(torch.tensor([-9.0, -5.0, -9.0]))
    assert [one.answer for one in explain(MultilabelTask(tokenizer, 24, many), tokenizer, model, "word1")] == ["b"]

    tags = TaskSpec(name="entities", labels=("O", "B-PER", "I-PER"))
    tagger = bert(BertForTokenClassification, 7, labels=3)
    with torch.no_grad():
        tagger.classifier.bias.copy_(torch.tensor([0.0, 9.0, 0.0]))
    found = explain(EntitiesTask(tokenizer, 24, tags), tokenizer, tagger, "word1 good2")
    assert [one.answer for one in found] == ["word1: B-PER", "good2: B-PER"]
    with torch.no_grad():
        tagger.classifier.bias.copy_(torch.tensor([9.0, 0.0, 0.0]))
    assert explain(EntitiesTask(tokenizer, 24, tags), tokenizer, tagger, "word1 good2") == []


@pytest.fixture(scope="module")
def writes(tmp_path_factory):
    """A tokenizer of bytes, and small models that write."""
    own = train_tokenizer(["Once upon a time \N{SNOWMAN} there was"] * 9, 280, tmp_path_factory.mktemp("tokenizer"))
    torch.manual_seed(8)
    sizes = {"vocab_size": 280, "n_embd": 16, "n_layer": 2, "n_head": 2, "n_positions": 64}
    return own, CausalTask(own, 64), GPT2LMHeadModel(GPT2Config(**sizes, bos_token_id=0, eos_token_id=0)).eval()


@pytest.mark.parametrize("adapted", [False, True])
def test_what_a_model_writes_is_explained_by_what_it_has_read(adapted, writes):
    tokenizer, task, model = writes
    if adapted:
        model = add_adapter(GPT2LMHeadModel(model.config), 2, 4.0, seed=0).eval()
    (found,) = explain(task, tokenizer, model, "a \N{SNOWMAN}\N{SNOWMAN} time", tokens=3)
    shown = "".join(piece.text for piece in found.pieces)
    assert shown.endswith("a \N{SNOWMAN}\N{SNOWMAN} time"), "a character of several tokens is one piece"
    (aim,) = aims(task, tokenizer, model, found.text, 3)
    total = 0.0
    for end in range(aim.explained, len(aim.ids)):
        total += float(logits(model, torch.tensor([aim.ids[:end]]))[0, -1].detach().log_softmax(0)[aim.ids[end]])
    assert found.nats == pytest.approx(total, rel=1e-4)
    assert sum(piece.attention for piece in found.pieces) == pytest.approx(1)


def test_a_model_without_attention_has_gradients_alone(writes):
    tokenizer, task, _ = writes
    torch.manual_seed(9)
    config = RecurrentConfig(vocab_size=280, hidden_size=16, num_hidden_layers=1)
    (found,) = explain(task, tokenizer, RecurrentForCausalLM(config).eval(), "Once", tokens=2)
    assert {piece.attention for piece in found.pieces} == {None}
    assert abs(found.unexplained) < 0.1 * abs(found.nats - found.without) + 1e-3


def test_what_cannot_be_explained_is_said(tokenizer, writes, learnt):
    both = T5Config(vocab_size=40, d_model=16, d_kv=8, d_ff=16, num_layers=1, num_heads=2)
    with pytest.raises(InputError, match="an encoder-decoder reads its text"):
        explain(writes[1], tokenizer, T5ForConditionalGeneration(both).eval(), "word1")
    with pytest.raises(InputError, match="the text is empty"):
        explain(ClassificationTask(tokenizer, 24, SPEC), tokenizer, learnt, "  ")
    qa = AnswersTask(tokenizer, 24, TaskSpec(name="qa"))
    with pytest.raises(InputError, match="the task 'qa' can't be explained"):
        explain(qa, tokenizer, learnt, "word1")
    assert isinstance(aims(ClassificationTask(tokenizer, 24, SPEC), tokenizer, learnt, "word1", 1)[0], Aim)
