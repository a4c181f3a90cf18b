"""Heads on models of several families: the same wherever they are put on, no chance in them, or one clear refusal."""

import pytest
import torch
from per_record import assert_equal, clipped, fixed, oracle
from tokenizers import processors
from transformers import AutoConfig, AutoModelForCausalLM, GemmaConfig, GPT2Config, LlamaConfig, OPTConfig, T5Config

from configs.errors import InputError
from configs.schema.tasks import TaskSpec
from configs.storage.manifests import Manifest, commit_manifest
from privacy.clipping.clipping import clipping
from privacy.clipping.self_check import prove_per_record_gradients
from trainer.data.tokenizer import train_tokenizer
from trainer.imported import outline
from trainer.models.adapters import add_adapter, head_names
from trainer.models.load import Head, load_model, model_class
from trainer.tasks.task import task_of

SPECS = {
    "entities": TaskSpec(name="entities", labels=("O", "B-PER", "I-PER")),
    "qa": TaskSpec(name="qa"),
}
IDS = {"bos_token_id": 0, "eos_token_id": 0, "vocab_size": 300}
DECODERS = {
    "llama": LlamaConfig(
        hidden_size=16, num_hidden_layers=1, num_attention_heads=2, intermediate_size=24,
        max_position_embeddings=64, **IDS,
    ),
    "gpt2": GPT2Config(
        n_embd=16, n_layer=1, n_head=2, n_positions=64, resid_pdrop=0.0, embd_pdrop=0.0, attn_pdrop=0.0, **IDS
    ),
}  # fmt: skip


@pytest.fixture(params=DECODERS, scope="module")
def folder(request, tmp_path_factory):
    """A decoder that a run has exported."""
    folder = tmp_path_factory.mktemp(request.param)
    tokenizer = train_tokenizer(["Who came? Ada Lovelace came to Ockham."] * 2, 300, folder)
    if request.param == "llama":  # some put a token first
        tokenizer.backend_tokenizer.post_processor = processors.TemplateProcessing(
            single="<|endoftext|> $A", pair="<|endoftext|> $A $B:1", special_tokens=[("<|endoftext|>", 0)]
        )
        tokenizer.save_pretrained(folder)
    config = DECODERS[request.param]
    torch.manual_seed(1)
    AutoModelForCausalLM.from_config(config).save_pretrained(folder)
    commit_manifest(folder, Manifest("model", "00", metadata={"context_length": 32}))
    return folder


@pytest.mark.parametrize("name", SPECS)
def test_a_decoder_takes_a_head_whose_gradients_are_single_records(folder, name):
    task = task_of(SPECS[name], folder)
    model, again = (load_model(folder, None, task.head) for _ in range(2))
    assert all(torch.equal(one, other) for one, other in zip(model.parameters(), again.parameters(), strict=True))
    assert {module.p for module in model.modules() if isinstance(module, torch.nn.Dropout)} <= {0.0}
    assert len(head_names(model)) == 1
    model = add_adapter(model, 2, 4.0, seed=2, head=task.head).train()
    rows = [
        {"tokens": ["Ada", "came"] * n, "tags": [1, 0] * n,
         "context": "Ada came. " * n, "question": "Who came?", "answer": (("Ada",), (-1,))} for n in (1, 3)
    ]  # fmt: skip
    units = task.examples(rows)
    assert len(units) >= 2

    def losses(batch):
        return task.record_losses(model, task.collate(batch))

    with clipping(model, 0.5) as clipper:
        prove_per_record_gradients(clipper, losses, task.synthetic())
    assert_equal(clipped(model, losses, [units[:16]], 0.5), oracle(model, losses, units[:16], fixed(0.5)))


@pytest.mark.parametrize(
    ("config", "kind"), [(GemmaConfig(), "question answering"), (OPTConfig(), "token classification")]
)
def test_a_family_without_such_a_head_is_refused_in_one_line(config, kind):
    with pytest.raises(
        InputError, match=f"^here: transformers has no {config.model_type} with a head for {kind}; give"
    ) as refused:
        model_class(config, "here", Head(kind, 2, 0))
    assert "\n" not in str(refused.value)


def test_a_source_that_can_not_answer_is_refused_before_it_is_read(tmp_path):
    T5Config().save_pretrained(tmp_path)
    (tmp_path / "model.safetensors").touch()
    assert AutoConfig.from_pretrained(tmp_path).is_encoder_decoder
    with pytest.raises(InputError, match="the task 'qa' needs a model of a family that has a head for it; give one"):
        outline(str(tmp_path), SPECS["qa"])
