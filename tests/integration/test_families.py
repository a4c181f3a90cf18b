"""Families and objectives through the gang: on one and two ranks, killed and continued, exported and loaded."""

import json
import subprocess
import sys

import pytest
import torch
import transformers
from family_gangs import COMMIT, FAMILIES, STEPS, settings
from repository import SUPPORT

from configs.storage.manifests import read_manifest
from trainer.data.packing import VALIDATION_TOKENS, TokenFile, Windows, stored_dtype
from trainer.export import export
from trainer.objectives.objective import new_objective


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("families")
    command = [sys.executable, SUPPORT / "family_gangs.py", folder]
    done = subprocess.run(command, capture_output=True, text=True, timeout=400, check=False)
    assert done.returncode == 0, done.stderr[-3000:]
    return folder


def events(folder, family, gang, kind):
    found = json.loads((folder / family / f"{gang}.json").read_text())
    return {event["step"]: event["loss"] for event in found if event["event"] == kind}


@pytest.mark.parametrize("family", FAMILIES)
def test_ranks_and_kills_change_no_loss(folder, family):
    alone, killed, continued = (events(folder, family, gang, "step") for gang in ("alone", "killed", "continued"))
    assert list(alone) == [*range(1, STEPS + 1)]
    assert list(killed) == [*range(1, 2 * COMMIT + 1)]
    assert list(continued) == [*range(COMMIT + 1, STEPS + 1)]
    assert {step: killed[step] for step in range(COMMIT + 1, 2 * COMMIT + 1)}.items() <= continued.items()  # to the bit
    two = {**killed, **continued}
    assert [two[step] for step in alone] == pytest.approx(list(alone.values()), rel=1e-5)
    assert alone[STEPS] < alone[1]
    assert events(folder, family, "alone", "validation") == pytest.approx(
        events(folder, family, "continued", "validation"), rel=1e-5
    )


@pytest.mark.parametrize("family", FAMILIES)
def test_an_export_is_the_model_that_was_validated(folder, family):
    """Loaded by plain transformers, with the class that its configuration names."""
    config, run = settings(folder, family, 2), folder / family / "two"
    manifest = export(config, run)
    assert (manifest.metadata["family"], manifest.metadata["context_length"]) == (family, config.model.context_length)
    (name,) = transformers.AutoConfig.from_pretrained(run / "model").architectures
    loader = transformers.AutoModelForCausalLM if family == "gru" else getattr(transformers, name)
    model = loader.from_pretrained(run / "model", attn_implementation="eager").eval()
    assert type(model).__name__ == name
    assert read_manifest(run / "model", "model") == manifest
    objective = new_objective(config, run / "model")
    file = TokenFile(run / "corpus" / VALIDATION_TOKENS, config.model.context_length, stored_dtype(run / "corpus"))
    all_windows = torch.arange(file.num_windows).numpy()
    examples = objective.examples(Windows((file,) * file.num_windows, all_windows, all_windows, held_out=True))
    with torch.no_grad():
        sums = objective.sums(model, {name: torch.from_numpy(array) for name, array in examples.inputs.items()})
    loss = sum(total / count for total, count in zip(sums.tolist(), examples.counts, strict=True))
    assert loss == pytest.approx(events(folder, family, "continued", "validation")[STEPS], rel=1e-5)
