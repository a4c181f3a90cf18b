"""What was heard of a site, as findings: each holds, or has its fix in one line; and what a round will take there."""

import re
from collections.abc import Iterable
from dataclasses import dataclass, field
from statistics import median

from configs.findings import Finding
from configs.schema.federated import FederatedSettings
from configs.schema.schema import RunConfig
from federated.coordinator.rehearsal.rehearsal import AGAIN, FACTS, REPLY, REQUEST, TRIAL, Heard
from federated.coordinator.schedule.mail import pause_s
from federated.protocol.clocks import CLOCK_RULE, MOST_AHEAD_S, MOST_BEHIND_S

_DIGITS = 12  # of a digest, for people
_MEGABIT = 1e6 / 8
_AT_THE_SITE = (
    "at the site give `siloweave silo relay -c relay.toml --check`, which names proxy, certificate or clock; if it "
    "finds nothing, start `siloweave silo relay`"
)
_SERVICE = (
    "at the site start `siloweave silo serve`, which says what it lacks (a column or a label of the records, too)"
)
_LOGS = "make room on the disk of the silo's state_dir: it answers nothing that it can't write down before"
_FAILED = "see silo.log in the silo's state_dir: it says why; mend that, and give the command again"
_UPGRADE = "older version: upgrade the site to this one"
_BY_WORDS = (
    ("no reply can leave", "disk", _LOGS),
    ("failure: FAILED", "service", _FAILED),
    ("its service at", "service", _SERVICE),
)
_POLICY = "ask the silo's steward to allow it, or change the run's settings"
_FIXES = {  # by what a refusal begins with
    "base_model": "copy this run's base model to the site, name it in silo.base_model and start the service again",
    "task": "agree on one: federated.task here, policy.tasks there, then start the service again",
    "labels": "agree on them and their order: federated.labels here, policy.labels (and data.labels) there",
    "template": "agree on it: federated.template here, policy.template there, whose fields data.columns names",
    "pooling": "agree on it: federated.pooling here, policy.pooling there",
    "max_epsilon_per_run": "lower privacy.epsilon, or ask the steward to raise policy.max_epsilon_per_run",
    "budget_epsilon": "lower privacy.epsilon, or ask the steward to raise policy.budget_epsilon",
    "max_request_bytes": "ask the steward to raise policy.max_request_bytes and start the service again",
    "rollback": "ask the steward for `siloweave silo budget reconcile`",
    "expires": f"set the clock that is wrong; {CLOCK_RULE}",
    "queue": "give the command again when the silo has finished what it does",
    "rehearsal": "give the command again when the silo has finished what it does, or tomorrow",
    "roster": "have each steward confirm the others by `siloweave silo roster --add`, and enrol the same silos here",
    "mandate": "ask the steward for a mandate that covers the run, and name its study by federated.study",
    "coordinator": "ask the steward for `siloweave silo trust` with this federation's coordinator.json",
}
_OF_STEPS = {
    "memory": Finding(
        "memory",
        ok=False,
        found="too little for a step",
        fix="give the site's machine more memory, or lower silo.micro_batch_size there or federated.lora_rank here",
    ),
    "slow": Finding(
        "steps",
        ok=False,
        found="a few of them take more than a minute",
        fix="lower privacy.sampling_rate, or give a smaller base model or a faster machine",
    ),
    "failed": Finding("steps", ok=False, found="they failed", fix="see silo.log in the silo's state_dir: it says why"),
}
_OF_SETTINGS = {"base_model": "base model", "task": "task", "labels": "labels", "template": "columns"}


@dataclass(frozen=True)
class Prediction:
    """What a round takes at one site.

    Attributes:
        latency_s: of a short message there and back.
        down_s: of a round's request.
        up_s: of a round's reply.
        prepare_s: before the first step.
        step_s: of a step with the expected number of records, whose lengths are spread evenly.
        first_s: once in a run, in its first rounds: the model is loaded, and proofs are made.
        steps: of a round.
        request_bytes: of a round.
        reply_bytes: of a round.
    """

    latency_s: float
    down_s: float
    up_s: float
    prepare_s: float
    step_s: float
    first_s: float
    steps: int
    request_bytes: int
    reply_bytes: int

    @property
    def seconds(self) -> float:
        """Of a whole round: the line, the silo's work, and half a pause, on average, until the coordinator looks."""
        work = self.prepare_s + self.steps * self.step_s
        return self.latency_s + self.down_s + work + pause_s(work) / 2 + self.up_s


@dataclass(frozen=True)
class Site:
    """One site.

    Attributes:
        name: the silo's.
        required: whether the run can't do without it.
        findings: what was looked at.
        prediction: nothing where the trial was not reached.
    """

    name: str
    required: bool
    findings: list[Finding] = field(default_factory=list)
    prediction: Prediction | None = None

    @property
    def go(self) -> bool:
        """Whether the run would work here."""
        return bool(self.findings) and all(finding.ok for finding in self.findings)

    @property
    def refuses(self) -> bool:
        """Whether a rule of its policy is what is in the way."""
        return any(not finding.ok and finding.check.startswith("policy") for finding in self.findings)


def away(name: str, *, required: bool, reason: str) -> Site:
    """A site from which nothing was heard.

    Args:
        name: the silo's.
        required: whether the run can't do without it.
        reason: what its node says; empty where no node is online.
    """
    if not reason:
        return Site(name, required, [Finding("reached", ok=False, found="not online", fix=_AT_THE_SITE)])
    return Site(name, required, [_untold(reason, "")])


def judged(name: str, heard: Heard, config: RunConfig, base_model_digest: str, *, required: bool) -> Site:
    """What was heard of a site, as findings.

    Args:
        name: the silo's.
        heard: of it.
        config: the run's settings.
        base_model_digest: of the run's base model.
        required: whether the run can't do without it.
    """
    found = list(_of_facts(heard, base_model_digest)) if FACTS in heard.steps else []
    found += [_refusal(line) for line in heard.refusals]
    prediction = _predicted(heard, config) if heard.outcome == "done" and TRIAL in heard.steps else None
    if heard.trouble:
        found.append(_untold(heard.trouble, heard.rule, _late(heard)))
    elif heard.room and not heard.refusals:
        found += _of_trial(heard)
    if prediction is not None:
        found += _of_round(name, prediction, config.federated)
    return Site(name, required, found, prediction)


def _of_facts(heard: Heard, base_model_digest: str) -> Iterable[Finding]:
    yield Finding("reached", ok=True, found="relay and service answer")
    yield Finding("version", ok=True, found=f"siloweave {heard.version}")
    well = -MOST_BEHIND_S <= heard.ahead_s <= MOST_AHEAD_S
    way = "ahead of" if heard.ahead_s > 0 else "behind"
    shown = f"{abs(heard.ahead_s):.0f} s {way} the coordinator's"
    yield Finding("clock", well, shown, f"set the one that is wrong, and let chrony keep both; {CLOCK_RULE}")
    if heard.base_model_digest == base_model_digest:  # else the refusal says it
        yield Finding("base model", ok=True, found=heard.base_model_digest[:_DIGITS])
    labels = f" of {', '.join(heard.labels)}" if heard.labels else ""
    yield Finding("task", ok=True, found=f"{heard.task}{labels}")
    yield Finding("columns", ok=True, found=", ".join(heard.columns))
    fix = "make room on the disks of state_dir and anchor_dir, or have the steward lower policy.max_request_bytes"
    found = "room for four of the largest requests" if heard.room else "no room for four of the largest requests"
    yield Finding("disk", heard.room, found, fix)


def _refusal(line: str) -> Finding:
    rule = (re.match(r"\w*", line) or [""])[0]
    check = _OF_SETTINGS.get(rule, "policy")
    return Finding(
        check if check == "policy" else f"policy, {check}", ok=False, found=line, fix=_FIXES.get(rule, _POLICY)
    )


def _untold(message: str, rule: str, late: str = "") -> Finding:
    """Why an answer has not come."""
    if not rule and (refused := re.search(r" refuses: (\w+):", message)):  # of a node that is no silo yet
        rule = refused[1]
    if rule in ("request", "version"):
        return Finding("version", ok=False, found=message, fix=_UPGRADE)
    if rule:
        return Finding("policy", ok=False, found=message, fix=_FIXES.get(rule.partition(".")[0], _POLICY))
    for words, check, fix in _BY_WORDS:
        if words in message:
            return Finding(check, ok=False, found=message, fix=fix)
    if late:
        return Finding("line", ok=False, found=message, fix=late)
    return Finding(
        "reached", ok=False, found=message, fix=f"wait for a round that is under way there, or {_AT_THE_SITE}"
    )


def _late(heard: Heard) -> str:
    """What helps where a long message has not come in the time that a short one needed."""
    waits = next((name for name in (REQUEST, REPLY) if name not in heard.steps), "") if FACTS in heard.steps else ""
    if not waits:
        return ""
    return (
        f"the line did not carry a round's {waits} before the deadline: raise federated.round_timeout_s (deadlines_s "
        "of one site), or send less: a lower federated.lora_rank, federated.update_dtype 'int8'"
    )


def _of_trial(heard: Heard) -> Iterable[Finding]:
    if TRIAL not in heard.steps:
        return
    if heard.outcome == "done":
        yield Finding("memory", ok=True, found=f"enough for steps of {heard.records} records")
    elif heard.outcome in _OF_STEPS:
        yield _OF_STEPS[heard.outcome]
    else:
        yield Finding("disk", ok=False, found="no room", fix=_LOGS)  # there was some a moment ago


def _of_round(name: str, predicted: Prediction, federated: FederatedSettings) -> Iterable[Finding]:
    yield Finding("line", ok=True, found=_speeds(predicted))
    yield Finding("step", ok=True, found=f"{predicted.step_s:.3g} s")
    deadline, line_s = federated.deadline_s(name), predicted.down_s + predicted.up_s
    found = f"{predicted.seconds:.3g} s, deadline {deadline:g} s"
    fix = f"raise federated.round_timeout_s, or federated.deadlines_s of this site, above {predicted.seconds:.3g}"
    if 2 * line_s > predicted.seconds:
        fix += "; or send less over this line: a lower federated.lora_rank, federated.update_dtype 'int8'"
    else:
        fix += "; or work less: fewer federated.local_steps"
    yield Finding("round", predicted.seconds <= deadline, found, fix)


def _speeds(predicted: Prediction) -> str:
    def speed(size: int, seconds: float) -> str:
        return f"{size / seconds / _MEGABIT:.3g} Mbit/s" if seconds > 0 else "too fast to tell"

    down, up = speed(predicted.request_bytes, predicted.down_s), speed(predicted.reply_bytes, predicted.up_s)
    return f"{down} down, {up} up, {predicted.latency_s:.2g} s there and back"


def _predicted(heard: Heard, config: RunConfig) -> Prediction:
    def moving(*names: str) -> float:
        """Outside the silo: the line, and until relay and coordinator have looked."""
        there = [heard.steps[name] for name in names if name in heard.steps]
        return median(step.seconds - step.in_silo for step in there)

    request, reply = heard.steps[REQUEST], heard.steps[REPLY]
    whole = max(moving(REPLY, *AGAIN), 0.0)  # of a message as long as a round's each way; its parts add up to it
    there = min(max(moving(REQUEST), 0.0), whole)
    latency = min(max(moving(FACTS), 0.0), there)
    expected = max(1.0, config.privacy.sampling_rate * heard.public_record_count)
    step_s = heard.step_s * max(1.0, expected / max(heard.records, 1))  # earlier versions tried fewer
    steps, sizes = config.federated.local_steps, (request.request_bytes, reply.reply_bytes)
    line = latency, there - latency, whole - there
    return Prediction(*line, heard.prepare_s, step_s, heard.first_s, steps, *sizes)
