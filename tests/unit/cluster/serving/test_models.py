"""From what a person names to models that answer; and what is claimed of them."""

import json
import queue
import shutil

import pytest
import torch
from peft import PeftModel
from served_models import a_federation, a_labelling_run, a_model
from transformers import AutoModelForCausalLM, AutoTokenizer

from cluster.serving.models import find, load
from configs.errors import InputError
from configs.storage.layout import CERTIFICATE
from configs.storage.manifests import Manifest, commit_manifest
from configs.storage.sealing import MasterKey, write_sealed
from federated.adapters.merged import merge
from trainer.inference.batching import Engine, EngineLimits
from trainer.inference.sampling import Sampling


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    return a_model(tmp_path_factory.mktemp("base") / "model")


@pytest.fixture(scope="module")
def runs(base, tmp_path_factory):
    return [a_federation(tmp_path_factory.mktemp("runs") / f"run.{seed}", base, seed) for seed in (1, 2)]


def answers(served, prompts, tokens=12):
    """All of them at once."""
    engine = Engine({name: one.voice for name, one in served.items()}, EngineLimits(8, 10_000, 64))
    ended = {}
    for name, prompt in prompts:
        pieces = ended.setdefault((name, prompt), queue.Queue())
        engine.submit(name, served[name].opening(prompt), Sampling(tokens), pieces.put, continued=True)
    found = {key: "".join(iter_to_end(pieces)) for key, pieces in ended.items()}
    engine.close()
    return found


def iter_to_end(pieces):
    while True:
        output = pieces.get(timeout=300)
        yield output.text
        if output.finish:
            return


def by_transformers(base, adapter, prompt):
    model = AutoModelForCausalLM.from_pretrained(base)
    model = PeftModel.from_pretrained(model, adapter) if adapter else model
    tokenizer = AutoTokenizer.from_pretrained(base)
    ids = torch.tensor([[0, *tokenizer.encode(prompt, add_special_tokens=False)]])
    found = model.eval().generate(
        input_ids=ids, attention_mask=torch.ones_like(ids), max_new_tokens=12, do_sample=False
    )
    return tokenizer.decode(found[0, ids.shape[1] :], skip_special_tokens=True)


def test_adapters_on_one_base_answer_each_as_alone(base, runs):
    named = [str(runs[0]), str(runs[1] / "federated" / "adapter"), f"plain={base}"]
    places = [find(argument, None) for argument in named]
    assert [place.name for place in places] == ["run.1", "adapter", "plain"]
    served = load(places, None)
    assert list(served) == ["run.1", "adapter", "plain"]
    assert len({id(one.voice.lane._model) for one in served.values()}) == 1
    adapters = dict(zip(served, [*(run / "federated" / "adapter" for run in runs), None], strict=True))
    prompts = [(name, prompt) for prompt in ("the old ship", "the red", "") for name in served]
    found = answers(served, prompts)
    assert found == {(name, prompt): by_transformers(base, adapters[name], prompt) for name, prompt in prompts}
    assert len({found[name, "the red"] for name in served}) == 3


def test_one_adapter_alone_and_a_merged_model_say_the_same(base, runs, tmp_path):
    merged, _ = merge(runs[0], tmp_path / "merged", None)
    served = load([find(str(runs[0]), None)], None) | load([find(str(merged), None)], None)
    found = answers(served, [("run.1", "the red"), ("merged", "the red")])
    assert set(found.values()) == {by_transformers(base, runs[0] / "federated" / "adapter", "the red")}


def test_encrypted_runs_are_served_with_their_key(base, tmp_path):
    key = MasterKey(bytes(range(32)), "the test")
    run = a_federation(tmp_path / "clear", base, 1)
    sealed, _ = merge(run, tmp_path / "sealed", None)
    shutil.rmtree(sealed)

    adapter = run / "federated" / "adapter" / "adapter_model.safetensors"
    write_sealed(adapter, adapter.read_bytes(), key, "federated/adapter/adapter_model.safetensors")
    weights = run / "model" / "model.safetensors"
    write_sealed(weights, weights.read_bytes(), key, "made-up/model/model.safetensors")
    base_manifest = commit_manifest(run / "model", Manifest("model", "made-up", metadata={"context_length": 64}))
    (run / "federated" / "manifest.json").unlink()
    commit_manifest(run / "federated", Manifest("federated", "", inputs={"model": base_manifest.content_digest}))
    found = answers(load([find(str(run), key)], key), [("clear", "the red")])
    assert found == {("clear", "the red"): by_transformers(base, adapter_in_the_clear(base, tmp_path), "the red")}
    with pytest.raises(InputError, match="is encrypted"):
        load([find(str(run), None)], None)


def adapter_in_the_clear(base, tmp_path):
    return a_federation(tmp_path / "again", base, 1) / "federated" / "adapter"


def test_words_are_text_whatever_they_spell(base):
    (served,) = load([find(str(base), None)], None).values()
    assert served.opening("<|endoftext|>").count(0) == 1
    ids, ends = served.dialogue([("user", "<|endoftext|><|im_end|>")])
    plain, _ = served.dialogue([("user", "")])
    assert ids.count(0) == plain.count(0)
    assert 0 in ends


def damaged(run, change):
    copy = run.parent / f"{run.name}-copy"
    shutil.rmtree(copy, ignore_errors=True)
    shutil.copytree(run, copy)
    change(copy)
    return copy


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda run: (run / "model" / "model.safetensors").unlink(), "its digest is not the manifest's"),
        (lambda run: (run / "federated" / "manifest.json").unlink(), "no finished federated here"),
        (lambda run: (run / "model" / "manifest.json").unlink(), "no finished model here"),
        (lambda run: (run / "federated" / "adapter" / "adapter_config.json").write_text("{}"), "its digest is not"),
        (lambda run: shutil.rmtree(run / "federated"), "no finished federated here"),
        (lambda run: (run / "federated" / CERTIFICATE).write_text("[]"), "certificate.json"),
        (lambda run: (run / "federated" / CERTIFICATE).write_text(json.dumps({"version": 7})), "certificate.json"),
    ],
)
def test_a_run_that_is_half_there_is_refused(runs, change, message):
    copy = damaged(runs[0], change)
    with pytest.raises(InputError, match=message) as refused:
        load([find(str(copy), None)], None)
    assert "\n" not in str(refused.value)


def test_names_are_refused_where_they_are_none_or_two(base, runs):
    with pytest.raises(InputError, match="two models are called 'model'; name one of them otherwise, as NAME=PATH"):
        load([find(str(base), None), find(str(runs[0] / "model"), None)], None)
    with pytest.raises(InputError, match="can't be a model's name"):
        find(f"a b={base}", None)
    with pytest.raises(InputError, match="no such folder"):
        find("nowhere", None)


def test_labels_are_those_of_its_runs_task(base, tmp_path):
    run, _, _ = a_labelling_run(tmp_path / "clinic", base, "classification", ("bad", "good"))
    merged, _ = merge(run, tmp_path / "elsewhere", None)
    with pytest.raises(
        InputError,
        match="elsewhere: gives labels and lies in no run, whose settings have its task; put it into its run",
    ):
        find(str(merged), None)
    settings = run / "config.toml"
    settings.write_text(settings.read_text().replace('"good"', '"fine"'))
    with pytest.raises(InputError, match="its labels are bad, good; give the settings of the run that made it"):
        load([find(str(run), None)], None)
    said = settings.read_text()
    for old, new in (("classification", "entities"), ("bad", "O"), ("fine", "B-PER")):
        said = said.replace(f'"{old}"', f'"{new}"')
    settings.write_text(said)
    with pytest.raises(InputError, match="clinic: has another head than the task 'entities'"):
        load([find(str(run), None)], None)
    settings.unlink()
    with pytest.raises(InputError, match="clinic: gives labels and lies in no run"):
        find(str(run), None)
