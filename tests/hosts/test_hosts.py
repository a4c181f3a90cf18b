"""A federation on several machines, each with its own network, firewall, processes and mounts, and what it outlives.

The tests stand in the order in which things happen to one federation.
"""

import json
import signal
import socket
import subprocess
import sys
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import psutil
import pytest
from host_deployment import COORDINATOR, NAME, PROXY, PROXY_PORT, HostDeployment
from hosts import has_firewall
from repository import SUPPORT

from privacy.certificate.check import check_certificate
from privacy.ledger.file import read_only

RUN_S = 300.0
SERVICE, RELAY, SUPERLINK, SERVER_APP = "silo serve", "federated.transport.node", "flower-superlink", "flwr-serverapp"
ALL = ("comedies", "histories", "roman")
FAST = ("federated.local_steps=2", "privacy.epsilon=1")
FIRST = ("federated.rounds=2", "federated.min_silos=3", f"federated.round_timeout_s={RUN_S}", *FAST)
# More rounds than the tests need: they look at what is committed, and wait for what they look for.
FAULTS = ("federated.rounds=200", "federated.min_silos=1", "federated.enough_silos=2", "federated.grace_s=5", *FAST)


def connects(federation: HostDeployment, at: str, address: str, port: int) -> bool:
    """Whether a connection is answered, be it by a refusal."""
    script = f"import socket; socket.create_connection(({address!r}, {port}), timeout=2)"
    try:
        federation.hosts[at].run(sys.executable, "-c", script)
    except OSError as error:
        return "ConnectionRefused" in str(error)
    return True


def test_each_silo_has_one_way_out_and_none_in(federation):
    coordinator, proxy = (COORDINATOR, federation.port), (PROXY, PROXY_PORT)
    tried = {}
    for silo in ALL:
        way, other = (proxy, coordinator) if silo == "histories" else (coordinator, proxy)
        tried |= {(silo, *way): True, (silo, *other): False, ("", federation.hosts[silo].address, 22): False}
        tried |= {(silo, way[0], way[1] + 1): False} if has_firewall() else {}  # routes know no ports
    with ThreadPoolExecutor(len(tried)) as pool:
        found = list(pool.map(lambda one: connects(federation, *one), tried))
    assert dict(zip(tried, found, strict=True)) == tried


@pytest.fixture(scope="module")
def first(federation) -> Path:
    """The federation's part of a run that is at its end."""
    run = federation.run("first", *FIRST)
    assert run.wait(RUN_S) == 0, federation.logs()
    return federation.root / "runs" / "first" / "federated"


def test_several_hosts_reach_a_certificate(federation, first):
    certificate = json.loads((first / "certificate.json").read_text())
    check_certificate(certificate, "certificate")
    assert set(certificate["silos"]) == set(ALL)
    assert [set(event["answered"]) for event in federation.rounds("first")] == [set(ALL)] * 2


def test_a_site_behind_a_proxy_can_resolve_no_name_and_took_part(federation, first):
    resolved = f"import socket; socket.getaddrinfo({NAME!r}, 1)"
    with pytest.raises(OSError, match="gaierror"):
        federation.hosts["histories"].run(sys.executable, "-c", resolved)
    check = ["silo", "relay", "-c", str(federation.sites["histories"].relay_settings), "--check"]
    assert f"reached through proxy http://{PROXY}" in federation.siloweave(*check, at="histories").stdout


class Faults:
    """The run to which everything happens."""

    name = "faults"

    def __init__(self, federation: HostDeployment) -> None:
        self.federation = federation
        self.process = federation.run(self.name, *FAULTS)

    def next_round(self, *silos: str, without: str = "") -> dict:
        return self.federation.wait_for_round(self.name, self.process, *silos, without=without)


@pytest.fixture(scope="module")
def faults(federation, first) -> Faults:
    running = Faults(federation)
    running.next_round(*ALL)
    return running


def serve(federation: HostDeployment, silo: str) -> None:
    """systemd's part."""
    federation.start_service(federation.sites[silo])


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
    federation.sites[silo].service_process.wait(30)


def test_a_silo_that_is_killed_while_it_trains_spends_nothing_twice(federation, faults):
    kill_in_training(federation, "comedies")
    entry = federation.entries("comedies")[-1]
    serve(federation, "comedies")
    faults.next_round(*ALL)
    entries = federation.entries("comedies")
    same = [
        body
        for body in entries
        if body["kind"] == "charge" and (body["run"], body["round"]) == (entry["run"], entry["round"])
    ]
    assert same == [entry]


def test_a_relay_that_is_killed_is_back(federation, faults):
    federation.kill("comedies", RELAY)
    faults.next_round(*ALL)
    status = ["silo", "status", "-c", str(federation.sites["comedies"].relay_settings), "--json"]
    assert json.loads(federation.siloweave(*status, at="comedies").stdout)["restarts"] == 1


def test_a_killed_server_app_and_superlink_cost_no_committed_round(federation, faults):
    for program in (SERVER_APP, SUPERLINK):
        before = federation.receipts(faults.name)
        federation.kill("", program)
        faults.next_round(*ALL)
        assert federation.receipts(faults.name)[: len(before)] == before
    assert federation.status()["processes"]["superlink"]["restarts"] == 1


def test_a_silo_that_stands_still_is_left_out_and_is_back(federation, faults):
    federation.stand_still("comedies", True)
    faults.next_round("histories", "roman", without="comedies")
    federation.stand_still("comedies", False)
    faults.next_round(*ALL)


def test_a_silo_whose_line_is_down_for_two_rounds_is_left_out_and_is_back(federation, faults):
    federation.hosts["histories"].link("down")
    for _ in range(2):
        faults.next_round("comedies", "roman", without="histories")
    federation.hosts["histories"].link("up")
    faults.next_round(*ALL)


def test_a_silo_whose_disk_is_full_is_left_out_and_is_back(federation, faults):
    state = federation.state("roman")
    filler = state.directory / "filler"
    with filler.open("wb") as disk, pytest.raises(OSError, match="No space"):
        while True:
            disk.write(bytes(2**16))
            disk.flush()
    faults.next_round("comedies", "histories", without="roman")

    def refused() -> bool:
        return "roman" in {event["silo"] for event in federation.events(faults.name, "rejected")}

    federation.wait_until("a refusal", refused)  # which may come after the round that went on without it
    filler.unlink()
    faults.next_round(*ALL)


def test_after_all_of_this_no_spend_is_lost_and_none_is_there_twice(federation, faults):
    """Each receipt is an entry of its silo's ledger, in which each round that counted is charged once."""
    receipts = federation.receipts(faults.name)
    for silo in ALL:
        entries, heads = federation.entries(silo), [entry["hash"] for entry in read_only(federation.state(silo).ledger)]
        mine = [(number, receipt) for number, name, receipt in receipts if name == silo]
        assert mine and all(heads[receipt["number"] - 1] == receipt["head"] for _, receipt in mine)
        run = mine[0][1]["run"]
        charged = Counter(body["round"] for body in entries if body["kind"] == "charge" and body["run"] == run)
        assert {number for number, _ in mine} <= set(charged)
        assert set(charged.values()) == {1}


def test_a_session_that_is_killed_leaves_nothing_behind():
    script = (
        "from hosts import Lan; import time; net = Lan(); host = net.boot('10.77.0.1')\n"
        "import subprocess; subprocess.Popen([*host.enter(), 'sleep', '1000'])\n"
        "print(host.pid, net.bridge.pid, flush=True); time.sleep(1000)"
    )
    before = set(socket.if_nameindex())
    session = subprocess.Popen(
        [sys.executable, "-c", script], env={"PYTHONPATH": str(SUPPORT)}, stdout=subprocess.PIPE, text=True
    )
    hosts = [psutil.Process(int(pid)) for pid in session.stdout.readline().split()]
    session.send_signal(signal.SIGKILL)
    session.wait(30)
    gone, left = psutil.wait_procs(hosts, timeout=30)
    assert len(gone) == 2 and not left
    assert set(socket.if_nameindex()) == before
