"""``siloweave doctor``: looks at this machine before a run does, and says the fix for what it finds."""

import ctypes
import os
import platform
import shutil
import socket
import sys
import tempfile
import time
from collections.abc import Callable
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

from cluster.runtime import limits
from cluster.runtime.session import address_of, no_ray, unreachable
from configs.errors import InputError
from configs.findings import Finding
from configs.run_directory import run_directory
from configs.schema.schema import RunConfig
from configs.storage.bucket import Bucket
from federated.protocol.clocks import CLOCK_RULE, shown
from trainer.pretraining.deepspeed_settings import likely_device, unsupported

_WANTED = {
    "torch": (2, 8),
    "ray": (2, 55),
    "deepspeed": (0, 19),
    "flwr": (1, 41),
    "opacus": (1, 6),
    "transformers": (5, 0),
}
_STALE_LOCK_S = 600
_TIMEX_BYTES, _TIME_ERROR = 1024, 5  # more than struct timex has; adjtimex(2)
_MIN_DISK_BYTES, _MIN_SHM_BYTES = 2 * 2**30, 512 * 2**20


def examine(config: RunConfig) -> list[Finding]:
    """All checks, each one independent of the others."""
    checks: list[Callable[[], Finding]] = [
        *(lambda name=name, least=least: _package(name, least) for name, least in _WANTED.items()),
        _compiler,
        lambda: _cpus(config),
        lambda: _space("shared memory", Path("/dev/shm"), _MIN_SHM_BYTES, "give the container more (--shm-size=1g)"),  # noqa: S108
        lambda: _limit("Ray's folder", limits.temporary()),
        _build_locks,
        lambda: _address(config),
        lambda: _options(config),
    ]
    return [*coordinating(config), *(check() for check in checks)]


def coordinating(config: RunConfig) -> list[Finding]:
    """The checks that hold for any machine, and all there are of one that trains nothing itself."""
    storage = run_directory(config)
    # Of an object store this machine keeps a mirror.
    what, which = ("the mirror", "SILOWEAVE_CACHE") if config.run.url else ("run.storage", "run.storage")
    checks: list[Callable[[], Finding]] = [
        _system,
        _python,
        lambda: _space(f"disk for {what}", _existing(storage), _MIN_DISK_BYTES, f"choose another {which}"),
        lambda: _writable(_existing(storage), what, which),
        *([lambda: _store(config)] if config.run.url else []),
        _loopback,
        lambda: _limit("open files", limits.files()),
        lambda: _limit("paths of sockets", limits.sockets()),
        _home,
        _clock,
    ]
    return [check() for check in checks]


def _system() -> Finding:
    found = f"{platform.system()} {platform.machine()}"
    return Finding("system", sys.platform == "linux", found, "run it on Linux; nothing else was tried")


def _python() -> Finding:
    found = ".".join(str(part) for part in sys.version_info[:3])
    return Finding("Python", sys.version_info[:2] >= (3, 11), found, "install Python 3.11 and run `make install`")


def _package(name: str, least: tuple[int, int]) -> Finding:
    wanted = ".".join(str(part) for part in least)
    fix = f"install {name} {wanted} or newer: `make install`"
    try:
        found = version(name)
    except PackageNotFoundError:
        return Finding(name, ok=False, found="not installed", fix=fix)
    numbers = tuple(int(part) for part in found.split("+")[0].split(".")[:2])
    return Finding(name, numbers >= least, found, fix)


def _compiler() -> Finding:
    found = shutil.which("cc") or shutil.which("gcc")
    return Finding("C compiler", found is not None, found or "none", "install one (Debian: `apt install gcc`)")


def _cpus(config: RunConfig) -> Finding:
    there = limits.cores()
    needed = max(config.cluster.world_size, config.federated.workers) * config.cluster.threads_per_rank
    fix = "lower cluster.world_size or federated.workers, or go on and expect it to be slow"
    return Finding("CPU cores", there >= needed, f"{there} for {needed} processes", fix)


def _existing(path: Path) -> Path:
    return next(parent for parent in (path, *path.parents) if parent.exists())


def _space(check: str, path: Path, least: int, fix: str) -> Finding:
    free = shutil.disk_usage(path).free if path.exists() else 0
    return Finding(check, free >= least, f"{free / 2**30:.1f} GiB free at {path}", f"free some space, or {fix}")


def _store(config: RunConfig) -> Finding:
    check = "run.storage can be written, read and cleaned"
    try:
        Bucket(config.run.storage, run_directory(config)).prove()
    except InputError as error:
        found, _, fix = str(error).partition("; ")
        return Finding(check, ok=False, found=found, fix=fix)
    return Finding(check, ok=True, found=config.run.storage)


def _writable(path: Path, what: str, which: str) -> Finding:
    try:
        with tempfile.TemporaryFile(dir=path):
            return Finding(f"{what} is writable", ok=True, found=str(path))
    except OSError as error:
        return Finding(
            f"{what} is writable", ok=False, found=f"{path}: {error.strerror}", fix=f"choose another {which}"
        )


def _loopback() -> Finding:
    try:
        with socket.socket() as server, socket.socket() as client:
            server.bind(("127.0.0.1", 0))
            server.listen(1)
            client.settimeout(2)
            client.connect(server.getsockname())
            return Finding("loopback ports", ok=True, found="a free port answers")
    except OSError as error:
        return Finding("loopback ports", ok=False, found=str(error), fix="allow TCP on 127.0.0.1")


def _limit(check: str, problem: str | None) -> Finding:
    found, _, fix = (problem or "enough").partition(": ")
    return Finding(check, problem is None, found, fix)


def _home() -> Finding:
    home = os.path.expanduser("~")  # noqa: PTH111  # Path's raises where there is none
    fix = "set HOME to a folder of this user's: libraries keep what they compile there"
    return Finding("home folder", Path(home).is_dir() and home != "~", home if home != "~" else "none", fix)


def _build_locks() -> Finding:
    """A process that was killed while DeepSpeed compiled leaves a lock on which every later start hangs."""
    root = Path(os.environ.get("TORCH_EXTENSIONS_DIR", os.path.expanduser("~/.cache/torch_extensions")))  # noqa: PTH111
    now = time.time()
    stale = [str(lock) for lock in root.rglob("lock") if now - lock.stat().st_mtime > _STALE_LOCK_S]
    return Finding("DeepSpeed build locks", not stale, ", ".join(stale) or "none", f"rm {' '.join(stale)}")


def _clock() -> Finding:
    """No failure: what counts is the difference to another machine, which `siloweave silo relay --check` measures."""
    kept = _is_kept()
    by = "" if kept is None else "; a time service keeps it" if kept else "; no time service keeps it (chrony would)"
    return Finding("clock", ok=True, found=f"{shown(time.time())}{by}; {CLOCK_RULE}")


def _is_kept() -> bool | None:
    """Whether the kernel counts the clock as synchronized; None where it has no such word."""
    try:
        return int(ctypes.CDLL(None).adjtimex(ctypes.create_string_buffer(_TIMEX_BYTES))) != _TIME_ERROR
    except (OSError, AttributeError):
        return None


def _address(config: RunConfig) -> Finding:
    address = address_of(config.cluster)
    if not address:
        return Finding("Ray address", ok=True, found="none: a Ray of our own on this machine")
    reason = unreachable(address)
    if reason is None:
        return Finding("Ray address", ok=True, found=f"{address} answers")
    return Finding("Ray address", ok=False, found=str(no_ray(config.cluster, reason)), fix="then look again")


def _options(config: RunConfig) -> Finding:
    lines = unsupported(config.pretrain, likely_device(config.cluster.device))
    return Finding(
        "pretraining options",
        not lines,
        "; ".join(lines) or f"this machine can do what {config.run.name} asks for",
        "change the settings, or run where they are supported",
    )
