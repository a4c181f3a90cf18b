"""Commits in the background: a rank writes its shards to scratch and trains on, while a thread copies them to storage.

1. Every rank saves (``engine.save_checkpoint``) into scratch of its own, and trains on.
2. Every rank's thread copies its files to ``step-N/``, then writes ``rank-R.json`` with their sizes and digests.
3. Rank 0's thread waits for every rank's list of this gang, writes ``COMMITTED`` with all of them, and prunes.

No rank waits for another by a collective in the background, so a rank that dies in between leaves nothing but a folder
without ``COMMITTED``. At most one copy is under way: the next commit waits for it, every rank for its own part for as
long as that moves, and then rank 0 for ``COMMITTED``.
"""

import json
import math
import re
import shutil
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from configs.errors import SiloweaveError, lines_of
from configs.events import Listener
from configs.schema.schema import RunConfig
from configs.storage.manifests import Manifest
from configs.storage.storage import COMMITTED, Storage, prune
from trainer.checkpoints.checkpoints import KIND, UNIT, step_name
from trainer.rank import Rank

_WRITE_ERROR = re.compile("PytorchStreamWriter|inline_container|No space left|File too large")
_POLL_S, _SLOWEST_POLL_S = 0.01, 0.5
_LOOK_S = 0.2  # a waiting rank says at most this often that its part moves


class Committer:
    """The commits of one rank, from its start to its end.

    Args:
        config: how many commits are kept, and how long rank 0 looks for parts that every rank has said are there.
        storage: where the checkpoints are.
        scratch: the run's folder on this machine; what an earlier start left there is removed.
        rank: this process's place in the gang.
        attempt: one name for all ranks of this start of the gang, and for no other.
        start: the step that training goes on from.
        config_digest: of the settings that shape the weights.
        report: receives a ``commit`` event once ``COMMITTED`` stands (rank 0 only).
    """

    def __init__(
        self,
        config: RunConfig,
        storage: Storage,
        scratch: Path,
        rank: Rank,
        attempt: str,
        start: int,
        config_digest: str,
        report: Listener,
    ) -> None:
        self._storage, self._scratch, self._rank = storage, scratch / f"rank-{rank.rank}", rank
        self._attempt, self._config_digest, self._report = attempt, config_digest, report
        self._keep, self._patience_s = config.pretrain.keep_commits, config.cluster.hang_timeout_s
        self._flight: threading.Thread | None = None
        self._error: BaseException | None = None
        self._moved, self._copied, self._deadline = threading.Event(), threading.Event(), math.inf
        if rank.local_rank == 0:  # nobody writes there before all have come this far
            for left in scratch.glob("rank-*"):
                shutil.rmtree(left, ignore_errors=True)
        # What lies beyond the start is damaged, or was never committed, perhaps by another number of ranks.
        self._stale = {name for name in storage.children() if name > step_name(start)} if rank.rank == 0 else set()

    def commit(self, engine: Any, step: int, metadata: dict[str, Any], asked: float | None = None) -> None:
        """Writes the rank's shards to scratch and begins to copy them. Every rank calls it at the same steps.

        Args:
            engine: DeepSpeed's.
            step: steps done.
            metadata: what the manifest keeps besides.
            asked: when the wait for the commit before began, by ``time.perf_counter``; None: now.

        Raises:
            SiloweaveError: this commit can't be written to scratch, or the one before could not be copied; earlier
                commits are unchanged.
        """
        began = time.perf_counter() if asked is None else asked
        self.finish()
        waited = time.perf_counter() - began
        name = step_name(step)
        if name in self._stale:  # also a step of our own that is made again, after a rollback beyond it
            self._storage.remove(name)
        try:
            # Begins and ends with a barrier: nobody copies into a folder that rank 0 has not cleaned.
            engine.save_checkpoint(str(self._scratch), tag=name, save_latest=False)
        except (OSError, RuntimeError) as error:
            # torch reports a failed write as RuntimeError; a rank that died shows as one, too: not the disk's fault.
            if isinstance(error, RuntimeError) and not _WRITE_ERROR.search(str(error)):
                raise
            raise SiloweaveError(
                f"{self._scratch / name}: the checkpoint could not be written ({lines_of(error)[0]}); the "
                "commit before it is intact: see to that (room, rights) or set cluster.scratch_dir, then run the same "
                "command again"
            ) from error
        blocked = time.perf_counter() - began
        kept = {**metadata, "step": step, "world_size": self._rank.world_size}
        arguments = (kept, began, {"waited_s": waited, "blocked_s": blocked})
        self._copied.clear()
        self._deadline = math.inf
        self._flight = threading.Thread(target=self._copy, args=arguments, name="commit", daemon=True)
        self._flight.start()

    def check(self) -> None:
        """Raises what went wrong in the background, without waiting."""
        if self._error is not None:
            raise self._error

    def await_part(self, alive: Callable[[], None]) -> None:
        """Waits until this rank's part of the commit under way is in storage; calls ``alive`` while bytes arrive."""
        while self._flight is not None and not self._copied.wait(_LOOK_S):
            if self._moved.is_set():
                self._moved.clear()
                alive()
        self.check()

    def finish(self) -> None:
        """Waits for the commit under way, on rank 0 for ``COMMITTED``; call it after every rank's ``await_part``."""
        if self._flight is not None:
            self._deadline = time.monotonic() + self._patience_s
            self._flight.join()
            self._flight = None
        self.check()

    def close(self) -> None:
        """Waits for the last commit and leaves nothing in scratch."""
        self.finish()
        shutil.rmtree(self._scratch, ignore_errors=True)

    def _copy(self, metadata: dict[str, Any], began: float, spent: dict[str, float]) -> None:
        name = step_name(metadata["step"])
        source = self._scratch / name
        try:
            paths = sorted(path for path in source.rglob("*") if path.is_file())
            files = {
                file: self._storage.put(path, f"{name}/{file}", self._moved.set)
                for path in paths
                for file in [path.relative_to(source).as_posix()]
            }
            listed = json.dumps({"attempt": self._attempt, "files": files}).encode()
            self._storage.write(f"{name}/{_list_name(self._rank.rank)}", listed)
            shutil.rmtree(source, ignore_errors=True)
            self._copied.set()
            if self._rank.rank == 0:
                self._commit(metadata, self._gather(name), began, spent)
        except BaseException as error:
            self._error = error
            self._copied.set()

    def _gather(self, name: str) -> dict[str, dict[str, Any]]:
        """Every rank's files, once all of them are in storage."""
        files: dict[str, dict[str, Any]] = {}
        missing, pause = set(range(self._rank.world_size)), _POLL_S
        while True:
            there = self._storage.names(name)
            for rank in [rank for rank in missing if _list_name(rank) in there]:
                value = json.loads(self._storage.read(f"{name}/{_list_name(rank)}") or b"{}")
                if value.get("attempt") == self._attempt:  # else it is of a gang that was killed over it
                    files |= value["files"]
                    missing.remove(rank)
            if not missing:
                return dict(sorted(files.items()))
            if time.monotonic() > self._deadline:
                raise SiloweaveError(
                    f"{self._storage}/{name}: rank {min(missing)} has not copied its part within "
                    f"{self._patience_s:g} s (cluster.hang_timeout_s) of rank 0; see whether its node reaches the "
                    "storage, then run the same command again"
                )
            time.sleep(pause)
            pause = min(2 * pause, _SLOWEST_POLL_S)

    def _commit(
        self, metadata: dict[str, Any], files: dict[str, dict[str, Any]], began: float, spent: dict[str, float]
    ) -> None:
        step = metadata["step"]
        manifest = Manifest(KIND, self._config_digest, files=files, metadata=metadata)
        self._storage.write(f"{step_name(step)}/{COMMITTED}", manifest.encode())
        self._stale.add(step_name(step))
        size = sum(entry["size_bytes"] for entry in files.values())
        seconds = {name: round(value, 4) for name, value in spent.items()}
        event = {"event": "commit", "step": step, "size_bytes": size, **seconds}
        self._report({**event, "seconds": round(time.perf_counter() - began, 4)})
        prune(self._storage, UNIT, self._keep)


def _list_name(rank: int) -> str:
    return f"rank-{rank:05d}.json"
