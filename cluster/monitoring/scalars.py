"""The figures of an event that are worth a curve: what TensorBoard, MLflow and Prometheus show alike."""

from typing import Any

_STEP = ("loss", "learning_rate", "gflop_per_s", "mfu", "memory_bytes", "peak_memory_bytes", "gpu_memory_bytes")


def scalars(event: dict[str, Any]) -> dict[str, float]:
    """An event's figures by name; none where it has none. Nothing is in them that ``events.jsonl`` does not hold."""
    if event["event"] == "step":
        rate = event["tokens"] / event["seconds"]
        known = {name: event[name] for name in _STEP if event.get(name) is not None}
        return {**known, "tokens_per_s": rate}
    if event["event"] == "validation":
        return {f"validation_{name}": event[name] for name in ("loss", "bits_per_char") if name in event}
    if event["event"] == "private_evaluation":
        names = ("bits_per_char", "accuracy", "macro_f1")
        return {f"private_{name}": event[name] for name in names if event.get(name) is not None}
    if event["event"] == "round":
        left = event.get("epsilon_left")
        found = {"silos": len(event["answered"]), "bytes": event["bytes"], "seconds": event["seconds"]}
        found |= {"stalest": event["stalest"]} if "stalest" in event else {}
        return found if left is None else {**found, "epsilon_left": left}
    if event["event"] == "restart":
        return {"failures": event["attempt"]}
    return {}


def position(event: dict[str, Any]) -> int | None:
    """The step or round that an event belongs to."""
    found = event.get("step", event.get("round"))
    return None if found is None else int(found)
