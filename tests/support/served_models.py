"""Small models in folders as a run leaves them, to be served."""

import shutil
from dataclasses import asdict

import torch
from chat_templates import CHATML
from transformers import LlamaConfig, LlamaForCausalLM

from configs.load import load
from configs.run_directory import to_toml
from configs.storage.manifests import Manifest, commit_manifest, require_manifest
from trainer.data.tokenizer import load_tokenizer, train_tokenizer
from trainer.models.adapters import add_adapter, trainable
from trainer.models.load import load_model
from trainer.tasks.headed import head_of

CONTEXT = 1024
DOCUMENTS = [f"the {name} ship sails to island number {number}" for number in range(40) for name in ("red", "old")]


def a_model(folder, chat=True, seed=0):
    """A base model as `siloweave export` leaves it, of random weights."""
    train_tokenizer(DOCUMENTS, 300, folder)
    tokenizer = load_tokenizer(folder)
    if chat:
        tokenizer.chat_template = CHATML
        tokenizer.save_pretrained(folder)
    torch.manual_seed(seed)
    config = LlamaConfig(
        vocab_size=len(tokenizer), hidden_size=32, num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2,
        intermediate_size=48, max_position_embeddings=CONTEXT, bos_token_id=0, eos_token_id=0, pad_token_id=0,
        initializer_range=0.3,
    )  # fmt: skip
    LlamaForCausalLM(config).save_pretrained(folder)
    commit_manifest(folder, Manifest("model", "made-up", metadata={"context_length": CONTEXT}))
    return folder


def a_federation(run, base, seed):
    """A run on that base model whose federation has left an adapter, without a certificate."""
    shutil.copytree(base, run / "model")
    model = add_adapter(LlamaForCausalLM.from_pretrained(base), rank=2, alpha=4.0, seed=seed)
    torch.manual_seed(seed)
    for value in trainable(model).values():
        torch.nn.init.normal_(value, std=0.3)
    federation = run / "federated"
    model.save_pretrained(federation / "adapter")
    digest = require_manifest(run / "model", "model", "export").content_digest
    commit_manifest(federation, Manifest("federated", "made-up", inputs={"model": digest}))
    return run


def a_labelling_run(run, base, task, labels=()):
    """A run whose federation has left an adapter and a task's head, if it has one, and the model with both in peft."""
    settings = [f"federated.task={task}", f"federated.labels={list(labels)}", f"model.context_length={CONTEXT}"]
    config = load("tiny", settings)
    shutil.copytree(base, run / "model")
    (run / "config.toml").write_text(to_toml(config))
    head = head_of(config.federated.task_spec)
    model = add_adapter(load_model(run / "model", head=head), rank=2, alpha=4.0, seed=1, head=head)
    torch.manual_seed(1)
    for value in trainable(model).values():
        torch.nn.init.normal_(value, std=0.3)
    federation = run / "federated"
    model.save_pretrained(federation / "adapter", save_embedding_layers=False)
    digest = require_manifest(run / "model", "model", "export").content_digest
    of_head = {"head": asdict(head)} if head else {}
    made = Manifest("federated", "made-up", inputs={"model": digest}, metadata=of_head)
    commit_manifest(federation, made)
    return run, model.eval(), config.federated.task_spec
