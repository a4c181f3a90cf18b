"""Tasks by name: one registry, which settings, requests and policies name alike."""

import json
import shutil
from typing import get_args

import pytest

from configs.errors import InputError
from configs.schema.federated import FederatedSettings
from configs.schema.silo import SiloPolicy
from configs.schema.tasks import CAUSAL, TaskName
from configs.storage.manifests import MANIFEST, Manifest, commit_manifest
from trainer.data.tokenizer import load_tokenizer, train_tokenizer
from trainer.tasks.task import _tasks, kind_of, task_of
from trainer.tasks.text import CausalTask

CONTEXT = 24


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    """What a task reads of an exported model: tokenizer and manifest."""
    folder = tmp_path_factory.mktemp("model")
    train_tokenizer(["What is a module? One of many, and all of them are small."], 300, folder)
    commit_manifest(folder, Manifest("model", "", metadata={"context_length": CONTEXT}))
    return folder


def test_settings_and_policies_name_the_tasks_there_are():
    assert sorted(get_args(TaskName)) == sorted(_tasks())
    assert all(kind.name == name for name, kind in _tasks().items())
    assert SiloPolicy(budget_epsilon=1, budget_delta=1e-5).tasks == (FederatedSettings().task,) == ("causal",)


def test_a_task_has_its_models_tokenizer_and_context(model):
    task = task_of(CAUSAL, model)
    by_hand = CausalTask(load_tokenizer(model), CONTEXT)
    long = "What is a module? " * 99
    assert isinstance(task, CausalTask)
    assert task.encode(long).truncated
    assert [task.encode(text) for text in ("", "one", long)] == [by_hand.encode(text) for text in ("", "one", long)]


def test_another_name_is_refused_in_one_line():
    with pytest.raises(InputError, match=r"^task 'classify': there is none of that name; give one of causal, "):
        kind_of("classify")


@pytest.mark.parametrize("length", [None, "long", 64.0])
def test_a_manifest_without_a_context_length_is_refused(model, tmp_path, length):
    copy = shutil.copytree(model, tmp_path / "model")
    manifest = json.loads((copy / MANIFEST).read_text())
    manifest["metadata"]["context_length"] = length
    (copy / MANIFEST).write_text(json.dumps(manifest))
    with pytest.raises(InputError, match=r"model: its manifest names no context_length; give a base model"):
        task_of(CAUSAL, copy)
    (copy / MANIFEST).unlink()
    with pytest.raises(InputError, match="names no context_length"):
        task_of(CAUSAL, copy)
