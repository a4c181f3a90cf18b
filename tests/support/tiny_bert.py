"""A small BERT at random, as its makers would publish it, and the same as a run's base model."""

import torch
from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers, processors, trainers
from transformers import BertConfig, BertForMaskedLM, PreTrainedTokenizerFast

from configs.load import load
from privacy.declaration import DECLARATION, declare
from privacy.signing import Signer
from trainer.imported import import_model

SPECIAL = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]"]
CONTEXT = 32


def word_pieces(texts, size=200):
    """A tokenizer like BERT's own."""
    found = Tokenizer(models.WordPiece(unk_token="[UNK]"))
    found.normalizer, found.pre_tokenizer = normalizers.BertNormalizer(), pre_tokenizers.BertPreTokenizer()
    found.decoder = decoders.WordPiece()
    found.train_from_iterator(texts, trainers.WordPieceTrainer(vocab_size=size, special_tokens=SPECIAL))
    found.post_processor = processors.TemplateProcessing(
        single="[CLS] $A [SEP]", pair="[CLS] $A [SEP] $B:1 [SEP]:1", special_tokens=[("[CLS]", 2), ("[SEP]", 3)]
    )
    names = {"pad_token": "[PAD]", "unk_token": "[UNK]", "cls_token": "[CLS]", "sep_token": "[SEP]"}
    return PreTrainedTokenizerFast(tokenizer_object=found, mask_token="[MASK]", **names)


def published(folder, texts):
    """The folder of a BERT with this vocabulary."""
    tokenizer = word_pieces(texts)
    tokenizer.save_pretrained(folder)
    torch.manual_seed(1)
    config = BertConfig(
        vocab_size=len(tokenizer), hidden_size=16, num_hidden_layers=2, num_attention_heads=2, intermediate_size=24,
        max_position_embeddings=64,
    )  # fmt: skip
    BertForMaskedLM(config).save_pretrained(folder)
    return folder


def base_model(folder, source, *settings):
    """A run's base model of that source."""
    given = [f'model.source="{source}"', f"model.context_length={CONTEXT}", *settings]
    signer = Signer(folder / "key")
    import_model(load("tiny", given), folder / "run", lambda facts: declare(facts, signer).encode(), DECLARATION)
    return folder / "run" / "model"
