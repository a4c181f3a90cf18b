"""The run of a federation on several hosts to which everything happens, and what is done to its silos."""

import json
from contextlib import suppress
from pathlib import Path

import psutil
from host_deployment import HostDeployment

RUN_S = 900.0
SERVICE, RELAY, SUPERVISOR = "silo serve", "federated.transport.node", "silo relay"
SUPERLINK, SERVER_APP, NGINX = "flower-superlink", "flwr-serverapp", "nginx: "
ALL = ("comedies", "histories", "roman")
FAST = ("federated.local_steps=2", "privacy.epsilon=1")
FIRST = ("federated.rounds=2", "federated.min_silos=3", f"federated.round_timeout_s={RUN_S}", *FAST)
# More rounds than the tests need: they look at what is committed, and wait for what they look for.
FAULTS = ("federated.rounds=2000", "federated.min_silos=1", "federated.enough_silos=2", "federated.grace_s=5", *FAST)


class Faults:
    """The run to which everything happens."""

    name = "faults"

    def __init__(self, federation: HostDeployment) -> None:
        self.federation = federation
        self.process = federation.run(self.name, *FAULTS)

    def next_round(self, *silos: str, without: str = "") -> dict:
        return self.federation.wait_for_round(self.name, self.process, *silos, without=without)


def serve(federation: HostDeployment, silo: str) -> None:
    """systemd's part."""
    federation.start_service(federation.sites[silo])


def stop_service(federation: HostDeployment, silo: str) -> None:
    """systemd's other part."""
    federation.process(silo, SERVICE).terminate()
    federation.let_end(federation.sites[silo].service_process)


def stop_relay(federation: HostDeployment, silo: str) -> None:
    """Its node may be down at the moment, where it is turned away."""
    federation.kill(silo, SUPERVISOR)
    for node in federation.hosts[silo].find(RELAY):
        with suppress(psutil.Error):
            node.kill()


def kill_in_training(federation: HostDeployment, silo: str) -> None:
    """Kills a silo's service after it has charged a round, and before the update is in its ledger."""

    def trains() -> bool:
        return federation.entries(silo)[-1]["kind"] == "charge"

    service = federation.process(silo, SERVICE)
    while True:
        federation.wait_until("a charge", trains)
        service.suspend()
        if trains():
            break
        service.resume()
    service.kill()
    federation.let_end(federation.sites[silo].service_process)


def refusal_of(federation: HostDeployment, run: str, silo: str) -> dict:
    """The next one of a silo from now on."""
    seen = len(federation.events(run, "refused"))

    def found() -> list[dict]:
        return [event for event in federation.events(run, "refused")[seen:] if event["silo"] == silo]

    federation.wait_until(f"a refusal of {silo}", lambda: bool(found()))
    return found()[0]


def refused_start(federation: HostDeployment, silo: str) -> str:
    """What a service says that does not start."""
    site = federation.sites[silo]
    started = ["silo", "serve", "-c", str(site.settings), "--socket", str(site.socket)]
    done = federation.siloweave(*started, at=silo, check=False)
    assert done.returncode == 2
    return done.stderr


def reconciled(federation: HostDeployment, silo: str, *receipts: Path) -> dict:
    """What the steward's command says."""
    command = ["silo", "budget", "reconcile", str(federation.sites[silo].settings), *map(str, receipts), "--json"]
    return json.loads(federation.siloweave(*command, at=silo).stdout)
