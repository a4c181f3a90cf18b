"""Small models of every family that private training knows, and the losses of records under each."""

import torch
from torch import nn
from torch.nn import functional
from transformers import (
    AutoModelForCausalLM,
    AutoModelForSeq2SeqLM,
    BertConfig,
    GPT2Config,
    LlamaConfig,
    T5Config,
)

from configs.schema.pretrain import ModelSettings
from trainer.models.adapters import trainable
from trainer.models.families import new_model

VOCABULARY = 50


def language_model(config, kind=AutoModelForCausalLM, **options):
    torch.manual_seed(2)
    return kind.from_config(config, attn_implementation="eager", **options).train()


def llama(tied=False, **options):
    config = LlamaConfig(
        vocab_size=VOCABULARY, hidden_size=16, num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2,
        intermediate_size=24, max_position_embeddings=16, tie_word_embeddings=tied, bos_token_id=0, eos_token_id=0,
    )  # fmt: skip
    return language_model(config, **options)


def gpt2():
    config = GPT2Config(
        vocab_size=VOCABULARY, n_embd=16, n_layer=2, n_head=2, n_positions=16, resid_pdrop=0.0, embd_pdrop=0.0,
        attn_pdrop=0.0, bos_token_id=0, eos_token_id=0,
    )  # fmt: skip
    return language_model(config)


def bert(kind, num_labels=3):
    config = BertConfig(
        vocab_size=VOCABULARY, hidden_size=16, num_hidden_layers=2, num_attention_heads=2, intermediate_size=24,
        max_position_embeddings=16, hidden_dropout_prob=0.0, attention_probs_dropout_prob=0.0,
        num_labels=num_labels,
    )  # fmt: skip
    return language_model(config, kind)


def t5(tied):
    config = T5Config(
        vocab_size=VOCABULARY, d_model=16, d_kv=8, d_ff=24, num_layers=2, num_heads=2, dropout_rate=0.0,
        decoder_start_token_id=0, pad_token_id=0, tie_word_embeddings=tied,
    )  # fmt: skip
    return language_model(config, AutoModelForSeq2SeqLM)


def of_family(family):
    """As a run starts it from random weights."""
    settings = ModelSettings(family=family, hidden_size=16, layers=2, heads=2, intermediate_size=24, context_length=16)
    return new_model(settings, VOCABULARY, seed=2).train()


def token_losses(logits_BTV, targets_BT):
    return functional.cross_entropy(logits_BTV.float().transpose(1, 2), targets_BT, reduction="none").mean(1)


def next_token(model):
    def losses(records):
        ids = torch.stack(records)
        return token_losses(model(input_ids=ids).logits[:, :-1], ids[:, 1:])

    return losses


def masked(model):
    return lambda records: token_losses(model(input_ids=torch.stack(records)).logits, torch.stack(records))


def classified(model):
    def losses(records):
        ids = torch.stack(records)
        return functional.cross_entropy(model(input_ids=ids).logits, ids[:, 0] % 3, reduction="none")

    return losses


def translated(model):
    def losses(records):
        ids = torch.stack(records)
        return token_losses(model(input_ids=ids, decoder_input_ids=ids.flip(1)[:, :5]).logits, ids[:, :5])

    return losses


def lora(model, targets):
    from peft import LoraConfig, get_peft_model

    torch.manual_seed(3)
    wrapped = get_peft_model(model, LoraConfig(r=3, lora_alpha=6, target_modules=targets))
    for name, parameter in trainable(wrapped).items():
        if "lora_B" in name:  # zero at the start, and with it A's gradient: make both matter
            nn.init.normal_(parameter, std=0.1)
    return wrapped.train()
