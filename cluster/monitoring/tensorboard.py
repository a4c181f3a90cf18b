"""A run's events as TensorBoard scalars: what ``events.jsonl`` holds anyway, nothing else."""

from pathlib import Path
from types import TracebackType
from typing import Any

from cluster.monitoring.scalars import position, scalars
from configs.errors import InputError
from configs.storage.layout import RunFiles


class TensorBoard:
    """Listens to events and writes scalars below a run's directory. Use as a context.

    Raises:
        InputError: the package tensorboard is not installed.
    """

    def __init__(self, run_directory: Path) -> None:
        try:
            from torch.utils.tensorboard import SummaryWriter
        except ImportError as error:
            raise InputError(
                f"monitoring.tensorboard is true: tensorboard can't be imported ({error}); pip install "
                "'siloweave[monitoring]', or set it to false"
            ) from None
        self._writer: Any = SummaryWriter(str(RunFiles(run_directory).tensorboard))

    def __enter__(self) -> "TensorBoard":
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._writer.close()

    def __call__(self, event: dict[str, Any]) -> None:
        """Writes one event's figures, at its step or round and its time."""
        for name, value in scalars(event).items():
            self._writer.add_scalar(f"{event['stage']}/{name}", value, position(event), walltime=event["time"])
