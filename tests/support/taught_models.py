"""Small models that write readable texts, each another one: rows of words, learnt in a second."""

import random
import shutil

import torch
from transformers import LlamaConfig, LlamaForCausalLM

from configs.storage.manifests import Manifest, commit_manifest, require_manifest
from trainer.data.tokenizer import load_tokenizer, train_tokenizer
from trainer.models.adapters import add_adapter
from trainer.tasks.text import CausalTask

WORDS = [
    "ship",
    "island",
    "sails",
    "harbour",
    "captain",
    "storm",
    "rope",
    "anchor",
    "compass",
    "deck",
    "mast",
    "lantern",
    "barrel",
    "whale",
    "gull",
    "tide",
]
LABELS = ("old", "red")
CONTEXT = 32


def texts(rows, seed=0):
    draw = random.Random(seed)
    return [" ".join(draw.choices(WORDS, k=draw.randint(6, 10))) for _ in range(rows)]


def a_taught_model(folder):
    """A base model as `siloweave export` leaves it, that has read such rows after a label."""
    records = [f"{LABELS[number % 2]}: {text}" for number, text in enumerate(texts(200))]
    train_tokenizer([*records, *WORDS], 400, folder)
    tokenizer = load_tokenizer(folder)
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=len(tokenizer), hidden_size=32, num_hidden_layers=1, num_attention_heads=2, num_key_value_heads=2,
        intermediate_size=48, max_position_embeddings=CONTEXT, bos_token_id=0, eos_token_id=0, pad_token_id=0,
    )  # fmt: skip
    model, task = LlamaForCausalLM(config), CausalTask(tokenizer, CONTEXT)
    optimizer = torch.optim.Adam(model.parameters(), lr=2e-2)
    batch = task.collate([task.encode(record) for record in records])
    for _ in range(60):
        optimizer.zero_grad()
        task.record_losses(model, batch).mean().backward()
        optimizer.step()
    model.eval().save_pretrained(folder)
    commit_manifest(folder, Manifest("model", "made-up", metadata={"context_length": CONTEXT}))
    return folder


def a_taught_federation(run, base):
    """A run on that base model whose federation has left an adapter that changes little, without a certificate."""
    shutil.copytree(base, run / "model")
    model = add_adapter(LlamaForCausalLM.from_pretrained(base), rank=2, alpha=4.0, seed=1)
    federation = run / "federated"
    model.save_pretrained(federation / "adapter")
    digest = require_manifest(run / "model", "model", "export").content_digest
    commit_manifest(federation, Manifest("federated", "made-up", inputs={"model": digest}))
    return run
