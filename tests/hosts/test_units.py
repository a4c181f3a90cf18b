"""The shipped systemd units, started by systemd on a booted machine, with the steps of docs/deployment.md."""

import json
import shutil
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from booted import PROGRAM, Booted, why_no_boot
from repository import REPOSITORY

from privacy.certificate.check import check_certificate
from privacy.ledger.chain import verify_entries
from privacy.ledger.file import read_only

WAIT_S = 600.0
UNITS = ("siloweave-federation", "siloweave-silo", "siloweave-relay")
COORDINATOR, STEWARD, RELAY = "siloweave", "siloweave-silo", "siloweave-relay"
FEDERATION = "/srv/siloweave/federation"
RELAY_TOML = """
state_dir = "/srv/relay/state"
coordinator = "/srv/relay/coordinator.json"
coordinator_fingerprint = "{fingerprint}"
silo_address = "unix:/run/siloweave-silo/silo.sock"
"""
SILO_TOML = """
[silo]
id = "north"
dataset_id = "north-notes"
state_dir = "/srv/silo/state"
base_model = "/srv/model"
relay_user = "siloweave-relay"
public_record_count = 200

[data]
source = "/srv/silo/records.jsonl"
text = "text"

[policy]
budget_epsilon = 8.0
budget_delta = 1e-4
max_epsilon_per_run = 8.0
"""
ROUNDS = 12
RUN = (
    *("run.name=units", "run.storage=/srv/siloweave/runs", f"federated.rounds={ROUNDS}", "federated.min_silos=1"),
    *("federated.local_steps=2", "privacy.epsilon=1", "data.private.dataset_id=notes"),
)


@pytest.fixture(scope="module")
def machine(tiny_run) -> Iterator[Booted]:
    """Coordinator and silo on one machine: one relay's unit lets its program reach nothing but loopback."""
    if reason := why_no_boot():
        pytest.skip(reason)
    folder = Path(tempfile.mkdtemp(prefix="booted-"))
    try:
        system = Booted(folder, tiny_run.programs.parent)
    except OSError as error:
        shutil.rmtree(folder)
        pytest.skip(" ".join(str(error).split()))
    try:
        users(system)
        shutil.copytree(tiny_run.model, system.path("/srv/model"))
        system.run("chmod", "-R", "a+rX", "/srv/model")
        enrolled(system)
        wait_until(system, lambda: is_online(system))
        yield system
    finally:
        system.end()
        shutil.rmtree(folder)
        folder.with_suffix(".log").unlink()


def users(system: Booted) -> None:
    made = ["useradd", "--system", "--user-group", "--create-home"]
    system.run(*made, "--home-dir", "/srv/siloweave", COORDINATOR)
    system.run(*made, "--home-dir", "/srv/relay", RELAY)
    system.run(*made, "--home-dir", "/srv/silo", "--groups", RELAY, STEWARD)
    system.run("chmod", "0700", "/srv/silo", "/srv/relay")


def give(system: Booted, user: str, path: str, text: str) -> None:
    system.path(path).write_text(text)
    system.run("chown", f"{user}:", path)
    system.run("chmod", "0600", path)


def enrolled(system: Booted) -> None:
    """Steps 2 to 5."""

    def siloweave(user: str, *arguments: str) -> str:
        return system.run(PROGRAM, *arguments, user=user).stdout

    said = siloweave(COORDINATOR, "federation", "init", FEDERATION, "--name", "units-net", "--host", "localhost")
    fingerprint = said.split()[-1]
    card = system.path(f"{FEDERATION}/coordinator.json").read_text()
    give(system, RELAY, "/srv/relay/coordinator.json", card)
    give(system, RELAY, "/srv/relay/relay.toml", RELAY_TOML.format(fingerprint=fingerprint))
    siloweave(RELAY, "silo", "relay", "-c", "/srv/relay/relay.toml", "--init")
    records = "".join(json.dumps({"text": f"patient {n} was seen on day {n % 28}"}) + "\n" for n in range(200))
    given = {"coordinator.json": card, "relay.json": system.path("/srv/relay/state/relay.json").read_text()}
    for name, text in {**given, "records.jsonl": records, "silo.toml": SILO_TOML}.items():
        give(system, STEWARD, f"/srv/silo/{name}", text)
    settings = ("-c", "/srv/silo/silo.toml")
    mine = siloweave(STEWARD, "silo", "init", *settings, "--relay", "/srv/silo/relay.json").split()[-1]
    siloweave(STEWARD, "silo", "trust", *settings, "/srv/silo/coordinator.json", "--fingerprint", fingerprint)
    enrolment = system.path("/srv/silo/state/enrolment.json").read_text()
    give(system, COORDINATOR, "/srv/siloweave/north.json", enrolment)
    siloweave(COORDINATOR, "federation", "enrol", FEDERATION, "/srv/siloweave/north.json", "--fingerprint", mine)
    for unit in UNITS:
        shutil.copyfile(
            REPOSITORY / "configs" / "deploy" / f"{unit}.service", system.path(f"/etc/systemd/system/{unit}.service")
        )
    system.run("systemctl", "daemon-reload")
    system.run("systemctl", "enable", "--now", *UNITS)
    shutil.copytree(system.path("/srv/model"), system.path("/srv/siloweave/runs/units/model"))
    system.run("chown", "-R", f"{COORDINATOR}:", "/srv/siloweave/runs")


def federate() -> list[str]:
    settings = [part for setting in RUN for part in ("--set", setting)]
    return [PROGRAM, "federation", "run", FEDERATION, "-c", "tiny", *settings]


def is_online(system: Booted) -> bool:
    done = system.run(PROGRAM, "federation", "status", FEDERATION, "--json", user=COORDINATOR, check=False)
    return done.returncode == 0 and json.loads(done.stdout)["silos"]["north"]["status"] == "online"


def wait_until(system: Booted, holds: Callable[[], bool]) -> None:
    deadline = time.monotonic() + WAIT_S
    while not holds():
        assert time.monotonic() < deadline, system.run("journalctl", "--no-pager", "--lines=200").stdout
        time.sleep(0.5)


def rounds(system: Booted) -> list[dict]:
    path = system.path("/srv/siloweave/runs/units/federated/events.jsonl")
    lines = path.read_text().splitlines(keepends=True) if path.exists() else []
    told = [json.loads(line) for line in lines if line.endswith("\n")]  # the last one may be half there
    return [event for event in told if event["event"] == "round"]


def wait_for_a_round(system: Booted) -> None:
    seen = len(rounds(system))
    wait_until(system, lambda: len(rounds(system)) > seen)


def test_the_units_keep_users_and_networks_apart(machine):
    """The service reaches no network, and the relay none of the silo's files."""
    service, relay = (main_pid(machine, unit) for unit in ("siloweave-silo", "siloweave-relay"))
    seen = [
        machine.run(
            "nsenter", f"--target={pid}", "--mount", "test", "-e", "/srv/silo/silo.toml", check=False
        ).returncode
        for pid in (service, relay)
    ]
    assert seen == [0, 1]
    own, first = (machine.run("readlink", f"/proc/{pid}/ns/net").stdout for pid in (service, "1"))
    assert own != first


def restarts(machine: Booted, unit: str) -> int:
    return int(machine.run("systemctl", "show", "--property=NRestarts", "--value", unit).stdout)


def main_pid(machine: Booted, unit: str) -> str:
    pid = machine.run("systemctl", "show", "--property=MainPID", "--value", unit).stdout.strip()
    assert pid != "0"
    return pid


def test_units_are_back_after_a_kill_and_after_a_reboot_and_their_run_reaches_a_certificate(machine, tmp_path):
    # One of the machine's own: a shutdown stops all processes for a moment, and one that was entered for would stay so.
    machine.run("systemd-run", f"--uid={COORDINATOR}", "--property=WorkingDirectory=/srv/siloweave", *federate())
    wait_for_a_round(machine)
    machine.run("systemctl", "kill", "--signal=KILL", *UNITS)
    seen = len(rounds(machine))
    wait_until(machine, lambda: all(restarts(machine, unit) for unit in UNITS))
    # The silo may have answered the round that was under way; the one after it comes over the new processes alone.
    wait_until(machine, lambda: len(rounds(machine)) >= min(seen + 2, ROUNDS))
    machine.reboot()
    wait_until(machine, lambda: is_online(machine))
    machine.run(*federate(), user=COORDINATOR)
    certificate = json.loads(machine.path("/srv/siloweave/runs/units/federated/certificate.json").read_text())
    check_certificate(certificate, "certificate")
    assert set(certificate["silos"]) == {"north"}
    machine.run("systemctl", "stop", *UNITS)
    for part in machine.path("/srv/silo/state").glob("ledger.sqlite*"):  # SQLite would look at its path from here
        shutil.copyfile(part, tmp_path / part.name)
    entries = read_only(tmp_path / "ledger.sqlite")
    charged = [body["round"] for body in verify_entries(entries, "ledger") if body["kind"] == "charge"]
    assert charged == list(range(1, ROUNDS + 1))
