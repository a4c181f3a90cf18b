"""Scores on a public text of one's own, against transformers' loss."""

import json
import math
from functools import partial
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from configs.load import load
from configs.storage.layout import RunFiles, SiloFiles
from configs.storage.secrets import load_or_create_secret
from federated.simulation.few_shot import score_base
from federated.simulation.in_the_clear import _scored, score_public, score_silos, summary
from federated.simulation.simulation import simulated_silos

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
    assert found.main == pytest.approx(nats / math.log(2) / sum(map(len, TEXTS[:2])), rel=1e-4)
    scored = _scored(config, "public", partial(score_public, config, tiny_model), None, 2, True)
    assert scored == {**summary({"public": found}), "in_full": scored["in_full"]}
    figures = scored["in_full"]["figures"]["siloweave"]
    tokens = sum(len(tokenizer.encode(text)) + 1 for text in TEXTS[:2])
    assert figures["perplexity"]["value"] == pytest.approx(math.exp(nats / tokens), rel=1e-4)
    low, high = figures["bits_per_char"]["interval"]
    assert low < found.main < high


def test_the_base_model_alone_has_the_figures_from_before_the_first_round(tiny_run):
    config = tiny_run.config(f"federated.state_dir={tiny_run.state / 'siloweave' / 'ledgers'}")
    before = json.loads(RunFiles(tiny_run.directory).evaluation.read_text())["base"]
    found = score_base(config, tiny_run.model, 0)["base"]
    assert found["bits_per_char"] == pytest.approx(before["bits_per_char"], rel=1e-4)
    assert {name: silo["records"] for name, silo in found["by_silo"].items()} == {
        name: silo["records"] for name, silo in before["by_silo"].items()
    }


def test_a_silo_without_a_held_out_record_is_not_available_and_the_rest_is_there(tiny_model, tmp_path):
    source = tmp_path / "records.csv"
    source.write_text("site,text\ntiny,The only record.\n" + "".join(f"big,Record number {n}.\n" for n in range(300)))
    settings = [
        f"federated.state_dir={tmp_path / 'state'}",
        f"data.private.source={source}",
        "data.private.text=text",
        "data.private.silo=site",
        "data.private.unit=",
        "data.private.public_record_counts={}",
        "data.private.held_out_fraction=0.5",
    ]
    config = load("tiny", settings)
    silos = simulated_silos(config, tiny_model)
    # So small that the chance of the only record to be held out is below 10^-9.
    silos["tiny"] = silos["tiny"].model_copy(
        update={"data": silos["tiny"].data.model_copy(update={"held_out_fraction": 1e-12})}
    )
    for silo in silos.values():
        load_or_create_secret(SiloFiles(Path(silo.silo.state_dir)).split_key)
    found = summary(score_silos(config, silos, None, 20))
    assert found["by_silo"]["tiny"] == {"bits_per_char": None, "accuracy": None, "records": 0}
    figures = {name: found[name] for name in ("bits_per_char", "accuracy")}
    assert found["by_silo"]["big"] == {**figures, "records": 20}
    assert found["bits_per_char"] > 0
