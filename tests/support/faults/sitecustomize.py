"""Faults in a rank, by files in SILOWEAVE_TEST_FAULTS: put on PYTHONPATH, it patches real Ray workers from inside.

`slow` holds every step up; `raise-1`, `hang-1`, `nan-1` hit rank 1 once and are gone then. `later`, which names ranks,
has the time pass that makes a hang, for their driver: in parts, before each of which all of them have answered anew.
"""

import os
import sys
import threading
import time
from pathlib import Path


def watch():
    faults = Path(os.environ["SILOWEAVE_TEST_FAULTS"])
    while not hasattr(sys.modules.get("trainer.pretraining.loop"), "_resume"):  # the module's last name
        time.sleep(0.05)
    causal = sys.modules["trainer.objectives.causal"].Causal
    original = causal.sums

    def faulty(self, model, inputs):
        if not model.training:
            return original(self, model, inputs)
        if (faults / "slow").exists():
            time.sleep(0.4)
        fault = next(faults.glob(f"*-{os.environ['RANK']}"), None)
        if fault is None:
            return original(self, model, inputs)
        fault.unlink()
        if fault.name.startswith("raise"):
            raise ValueError("injected")
        if fault.name.startswith("hang"):
            time.sleep(10**6)
        return original(self, model, inputs) * float("nan")

    causal.sums = faulty


def pass_time():
    later = Path(os.environ["SILOWEAVE_TEST_FAULTS"]) / "later"
    while not hasattr(sys.modules.get("cluster.runtime.watch"), "_failure"):
        time.sleep(0.05)
    watch = sys.modules["cluster.runtime.watch"]
    original, passed = watch.Watch._check_hang, {}

    def check(self, now):
        if later.exists():
            since = passed.setdefault(self, now)
            if all(self._heard[int(rank)].answered > since for rank in later.read_text().split()):
                passed[self] = now
                for heard in self._heard:  # less than what makes a rank mute
                    heard.moved -= 0.4 * self._hang_timeout_s
                    heard.answered -= 0.4 * self._hang_timeout_s
        try:
            original(self, now)
        except watch.RankFailed:
            later.unlink(missing_ok=True)
            raise

    watch.Watch._check_hang = check


if any(argument.endswith("/siloweave") for argument in sys.orig_argv):
    threading.Thread(target=pass_time, daemon=True).start()
if any("default_worker" in argument for argument in sys.orig_argv):
    threading.Thread(target=watch, daemon=True).start()
