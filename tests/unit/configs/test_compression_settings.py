"""What goes with updates in few bytes, and what is refused with its reason."""

import pytest

from configs.errors import InputError
from configs.load import load
from configs.run_directory import config_digest
from privacy.compression import Compression
from privacy.plan_from_settings import plan_terms

FEW = ("federated.update_dtype=int4", "federated.update_block=64", "federated.update_share=0.1")
CLIENT = ("privacy.unit=client", "privacy.num_clients=3", "evaluate.without_dp=false", "federated.min_silos=1")


@pytest.mark.parametrize(
    ("settings", "said"),
    [
        (("federated.update_block=64",), r"update_block is 64 with federated\.update_dtype 'float32': only 'int8'"),
        (("federated.update_dtype=int8", "federated.update_block=2"), "update_block is 2: give 16 or more"),
        (("federated.update_dtype=int8", "federated.update_block=70000"), "update_block"),
        (("federated.update_dtype=int4",), r"'int4' without federated\.update_block: say how many values"),
        (("federated.update_dtype=int8", "federated.update_share=0.5"), r"update_share 0\.5 without federated\.upd"),
        (("federated.update_share=0",), "update_share"),
        (("federated.update_share=1.5",), "update_share"),
        (("federated.update_share=nan",), "update_share"),
        ((*FEW, "federated.aggregation=scaffold", "federated.optimizer=sgd"), "'scaffold': control variates are mean"),
        ((*FEW, "federated.aggregation=median"), "'median': of most values most silos would send nothing"),
        ((*FEW, "federated.aggregation=trimmed_mean"), "'trimmed_mean': of most values"),
        ((*FEW, "federated.aggregation=krum", "federated.min_silos=3"), "'krum': how near two updates are"),
        ((*FEW, "federated.adapters=product"), "'product': its factors turn from round to round"),
        ((*FEW, *CLIENT), r"update_share is 0\.1 with privacy\.unit 'client': what an update leaves out has no noise"),
        (
            ("federated.update_share=0.1", "federated.secure_aggregation=true"),
            r"update_share is 0\.1 with federated\.secure_aggregation: which values are sent would be seen, and tells",
        ),
        ((*FEW[:2], "federated.secure_aggregation=true"), "under masks a value travels as a word of 32 bits"),
    ],
)
def test_what_does_not_go_together_is_refused_with_the_reason(settings, said):
    with pytest.raises(InputError, match=said) as caught:
        load("tiny", list(settings))
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("settings", "how"),
    [
        ((), None),
        (("federated.update_dtype=int8",), None),
        (("federated.update_dtype=bfloat16",), None),
        (("federated.update_dtype=int8", "federated.update_block=64"), Compression(dtype="int8", block=64)),
        ((*FEW[:2], *CLIENT), Compression(dtype="int4", block=64)),
        ((*FEW[:2], "federated.adapters=product"), Compression(dtype="int4", block=64)),
        (("federated.update_share=0.1",), Compression(dtype="float32", share=0.1)),
        ((*FEW, "federated.adapters=ffa"), Compression(dtype="int4", block=64, share=0.1)),
    ],
)
def test_it_is_in_the_plan_and_nothing_is_where_it_is_not_asked_for(settings, how):
    config = load("tiny", list(settings))
    plan = plan_terms(config)
    assert plan.compression == how
    assert ("compression" in plan.model_dump()) == (how is not None)
    assert plan_terms(config, compressed=False).compression is None


def test_runs_from_before_keep_their_digest_and_others_have_their_own():
    plain = config_digest(load("tiny", []))
    assert config_digest(load("tiny", ["federated.update_block=0", "federated.update_share=1"])) == plain
    digests = [config_digest(load("tiny", list(FEW[:count]))) for count in (2, 3)]
    assert len({plain, *digests}) == 3
