"""``siloweave status``: how far a run is, from its manifests and events alone, while it goes on or after.

Nothing is started, locked or written, and no ledger is opened: anyone who may read the run's folder may look. One looks
when something is broken, so what can't be read is said in one line, and the rest is shown.
"""

import statistics
import time
from functools import partial
from pathlib import Path
from typing import Any

from rich.cells import cell_len

from cluster.monitoring.durations import duration
from configs.errors import InputError
from configs.events import is_number
from configs.parse import parse, read_toml
from configs.salvage import Salvage, read_json
from configs.schema.schema import RunConfig
from configs.storage.layout import FEDERATED, NO_DP, RunFiles
from configs.storage.manifests import MANIFEST, read_manifest
from configs.storage.storage import COMMITTED
from privacy.certificate.certificate import ledgers_of
from trainer.checkpoints import checkpoints

_TROUBLES = ("restart", "rollback", "damaged", "refused", "rejected", "timeout", "lost", "failed")
_RECENT = 20


def status(directory: Path) -> dict[str, Any]:
    """How far a run is.

    Args:
        directory: the run's directory.

    Returns:
        A tree: ``stages`` in order (``waiting``, ``started``, ``failed`` or ``done``), ``pretrain``, ``federated``,
        ``tune`` (None where nothing was searched), ``troubles``, ``last_event``, and ``unreadable``, a line for each
        file that can't be read. A stage that was killed looks like one that goes on: its last event gets old.

    Raises:
        InputError: there is no run.
    """
    files, salvage = RunFiles(directory), Salvage()
    if not salvage.tried(files.config, files.config.exists, otherwise=True):
        raise InputError(f"{directory}: no run here; give a run's directory, or its configuration with -c")
    config = salvage.tried(files.config, lambda: parse(RunConfig, read_toml(files.config), str(files.config)), None)
    events = salvage.events(files.events)
    pretrain = _pretrain(config, files, events, salvage)
    return {
        "run": config.run.name if config else directory.absolute().name,
        "directory": str(directory.absolute()),
        "stages": _stages(config, files, events, pretrain, salvage),
        "pretrain": pretrain,
        "federated": _federated(config, files, events, salvage),
        "tune": salvage.tried(files.tune_report, lambda: _tune(files.tune_report), None),
        "troubles": [_trouble(event) for event in events if event["event"] in _TROUBLES],
        "last_event": _last(events),
        "unreadable": salvage.problems,
    }


def _stages(
    config: RunConfig | None,
    files: RunFiles,
    events: list[dict[str, Any]],
    pretrain: dict[str, Any],
    salvage: Salvage,
) -> dict[str, dict[str, Any]]:
    def has(stage: Path) -> bool:
        return salvage.tried(stage / MANIFEST, lambda: _has(stage), otherwise=False)

    pretrained = pretrain["steps"] is not None and pretrain["committed_step"] == pretrain["steps"]
    if config is not None and config.model.source:
        done = {"import": has(files.model)}
    else:
        done = {"prepare": has(files.corpus), "pretrain": pretrained, "export": has(files.model)}
    done[FEDERATED] = has(files.federated)
    if config is None or config.evaluate.without_dp:
        done[NO_DP] = has(files.no_dp)
    written = {"evaluate": files.evaluation, "generate": files.sample, "show": files.showcase, "report": files.report}
    if not files.showcase.is_file() and all(event["stage"] != "show" for event in events):
        del written["show"]  # most runs have no prompts to show answers to
    done.update({stage: salvage.tried(path, path.is_file, otherwise=False) for stage, path in written.items()})
    return {stage: _stage(stage, events, done=finished) for stage, finished in done.items()}


def _stage(stage: str, events: list[dict[str, Any]], *, done: bool) -> dict[str, Any]:
    states = {"start": "started", "end": "done", "failed": "failed"}
    mine = [event for event in events if event["stage"] == stage and event["event"] in states]
    last = states[mine[-1]["event"]] if mine else "waiting"
    # What lies there decides; where it was deleted, its `end` is still among the events.
    state = "done" if done else "waiting" if last == "done" else last
    seconds = sum(event["seconds"] for event in mine if event["event"] == "end")
    return {"state": state, "seconds": round(seconds, 2)}


def _has(stage: Path) -> bool:
    """Whether a stage has finished; its manifest's kind is its folder's name."""
    return read_manifest(stage, stage.name) is not None if (stage / MANIFEST).exists() else False


def _pretrain(
    config: RunConfig | None, files: RunFiles, events: list[dict[str, Any]], salvage: Salvage
) -> dict[str, Any]:
    mine = [event for event in events if event["stage"] == "pretrain"]
    steps = [event for event in mine if event["event"] == "step"]
    checks = [event for event in mine if event["event"] == "validation"]
    commits = [event["time"] for event in mine if event["event"] == "commit"]
    last, recent = steps[-1] if steps else {}, steps[-_RECENT:]
    restarts = sum(event["event"] == "restart" for event in mine)
    total = config.pretrain.steps if config else last.get("steps")
    seconds = _median([event["seconds"] for event in recent])
    return {
        "step": last.get("step", 0),
        "steps": total,
        "training_stage": last.get("training_stage"),
        "committed_step": _committed_step(config, files, salvage),
        "loss": last.get("loss"),
        "tokens_per_s": _median([event["tokens"] / event["seconds"] for event in recent]),
        "gflop_per_s": _median([event["gflop_per_s"] for event in recent if event.get("gflop_per_s") is not None]),
        "mfu": _median([event["mfu"] for event in recent if event.get("mfu") is not None]),
        "memory_bytes": last.get("peak_memory_bytes"),
        "gpu_memory_bytes": last.get("gpu_memory_bytes"),
        "seconds_left": None if seconds is None or total is None else seconds * (total - last["step"]),
        "validation_bits_per_char": checks[-1].get("bits_per_char") if checks else None,
        "last_commit_age_s": round(max(time.time() - commits[-1], 0), 1) if commits else None,
        "restarts": restarts,
        # One more than the restarts where the last failure was one too many.
        "failures": restarts + sum((e["event"], e.get("error")) == ("failed", "SiloweaveError") for e in mine),
    }


def _median(values: list[float]) -> float | None:
    return statistics.median(values) if values else None


def _tune(path: Path) -> dict[str, Any] | None:
    if not path.exists():
        return None
    found = read_json(path)
    states, best = [str(trial["status"]) for trial in found["trials"]], found["best"]
    if best:
        best["number"]  # is shown: a KeyError or TypeError says that the file is not ours
    return {"trials": {state: states.count(state) for state in sorted(set(states))}, "best": best}


def _federated(
    config: RunConfig | None, files: RunFiles, events: list[dict[str, Any]], salvage: Salvage
) -> dict[str, Any]:
    rounds = [event for event in events if (event["stage"], event["event"]) == (FEDERATED, "round")]
    committed = _committed(files.federated, "round", "round", salvage)
    last = rounds[-1] if rounds else {}
    return {
        "round": last.get("round", 0),
        "rounds": config.federated.rounds if config else last.get("rounds"),
        "committed_round": committed,
        "answered": last.get("answered", []),
        "silos": _silos(files, committed, rounds, salvage),
    }


def _silos(
    files: RunFiles, committed: int | None, rounds: list[dict[str, Any]], salvage: Salvage
) -> dict[str, dict[str, Any]]:
    """What each silo's newest receipt says, and its charged rounds: as it states them, until then those it answered.

    A reservation is spent whole, whatever number of its rounds is charged: ledgers refund nothing.
    """

    def shown(path: Path, certified: bool) -> dict[str, dict[str, Any]]:
        told = ledgers_of(read_json(path)) if certified else read_json(path)
        return {name: _silo(name, silo, rounds) for name, silo in sorted(told.items()) if "receipt" in silo}

    path = files.certificate
    if found := salvage.tried(path, lambda: shown(path, certified=True) if path.exists() else {}, {}):
        return found
    newest = files.federated / f"round-{committed or 0:05d}" / "silos.json"
    return salvage.tried(newest, lambda: shown(newest, certified=False), {}) if committed is not None else {}


def _silo(name: str, silo: dict[str, Any], rounds: list[dict[str, Any]]) -> dict[str, Any]:
    receipt = silo["receipt"]
    newest = {event["round"]: event for event in rounds}  # a restart may do the last one again
    answered = sum(event.get("updates", dict.fromkeys(event["answered"], 1)).get(name, 0) for event in newest.values())
    figures = {
        "epsilon_reserved": receipt["epsilon_reserved"],
        "epsilon_left": receipt["epsilon_left"],
        "rounds_charged": silo.get("statement", {}).get("rounds_charged", answered),
    }
    if not all(map(is_number, figures.values())):
        raise TypeError("no figures")
    return {**figures, "delta_reserved": receipt.get("delta_reserved"), "stated": "statement" in silo}


def _committed_step(config: RunConfig | None, files: RunFiles, salvage: Salvage) -> int | None:
    """Checkpoints go straight to an object store where there is one; it is asked for their names."""
    if config is None or config.run.url is None:
        return _committed(files.checkpoints, "step", "checkpoint", salvage)
    kept = checkpoints.storage(config, files.directory)
    return salvage.tried(files.checkpoints, lambda: max(checkpoints.steps(kept), default=None), None)


def _committed(root: Path, unit: str, kind: str, salvage: Salvage) -> int | None:
    """The newest committed step or round that can be read; None where there is none."""

    def number(directory: Path) -> int | None:
        manifest = read_manifest(directory, kind, name=COMMITTED)
        return None if manifest is None else int(manifest.metadata[unit])

    for directory in sorted(salvage.tried(root, lambda: list(root.glob(f"{unit}-*")), []), reverse=True):
        found = salvage.tried(directory / COMMITTED, partial(number, directory), None)
        if found is not None:
            return found
    return None


def _trouble(event: dict[str, Any]) -> dict[str, Any]:
    named = {key: value for key, value in event.items() if key not in ("time", "stage", "event")}
    detail = event.get("message") or event.get("cause") or ", ".join(f"{key} {value}" for key, value in named.items())
    return {"time": event["time"], "stage": event["stage"], "event": event["event"], "detail": str(detail)}


def _last(events: list[dict[str, Any]]) -> dict[str, Any] | None:
    if not events:
        return None
    event = events[-1]
    age_s = round(max(time.time() - event["time"], 0), 1)
    return {"time": event["time"], "age_s": age_s, "stage": event["stage"], "event": event["event"]}


def lines(found: dict[str, Any]) -> list[str]:
    """The same for people."""
    pretrain, federated, last = found["pretrain"], found["federated"], found["last_event"]
    rows = [f"{found['run']} in {found['directory']}"]
    for stage, value in found["stages"].items():
        note = {"pretrain": _pretrain_note(pretrain), "federated": _federated_note(federated)}.get(stage, "")
        seconds = f"{value['seconds']:,.0f} s" if value["seconds"] else ""
        rows.append(f"  {stage:16}{value['state']:9}{seconds:>9}  {note}".rstrip())
    total = _total(federated["rounds"])
    for name, silo in federated["silos"].items():
        rows.append(
            f"    {name}{' ' * (14 - cell_len(name))}"  # some letters are two columns wide
            f"epsilon {silo['epsilon_reserved']:.3g} reserved, {silo['epsilon_left']:.3g} left, "
            f"{'' if silo['stated'] else 'at least '}{silo['rounds_charged']} of {total} rounds charged"
        )
    if found["tune"]:
        trials = ", ".join(f"{number} {state}" for state, number in found["tune"]["trials"].items())
        best = found["tune"]["best"]
        rows.append(f"  tune: trials {trials}" + (f"; best so far: {best['number']}" if best else ""))
    troubles = found["troubles"]
    rows += [f"  {trouble['stage']}: {trouble['event']}: {trouble['detail']}" for trouble in troubles[-5:]]
    if len(troubles) > 5:
        rows.append(f"  and {len(troubles) - 5} earlier; see events.jsonl")
    rows += [f"  unreadable: {problem}" for problem in found["unreadable"]]
    when = f"{last['age_s']:,.0f} s ago ({last['stage']}: {last['event']})" if last else "none yet"
    return [*rows, f"  last event: {when}"]


def _pretrain_note(pretrain: dict[str, Any]) -> str:
    if not pretrain["step"]:
        return ""
    parts = [
        f"step {pretrain['step']}/{_total(pretrain['steps'])}",
        *([f"stage {pretrain['training_stage']}"] if pretrain["training_stage"] else []),
        f"committed {pretrain['committed_step'] or 0}",
        f"loss {pretrain['loss']:.3f}",
        f"{pretrain['tokens_per_s']:,.0f} tokens/s",
    ]
    if pretrain["gflop_per_s"]:
        share = f" ({100 * pretrain['mfu']:.1f}% of the peak)" if pretrain["mfu"] else ""
        parts.append(f"{pretrain['gflop_per_s']:,.3g} GFLOP/s{share}")
    if pretrain["validation_bits_per_char"]:
        parts.append(f"validation {pretrain['validation_bits_per_char']:.3f} bits per character")
    if pretrain["seconds_left"] is not None and pretrain["step"] < pretrain["steps"]:
        parts.append(f"{duration(pretrain['seconds_left'])} left")
        if pretrain["last_commit_age_s"] is not None:
            parts.append(f"last commit {duration(pretrain['last_commit_age_s'])} ago")
    if pretrain["failures"]:
        parts.append(f"failures {pretrain['failures']}, restarts {pretrain['restarts']}")
    return ", ".join(parts)


def _federated_note(federated: dict[str, Any]) -> str:
    if not federated["round"]:
        return ""
    return f"round {federated['round']}/{_total(federated['rounds'])}, {len(federated['answered'])} silos answered"


def _total(number: int | None) -> str:
    """Of steps or rounds; it is not known where the settings can't be read."""
    return "?" if number is None else str(number)
