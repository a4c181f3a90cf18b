"""A student of fewer layers that learns to say what its teacher says of public text (Hinton, Vinyals and Dean 2015)."""

import copy
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import torch

from configs.errors import InputError
from trainer.data.packing import TokenFile
from trainer.optimisation.layers import fits_its_configuration
from trainer.tasks.headed import HeadedTask
from trainer.tasks.task import Encoded, Task

_BATCH, _RATE, _SHORTEST = 8, 1e-3, 8
_HEADED = ("classification", "multilabel", "entities")
_WRITING = ("causal", "chat")
Batch = dict[str, torch.Tensor]


def student_of(teacher: Any, task_name: str, share: float) -> Any:
    """The teacher without some of its layers, those that are left evenly spaced, as Sanh et al. (2019) begin.

    Args:
        teacher: stays as it is.
        task_name: of what it answers.
        share: of the layers that are left out; at least one stays.

    Raises:
        InputError: it can't be distilled here, or the share is of no whole layer.
    """
    name = type(teacher).__name__
    if task_name not in (*_HEADED, *_WRITING) or teacher.config.is_encoder_decoder:
        raise InputError(f"--method distil: not known for a {name} of the task {task_name!r}; give --method prune")
    student = copy.deepcopy(teacher)
    count = getattr(student.config, "num_hidden_layers", None)
    found = [one for one in student.modules() if isinstance(one, torch.nn.ModuleList) and len(one) == count]
    if len(found) != 1:
        raise InputError(f"--method distil: not known for a {name}; give --method prune")
    (layers,) = found
    left = max(1, round(len(layers) * (1 - share)))
    if left == len(layers):
        raise InputError(f"--share {share:g}: of {len(layers)} layers that is none; give a larger share")
    kept = [round(place) for place in np.linspace(0, len(layers) - 1, left)] if left > 1 else [0]
    _keep_layers(student, layers, kept)
    if not fits_its_configuration(student):
        raise InputError(f"--method distil: not known for a {name}; give --method prune")
    return student


def _keep_layers(student: Any, layers: torch.nn.ModuleList, kept: list[int]) -> None:
    left: list[Any] = [layers[place] for place in kept]
    del layers[:]
    layers.extend(left)
    for place, layer in enumerate(left):
        for module in layer.modules():
            if hasattr(module, "layer_idx"):  # where a cache keeps what it has read
                module.layer_idx = place
    if kinds := getattr(student.config, "layer_types", None):
        student.config.layer_types = [kinds[place] for place in kept]
    student.config.num_hidden_layers = len(kept)


def distil(
    teacher: Any,
    student: Any,
    task: Task,
    tokenizer: Any,
    file: TokenFile,
    steps: int,
    seed: int,
    on_step: Callable[[int, float], None] = lambda _step, _loss: None,
) -> None:
    """Trains a student on the divergence of its words or labels from the teacher's, Kullback and Leibler's.

    Args:
        teacher: in evaluation mode.
        student: it is changed; without dropout, too.
        task: what the teacher answers.
        tokenizer: of both.
        file: windows of public text.
        steps: so many batches of it.
        seed: of their order.
        on_step: told how many steps are done, and the loss.
    """
    optimizer = torch.optim.AdamW(student.parameters(), lr=_RATE)
    scheduler = torch.optim.lr_scheduler.OneCycleLR(optimizer, _RATE, total_steps=steps, pct_start=0.1)
    for step, batch in enumerate(_batches(task, tokenizer, file, steps, seed), 1):
        inputs, mask = batch, batch.get("attention_mask")
        with torch.no_grad():
            told = teacher(**inputs).logits.float()
        loss = divergence(student(**inputs).logits.float(), told, mask, several=task.name == "multilabel")
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(student.parameters(), 1.0)
        optimizer.step()
        scheduler.step()
        on_step(step, loss.item())
    student.zero_grad()


def divergence(
    said: torch.Tensor, told: torch.Tensor, mask: torch.Tensor | None = None, *, several: bool = False
) -> torch.Tensor:
    """The mean Kullback-Leibler divergence of a student from its teacher, in nats.

    Args:
        said: the student's logits, of texts (B, L) or of each of their tokens (B, T, L).
        told: the teacher's.
        mask: of tokens (B, T): 0 for those that only fill up.
        several: whether each label is a question of its own.
    """
    if several:
        said, told = (torch.stack([torch.zeros_like(one), one], dim=-1) for one in (said, told))
    p, q = told.log_softmax(dim=-1), said.log_softmax(dim=-1)
    nats = (p.exp() * (p - q)).sum(dim=-1)
    if several:
        nats = nats.sum(dim=-1)
    if mask is not None and nats.dim() == 2:
        return nats[mask.bool()].mean()
    return nats.mean()


def _batches(task: Task, tokenizer: Any, file: TokenFile, steps: int, seed: int) -> Iterator[Batch]:
    """Windows in an order of their own for each pass; a task with a head reads beginnings of them, of all lengths."""
    rng = np.random.default_rng(seed)
    order = np.empty(0, dtype=np.int64)
    for _ in range(steps):
        while len(order) < _BATCH:
            order = np.concatenate([order, rng.permutation(file.num_windows)])
        tokens_BT, order = file.windows(order[:_BATCH]), order[_BATCH:]
        if isinstance(task, HeadedTask):
            length = int(rng.integers(min(_SHORTEST, tokens_BT.shape[1]), tokens_BT.shape[1], endpoint=True))
            yield task.inputs([_read(task, tokenizer, row) for row in tokens_BT[:, :length]])
        else:
            yield {"input_ids": torch.from_numpy(tokens_BT)}


def _read(task: HeadedTask, tokenizer: Any, tokens_T: Any) -> Encoded:
    """A piece of text as the task reads one, with the special tokens that its model knows."""
    text = tokenizer.decode(tokens_T, skip_special_tokens=True)
    return Encoded(tuple(task.backend.encode(text).ids) or (task.pad,), len(text), truncated=False)
