"""What a silo computes of made-up records, on the processor and on another device."""

import copy
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import torch
from model_families import VOCABULARY, bert, llama
from per_record import alike_here
from transformers import (
    AutoModelForQuestionAnswering,
    AutoModelForSequenceClassification,
    AutoModelForTokenClassification,
)

from configs.schema.tasks import TaskSpec
from federated.evaluation.private_sums import Bounds, evaluated, private_sums
from federated.silo.local_training import LocalSettings, PrivateUpdate, plain_update
from privacy.clipping.clipping import clipping
from privacy.clipping.independence import Together
from privacy.mechanism.streams import Streams
from privacy.plan import PlanTerms
from trainer.device import beside, where
from trainer.models.adapters import adapter_weights, add_adapter
from trainer.scoring.score import score
from trainer.tasks.classification import ClassificationTask
from trainer.tasks.entities import EntitiesTask
from trainer.tasks.qa import AnswersTask, Question
from trainer.tasks.text import CausalTask

PLAN = PlanTerms(
    sampling_rate=0.5, max_grad_norm=0.3, noise_multiplier=0.7, rounds=1, steps_per_round=2, delta=1e-5,
    clipping_function="quantile", target_quantile=0.5,
).bind(40)  # fmt: skip


class Tokenizer:
    """As much of one as made-up records need: one token a letter."""

    eos_token_id = pad_token_id = 0
    bos_token_id = cls_token_id = None

    def __len__(self):
        return VOCABULARY

    @property
    def backend_tokenizer(self):
        return self

    def encode(self, text, add_special_tokens):
        return type("Encoding", (), {"ids": [1 + ord(letter) % 40 for letter in text]})


def cases():
    """By name a task, and what makes its model."""
    labels = TaskSpec(name="classification", labels=("a", "b", "c"))
    tags = TaskSpec(name="entities", labels=("O", "B-x", "I-x"))
    return {
        "text": (CausalTask(Tokenizer(), 16), llama),
        "labels": (ClassificationTask(Tokenizer(), 16, labels), lambda: bert(AutoModelForSequenceClassification)),
        "tags": (EntitiesTask(Tokenizer(), 16, tags), lambda: bert(AutoModelForTokenClassification)),
        "questions": (
            AnswersTask(Tokenizer(), 16, TaskSpec(name="qa")),
            lambda: bert(AutoModelForQuestionAnswering, 2),
        ),
    }


def compared(device: str) -> dict[str, float]:
    """Largest relative difference of each result between the processor and a device.

    With it, under ``proved``, how many texts with a label the device computes together.
    """
    found = {}
    for name, (task, made) in cases().items():
        model = add_adapter(made(), 4, 8.0, seed=0, head=task.head).train()
        elsewhere = copy.deepcopy(model).to(device)
        assert where(elsewhere).type == torch.device(device).type
        here, there = computed(task, model), computed(task, elsewhere)
        for what, value in here.items():
            found[f"{name}, {what}"] = float(np.abs(there[what] - value).max() / np.abs(value).max())
        if name == "labels":
            found["proved"] = float(together(task, elsewhere))
            found["alike"] = float(alike_here(model, _losses(task, model), task.made_up(16, 4)))
    return found


def computed(task: Any, model: Any) -> dict[str, Any]:
    """A private and a plain update, the noised sums of a private evaluation, and scores in the clear."""
    records = task.made_up(16, 8)
    units, streams = [(one,) for one in records], Streams(b"s" * 32, "ab" * 32)
    scored = [_question(one) for one in records] if task.name == "qa" else records
    start = {name: value.cpu().numpy() for name, value in adapter_weights(model).items()}
    correction = {name: np.full_like(value, 1e-3) for name, value in start.items()}
    how = LocalSettings(1e-2, "adam_bc", 2, "bookkeeping", 0.1, correction)
    private = PrivateUpdate(PLAN, model, task, start, how).run(streams, units)
    plain = plain_update([records], 8.0, model, task, start, how)
    with evaluated(model, start):
        sums = private_sums(model, task, [(one,) for one in scored], [], Bounds(task.measures), 0.5, streams)
        scores = score(model, task, scored, 4).rows
    flat = [np.concatenate([one.ravel() for one in update.values()]) for update in (private, plain)]
    return {"private": flat[0], "plain": flat[1], "sums": np.array(sums), "scores": scores}


def together(task: Any, model: Any) -> int:
    """Most units of a shape that are computed together where the model is."""
    with beside(model.train()), clipping(model, 1.0) as clipper:
        return Together(clipper, _losses(task, model), task.shape, task.made_up, 4).proved(16)


def _losses(task: Any, model: Any) -> Callable[[Sequence[Any]], torch.Tensor]:
    return lambda units: task.record_losses(model, task.collate(units))


def _question(window: Any) -> Question:
    context = "x" * len(window.spans)
    return Question(window.ids, len(context), truncated=False, windows=(window,), context=context, answers=("xx",))
