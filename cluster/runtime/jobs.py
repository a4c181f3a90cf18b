"""Jobs of a Ray cluster: what is uploaded, what is refused before that, and how a job is watched to its end.

The cluster gets the code and one resolved configuration, nothing else of this machine: no data, no runs, no ledgers, no
keys. What a job keeps lies in folders that its nodes share, so that a job submitted again continues.
"""

import asyncio
import http.client
import logging
import os
import shlex
import shutil
import ssl
import tempfile
import time
import uuid
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from importlib.metadata import version
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

from configs.errors import InputError, SiloweaveError, lines_of
from configs.parse import to_toml
from configs.run_directory import run_directory
from configs.schema.schema import RunConfig

LARGEST_UPLOAD_BYTES = 4 * 2**20
CONFIG = "submitted.toml"
_ROOT = Path(__file__).parents[2]
_PACKAGES = ("configs", "trainer", "privacy", "federated", "cluster")
_SUFFIXES = {".py", ".j2", ".proto"}
_PROBE_S = 5.0
_POLL_S = 0.5
_READY_S = 60.0
_STOP_S = 60.0
_NOT_EXECUTABLE, _NOT_FOUND = 126, 127  # a shell's exit statuses
# Stages that open the simulated silos' ledgers and keys.
_WITH_STATE = {"demo", "federate", "evaluate", "report", "audit", "tune"}


def check_movable(stage: str, config: RunConfig) -> None:
    """Refuses settings that mean something only on this machine, besides relative paths: those ``load`` refuses.

    Raises:
        InputError: the ledgers have no folder of their own, or the settings name a cluster of their own.
    """
    if config.cluster.address:
        raise InputError(
            f"cluster.address is {config.cluster.address!r}: a job runs in the cluster that takes it; unset it"
        )
    if stage in _WITH_STATE and not config.federated.state_dir:  # on another node the budget would start anew
        raise InputError("federated.state_dir is empty: give an absolute path that all nodes of the cluster share")


def stage_upload(config: RunConfig, folder: Path) -> int:
    """Copies what a job needs into an empty folder, by an allow-list.

    Args:
        config: the resolved settings; written as ``submitted.toml``.
        folder: receives the packages' code, ``siloweave.py``, ``pyproject.toml`` and the metadata of this version, so
            that nodes need the dependencies only.

    Returns:
        The upload's size in bytes.

    Raises:
        SiloweaveError: it is larger than ``LARGEST_UPLOAD_BYTES``.
    """
    for path in _code():
        target = folder / path.relative_to(_ROOT)
        target.parent.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(path, target)
    (folder / CONFIG).write_text(to_toml(config), encoding="utf-8")
    number = version("siloweave")
    metadata = folder / f"siloweave-{number}.dist-info" / "METADATA"
    metadata.parent.mkdir()
    metadata.write_text(f"Metadata-Version: 2.1\nName: siloweave\nVersion: {number}\n", encoding="utf-8")
    size = sum(path.stat().st_size for path in folder.rglob("*") if path.is_file())
    if size > LARGEST_UPLOAD_BYTES:
        raise SiloweaveError(
            f"the upload has {size} bytes, at most {LARGEST_UPLOAD_BYTES} are sent: move what is no code out of {_ROOT}"
        )
    return size


def _code() -> Iterator[Path]:
    yield _ROOT / "siloweave.py"
    if (_ROOT / "pyproject.toml").exists():  # a checkout; an installation has none
        yield _ROOT / "pyproject.toml"
    for package in _PACKAGES:
        yield from (path for path in (_ROOT / package).rglob("*") if path.suffix in _SUFFIXES)
    yield from (path for path in (_ROOT / "federated" / "app").iterdir() if path.name in ("pyproject.toml", "LICENSE"))


class Jobs:
    """The jobs of one cluster.

    Raises:
        InputError: no Ray job server answers at the address.
    """

    def __init__(self, address: str) -> None:
        self.address = find_server(address)
        from ray.job_submission import JobSubmissionClient

        if not os.environ.get("SILOWEAVE_DEBUG"):
            logging.getLogger("ray.dashboard.modules.dashboard_sdk").setLevel(logging.WARNING)
        with self._asking():
            self._client: Any = JobSubmissionClient(self.address)

    @contextmanager
    def _asking(self) -> Iterator[None]:
        """Turns the client's errors into one line."""
        try:
            yield
        except (RuntimeError, ConnectionError, OSError) as error:
            line = lines_of(error)[0]
            if "does not exist" in line:
                raise InputError(f"{line} (asked at {self.address}); see the id that `siloweave submit` gave") from None
            raise SiloweaveError(f"{self.address}: the job server says: {line}") from error

    def submit(self, config: RunConfig, command: Sequence[str], python: str) -> str:
        """Uploads the code and the settings and starts a command on the cluster's head.

        Args:
            config: settings of the run.
            command: the stage and its options, without ``--config`` and ``--set``.
            python: interpreter on the nodes.

        Returns:
            The job's id.

        Raises:
            InputError: another job is at work on this run.
        """
        run = config.run.url or str(run_directory(config))
        self._refuse_second(run)
        # Ray gives this to a shell. Without `exec`, a stop that comes while the shell starts ends the shell alone: its
        # command goes on in a job that is said to be stopped, beside the next one that writes to this run.
        entrypoint = "exec " + shlex.join([python, "-m", "siloweave", *command, "--config", CONFIG])
        job = f"siloweave-{uuid.uuid4().hex[:12]}"  # our own id: asked twice, it can't start twice
        with tempfile.TemporaryDirectory(prefix="siloweave-upload-") as folder, self._asking():
            stage_upload(config, Path(folder))
            deadline = time.monotonic() + _READY_S
            while True:
                try:
                    self._client.submit_job(
                        entrypoint=entrypoint,
                        submission_id=job,
                        runtime_env={"working_dir": folder},
                        metadata={"run": run},
                    )
                    return job
                except RuntimeError as error:
                    # The server of a cluster that has just started answers before its nodes can take a job.
                    if "No available agent" not in str(error) or time.monotonic() > deadline:
                        raise
                    time.sleep(1)

    def _refuse_second(self, run: str) -> None:
        with self._asking():
            jobs = self._client.list_jobs()
        for job in jobs:
            if (job.metadata or {}).get("run") == run and not job.status.is_terminal():
                raise InputError(
                    f"{run}: job {job.submission_id} is at work on it; wait for it, or `siloweave job stop` it first"
                )

    def details(self, job: str) -> dict[str, Any]:
        """What the cluster knows of a job; ``exit_status`` is None until it has ended."""
        with self._asking():
            found = self._client.get_job_info(job)
        return {
            "job": job,
            "address": self.address,
            "status": found.status.value,
            "command": found.entrypoint.removeprefix("exec "),
            "run": (found.metadata or {}).get("run"),
            "started": found.start_time and found.start_time / 1000,
            "ended": found.end_time and found.end_time / 1000,
            "exit_status": exit_status(found.status.value, found.driver_exit_code),
            "message": _message(found),
        }

    def logs(self, job: str) -> str:
        """Everything that a job has printed so far."""
        self.details(job)  # an unknown id is one clear line, even where no node answers yet
        with self._asking():
            text: str = self._client.get_job_logs(job)
        return text

    def follow(self, job: str, write: Callable[[str], None]) -> dict[str, Any]:
        """Passes a job's output on until it ends. Returns its details."""

        async def tail() -> None:
            async for text in self._client.tail_job_logs(job):
                write(text)

        with self._asking():
            asyncio.run(tail())
        while (found := self.details(job))["exit_status"] is None:  # its output ends a moment before it does
            time.sleep(_POLL_S)
        return found

    def stop(self, job: str) -> dict[str, Any]:
        """Ends a job and waits until it has ended; one that had ended already is left as it is.

        Raises:
            SiloweaveError: it is still there after a minute.
        """
        deadline = time.monotonic() + _STOP_S
        while (found := self.details(job))["exit_status"] is None:
            if time.monotonic() > deadline:
                raise SiloweaveError(f"job {job} is still {found['status']} after {_STOP_S:g} s; look at its node")
            with self._asking():  # again and again: a job that is still pending may not hear it
                self._client.stop_job(job)
            time.sleep(_POLL_S)
        return found


def _message(found: Any) -> str:
    """What Ray says of a job whose command said nothing itself."""
    if found.driver_exit_code in (_NOT_EXECUTABLE, _NOT_FOUND):
        return "the nodes have no such interpreter; give theirs with --python"
    return found.message or "" if found.driver_exit_code is None else ""


def exit_status(status: str, code: int | None) -> int | None:
    """A job's exit status as siloweave's: 0 to 3 as its command gave it, 1 for any other end, None before the end."""
    if status in ("PENDING", "RUNNING"):
        return None
    if status == "SUCCEEDED":
        return 0
    return code if code in (1, 2, 3) else 1


def find_server(address: str) -> str:
    """URL of the job server, which has answered; Ray's own client would try one that doesn't for minutes.

    Args:
        address: ``http://HOST:PORT``; empty: RAY_API_SERVER_ADDRESS.

    Raises:
        InputError: none is given, or no Ray answers there.
    """
    given = address or os.environ.get("RAY_API_SERVER_ADDRESS", "")
    if not given:
        raise InputError("--address is empty: give the cluster's job server, for instance http://head:8265")
    url = urlsplit(given if "://" in given else f"http://{given}")
    try:
        host, port = url.hostname, url.port
    except ValueError:
        host, port = None, None
    if url.scheme not in ("http", "https") or not host or not port:
        raise InputError(f"--address {given!r}: give http://HOST:PORT of the job server (Ray's default port is 8265)")
    reason = _silent(url.scheme, host, port)
    if reason:
        raise InputError(f"--address {given!r}: no Ray job server answers there ({reason}); start it, or correct it")
    return f"{url.scheme}://{url.netloc}"


def _silent(scheme: str, host: str, port: int) -> str | None:
    """Why no Ray answers, or None where one does."""
    connection = (
        http.client.HTTPSConnection(host, port, timeout=_PROBE_S, context=ssl.create_default_context())
        if scheme == "https"
        else http.client.HTTPConnection(host, port, timeout=_PROBE_S)
    )
    try:
        connection.request("GET", "/api/version")
        answer = connection.getresponse()
        # 401 and 403: a cluster that wants a token; the client gives it, or says so.
        found = answer.status in (401, 403) or (answer.status == 200 and b"ray_version" in answer.read(10_000))
        return None if found else f"something else answers: HTTP {answer.status}"
    except (OSError, http.client.HTTPException) as error:
        return str(error) or type(error).__name__
    finally:
        connection.close()
