"""A federation on several machines, each with its own network, firewall, processes and mounts, and what it outlives.

The tests stand in the order in which things happen to one federation.
"""

import json
import shutil
import signal
import socket
import subprocess
import sys
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import psutil
import pytest
from host_deployment import COORDINATOR, FAKETIME, NAME, PROXY, PROXY_PORT, HostDeployment
from host_faults import (
    ALL,
    FAULTS,
    FIRST,
    NGINX,
    RELAY,
    RUN_S,
    SERVER_APP,
    SUPERLINK,
    Faults,
    kill_in_training,
    reconciled,
    refusal_of,
    refused_start,
    serve,
    stop_relay,
    stop_service,
)
from hosts import BRIDGE, LINK, has_firewall
from repository import SUPPORT

from federated.deployment.federation_folder import REVOKED
from privacy.certificate.check import check_certificate
from privacy.ledger.chain import left
from privacy.ledger.journal import default_anchor_dir


def connects(federation: HostDeployment, at: str, address: str, port: int, within_s: float) -> bool:
    """Whether a connection is answered, be it by a refusal."""
    script = f"import socket; socket.create_connection(({address!r}, {port}), timeout={within_s})"
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
    # Lines lose packets, and each one that is sent again takes longer; what is closed is waited for until the end.
    with ThreadPoolExecutor(len(tried)) as pool:
        found = list(pool.map(lambda one: connects(federation, *one, within_s=120 if tried[one] else 3), tried))
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


@pytest.fixture(scope="module")
def backup(federation, first) -> Path:
    """Of one silo's ledger, from before it has reserved the run to which everything happens."""
    return federation.back_up("histories")


@pytest.fixture(scope="module")
def faults(federation, backup) -> Faults:
    running = Faults(federation)
    running.next_round(*ALL)
    return running


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
    assert json.loads(federation.siloweave(*status, at="comedies").stdout)["restarts"] >= 1


def test_a_killed_server_app_nginx_or_superlink_costs_no_committed_round(federation, faults):
    for program in (SERVER_APP, NGINX, SUPERLINK):
        before = federation.receipts(faults.name)
        federation.kill("", program)
        faults.next_round(*ALL)
        assert federation.receipts(faults.name)[: len(before)] == before
    restarts = {name: process["restarts"] for name, process in federation.status()["processes"].items()}
    assert set(restarts) == {"superlink", "nginx"} and min(restarts.values()) >= 1


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
    with filler.open("wb", buffering=0) as disk, pytest.raises(OSError, match="No space"):
        while True:  # unbuffered: a rest that is kept would be tried again at the file's end
            disk.write(bytes(2**16))
    faults.next_round("comedies", "histories", without="roman")

    def said() -> bool:
        """By the silo's reply; or by its relay, where the disk had no room to note that there is one."""
        log = federation.sites["roman"].folder / "relay" / "state" / "supernode.log"
        rejected = {event["silo"] for event in federation.events(faults.name, "rejected")}
        return "roman" in rejected or "no reply can leave now" in log.read_text()

    federation.wait_until("a word of it", said)  # which may come after the round that went on without it
    filler.unlink()
    faults.next_round(*ALL)


@pytest.mark.skipif(FAKETIME is None, reason="no clock can be set wrong here (package faketime)")
@pytest.mark.parametrize("ahead_s", [-320, 60])
def test_a_site_whose_clock_is_off_is_told_so_and_is_back(federation, faults, ahead_s):
    stop_relay(federation, "comedies")
    federation.ahead_s["comedies"] = ahead_s
    relay = ["silo", "relay", "-c", str(federation.sites["comedies"].relay_settings)]
    done = federation.siloweave(*relay, at="comedies", check=False)
    del federation.ahead_s["comedies"]
    assert done.returncode == 2
    assert "set the one that is wrong; Flower turns a SuperNode away that is 5 s ahead" in done.stderr
    faults.next_round("histories", "roman", without="comedies")
    federation.start_relay(federation.sites["comedies"])
    faults.next_round(*ALL)


def test_a_coordinator_that_a_silo_trusts_no_more_is_refused_and_the_others_go_on(federation, faults):
    site = federation.sites["comedies"]
    federation.siloweave("silo", "distrust", "-c", str(site.settings), "test-net", at="comedies")
    assert refusal_of(federation, faults.name, "comedies")["rule"] == "coordinator"
    faults.next_round("histories", "roman", without="comedies")
    federation.trust(site)
    faults.next_round(*ALL)


def test_a_revoked_silo_is_cut_off_and_the_others_go_on_until_it_has_new_keys(federation, faults):
    site, revoke = federation.sites["histories"], ["federation", "revoke", str(federation.folder), "histories"]
    relay_state = site.folder / "relay" / "state"
    federation.siloweave(*revoke)
    faults.next_round("comedies", "roman", without="histories")
    assert set(federation.status()["silos"]) == {"comedies", "roman"}
    log = relay_state / "supernode.log"
    federation.wait_until("a node that is turned away", lambda: "Failed to activate" in log.read_text())
    refused = federation.enrol(site, check=False)
    assert refused.returncode == 2 and "its relay's key was revoked, and no key is taken twice" in refused.stderr

    shutil.rmtree(federation.folder / REVOKED)  # as where it was revoked before that was noted
    federation.enrol(site)
    named = "silo histories: its relay's key was revoked before"
    federation.wait_until("a line about its key", lambda: named in federation.log("federation"))
    federation.siloweave(*revoke)

    stop_relay(federation, "histories")
    for key in ("supernode.ssh", "relay.key", "relay.json"):
        (relay_state / key).unlink()
    federation.make_keys(site)
    federation.enrol(site)
    federation.start_relay(site)
    faults.next_round(*ALL)


def test_power_that_is_cut_everywhere_costs_no_committed_round(federation, faults):
    before = federation.receipts(faults.name)
    federation.cut_power()
    federation.start_everything()
    faults.process = federation.run(faults.name, *FAULTS, model=False)
    faults.next_round(*ALL)
    after = federation.receipts(faults.name)
    assert len(after) > len(before) and after[: len(before)] == before


def test_after_all_of_this_no_spend_is_lost_and_none_is_there_twice(federation, faults):
    """Each receipt is an entry of its silo's ledger, in which each round that counted is charged once."""
    receipts = federation.receipts(faults.name)
    for silo in ALL:
        entries, heads = federation.entries(silo), [entry["hash"] for entry in federation.chain(silo)]
        mine = [(number, receipt) for number, name, receipt in receipts if name == silo]
        assert mine and all(heads[receipt["number"] - 1] == receipt["head"] for _, receipt in mine)
        run = mine[0][1]["run"]
        charged = Counter(body["round"] for body in entries if body["kind"] == "charge" and body["run"] == run)
        assert {number for number, _ in mine} <= set(charged)
        assert set(charged.values()) == {1}


def test_a_ledger_that_is_put_back_from_a_backup_is_refused_until_its_anchor_has_told_what_it_lacks(
    federation, faults, backup
):
    stop_service(federation, "histories")
    before = left(federation.entries("histories")).epsilon
    first, lost = (body["epsilon"] for body in federation.entries("histories") if body["kind"] == "reserve")
    federation.put_back_ledger("histories", backup)
    assert left(federation.entries("histories")).epsilon > before
    said = refused_start(federation, "histories")
    assert "an old or other ledger was put back" in said and "`siloweave silo budget reconcile`" in said
    faults.next_round("comedies", "roman", without="histories")  # which commits what it has told last
    mended = reconciled(federation, "histories", federation.newest_receipts(faults.name))
    # The run that was over by then counts once more for each receipt: nobody can tell where the two ledgers parted.
    again = mended["reservations_charged_again"]
    assert again >= 1 and mended["epsilon_charged"] == pytest.approx(lost + again * first)
    assert mended["epsilon_left"] == pytest.approx(before - again * first)
    serve(federation, "histories")
    assert refusal_of(federation, faults.name, "histories")["rule"] != "rollback"  # the run is over there
    faults.next_round("comedies", "roman", without="histories")


def test_a_machine_that_is_put_back_with_its_anchor_is_found_out_by_the_coordinators_receipt(
    federation, faults, tmp_path
):
    state = federation.sites["comedies"].state_dir
    places = (state, default_anchor_dir(state))
    stop_service(federation, "comedies")
    for place in places:
        shutil.copytree(federation.hosts["comedies"].path(place), tmp_path / place.name)
    before = left(federation.entries("comedies")).epsilon
    serve(federation, "comedies")
    faults.next_round("comedies", "roman")
    stop_service(federation, "comedies")
    federation.put_back("comedies", tmp_path, *places)
    serve(federation, "comedies")
    assert refusal_of(federation, faults.name, "comedies")["rule"] == "rollback"
    faults.next_round("roman", without="comedies")
    stop_service(federation, "comedies")
    mended = reconciled(federation, "comedies", federation.newest_receipts(faults.name))
    assert mended["reservations_charged_again"] == 1  # which round it has released twice, nobody can tell
    assert mended["epsilon_left"] == pytest.approx(before - mended["epsilon_charged"]) and mended["epsilon_charged"] > 0
    serve(federation, "comedies")


def test_silos_that_were_put_back_take_part_in_the_next_run_and_no_spend_that_was_shown_is_lost(federation, faults):
    federation.process("", "siloweave federation run").terminate()
    federation.let_end(faults.process)
    run = federation.run("next", *FIRST)
    assert run.wait(RUN_S) == 0, federation.logs()
    assert [set(event["answered"]) for event in federation.rounds("next")] == [set(ALL)] * 2
    shown = [told for name in ("first", faults.name, "next") for told in federation.receipts(name)]
    for silo in ALL:
        entries, heads = federation.entries(silo), [entry["hash"] for entry in federation.chain(silo)]
        charged = {heads[body["number"] - 1] for body in entries if body["kind"] == "reserve"}
        charged |= {spend["entry"] for body in entries if body["kind"] == "reconcile" for spend in body["spends"]}
        spent = {spend["entry"] for _, name, receipt in shown if name == silo for spend in receipt["spends"]}
        assert len(spent) >= 3 and spent <= charged


def test_a_session_that_is_killed_leaves_nothing_behind():
    script = (
        "from hosts import Lan; import time; net = Lan(); host = net.boot('10.77.0.1')\n"
        "import subprocess; subprocess.Popen([*host.enter(), 'sleep', '1000'])\n"
        "print(host.pid, net.bridge.pid, flush=True); time.sleep(1000)"
    )
    session = subprocess.Popen(
        [sys.executable, "-c", script], env={"PYTHONPATH": str(SUPPORT)}, stdout=subprocess.PIPE, text=True
    )
    hosts = [psutil.Process(int(pid)) for pid in session.stdout.readline().split()]
    session.send_signal(signal.SIGKILL)
    session.wait(RUN_S)
    gone, left = psutil.wait_procs(hosts, timeout=RUN_S)
    assert len(gone) == 2 and not left
    assert not {BRIDGE, LINK, "p1"} & {name for _, name in socket.if_nameindex()}
