"""A federation on several machines, each with its own network, firewall, processes and mounts, and what it outlives."""

import json

import pytest

from privacy.certificate.check import check_certificate

RUN_S = 300.0
FAST = ("federated.local_steps=2", "privacy.epsilon=1", f"federated.round_timeout_s={RUN_S}")


def test_several_hosts_reach_a_certificate(federation):
    run = federation.run("first", "federated.rounds=3", "federated.min_silos=3", *FAST)
    assert run.wait(RUN_S) == 0, federation.logs()
    directory = federation.root / "runs" / "first" / "federated"
    certificate = json.loads((directory / "certificate.json").read_text())
    check_certificate(certificate, "certificate")
    assert set(certificate["silos"]) == set(federation.sites)
    assert [set(event["answered"]) for event in federation.rounds("first")] == [set(federation.sites)] * 3
