"""Requests that share a batch get what each would get alone from transformers' own generate."""

import queue
import random
import threading

import pytest
import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import (
    GPT2Config,
    GPT2LMHeadModel,
    LlamaConfig,
    LlamaForCausalLM,
    T5Config,
    T5ForConditionalGeneration,
)

from configs.errors import InputError
from trainer.inference.batching import Closed, Engine, EngineLimits, QueueFull, Voice
from trainer.inference.lanes import Lane
from trainer.inference.sampling import Sampling
from trainer.inference.texts import StreamedText

VOCABULARY, CONTEXT = 256, 96


def model_of(family):
    torch.manual_seed(7)
    if family == "llama":
        config = LlamaConfig(
            vocab_size=VOCABULARY, hidden_size=32, num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2,
            intermediate_size=48, max_position_embeddings=CONTEXT, bos_token_id=0, eos_token_id=0, pad_token_id=0,
            initializer_range=0.3,
        )  # fmt: skip
        return LlamaForCausalLM(config).eval()
    config = GPT2Config(
        vocab_size=VOCABULARY, n_embd=32, n_layer=2, n_head=4, n_positions=CONTEXT, bos_token_id=0, eos_token_id=0,
        pad_token_id=0, initializer_range=0.3,
    )  # fmt: skip
    return GPT2LMHeadModel(config).eval()


def byte_level():
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    tokenizer = Tokenizer(models.BPE({sign: number for number, sign in enumerate(alphabet)}, []))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    return tokenizer


@pytest.fixture(autouse=True)
def one_thread():
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(scope="module", params=["llama", "gpt2"])
def model(request):
    return model_of(request.param)


@pytest.fixture
def engine_of():
    engines = []

    def make(voices, slots=8, tokens=4096, waiting=64, failures=None):
        named = {name: Voice(Lane(model), byte_level()) for name, model in voices.items()}
        engines.append(Engine(named, EngineLimits(slots, tokens, waiting)))
        if failures is not None:
            engines[-1].on_failure = failures.append
        return engines[-1]

    yield make
    for engine in engines:
        engine.close()


class Asked:
    """A request and what has come of it."""

    def __init__(self, engine, ids, how, voice="m", hold=None):
        self.outputs, self._ended, self.first = [], queue.Queue(), queue.Queue()
        self._hold = hold
        self.job = engine.submit(voice, ids, how, self.take, continued=False)

    def take(self, output):
        self.outputs.append(output)
        self.first.put(output)
        if output.finish:
            self._ended.put(output)
        elif self._hold is not None:
            self._hold.acquire()

    def end(self):
        return self._ended.get(timeout=300)

    @property
    def text(self):
        return "".join(output.text for output in self.outputs)


def alone(model, ids, how):
    """transformers' own, with its own random numbers."""
    torch.manual_seed(how.seed)
    read = torch.tensor([list(ids)])
    drawn = {"temperature": how.temperature, "top_k": how.top_k, "top_p": how.top_p} if how.temperature else {}
    found = model.generate(
        input_ids=read, attention_mask=torch.ones_like(read), max_new_tokens=how.max_new_tokens,
        do_sample=how.temperature > 0, repetition_penalty=how.repetition_penalty,
        eos_token_id=list(how.ends) or None, pad_token_id=0, **drawn,
    )  # fmt: skip
    return found[0, len(ids) :].tolist()


def prompts(count, seed=0):
    draws = random.Random(seed)
    return [[draws.randrange(1, VOCABULARY) for _ in range(draws.randrange(1, 30))] for _ in range(count)]


WAYS = {
    "greedy": {},
    "sampled": {"temperature": 0.8, "top_k": 20, "top_p": 0.9},
    "penalised": {"repetition_penalty": 1.5},
}


@pytest.mark.parametrize("slots", [1, 3, 8])
@pytest.mark.parametrize("way", WAYS)
def test_a_request_gets_what_it_would_get_alone(model, engine_of, slots, way):
    engine = engine_of({"m": model}, slots=slots)
    hows = [Sampling(max_new_tokens=5 + 7 * (number % 4), seed=number, **WAYS[way]) for number in range(9)]
    asked = [Asked(engine, ids, how) for ids, how in zip(prompts(9), hows, strict=True)]
    for one, ids, how in zip(asked, prompts(9), hows, strict=True):
        assert one.end().finish == "length"
        assert one.outputs[-1].tokens == how.max_new_tokens
        assert one.text == byte_level().decode(alone(model, ids, how))


def test_neighbours_of_other_kinds_change_nothing(model, engine_of):
    engine = engine_of({"m": model, "other": model_of("gpt2")})
    hows = [Sampling(max_new_tokens=20, seed=3, **way) for way in WAYS.values()] * 2
    asked = [
        Asked(engine, ids, how, voice) for ids, how, voice in zip(prompts(6), hows, ["m", "other"] * 3, strict=True)
    ]
    for one, ids, how, used in zip(asked, prompts(6), hows, [model, model_of("gpt2")] * 3, strict=True):
        one.end()
        assert one.text == byte_level().decode(alone(used, ids, how))


def test_a_token_that_ends_it_is_not_shown(model, engine_of):
    ids = prompts(1)[0]
    written = alone(model, ids, Sampling(max_new_tokens=20))
    end = written[8]
    how = Sampling(max_new_tokens=20, ends=(end,))
    one = Asked(engine_of({"m": model}), ids, how)
    assert one.end().finish == "stop"
    assert one.text == byte_level().decode(written[: written.index(end)])
    assert one.outputs[-1].tokens == written.index(end) + 1


def test_a_stop_string_across_tokens_ends_it_before_its_first_character(model, engine_of):
    ids = prompts(1)[0]
    whole = byte_level().decode(alone(model, ids, Sampling(max_new_tokens=40)))
    stop = whole[10:13]
    one = Asked(engine_of({"m": model}), ids, Sampling(max_new_tokens=40, stop=("never there", stop)))
    assert one.end().finish == "stop"
    assert one.text == whole[: whole.index(stop)]


def test_who_cancels_frees_the_slot_for_who_waits(model, engine_of):
    engine, hold = engine_of({"m": model}, slots=1), threading.Semaphore(0)
    first = Asked(engine, [1, 2], Sampling(max_new_tokens=50), hold=hold)
    second = Asked(engine, [3], Sampling(max_new_tokens=4))
    first.first.get(timeout=300)
    assert (engine.running, engine.waiting) == (1, 1)
    first.job.cancel()
    hold.release(100)
    assert (first.end().finish, first.outputs[-1].tokens) == ("cancelled", 1)
    assert second.end().finish == "length"


def test_the_queue_and_the_tokens_have_a_limit(model, engine_of):
    engine, hold = engine_of({"m": model}, slots=2, tokens=20, waiting=0), threading.Semaphore(0)
    first = Asked(engine, [1, 2], Sampling(max_new_tokens=10), hold=hold)
    first.first.get(timeout=300)
    second = Asked(engine, [3], Sampling(max_new_tokens=15))  # there are slots, but no room for its tokens
    with pytest.raises(QueueFull):
        Asked(engine, [3], Sampling(max_new_tokens=1))
    with pytest.raises(InputError, match="21 tokens, and this service has room for 20"):
        Asked(engine, [3], Sampling(max_new_tokens=20))
    second.job.cancel()
    third = Asked(engine, [3], Sampling(max_new_tokens=1))  # who has gone takes no place in the queue
    assert second.end().finish == "cancelled"
    hold.release(100)
    assert (first.end().finish, third.end().finish) == ("length", "length")


def test_a_failure_ends_its_own_requests_alone(engine_of):
    failures, broken = [], model_of("llama")
    engine = engine_of({"broken": broken, "m": model_of("gpt2")}, failures=failures)
    fine = Asked(engine, [1, 2], Sampling(max_new_tokens=10))
    lost = Asked(engine, [VOCABULARY + 3], Sampling(max_new_tokens=10), "broken")  # no such token
    beside = Asked(engine, [5], Sampling(max_new_tokens=10), "broken")
    assert [one.end().finish for one in (fine, lost, beside)] == ["length", "failed", "length"]
    assert failures == ["IndexError"]
    assert beside.text == byte_level().decode(alone(broken, [5], Sampling(max_new_tokens=10)))
    assert engine.alive


def test_a_closed_engine_ends_all_and_takes_no_more(model, engine_of):
    engine, hold = engine_of({"m": model}, slots=1), threading.Semaphore(0)
    asked = [Asked(engine, [1], Sampling(max_new_tokens=50), hold=hold) for _ in range(2)]
    asked[0].first.get(timeout=300)
    closing = threading.Thread(target=engine.close)
    closing.start()
    while not engine._closed:
        pass
    hold.release(100)
    closing.join()
    assert [one.end().finish for one in asked] == ["cancelled", "cancelled"]
    with pytest.raises(Closed):
        Asked(engine, [1], Sampling(max_new_tokens=1))


def test_a_model_without_a_cache_of_keys_is_refused():
    t5 = T5ForConditionalGeneration(T5Config(vocab_size=20, d_model=8, d_kv=4, d_ff=8, num_layers=1, num_heads=2))
    with pytest.raises(InputError, match="m: a T5ForConditionalGeneration can't be served"):
        Lane(t5, name="m")


def test_pieces_are_whole_characters_and_the_whole_is_what_decode_says():
    tokenizer = byte_level()
    text = "ein Schiff 🚢 fährt … \N{REPLACEMENT CHARACTER} nach Åland"
    ids = tokenizer.encode(text).ids
    broken = [*ids[:12], ids[11], *ids[12:], *tokenizer.encode("🚢").ids[:2]]  # bytes that are no character
    for tokens in (ids, broken):
        streamed = StreamedText(tokenizer, ())
        pieces = [*map(streamed.add, tokens), streamed.rest()]
        assert "".join(pieces) == tokenizer.decode(tokens)
        assert len([piece for piece in pieces if piece]) > 20


def test_what_may_be_the_start_of_a_stop_string_is_held_back():
    tokenizer = byte_level()
    streamed = StreamedText(tokenizer, (), ("abac", "xyz"))
    pieces = [streamed.add(token) for token in tokenizer.encode("ababac").ids]
    assert (pieces, streamed.stopped, streamed.rest()) == (["", "", "", "ab", "", ""], True, "")
    unended = StreamedText(tokenizer, (), ("abac",))
    assert [*map(unended.add, tokenizer.encode("aba").ids), unended.rest()] == ["", "", "", "aba"]
