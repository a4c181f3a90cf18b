"""The process that takes steps on made-up records: a round as the silo takes it, as far as time and memory go.

It is given the silo's settings and a request, and prints seconds: of a round without its batches, of passes over
records of a few lengths and numbers, and so of a step whose batch is as ``batches.py`` has it.
"""

import json
import mmap
import resource
import sys
import time
from collections.abc import Callable, Iterable, Sequence
from contextlib import suppress
from pathlib import Path
from statistics import mean
from typing import Any

from configs.printing import say

_FOR_PROOFS_S, _FOR_PASSES_S = 4.0, 12.0  # the proof after the last one takes twice as long as all before
_REPEATED_S, _MOST_REPEATED = 0.2, 10
_STEPS = 9  # without records, which take milliseconds
_WANTS_MEMORY = ("alloc", "failed to map", "can't start new thread")
_RESERVE = 2**25  # bytes that are never written to: room for whatever has to be said where no other is left


def main() -> None:
    """Reads one line of JSON and then a serialized ``Train`` from standard input."""
    given = json.loads(sys.stdin.buffer.readline())
    train = sys.stdin.buffer.read()
    with suppress(OSError):
        Path("/proc/self/oom_score_adj").write_text("1000")  # where memory is short this process goes, and not the silo
    _, hard = resource.getrlimit(resource.RLIMIT_DATA)  # the service's own unit may have set a lower one
    most = given["most_bytes"] + _RESERVE
    most = most if hard == resource.RLIM_INFINITY else min(most, hard)
    resource.setrlimit(resource.RLIMIT_DATA, (most, most))
    reserve = _taken_up(_RESERVE)
    from configs.errors import PolicyRefusal

    try:
        found = _taken(given, train)
    except PolicyRefusal as refusal:
        said = {"rule": refusal.rule, "asked": refusal.asked, "allowed": refusal.allowed, "message": str(refusal)}
        found = {"refusal": said}
    except Exception as error:
        reserve.close()
        if not _wants_memory(error):
            raise
        found = {"outcome": "memory"}
    say(json.dumps(found))


def _taken_up(size: int) -> mmap.mmap:
    return mmap.mmap(-1, size, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)


def _wants_memory(error: Exception) -> bool:
    """Whether an error came for want of memory.

    Python, and libraries in a half-made import, say all kinds of things then; so what is left counts, too.
    """
    if isinstance(error, MemoryError) or any(word in str(error).lower() for word in _WANTS_MEMORY):
        return True
    try:
        _taken_up(2 * _RESERVE).close()
    except OSError:
        return True
    return False


def _taken(given: dict[str, Any], content: bytes) -> dict[str, Any]:
    import logging

    from configs.parse import parse
    from configs.schema.silo import SiloConfig
    from federated.protocol import silo_pb2 as pb
    from federated.silo.local_training import PrivateUpdate
    from federated.silo.rehearsal.batches import batch_seconds
    from federated.silo.units import Units
    from federated.silo.workbench import Workbench, public_base_model
    from privacy.mechanism.streams import SEED_BYTES, Streams
    from privacy.plan import PlanTerms, PrivacyPlan
    from trainer.data.reading.counts import ReadCounts
    from trainer.tasks.task import shapes

    config, plan = parse(SiloConfig, given["config"], "rehearsal"), parse(PlanTerms, given["plan"], "rehearsal")
    train, records = pb.Train.FromString(content), config.silo.public_record_count
    bench = Workbench(config, public_base_model(config), Units((), (), ReadCounts()), logging.getLogger())
    settings, task = bench.local_settings(train, config.policy), bench.examples(train).task

    def round_s(steps: int) -> float:
        """A round of which no record has anything to learn: whatever its steps take but for their batches."""
        few = plan.model_copy(update={"rounds": 1, "steps_per_round": steps, "metric_releases": ()})
        began = time.perf_counter()
        model, adapter = bench.fitted(train, config.policy)
        update = PrivateUpdate(PrivacyPlan(terms=few, public_record_count=records), model, task, adapter, settings)
        update.run(Streams(bytes(SEED_BYTES), "00" * 32), [()] * records)
        return time.perf_counter() - began

    first = round_s(1)
    one = mean(round_s(1) for _ in range(3))
    step = max(round_s(_STEPS) - one, 0.0) / (_STEPS - 1)
    model, _ = bench.fitted(train, config.policy)
    there, expected = shapes(task), max(1.0, plan.sampling_rate * records)
    passes = _passes(model, task, there, settings, plan.max_grad_norm)
    batch, proofs = batch_seconds(expected, list(map(_tokens, there)), passes, plan.steps)
    return {
        "outcome": "done",
        "records": round(expected),
        "prepare_seconds": max(one - step, 0.0),
        "step_seconds": step + batch,
        "first_seconds": max(first - one, 0.0) + proofs,
    }


def _passes(
    model: Any, task: Any, there: Sequence[Any], settings: Any, max_grad_norm: float
) -> dict[int, dict[int, float]]:
    """Seconds of passes over made-up records of the longest, the shortest and a middle shape, by tokens and by size."""
    from privacy.clipping.clipping import clipping
    from privacy.clipping.independence import Together
    from trainer.device import beside

    def losses(units: Sequence[Any]) -> Any:
        return task.record_losses(model, task.collate(units))

    with beside(model), clipping(model.train(), max_grad_norm, settings.clipping) as clipper:
        together = Together(clipper, losses, task.shape, task.made_up, settings.micro_batch_size)
        sizes = _proven(together.sizes(there[0]))

        def seconds(shape: Any, size: int) -> float:
            units = task.made_up(shape, size)
            return _repeated(lambda: clipper.accumulate(losses, units))

        chosen = [there[place] for place in sorted({0, len(there) // 2, len(there) - 1})]
        return _within(_FOR_PASSES_S, reversed(chosen), sizes, seconds)


def _proven(sizes: Iterable[int]) -> list[int]:
    """As many as are proven in time. Where a pass takes that long, one of more records takes as much longer."""
    began, found = time.perf_counter(), list[int]()
    for size in sizes:
        found.append(size)
        if time.perf_counter() - began > _FOR_PROOFS_S:
            break
    return found


def _within(
    most_s: float, shapes: Iterable[Any], sizes: Sequence[int], seconds: Callable[[Any, int], float]
) -> dict[int, dict[int, float]]:
    """The passes for which there is time, the longest records first; one of more records takes as much longer."""
    began, found = time.perf_counter(), dict[int, dict[int, float]]()
    for shape in shapes:
        of_shape = found[_tokens(shape)] = {}
        for size in sizes:
            largest = max(of_shape, default=0)
            as_long = of_shape[largest] * size / largest if largest else 0.0
            late = largest and time.perf_counter() - began + 2 * as_long > most_s
            of_shape[size] = as_long if late else seconds(shape, size)
    return found


def _repeated(call: Callable[[], object]) -> float:
    """Mean seconds of a call, but for the first, which readies what the others find."""
    call()
    taken = list[float]()
    while not taken or (sum(taken) < _REPEATED_S and len(taken) < _MOST_REPEATED):
        began = time.perf_counter()
        call()
        taken.append(time.perf_counter() - began)
    return mean(taken)


def _tokens(shape: Any) -> int:
    return sum(shape) if isinstance(shape, tuple) else int(shape)


if __name__ == "__main__":
    main()
