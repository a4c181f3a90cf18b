"""A federation as it is deployed, on one machine: every step through the command line, as docs/deployment.md has it."""

import contextlib
import grp
import json
import os
import pwd
import shutil
import stat
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import psutil
import warm_commands
from lines import ConnectProxy
from ports import free_port

from configs.load import load
from configs.parse import to_toml
from federated.deployment.supervisor import end_tree
from federated.protocol.framing import SERVICE
from federated.simulation.simulated_places import simulated_silo
from federated.transport.health import is_serving

BIN = Path(sys.executable).parent
START_S, COMMAND_S = 400.0, 400.0  # ends a wait for what will not come, however slow the machine is
PRIVATE_RECORDS = 300


@contextlib.contextmanager
def users(*names: str) -> Iterator[None]:
    """Users for one test; the first one is in the second one's group, as a service is in its relay's."""
    try:
        for name in names:
            command = ["useradd", "--system", "--user-group", "--no-create-home", "--shell", "/usr/sbin/nologin", name]
            subprocess.run(command, check=True, capture_output=True)
        subprocess.run(["usermod", "--append", "--groups", names[1], names[0]], check=True, capture_output=True)
        yield
    finally:
        for name in names:
            subprocess.run(["userdel", name], check=False, capture_output=True)


def as_user(user: str, stage: Path, command: list[str]) -> list[str]:
    """A command line that runs as another user, also where the interpreter lies below a folder that is root's alone.

    There the process gets a view of its own, in which that folder holds the interpreter and nothing else.
    """
    switch = ["setpriv", f"--reuid={user}", f"--regid={user}", "--init-groups", "--", *command]
    base = Path(sys.base_prefix).resolve()
    closed = next((p for p in [*reversed(base.parents), base] if not p.stat().st_mode & stat.S_IXOTH), None)
    if closed is None:
        return switch
    stage.mkdir(exist_ok=True)
    script = (
        f"set -e; mount --bind '{base}' '{stage}'; mount -t tmpfs -o mode=755 tmpfs '{closed}'; "
        f"mkdir -p '{base}'; mount --bind '{stage}' '{base}'; exec \"$@\""
    )
    return ["unshare", "--mount", "--propagation", "private", "sh", "-c", script, "sh", *switch]


def why_not_two_users(stage: Path, user: str) -> str:
    """Why another user can't run this installation here; empty where it can."""
    if os.geteuid() != 0:
        return "only root can make operating-system users; run this test as root"
    missing = [tool for tool in ("useradd", "setpriv", "unshare") if shutil.which(tool) is None]
    if missing:
        return f"{missing[0]} is not installed"
    command = as_user(user, stage, [sys.executable, "-c", "import federated"])
    done = subprocess.run(command, capture_output=True, text=True, check=False, cwd="/")
    return f"user {user} can't run {sys.executable}: {done.stderr.strip()[-300:]}" if done.returncode else ""


@dataclass
class Site:
    """A silo with its relay."""

    name: str
    folder: Path
    steward: str | None
    relay: str | None
    service_process: psutil.Popen | None = None
    relay_process: psutil.Popen | None = None
    fingerprint: str = ""
    proxy: ConnectProxy | None = None

    @property
    def settings(self) -> Path:
        return self.folder / "silo" / "silo.toml"

    @property
    def socket(self) -> Path:
        return self.folder / "run" / "silo.sock"

    @property
    def state_dir(self) -> Path:
        return self.folder / "silo" / "state"

    @property
    def relay_settings(self) -> Path:
        return self.folder / "relay" / "relay.toml"


class Deployment:
    """One coordinator and its silos; ``end`` leaves no process behind.

    ``at`` is the name of the site at which something is done, and empty at the coordinator: here all are one machine.
    """

    host, listen = "localhost", "127.0.0.1"

    def __init__(self, root: Path, model: Path) -> None:
        root.chmod(0o711)
        # A folder may be called anything: each of these signs means something to nginx, Flower, TOML or a URL.
        self.root, self.folder, self.model = root, root / "federation; {of} \"$host\" 'ö'?#", root / "model"
        shutil.copytree(model, self.model)
        for path in (self.model, *self.model.iterdir()):  # public, and read by every silo's user
            path.chmod(0o755 if path.is_dir() else 0o644)
        self.port = free_port()
        # A proxy for what else runs on the machine: nobody answers there.
        self.environment = {**os.environ, "OMP_NUM_THREADS": "1", "HTTPS_PROXY": "http://127.0.0.1:9"}
        self.sites: dict[str, Site] = {}
        self.started: list[psutil.Popen] = []
        self.fingerprint = ""

    # The coordinator

    def init(self) -> None:
        options = ["--name", "test-net", "--host", self.host, "--port", str(self.port), "--listen", self.listen]
        done = self.siloweave("federation", "init", str(self.folder), *options)
        self.fingerprint = done.stdout.split()[-1]

    def serve(self) -> psutil.Popen:
        before = self.log("federation").count("serving")  # of earlier starts
        process = self.start("federation", ["federation", "serve", str(self.folder)])
        self.wait_until("a federation that serves", lambda: self.log("federation").count("serving") > before, process)
        return process

    def run(self, name: str, *overrides: str, model: bool = True) -> psutil.Popen:
        """Starts `federation run`; its rounds are in ``rounds(name)``."""
        if model:
            shutil.copytree(self.model, self.root / "runs" / name / "model")
        return self.start(f"run-{name}", ["federation", "run", str(self.folder), *self.settings(name, *overrides)])

    def settings(self, name: str, *overrides: str) -> list[str]:
        """A run's settings as a command takes them."""
        settings = ["run.name=" + name, f"run.storage={self.root / 'runs'}", *overrides]
        return ["-c", "tiny", *(part for setting in settings for part in ("--set", setting))]

    def status(self) -> dict:
        return json.loads(self.siloweave("federation", "status", str(self.folder), "--json").stdout)

    def events(self, name: str, kind: str) -> list[dict]:
        path = self.root / "runs" / name / "federated" / "events.jsonl"
        lines = path.read_text().splitlines(keepends=True) if path.exists() else []
        found = [json.loads(line) for line in lines if line.endswith("\n")]  # the last one may be half there
        return [event for event in found if event["event"] == kind]

    def pid_of(self, program: str, state: Path | None = None) -> int:
        """The process of a supervisor's program; 0 where it is down at the moment."""
        found = json.loads(((state or self.folder / "state") / "processes.json").read_text())
        process = found["programs"][program]["process"]
        return process["pid"] if process else 0

    # The silos

    def add_site(
        self, name: str, steward: str | None = None, relay: str | None = None, proxy: ConnectProxy | None = None
    ) -> Site:
        """Everything at a silo, from keys to running processes, but its enrolment."""
        site = self.sites[name] = Site(name, self.root / name, steward, relay, proxy=proxy)
        for folder, owner, mode in (("silo", steward, 0o700), ("relay", relay, 0o700), ("run", steward, 0o755)):
            (site.folder / folder).mkdir(parents=True, exist_ok=True)
            (site.folder / folder).chmod(mode)
            if owner:
                shutil.chown(site.folder / folder, owner, owner)
        self._write_relay_settings(site)
        self._write_silo_settings(site)
        self.make_keys(site)
        self.trust(site)
        return site

    def make_keys(self, site: Site) -> None:
        """Those that are missing, and the site's enrolment."""
        at = site.name
        self.siloweave("silo", "relay", "-c", str(site.relay_settings), "--init", user=site.relay, at=at)
        card = site.folder / "relay.json"  # handed from one user to the other, as it is public
        shutil.copyfile(site.folder / "relay" / "state" / "relay.json", card)
        made = ["silo", "init", "-c", str(site.settings), "--relay", str(card)]
        site.fingerprint = self.siloweave(*made, user=site.steward, at=at).stdout.split()[-1]

    def trust(self, site: Site) -> None:
        coordinator = str(self.root / "coordinator.json")
        trust = ["silo", "trust", "-c", str(site.settings), coordinator, "--fingerprint", self.fingerprint]
        self.siloweave(*trust, user=site.steward, at=site.name)

    def start_site(self, site: Site) -> None:
        self.start_service(site)
        self.start_relay(site)

    def start_relay(self, site: Site) -> None:
        relay = ["silo", "relay", "-c", str(site.relay_settings)]
        site.relay_process = self.start(f"relay-{site.name}", relay, user=site.relay, at=site.name)

    def start_service(self, site: Site) -> None:
        command = ["silo", "serve", "-c", str(site.settings), "--socket", str(site.socket)]
        process = site.service_process = self.start(f"service-{site.name}", command, user=site.steward, at=site.name)
        self.wait_until(f"service of {site.name}", lambda: is_serving(f"unix:{site.socket}", SERVICE), process)

    def enrol(self, site: Site, *, check: bool = True) -> subprocess.CompletedProcess:
        enrolment = self.root / f"{site.name}.json"
        shutil.copyfile(self.enrolment(site), enrolment)
        command = ["federation", "enrol", str(self.folder), str(enrolment), "--fingerprint", site.fingerprint]
        return self.siloweave(*command, check=check)

    def enrolment(self, site: Site) -> Path:
        """Where `silo init` has put it."""
        return site.state_dir / "enrolment.json"

    def _write_relay_settings(self, site: Site) -> None:
        shutil.copyfile(self.folder / "coordinator.json", self.root / "coordinator.json")
        site.relay_settings.write_text(
            f'state_dir = "{site.folder / "relay" / "state"}"\n'
            f'coordinator = "{self.root / "coordinator.json"}"\n'
            f'coordinator_fingerprint = "{self.fingerprint}"\n'
            f'silo_address = "unix:{site.socket}"\n'
            + (f'proxy = "http://127.0.0.1:{site.proxy.port}"\nproxy_login_file = "login"\n' if site.proxy else "")
        )
        if site.proxy:
            (site.folder / "relay" / "login").write_text(site.proxy.login)
            _give(site.folder / "relay" / "login", site.relay, 0o600)
        _give(site.relay_settings, site.relay, 0o600)

    def _write_silo_settings(self, site: Site) -> None:
        config = simulated_silo(load("tiny"), site.name, self.model)
        silo, data = {"state_dir": str(site.state_dir), "relay_user": site.relay or ""}, {}
        if site.relay:
            records = site.folder / "silo" / "records.jsonl"
            lines = [json.dumps({"text": f"patient {n} was seen on day {n % 28}"}) for n in range(PRIVATE_RECORDS)]
            records.write_text("\n".join(lines))
            _give(records, site.steward, 0o600)
            data = {"source": str(records), "public": False, "text": "text", "silo": "", "unit": ""}
            silo["public_record_count"] = PRIVATE_RECORDS
        config = config.model_copy(
            update={"silo": config.silo.model_copy(update=silo), "data": config.data.model_copy(update=data)}
        )
        site.settings.write_text(to_toml(config))
        _give(site.settings, site.steward, 0o600)

    # Processes

    def command(self, arguments: list[str], user: str | None, at: str) -> list[str]:
        command = [sys.executable, "-m", "siloweave", *arguments]
        return as_user(user, self.root / "stage", command) if user else command

    def siloweave(
        self, *arguments: str, user: str | None = None, at: str = "", check: bool = True
    ) -> subprocess.CompletedProcess:
        done = warm_commands.run(
            self.command(list(arguments), user, at),
            env=self._environment(user, at),
            cwd=self.root,
            capture_output=True,
            text=True,
            timeout=COMMAND_S,
            check=False,
        )
        assert not check or done.returncode == 0, f"{arguments}\n{done.stdout}\n{done.stderr}"
        return done

    def start(self, name: str, arguments: list[str], user: str | None = None, at: str = "") -> psutil.Popen:
        return self.popen(name, self.command(arguments, user, at), self._environment(user, at))

    def popen(self, name: str, command: list[str], environment: dict[str, str]) -> psutil.Popen:
        """Starts a process with a log of its own, which ``end`` ends."""
        with (self.root / f"{name}.log").open("ab") as log:
            process = warm_commands.watched(
                command, stdin=subprocess.DEVNULL, stdout=log, stderr=log, env=environment, cwd=self.root
            )
        self.started.append(process)
        return process

    def _environment(self, user: str | None, at: str) -> dict[str, str]:
        if not user:
            return self.environment
        home = self.root / "home" / user
        home.mkdir(parents=True, exist_ok=True)
        shutil.chown(home, user, user)
        return {**self.environment, "HOME": str(home), "XDG_STATE_HOME": str(home / ".local" / "state")}

    def wait_until(
        self, what: str, holds: Callable[[], bool], process: psutil.Popen | None = None, timeout_s: float = START_S
    ) -> None:
        deadline = time.monotonic() + timeout_s
        while not holds():
            assert process is None or process.poll() is None, f"{process.args} ended before {what}\n{self.logs()}"
            assert time.monotonic() < deadline, f"no {what} after {timeout_s} s\n{self.logs()}"
            time.sleep(0.2)

    def log(self, name: str) -> str:
        path = self.root / f"{name}.log"
        return path.read_text(errors="replace") if path.exists() else ""

    def logs(self) -> str:
        paths = [*self.root.glob("*.log"), *self.root.glob("*/state/*.log"), *self.root.glob("*/*/state/*.log")]
        return "\n".join(
            f"--- {path.relative_to(self.root)}\n{path.read_text(errors='replace')[-2000:]}" for path in paths
        )

    def end(self) -> None:
        end_tree([process for process in self.started if process.is_running()], grace_s=15)


def _give(path: Path, user: str | None, mode: int) -> None:
    path.chmod(mode)
    if user:
        os.chown(path, pwd.getpwnam(user).pw_uid, grp.getgrnam(user).gr_gid)
