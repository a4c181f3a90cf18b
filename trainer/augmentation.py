"""Augmentation: a step reads an example's own words with some of them left out, swapped or masked, and learns the same.

What is changed of an example depends on it, on the settings and on a stream of its own, and on no other example.
"""

from collections.abc import Callable
from dataclasses import dataclass, replace

import numpy as np
import numpy.typing as npt

from configs.errors import InputError
from configs.schema.tasks import AugmentationSettings
from trainer.tasks.task import AugmentedTask, Encoded, Task

Augment = Callable[[Encoded, np.random.Generator], Encoded]


def augmentation(task: Task, settings: AugmentationSettings) -> Augment | None:
    """What these settings change in an example of a task; None: nothing.

    Raises:
        InputError: the task learns the tokens that it reads, or the model has no token to mask others with.
    """
    if not settings.largest:
        return None
    if not isinstance(task, AugmentedTask):
        raise InputError(
            "federated.augmentation: the task learns the tokens that it reads, or where they stand; leave it out"
        )
    if settings.mask and task.mask_token is None:
        raise InputError(
            f"federated.augmentation.mask is {settings.mask:g}: the model's tokenizer has no mask token; give 0, and "
            "federated.augmentation.dropout instead"
        )
    return _Augmentation(task, settings)


@dataclass(frozen=True)
class _Augmentation:
    task: AugmentedTask
    settings: AugmentationSettings

    def __call__(self, example: Encoded, chance: np.random.Generator) -> Encoded:
        """The example with some of its words changed."""
        if len(example.words) != len(example.ids):
            raise ValueError("an example doesn't say which of its tokens may change")
        ids, places = list(example.ids), [place for place, word in enumerate(example.words) if word]
        # As many draws whatever the settings are: a share that is 0 changes nothing of what the others do.
        swaps, masks, drops = chance.random((3, len(places)))
        for one, other in _pairs(places, swaps < self.settings.swap):
            ids[one], ids[other] = ids[other], ids[one]
        for place, masked in zip(places, masks < self.settings.mask, strict=True):
            if masked and self.task.mask_token is not None:
                ids[place] = self.task.mask_token
        dropped = {place for place, chosen in zip(places, drops < self.settings.dropout, strict=True) if chosen}
        if len(dropped) == len(places):  # a text of no words at all says nothing of its answer
            dropped = set()
        kept = [place for place in range(len(ids)) if place not in dropped]
        return replace(
            example, ids=tuple(ids[place] for place in kept), target=self.task.target_at(example, kept), words=b""
        )


def _pairs(places: list[int], chosen: npt.NDArray[np.bool_]) -> list[tuple[int, int]]:
    """The words that change places with the next one, where that is their neighbour; none takes part in two swaps."""
    found: list[tuple[int, int]] = []
    for place, following, swapped in zip(places, places[1:], chosen, strict=False):
        if swapped and following == place + 1 and not (found and found[-1][1] == place):
            found.append((place, following))
    return found
