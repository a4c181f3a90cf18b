"""What a round's request and reply weigh, from the shapes of what travels: the one place that computes it."""

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from math import prod

from configs.errors import InputError
from configs.schema.federated import FederatedSettings
from federated.adapters.lora_factors import frozen
from federated.adapters.packed_updates import packed_bytes
from federated.adapters.update_codec import BYTES_OF
from privacy.compression import Compression

Shapes = Mapping[str, Sequence[int]]

FLOAT32_BYTES, _ALIGNED_BYTES = BYTES_OF["float32"], 8
_SCALE_BYTES = 128  # a float32 and its entry in a header, beside the name
# Beside arrays, labels and a template: names and digests, a receipt, a signature, and the lengths of all of them.
BESIDE_BYTES = 2**15


@dataclass(frozen=True)
class MessageSizes:
    """Bytes of the largest messages of a run, envelopes included; at most ``BESIDE_BYTES`` more than they will have.

    Attributes:
        request: the coordinator's to a silo in a round.
        reply: the silo's to it.
    """

    request: int
    reply: int


def message_sizes(settings: FederatedSettings, shapes: Shapes) -> MessageSizes:
    """Of a run with these settings.

    Args:
        settings: the run's.
        shapes: of the whole adapter, or of whatever else of the model travels, the task's head included.
    """
    trains = {name: shape for name, shape in shapes.items() if settings.adapters != "ffa" or not frozen(name)}
    update = safetensors_bytes(trains)
    # What a stage freezes travels apart, with a header of its own; what is added to each gradient has the same shapes.
    apart = safetensors_bytes({}) if any(stage.frozen for stage in settings.stages) else 0
    correction = update if settings.aggregation == "scaffold" or settings.anchor else 0
    texts = sum(len(text.encode()) for text in (*settings.labels, settings.template, *_targets(settings)))
    request = update + apart + correction + texts + BESIDE_BYTES
    return MessageSizes(request, _update_bytes(settings, trains) + BESIDE_BYTES)


def _update_bytes(settings: FederatedSettings, shapes: Shapes) -> int:
    """Of an update as it travels: headers have about the same length; int8 has a scale beside each array."""
    if compression := Compression.of(settings):
        return packed_bytes(compression, sum(prod(shape) for shape in shapes.values()))
    saved = (FLOAT32_BYTES - BYTES_OF[settings.update_dtype]) * sum(prod(shape) for shape in shapes.values())
    scales = _SCALE_BYTES * len(shapes) + sum(map(len, shapes)) if settings.update_dtype == "int8" else 0
    return safetensors_bytes(shapes) - saved + scales


def _targets(settings: FederatedSettings) -> Sequence[str]:
    return () if isinstance(settings.adapter_targets, str) else settings.adapter_targets


def safetensors_bytes(shapes: Shapes) -> int:
    """Bytes of float32 arrays as safetensors has them: a length, a header, the values."""
    header, at = {}, 0
    for name in sorted(shapes):
        ends = at + FLOAT32_BYTES * prod(shapes[name])
        header[name] = {"dtype": "F32", "shape": list(shapes[name]), "data_offsets": [at, ends]}
        at = ends
    text = len(json.dumps(header, separators=(",", ":"), ensure_ascii=False).encode())
    return 8 + -(-text // _ALIGNED_BYTES) * _ALIGNED_BYTES + at


def require_room(sizes: MessageSizes, most: int) -> None:
    """Refuses a run whose messages the line between coordinator and silos doesn't carry, before a silo is asked.

    Raises:
        InputError: a request or a reply has more than ``most`` bytes.
    """
    for name, size in (("request", sizes.request), ("reply", sizes.reply)):
        if size > most:
            raise InputError(
                f"a round's {name} has {mebibytes(size)}, and the line between coordinator and silos carries at most "
                f"{mebibytes(most)} in one message; lower federated.lora_rank, or give fewer federated.adapter_targets"
            )


def mebibytes(size: int) -> str:
    """A size for people."""
    return f"{size / 2**20:,.1f} MiB"
