"""The rows of one model that are decoded together: a key-value cache padded on the left, which rows join and leave."""

import inspect
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch.nn import functional
from transformers import DynamicCache

from configs.errors import InputError
from trainer.device import where


class Lane:
    """Rows of one model, or of one adapter on it.

    Args:
        model: a decoder of transformers, in evaluation mode.
        activate: puts this lane's adapter on the model, before each computation.
        name: for messages.
        fits: whether there is room for this lane's adapter just now, before a row joins an empty lane.
        room: what it shares with other adapters' lanes; None: it needs none.

    Raises:
        InputError: the model has no cache of keys and values alone.
    """

    def __init__(
        self,
        model: Any,
        activate: Callable[[], None] = lambda: None,
        name: str = "model",
        fits: Callable[[], bool] = lambda: True,
        room: object | None = None,
    ) -> None:
        takes = inspect.signature(model.forward).parameters
        if model.config.is_encoder_decoder or not model.can_generate() or "past_key_values" not in takes:
            raise InputError(f"{name}: a {type(model).__name__} can't be served; give a decoder with attention")
        self.device, self.fits, self.room = where(model), fits, room
        self._model, self._activate = model, activate
        self._positions, self._last_alone = "position_ids" in takes, "logits_to_keep" in takes
        self._cache = DynamicCache()
        self._mask_BT = torch.zeros((0, 0), dtype=torch.long, device=self.device)

    def __len__(self) -> int:
        return len(self._mask_BT)

    def join(self, ids: Sequence[int]) -> torch.Tensor:
        """Reads a prompt, alone and unpadded, and adds it as the last row.

        Returns:
            Logits of its first new token, shape (V,).
        """
        self._activate()
        cache = DynamicCache()
        keep = {"logits_to_keep": 1} if self._last_alone else {}
        read = torch.tensor([list(ids)], device=self.device)
        logits: torch.Tensor = self._model(input_ids=read, past_key_values=cache, use_cache=True, **keep).logits[0, -1]
        mask = torch.ones((1, len(ids)), dtype=torch.long, device=self.device)
        if len(self):
            length = max(self._mask_BT.shape[1], len(ids))
            both = zip(_tensors(_padded(self._cache, length)), _tensors(_padded(cache, length)), strict=True)
            cache = _cache((torch.cat((k, other_k)), torch.cat((v, other_v))) for (k, v), (other_k, other_v) in both)
            mask = torch.cat([functional.pad(one, (length - one.shape[1], 0)) for one in (self._mask_BT, mask)])
        self._cache, self._mask_BT = cache, mask
        return logits

    def step(self, tokens: Sequence[int]) -> torch.Tensor:
        """Reads one token of each row.

        Returns:
            Logits of the tokens after them, shape (B, V).
        """
        self._activate()
        self._mask_BT = functional.pad(self._mask_BT, (0, 1), value=1)
        given: dict[str, Any] = {}
        if self._positions:
            given["position_ids"] = self._mask_BT.sum(dim=1, keepdim=True) - 1
        if not bool(self._mask_BT.all()):  # without padding no mask is needed, and attention is faster
            given["attention_mask"] = self._mask_BT
        read = torch.tensor([[token] for token in tokens], device=self.device)
        logits: torch.Tensor = self._model(input_ids=read, past_key_values=self._cache, use_cache=True, **given).logits[
            :, -1
        ]
        return logits

    def keep(self, rows: Sequence[int]) -> None:
        """Lets all other rows go, and the padding that only they needed."""
        if len(rows) == len(self):
            return
        if not rows:
            self._cache, self._mask_BT = DynamicCache(), self._mask_BT[:0, :0]
            return
        chosen = torch.tensor(list(rows), device=self.device)
        mask = self._mask_BT[chosen]
        start = int(mask.argmax(dim=1).min())  # of the longest row: all before it is padding
        self._mask_BT = mask[:, start:].contiguous()
        self._cache = _cache((k[chosen, :, start:], v[chosen, :, start:]) for k, v in _tensors(self._cache))


def _tensors(cache: Any) -> list[tuple[torch.Tensor, torch.Tensor]]:
    return [(layer.keys, layer.values) for layer in cache.layers]


def _cache(layers: Any) -> Any:
    cache = DynamicCache()
    for number, (keys, values) in enumerate(layers):
        cache.update(keys, values, number)
    return cache


def _padded(cache: Any, length: int) -> Any:
    """Keys and values are (B, H, T, D): padding comes before the tokens of all rows."""
    missing = length - cache.get_seq_length()
    if not missing:
        return cache
    pad = (0, 0, missing, 0)
    return _cache((functional.pad(keys, pad), functional.pad(values, pad)) for keys, values in _tensors(cache))
