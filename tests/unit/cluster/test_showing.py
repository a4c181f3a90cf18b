"""Which prompts a run's page has, and what a model answers to one; a prompt that can't be answered ends nothing."""

from types import SimpleNamespace

import pytest
from served_models import a_labelling_run, a_model
from taught_models import CONTEXT, a_taught_model

from cluster.showing import _answer, _explained, _prompts
from configs.load import load
from trainer.data.tokenizer import load_tokenizer
from trainer.inference.decoding import Decoding
from trainer.models.load import load_model
from trainer.tasks.task import task_of


def run_of(*overrides):
    return SimpleNamespace(config=load("tiny", overrides))


def task(name, head=None):
    return SimpleNamespace(name=name, head=head)


def test_prompts_are_the_settings_own_and_no_text_is_labelled_that_nobody_gave():
    assert _prompts(run_of(), task("causal")) == ["What is"]
    assert _prompts(run_of('evaluate.prompts=["a", " ", "b", "a"]'), task("causal")) == ["a", "b"]
    assert _prompts(run_of(), task("classification", head=1)) == []
    assert _prompts(run_of('evaluate.prompts=["a"]'), task("classification", head=1)) == ["a"]
    assert _prompts(run_of('evaluate.prompts=["a"]'), task("qa", head=1)) == []


@pytest.fixture(scope="module")
def writer(tmp_path_factory):
    folder = a_taught_model(tmp_path_factory.mktemp("model"))
    return task_of(load("tiny").federated.task_spec, folder), load_tokenizer(folder), load_model(folder).eval()


def test_a_model_goes_on_from_a_prompt_and_says_why(writer):
    said = _answer(*writer, "old:", Decoding(CONTEXT))
    assert said.split()
    explained, missing = _explained(*writer, ["old: ship"])
    assert [one["text"] for one in explained] == ["old: ship"]
    assert missing == ""


def test_a_prompt_that_does_not_fit_is_said_and_ends_nothing(writer):
    assert _answer(*writer, "ship " * 100, Decoding(4)).startswith("(the prompt has ")
    explained, missing = _explained(*writer, [""])
    assert (explained, missing) == ([], "the text is empty; give one")


def test_a_text_is_labelled(tmp_path):
    run, model, spec = a_labelling_run(tmp_path / "run", a_model(tmp_path / "model"), "classification", ("bad", "good"))
    labelling = task_of(spec, run / "model")
    said = _answer(labelling, load_tokenizer(run / "model"), model, "the old ship", Decoding(4))
    assert said in ("bad", "good")
