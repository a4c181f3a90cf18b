"""A rank's share of each global batch, and the proof at the first step that the shares are what they should be."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from configs.errors import SiloweaveError
from configs.schema.data import corpora
from configs.schema.schema import RunConfig
from configs.schema.stages import stage_at
from configs.storage.files import digest_bytes
from configs.storage.manifests import Manifest
from trainer.data.order import Int64s, Order, SkippedData
from trainer.data.packing import TokenFile, Windows, lengths_apart, stored_dtype, train_tokens


@dataclass(frozen=True)
class Share:
    """What one rank trains on in a step.

    Attributes:
        samples: places in the global batch, shape (b,).
        windows: what stands there.
    """

    samples: Int64s
    windows: Windows

    def digests(self) -> dict[int, str]:
        """What stands at each place of the global batch."""
        rows = zip(self.samples, self.windows.tokens, strict=True)
        return {int(sample): digest_bytes(row.tobytes()) for sample, row in rows}


class Batches:
    """The global batches of a run, read from its packed corpora.

    Args:
        config: the run's settings.
        corpus: directory of the packed files.
        skipped: ranges of batches that are passed over.

    Raises:
        InputError: the corpus' tokens are of a type that this Siloweave does not know.
    """

    def __init__(self, config: RunConfig, corpus: Path, skipped: SkippedData = ()) -> None:
        self._batch_size, self._steps = config.pretrain.batch_size, [stage.steps for stage in config.stages]
        self._stages = _stages(config, corpus, skipped)

    def number(self, step: int) -> int:
        """Number of the batch that a step (from 0) trains on, counted through all stages."""
        return self._stages[0][0].batch_number(step)

    def share(self, step: int, rank: int, world_size: int) -> Share:
        """One rank's part: places rank, rank + world_size, ... of the global batch."""
        index, _ = stage_at(self._steps, step)
        order, of_corpora = self._stages[index]
        origins, windows = order.batch(step)
        samples = np.arange(rank, self._batch_size, world_size)
        files = tuple(of_corpora[origin] for origin in origins[samples])
        numbers = self.number(step) * self._batch_size + samples
        return Share(samples, Windows(files, windows[samples], numbers))


def _stages(config: RunConfig, corpus: Path, skipped: SkippedData) -> list[tuple[Order, list[TokenFile]]]:
    """Each stage's order, and the corpora's files in its length.

    A corpus goes on where the last stage of the same length has left it; in another length its windows are others.
    """
    names, dtype, apart = list(corpora(config.data)), stored_dtype(corpus), lengths_apart(config)

    def opened(length: int) -> list[TokenFile]:
        of_length = length if length in apart else None
        return [TokenFile(corpus / train_tokens(name, of_length), length, dtype) for name in names]

    files = {length: opened(length) for length in {stage.context_length for stage in config.stages}}
    found: list[tuple[Order, list[TokenFile]]] = []
    before: dict[int, Int64s] = {}
    for stage in config.stages:
        sizes = [file.num_windows for file in files[stage.context_length]]
        weights, taken = [stage.weights.get(name, 0) for name in names], before.get(stage.context_length)
        order = Order(sizes, weights, config.pretrain.batch_size, config.run.seed, skipped, stage.first, taken)
        before[stage.context_length] = order.taken(stage.steps)
        found.append((order, files[stage.context_length]))
    return found


def prove_disjoint(shares: Sequence[dict[int, str]], expected: dict[int, str]) -> None:
    """Raises unless the ranks' shares are, together, the global batch, each sample exactly once.

    A launcher that tells every rank it is alone makes all of them train on the same samples, and nothing else fails:
    only the loss shows it.

    Args:
        shares: of every rank, from the tokens that it is about to train on.
        expected: the whole batch, as a single rank would read it.

    Raises:
        SiloweaveError: a sample is missing, there twice, or another one.
    """
    places = [place for share in shares for place in share]
    if sorted(places) != sorted(expected):
        raise SiloweaveError(
            f"the ranks' samples are not the global batch of {len(expected)}: they hold the places {sorted(places)}"
        )
    for share in shares:
        for place, digest in share.items():
            if digest != expected[place]:
                raise SiloweaveError(
                    f"sample {place} of the first step is not the same on all ranks: is the corpus' folder the same on "
                    "all nodes?"
                )


def corpus_counts(manifest: Manifest) -> dict[str, int]:
    """Documents, tokens, characters and windows to train on, over all corpora."""
    parts = manifest.metadata["train"].values()
    return {name: sum(part[name] for part in parts) for name in ("documents", "tokens", "characters", "windows")}
