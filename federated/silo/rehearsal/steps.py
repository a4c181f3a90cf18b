"""The process that takes steps on made-up records: a round as the silo takes it, as far as time and memory go.

It is given the silo's settings and a request, and prints seconds. Of the last two rounds one has one step, the other
several: what they differ by are steps. Others come before them, to warm up, and to see how many records there is time
for.
"""

import json
import resource
import sys
import time
from contextlib import suppress
from pathlib import Path
from typing import Any

from configs.printing import say

_MOST_RECORDS = 32  # of a step; a larger one takes as much longer
_FEWEST, _MOST = 3, 32  # steps: many short ones, so that what else the machine does evens out
_FOR_RECORDS_S, _FOR_STEPS_S = 20.0, 4.0
_ALL = 1 - 2.0**-53  # a sampling rate at which all are drawn
_WANTS_MEMORY = ("alloc", "failed to map", "can't start new thread")


def main() -> None:
    """Reads one line of JSON and then a serialized ``Train`` from standard input."""
    given = json.loads(sys.stdin.buffer.readline())
    train = sys.stdin.buffer.read()
    with suppress(OSError):
        Path("/proc/self/oom_score_adj").write_text("1000")  # where memory is short this process goes, and not the silo
    resource.setrlimit(resource.RLIMIT_DATA, (given["most_bytes"], given["most_bytes"]))
    from configs.errors import PolicyRefusal

    try:
        found = _taken(given, train)
    except PolicyRefusal as refusal:
        said = {"rule": refusal.rule, "asked": refusal.asked, "allowed": refusal.allowed, "message": str(refusal)}
        found = {"refusal": said}
    except (MemoryError, RuntimeError, OSError, ImportError) as error:
        if not isinstance(error, MemoryError) and not any(word in str(error).lower() for word in _WANTS_MEMORY):
            raise
        found = {"outcome": "memory"}
    say(json.dumps(found))


def _taken(given: dict[str, Any], content: bytes) -> dict[str, Any]:
    import logging

    from configs.parse import parse
    from configs.schema.silo import SiloConfig
    from federated.protocol import silo_pb2 as pb
    from federated.silo.local_training import PrivateUpdate
    from federated.silo.units import Units
    from federated.silo.workbench import Workbench, public_base_model
    from privacy.mechanism.streams import SEED_BYTES, Streams
    from privacy.plan import PlanTerms, PrivacyPlan
    from trainer.data.reading.counts import ReadCounts
    from trainer.tasks.task import longest_shape

    config, plan = parse(SiloConfig, given["config"], "rehearsal"), parse(PlanTerms, given["plan"], "rehearsal")
    train = pb.Train.FromString(content)
    bench = Workbench(config, public_base_model(config), Units((), (), ReadCounts()), logging.getLogger())
    model, adapter = bench.fitted(train, config.policy)
    settings, task = bench.local_settings(train, config.policy), bench.examples(train).task
    expected = max(1, round(plan.sampling_rate * config.silo.public_record_count))
    units = [(one,) for one in task.made_up(longest_shape(task), min(_MOST_RECORDS, expected))]

    def seconds(steps: int, records: int) -> float:
        few = plan.model_copy(
            update={"sampling_rate": _ALL, "rounds": 1, "steps_per_round": steps, "metric_releases": ()}
        )
        began = time.perf_counter()
        update = PrivateUpdate(PrivacyPlan(terms=few, public_record_count=expected), model, task, adapter, settings)
        update.run(Streams(bytes(SEED_BYTES), "00" * 32), units[:records])
        return time.perf_counter() - began

    seconds(1, 1)
    affordable = int(_FOR_RECORDS_S / (1 + _FEWEST) / seconds(1, 1))
    records = max(1, min(affordable, len(units)))
    seconds(1, records)  # the first time of so many at once
    one = seconds(1, records)
    steps = max(_FEWEST, min(_MOST, int(_FOR_STEPS_S / one)))
    step = max(seconds(steps, records) - one, 0.0) / (steps - 1)
    prepare = max(one - step, 0.0)
    return {"outcome": "done", "records": records, "prepare_seconds": prepare, "step_seconds": step}


if __name__ == "__main__":
    main()
