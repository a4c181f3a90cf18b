"""Everything that a silo's steward is shown on one page: spent, left, refused, agreed, and how to stop it."""

import shlex
import time
from pathlib import Path
from typing import Any

from configs.parse import reading
from configs.schema.silo import SiloConfig, load_silo
from configs.storage.layout import SiloFiles
from federated.deployment.silo_site import roster, trusted
from federated.deployment.silo_status import certificates, is_up
from federated.deployment.steward.entries import Coordinators, at, left_rows, run_row, spent_rows
from federated.deployment.steward.ledger_look import Looked, look
from federated.deployment.steward.mandate_rows import is_revoked, mandate_rows
from federated.deployment.steward.messages import SHOWN, replies, turned_away, with_reasons
from privacy.ledger.chain import Budget, left, policy_budget, spent_since
from privacy.ledger.journal import RECONCILE
from privacy.ledger.limits import DAY_S
from privacy.ledger.runs import Runs

Rows = list[dict[str, Any]]


def figures(config: Path, socket: Path | None) -> dict[str, Any]:
    """The page's figures. All of them are in the silo's ledger, logs and settings, none is in its records.

    Args:
        config: the silo.toml, which is read anew each time.
        socket: of the service, to ask whether it is serving; None: nobody asks.

    Raises:
        InputError: the settings don't hold; there is no ledger, or it was damaged or edited; or another of the silo's
            files can't be read.
    """
    settings = load_silo(config)
    looked, files, coordinators = look(settings), SiloFiles(Path(settings.silo.state_dir)), Coordinators(settings)
    with reading(files.ledger, f"put its backup back, or run {RECONCILE}"):
        told = _ledger_rows(settings, looked, coordinators, config)
    with reading(files.mandates, "put the backup of what lies there back"):
        mandates = _mandates(settings, looked, config)
    with reading(files.traffic, "have it readable, or move it away"):
        logged = _log_rows(files, coordinators)
    return {
        "silo": settings.silo.id,
        "dataset": settings.silo.dataset_id,
        "time": at(time.time()),
        "serving": is_up(socket),
        **told,
        **logged,
        "mandates": mandates,
        "trusted": _trusted(settings, config),
        "roster": roster(settings),
        "certificate_days_left": certificates(files),
    }


def _ledger_rows(settings: SiloConfig, looked: Looked, coordinators: Coordinators, config: Path) -> dict[str, Any]:
    released = list(left_rows(looked.bodies, coordinators))
    return {
        "doubt": looked.doubt,
        "budget": _budget(settings, looked),
        "spent": spent_rows(looked.bodies, coordinators),
        "runs": _runs(looked, coordinators, config),
        "left": {
            "releases": len(released),
            "bytes": sum(row["bytes"] or 0 for row in released),
            "newest": released[-SHOWN:],
        },
    }


def _log_rows(files: SiloFiles, coordinators: Coordinators) -> dict[str, Any]:
    """Of three files of lines; an error has the name of the one that can't be read."""
    answered = replies(files, coordinators)
    refused = [line for line in answered if line["outcome"] != "answered"]
    return {
        "last_reply": answered[-1]["time"] if answered else None,
        "replies": answered[-SHOWN:],
        "refused": with_reasons(refused[-SHOWN:], files),
        "turned_away": turned_away(files),
    }


def _budget(settings: SiloConfig, looked: Looked) -> dict[str, float | None]:
    policy, bodies = settings.policy, looked.bodies
    allowed = policy_budget(bodies) if bodies else Budget(policy.budget_epsilon, policy.budget_delta)
    remaining = left(bodies) if bodies else allowed
    return {
        "epsilon": allowed.epsilon,
        "delta": allowed.delta,
        "epsilon_spent": allowed.epsilon - remaining.epsilon,
        "delta_spent": allowed.delta - remaining.delta,
        "epsilon_left": remaining.epsilon,
        "delta_left": remaining.delta,
        "epsilon_within_24_hours": spent_since(bodies, time.time() - DAY_S),
        "max_epsilon_per_day": policy.max_epsilon_per_day,
    }


def _runs(looked: Looked, coordinators: Coordinators, config: Path) -> Rows:
    """All runs, the newest first; an open one with the command that ends it, by its entry: a name is a stranger's."""
    rows = [run_row(run, coordinators) for run in Runs(looked.bodies)]
    for row in rows:
        if row["state"] == "open":
            row["stop"] = _command("runs stop", config, "--entry", str(row["entry"]))
    return rows[::-1]


def _mandates(settings: SiloConfig, looked: Looked, config: Path) -> Rows:
    rows = mandate_rows(settings, looked)
    for row in rows:
        if not is_revoked(row):
            row["stop"] = _command("mandate revoke", config, "--", row["study"])
    return rows


def _trusted(settings: SiloConfig, config: Path) -> Rows:
    return [
        {"coordinator": name, "public_key": key, "stop": _command("distrust", config, "--", name)}
        for name, key in trusted(settings).items()
    ]


def _command(verbs: str, config: Path, *words: str) -> str:
    """A command line to copy: after ``--`` a name that begins like an option is none."""
    return shlex.join(("siloweave", "silo", *verbs.split(), "-c", str(config.absolute()), *words))
