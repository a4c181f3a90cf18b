"""A rehearsal over a federation that is served: what a run would meet at every site, and what one round would take."""

import json
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import tomli_w

from configs.errors import InputError, SiloweaveError
from configs.findings import Finding
from configs.locks import HeldError, locked
from configs.parse import to_toml
from configs.run_directory import run_directory
from configs.schema.base import named_as
from configs.schema.schema import RunConfig
from configs.storage.files import private_folder, write_atomic
from configs.storage.layout import EVENTS, RunFiles
from configs.storage.manifests import require_manifest
from federated.aggregation.message_sizes import mebibytes
from federated.coordinator.rehearsal.rehearsal import HEARD, Heard
from federated.coordinator.rehearsal.verdict import Site, away, judged
from federated.deployment.federation_folder import FederationFolder
from federated.deployment.served_run import follow
from federated.deployment.superlink import nodes, start_run, stop_run
from federated.identity.x509 import days_left, read_certificate

FOLDER, COORDINATOR = "rehearsal", "(coordinator)"
REFUSED, NO_GO = 3, 1


@dataclass(frozen=True)
class Rehearsed:
    """What a rehearsal has found.

    Attributes:
        coordinator: of the coordinator's own machine.
        sites: every enrolled silo.
        config: the run's settings.
    """

    coordinator: list[Finding]
    sites: list[Site]
    config: RunConfig

    @property
    def go(self) -> bool:
        """Whether all required sites are go, and as many as a round needs."""
        ready = sum(site.go for site in self.sites)
        here = all(finding.ok for finding in self.coordinator)
        required = all(site.go for site in self.sites if site.required)
        return here and required and ready >= self.config.federated.min_silos

    @property
    def exit_status(self) -> int:
        """0 for go; 3 where a silo's policy is in the way of a required site, else 1."""
        if self.go:
            return 0
        return REFUSED if any(site.refuses for site in self.sites if site.required) else NO_GO

    @property
    def round_seconds(self) -> float | None:
        """Of a round with the sites that are go: the slowest of those that it waits for."""
        seconds = sorted(site.prediction.seconds for site in self.sites if site.go and site.prediction)
        enough = self.config.federated.enough_silos or len(seconds)
        return seconds[min(enough, len(seconds)) - 1] if seconds else None

    @property
    def run_seconds(self) -> float | None:
        """Of all rounds, the first of which the slowest of the sites makes later."""
        if self.round_seconds is None:
            return None
        first = max(site.prediction.first_s for site in self.sites if site.go and site.prediction)
        return first + self.config.federated.rounds * self.round_seconds

    @property
    def round_bytes(self) -> int:
        """Of a round with the sites that are go."""
        predictions = [site.prediction for site in self.sites if site.go and site.prediction]
        return sum(one.request_bytes + one.reply_bytes for one in predictions)

    def document(self) -> dict[str, Any]:
        """The same for machines."""
        rounds, seconds = self.config.federated.rounds, self.round_seconds
        return {
            "go": self.go,
            "exit_status": self.exit_status,
            "coordinator": [asdict(finding) for finding in self.coordinator],
            "sites": {site.name: _of_site(site) for site in self.sites},
            "round": {"seconds": seconds, "bytes": self.round_bytes},
            "run": {
                "rounds": rounds,
                "seconds": self.run_seconds,
                "bytes": rounds * self.round_bytes,
            },
        }

    def lines(self) -> list[str]:
        """The same for people: a line a site, and below it what has to be mended."""
        text = [line for site in self.sites for line in _lines(site)]
        text += [f"{COORDINATOR}  {finding}" for finding in self.coordinator if not finding.ok]
        seconds, of_run, rounds = self.round_seconds, self.run_seconds, self.config.federated.rounds
        if seconds is not None and of_run is not None:
            text.append(
                f"predicted: a round {seconds:.3g} s and {mebibytes(self.round_bytes)}; {rounds} rounds "
                f"{of_run:.3g} s and {mebibytes(rounds * self.round_bytes)}"
            )
        return [*text, "GO" if self.go else "NO-GO: mend what is said above, and give the same command again"]


def rehearse(federation: FederationFolder, config: RunConfig, machine: list[Finding]) -> Rehearsed:
    """Has every enrolled silo rehearse a run of these settings. Nothing is charged, and no record is read.

    Args:
        federation: the coordinator's, being served.
        config: the run's settings.
        machine: what was found on the coordinator's own machine.

    Raises:
        InputError: no silo is enrolled, the base model is missing, or the run protects clients.
        SiloweaveError: the federation is not served, or Flower refuses.
    """
    if config.privacy.unit != "record":
        raise InputError("privacy.unit is 'client': a rehearsal is of runs with records as units")
    silos = federation.silos()
    if not silos:
        raise InputError(f"{federation.folder}: no silo is enrolled; take them in with `siloweave federation enrol`")
    model = RunFiles(run_directory(config)).model
    digest = require_manifest(model, "model", config.model.made_by).content_digest
    there = {name: node["node"] for name, node in nodes(federation).items() if node["status"] == "online"}
    heard, reasons = _heard(federation, config, model) if there else ({}, {})
    required = config.federated.required_silos or tuple(silos)

    def site(name: str) -> Site:
        needed = named_as(name, required) is not None
        if name in heard:
            return judged(name, heard[name], config, digest, required=needed)
        return away(name, required=needed, reason=reasons.get(there.get(name, 0), ""))

    days = days_left(read_certificate(federation.certificates / "proxy.pem"))
    fix = f"give `siloweave federation serve {federation.folder}` again, which renews it"
    certificate = Finding("certificate", days > 0, f"valid for {days} days", fix)
    return Rehearsed([certificate, *machine], [site(name) for name in sorted(silos)], config)


def _heard(federation: FederationFolder, config: RunConfig, model: Path) -> tuple[dict[str, Heard], dict[int, str]]:
    """What the server app has heard of each silo, and why of a node nothing."""
    directory = private_folder(federation.state / FOLDER)
    given = {
        "config": to_toml(config),
        "base-model": str(model),
        "directory": str(directory),
        "coordinator": str(federation.folder),
        "num-silos": len(federation.silos()),
        "rehearsal": True,
    }
    try:
        with locked(directory / "command.lock", b""):
            _run(federation, directory, tomli_w.dumps(given))
            found = json.loads((directory / HEARD).read_text(encoding="utf-8"))
    except HeldError:
        raise InputError(
            f"{directory}: another rehearsal is under way; give the command again when it is over"
        ) from None
    silos = {name: Heard.of(tree) for name, tree in found["silos"].items()}
    return silos, {int(node): reason for node, reason in found["nodes"].items()}


def _run(federation: FederationFolder, directory: Path, given: str) -> None:
    """Has Flower run the rehearsal, to its end; one that is interrupted is stopped."""
    for earlier in (HEARD, EVENTS):
        (directory / earlier).unlink(missing_ok=True)
    settings = directory / "run-config.toml"
    write_atomic(settings, given.encode(), mode=0o600)
    flower_run = start_run(federation, settings)
    try:
        outcome, _ = follow(federation, directory, flower_run, 0, lambda _: None)
    except BaseException:
        stop_run(federation, flower_run)
        raise
    if outcome is None:
        raise SiloweaveError(f"{directory}: the server app died; see {federation.state}/superlink.log")
    outcome.require_success()


def _of_site(site: Site) -> dict[str, Any]:
    prediction = site.prediction
    return {
        "go": site.go,
        "required": site.required,
        "checks": [asdict(finding) for finding in site.findings],
        "round": None if prediction is None else {**asdict(prediction), "seconds": prediction.seconds},
    }


def _lines(site: Site) -> list[str]:
    needed = "" if site.required else " (not required)"
    known = "; ".join(f"{finding.check}: {finding.found}" for finding in site.findings if finding.ok)
    first = f"{'GO   ' if site.go else 'NO-GO'} {site.name}{needed}" + (f"  {known}" if known else "")
    return [first, *(f"      {finding}" for finding in site.findings if not finding.ok)]
