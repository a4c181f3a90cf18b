"""What a model writes: a text that goes on with the prompt, or an answer below it; or nothing, where it learnt none."""

import random

import pytest
import torch
from tokenizers import Tokenizer, decoders, models, normalizers
from transformers import PreTrainedTokenizerFast

from configs.errors import InputError
from configs.load import load
from configs.schema.tasks import TaskSpec
from trainer.data.languages import SAMPLES
from trainer.data.tokenizer import load_tokenizer, special_tokens, train_tokenizer
from trainer.inference.decoding import Decoding
from trainer.inference.generation import _Stopping, _Written, generate, write
from trainer.models.adapters import add_adapter
from trainer.models.families import new_model
from trainer.models.load import load_model
from trainer.tasks.classification import ClassificationTask
from trainer.tasks.task import Opening, WritingTask
from trainer.tasks.text import CausalTask
from trainer.tasks.text_to_text import TranslationTask

DOCUMENTS = [f"the {name} ship sails to island number {number}" for number in range(40) for name in ("red", "old")]


@pytest.fixture(scope="module")
def tokenizers(tmp_path_factory):
    def tokenizer(objective):
        folder = tmp_path_factory.mktemp(objective)
        train_tokenizer(DOCUMENTS, 300, folder, objective, 64)
        return load_tokenizer(folder)

    return {objective: tokenizer(objective) for objective in ("causal", "masked", "span_corruption")}


def likeliest(model, ids, count):
    """The same without caches and without generate: the whole sequence again for every token."""
    start = [0] if model.config.is_encoder_decoder else ids
    written = list(start)
    for _ in range(count):
        given = {"input_ids": torch.tensor([ids if model.config.is_encoder_decoder else written])}
        if model.config.is_encoder_decoder:
            given["decoder_input_ids"] = torch.tensor([written])
        written.append(int(model(**given).logits[0, -1].argmax()))
        if written[-1] == 0:
            break
    return written[len(start) :]


@pytest.mark.parametrize("family", ["llama", "gpt2", "rnn", "lstm", "gru", "t5"])
def test_a_family_writes_what_its_logits_say(family, tokenizers):
    config = load("tiny", [f"model.family={family}", "tokenizer.vocab_size=300"])
    tokenizer = tokenizers[config.objective]
    model = new_model(config.model, len(tokenizer), 0, objective=config.objective)
    model = add_adapter(model, rank=2, alpha=4.0, seed=0).eval()  # as a federation's final model is
    prompt = tokenizer.encode("the old ship", add_special_tokens=False)
    task, asked, shown = CausalTask(tokenizer, 64), [0, *prompt], "the old ship"
    if family == "t5":
        spec = TaskSpec(name="translation")
        task, asked, shown = TranslationTask.with_encoder(tokenizer, 64, spec), [*prompt, 0], "the old ship\n"
    pieces = []
    text = generate(model, task, tokenizer, "the old ship", Decoding(12), pieces.append)
    with torch.no_grad():
        expected = tokenizer.decode(likeliest(model, asked, 12), skip_special_tokens=True)
    assert text == "".join(pieces)
    assert text == shown + expected


def test_a_text_is_the_same_for_a_seed(tokenizers):
    model = new_model(load("tiny").model, len(tokenizers["causal"]), 0).eval()
    task = CausalTask(tokenizers["causal"], 64)
    texts = [generate(model, task, tokenizers["causal"], "the", Decoding(12, 0.8, seed=seed)) for seed in (0, 0, 1)]
    assert texts[0] == texts[1] != texts[2]


def test_what_a_prompt_spells_is_text(tokenizers):
    opening = CausalTask(tokenizers["causal"], 64).opening("a <|endoftext|> b")
    assert opening.ends == (tokenizers["causal"].eos_token_id,)
    assert tokenizers["causal"].eos_token_id not in opening.ids[1:]


def test_a_task_with_labels_teaches_no_writing(tokenizers):
    spec = TaskSpec(name="classification", labels=("no", "yes"))
    assert not isinstance(ClassificationTask(tokenizers["masked"], 64, spec), WritingTask)


def test_special_tokens_have_the_first_ids_and_are_told_from_text(tokenizers):
    for objective, tokenizer in tokenizers.items():
        names = special_tokens(objective, 64)
        assert tokenizer.convert_ids_to_tokens(range(len(names))) == names
        assert set(tokenizer.all_special_ids) == set(range(len(names)))
        assert len(tokenizer) <= 300


def test_a_model_writes_every_language_that_it_was_trained_on(tmp_path):
    """From its first word on: letters of several bytes come whole, and indentation, blanks and joiners with them."""
    train_tokenizer(SAMPLES.values(), 400, tmp_path)
    tokenizer = load_tokenizer(tmp_path)
    torch.manual_seed(0)
    settings = load("tiny", ["tokenizer.vocab_size=400"])
    model, task = new_model(settings.model, len(tokenizer), 0), CausalTask(tokenizer, 160)
    batch = task.collate([task.encode(text) for text in SAMPLES.values()])
    optimizer = torch.optim.Adam(model.parameters(), lr=5e-3)
    for _ in range(110):
        optimizer.zero_grad()
        task.record_losses(model, batch).mean().backward()
        optimizer.step()
    for text in SAMPLES.values():
        pieces, first = [], text.replace("\N{IDEOGRAPHIC COMMA}", " ").split()[0]
        assert generate(model.eval(), task, tokenizer, first, Decoding(160), pieces.append) == text
        assert "".join(pieces) == text
        assert len(pieces) > 5
        assert not any("\N{REPLACEMENT CHARACTER}" in piece for piece in pieces)


@pytest.fixture(scope="module")
def sentence_pieces():
    """Characters of English, and single bytes for all others, as Llama 2's tokenizer has them."""
    known = sorted({*SAMPLES["English"], *SAMPLES["code"], "\N{LOWER ONE EIGHTH BLOCK}"} - {" "})
    tokens = ["<unk>", "<s>", "</s>", *(f"<0x{byte:02X}>" for byte in range(256)), *known]
    backend = Tokenizer(
        models.BPE({token: number for number, token in enumerate(tokens)}, [], unk_token="<unk>", byte_fallback=True)
    )
    blank = "\N{LOWER ONE EIGHTH BLOCK}"
    backend.normalizer = normalizers.Sequence([normalizers.Prepend(blank), normalizers.Replace(" ", blank)])
    backend.decoder = decoders.Sequence(
        [decoders.Replace(blank, " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    )
    return PreTrainedTokenizerFast(tokenizer_object=backend, bos_token="<s>", eos_token="</s>", unk_token="<unk>")


@pytest.mark.parametrize("language", SAMPLES)
def test_what_is_shown_is_whole_from_any_place_on(language, sentence_pieces, tokenizers):
    """Before, a SentencePiece model lost one blank of the indentation of each line."""
    text, lost = SAMPLES[language], "\N{REPLACEMENT CHARACTER}"
    for tokenizer in (sentence_pieces, tokenizers["causal"]):
        ids = CausalTask(tokenizer, 4096).encode(text).ids[:-1]
        starts = [tokenizer.decode(ids[:cut], skip_special_tokens=True) for cut in range(1, len(ids))]
        for cut, before in list(enumerate(starts, 1))[::5]:
            if not before.endswith(lost):  # no prompt ends inside a letter
                written = _Written(tokenizer.backend_tokenizer, Opening(ids[:cut], continued=True, ends=()))
                pieces = [written.text(token) for token in ids[cut:]]
                assert before + "".join(pieces) == text
                assert not any(lost in piece for piece in pieces)


def test_bytes_that_are_no_character_end_nothing(sentence_pieces, tokenizers):
    """tokenizers' own stream raises there for bytes that stand alone."""
    for tokenizer in (sentence_pieces, tokenizers["causal"]):
        backend, chance = tokenizer.backend_tokenizer, random.Random(0)
        for _ in range(200):
            ids = [chance.randrange(3, len(tokenizer)) for _ in range(30)]
            written = _Written(backend, Opening((), continued=False, ends=()))
            shown = "".join(map(written.text, ids))
            whole = backend.decode(ids).rstrip("\N{REPLACEMENT CHARACTER}")
            # Bytes that follow may take a whole letter back, once it was shown.
            assert shown == whole or (tokenizer is sentence_pieces and len(shown) >= len(whole))


STORIES = {
    "greedy": Decoding(16),
    "beams": Decoding(16, beams=3),
    "penalty": Decoding(16, repetition_penalty=1.7),
    "drawn": Decoding(16, temperature=0.9, top_k=20, top_p=0.9, seed=6),
    "all": Decoding(16, temperature=1.5, repetition_penalty=1.2, seed=4),
}


@pytest.mark.parametrize("family", ["llama", "gpt2", "lstm", "t5"])
@pytest.mark.parametrize("story", STORIES)
def test_transformers_writes_the_same_with_the_merged_model(family, story, tokenizers, tmp_path):
    config, decoding = load("tiny", [f"model.family={family}", "tokenizer.vocab_size=300"]), STORIES[story]
    tokenizer = tokenizers[config.objective]
    model = new_model(config.model, len(tokenizer), 2, objective=config.objective)
    model = add_adapter(model, rank=2, alpha=4.0, seed=0).eval()
    with torch.no_grad():
        for name, value in model.named_parameters():
            if "lora_B" in name:  # which begins as nothing
                value.normal_(std=0.2, generator=torch.Generator().manual_seed(0))
    task = CausalTask(tokenizer, 64)
    if family == "t5":
        task = TranslationTask.with_encoder(tokenizer, 64, TaskSpec(name="translation"))
    opening = task.opening("the old ship")
    if family == "lstm" and decoding.beams > 1:
        with pytest.raises(InputError, match="beams: a recurrent model's state"):
            write(model, tokenizer, opening, 64, decoding)
        return
    pieces = []
    text = write(model, tokenizer, opening, 64, decoding, pieces.append)
    model.merge_and_unload().save_pretrained(tmp_path)
    merged = load_model(tmp_path)
    torch.manual_seed(decoding.seed)
    found = merged.generate(
        torch.tensor([opening.ids]),
        max_new_tokens=16,
        do_sample=decoding.temperature > 0,
        temperature=decoding.temperature or None,
        top_k=decoding.top_k,
        top_p=decoding.top_p,
        num_beams=decoding.beams,
        repetition_penalty=decoding.repetition_penalty,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.eos_token_id,
    )[0].tolist()
    before = tokenizer.decode(opening.ids, skip_special_tokens=True) if opening.continued else ""
    whole = tokenizer.decode(found, skip_special_tokens=True)
    assert before + text == whole.rstrip("\N{REPLACEMENT CHARACTER}")  # of whose letter bytes are missing
    assert text == "".join(pieces) != ""


@pytest.mark.parametrize("beams", [1, 3])
def test_a_stop_string_ends_the_text_and_is_no_part_of_it(tokenizers, beams):
    tokenizer = tokenizers["causal"]
    model, task = new_model(load("tiny").model, len(tokenizer), 0).eval(), CausalTask(tokenizer, 64)
    opening = task.opening("the")
    whole = write(model, tokenizer, opening, 64, Decoding(20, beams=beams))
    stop = whole[7:10]
    pieces = []
    cut = write(model, tokenizer, opening, 64, Decoding(20, beams=beams, stop=("never there", stop)), pieces.append)
    if beams == 1:  # of beams another one may be the best without its end
        assert cut == whole[: whole.index(stop)]
    assert cut == "".join(pieces)
    assert stop not in cut


def test_what_may_become_a_stop_string_is_shown_once_it_is_none(tokenizers):
    """Also where the letters of one are several tokens each, as in Chinese here."""
    tokenizer = tokenizers["causal"]
    ids = tokenizer.encode("one \u3002 two \u3002\u3002 three", add_special_tokens=False)
    written = _Written(tokenizer.backend_tokenizer, Opening((), continued=False, ends=()), ("\u3002\u3002",))
    shown = [written.text(token) for token in ids]
    assert "".join(shown) + written.rest() == "one \u3002 two "
    kept = _Written(tokenizer.backend_tokenizer, Opening((), continued=False, ends=()), ("three!",))
    shown = "".join(kept.text(token) for token in ids)
    assert shown == "one \u3002 two \u3002\u3002 "
    assert kept.rest() == "three"


def test_generation_stops_where_a_stop_string_stands(tokenizers):
    """Rather than at the end of its tokens: a letter of several bytes counts, too."""
    tokenizer = tokenizers["causal"]
    ids = tokenizer.encode("the \u3002", add_special_tokens=False)
    stopping = _Stopping(tokenizer.backend_tokenizer, Opening((), continued=False, ends=()), ("\u3002",), read=0)
    assert stopping(torch.tensor([ids, [*ids[:-1], ids[0]]]), None).tolist() == [True, False]


def test_the_context_ends_a_text_and_a_longer_prompt_is_refused(tokenizers):
    tokenizer = tokenizers["causal"]
    model = new_model(load("tiny", ["model.family=gpt2"]).model, len(tokenizer), 0).eval()
    task = CausalTask(tokenizer, 64)
    tokens = []
    model.register_forward_hook(lambda *_: tokens.append(1))
    generate(model, task, tokenizer, "the ship", Decoding(500))
    assert len(tokens) <= 64
    with pytest.raises(InputError, match="the model's context is 64; give a shorter one"):
        generate(model, task, tokenizer, "the ship " * 64, Decoding(5))
