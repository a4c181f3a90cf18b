"""Model and steps of the stock app: LoRA r=16 on all linear layers, Adam on random tokens of the context's length."""

from typing import Any

import torch
from peft import LoraConfig, get_peft_model
from transformers import AutoModelForCausalLM

BATCH = 65  # what the tiny preset's sampling rate gives of 6,000 and of 7,000 records


def load(directory: str) -> Any:
    torch.manual_seed(0)
    base = AutoModelForCausalLM.from_pretrained(directory)
    return get_peft_model(base, LoraConfig(r=16, lora_alpha=32, target_modules="all-linear", bias="none"))


def adapter(model: Any) -> dict[str, torch.Tensor]:
    return {name: weight.detach() for name, weight in model.named_parameters() if weight.requires_grad}


def steps(model: Any, count: int) -> None:
    optimizer = torch.optim.Adam([weight for weight in model.parameters() if weight.requires_grad], lr=5e-3)
    length = min(model.config.max_position_embeddings, 64)
    for _ in range(count):
        tokens = torch.randint(0, model.config.vocab_size, (BATCH, length))
        model(input_ids=tokens, labels=tokens).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
