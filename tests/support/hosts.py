"""Several machines on one: hosts with a network, processes, mounts and a firewall of their own, on one bridge.

A host is a process in namespaces of its own. Nothing has a name outside of them: when that process ends, or whoever
started it is killed, its processes, interfaces and mounts are gone, and no other session can be met.
"""

import contextlib
import functools
import os
import shutil
import subprocess
from collections.abc import Iterator
from pathlib import Path

import psutil

TOOLS = ("ip", "mount", "nsenter", "setpriv", "tc", "unshare")
BRIDGE, LINK = "br0", "e0"
COMMAND_S = 300  # ends a wait for what will not come
# It answers once its mounts are its own; as nobody waits for the dead of a host, its first process ignores them.
_FIRST = "set -e; ip link set lo up; echo up; trap '' CHLD; exec sleep infinity"
_UNSHARED = ("--net", "--mount", "--pid", "--mount-proc", "--fork", "--kill-child=KILL")
_NEW_HOST = ("setpriv", "--pdeathsig=KILL", "unshare", *_UNSHARED)
_FIREWALL = """
table inet firewall {{
  chain in {{ type filter hook input priority 0; policy drop; iif lo accept;
    ct state established,related accept; {open} }}
  chain out {{ type filter hook output priority 0; policy drop; oif lo accept;
    ct state established,related accept; {ways} }}
}}
"""

_LOSS = """
table inet line {{
  chain in {{ type filter hook input priority -10; iif {link} numgen random mod 1000 < {per_mille} counter drop; }}
}}
"""


class Host:
    """One machine; ``end`` is its power cut.

    Attributes:
        address: on the bridge; empty for the machine that is the bridge.
        pid: of its first process.
    """

    def __init__(self, address: str = "") -> None:
        self.address = address
        self._holder = subprocess.Popen(
            [*_NEW_HOST, "sh", "-c", _FIRST],
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        assert self._holder.stdout and self._holder.stderr
        if self._holder.stdout.readline() != "up\n":
            raise OSError(f"no namespaces here: {self._holder.stderr.read().strip()}")
        self.pid = psutil.Process(self._holder.pid).children()[0].pid

    def enter(self, folder: Path | str = "/") -> list[str]:
        """What stands before a command that is run on it."""
        return ["nsenter", f"--target={self.pid}", "--net", "--mount", "--pid", "--", "env", f"--chdir={folder}"]

    def run(self, *command: str, given: str | None = None) -> str:
        """Runs a command on it, and tells what it printed.

        Raises:
            OSError: it failed.
        """
        done = subprocess.run(
            [*self.enter(), *command], input=given, capture_output=True, text=True, timeout=COMMAND_S, check=False
        )
        if done.returncode:
            raise OSError(f"{' '.join(command)}: {done.stderr.strip()}")
        return done.stdout

    def processes(self) -> list[psutil.Process]:
        """All of its processes but the first, and but those that are dead and wait for their parents."""
        return [process for process in psutil.process_iter() if process.pid != self.pid and self._holds(process)]

    def find(self, text: str) -> list[psutil.Process]:
        """Those of its processes whose command line has a text in it; not the ones by which it is entered."""
        found = []
        for process in self.processes():
            with contextlib.suppress(psutil.Error):
                found += [process] if text in " ".join(process.cmdline()) else []
        return found

    def _holds(self, process: psutil.Process) -> bool:
        with contextlib.suppress(OSError, psutil.Error):
            place, own = (Path(f"/proc/{pid}/ns/pid").readlink() for pid in (process.pid, self.pid))
            return place == own and process.status() != psutil.STATUS_ZOMBIE
        return False

    def link(self, state: str) -> None:
        """Its line: ``up`` or ``down``."""
        self.run("ip", "link", "set", LINK, state)

    def path(self, path: Path) -> Path:
        """A file of it, as it is seen from outside of its mounts."""
        return Path(f"/proc/{self.pid}/root{path}")

    def close_all_but(self, *ways: str, open_ports: tuple[int, ...] = ()) -> None:
        """Its firewall: lets out to ``ADDRESS:PORT`` only, and in to some ports.

        Without nft there are no ports to it: addresses elsewhere are no longer reached, and reach nothing here.
        """
        targets = [way.rpartition(":") for way in ways]
        if not has_firewall():
            self.run("ip", "address", "replace", f"{self.address}/24", "dev", LINK, "noprefixroute")
            self.run("ip", "route", "flush", "dev", LINK)
            for address, _, _ in targets:
                self.run("ip", "route", "replace", f"{address}/32", "dev", LINK)
            return
        rules = _FIREWALL.format(
            open=" ".join(f"tcp dport {port} accept;" for port in open_ports),
            ways=" ".join(f"ip daddr {address} tcp dport {port} accept;" for address, _, port in targets),
        )
        self.run("nft", "-f", "-", given=rules)

    def end(self) -> None:
        """Ends it with all that runs on it, at once."""
        with contextlib.suppress(ProcessLookupError):
            os.kill(self.pid, 9)
        self._holder.wait(COMMAND_S)
        for pipe in (self._holder.stdout, self._holder.stderr):
            if pipe:
                pipe.close()


class Lan:
    """A bridge and the hosts on it, whose lines are slow and lose packets."""

    def __init__(self, delay_ms: int = 0, loss_percent: float = 0.0) -> None:
        self._delay_ms, self._loss_percent = delay_ms, loss_percent
        self.hosts: list[Host] = []
        self.bridge = Host()
        try:
            self.bridge.run("ip", "link", "add", BRIDGE, "type", "bridge")
            self.bridge.run("ip", "link", "set", BRIDGE, "up")
        except BaseException:
            self.end()
            raise

    def boot(self, address: str) -> Host:
        """A new host, or one whose power was cut, with the same address."""
        host = Host(address)
        self.hosts.append(host)
        port = f"p{address.rpartition('.')[2]}"
        self._net("ip", "link", "add", port, "type", "veth", "peer", "name", LINK, "netns", str(host.pid))
        self._net("ip", "link", "set", port, "master", BRIDGE, "up")
        host.run("ip", "address", "add", f"{address}/24", "dev", LINK)
        host.link("up")
        self._spoil(host, port)
        return host

    def _spoil(self, host: Host, port: str) -> None:
        """Makes a line slow and lossy; where the kernel has no netem, lossy by nft's numbers, and as fast as it is."""
        bad = ("root", "netem", "delay", f"{self._delay_ms}ms", "loss", f"{self._loss_percent}%")
        if has_netem():
            self._net("tc", "qdisc", "add", "dev", port, *bad)
            host.run("tc", "qdisc", "add", "dev", LINK, *bad)
        elif has_firewall():
            host.run("nft", "-f", "-", given=_LOSS.format(link=LINK, per_mille=round(10 * self._loss_percent)))

    def _net(self, *command: str) -> None:
        """On the bridge, where processes have the numbers that they have outside."""
        entered = ["nsenter", f"--target={self.bridge.pid}", "--net", "--", *command]
        done = subprocess.run(entered, capture_output=True, text=True, timeout=COMMAND_S, check=False)
        if done.returncode:
            raise OSError(f"{' '.join(command)}: {done.stderr.strip()}")

    def end(self) -> None:
        """Ends all of them."""
        for host in (*self.hosts, self.bridge):
            host.end()


@contextlib.contextmanager
def lan(delay_ms: int = 0, loss_percent: float = 0.0) -> Iterator[Lan]:
    """A LAN that is gone afterwards."""
    made = Lan(delay_ms, loss_percent)
    try:
        yield made
    finally:
        made.end()


@functools.cache
def has_firewall() -> bool:
    """Whether hosts can have firewalls that know ports: nft is here, and this kernel does what it asks for."""
    return shutil.which("nft") is not None and _can("nft", "-f", "-", given=_FIREWALL.format(open="", ways=""))


@functools.cache
def has_netem() -> bool:
    """Whether this kernel can delay packets."""
    return _can("tc", "qdisc", "add", "dev", "lo", "root", "netem", "delay", "1ms")


def _can(*command: str, given: str | None = None) -> bool:
    """Whether a command works on a host that is there for that alone."""
    host = Host()
    try:
        host.run(*command, given=given)
    except OSError:
        return False
    finally:
        host.end()
    return True


def why_no_hosts() -> str:
    """Why there can be no hosts here, in one line; empty where there can be."""
    if os.geteuid() != 0:
        return "only root can make network namespaces; run this test as root"
    missing = [tool for tool in TOOLS if shutil.which(tool) is None]
    if missing:
        return f"{', '.join(missing)}: not installed (packages iproute2, util-linux)"
    try:
        with lan(delay_ms=1) as tried:
            host = tried.boot("10.77.0.1")
            if has_firewall():
                host.close_all_but("10.77.0.2:1")
    except OSError as error:
        return f"hosts can't be made here: {error}".replace("\n", " ")
    return ""
