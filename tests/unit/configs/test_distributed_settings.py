"""What goes with noise that silos make together, and what is refused with its reason."""

import pytest

from configs.errors import InputError
from configs.load import load
from configs.run_directory import config_digest

SHARED = (
    "federated.secure_aggregation=true",
    "federated.colluders=1",
    "privacy.mode=distributed",
    "privacy.min_honest=2",
    "federated.local_steps=1",
    "federated.optimizer=sgd",
)


@pytest.mark.parametrize(
    ("settings", "said"),
    [
        (
            ("federated.secure_aggregation=false", "federated.colluders=0"),
            "secure_aggregation is false .*: a silo's share of the noise is too",
        ),
        (("federated.local_steps=2",), "local_steps is 2 .*: a round is one step over all silos' samples: .*; give 1"),
        (("federated.optimizer=adam",), "optimizer is 'adam' .*: the moments of an optimizer inside a silo would be"),
        (("federated.proximal_mu=0.1",), r"proximal_mu is 0\.1 .*: a round is one step, which begins where"),
        (
            ("federated.schedule=buffered", "federated.buffer=2", "privacy.evaluations=1"),
            "who is slow would decide whose sum is seen",
        ),
        (
            ("privacy.unit=client", "privacy.num_clients=3", "evaluate.without_dp=false"),
            "unit is 'client' with privacy.mode 'distributed': it is for sums of records' gradients",
        ),
        (("privacy.sampler=truncated_poisson", "privacy.max_batch_size=90"), "sampler is 'truncated_poisson' .*proven"),
        (
            ("privacy.clipping_function=quantile", "privacy.target_quantile=0.5"),
            "clipping_function is 'quantile' .*: the count that moves the norm is released by each silo",
        ),
        (("federated.colluders=0",), "colluders is 0 .*: a silo that looks at the next model knows its own"),
        (("privacy.min_honest=1",), "min_honest is 1 with privacy.mode 'distributed': a secure sum has two honest"),
        (("privacy.min_honest=0",), "min_honest is 0 with privacy.mode 'distributed'"),
        (("privacy.mode=single",), "min_honest is 2: with privacy.mode 'single' no noise rests on other silos"),
        (("privacy.mode=skellam",), "privacy.mode"),
        (
            ("federated.enough_silos=3", "federated.colluders=1", "privacy.min_honest=3"),
            "enough_silos is 3 with privacy.min_honest 3 and federated.colluders 1: a round would end with less noise",
        ),
    ],
)
def test_what_is_no_step_over_all_samples_is_refused_with_the_reason(settings, said):
    with pytest.raises(InputError, match=said) as caught:
        load("tiny", [*SHARED, *settings])
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    "settings",
    [
        (),
        ("privacy.clipping_function=automatic",),
        ("federated.aggregation=fedadam", "federated.adapters=ffa", "federated.anchor=0.1"),
        ("federated.enough_silos=3", "federated.grace_s=5"),
        ("privacy.evaluations=2",),
    ],
)
def test_what_goes_with_it(settings):
    assert load("tiny", [*SHARED, *settings]).privacy.mode == "distributed"


def test_runs_of_before_keep_their_digests():
    assert config_digest(load("tiny")) == config_digest(load("tiny", ["privacy.mode=single", "privacy.min_honest=0"]))
