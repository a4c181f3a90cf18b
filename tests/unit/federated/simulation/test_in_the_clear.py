"""Scores on a public text of one's own, against transformers' loss."""

import math

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from configs.load import load
from federated.simulation.in_the_clear import score_public

TEXTS = ["The first public line of all.", "A second one, and shorter.", "The third is not read at all."]


def test_a_public_text_is_scored_as_transformers_does(tiny_model, tmp_path):
    source = tmp_path / "lines.csv"
    source.write_text("note\n" + "".join(f'"{text}"\n' for text in TEXTS))
    config = load("tiny", [f'evaluate.public.source="{source}"', 'evaluate.public.text="note"'])
    found = score_public(config, tiny_model, None, 2)["public"]
    model, tokenizer = AutoModelForCausalLM.from_pretrained(tiny_model), AutoTokenizer.from_pretrained(tiny_model)
    nats, end = 0.0, tokenizer.eos_token_id
    for text in TEXTS[:2]:
        tokens = torch.tensor([[end, *tokenizer.encode(text), end]])
        nats += model(tokens, labels=tokens).loss.item() * (tokens.numel() - 1)
    assert found.records == 2
    assert found.bits_per_char == pytest.approx(nats / math.log(2) / sum(map(len, TEXTS[:2])), rel=1e-4)
