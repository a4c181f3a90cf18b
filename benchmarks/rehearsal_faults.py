"""Twelve sites with a fault each and one without, and what `federation rehearse` says of all of them at once.

The coordinator, its sites' services and relays are processes as a deployment has them. What can't be had on one machine
is put into a site's own process before its command runs: another clock, little free memory, an older version. Where no
relay comes through, the rehearsal's fix names `siloweave silo relay --check` at the site, whose line counts then.
"""

import contextlib
import json
import os
import shutil
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import psutil
import tomli_w

sys.path.insert(0, str(Path(__file__).parents[1] / "tests" / "support"))
WAIT_S = 900.0
LABELLED = {"tasks": ("classification",), "labels": ("ill", "well")}
STEPS, DEADLINE_S, SLOW_LINE_S, SLOW_LINE = 400, 25.0, 20.0, 3000.0  # bytes a second

# What is put before a site's command, by fault.
BEFORE = {
    "clock": "import time; now = time.time; time.time = lambda: now() - 400",
    "memory": "import psutil, types; psutil.virtual_memory = lambda: types.SimpleNamespace(available=200 * 2**20)",
    "version": (
        "import federated.silo.requests as asked; from federated.protocol import silo_pb2 as pb; parse = asked._parse\n"
        "def older(message, content):\n"
        "    parse(message, content)\n"
        "    if isinstance(message, pb.Request): message.ClearField('rehearse')\n"
        "asked._parse = older"
    ),
}
POLICY: dict[str, dict[str, Any]] = {
    "disk": {"max_request_bytes": 2**50},
    "task": LABELLED,
    "policy": {"max_epsilon_per_run": 0.5},
}
# Where the coordinator hears nothing at all: what the site's own check has to name.
AT_THE_SITE = {"proxy": "proxy http://127.0.0.1:", "certificate": "certificate"}
# The finding's check, and words of its fix.
EXPECTED = {
    "reachability": ("reached", "start `siloweave silo relay`"),
    "proxy": ("reached", "siloweave silo relay -c relay.toml --check"),
    "certificate": ("reached", "siloweave silo relay -c relay.toml --check"),
    "clock": ("clock", "set the one that is wrong"),
    "disk": ("disk", "make room"),
    "memory": ("memory", "more memory"),
    "bandwidth": ("line", "send less"),
    "step": ("round", "fewer federated.local_steps"),
    "model": ("policy, base model", "copy this run's base model"),
    "task": ("policy, task", "policy.tasks"),
    "policy": ("policy", "policy.max_epsilon_per_run"),
    "version": ("version", "upgrade the site"),
}
SOUND = "sound"


class Sites:
    """A federation of thirteen sites on this machine."""

    def __init__(self, root: Path, model: Path) -> None:
        from cut_line import CutLine

        from federated.deployment.ports import free_port

        self.root, self.folder, self.model, self.port = root, root / "federation", model, free_port()
        self.environment = {**os.environ, "OMP_NUM_THREADS": "1", "HOME": str(root)}
        self.processes: list[psutil.Popen] = []
        self.line = CutLine(self.port, bytes_per_s=SLOW_LINE, connects=True)
        self.fingerprint = self._init(self.folder)
        other = root / "other"
        self.others = self._init(other)
        self.card = dict.fromkeys((*EXPECTED, SOUND), self.folder / "coordinator.json")
        self.card["certificate"] = other / "coordinator.json"
        self.other_model = shutil.copytree(model, root / "other-model")
        _changed(self.other_model)

    def _init(self, folder: Path) -> str:
        where = ["--host", "localhost", "--listen", "127.0.0.1", "--port", str(self.port)]
        return _said("federation", "init", str(folder), "--name", "bench", *where).split()[-1]

    def start(self) -> None:
        """Starts what each site has, and waits for those that come through."""
        self._start("federation", "serve", str(self.folder))
        for name in self.card:
            self._enrolled(name)
        away = {"reachability", *AT_THE_SITE}
        for name in sorted(self.card.keys() - away):
            place = self.root / name
            before = BEFORE.get(name, "")
            self._start("silo", "serve", "-c", str(place / "silo.toml"), "--socket", _socket(place), before=before)
            self._start("silo", "relay", "-c", str(place / "relay.toml"))
        deadline = time.monotonic() + WAIT_S
        while time.monotonic() < deadline:
            time.sleep(3)
            with contextlib.suppress(subprocess.CalledProcessError, FileNotFoundError):
                found = json.loads(self._called("federation", "status", str(self.folder), "--json"))["silos"]
                served = all(Path(_socket(self.root / name)).exists() for name in found.keys() - away)
                if served and {name for name, silo in found.items() if silo["status"] != "online"} == away:
                    return
        raise SystemExit(f"the sites are not online after {WAIT_S:g} s; see {self.root}")

    def _enrolled(self, name: str) -> None:
        from configs.parse import to_toml
        from configs.schema.silo import SiloConfig

        place = self.root / name
        place.mkdir()
        rows = [{"text": f"note {n} of the ward", "label": ("ill", "well")[n % 2]} for n in range(200)]
        (place / "data.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
        config = SiloConfig(
            silo={
                "id": name,
                "dataset_id": name,
                "state_dir": str(place / "state"),
                "base_model": str(self.other_model if name == "model" else self.model),
                "public_record_count": 6000,
            },
            data={"source": str(place / "data.jsonl"), "public": True},  # which lets the relay be this same user
            policy={"budget_epsilon": 100.0, "budget_delta": 1e-4, "max_steps_per_round": 1000, **POLICY.get(name, {})},
        )
        silo, relay, card = place / "silo.toml", place / "relay.toml", self.card[name]
        silo.write_text(to_toml(config))
        given = {"state_dir": str(place / "relay"), "coordinator": str(card), "silo_address": f"unix:{_socket(place)}"}
        mark = self.others if name == "certificate" else self.fingerprint
        proxies = {"proxy": "http://127.0.0.1:9", "bandwidth": f"http://127.0.0.1:{self.line.port}"}
        proxy = {"proxy": proxies[name]} if name in proxies else {}
        relay.write_text(tomli_w.dumps({**given, "coordinator_fingerprint": mark, **proxy}))
        _said("silo", "relay", "-c", str(relay), "--init")
        mark = _said("silo", "init", "-c", str(silo), "--relay", str(place / "relay" / "relay.json")).split()[-1]
        ours = str(self.folder / "coordinator.json")
        _said("silo", "trust", "-c", str(silo), ours, "--fingerprint", self.fingerprint)
        _said("federation", "enrol", str(self.folder), str(place / "state" / "enrolment.json"), "--fingerprint", mark)

    def _start(self, *arguments: str, before: str = "") -> None:
        program = f"{before}\nimport sys, siloweave\nsys.argv[0] = 'siloweave'\nsiloweave.main()"
        with (self.root / "processes.log").open("ab") as log:
            command = [sys.executable, "-c", program, *arguments]
            self.processes.append(psutil.Popen(command, env=self.environment, cwd=self.root, stdout=log, stderr=log))

    def _called(self, *arguments: str, fails: bool = False) -> str:
        command = [sys.executable, "-m", "siloweave", *arguments]
        done = subprocess.run(
            command, env=self.environment, cwd=self.root, capture_output=True, text=True, check=not fails
        )
        return done.stdout + done.stderr if fails else done.stdout

    def rehearsed(self) -> tuple[dict[str, Any], float]:
        """What one rehearsal says of all sites, and its seconds."""
        shutil.copytree(self.model, self.root / "runs" / "run" / "model")
        deadlines = f"{{ step = {DEADLINE_S}, bandwidth = {SLOW_LINE_S} }}"
        overrides = {
            "run.name": "run",
            "run.storage": str(self.root / "runs"),
            "federated.rounds": 3,
            "federated.local_steps": STEPS,
            "federated.deadlines_s": deadlines,
            "privacy.epsilon": 2,
        }
        given = [part for key, value in overrides.items() for part in ("--set", f"{key}={value}")]
        began = time.perf_counter()
        said = self._called("federation", "rehearse", str(self.folder), "-c", "tiny", *given, "--json", fails=True)
        return json.loads(said.splitlines()[0]), time.perf_counter() - began

    def checked(self, name: str) -> tuple[str, float]:
        """What the relay's own check says at a site."""
        began = time.perf_counter()
        said = self._called("silo", "relay", "-c", str(self.root / name / "relay.toml"), "--check", fails=True)
        return said.strip(), time.perf_counter() - began

    def ledgers(self) -> dict[str, list[bytes]]:
        """All bytes that the sites' ledgers have."""
        return {name: [one.read_bytes() for one in sorted((self.root / name).rglob("*.sqlite*"))] for name in self.card}

    def end(self) -> None:
        from federated.deployment.supervisor import end_tree

        end_tree(self.processes, grace_s=20)


def _said(*arguments: str) -> str:
    """What a command prints, in this process: thirteen sites would load the same modules again and again."""
    from typer.testing import CliRunner

    from siloweave import app

    done = CliRunner().invoke(app, list(arguments))
    if done.exit_code:
        raise SystemExit(f"{arguments}: {done.output} {done.exception!r}")
    return done.output


def _socket(place: Path) -> str:
    return str(place / "run" / "silo.sock")


def _changed(model: Path) -> None:
    """Makes another base model of one, sound in itself."""
    from configs.storage.manifests import commit_manifest, require_manifest

    before = require_manifest(model, "model", "export")
    (model / "README.md").write_text("another one")
    commit_manifest(model, before)


def _named(name: str, site: dict[str, Any]) -> str:
    """What is wrong with a site and its fix in one line, where the rehearsal names what is expected; else nothing."""
    check, words = EXPECTED[name]
    wrong = [one for one in site["checks"] if not one["ok"]]
    right = len(wrong) == 1 and wrong[0]["check"] == check and words in wrong[0]["fix"] and not site["go"]
    return f"{wrong[0]['check']}: {wrong[0]['found']}; {wrong[0]['fix']}" if right else ""


def measured(root: Path, model: Path) -> dict[str, Any]:
    """Which faults were named, by which line, and after how many seconds."""
    sites = Sites(root, model)
    try:
        with sites.line:
            sites.start()
            before = sites.ledgers()
            found, seconds = sites.rehearsed()
            lines = {name: _named(name, found["sites"][name]) for name in EXPECTED}
            whole_s, checks = seconds, {}
            for name, word in AT_THE_SITE.items():
                said, checks[name] = sites.checked(name)
                lines[name] = f"{lines[name]} -> {said}" if word in said and lines[name] else ""
                whole_s += checks[name]
            unchanged = before == sites.ledgers()
    finally:
        sites.end()
    return {
        "faults": len(EXPECTED),
        "named with the fix": sum(map(bool, lines.values())),
        "a sound site is go": found["sites"][SOUND]["go"],
        "ledgers are as they were": unchanged,
        "seconds": {"one rehearsal of all": seconds, "checks at the sites": checks, "together": whole_s},
        "lines": lines,
        "said of what was not named": {name: found["sites"][name] for name, line in lines.items() if not line},
    }
