"""A personal adapter serves its silo, lies there privately, and changes nothing that ever leaves."""

import json
import shutil

import numpy as np
import pytest
from silo_requests import TRUSTED, ask

from configs.errors import InputError
from configs.parse import to_toml
from configs.schema.pretrain import ModelSettings
from configs.schema.silo import SiloConfig
from configs.storage.sealing import MasterKey, write_sealed
from federated.adapters.arrays import to_bytes
from federated.adapters.warm_model import initial_adapter, kept_warm
from federated.protocol import silo_pb2 as pb
from federated.silo.personal import PersonalSettings, personalise
from federated.silo.silo import Silo
from privacy.plan import PlanTerms
from trainer.models.families import new_model
from trainer.models.load import load_model
from trainer.scoring.score import score

PLAN = PlanTerms(sampling_rate=0.05, max_grad_norm=1.0, noise_multiplier=0.8, rounds=2, steps_per_round=2, delta=1e-5)
WEIGHTS = "adapter_model.safetensors"
SETTINGS = PersonalSettings(steps=12, batch_size=8, learning_rate=1e-2, rank=4, alpha=8.0, micro_batch_size=4)


@pytest.fixture
def open_silo(tmp_path, tiny_model):
    data = tmp_path / "data.jsonl"
    data.write_text("".join(json.dumps({"text": f"patient note number {i} of the ward"}) + "\n" for i in range(200)))

    def open_one(name):
        state = tmp_path / name
        state.mkdir()
        (state / "split.key").write_bytes(bytes(range(32)))
        (state / "split.key").chmod(0o600)
        config = SiloConfig(
            silo={
                "id": "north",
                "dataset_id": "ward",
                "state_dir": str(state),
                "base_model": str(tiny_model),
                "public_record_count": 100,
            },
            data={"source": str(data)},
            policy={"budget_epsilon": 20.0, "budget_delta": 1e-4, "max_epsilon_per_run": 10.0},
        )
        return Silo(config, TRUSTED, bytes(range(32)))

    return open_one


@pytest.fixture(scope="module")
def adapter(tiny_run):
    return to_bytes(initial_adapter(tiny_run.config(), tiny_run.model))


def shared_adapter(tiny_run):
    return tiny_run.directory / "federated" / "adapter"


def round_of(silo, adapter, number):
    train = pb.Train(
        round=number,
        plan_digest=PLAN.digest,
        base_model_digest=silo.workbench.base_model.content_digest,
        task="causal",
        adapter_spec=pb.AdapterSpec(rank=4, alpha=8.0),
        adapter=adapter,
        learning_rate=0.01,
        optimizer="adam",
    )
    return ask(silo, f"round-{number}", train=train)[0].trained.update


def test_a_personal_adapter_changes_no_byte_of_any_later_update(open_silo, adapter, tiny_run):
    """Twice the same silo with the same injected seeds; only one trains a personal adapter between its rounds."""
    updates = {}
    for name in ("shared only", "personal, too"):
        silo = open_silo(name)
        ask(silo, "reserve", reserve=pb.Reserve(plan=PLAN.model_dump_json()))
        updates[name] = [round_of(silo, adapter, 1)]
        if name == "personal, too":
            personalise(silo.config, shared_adapter(tiny_run), SETTINGS)
        updates[name].append(round_of(silo, adapter, 2))
        silo.close()
        if name == "personal, too":  # and after a restart, with a model read anew
            kept_warm.cache_clear()
            again = Silo(silo.config, TRUSTED)
            assert round_of(again, adapter, 2) == updates[name][1]
            again.close()
    assert all(updates["shared only"])
    assert updates["shared only"] == updates["personal, too"]


def test_it_serves_its_silo_and_lies_there_privately(open_silo, tiny_run, siloweave, tmp_path):
    silo = open_silo("north")
    silo.close()
    (tmp_path / "silo.toml").write_text(to_toml(silo.config))
    done = siloweave(
        "silo", "personalise", "-c", "silo.toml", "--adapter", str(shared_adapter(tiny_run)), "--steps=40",
        "--learning-rate=0.01", "--json", cwd=tmp_path,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout)
    assert found["personal"] < found["shared"] - 0.5  # 200 notes that differ by a number
    folder = tmp_path / "north" / "personal"
    assert found["folder"] == str(folder)
    assert (folder / WEIGHTS).is_file()
    assert all(path.stat().st_mode & 0o077 == 0 for path in (folder, *folder.iterdir()))
    kinds = [json.loads(entry["body"])["kind"] for entry in Silo(silo.config, TRUSTED).ledger.entries()]
    assert kinds == ["open"]  # nothing is charged: nothing leaves


def test_the_saved_adapter_is_the_one_that_was_measured(open_silo, tiny_run):
    """Base plus shared plus personal, put together by peft from the folders, scores what was reported."""
    from peft import PeftModel

    silo = open_silo("north")
    result = personalise(silo.config, shared_adapter(tiny_run), SETTINGS)
    model = PeftModel.from_pretrained(load_model(tiny_run.model), shared_adapter(tiny_run)).merge_and_unload()
    held_out, task = [unit[0] for unit in silo.workbench.held_out], silo.workbench.task
    assert score(model, task, held_out, 4).main == pytest.approx(result.shared, rel=1e-6)
    model = PeftModel.from_pretrained(model, result.folder).eval()
    assert score(model, task, held_out, 4).main == pytest.approx(result.personal, rel=1e-6)
    assert np.isfinite(result.personal)
    silo.close()


def test_a_whole_model_is_shared_where_its_parameters_have_trained(open_silo, tiny_run, tmp_path):
    silo = open_silo("north")
    whole = shutil.copytree(tiny_run.model, tmp_path / "model", ignore=shutil.ignore_patterns("manifest.json"))
    result = personalise(silo.config, whole, SETTINGS)
    held_out = [unit[0] for unit in silo.workbench.held_out]
    found = score(load_model(tiny_run.model), silo.workbench.task, held_out, 4)
    assert result.shared == pytest.approx(found.main, rel=1e-6)
    assert result.personal < result.shared
    small = new_model(ModelSettings(hidden_size=16, layers=1, heads=2, intermediate_size=24, context_length=16), 50, 0)
    small.save_pretrained(tmp_path / "small")
    with pytest.raises(InputError, match="small: is a model of other shapes than this base model"):
        personalise(silo.config, tmp_path / "small", SETTINGS)
    silo.close()


def another_rank(folder):
    config = json.loads((folder / "adapter_config.json").read_text())
    (folder / "adapter_config.json").write_text(json.dumps({**config, "r": 3}))


WRONG = {
    "holds no adapter_config": lambda folder: (folder / "adapter_config.json").unlink(),
    "is no adapter of this base model": another_rank,
    "is no adapter of this base model .*header": lambda folder: (folder / WEIGHTS).write_bytes(b"damaged"),
    "is encrypted": lambda folder: write_sealed(folder / WEIGHTS, b"weights", MasterKey(bytes(32), "test"), "x"),
}


@pytest.mark.parametrize("expected", WRONG)
def test_what_is_no_shared_adapter_is_named(open_silo, tiny_run, tmp_path, expected):
    silo = open_silo("north")
    silo.close()
    folder = tmp_path / "adapter"
    shutil.copytree(shared_adapter(tiny_run), folder)
    WRONG[expected](folder)
    with pytest.raises(InputError, match=expected) as caught:
        personalise(silo.config, folder, SETTINGS)
    assert "\n" not in str(caught.value)
