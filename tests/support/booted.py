"""A machine that systemd has booted, in a container over this machine's own root: nothing of it outlives its test.

Its disk is memory over the root of this machine, which is only read. What it runs is what `tiny_run` has installed, at
the place that the shipped units name.
"""

import contextlib
import os
import shutil
import subprocess
import sys
import sysconfig
import time
from pathlib import Path

import psutil

TOOLS = ("mount", "nsenter", "setpriv", "systemctl", "systemd-nspawn", "unshare")
BOOT_S, COMMAND_S = 600.0, 600.0  # ends a wait for what will not come
OPT, DEPENDENCIES, PYTHON = Path("/opt/siloweave"), Path("/opt/dependencies"), Path("/opt/python")
PROGRAM = str(OPT / "bin" / "siloweave")
CGROUPS = Path("/sys/fs/cgroup")
_REBOOTS = 133  # how nspawn ends then, for whoever has started it to start it again
# A process that ends it with all that runs on it, and that is ended with whoever has started it.
_ALONE = ("--mount", "--propagation=private", "--pid", "--mount-proc", "--fork", "--kill-child=KILL")
_MACHINE = f"""set -e
for group in $5; do echo 0 > "$group/cgroup.procs"; done
mount -t tmpfs -o mode=755 tmpfs /run
mount -t tmpfs -o mode=755 tmpfs "$1"; mkdir "$1/up" "$1/work" "$1/root"
mount -t overlay overlay -o "lowerdir=/,upperdir=$1/up,workdir=$1/work" "$1/root"
rm -rf "$1"/root/etc/systemd/system/*.wants "$1/root/opt/siloweave"
mkdir -p "$1/root/opt/siloweave/bin" "$1/root/opt/siloweave/lib/$2" "$1/root/opt/python" "$1/root/opt/dependencies"
cp -r "$3/lib/$2/site-packages" "$1/root/opt/siloweave/lib/$2/"; echo /opt/dependencies > \\
  "$1/root/opt/siloweave/lib/$2/site-packages/dependencies.pth"
for program in "$3/bin/siloweave" "$4"/fl*; do
  sed '1s,^#!.*,#!/opt/siloweave/bin/python,' "$program" > "$1/root/opt/siloweave/bin/$(basename "$program")"
done
chmod 755 "$1"/root/opt/siloweave/bin/*
for name in python python3 "$2"; do ln -s "/opt/python/bin/$2" "$1/root/opt/siloweave/bin/$name"; done
printf 'home = /opt/python/bin\\ninclude-system-site-packages = false\\n' > "$1/root/opt/siloweave/pyvenv.cfg"
echo /opt/python/lib > "$1/root/etc/ld.so.conf.d/siloweave-test.conf"
shift 5
set +e; while "$@"; [ $? = {_REBOOTS} ]; do :; done
"""


class Booted:
    """One booted machine without a network but its loopback.

    Args:
        folder: an empty one, for its disk.
        environment: where the installed Siloweave is.
    """

    def __init__(self, folder: Path, environment: Path) -> None:
        version = f"python{sys.version_info.major}.{sys.version_info.minor}"
        self._log = folder.with_suffix(".log")
        boot = [
            *("systemd-nspawn", "--register=no", "--keep-unit", "--link-journal=no", "--resolv-conf=off"),
            *("--timezone=off", f"--directory={folder / 'root'}", "--machine=siloweave-test", "--private-network"),
            *(f"--bind-ro={Path(sys.base_prefix).resolve()}:{PYTHON}", "--console=pipe", "--boot"),
            f"--bind-ro={sysconfig.get_path('purelib')}:{DEPENDENCIES}",
        ]
        self._groups = _own_groups(folder.name)
        programs = str(Path(sys.executable).parent)
        given = [str(folder), version, str(environment), programs, " ".join(map(str, self._groups))]
        command = ["setpriv", "--pdeathsig=KILL", "unshare", *_ALONE]
        with self._log.open("wb") as log:
            self._holder = psutil.Popen(
                [*command, "sh", "-c", _MACHINE, "sh", *given, *boot], stdin=subprocess.DEVNULL, stdout=log, stderr=log
            )
        try:
            self._wait()
            self.run("ldconfig")  # of a Python whose library is at a place that units may not see
        except BaseException:
            self.end()
            raise

    @property
    def first(self) -> int:
        """Its systemd."""
        with contextlib.suppress(psutil.Error):
            for process in self._holder.children(recursive=True):
                if process.name() == "systemd":
                    return int(process.pid)
        return 0

    def _wait(self) -> None:
        deadline, said = time.monotonic() + BOOT_S, ""
        while said not in ("running", "degraded"):
            if self._holder.poll() is not None or time.monotonic() > deadline:
                raise OSError(f"no booted system: {said} {self._log.read_text(errors='replace')[-500:].strip()}")
            time.sleep(0.3)
            said = self.run("systemctl", "is-system-running", check=False).stdout.strip() if self.first else ""

    def reboot(self) -> None:
        """Ends it in order, and boots it again on the same disk."""
        before = self.first
        self.run("systemctl", "reboot", check=False)
        deadline = time.monotonic() + BOOT_S
        while self.first in (before, 0) and self._holder.poll() is None and time.monotonic() < deadline:
            time.sleep(0.3)
        self._wait()

    def command(self, *command: str, user: str = "") -> list[str]:
        """What runs a command there, as root or as a user."""
        entered = ["nsenter", f"--target={self.first}", "--all", "env", "--ignore-environment", "LANG=C.UTF-8"]
        entered += [f"PATH={OPT / 'bin'}:/usr/sbin:/usr/bin:/sbin:/bin"]
        return [*entered, *(["runuser", f"--user={user}", "--"] if user else ["HOME=/root"]), *command]

    def run(self, *command: str, user: str = "", check: bool = True) -> subprocess.CompletedProcess[str]:
        """Runs a command there."""
        done = subprocess.run(
            self.command(*command, user=user),
            stdin=subprocess.DEVNULL,
            capture_output=True,
            text=True,
            timeout=COMMAND_S,
            check=False,
        )
        assert not check or done.returncode == 0, f"{command}\n{done.stdout}\n{done.stderr}"
        return done

    def path(self, path: str) -> Path:
        """A file of it, as it is seen from outside."""
        return Path(f"/proc/{self.first}/root{path}")

    def end(self) -> None:
        """Ends it with all that runs on it."""
        with contextlib.suppress(psutil.Error):
            self._holder.kill()
        self._holder.wait(COMMAND_S)
        for group in self._groups:
            _remove(group)


def _own_groups(name: str) -> list[Path]:
    """A control group in each tree of systemd's, or two booted machines would take each other's services for theirs."""
    own = dict(line.split(":", 2)[1:] for line in Path("/proc/self/cgroup").read_text().splitlines())
    trees = ((CGROUPS / "systemd", "name=systemd"), (CGROUPS / "unified", ""), (CGROUPS, ""))  # of versions 1 and 2
    groups = [
        tree / own[kind].lstrip("/") / name for tree, kind in trees if kind in own and (tree / "cgroup.procs").exists()
    ]
    for group in groups:
        group.mkdir()
    return groups


def _remove(group: Path) -> None:
    """Removes a control group whose processes have ended, once the kernel has seen that."""
    deadline = time.monotonic() + COMMAND_S
    for part in sorted((path for path in (group, *group.rglob("*")) if path.is_dir()), reverse=True):
        while part.exists():
            try:
                part.rmdir()
            except OSError:
                if time.monotonic() > deadline:
                    raise
                time.sleep(0.1)


def why_no_boot() -> str:
    """Why nothing can be booted here, in one line; empty where it is worth trying."""
    if os.geteuid() != 0:
        return "only root can boot a system in a container; run this test as root"
    missing = [tool for tool in TOOLS if shutil.which(tool) is None]
    return f"{', '.join(missing)}: not installed (package systemd-container)" if missing else ""
