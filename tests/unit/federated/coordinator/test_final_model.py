"""What a federation starts from where it continues an earlier run, and which runs it does not continue."""

import shutil

import pytest

from configs.errors import InputError
from configs.storage.manifests import Manifest, commit_manifest
from federated.adapters.arrays import from_bytes
from federated.adapters.warm_model import initial_adapter
from federated.coordinator.final_model import start
from federated.coordinator.round_commits import all_rounds, earlier_certificate


@pytest.fixture
def earlier(tiny_run, tmp_path):
    """A copy of the finished run, to be damaged."""
    folder = tmp_path / "earlier"
    for name in ("model", "federated"):
        shutil.copytree(tiny_run.directory / name, folder / name)
    shutil.copyfile(tiny_run.directory / "config.toml", folder / "config.toml")
    return folder


@pytest.fixture
def begin(tiny_run, earlier, tmp_path):
    """Starts a federation that continues it."""

    def begin(*given, base=tiny_run.model):
        return start(tiny_run.config(f'federated.continue_from="{earlier}"', *given), base, tmp_path)

    return begin


def test_a_federation_starts_from_the_base_model_or_from_what_an_earlier_one_has_made(tiny_run, begin, tmp_path):
    config = tiny_run.config()
    fresh = start(config, tiny_run.model, tmp_path)
    assert all((fresh[name] == array).all() for name, array in initial_adapter(config, tiny_run.model).items())
    assert earlier_certificate(tmp_path) is None
    last = from_bytes(all_rounds(tiny_run.directory / "federated")[-1].adapter)
    found = begin()
    assert set(found) == set(last)
    assert all((found[name] == array).all() for name, array in last.items())
    assert any((found[name] != array).any() for name, array in fresh.items())
    assert earlier_certificate(tmp_path)
    start(config, tiny_run.model, tmp_path)  # the settings were changed before anything was made
    assert earlier_certificate(tmp_path) is None


@pytest.mark.parametrize(
    ("given", "said"),
    [
        (["federated.lora_rank=2"], "other names or shapes"),
        (["federated.lora_alpha=7"], "federated.lora_alpha"),
        (["federated.train=head"], "federated.train 'lora', and here it is 'head'"),
        (["federated.task=qa"], "federated.task 'one that writes', and here it is 'qa'"),
        (["federated.adapters=ffa", "run.seed=3"], "another frozen A"),
    ],
)
def test_other_settings_would_read_the_same_numbers_otherwise(begin, given, said, tmp_path):
    with pytest.raises(InputError, match=r"federated\.continue_from") as caught:
        begin(*given)
    assert said in str(caught.value)
    assert "\n" not in str(caught.value)
    assert earlier_certificate(tmp_path) is None


def test_a_run_of_another_base_model_is_refused(begin, earlier):
    (earlier / "model" / "model.safetensors").write_bytes(b"others")
    (earlier / "model" / "manifest.json").unlink()
    commit_manifest(earlier / "model", Manifest("model", ""))
    with pytest.raises(InputError, match="a base model of other weights"):
        begin()


def test_a_run_that_has_not_ended_under_dp_is_refused(begin, earlier):
    certificate = earlier / "federated" / "certificate.json"
    certificate.write_text("{}")
    with pytest.raises(InputError, match=r"certificate\.json: its digest is not the manifest's; put the backup"):
        begin()
    certificate.unlink()
    (earlier / "federated" / "manifest.json").unlink()
    with pytest.raises(InputError, match="federate"):
        begin()
    commit_manifest(earlier / "federated", Manifest("federated", "", inputs={"model": "ab" * 32}))
    with pytest.raises(InputError, match=r"no certificate\.json; give a run whose federation ended under DP"):
        begin()
