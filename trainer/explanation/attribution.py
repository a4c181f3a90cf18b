"""How much each token that a model has read speaks for its answer: integrated gradients, and attention roll-out."""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from importlib import import_module
from typing import Any

import torch

from configs.errors import InputError
from trainer.explanation.aims import Aim, aims, logits
from trainer.models.load import is_quantised

_STEPS = 64
_AT_ONCE = 16


@dataclass(frozen=True)
class Piece:
    """A part of a text, as it reads.

    Attributes:
        text: of one token, or of several that make a character together.
        gradients: what it adds to how sure the model is of its answer, in nats; below 0 it speaks against it.
        attention: its share of what the model looks at, all pieces together 1; None: the model has no attention.
    """

    text: str
    gradients: float
    attention: float | None


@dataclass(frozen=True)
class Explanation:
    """Why an answer is what it is.

    Attributes:
        text: what was asked.
        answer: what is explained.
        nats: how sure the model is of it: log-odds of a label or a tag, log-likelihood of what it writes.
        without: the same for a text of which every token is blank. The pieces add up to the difference.
        unexplained: what is left of the difference, since a path of finitely many steps is not the integral.
        pieces: of the text, from the first to the last.
    """

    text: str
    answer: str
    nats: float
    without: float
    unexplained: float
    pieces: tuple[Piece, ...]


def explain(task: Any, tokenizer: Any, model: Any, text: str, tokens: int = 8) -> list[Explanation]:
    """Explains each answer of a model to a text.

    Args:
        task: the model's.
        tokenizer: the model's.
        model: in evaluation mode, on the CPU.
        text: as the model reads it.
        tokens: how many it writes at most, where it writes.

    Raises:
        InputError: the text is empty, this kind of model or task can't be explained, its weights are quantised, or
            captum is not installed.
    """
    if is_quantised(model):
        raise InputError("its weights are quantised and have no gradients; explain the model that it was made from")
    blank = tokenizer.mask_token_id if tokenizer.mask_token_id is not None else tokenizer.pad_token_id
    blank = tokenizer.eos_token_id if blank is None else blank
    return [_explained(tokenizer, model, text, aim, blank) for aim in aims(task, tokenizer, model, text, tokens)]


def _explained(tokenizer: Any, model: Any, text: str, aim: Aim, blank: int) -> Explanation:
    baseline = _blanked(aim, blank, set(tokenizer.all_special_ids))
    gradients_T = integrated_gradients(model, aim, baseline)
    with torch.no_grad():
        nats, without = aim.value(logits(model, torch.tensor([aim.ids, baseline]))).double().tolist()
    attention_T = attention_rollout(model, aim)
    pieces = tuple(_pieces(tokenizer.backend_tokenizer, aim, gradients_T, attention_T))
    return Explanation(text, aim.answer, nats, without, nats - without - float(gradients_T.sum()), pieces)


def _blanked(aim: Aim, blank: int, special: set[int]) -> tuple[int, ...]:
    """The text without what it says: special tokens and the answer stay, all else is blank."""
    return tuple(token if token in special or place >= aim.explained else blank for place, token in enumerate(aim.ids))


def integrated_gradients(model: Any, aim: Aim, baseline: Sequence[int]) -> torch.Tensor:
    """What each token adds on the way from a baseline to the text (Sundararajan et al. 2017), by captum.

    Args:
        model: in evaluation mode.
        aim: what is explained.
        baseline: tokens that say nothing, as many as the text's.

    Returns:
        Nats of each explained token, shape (T,), float64. They sum to the difference between text and baseline.

    Raises:
        InputError: captum is not installed.
    """
    method = _captum().LayerIntegratedGradients(lambda ids: aim.value(logits(model, ids)), model.get_input_embeddings())
    found_1TE = method.attribute(
        torch.tensor([aim.ids]), torch.tensor([baseline]), n_steps=_STEPS, internal_batch_size=_AT_ONCE
    )
    found_T: torch.Tensor = found_1TE[0].double().sum(dim=1)[: aim.explained].detach()
    return found_T


def _captum() -> Any:
    try:
        return import_module("captum.attr")
    except ModuleNotFoundError:
        raise InputError(
            "captum is not installed, which explanations are made with; pip install 'siloweave[explain]'"
        ) from None


def attention_rollout(model: Any, aim: Aim) -> torch.Tensor | None:
    """How much of each token comes to the place of the answer, over all layers (Abnar and Zuidema 2020).

    A layer's attention is the mean of its heads, and half of a token stays where it is (its residual connection).

    Returns:
        Shares of the explained tokens, shape (T,), sum 1; None where the model has no attention.
    """
    with _attention_shown(model) as inner, torch.no_grad():
        layers = inner(input_ids=torch.tensor([aim.ids]), output_attentions=True).get("attentions")
    if not layers:
        return None
    unit_TT = torch.eye(len(aim.ids), dtype=torch.float64)
    joint_TT, forward_only = unit_TT, True
    for heads_1HTT in layers:
        mean_TT = heads_1HTT[0].double().mean(dim=0)
        forward_only = forward_only and not mean_TT.triu(1).any()
        joint_TT = (mean_TT + unit_TT) / 2 @ joint_TT
    # A head that reads a whole text takes its last token where none sees those behind it, else its first.
    places = aim.places or (len(aim.ids) - 1 if forward_only else 0,)
    found_T = joint_TT[list(places)].mean(dim=0)[: aim.explained]
    return found_T / found_T.sum()


@contextmanager
def _attention_shown(model: Any) -> Iterator[Any]:
    """The model as it was written, and with transformers' plain attention, which alone hands out its weights."""
    inner = model.get_base_model() if hasattr(model, "get_base_model") else model
    before = inner.config._attn_implementation
    inner.set_attn_implementation("eager")
    try:
        yield inner
    finally:
        inner.set_attn_implementation(before)


def _pieces(backend: Any, aim: Aim, gradients_T: torch.Tensor, attention_T: torch.Tensor | None) -> Iterator[Piece]:
    """Tokens as they read: one whose bytes end inside a character belongs to the piece that ends it."""
    shown, gradients, attention = "", 0.0, 0.0
    for place in range(aim.explained):
        whole = backend.decode(list(aim.ids[: place + 1]), skip_special_tokens=False)
        gradients += float(gradients_T[place])
        attention += 0.0 if attention_T is None else float(attention_T[place])
        if whole.endswith("\N{REPLACEMENT CHARACTER}") and place + 1 < aim.explained:
            continue
        # A decoder may change what stands before, a blank for instance: then the token reads as it does alone.
        text = whole[len(shown) :] if whole.startswith(shown) else backend.decode([aim.ids[place]])
        yield Piece(text, gradients, None if attention_T is None else attention)
        shown, gradients, attention = whole, 0.0, 0.0
