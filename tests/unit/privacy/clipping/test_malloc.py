"""What a step frees stays with the process: the next one takes no new pages for it."""

import subprocess
import sys

import pytest

PROGRAM = """
import resource, sys
import numpy as np
from privacy.clipping.malloc import keep_freed_memory

if sys.argv[1] == "kept":
    keep_freed_memory()
rounds = []
for _ in range(8):
    before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    blocks = [np.ones(2**19) for _ in range(20)]  # 4 MiB each
    del blocks
    rounds.append(resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before)
print(min(rounds[2:]))
"""


@pytest.mark.skipif(sys.platform != "linux", reason="glibc's allocator")
def test_freed_blocks_cost_no_new_pages() -> None:
    faults = {
        way: int(subprocess.run([sys.executable, "-c", PROGRAM, way], capture_output=True, check=True).stdout)
        for way in ("given back", "kept")
    }
    assert faults["kept"] < 0.1 * faults["given back"], faults
