"""A run: its settings, its directory, and where its stages read and write."""

import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from typing import Any

from cluster.runtime.session import ray_session
from configs.errors import SiloweaveError
from configs.events import EventLog, Listener
from configs.run_directory import bind_run_directory
from configs.schema.schema import RunConfig
from configs.storage.layout import RunFiles
from configs.storage.mirror import open_mirror


class Run:
    """One run: its settings, its directory, its events."""

    def __init__(self, config: RunConfig, listeners: tuple[Listener, ...] = ()) -> None:
        self.config = config
        self.files = RunFiles(bind_run_directory(config))
        self.directory = self.files.directory
        self._mirror = open_mirror(config)
        self.model = self.files.model
        self.log = EventLog(self.files.events, listeners)

    @contextmanager
    def stage(self, name: str) -> Iterator[None]:
        """Times a stage, and writes its start and end to the events.

        A failure is written by its kind alone: its message may quote a record.
        """
        self.log.emit(name, "start")
        began = time.perf_counter()
        try:
            self.push()  # what a kill kept from the store: other machines need it now
            yield
        except BaseException as error:
            with suppress(SiloweaveError):  # a full disk: the stage's own error is the one to show
                self.log.emit(name, "failed", error=type(error).__name__)
                self.push()
            raise
        self.log.emit(name, "end", seconds=time.perf_counter() - began)
        self.push()

    def push(self) -> None:
        """Takes what is finished to the object store, where the run has one."""
        if self._mirror is not None:
            self._mirror.push()

    def ray(self) -> Any:
        """A Ray with room for the larger of gang and silo workers."""
        cluster, federated = self.config.cluster, self.config.federated
        return ray_session(cluster, max(cluster.world_size, federated.workers))
