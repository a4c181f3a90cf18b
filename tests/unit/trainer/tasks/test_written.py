"""Tasks whose answer is text: what is learnt of an example, its gradient, its measures, and what a model writes."""

import math

import pytest
import torch
from chat_templates import VOCABULARY, tokenizer_of
from per_record import alike_here, assert_equal, clipped, fixed, length, one_by_one, oracle
from torch.nn import functional
from transformers import AutoModelForCausalLM, AutoModelForSeq2SeqLM, LlamaConfig, T5Config

from configs.schema.tasks import TaskSpec
from configs.storage.manifests import Manifest, commit_manifest
from privacy.clipping.clipping import clipping
from privacy.clipping.independence import Together
from trainer.metrics.chrf import chrf
from trainer.models.adapters import add_adapter, trainable
from trainer.scoring.score import score
from trainer.tasks.chat import ChatTask
from trainer.tasks.task import IGNORED, WritingTask, task_of
from trainer.tasks.text_to_text import EncoderDecoderTask, SummarisationTask, TranslationTask

CONTEXT = 48
SPEC = TaskSpec(name="translation")
PAIRS = [
    {"source": "What is a module?", "target": "Une file."},
    {"source": "Yes", "target": "Oui, et non"},
    {"source": "A file that holds <|endoftext|> words " * 3, "target": "x <|endoftext|> y"},
]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("model")
    tokenizer_of(folder)
    commit_manifest(folder, Manifest("model", "", metadata={"context_length": CONTEXT}))
    return folder


@pytest.fixture(scope="module")
def tokenizer(folder):
    from trainer.data.tokenizer import load_tokenizer

    return load_tokenizer(folder)


def llama():
    torch.manual_seed(1)
    config = LlamaConfig(
        vocab_size=VOCABULARY, hidden_size=16, num_hidden_layers=2, num_attention_heads=2, intermediate_size=24,
        bos_token_id=0, eos_token_id=0,
    )  # fmt: skip
    return AutoModelForCausalLM.from_config(config, attn_implementation="eager")


def t5():
    torch.manual_seed(1)
    config = T5Config(
        vocab_size=VOCABULARY, d_model=16, d_kv=8, d_ff=24, num_layers=2, num_heads=2, dropout_rate=0.0,
        decoder_start_token_id=0, pad_token_id=0, eos_token_id=0,
    )  # fmt: skip
    return AutoModelForSeq2SeqLM.from_config(config, attn_implementation="eager")


def adapted(model):
    model = add_adapter(model, rank=3, alpha=6.0, seed=0).train()
    with torch.no_grad():
        for name, parameter in trainable(model).items():
            if "lora_B" in name:  # zero at the start, and with it A's gradient: make both matter
                parameter.normal_(std=0.1, generator=torch.Generator().manual_seed(len(name)))
    return model


KINDS = {
    "chat, decoder": (lambda tokenizer: ChatTask(tokenizer, CONTEXT, TaskSpec(name="chat")), llama),
    "translation, decoder": (lambda tokenizer: TranslationTask(tokenizer, CONTEXT, SPEC), llama),
    "translation, encoder-decoder": (
        lambda tokenizer: TranslationTask.with_encoder(tokenizer, CONTEXT, SPEC),
        t5,
    ),
}


@pytest.fixture(params=KINDS)
def case(request, tokenizer):
    make, model = KINDS[request.param]
    return make(tokenizer), adapted(model())


def examples_of(task):
    if isinstance(task, ChatTask):
        return task.examples([{"messages": ((1, pair["source"][:9]), (2, pair["target"]))} for pair in PAIRS])
    return task.examples(PAIRS)


def losses_of(task, model):
    return lambda examples: task.record_losses(model, task.collate(examples))


# Tokens


def learnt(tokenizer, example):
    return tokenizer.decode([token for token in example.target if token != IGNORED])


def test_a_decoder_learns_the_answer_and_its_end(tokenizer):
    task = SummarisationTask(tokenizer, CONTEXT, TaskSpec(name="summarisation"))
    assert list(task.fields(TaskSpec(name="summarisation"))) == ["document", "summary"]
    (example,) = task.examples([{"document": "A long {text}. ", "summary": "Short."}])
    assert tokenizer.decode(example.ids) == "<|endoftext|>A long {text}. \n\nShort.<|endoftext|>"
    assert learnt(tokenizer, example) == "Short.<|endoftext|>"
    assert len(example.ids) == len(example.target)


def test_a_template_names_the_fields_and_its_last_one_is_the_answer(tokenizer):
    spec = TaskSpec(name="translation", template="{{{topic}}} {en}\nGerman: {de} ##")
    task = TranslationTask(tokenizer, CONTEXT, spec)
    assert list(task.fields(spec)) == ["topic", "en", "de"]
    (example,) = task.examples([{"topic": "t", "en": "One", "de": "Eins"}])
    assert tokenizer.decode(example.ids) == "<|endoftext|>{t} One\nGerman: Eins ##<|endoftext|>"
    assert learnt(tokenizer, example) == " Eins ##<|endoftext|>"  # the space goes with the word
    assert tokenizer.decode(task.opening("One").ids) == "<|endoftext|>{One} \nGerman:"


def test_words_are_text_whatever_they_spell(tokenizer):
    for task in (TranslationTask(tokenizer, 200, SPEC), TranslationTask.with_encoder(tokenizer, 200, SPEC)):
        example = task.examples(PAIRS)[2]
        end = tokenizer.eos_token_id
        wanted = [token for token in example.target if token != IGNORED]
        assert wanted.count(end) == 1 == [*wanted].index(end) - len(wanted) + 2
        assert end not in example.ids[1:-1]


def test_an_encoder_decoder_reads_the_one_and_learns_the_other(tokenizer):
    task = TranslationTask.with_encoder(tokenizer, CONTEXT, SPEC)
    short, _, long = task.examples(PAIRS)
    assert tokenizer.decode(short.ids) == "What is a module?<|endoftext|>"
    assert tokenizer.decode(short.target) == "Une file.<|endoftext|>"
    assert (len(long.ids), long.ids[-1], long.truncated) == (CONTEXT, tokenizer.eos_token_id, True)
    assert task.shape(short) == (16 * -(-len(short.ids) // 16), 16 * -(-len(short.target) // 16))
    prefix = TaskSpec(name="translation", template="to French: {source} {target}")
    (example,) = TranslationTask.with_encoder(tokenizer, CONTEXT, prefix).examples(PAIRS[:1])
    assert tokenizer.decode(example.ids) == "to French: What is a module?<|endoftext|>"
    assert tokenizer.decode(example.target) == "Une file.<|endoftext|>"


def test_worked_examples_stand_before_what_is_asked(tokenizer):
    shown, asked = [PAIRS[1]], [PAIRS[0]]
    task = TranslationTask(tokenizer, 200, SPEC)
    (example,) = task.with_shots(shown).examples(asked)
    text = "<|endoftext|>Yes\n\nOui, et non\n\nWhat is a module?\n\nUne file.<|endoftext|>"
    assert (tokenizer.decode(example.ids), learnt(tokenizer, example)) == (text, "Une file.<|endoftext|>")
    assert not example.truncated
    both = TranslationTask.with_encoder(tokenizer, 200, SPEC)
    (example,), (alone,) = both.with_shots(shown).examples(asked), both.examples(asked)
    assert tokenizer.decode(example.ids) == "Yes\n\nOui, et non\n\nWhat is a module?<|endoftext|>"
    assert example.target == alone.target
    assert both.with_shots([{"source": "a " * 300, "target": "b"}]).examples(asked)[0].truncated


def test_an_answer_too_long_is_cut_and_one_without_room_is_left_out(tokenizer):
    task = TranslationTask(tokenizer, CONTEXT, SPEC)
    assert len(task.examples(PAIRS)) == 2  # the third source fills the context
    (cut,) = task.examples([{"source": "a", "target": "b " * 99}])
    assert (len(cut.ids), cut.truncated) == (CONTEXT, True)
    assert tokenizer.eos_token_id not in cut.target  # an answer that was cut does not end there


def test_the_model_decides_whether_an_encoder_reads(folder, tokenizer):
    llama().config.save_pretrained(folder)
    assert type(task_of(SPEC, folder)) is TranslationTask
    t5().config.save_pretrained(folder)
    assert isinstance(task_of(SPEC, folder), EncoderDecoderTask)
    assert isinstance(task_of(SPEC, folder), WritingTask)


# Losses and gradients


def test_losses_are_those_of_transformers(case):
    task, model = case
    for example in examples_of(task):
        if isinstance(task, EncoderDecoderTask):
            ids, labels = (torch.tensor([row]) for row in (example.ids, example.target))
            expected = model(input_ids=ids, labels=labels).loss
        else:
            expected = model(input_ids=torch.tensor([example.ids]), labels=torch.tensor([example.target])).loss
        torch.testing.assert_close(losses_of(task, model)([example])[0], expected, rtol=1e-5, atol=1e-6)


def test_neighbours_and_padding_change_nothing(case):
    task, model = case
    examples = examples_of(task)
    alone = torch.cat([losses_of(task, model)([example]) for example in examples])
    torch.testing.assert_close(losses_of(task, model)(examples), alone, rtol=1e-5, atol=1e-6)


def test_private_gradients_are_those_of_single_records(case):
    task, model = case
    examples, losses = examples_of(task), losses_of(task, model)
    norm = torch.stack([length(found) for found in one_by_one(model, losses, examples)]).median().item()
    found = clipped(model, losses, [examples[:1], examples[1:]], norm)
    assert_equal(found, oracle(model, losses, examples, fixed(norm)), tolerance=3e-4)


def test_records_of_one_shape_are_computed_together_where_that_is_proved(case):
    task, model = case
    examples = task.made_up(task.shape(examples_of(task)[0]), 4)
    with clipping(model, 1.0) as clipper:
        parts = list(Together(clipper, losses_of(task, model), task.shape, task.made_up, 4).cut(examples))
    assert [len(part) for part in parts] == [4] or not alike_here(model, losses_of(task, model), examples)


def test_made_up_examples_have_the_shape_that_is_asked_for(case):
    task, _ = case
    shapes = {task.shape(example) for example in task.synthetic()}
    assert len(shapes) > 1
    for shape in shapes:
        made = task.made_up(shape, 5)
        assert {task.shape(example) for example in made} == {shape}
        assert len({example.ids for example in made}) == 5
        assert all(any(token != IGNORED for token in example.target[-1:]) for example in made)


# Measures and answers


def test_measures_by_hand(tokenizer):
    task, model = TranslationTask(tokenizer, CONTEXT, SPEC), llama().eval()
    examples = examples_of(task)
    nats, shares = [], []
    for example in examples:
        logits = model(input_ids=torch.tensor([example.ids])).logits[0]
        places = [place for place, token in enumerate(example.target) if token != IGNORED]
        wanted = torch.tensor([example.ids[place] for place in places])
        before = logits[[place - 1 for place in places]]
        nats.append(functional.cross_entropy(before, wanted).item())
        shares.append((before.argmax(dim=1) == wanted).double().mean().item())
    found = score(model, task, examples, 2).figures
    assert math.isclose(found["nats_per_token"], sum(nats) / len(nats), rel_tol=1e-5)
    assert math.isclose(found["accuracy"], sum(shares) / len(shares), rel_tol=1e-5)
    assert task.measures.main == "nats_per_token"
    assert task.measures.lower_is_better


def test_a_model_that_has_learnt_its_answers_writes_them(case):
    task, model = case
    model.get_base_model().requires_grad_(True)
    examples = examples_of(task)[:2]
    optimizer = torch.optim.Adam(model.parameters(), 1e-2)
    for _ in range(150):
        optimizer.zero_grad()
        losses_of(task, model)(examples).sum().backward()
        optimizer.step()
    references = [pair["target"] for pair in PAIRS[:2]]
    assert task.references(examples) == references
    assert [found.answer for found in task.predictions(model.eval(), examples, CONTEXT)] == references
    assert task.overlaps(model, examples, CONTEXT) == [1.0, 1.0]  # what it writes on after their end doesn't count
    assert task.measures.figures(task.record_scores(model, examples).sum(dim=0).detach().numpy())["accuracy"] == 1.0


def test_what_is_written_has_its_cap_and_ends_where_the_model_ends_it(case):
    task, model = case
    # What models bring along: it would search, wait, or stop by the clock.
    brought = {"num_beams": 3, "num_return_sequences": 2, "min_length": 40, "max_time": 1e-9, "stop_strings": ["e"]}
    model.get_base_model().generation_config.update(**brought, temperature=None)
    examples = examples_of(task)[:2]
    for most in (1, 5, 10_000):
        written = [found.answer for found in task.predictions(model.eval(), examples, most)]
        assert task.overlaps(model, examples, most) == list(map(chrf, written, task.references(examples)))
        for example, text in zip(examples, written, strict=True):
            asked = task.asked(example)
            room = CONTEXT - (0 if isinstance(task, EncoderDecoderTask) else len(asked))
            assert text == by_hand(task, model, example, min(most, room))


def by_hand(task, model, example, most):
    """Always the likeliest token, each from a whole forward pass over nothing but this example."""
    written = []
    for _ in range(most):
        if isinstance(task, EncoderDecoderTask):
            before = torch.tensor([[model.config.decoder_start_token_id, *written]])
            logits = model(input_ids=torch.tensor([example.ids]), decoder_input_ids=before).logits
        else:
            logits = model(input_ids=torch.tensor([[*task.asked(example), *written]])).logits
        written.append(int(logits[0, -1].argmax()))
        if written[-1] in task.ends:
            written.pop()
            break
    return task._tokenizer.decode(written, skip_special_tokens=True).strip()


def test_overlaps_are_of_the_texts_that_are_written(case):
    task, model = case
    examples = examples_of(task)
    found = task.overlaps(model.eval(), examples, 12)
    pairs = zip(task.predictions(model, examples, 12), task.references(examples), strict=True)
    assert found == [chrf(mine.answer, right) for mine, right in pairs]
    assert found == [task.overlaps(model, [example], 12)[0] for example in examples]
    assert all(0 <= value <= 1 for value in found)


def test_a_model_that_has_diverged_writes_something_all_the_same(case):
    task, model = case
    with torch.no_grad():
        for parameter in trainable(model).values():
            parameter.fill_(float("nan"))
    assert all(0 <= value <= 1 for value in task.overlaps(model.eval(), examples_of(task), 4))
