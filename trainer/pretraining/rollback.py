"""When a step is not worth keeping: training goes back to the last commit and passes over the data since then.

Chowdhery et al. 2022 (PaLM, section 5.1) did this by hand against loss spikes.
"""

import math
import statistics
from collections import deque
from typing import Any

from configs.errors import SiloweaveError
from configs.schema.pretrain import PretrainSettings
from trainer.data.order import SkippedData

_WINDOW = 32


class RollBack(Exception):
    """Raised by every rank at the same step.

    Attributes:
        step: the step that was not good.
        skip: range [first, end) of the batches trained on since the last commit, that step's among them.
    """

    def __init__(self, reason: str, step: int, skip: tuple[int, int]) -> None:
        super().__init__(reason, step, skip)
        self.step, self.skip = step, skip

    def __str__(self) -> str:
        return str(self.args[0])


class Progress:
    """What decides, besides the weights, whether a step is kept; it is committed with them.

    Args:
        settings: what a spike is, and how often to roll back.
        metadata: of the commit that training goes on from; empty at the start.
        skipped: ranges of batches to pass over, besides those that the commit knows.

    Attributes:
        committed: steps of the newest commit.
        skipped: one range of batches for each time the run has rolled back.
    """

    def __init__(self, settings: PretrainSettings, metadata: dict[str, Any], skipped: SkippedData) -> None:
        self._settings = settings
        self.committed = int(metadata.get("step", 0))
        self.skipped = sorted({(first, end) for first, end in (*metadata.get("skipped", ()), *skipped)})
        self._losses: deque[float] = deque(metadata.get("losses", ()), maxlen=_WINDOW)

    def as_metadata(self) -> dict[str, Any]:
        """What a commit keeps of it."""
        return {"skipped": self.skipped, "losses": list(self._losses)}

    def forget_losses(self) -> None:
        """What a loss was on other data, or in another length, says nothing about the next one."""
        self._losses.clear()

    def require_good_loss(self, loss: float, step: int, skip: tuple[int, int]) -> None:
        """Raises RollBack where a loss is a spike or not finite; else remembers it."""
        self.require(self._loss_trouble(loss), step, skip)
        self._losses.append(loss)

    def require(self, trouble: str | None, step: int, skip: tuple[int, int]) -> None:
        """Raises where there is trouble.

        Args:
            trouble: why a step is not good.
            step: that step.
            skip: range of the batches since the newest commit.

        Raises:
            RollBack: go back, and pass over these batches.
            SiloweaveError: the run has rolled back ``max_rollbacks`` times already.
        """
        if trouble is None:
            return
        if len(self.skipped) >= self._settings.max_rollbacks:
            raise SiloweaveError(
                f"step {step}: {trouble}, after {len(self.skipped)} rollbacks (pretrain.max_rollbacks); "
                "lower pretrain.learning_rate, or look at the data"
            )
        raise RollBack(f"step {step}: {trouble}", step, skip)

    def _loss_trouble(self, loss: float) -> str | None:
        if not math.isfinite(loss):
            return f"the loss is {loss}"
        if self._settings.spike_ratio and len(self._losses) == _WINDOW:
            median = statistics.median(self._losses)
            if loss > self._settings.spike_ratio * median:
                return f"the loss is {loss:.4g}, {loss / median:.1f} times the median of the last {_WINDOW}"
        return None
