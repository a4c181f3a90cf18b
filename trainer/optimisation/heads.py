"""Attention heads that a trained model can do without: cut out where a configuration can say so, else silent."""

from dataclasses import dataclass
from operator import attrgetter
from typing import Any

import torch

from configs.errors import InputError
from trainer.optimisation.layers import fits_its_configuration, is_linear, keep, rows_of


@dataclass(frozen=True)
class _Attention:
    """How a family calls its attention.

    Attributes:
        sides: layers of queries, of keys and of values; where it is one layer, that holds all three, one after another.
        out: the layer that leads on from the heads.
        cut: whether its configuration has a width of heads of its own, so that there can be fewer of them.
    """

    sides: tuple[str, ...]
    out: str
    cut: bool = False


_ATTENTIONS = (
    _Attention(("q_proj", "k_proj", "v_proj"), "o_proj", cut=True),  # Llama and its relatives
    _Attention(("c_attn",), "c_proj"),  # GPT-2
    _Attention(("self.query", "self.key", "self.value"), "output.dense"),  # BERT
)


def prune_heads(model: Any, share: float) -> None:
    """Takes the attention heads out that move least: by the norm of what leads from a head's input to its output.

    Heads that share keys and values go together, and so many of each layer's. Where a configuration knows no width of
    heads but the model's by their number, they can't be cut out, and all of their weights become zero instead.

    Args:
        model: it is changed, and where heads are cut out its configuration says how many are left.
        share: of each layer's groups of heads, as nearly as transformers allows: it demands of most configurations that
            the number of heads divides the model's width. At least one stays.

    Raises:
        InputError: it is of a family whose heads aren't known here, or the share is of no group.
    """
    attention, layers = _layers(model)
    heads = model.config.num_attention_heads
    groups = (getattr(model.config, "num_key_value_heads", None) or heads) if attention.cut else heads
    left = _left(model, groups, heads // groups, share, cut=attention.cut)
    for layer in layers:
        try:
            kept = _strongest(layer, attention, heads, groups, left)
        except RuntimeError:  # its weights aren't so many for each head
            raise _unknown(model) from None
        for name in (*attention.sides, attention.out):
            _reduce(attrgetter(name)(layer), kept, groups, attention, out=name == attention.out)
    if attention.cut:
        width = getattr(model.config, "head_dim", None) or model.config.hidden_size // heads
        model.config.head_dim, model.config.num_key_value_heads = width, left
        model.config.num_attention_heads = heads // groups * left
        if not fits_its_configuration(model):  # a relative that has more by head than is known here
            raise _unknown(model)


def _layers(model: Any) -> tuple[_Attention, list[Any]]:
    for attention in _ATTENTIONS:
        names = (*attention.sides, attention.out)
        if found := [one for one in model.modules() if all(is_linear(one, name) for name in names)]:
            fits = isinstance(getattr(model.config, "num_attention_heads", None), int)
            if fits and not model.config.is_encoder_decoder:
                return attention, found
    raise _unknown(model)


def _left(model: Any, groups: int, heads_each: int, share: float, *, cut: bool) -> int:
    width = model.config.hidden_size
    fitting = [left for left in range(1, groups + 1) if not cut or width % (left * heads_each) == 0]
    found = min(fitting, key=lambda left: abs(left - groups * (1 - share)), default=groups)
    if found == groups:
        raise InputError(f"--share {share:g}: of {groups} groups of attention heads that is none; give a larger share")
    return found


def _unknown(model: Any) -> InputError:
    return InputError(f"--method heads: not known for a {type(model).__name__}; give --method prune")


def _strongest(layer: Any, attention: _Attention, heads: int, groups: int, left: int) -> torch.Tensor:
    """Numbers of the groups of heads that stay, in their order."""
    values = rows_of(attrgetter(attention.sides[-1])(layer)).chunk(3 if len(attention.sides) == 1 else 1)[-1]
    values_GHD = values.reshape(groups, -1, values.shape[1])
    out_NHD = rows_of(attrgetter(attention.out)(layer), out=True).reshape(heads, values_GHD.shape[1], -1)
    # Of each head: from what is read to what is written, the values' matrix and the output's in one.
    moved_N = torch.stack(
        [(out_HD.T @ values_GHD[head * groups // heads]).norm() for head, out_HD in enumerate(out_NHD)]
    )
    return moved_N.view(groups, -1).sum(dim=1).topk(left).indices.sort().values


def _reduce(layer: Any, kept: torch.Tensor, groups: int, attention: _Attention, *, out: bool) -> None:
    count = rows_of(layer, out=out).shape[0]
    sides = 3 if len(attention.sides) == 1 and not out else 1
    chosen = torch.zeros(sides, groups, count // groups // sides, dtype=torch.bool)
    chosen[:, kept] = True
    if attention.cut:
        keep(layer, chosen.flatten().nonzero().squeeze(1), out=out)
        return
    with torch.no_grad():
        rows_of(layer, out=out)[~chosen.flatten()] = 0.0
        if not out and layer.bias is not None:
            layer.bias[~chosen.flatten()] = 0.0
