"""What a plan is said to cost."""

import pytest
from tiny_bert import base_model, published

from cluster.checks.estimate import adapter_parameters, estimate
from configs.load import load
from federated.adapters.warm_model import initial_adapter


def test_a_plan_that_spends_nothing_has_no_number_of_runs():
    found = estimate(load("tiny", ["privacy.sampling_rate=1e-6"]))["privacy"]
    assert found["epsilon"] == 0
    assert {silo["runs_in_budget"] for silo in found["silos"].values()} == {None}


def test_a_plan_says_what_a_round_moves_and_what_is_in_its_way():
    found = estimate(load("tiny", ["federated.lora_rank=64"]))["federated"]
    messages = found["messages"]
    assert 0 < messages["reply_bytes"] - 4 * found["adapter_parameters"] < 2**16
    assert messages["line_carries_it"] and messages["silos_raise_max_request_bytes_to"] is None
    wide = [
        "model.hidden_size=4096",
        "model.layers=32",
        "model.heads=32",
        "model.intermediate_size=14336",
        "federated.lora_rank=64",
    ]
    messages = estimate(load("tiny", wide))["federated"]["messages"]
    assert messages["silos_raise_max_request_bytes_to"] == messages["request_bytes"] > 600 * 2**20
    assert messages["line_carries_it"]
    messages = estimate(load("tiny", [*wide, "federated.train='full'"]))["federated"]["messages"]
    assert not messages["line_carries_it"]


@pytest.mark.parametrize("train", ["lora", "head", "full"])
@pytest.mark.parametrize(
    "task", [("classification", ["calm", "storm"]), ("entities", ["O", "B-PER", "I-PER"]), ("qa", [])]
)
def test_what_trains_is_counted_with_the_tasks_head(train, task, tmp_path):
    """As many numbers as travel in the end. Before, `plan` knew no head, and refused to train it alone."""
    source = published(tmp_path / "source", ["the old ship sails", "men tell of the wind"])
    changes = [f'model.source="{source}"', f'federated.task="{task[0]}"', f'federated.train="{train}"']
    config = load("tiny", [*changes, *([f"federated.labels={task[1]}"] if task[1] else [])])
    expected = initial_adapter(config, base_model(tmp_path, source))
    assert adapter_parameters(config) == sum(values.size for values in expected.values())
