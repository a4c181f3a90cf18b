"""Updates that travel rounded: who may send them, what becomes of them, and who is told that he can't."""

import json

import numpy as np
import pytest
from signed_silos import InProcess, SignedSilo, adapter, coordinator

from configs.errors import PolicyRefusal
from federated.adapters.arrays import from_bytes
from federated.adapters.update_codec import encoded
from federated.coordinator import round_commits as commits
from federated.protocol.framing import PROTOCOL_VERSION, ROUNDED_VERSION

VALUE = 0.1234567  # neither type has it
SILOS = "federated.min_silos=1"


class Rounding(SignedSilo):
    """Answers in the type that is asked for."""

    versions = (PROTOCOL_VERSION, ROUNDED_VERSION)

    def answer(self, request, reply):
        if request.version not in self.versions:
            reply.refusal.rule, reply.refusal.message = "version", f"version: asked {request.version}, allowed 3"
            return
        super().answer(request, reply)
        if request.WhichOneof("kind") == "train":
            update = {name: np.full_like(array, VALUE) for name, array in adapter().items()}
            reply.trained.update = encoded(update, request.train.update_dtype or "float32")


class Earlier(Rounding):
    """Of the version before."""

    versions = (PROTOCOL_VERSION,)


def rounds(run):
    return [event for line in run.log.path.read_text().splitlines() if (event := json.loads(line))["event"] == "round"]


@pytest.mark.parametrize(("dtype", "off"), [("float32", 0.0), ("bfloat16", 2.0**-8), ("int8", 1 / 254)])
def test_a_rounds_mean_is_that_of_the_rounded_updates(tmp_path, dtype, off):
    run = coordinator(
        InProcess([Rounding("north"), Rounding("south")]), tmp_path, f"federated.update_dtype={dtype}", SILOS
    )
    run.run(adapter)
    made = from_bytes(commits.all_rounds(run.directory)[-1].adapter)
    for name, before in adapter().items():
        moved = made[name].astype(np.float64) - before
        assert np.abs(moved - 2 * VALUE).max() <= 2 * VALUE * off + 1e-6  # in two rounds
    assert len(rounds(run)) == 2


def test_a_silo_that_sends_another_type_is_rejected_alone(tmp_path):
    run = coordinator(
        InProcess([SignedSilo("north"), Rounding("south")]), tmp_path, "federated.update_dtype=int8", SILOS
    )
    run.run(adapter)
    assert [event["answered"] for event in rounds(run)] == [["south"], ["south"]]


def test_a_silo_of_the_version_before_is_named_with_the_setting(tmp_path):
    run = coordinator(InProcess([Earlier("north")]), tmp_path / "a", "federated.update_dtype=bfloat16", SILOS)
    with pytest.raises(
        PolicyRefusal, match=r"asked 4, allowed 3; federated\.update_dtype is 'bfloat16': have the silo"
    ):
        run.run(adapter)
    plain = coordinator(InProcess([Earlier("north")]), tmp_path / "b", SILOS)
    plain.run(adapter)  # what is not asked for changes no request
    assert len(rounds(plain)) == 2
