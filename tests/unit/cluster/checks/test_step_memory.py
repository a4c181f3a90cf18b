"""What a silo's memory is tried on: whole contexts, real private steps, the model that is there; or one clear line."""

import pytest
from tiny_bert import CONTEXT, base_model, published

from cluster.checks.estimate import estimate
from cluster.checks.step_memory import _most_resident, _peak_bytes, step_memory
from configs.errors import InputError
from configs.load import load
from configs.schema.tasks import TaskSpec
from configs.storage.manifests import MANIFEST
from federated.adapters.warm_model import adaptation, warm_model
from privacy.plan_from_settings import plan_terms
from trainer.data.tokenizer import load_tokenizer
from trainer.models.adapters import adapter_weights
from trainer.tasks.task import longest_shape, task_of
from trainer.tasks.text_to_text import TranslationTask

TEXTS = ["the old ship sails to the north in wind and rain", "men in the harbour tell of the wind"]


@pytest.fixture
def config(tmp_path):
    """A run whose base model is there: a small BERT that tells two labels apart."""
    source = published(tmp_path / "source", TEXTS)
    base_model(tmp_path, source)
    changes = [
        f'model.source="{source}"', f"model.context_length={CONTEXT}", f'run.storage="{tmp_path}"', 'run.name="run"',
        'federated.task="classification"', 'federated.labels=["calm", "storm"]',
        "data.private.public_record_count=200", "data.private.public_record_counts={}", "privacy.sampling_rate=0.1",
    ]  # fmt: skip
    return load("tiny", changes)


def test_the_trial_takes_private_steps_with_the_runs_own_model(config, tmp_path):
    folder = tmp_path / "run" / "model"
    task = task_of(config.federated.task_spec, folder)
    # The one that the trial will find, too: a process keeps the last one.
    model = warm_model(folder, adaptation(config.federated, task.head), "", None, onednn=True)
    before = {name: value.clone() for name, value in adapter_weights(model).items()}
    resident = _most_resident()
    assert _peak_bytes(config, plan_terms(config), folder, 20) >= resident > 2**27
    assert all((adapter_weights(model)[name] != value).any() for name, value in before.items())


def test_records_fill_the_context(config, tmp_path):
    folder = tmp_path / "run" / "model"
    both = TranslationTask.with_encoder(load_tokenizer(folder), CONTEXT, TaskSpec(name="translation"))
    both._tokenizer.eos_token = "[SEP]"
    for task, shape in ((task_of(config.federated.task_spec, folder), CONTEXT), (both, (CONTEXT, CONTEXT))):
        assert longest_shape(task) == shape
        assert {task.shape(one) for one in task.made_up(longest_shape(task), 8)} == {shape}


def test_what_cannot_be_tried_is_refused_before_anything_starts(config, tmp_path):
    plan = plan_terms(config)
    clients = plan.model_copy(update={"unit": "client"})
    with pytest.raises(InputError, match="silos take no private steps then; leave --memory out"):
        step_memory(config, clients)
    nothing = config.model_copy(update={"run": config.run.model_copy(update={"name": "another"})})
    with pytest.raises(InputError, match=r"no finished model here; run `siloweave import` first"):
        step_memory(nothing, plan)
    manifest = tmp_path / "run" / "model" / MANIFEST
    manifest.write_text(manifest.read_text().replace('"parameters": ', '"parameters": 99999999'))
    with pytest.raises(InputError, match=r"its weights are .* bytes, and .* are free here; try on a machine with more"):
        step_memory(config, plan)


def test_a_plan_tries_nothing_by_itself(config):
    assert estimate(config)["federated"]["silo_memory"] == "not tried; give --memory"
