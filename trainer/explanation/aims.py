"""What of a text is explained: a task's answers to it, each as one number that the model's output gives."""

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch

from configs.errors import InputError
from trainer.tasks.task import IGNORED, WritingTask


@dataclass(frozen=True)
class Aim:
    """One answer to a text.

    Attributes:
        answer: a label, a word's tag, or what the model writes.
        ids: tokens that the model reads, shape (T,).
        explained: how many of them, from the first on, are the text; the others are what the model has written.
        value: how sure the model is, in nats, of each row of a batch's logits; shape (B,).
        places: of the tokens that the answer is read off, all alike; empty: the one that the model's own head reads.
    """

    answer: str
    ids: tuple[int, ...]
    explained: int
    value: Callable[[torch.Tensor], torch.Tensor]
    places: tuple[int, ...] = ()


def aims(task: Any, tokenizer: Any, model: Any, text: str, tokens: int) -> list[Aim]:
    """What there is to explain of a model's answer to a text.

    Args:
        task: the model's.
        tokenizer: the model's.
        model: in evaluation mode, on the CPU.
        text: as the model reads it; a template is not filled in.
        tokens: how many it writes at most, where it writes.

    Raises:
        InputError: the text has no token, or this kind of model or task can't be explained.
    """
    if not text.strip():
        raise InputError("the text is empty; give one")
    if model.config.is_encoder_decoder:
        raise InputError(
            "an encoder-decoder reads its text and what it has written by one embedding, and can't be explained; give "
            "an encoder or a decoder"
        )
    if isinstance(task, WritingTask):
        return [_written(task, tokenizer, model, text, tokens)]
    of = {"classification": _label, "multilabel": _labels, "entities": _tags}.get(task.name)
    if of is None or task.head is None:
        raise InputError(f"the task {task.name!r} can't be explained this way; labels, tags and written text can")
    return list(of(task, model, text))


def _label(task: Any, model: Any, text: str) -> Iterator[Aim]:
    ids = _ids(task, text)
    best = int(_logits(model, ids)[0].argmax())
    yield Aim(task.head.labels[best], ids, len(ids), partial(_odds, best), _read(task, ids))


def _labels(task: Any, model: Any, text: str) -> Iterator[Aim]:
    """All that the model chooses; where it chooses none, the one that it is nearest to."""
    ids = _ids(task, text)
    logits_L = _logits(model, ids)[0]
    chosen = (logits_L > 0).nonzero().flatten().tolist() or [int(logits_L.argmax())]
    for label in chosen:
        yield Aim(task.head.labels[label], ids, len(ids), partial(_own_odds, label), _read(task, ids))


def _tags(task: Any, model: Any, text: str) -> Iterator[Aim]:
    """Of each word that is said to belong to an entity."""
    words = text.split()
    (example,) = task.examples([{"tokens": words, "tags": [0] * len(words)}]) or (None,)
    if example is None:
        raise InputError("the text has no word that the tokenizer sees; give one")
    logits_TL = _logits(model, example.ids)[0]
    begins = [place for place, target in enumerate(example.target) if target != IGNORED]
    for word, place in zip(words, begins, strict=False):
        tag = int(logits_TL[place].argmax())
        if (name := task.head.labels[tag]) != "O":
            value = partial(_odds_at, place, tag)
            yield Aim(f"{word}: {name}", example.ids, len(example.ids), value, (place,))


def _written(task: WritingTask, tokenizer: Any, model: Any, text: str, tokens: int) -> Aim:
    """The likeliest tokens, one after the other, up to an end."""
    opening = task.opening(text)
    ids = torch.tensor([opening.ids])
    with torch.no_grad():
        found = model.generate(
            input_ids=ids,
            attention_mask=torch.ones_like(ids),
            max_new_tokens=tokens,
            do_sample=False,
            eos_token_id=list(opening.ends),
            pad_token_id=opening.ends[0],
        )[0].tolist()
    read = len(opening.ids)
    answer = tokenizer.backend_tokenizer.decode(found[read:], skip_special_tokens=True)
    value = partial(_log_likelihood, tuple(found), read)
    return Aim(answer or "the end of the text", tuple(found), read, value, (read - 1,))


def _ids(task: Any, text: str) -> tuple[int, ...]:
    return tuple(task.backend.encode(text).ids) or (task.pad,)


def _logits(model: Any, ids: tuple[int, ...]) -> torch.Tensor:
    with torch.no_grad():
        return logits(model, torch.tensor([ids]))


def logits(model: Any, ids_BT: torch.Tensor) -> torch.Tensor:
    """What the model says of rows of tokens of one length, in float32."""
    found: torch.Tensor = model(input_ids=ids_BT, attention_mask=torch.ones_like(ids_BT)).logits
    return found.float()


def _read(task: Any, ids: tuple[int, ...]) -> tuple[int, ...]:
    return tuple(range(len(ids))) if task.head.pooling == "mean" else ()


def _own_odds(label: int, logits_BL: torch.Tensor) -> torch.Tensor:
    """Of a label that is a question of its own."""
    return logits_BL[:, label]


def _odds(label: int, logits_BL: torch.Tensor) -> torch.Tensor:
    """Logarithm of the odds of a label against all others: unlike its probability it does not saturate."""
    others_BM = torch.cat([logits_BL[:, :label], logits_BL[:, label + 1 :]], dim=1)
    return logits_BL[:, label] - others_BM.logsumexp(dim=1)


def _odds_at(place: int, label: int, logits_BTL: torch.Tensor) -> torch.Tensor:
    return _odds(label, logits_BTL[:, place])


def _log_likelihood(ids: tuple[int, ...], read: int, logits_BTV: torch.Tensor) -> torch.Tensor:
    """Of the tokens that were written, given those that were read."""
    written_W = torch.tensor(ids[read:])
    found_BWV = logits_BTV[:, read - 1 : len(ids) - 1].log_softmax(dim=2)
    return found_BWV.gather(2, written_W.expand(len(found_BWV), -1).unsqueeze(2)).sum(dim=(1, 2))
