"""A federation of the version before is upgraded while its run is under way: a site, the coordinator, the other site.

What stands below is run by the version before as its commit has it; nothing of it is in this tree.
"""

import io
import json
import shutil
import subprocess
import sys
import tarfile
import tempfile
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

import psutil
import pytest
from deployment import Deployment, Site
from repository import REPOSITORY

from configs.storage.layout import SiloFiles
from configs.storage.storage import COMMITTED
from federated.coordinator.round_commits import SILOS
from privacy.ledger.chain import verify_entries
from privacy.ledger.file import read_only

# The newest commit that speaks version 3 of the protocol and nothing newer.
BEFORE = "7ec0bdc16170243e1d8e5338c343ca0966f01a56"
PACKAGES = ("configs", "trainer", "privacy", "federated", "cluster", "siloweave.py")
SILOS_HERE = ("north", "south")
RUN, RUN_S = "upgraded", 900.0
FAST = ("federated.local_steps=2", "privacy.epsilon=1", "data.private.dataset_id=notes")
# As many rounds as the steps below may need on any machine: the test ends before they do.
SETTINGS = ("federated.rounds=900", "federated.min_silos=1", "federated.round_timeout_s=150", *FAST)
SILO_TOML = """
[silo]
id = "{name}"
dataset_id = "notes"
state_dir = "{state}"
base_model = "{model}"
public_record_count = 200

[data]
source = "{records}"
text = "text"
public = true

[policy]
budget_epsilon = 8.0
budget_delta = 1e-4
max_epsilon_per_run = 8.0
"""


class Upgraded(Deployment):
    """A deployment whose machines run the version before until each is upgraded."""

    def __init__(self, root: Path, model: Path, before: Path) -> None:
        super().__init__(root, model)
        self._before, self._now = before, set[str]()
        del self.environment["HTTPS_PROXY"]  # which the version before would ask for its own loopback

    def _environment(self, user: str | None, at: str) -> dict[str, str]:
        home = self.root / "home" / (at or "coordinator")
        own = {"HOME": str(home), "XDG_STATE_HOME": str(home / "state")}
        return {**self.environment, **own, "PYTHONPATH": str(REPOSITORY if at in self._now else self._before)}

    def _write_silo_settings(self, site: Site) -> None:
        records = site.folder / "silo" / "records.jsonl"
        records.write_text("".join(json.dumps({"text": f"seen on day {n} at {site.name}"}) + "\n" for n in range(200)))
        site.settings.write_text(
            SILO_TOML.format(name=site.name, state=site.state_dir, model=self.model, records=records)
        )

    def upgrade_site(self, site: Site) -> None:
        """Stops both of its units, and starts them with the new code on what the old has left."""
        for process in (site.relay_process, site.service_process):
            process.terminate()
            process.wait(RUN_S)
        self._now.add(site.name)
        self.start_site(site)

    def upgrade_coordinator(self) -> None:
        self.siloweave("federation", "stop", str(self.folder))
        self._now.add("")
        self.serve()

    def code_of(self, at: str) -> str:
        """Where a machine's processes find their code."""
        where = [sys.executable, "-c", "import federated; print(federated.__path__[0])"]
        environment = self._environment(None, at)
        done = subprocess.run(where, env=environment, cwd=self.root, capture_output=True, text=True, check=True)
        return str(Path(done.stdout.strip()).parent)

    def receipts(self) -> list[tuple[str, str, dict]]:
        """Round, silo and receipt of all that is committed."""
        found = []
        for path in sorted((self.root / "runs" / RUN / "federated").glob(f"round-*/{COMMITTED}")):
            told = json.loads((path.parent / SILOS).read_text())
            found += [(path.parent.name, name, silo["receipt"]) for name, silo in sorted(told.items())]
        return found

    def wait_for_both(self, run: psutil.Popen) -> None:
        """The next round with an update of each."""
        seen = len(self.events(RUN, "round"))

        def found() -> bool:
            return any(set(event["answered"]) == set(SILOS_HERE) for event in self.events(RUN, "round")[seen:])

        self.wait_until("a round of both", found, run)


@pytest.fixture(scope="module")
def before() -> Iterator[Path]:
    """The version before, from the repository's history."""
    command = ["git", "-C", str(REPOSITORY), "archive", BEFORE, *PACKAGES]
    if shutil.which("git") is None:
        pytest.skip("git is not installed, and the version before is in its history alone")
    done = subprocess.run(command, capture_output=True, check=False)
    if done.returncode:
        said = " ".join(done.stderr.decode(errors="replace").split())
        pytest.skip(f"this checkout has no history with the version before (git fetch --unshallow): {said}")
    root = Path(tempfile.mkdtemp(prefix="before-"))
    with tarfile.open(fileobj=io.BytesIO(done.stdout)) as archive:
        archive.extractall(root, filter="data")
    yield root
    shutil.rmtree(root)


@pytest.fixture
def federation(before, tiny_run) -> Iterator[Upgraded]:
    root = Path(tempfile.mkdtemp(prefix="upgrade-"))  # pytest's own folders are too long for a socket
    deployment = Upgraded(root, tiny_run.model, before)
    try:
        deployment.init()
        deployment.serve()
        for name in SILOS_HERE:
            site = deployment.add_site(name)
            deployment.enrol(site)
            deployment.start_site(site)
        yield deployment
    finally:
        deployment.end()
        shutil.rmtree(root)


def test_a_run_goes_on_while_its_federation_is_upgraded_site_by_site(federation, before):
    north, south = (federation.sites[name] for name in SILOS_HERE)
    assert {federation.code_of(at) for at in ("", *SILOS_HERE)} == {str(before)}
    run = federation.run(RUN, *SETTINGS)
    federation.wait_for_both(run)
    federation.upgrade_site(north)
    federation.wait_for_both(run)

    run.terminate()
    run.wait(RUN_S)
    federation.upgrade_coordinator()
    committed = federation.receipts()
    newer = ("federated.rounds=1", "federated.min_silos=2", "federated.update_dtype=bfloat16", *FAST)
    refused = federation.run("newer", *newer)
    assert refused.wait(RUN_S) == 3
    assert "south" in federation.log("run-newer") and "have the silo upgraded" in federation.log("run-newer")
    rehearse = ["federation", "rehearse", str(federation.folder), *federation.settings("newer", *newer)]
    rehearsed = federation.siloweave(*rehearse, check=False)
    assert rehearsed.returncode == 1
    assert "upgrade the site" in said_of("south", rehearsed.stdout)
    assert "upgrade" not in said_of("north", rehearsed.stdout)

    run = federation.run(RUN, *SETTINGS, model=False)
    federation.wait_for_both(run)
    federation.upgrade_site(south)
    federation.wait_for_both(run)
    assert {federation.code_of(at) for at in ("", *SILOS_HERE)} == {str(REPOSITORY)}

    federation.end()
    receipts = federation.receipts()
    assert len(receipts) > len(committed) and receipts[: len(committed)] == committed
    for name, site in federation.sites.items():
        path = SiloFiles(site.state_dir).ledger
        entries, heads = verify_entries(read_only(path), str(path)), [entry["hash"] for entry in read_only(path)]
        assert all(heads[told["number"] - 1] == told["head"] for _, silo, told in receipts if silo == name)
        charged = Counter((body["run"], body["round"]) for body in entries if body["kind"] == "charge")
        assert charged and set(charged.values()) == {1}
        reserved = [body["run"] for body in entries if body["kind"] == "reserve"]
        assert len(set(reserved)) == len(reserved) == (2 if name == "north" else 1)  # one had words for the newer run


def said_of(silo: str, rehearsed: str) -> str:
    """A rehearsal's lines about one silo."""
    lines, found, mine = rehearsed.splitlines(), [], False
    for line in lines:
        mine = line.split()[1:2] == [silo] if line.startswith(("GO", "NO-GO")) else mine and line.startswith(" ")
        found += [line] if mine else []
    return "\n".join(found)
