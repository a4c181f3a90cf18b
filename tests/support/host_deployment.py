"""A federation as it is deployed, with a machine for the coordinator, for each silo and for one site's proxy."""

import contextlib
import json
import shutil
import signal
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import psutil
from deployment import Deployment, Site
from hosts import Host, Lan
from repository import SUPPORT

from configs.errors import InputError
from configs.storage.layout import SiloFiles
from configs.storage.storage import COMMITTED
from federated.coordinator.round_commits import SILOS
from privacy.ledger.chain import Entry, verify_entries
from privacy.ledger.file import read_only

NET = "10.77.0."
COORDINATOR, PROXY, FIRST_SILO = f"{NET}1", f"{NET}2", 11
NAME, PROXY_PORT = "fed.hosts.test", 3128
DISK_BYTES = 32 * 2**20
FAKETIME = next(Path("/usr/lib").glob("*/faketime/libfaketimeMT.so.1"), None)


def wrong_clock(ahead_s: int) -> dict[str, str]:
    """Environment of a process whose clock is off; time that passes is right."""
    return {"LD_PRELOAD": str(FAKETIME), "FAKETIME": f"{ahead_s:+d}", "DONT_FAKE_MONOTONIC": "1"}


class HostDeployment(Deployment):
    """The coordinator at its host, each site at one of its own.

    The site behind the proxy has no way to the coordinator's name or address: its proxy alone has. Another one's state
    is on a disk of its own.
    """

    host, listen = NAME, COORDINATOR

    def __init__(self, root: Path, model: Path, network: Lan, behind_proxy: str, small_disk: str) -> None:
        super().__init__(root, model)
        self.network, self.behind_proxy, self.small_disk = network, behind_proxy, small_disk
        self.hosts: dict[str, Host] = {}
        self.ahead_s: dict[str, int] = {}  # clocks that are wrong, by host
        (root / "hosts").write_text(f"127.0.0.1 localhost\n{COORDINATOR} {NAME}\n")
        self.boot("")

    # Hosts

    def boot(self, at: str) -> Host:
        """Starts a host, or starts it again."""
        address = COORDINATOR if not at else f"{NET}{FIRST_SILO + list(self.sites).index(at)}"
        host = self.hosts[at] = self.network.boot(address)
        if at != self.behind_proxy:
            host.run("mount", "--bind", str(self.root / "hosts"), "/etc/hosts")
        if at and at == self.small_disk:
            state = self.sites[at].state_dir
            state.mkdir(parents=True, exist_ok=True)
            host.run("mount", "-t", "tmpfs", "-o", f"size={DISK_BYTES},mode=0700", "tmpfs", str(state))
        if not at:
            host.close_all_but(open_ports=(self.port,))
        elif at == self.behind_proxy:
            host.close_all_but(f"{PROXY}:{PROXY_PORT}")
        else:
            host.close_all_but(f"{COORDINATOR}:{self.port}")
        return host

    def boot_proxy(self) -> Host:
        """The way out of one site: tinyproxy where it is, or else the one of these tests."""
        host = self.hosts["proxy"] = self.network.boot(PROXY)
        host.run("mount", "--bind", str(self.root / "hosts"), "/etc/hosts")
        host.close_all_but(f"{COORDINATOR}:{self.port}", open_ports=(PROXY_PORT,))
        settings = self.root / "proxy.conf"
        settings.write_text(
            f"Port {PROXY_PORT}\nListen {PROXY}\nConnectPort {self.port}\nAllow {NET}0/24\nTimeout 600\n"
            f'LogFile "{self.root / "proxy.log"}"\nLogLevel Connect\n'
        )
        own = f"import lines; lines.serve_proxy('{PROXY}', {PROXY_PORT}, '{COORDINATOR}')"
        installed = shutil.which("tinyproxy")
        self._proxy = [installed, "-d", "-c", str(settings)] if installed else [sys.executable, "-c", own]
        self._start_proxy()
        return host

    def _start_proxy(self) -> None:
        command = [*self.hosts["proxy"].enter(self.root), *self._proxy]
        self.popen("proxy", command, {**self.environment, "PYTHONPATH": str(SUPPORT)})

    def add_sites(self, *names: str) -> None:
        """All of some sites, from their hosts to their enrolments; their keys are made at the same time."""
        for name in names:
            self.sites[name] = Site(name, self.root / name, None, None)
            self.boot(name)  # a host ends with the thread that has started it
        with ThreadPoolExecutor(2) as pool:
            made = list(pool.map(self.add_site, names))
        for site in made:
            self.enrol(site)

    def state(self, name: str) -> SiloFiles:
        """A silo's files, as they are seen from outside of its host."""
        return SiloFiles(self.hosts[name].path(self.sites[name].state_dir))

    def enrolment(self, site: Site) -> Path:
        return self.state(site.name).directory / "enrolment.json"

    def _write_relay_settings(self, site: Site) -> None:
        super()._write_relay_settings(site)
        if site.name == self.behind_proxy:
            with site.relay_settings.open("a") as settings:
                settings.write(f'proxy = "http://{PROXY}:{PROXY_PORT}"\n')

    # Processes

    def command(self, arguments: list[str], user: str | None, at: str) -> list[str]:
        return [*self.hosts[at].enter(self.root), *super().command(arguments, user, at)]

    def _environment(self, user: str | None, at: str) -> dict[str, str]:
        home = self.root / "home" / (at or "coordinator")
        clock = wrong_clock(self.ahead_s[at]) if at in self.ahead_s else {}
        return {**self.environment, **clock, "HOME": str(home), "XDG_STATE_HOME": str(home / "state")}

    def process(self, at: str, text: str) -> psutil.Process:
        """A process of a host, by what is in its command line: waited for, as it may be on its way."""
        self.wait_until(f"process {text} at {at or 'the coordinator'}", lambda: bool(self.hosts[at].find(text)))
        return self.hosts[at].find(text)[0]

    def kill(self, at: str, text: str) -> None:
        """SIGKILL for all such processes of a host."""
        self.process(at, text)  # or nothing would be tried
        for process in self.hosts[at].find(text):
            with contextlib.suppress(psutil.Error):
                process.kill()

    def stand_still(self, at: str, still: bool) -> None:
        """SIGSTOP, or SIGCONT, for all that runs at a host."""
        for process in self.hosts[at].processes():
            with contextlib.suppress(psutil.Error):
                process.send_signal(signal.SIGSTOP if still else signal.SIGCONT)
        for entering in [] if still else self.started:  # which stands still with what it has started
            with contextlib.suppress(psutil.Error):
                entering.send_signal(signal.SIGCONT)

    def let_end(self, entered: psutil.Popen) -> None:
        """Waits for the end of what ``popen`` has started; nsenter stops itself with that, and would never see it."""

        def ended() -> bool:
            with contextlib.suppress(psutil.Error):
                entered.send_signal(signal.SIGCONT)
            return entered.poll() is not None

        self.wait_until("end of a process", ended)

    def end(self) -> None:
        for entered in self.started:  # one that stands still would leave a dead child, for which its host waits
            with contextlib.suppress(psutil.Error):
                entered.kill()
        for host in self.hosts.values():
            host.end()
        super().end()

    # What befalls hosts

    def cut_power(self) -> None:
        """Of all hosts at once. Lines are cut first, so that nobody hears a connection's end; disks stay."""
        for host in self.hosts.values():
            host.link("down")
        for host in self.hosts.values():
            while left := host.processes():
                for process in left:
                    with contextlib.suppress(psutil.Error):
                        process.kill()
        for entered in self.started:
            self.let_end(entered)

    def start_everything(self) -> None:
        """What systemd does when power is back."""
        for host in self.hosts.values():
            host.link("up")
        self._start_proxy()
        self.serve()
        for site in self.sites.values():
            self.start_site(site)

    def back_up(self, name: str) -> Path:
        """Its steward's backup of the ledger."""
        copy = self.sites[name].folder / "backup.sqlite"
        self.siloweave("ledger", "backup", str(self.sites[name].state_dir), "--to", str(copy), at=name)
        return copy

    def put_back_ledger(self, name: str, copy: Path) -> None:
        """A backup of the ledger, in the place of the file and of what was not yet in it."""
        ledger = self.state(name).ledger
        for path in ledger.parent.glob(f"{ledger.name}*"):
            path.unlink()
        shutil.copyfile(copy, ledger)

    def put_back(self, name: str, copy: Path, *places: Path) -> None:
        """Folders of a silo as they were when a copy was made."""
        for place in places:
            there = self.hosts[name].path(place)
            shutil.rmtree(there)
            shutil.copytree(copy / place.name, there)

    # Rounds and ledgers

    def rounds(self, run: str) -> list[dict]:
        return self.events(run, "round")

    def wait_for_round(self, run: str, process: psutil.Popen, *silos: str, without: str = "") -> dict:
        """The next round that is committed from now on, with some silos among those that answered, and without one."""
        seen = len(self.rounds(run))

        def found() -> list[dict]:
            return [
                event
                for event in self.rounds(run)[seen:]
                if set(silos) <= set(event["answered"]) and without not in event["answered"]
            ]

        self.wait_until(f"a round with {silos}, without {without!r}", lambda: bool(found()), process)
        return found()[0]

    def chain(self, name: str) -> list[Entry]:
        """A silo's ledger as it is at a moment in which SQLite can open it, which it can't while the silo closes it."""
        found: list[Entry] = []

        def read() -> bool:
            with contextlib.suppress(InputError):
                found[:] = read_only(self.state(name).ledger)
            return bool(found)

        self.wait_until(f"a ledger of {name} that can be read", read)
        return found

    def entries(self, name: str) -> list[dict]:
        """The same replayed; the place of an entry is its number, less one."""
        return verify_entries(self.chain(name), name)

    def receipts(self, run: str) -> list[tuple[int, str, dict]]:
        """Round, silo and receipt of all that is committed of a run."""
        found = []
        for path in sorted((self.root / "runs" / run / "federated").glob(f"round-*/{COMMITTED}")):
            told = json.loads((path.parent / SILOS).read_text())
            number = int(path.parent.name.removeprefix("round-"))
            found += [(number, name, silo["receipt"]) for name, silo in told.items()]
        return found

    def newest_receipts(self, run: str) -> Path:
        """The file in which a coordinator has committed them."""
        return max((self.root / "runs" / run / "federated").glob(f"round-*/{COMMITTED}")).with_name(SILOS)
