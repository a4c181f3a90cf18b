"""A model that others have made: what comes out is the same model, and what can't be trusted or used is refused."""

import json
import shutil
import struct

import pytest
import torch
from huggingface_hub import constants
from safetensors.torch import load_file, save_file
from tokenizers.processors import TemplateProcessing
from transformers import (
    AutoModelForCausalLM,
    BertConfig,
    BertModel,
    GPT2Config,
    LlamaConfig,
    M2M100Config,
    M2M100ForConditionalGeneration,
    T5Config,
    T5ForConditionalGeneration,
)

from configs.errors import InputError
from configs.load import load
from configs.parse import PRESETS, parse, read_toml
from configs.schema.schema import RunConfig
from configs.schema.tasks import CAUSAL, TaskSpec
from privacy.declaration import DECLARATION, declaration_of, declare
from privacy.signing import Signer
from trainer.data.embedded import python_docs
from trainer.data.tokenizer import first_token, load_tokenizer, train_tokenizer
from trainer.imported import import_model, outline
from trainer.models.adapters import add_adapter, linear_names, trainable
from trainer.models.families import attention
from trainer.models.load import load_model
from trainer.tasks.task import task_of
from trainer.tasks.text_to_text import EncoderDecoderTask

VOCABULARY = 300
TEXTS = [row["text"] for row, _ in zip(python_docs(), range(50), strict=False)]


def written(folder, config, kind=AutoModelForCausalLM):
    torch.manual_seed(1)
    model = kind.from_config(config) if kind is AutoModelForCausalLM else kind(config)
    model.save_pretrained(folder)
    train_tokenizer(TEXTS, VOCABULARY, folder)
    return folder


def llama_config(**changes):
    sizes = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 24}
    ids = {"bos_token_id": 0, "eos_token_id": 0}
    return LlamaConfig(**{"vocab_size": VOCABULARY, "max_position_embeddings": 64, **sizes, **ids, **changes})


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    """A small Llama with tied weights, as its makers would publish it."""
    folder = written(tmp_path_factory.mktemp("made"), llama_config(tie_word_embeddings=True))
    (folder / "README.md").write_text("---\nlicense: mit\n---\n# A model\n")
    (folder / "LICENSE").write_text("MIT")
    return folder


@pytest.fixture
def source(made, tmp_path):
    return shutil.copytree(made, tmp_path / "source")


@pytest.fixture
def taken(tmp_path):
    """Imports a source into a run of its own."""
    signer = Signer(tmp_path / "key")

    def take(source, *overrides):
        config = load("tiny", [f'model.source="{source}"', "model.context_length=32", *overrides])
        found = import_model(config, tmp_path / "run", lambda facts: declare(facts, signer).encode(), DECLARATION)
        return tmp_path / "run" / "model", found

    take.key = signer.public_key
    return take


def logits(folder):
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32, attn_implementation=attention()).eval()
    return model(input_ids=torch.arange(20)[None]).logits


def test_the_same_model_comes_out(source, taken):
    folder, manifest = taken(source)
    assert torch.equal(load_model(folder)(input_ids=torch.arange(20)[None]).logits, logits(source))
    assert (folder / "LICENSE").read_text() == "MIT"
    task = task_of(CAUSAL, folder)
    assert (task.context_length, task.vocab_size) == (32, VOCABULARY)
    declared = declaration_of(folder, manifest)
    assert (declared.declared_public_by, declared.license, declared.source) == (taken.key, "mit", str(source))
    assert set(manifest.files) == {*declared.files, DECLARATION}
    assert manifest.metadata["trained_on"] == "declared public"
    shapes = [parameter.shape for parameter in outline(str(source), CAUSAL).parameters()]
    assert shapes == [parameter.shape for parameter in load_model(folder).parameters()]


def test_it_is_imported_once_and_anew_where_its_files_have_changed(source, taken):
    first, again = taken(source)[1], taken(source)[1]
    assert first == again
    weights = load_file(source / "model.safetensors")
    save_file({name: value + 1 for name, value in weights.items()}, source / "model.safetensors", {"format": "pt"})
    assert taken(source)[1].content_digest != first.content_digest


def test_half_precision_and_dropout_do_not_stay(tmp_path, taken):
    config = GPT2Config(vocab_size=VOCABULARY, n_embd=16, n_layer=1, n_head=2, n_positions=64)
    assert config.resid_pdrop > 0
    folder = written(tmp_path / "gpt2", config)
    AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float16).save_pretrained(folder)
    model = load_model(taken(folder)[0])
    assert {parameter.dtype for parameter in model.parameters()} == {torch.float32}
    assert (model.config.resid_pdrop, model.config.embd_pdrop, model.config.attn_pdrop) == (0.0, 0.0, 0.0)


def test_a_head_that_shares_the_embeddings_weight_has_no_adapter(source, tmp_path):
    tied = AutoModelForCausalLM.from_pretrained(source)
    assert "lm_head" not in linear_names(tied)
    names = list(trainable(add_adapter(tied, rank=2, alpha=4, seed=0)))
    assert names
    assert not [name for name in names if "lm_head" in name or "embed" in name]
    apart = AutoModelForCausalLM.from_pretrained(written(tmp_path / "apart", llama_config()))
    assert "lm_head" in linear_names(apart)


def test_a_records_words_are_never_the_models_special_tokens(source, taken):
    task, tokenizer = task_of(CAUSAL, taken(source)[0]), load_tokenizer(source)
    ids = task.encode("a <|endoftext|> b").ids
    assert ids[0] == first_token(tokenizer) == ids[-1] == tokenizer.eos_token_id
    assert tokenizer.eos_token_id not in ids[1:-1]


def test_a_text_starts_as_the_models_own_tokenizer_starts_it(source):
    tokenizer = load_tokenizer(source)
    tokenizer.backend_tokenizer.post_processor = TemplateProcessing("A $A", None, [("A", 65)])
    assert first_token(tokenizer) == 65


def test_a_repository_comes_from_the_cache_by_its_revision(source, taken, tmp_path, monkeypatch):
    revision = "ab" * 20
    place = tmp_path / "hub" / "models--org--name"
    shutil.copytree(source, place / "snapshots" / revision)
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "hub"))
    folder, manifest = taken(f"hf:org/name@{revision}")
    assert declaration_of(folder, manifest).revision == revision
    with pytest.raises(InputError, match="name the revision"):
        taken("hf:org/name")
    with pytest.raises(InputError, match="can't be loaded"):
        taken("hf:org/other@main")


def without_weights(folder):
    (folder / "model.safetensors").rename(folder / "pytorch_model.bin")


def cut(folder):
    content = (folder / "model.safetensors").read_bytes()
    (folder / "model.safetensors").write_bytes(content[: len(content) // 2])


def lying_header(folder):
    (folder / "model.safetensors").write_bytes(struct.pack("<Q", 2**62) + b"{}")


def lacking_a_weight(folder):
    weights = load_file(folder / "model.safetensors")
    weights.pop("model.norm.weight")
    save_file(weights, folder / "model.safetensors", {"format": "pt"})


def configured(**changes):
    def change(folder):
        path = folder / "config.json"
        path.write_text(json.dumps({**json.loads(path.read_text()), **changes}))

    return change


def with_a_larger_tokenizer(folder):
    train_tokenizer(TEXTS, VOCABULARY + 50, folder)


def without_an_end(folder):
    path = folder / "tokenizer_config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), "eos_token": None}))


def without_a_tokenizer(folder):
    for name in ("tokenizer.json", "tokenizer_config.json"):
        (folder / name).unlink()


CODE = {"AutoConfig": "evil.Config", "AutoModelForCausalLM": "evil.Model"}


FOUR_BIT = {"quant_method": "bitsandbytes", "load_in_4bit": True, "bnb_4bit_quant_type": "nf4"}


@pytest.mark.parametrize(
    ("damage", "said"),
    [
        (without_weights, "pytorch_model.bin; give weights as safetensors"),
        (cut, "can't be read"),
        (lying_header, "can't be read"),
        (lacking_a_weight, "its files lack model.norm.weight"),
        (lambda folder: (folder / "config.json").unlink(), "no config.json"),
        (lambda folder: (folder / "config.json").write_text("{"), "can't be read"),
        (configured(model_type="evil", auto_map=CODE), "can't be read"),
        (
            configured(architectures=["LlamaForSequenceClassification"]),
            "the task 'causal' needs a causal language model",
        ),
        (configured(hidden_size=32), "can't be read"),
        (
            configured(quantization_config=FOUR_BIT),
            "its weights are quantised (bitsandbytes); give the model",
        ),
        (with_a_larger_tokenizer, f"350 tokens and its model {VOCABULARY} embeddings"),
        (without_an_end, "no end-of-text token"),
        (lambda folder: (folder / "certificate.json").write_text("{}"), "silos' records have made it"),
        (without_a_tokenizer, "can't be read"),
    ],
)
def test_what_cannot_be_used_is_refused_in_one_line_and_leaves_nothing(source, taken, tmp_path, damage, said):
    (source / "evil.py").write_text("raise SystemExit('ran')")
    damage(source)
    with pytest.raises(InputError) as caught:
        taken(source)
    assert said in str(caught.value)
    assert str(source) in str(caught.value)
    assert "\n" not in str(caught.value)
    assert not (tmp_path / "run" / "model").exists()


def test_an_encoder_is_no_language_model(tmp_path, taken):
    config = BertConfig(
        vocab_size=VOCABULARY, hidden_size=16, num_hidden_layers=1, num_attention_heads=2, intermediate_size=24
    )
    folder = written(tmp_path / "bert", config, BertModel)
    with pytest.raises(InputError, match="it is a BertModel, and the task 'causal' needs a causal language model"):
        taken(folder)
    likely = ("federated.task=classification", 'federated.labels=["a", "b"]', "federated.pooling=likelihood")
    with pytest.raises(InputError, match="the task 'classification' by likelihood needs a causal language model"):
        taken(folder, *likely)


def test_an_encoder_decoder_translates_and_does_not_chat(tmp_path, taken):
    sizes = {"d_model": 16, "d_kv": 8, "d_ff": 24, "num_layers": 1, "num_heads": 2}
    config = T5Config(vocab_size=VOCABULARY, decoder_start_token_id=0, pad_token_id=0, eos_token_id=0, **sizes)
    folder = written(tmp_path / "t5", config, T5ForConditionalGeneration)
    model, _ = taken(folder, "federated.task=translation")
    assert load_model(model).config.dropout_rate == 0
    assert isinstance(task_of(TaskSpec(name="translation"), model), EncoderDecoderTask)
    with pytest.raises(InputError, match="it is a T5ForConditionalGeneration, and the task 'chat' needs a causal lang"):
        taken(folder, "federated.task=chat")


def test_a_decoder_that_says_not_what_it_reads_is_refused(tmp_path, taken):
    sizes = {"d_model": 16, "encoder_ffn_dim": 24, "decoder_ffn_dim": 24, "encoder_layers": 1, "decoder_layers": 1}
    heads = {"encoder_attention_heads": 2, "decoder_attention_heads": 2}
    config = M2M100Config(vocab_size=VOCABULARY, pad_token_id=1, eos_token_id=0, **sizes, **heads)
    folder = written(tmp_path / "m2m", config, M2M100ForConditionalGeneration)
    with pytest.raises(InputError, match="a M2M100ForConditionalGeneration does not say what its decoder reads"):
        taken(folder, "federated.task=translation")


def test_a_model_that_chats_has_a_chat_template_or_the_federation_one(source, taken):
    with pytest.raises(InputError, match=r"its tokenizer has no chat template; give a model that has one, or federat"):
        taken(source, "federated.task=chat")
    taken(source, "federated.task=chat", 'federated.template="{question} {answer}"')


def test_a_context_is_at_most_the_models_own(source, taken):
    with pytest.raises(InputError, match=r"model.context_length is 65: .* has 64 positions; give at most 64"):
        taken(source, "model.context_length=65")


def test_a_gguf_file_has_to_be_there(taken, tmp_path):
    with pytest.raises(InputError, match="no such file; give the path of a GGUF file"):
        taken(f"gguf:{tmp_path / 'none.gguf'}")


def test_a_run_needs_a_corpus_or_a_model():
    tree = read_toml(PRESETS / "tiny.toml")
    del tree["data"]["public"]
    with pytest.raises(InputError, match=r"data.public: missing; .* or another base model in model.source"):
        parse(RunConfig, tree, "mine.toml")
    tree["model"]["source"] = "folder"
    assert parse(RunConfig, tree, "mine.toml").data.public is None
