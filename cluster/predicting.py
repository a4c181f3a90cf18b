"""A file's records answered by several processes: Ray Data hands chunks to actors that have loaded the model once."""

import json
import logging
from collections.abc import Generator, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

from cluster.finished import Finished, calibrated, finished_model
from cluster.runtime.session import ray_session, refuse_without_room
from configs.errors import InputError, SiloweaveError, lines_of
from configs.schema.pretrain import ClusterSettings
from configs.schema.schema import RunConfig
from trainer.inference.asking import Asking, with_columns
from trainer.inference.predicting import Answered, chunks, here

_AGAIN = 3  # times that a worker is started anew, and that a chunk is tried again; Ray Data's own numbers have no end


@dataclass(frozen=True)
class Asked:
    """A model, and how it is asked: what a process needs to answer records as every other one does.

    Attributes:
        model: the folder.
        elsewhere: the run's settings, where the folder lies in no run.
        columns: as ``FIELD=COLUMN``.
        max_new_tokens: most tokens of an answer that is text.
    """

    model: Path
    elsewhere: RunConfig | None
    columns: tuple[str, ...]
    max_new_tokens: int

    def load(self) -> tuple[Finished, Asking, str]:
        """The model, what it answers, and the digest of its calibration, empty without one.

        Raises:
            InputError: there is no such model, or a column is named for a field that its task hasn't got.
        """
        found = finished_model(self.model, self.elsewhere)
        data = with_columns(found.config.data.private, self.columns)
        task, calibration = calibrated(found.task, found.made, found.digest)
        spec = found.config.federated.task_spec
        return found, Asking(found.model, found.tokenizer, task, spec, data, self.max_new_tokens), calibration


class _Worker:
    """An actor with the model."""

    def __init__(self, asked: Asked) -> None:
        found, self._asking, _ = asked.load()
        self._labels = found.config.federated.task_spec.labels

    def __call__(self, batch: Any) -> Any:
        import pyarrow as pa

        return pa.table({"chunk": [self._answered(one.as_py()) for one in batch["chunk"]]})

    def _answered(self, chunk: str) -> str:
        read = json.loads(chunk)
        if "fault" in read:
            return chunk
        (lines,) = here(self._asking, self._labels, [read["records"]])
        return json.dumps({"lines": lines})


@contextmanager
def by_workers(asked: Asked, workers: int) -> Iterator[Answered]:
    """Several processes, on the Ray of RAY_ADDRESS, else on one of our own.

    Yields:
        What answers a file's chunks from a record on, in their order.

    Raises:
        InputError: no Ray answers, or the cluster has no room for so many.
    """
    with ray_session(ClusterSettings(), workers) as ray:
        refuse_without_room(ray, "--workers", workers, 1)
        yield partial(_answers, ray, asked, workers)


def _answers(ray: Any, asked: Asked, workers: int, source: Path, begun: int) -> Generator[list[dict[str, Any]]]:
    dataset = _of_chunks(ray, source.resolve(), begun).map_batches(
        _Worker,
        fn_constructor_args=(asked,),
        batch_size=1,
        batch_format="pyarrow",
        compute=ray.data.ActorPoolStrategy(size=workers),
        num_cpus=1,
        max_restarts=_AGAIN,
        max_task_retries=_AGAIN,
    )
    try:
        for row in dataset.iter_rows():
            read = json.loads(row["chunk"])
            if "fault" in read:
                raise InputError(read["fault"])
            yield read["lines"]
    except ray.exceptions.RayError as error:
        raise SiloweaveError(f"a worker has failed: {lines_of(error)[-1]}") from error


def _of_chunks(ray: Any, source: Path, begun: int) -> Any:
    """A dataset with a block for each chunk, which one task reads on this node, as they are asked for."""
    from ray.data.block import BlockMetadata
    from ray.data.datasource import Datasource, ReadTask
    from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

    class Chunks(Datasource):
        def get_name(self) -> str:
            return "chunks"

        def estimate_inmemory_data_size(self) -> int | None:
            return None

        def get_read_tasks(self, parallelism: int, *_: Any, **__: Any) -> list[Any]:  # noqa: ARG002
            unknown = BlockMetadata(num_rows=None, size_bytes=None, input_files=None, exec_stats=None)
            return [ReadTask(partial(_read, source, begun), unknown)]

    made: Any = Chunks
    context = ray.data.DataContext.get_current()
    context.enable_progress_bars = False
    context.execution_options.preserve_order = True
    context.target_max_block_size = 1  # bytes: each chunk is a block of its own, or one worker would get them all
    logging.getLogger("ray.data").setLevel(logging.ERROR)
    here_alone = NodeAffinitySchedulingStrategy(ray.get_runtime_context().get_node_id(), soft=False)
    return ray.data.read_datasource(
        made(), override_num_blocks=1, ray_remote_args={"num_cpus": 0, "scheduling_strategy": here_alone}
    )


def _read(source: Path, begun: int) -> Iterable[Any]:
    import pyarrow as pa

    try:
        for chunk in chunks(source, begun):
            yield pa.table({"chunk": [json.dumps({"records": chunk})]})
    except InputError as error:  # as a value: Ray would wrap it in its own words
        yield pa.table({"chunk": [json.dumps({"fault": str(error)})]})
