"""New models of every family, and of any architecture that a config.json names; what is no model is refused."""

import json

import pytest
import torch
from transformers import AutoModelForCausalLM, LlamaForCausalLM

from configs.errors import InputError
from configs.load import load
from configs.run_directory import config_digest
from configs.schema.pretrain import OBJECTIVES
from configs.storage.files import digest_json
from trainer.checkpoints.checkpoints import _NO_WEIGHT_DEPENDS_ON, pretrain_digest
from trainer.models.families import empty_model, model_config, new_model, parameter_sizes

VOCABULARY = 96
NEOX = {
    "model_type": "gpt_neox", "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2,
    "intermediate_size": 64, "max_position_embeddings": 64, "vocab_size": 50000, "hidden_dropout": 0.1,
    "attention_dropout": 0.1, "architectures": ["GPTNeoXForCausalLM"], "bos_token_id": 49999,
}  # fmt: skip
DISTILBERT = {"model_type": "distilbert", "dim": 32, "n_layers": 2, "n_heads": 2, "hidden_dim": 64, "vocab_size": 9}
BART = {
    "model_type": "bart", "d_model": 32, "encoder_layers": 1, "decoder_layers": 1, "encoder_attention_heads": 2,
    "decoder_attention_heads": 2, "encoder_ffn_dim": 64, "decoder_ffn_dim": 64, "max_position_embeddings": 64,
}  # fmt: skip
BERT = {
    "model_type": "bert",
    "hidden_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "intermediate_size": 64,
}


@pytest.fixture
def with_file(tmp_path):
    """Settings with a config.json of these fields, or of this text."""

    def make(content, *overrides):
        path = tmp_path / "config.json"
        path.write_text(content if isinstance(content, str) else json.dumps(content))
        return load("tiny", [f"model.config={path}", *overrides])

    return make


def made(config, **more):
    return new_model(config.model, VOCABULARY, 0, objective=config.objective, **more)


@pytest.mark.parametrize(
    ("family", "name"),
    [
        ("llama", "LlamaForCausalLM"),
        ("gpt2", "GPT2LMHeadModel"),
        ("bert", "BertForMaskedLM"),
        ("t5", "T5ForConditionalGeneration"),
        *[(cell, "RecurrentForCausalLM") for cell in ("rnn", "lstm", "gru")],
    ],
)
def test_a_family_is_made_of_the_settings(family, name):
    config = load("tiny", [f"model.family={family}"])
    model = made(config)
    assert type(model).__name__ == name
    assert config.objective == OBJECTIVES[family][0]
    own = model.config
    assert (own.hidden_size, own.num_hidden_layers, own.vocab_size) == (32, 2, VOCABULARY)
    assert {value for key, value in own.to_dict().items() if "drop" in key} <= {0.0, None}
    assert 0.25 in made(config, dropout=0.25).config.to_dict().values()
    sizes = [parameter.numel() for parameter in model.parameters()]
    assert parameter_sizes(config.model, VOCABULARY, config.objective) == sizes
    assert {parameter.device.type for parameter in empty_model(config.model, VOCABULARY).parameters()} == {"meta"}
    again, other = made(config), new_model(config.model, VOCABULARY, 1, objective=config.objective)
    states = [model.state_dict() for model in (model, again, other)]
    assert all(torch.equal(value, states[1][key]) for key, value in states[0].items())
    assert any(not torch.equal(value, states[2][key]) for key, value in states[0].items())


def test_next_sentence_has_a_head_of_its_own():
    assert (
        made(load("tiny", ["model.family=bert", "pretrain.objective=next_sentence"])).cls.seq_relationship is not None
    )


@pytest.mark.parametrize("cell", ["rnn", "lstm", "gru"])
def test_a_recurrent_layer_is_torchs_own(cell, tmp_path):
    """The same weights in torch's recurrent layer give the same states, and the model loads by its Auto class."""
    model = made(load("tiny", [f"model.family={cell}"])).eval()
    layer, width = model.layers[0], 32
    own = {"rnn": torch.nn.RNN, "lstm": torch.nn.LSTM, "gru": torch.nn.GRU}[cell](width, width, batch_first=True)
    with torch.no_grad():
        own.weight_ih_l0.copy_(layer.input_gates.weight)
        own.weight_hh_l0.copy_(layer.hidden_gates.weight)
        own.bias_ih_l0.copy_(layer.input_gates.bias)
        own.bias_hh_l0.copy_(torch.zeros_like(own.bias_hh_l0) if cell != "gru" else layer.hidden_gates.bias)
        x = torch.randn(3, 7, width, generator=torch.Generator().manual_seed(0))
        expected, _ = own(layer.norm(x))
        assert torch.allclose(layer(x, None)[0], x + expected, atol=1e-6)
        ids = torch.randint(VOCABULARY, (2, 9), generator=torch.Generator().manual_seed(1))
        whole, first = model(ids).logits, model(ids[:, :4])
        assert torch.allclose(model(ids[:, 4:], state=first.state).logits, whole[:, 4:], atol=1e-6)
        model.save_pretrained(tmp_path)
        assert torch.equal(AutoModelForCausalLM.from_pretrained(tmp_path)(ids).logits, whole)
        with pytest.raises(ValueError, match="pad on the right"):
            model(ids, attention_mask=torch.tensor([[0] + [1] * 8] * 2))
        with pytest.raises(ValueError, match="does not follow beams"):
            model.generate(ids, num_beams=2, max_new_tokens=2)


@pytest.mark.parametrize(
    ("fields", "objective", "name"),
    [
        (NEOX, "auto", "GPTNeoXForCausalLM"),
        (DISTILBERT, "masked", "DistilBertForMaskedLM"),
        (BART, "span_corruption", "BartForConditionalGeneration"),
    ],
)
def test_any_architecture_by_its_configuration(fields, objective, name, with_file):
    config = with_file(fields, f"pretrain.objective={objective}")
    model = made(config)
    assert type(model).__name__ == name
    assert model.get_input_embeddings().weight.shape[0] == model.config.vocab_size == VOCABULARY
    assert model.config.bos_token_id == model.config.eos_token_id == 0
    rates = {value for key, value in model.config.to_dict().items() if "drop" in key and isinstance(value, float)}
    assert rates == {0.0}


@pytest.mark.parametrize(
    ("content", "objective", "said"),
    [
        ({**NEOX, "auto_map": {"AutoConfig": "code.py"}}, "auto", "auto_map asks for code of the model's own"),
        ({**NEOX, "model_type": "unheard"}, "auto", "model_type is 'unheard', which the installed transformers"),
        ({**NEOX, "model_type": ["bert"]}, "auto", r"model_type is \['bert'\]"),
        ({"hidden_size": 3}, "auto", "model_type is None"),
        ({**NEOX, "num_attention_heads": 5}, "auto", r"can't be read \(.*hidden size .*number of attention heads"),
        ({**NEOX, "hidden_size": "wide"}, "auto", "hidden_size"),
        ({**NEOX, "num_hidden_layers": None}, "auto", "num_hidden_layers"),
        ({**NEOX, "max_position_embeddings": 63}, "auto", "model.context_length is 64: .* has 63 positions"),
        (NEOX, "masked", "gives no model for pretrain.objective 'masked'"),
        (BERT, "auto", "a token sees those that follow it, so pretrain.objective 'causal' asks nothing"),
        ({"model_type": "vit"}, "auto", "gives no model"),
        ({"model_type": "siloweave-recurrent"}, "auto", "model_type is 'siloweave-recurrent'"),
        ("[1]", "auto", "it is no JSON object"),
        ("{", "auto", "it is no JSON"),
        ("[" * 10000, "auto", "it is no JSON"),
        ("\ud800".encode("utf-8", "surrogatepass").decode("latin-1"), "auto", "it is no JSON"),
    ],
)
def test_what_is_no_model_is_refused_in_one_line(content, objective, said, with_file):
    with pytest.raises(InputError, match=said) as caught:
        made(with_file(content, f"pretrain.objective={objective}"))
    assert "\n" not in str(caught.value)
    assert "model.con" in str(caught.value)


def test_a_file_that_is_not_there_is_refused(tmp_path):
    for path in (tmp_path / "none.json", tmp_path):
        with pytest.raises(InputError, match="no such file of at most 1 MiB"):
            model_config(load("tiny", [f"model.config={path}"]).model, VOCABULARY)


@pytest.mark.parametrize(
    ("overrides", "said"),
    [
        (["model.family=mamba"], "model.family"),
        (["model.family=llama", "model.heads=3"], "model.heads is 3: model.hidden_size 32 must be an even multiple"),
        (["model.family=bert", "model.heads=3"], "model.heads is 3: model.hidden_size 32 must be a multiple of it"),
        (["model.family=llama", "pretrain.objective=masked"], "model.family 'llama' is pretrained by causal"),
        (["model.family=bert", "pretrain.objective=causal"], "'bert' is pretrained by masked or next_sentence"),
        (["model.family=t5", "pretrain.objective=masked"], "model.family 't5' is pretrained by span_corruption"),
        (["model.config=x.json", "pretrain.objective=next_sentence"], "model.config is pretrained by causal or masked"),
        (["pretrain.objective=guess"], "pretrain.objective"),
        (["model.config=x.json", "model.family=bert"], "it is the architecture, and so is model.family 'bert'"),
        (["model.config=x.json", "model.source=folder"], "and so is model.source"),
        (["model.family=gru", "pretrain.activation_checkpointing=true"], "'gru' has no blocks to compute again"),
    ],
)
def test_settings_that_do_not_fit_are_refused(overrides, said):
    with pytest.raises(InputError, match=said):
        load("tiny", overrides)


def test_recurrent_models_have_no_heads_to_divide():
    assert made(load("tiny", ["model.family=rnn", "model.heads=3"])).config.cell == "rnn"


def test_digests_tell_families_apart_and_leave_earlier_runs_theirs(with_file):
    configs = [load("tiny", [one]) for one in ("model.family=gpt2", "model.family=bert", "pretrain.objective=causal")]
    digests = [(config_digest(config), pretrain_digest(config, "corpus")) for config in (load("tiny"), *configs)]
    one = with_file(NEOX)
    digests += [(config_digest(one), pretrain_digest(one, "corpus"))]
    again = with_file({**NEOX, "intermediate_size": 128})  # another file in the same place
    digests += [("the same settings", pretrain_digest(again, "corpus"))]
    assert all(len(set(column)) == len(column) for column in zip(*digests, strict=True))
    # Commits from before there were families are continued.
    plain = load("tiny")
    before = [
        plain.model.model_dump(exclude={"source", "family", "config"}),
        plain.pretrain.model_dump(exclude={"objective", "stages", *_NO_WEIGHT_DEPENDS_ON}),
        {"public": 1.0},
        plain.run.seed,
        "corpus",
    ]
    assert digests[0][1] == digest_json(before)


def test_the_models_of_before_are_the_same_to_the_bit():
    from transformers import LlamaConfig

    config = load("tiny")
    torch.manual_seed(5)
    before = LlamaForCausalLM(LlamaConfig(**model_config(config.model, VOCABULARY).to_dict()))
    found = new_model(config.model, VOCABULARY, 5).state_dict()
    assert all(torch.equal(value, found[name]) for name, value in before.state_dict().items())
