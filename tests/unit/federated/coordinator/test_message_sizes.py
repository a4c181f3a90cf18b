"""A run whose messages are too large for the line, or for a silo, is refused before anything is asked of a silo."""

import pytest
from signed_silos import InProcess, SignedSilo, adapter, coordinator

from configs.errors import InputError
from federated.protocol import silo_pb2 as pb


class Asked(SignedSilo):
    """Keeps what it was asked."""

    def handle(self, content):
        self.asked = [*getattr(self, "asked", []), content]
        return super().handle(content)


def test_the_line_is_looked_at_before_a_silo_is_asked(tmp_path):
    silos = [Asked("north"), Asked("south")]
    run = coordinator(InProcess(silos), tmp_path)
    run.carries_bytes = 1000
    with pytest.raises(InputError, match="the line between coordinator and silos carries at most"):
        run.run(adapter)
    assert not any(hasattr(silo, "asked") for silo in silos)
    assert not list((tmp_path / "run").glob("round-*")), "a commit would bind the folder to settings that can't be run"


def test_silos_are_told_the_size_of_the_largest_request_that_then_comes(tmp_path):
    silo = Asked("north")
    coordinator(InProcess([silo]), tmp_path, "federated.min_silos=1").run(adapter)
    requests = [pb.Request.FromString(pb.Envelope.FromString(content).body) for content in silo.asked]
    (told,) = {request.reserve.request_bytes for request in requests if request.WhichOneof("kind") == "reserve"}
    largest = max(len(content) for content in silo.asked)
    assert largest <= told < largest + 2**15
