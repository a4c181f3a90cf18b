"""The end of a run: what silos have stated stays, whoever is away later, and whatever is lost before the last round."""

import shutil

import pytest
from model_parts import FILES
from signed_silos import InProcess, SignedSilo, adapter, coordinator

from federated import commits
from privacy.certificate_check import check_certificate


@pytest.mark.parametrize("restarted", [False, True])
def test_a_lost_early_round_costs_neither_the_close_nor_the_certificate(tmp_path, monkeypatch, restarted):
    """Before: budgets were spent, no silo was asked to close, and no certificate could be made."""
    silos, save = [SignedSilo("one"), SignedSilo("two")], commits.save

    def loses(directory, digest, commit, *rest):
        if commit.round_number == 3 and restarted:
            raise KeyboardInterrupt
        save(directory, digest, commit, *rest)
        if commit.round_number == 2:
            shutil.rmtree(directory / "round-00001")
        return commit

    monkeypatch.setattr(commits, "save", loses)
    one = coordinator(InProcess(silos), tmp_path, "federated.rounds=3")
    if restarted:
        with pytest.raises(KeyboardInterrupt):
            one.run(adapter)
        monkeypatch.setattr(commits, "save", save)
        one = coordinator(InProcess(silos), tmp_path, "federated.rounds=3")
    one.run(adapter)
    document = one.certify_model(FILES)
    check_certificate(document, "test")
    assert len(document["model"]["rounds"]) == 3
    assert all("statement" in silo for silo in document["silos"].values())
