"""Which stored replies of an open run are kept.

A coordinator asks again for what comes after its newest sound commit: as a rule for one round, for two where that
commit is damaged, for more where a backup of its folder was put back. So the newest replies stay whatever their size,
and older ones while there is room. One that is gone is refused for good: its seed was erased when it was stored, and
its charge keeps the request's digest, so that nothing can be computed in its place.
"""

from collections.abc import Iterable

from configs.errors import PolicyRefusal
from privacy.ledger.runs import Body, Run

LEAST_KEPT = 4  # two rounds, each with its evaluation
KEPT_BYTES = 2**30  # bytes of a run's replies, the LEAST_KEPT newest among them


def too_old(run: Run, bodies: Iterable[Body]) -> list[int]:
    """The charges of a run whose stored replies are deleted. The reply that was released last is the newest."""
    charges = {body["number"] for body in run.charges}
    releases = [body for body in bodies if body["kind"] == "release" and body["charge"] in charges]
    found, size_bytes = [], 0
    for newer, body in enumerate(reversed(releases)):
        size_bytes += body["reply_bytes"]
        if newer >= LEAST_KEPT and size_bytes > KEPT_BYTES:
            found.append(body["charge"])
    return found


def gone(run: Run, charge: int, bodies: Iterable[Body]) -> PolicyRefusal:
    """Why a charge has neither seed nor reply."""
    if run.closing is not None:
        return PolicyRefusal.of(
            "closed", run.name, "an open run", f"run {run.name} is closed and its replies are deleted"
        )
    if any(body["kind"] == "release" and body["charge"] == charge for body in bodies):
        words = f"the reply of charge {charge} made room for newer ones; it stays spent, and is never computed again"
        return PolicyRefusal.of("reply", f"charge {charge}", "the newest replies of a run", words)
    # A backup, which holds no seeds, was put back.
    return PolicyRefusal.of("seed", run.name, "a kept seed", f"charge {charge} has lost its seed; it stays spent")
