"""What goes with secure aggregation, and what is refused with its reason."""

import pytest

from configs.errors import InputError
from configs.load import load
from configs.run_directory import config_digest
from privacy.plan_from_settings import plan_terms
from privacy.secure_sum import SecureSum

SECURE = "federated.secure_aggregation=true"


@pytest.mark.parametrize(
    ("settings", "said"),
    [
        (("federated.schedule=buffered", "federated.buffer=2", "privacy.evaluations=1"), "who is slow would decide"),
        (
            ("federated.aggregation=scaffold", "federated.optimizer=sgd"),
            "'scaffold' .*: control variates are of single",
        ),
        (("federated.aggregation=median",), "'median' with federated.secure_aggregation: it compares single updates"),
        (("federated.aggregation=krum", "federated.min_silos=3"), "'krum' with .*: it compares single updates"),
        (("federated.aggregation=trimmed_mean",), "'trimmed_mean' with .*: it compares single updates"),
        (("federated.adapters=product",), "'product' with .*: updates of factors become products one by one"),
        (("federated.update_dtype=int8",), "'int8' with .*: under masks a value travels as a word of 32 bits"),
        (("federated.update_dtype=bfloat16",), "'bfloat16' with .*: under masks"),
        (
            (
                "privacy.unit=client",
                "privacy.num_clients=3",
                "evaluate.without_dp=false",
                "federated.schedule=buffered",
            ),
            "'buffered'",
        ),
        (
            ("privacy.clipping_function=quantile", "privacy.target_quantile=0.5", "federated.optimizer=sgd"),
            "known before",
        ),
        (("federated.enough_silos=2", "federated.colluders=1"), "a sum has to be of two honest silos at least"),
        (("federated.colluders=-1",), "colluders"),
    ],
)
def test_what_needs_single_updates_is_refused_with_the_reason(settings, said):
    with pytest.raises(InputError, match=said) as caught:
        load("tiny", [SECURE, *settings])
    assert "\n" not in str(caught.value)


def test_colluders_mean_nothing_without_it():
    with pytest.raises(InputError, match=r"federated\.colluders is 1: without secure aggregation the coordinator sees"):
        load("tiny", ["federated.colluders=1"])


def test_clients_are_added_up_too():
    clients = ("privacy.unit=client", "privacy.num_clients=3", "evaluate.without_dp=false")
    config = load("tiny", [SECURE, *clients, "federated.min_silos=3"])
    assert plan_terms(config).secure_sum == SecureSum(min_survivors=3)
    assert plan_terms(config).epsilon == plan_terms(load("tiny", [*clients, "federated.min_silos=3"])).epsilon


def test_it_is_in_the_plan_and_in_what_is_told_of_the_rounds():
    config = load("tiny", [SECURE, "federated.colluders=1", "federated.min_silos=3", "federated.adapters=ffa"])
    plan = plan_terms(config)
    assert plan.secure_sum == SecureSum(colluders=1, min_survivors=3)
    assert config.federated.round_rules["secure_aggregation"] is True
    plain = load("tiny", ["federated.min_silos=3", "federated.adapters=ffa"])
    before = plan_terms(plain)
    assert before.epsilon == plan.epsilon and before.digest != plan.digest
    assert "secure_sum" not in before.model_dump()
    assert "secure_aggregation" not in plain.federated.round_rules
    assert config_digest(config) != config_digest(plain)
