"""The PRV accountant that comes without torch is Opacus' own."""

import subprocess
import sys

import pytest
from opacus.accountants import PRVAccountant

from privacy.accounting.opacus_prv import prv_accountant

ALONE = """
import sys
from privacy.accounting.accountant import guarantee
from privacy.accounting.schedule import Schedule
found = guarantee(Schedule(36, 0.03, 0.8, releases=((20.0, 3),)), 1e-5)
assert found.epsilon_prv is not None and found.epsilon_rdp is not None
assert not {"torch", "opacus"} & set(sys.modules)
from opacus.accountants import PRVAccountant  # whoever asks for all of Opacus has it
"""


@pytest.mark.parametrize("history", [[(0.8, 0.03, 36)], [(1.0, 0.01, 1000), (20.0, 1.0, 3)]])
def test_it_gives_what_opacus_gives(history):
    found = []
    for kind in (PRVAccountant, prv_accountant()):
        accountant = kind()
        accountant.history = list(history)
        found.append(accountant.get_epsilon(1e-5))
    assert found[0] == found[1] > 0


def test_a_guarantee_is_had_without_torch():
    done = subprocess.run([sys.executable, "-c", ALONE], capture_output=True, text=True, timeout=300, check=False)
    assert done.returncode == 0, done.stderr
