"""Several adapters on one base under a limit of memory: who is in it, who makes room, and each answers as alone."""

import queue
import shutil
import threading

import pytest
import torch
from peft import PeftModel
from served_models import a_federation, a_model
from transformers import AutoModelForCausalLM, AutoTokenizer

from cluster.serving.models import find, load
from configs.errors import InputError
from configs.storage.manifests import Manifest, commit_manifest, require_manifest
from trainer.inference.batching import Engine, EngineLimits
from trainer.inference.sampling import Sampling

NAMES = ("run.1", "run.2", "run.3")
PROMPT, WRITTEN = "the red", 12


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    return a_model(tmp_path_factory.mktemp("base") / "model")


@pytest.fixture(scope="module")
def runs(base, tmp_path_factory):
    folder = tmp_path_factory.mktemp("runs")
    return {name: a_federation(folder / name, base, int(name[-1])) for name in NAMES}


@pytest.fixture(scope="module")
def size(base, runs):
    """Bytes of one adapter's values."""
    model = AutoModelForCausalLM.from_pretrained(base)
    before = sum(value.numel() for value in model.parameters())
    wrapped = PeftModel.from_pretrained(model, runs["run.1"] / "federated" / "adapter")
    return 4 * (sum(value.numel() for value in wrapped.parameters()) - before)


@pytest.fixture(scope="module")
def alone(base, runs):
    """What each adapter answers by transformers and peft."""
    tokenizer = AutoTokenizer.from_pretrained(base)
    ids = torch.tensor([[0, *tokenizer.encode(PROMPT, add_special_tokens=False)]])

    def answer(adapter):
        model = AutoModelForCausalLM.from_pretrained(base)
        model = PeftModel.from_pretrained(model, adapter) if adapter else model
        given = {"attention_mask": torch.ones_like(ids), "max_new_tokens": WRITTEN, "do_sample": False}
        found = model.eval().generate(input_ids=ids, **given)
        return tokenizer.decode(found[0, ids.shape[1] :], skip_special_tokens=True)

    return {name: answer(run / "federated" / "adapter") for name, run in runs.items()} | {"model": answer(None)}


class Asked:
    """The models in an engine, and what they answer."""

    def __init__(self, places, limit):
        self.served = load([find(str(place), None) for place in places], None, limit)
        self.pool = next(one.voice.lane.fits.func.__self__ for one in self.served.values() if one.name != "model")
        voices = {name: one.voice for name, one in self.served.items()}
        self.engine = Engine(voices, EngineLimits(8, 10_000, 64))

    def ask(self, name, written=WRITTEN, told=None):
        pieces = queue.Queue()
        take = pieces.put if told is None else lambda output: (told.append((name, output)), pieces.put(output))
        ids = self.served[name].opening(PROMPT)
        self.engine.submit(name, ids, Sampling(written), take, continued=True)
        return pieces

    def bytes(self):
        values = [value for name, value in self.pool._wrapped.named_parameters() if "served/" in name]
        return sum(value.numel() * value.element_size() for value in values)


def ended(pieces):
    found = []
    while not found or not found[-1].finish:
        found.append(pieces.get(timeout=300))
    return "".join(output.text for output in found), found[-1].finish


@pytest.fixture
def asked(base, runs):
    made = []

    def make(limit, *places):
        made.append(Asked(places or (*runs.values(), base), limit))
        return made[-1]

    yield make
    for one in made:
        one.engine.close()


def test_the_one_asked_for_longest_ago_makes_room(asked, size, alone):
    service = asked(2 * size)
    assert len(set(alone.values())) == 4
    assert service.pool.loaded == ("run.2", "run.3")
    for name, left in (
        ("model", ("run.2", "run.3")),
        ("run.1", ("run.3", "run.1")),
        ("run.3", ("run.1", "run.3")),
        ("model", ("run.1", "run.3")),
        ("run.2", ("run.3", "run.2")),
        ("model", ("run.3", "run.2")),
        ("run.3", ("run.2", "run.3")),
    ):
        assert ended(service.ask(name)) == (alone[name], "length")
        assert service.pool.loaded == left
        assert service.bytes() == 2 * size


def test_all_at_once_answer_each_as_alone_whatever_room_there_is(asked, size, alone):
    for limit in (size, 2 * size, None):
        service = asked(limit)
        going = [(name, service.ask(name)) for _ in range(3) for name in alone]
        for name, pieces in going:
            assert ended(pieces) == (alone[name], "length")
        assert service.bytes() == (limit or 3 * size)


def test_one_that_answers_is_not_dropped_and_who_needs_its_room_waits(asked, size, alone):
    service, told = asked(size), []
    long = service.ask("run.1", written=300, told=told)
    short = service.ask("run.2", told=told)
    text, _ = ended(long)
    assert text.startswith(alone["run.1"])
    assert ended(short) == (alone["run.2"], "length")
    order = [name for name, _ in told]
    assert order == sorted(order)  # nothing of the second one came before the first one's end


class HeldUp(list):
    """The thread that decodes waits at its first token, until all have asked."""

    def __init__(self):
        super().__init__()
        self.all_have_asked = threading.Event()

    def append(self, one):
        super().append(one)
        assert self.all_have_asked.wait(timeout=300)


def test_who_waits_for_an_adapters_room_holds_up_nobody_who_needs_none_of_it(asked, size, alone):
    service, told = asked(size), HeldUp()
    first = ("run.1", "run.2", "run.1", "model")
    going = [service.ask(name, written=30 if place == 0 else WRITTEN, told=told) for place, name in enumerate(first)]
    told.all_have_asked.set()
    for name, pieces in list(zip(first, going, strict=True))[1:]:
        assert ended(pieces) == (alone[name], "length")
    order = [name for name, _ in told]
    assert order.index("run.2") > max(place for place, name in enumerate(order) if name == "model")
    # Whoever came later for the same room came behind, or the first one could wait for ever.
    assert order[-WRITTEN:] == ["run.1"] * WRITTEN


def test_an_adapter_that_has_changed_or_gone_fails_and_the_others_go_on(base, runs, asked, size, alone, tmp_path):
    first = shutil.copytree(runs["run.1"], tmp_path / "run.1")
    second = shutil.copytree(runs["run.2"], tmp_path / "run.2")
    service = asked(size, first, second, runs["run.3"], base)
    shutil.copy(runs["run.3"] / "federated" / "adapter" / "adapter_model.safetensors", first / "federated" / "adapter")
    shutil.rmtree(second)
    failures = []
    service.engine.on_failure = failures.append
    broken = ("run.1", "run.2")
    for name in ("run.3", "run.1", "model", "run.3", "run.2", "run.3", "model"):
        assert ended(service.ask(name)) == (("", "failed") if name in broken else (alone[name], "length"))
    assert failures == ["InputError", "FileNotFoundError"]


def test_a_limit_below_one_adapter_is_one_clear_line(runs, size):
    places = [find(str(run), None) for run in runs.values()]
    with pytest.raises(InputError, match=r"--adapters-memory \S+: the adapter of 'run.1' alone takes") as refused:
        load(places, None, size - 1)
    assert "\n" not in str(refused.value)


def test_a_whole_model_beside_adapters_leaves_them_their_common_base(base, runs, tmp_path, alone):
    whole = shutil.copytree(runs["run.1"], tmp_path / "whole")
    shutil.rmtree(whole / "federated")
    AutoModelForCausalLM.from_pretrained(base).save_pretrained(whole / "federated" / "model")
    digest = require_manifest(whole / "model", "model", "export").content_digest
    commit_manifest(whole / "federated", Manifest("federated", "made-up", inputs={"model": digest}))
    served = load([find(str(place), None) for place in (*runs.values(), whole)], None)
    models = {name: id(one.voice.lane._model) for name, one in served.items()}
    assert len({models[name] for name in NAMES}) == 1
    assert models["whole"] != models["run.1"]
