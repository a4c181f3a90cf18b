"""What an audit says where no silo has both a training and a held-out record."""

import numpy as np

from cluster.checks.audit import roc_of, summary
from privacy.audit.attacks import membership_figures


def test_an_attack_without_records_is_not_available():
    figures = membership_figures(np.empty(0), np.empty(0))
    membership = {"simulation_only": True, "federated": {"loss": figures}}
    lines = summary({"claims": {}, "hostile_adapters": [], "membership": membership})
    assert lines == ["federated, loss: not available: no silo has a training and a held-out record"]
    drawn = roc_of(membership)
    assert "AUC not available" in drawn
    assert "mathdefault" not in drawn  # before: every tick was a formula's source
