"""Recurrent language models: plain, LSTM (Hochreiter and Schmidhuber 1997) and GRU (Cho et al. 2014) cells.

Cells are made of linear layers, whose per-record gradients are known, where torch's own recurrent layers hide theirs.
Importing this module makes the model known to transformers' Auto classes.
"""

from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    GenerationMixin,
    PreTrainedConfig,
    PreTrainedModel,
    initialization,
)
from transformers.utils import ModelOutput

from configs.schema.pretrain import ModelSettings

_GATES = {"rnn": 1, "lstm": 4, "gru": 3}
State = tuple[torch.Tensor, ...]  # of a layer: the hidden state and, of an LSTM, the cell's, each (B, D)


def model_config(settings: ModelSettings, vocab_size: int, dropout: float = 0.0) -> "RecurrentConfig":
    """The configuration; embeddings and head are not tied, so that the head can have an adapter."""
    return RecurrentConfig(
        cell=settings.family,
        vocab_size=vocab_size,
        hidden_size=settings.hidden_size,
        num_hidden_layers=settings.layers,
        dropout=dropout,
        tie_word_embeddings=False,
        bos_token_id=0,
        eos_token_id=0,
        pad_token_id=0,
    )


class RecurrentConfig(PreTrainedConfig):  # type: ignore[misc]
    """What the model is made of.

    Attributes:
        cell: ``rnn``, ``lstm`` or ``gru``.
    """

    model_type = "siloweave-recurrent"

    cell: str = "lstm"
    vocab_size: int = 2048
    hidden_size: int = 128
    num_hidden_layers: int = 2
    dropout: float = 0.0
    initializer_range: float = 0.02
    use_cache: bool = False
    tie_word_embeddings: bool = False


class RecurrentLayer(nn.Module):
    """One layer, beside which its input is passed on: x + cell(norm(x))."""

    def __init__(self, config: RecurrentConfig) -> None:
        super().__init__()
        self.cell, width = config.cell, config.hidden_size
        self.norm = nn.LayerNorm(width)
        self.input_gates = nn.Linear(width, _GATES[config.cell] * width)
        self.hidden_gates = nn.Linear(width, _GATES[config.cell] * width, bias=config.cell == "gru")
        # Modules of torch, by which private training tells activations.
        self.sigmoid, self.tanh, self.dropout = nn.Sigmoid(), nn.Tanh(), nn.Dropout(config.dropout)

    def forward(self, x_BTD: torch.Tensor, state: State | None) -> tuple[torch.Tensor, State]:
        """The layer's output, and its state after the last token."""
        if state is None:
            state = (x_BTD.new_zeros(len(x_BTD), x_BTD.shape[2]),) * (2 if self.cell == "lstm" else 1)
        outputs = []
        for gates_BG in self.input_gates(self.norm(x_BTD)).unbind(dim=1):
            state = self._step(gates_BG, self.hidden_gates(state[0]), state)
            outputs.append(state[0])
        return x_BTD + self.dropout(torch.stack(outputs, dim=1)), state

    def _step(self, of_input_BG: torch.Tensor, of_hidden_BG: torch.Tensor, state: State) -> State:
        if self.cell == "rnn":
            return (self.tanh(of_input_BG + of_hidden_BG),)
        if self.cell == "lstm":
            let_in, forget, cell, let_out = (of_input_BG + of_hidden_BG).chunk(4, dim=1)
            cell_BD = self.sigmoid(forget) * state[1] + self.sigmoid(let_in) * self.tanh(cell)
            return self.sigmoid(let_out) * self.tanh(cell_BD), cell_BD
        (reset, update, new), (reset_h, update_h, new_h) = of_input_BG.chunk(3, dim=1), of_hidden_BG.chunk(3, dim=1)
        keep_BD = self.sigmoid(update + update_h)
        new_BD = self.tanh(new + self.sigmoid(reset + reset_h) * new_h)
        return (new_BD + keep_BD * (state[0] - new_BD),)


@dataclass
class RecurrentOutput(ModelOutput):  # type: ignore[misc]
    """What the model gives.

    Attributes:
        loss: mean nats of the next token, where labels were given.
        logits: (B, T, V).
        state: of each layer after the last token, for the tokens that follow.
    """

    loss: torch.Tensor | None = None
    logits: torch.Tensor | None = None
    state: tuple[State, ...] | None = None


class RecurrentForCausalLM(PreTrainedModel, GenerationMixin):  # type: ignore[misc]
    """Embedding, layers, norm and head."""

    config_class = RecurrentConfig
    base_model_prefix = ""
    _is_stateful = True  # transformers: a state can't be cut back, as a cache of keys can

    def __init__(self, config: RecurrentConfig) -> None:
        super().__init__(config)
        self.embed_tokens = nn.Embedding(config.vocab_size, config.hidden_size)
        self.layers = nn.ModuleList(RecurrentLayer(config) for _ in range(config.num_hidden_layers))
        self.norm = nn.LayerNorm(config.hidden_size)
        self.lm_head = nn.Linear(config.hidden_size, config.vocab_size, bias=False)
        self.post_init()

    def forward(
        self,
        input_ids: torch.Tensor,
        attention_mask: torch.Tensor | None = None,
        labels: torch.Tensor | None = None,
        state: tuple[State, ...] | None = None,
        **_: Any,
    ) -> RecurrentOutput:
        """Logits of every next token.

        Args:
            input_ids: (B, T), whole sequences or, with ``state``, what follows.
            attention_mask: (B, T), 0 for what pads a sequence on its right, which nothing before it sees.
            labels: the same tokens, -100 where none is to be predicted.
            state: what came out before.

        Raises:
            ValueError: a sequence is padded on its left, where padding would change the state.
        """
        if attention_mask is not None and not attention_mask[:, 0].all():
            raise ValueError("a recurrent model reads what pads a sequence on its left: pad on the right")
        hidden_BTD, after = self.embed_tokens(input_ids), []
        for layer, before in zip(self.layers, state or [None] * len(self.layers), strict=True):
            hidden_BTD, left = layer(hidden_BTD, before)
            after.append(left)
        logits_BTV = self.lm_head(self.norm(hidden_BTD))
        loss = None
        if labels is not None:
            loss = nn.functional.cross_entropy(logits_BTV[:, :-1].flatten(0, 1).float(), labels[:, 1:].flatten())
        return RecurrentOutput(loss=loss, logits=logits_BTV, state=tuple(after))

    def get_input_embeddings(self) -> nn.Embedding:
        """The embedding of tokens."""
        return self.embed_tokens

    def get_output_embeddings(self) -> nn.Linear:
        """The head."""
        return self.lm_head

    def prepare_inputs_for_generation(self, input_ids: torch.Tensor, **kwargs: Any) -> dict[str, Any]:
        """After the first call, the newest token alone, with the state before it, which transformers passes on."""
        state = kwargs.get("state")
        return {"input_ids": input_ids if state is None else input_ids[:, -1:], "state": state}

    def _beam_search(self, *_: Any, **__: Any) -> Any:
        raise ValueError("a recurrent model's state does not follow beams: sample, or give num_beams=1")

    def _init_weights(self, module: nn.Module) -> None:
        """Gates start as those of torch's recurrent layers do: within one over the root of the width."""
        if not isinstance(module, nn.Linear) or module is self.lm_head:
            super()._init_weights(module)
            return
        bound = self.config.hidden_size**-0.5
        for values in module.parameters():
            initialization.uniform_(values, -bound, bound)


AutoConfig.register(RecurrentConfig.model_type, RecurrentConfig)
AutoModelForCausalLM.register(RecurrentConfig, RecurrentForCausalLM)
