"""A run with a key, from pretraining to the adapter: it resumes, and nothing of its weights lies there in the clear."""

import json
import shutil

import pytest
import safetensors.torch
import torch

from cluster import pipeline
from cluster.run import Run
from configs.errors import InputError
from configs.events import read_events
from configs.storage.manifests import require_manifest
from configs.storage.sealing import ENVIRONMENT, is_sealed, load_key, unseal, write_sealed
from federated.coordinator import round_commits as commits
from federated.coordinator.rounds import Coordinator
from federated.simulation.simulation import simulate
from privacy.certificate.model_digests import ADAPTER, ModelDigests, which_model
from trainer.checkpoints.checkpoints import pretrain_digest
from trainer.export import export
from trainer.models.load import load_model

SECRET = bytes(range(200, 232)).hex()
WEIGHTS = {".safetensors", ".pt"}


@pytest.fixture(scope="module")
def sealed(tiny_run, shared_ray, tmp_path_factory):
    """(folder, key file): 20 encrypted steps on the tiny corpus, the last commit undone and made again, exported."""
    root = tmp_path_factory.mktemp("sealed")
    for name in ("corpus", "tokenizer"):
        shutil.copytree(tiny_run.directory / name, root / "runs" / "tiny" / name)
    key_file = root / "key"
    key_file.touch(mode=0o600)
    key_file.write_text(SECRET)
    given = ("pretrain.steps=20", f"run.storage={root / 'runs'}", f"run.encryption_key_file={key_file}")
    run = Run(tiny_run.config(*given))
    pipeline.pretrain(run)
    (run.files.checkpoints / "step-00000020" / "COMMITTED").unlink()
    pipeline.pretrain(run)
    pipeline.export(run)
    return root, key_file


@pytest.fixture
def federation(tiny_run, warm_ray, sealed, tmp_path):
    root, key_file = sealed
    rows = [json.dumps({"text": f"Speech {i} of a play about {i % 7} kings", "silo": "roman"}) for i in range(300)]
    (tmp_path / "plays.jsonl").write_text("\n".join(rows))

    def run(name="federated"):
        config = tiny_run.config(
            f'data.private.source="{tmp_path / "plays.jsonl"}"',
            "data.private.public_record_counts={roman=3300}",
            f"federated.state_dir={tmp_path / 'state'}",
            "federated.workers=1",
            f"run.encryption_key_file={key_file}",
        )
        model, folder = root / "runs" / "tiny" / "model", tmp_path / "runs" / name
        simulate(warm_ray, config, model, folder, on_event=lambda _: None)
        return config, model, folder

    return run


def assert_nothing_in_the_clear(folder):
    """No weights file that isn't sealed, and in no file what safetensors, torch or pickle write around weights."""
    files = [path for path in folder.rglob("*") if path.is_file()]
    assert any(path.suffix in WEIGHTS for path in files)
    for path in files:
        content = path.read_bytes()
        assert is_sealed(path) == (path.suffix in WEIGHTS), path
        if path.suffix != ".py":  # DeepSpeed leaves its conversion script, which names them
            for trace in (b'"dtype":"F32"', b"data_offsets", b"FloatStorage", b"_rebuild_tensor", b"archive/data"):
                assert trace not in content, (path, trace)


def test_pretraining_resumes_from_an_encrypted_commit(sealed):
    root, _ = sealed
    run = root / "runs" / "tiny"
    events = list(read_events(run / "events.jsonl", "pretrain"))
    assert [event["step"] for event in events if event["event"] == "resume"] == [10]
    losses = {}
    for event in (event for event in events if event["event"] == "step"):
        assert event["loss"] == pytest.approx(losses.setdefault(event["step"], event["loss"]), rel=1e-6)
    assert sum(event["event"] == "step" for event in events) == 30
    assert_nothing_in_the_clear(run)


def test_the_check_for_weights_in_the_clear_finds_them(tiny_run):
    with pytest.raises(AssertionError):
        assert_nothing_in_the_clear(tiny_run.directory / "model")
    with pytest.raises(AssertionError):
        assert_nothing_in_the_clear(tiny_run.directory / "federated" / "round-00001")


def test_rounds_resume_encrypted_and_the_adapter_is_sealed(federation, monkeypatch):
    whole_round = Coordinator._round

    def dies(self, number, adapter):
        if number == 2:
            raise KeyboardInterrupt
        return whole_round(self, number, adapter)

    monkeypatch.setattr(Coordinator, "_round", dies)
    with pytest.raises(KeyboardInterrupt):
        federation()
    monkeypatch.undo()
    config, _, folder = federation()
    key = load_key(config.run.encryption_key_file)
    rounds = commits.all_rounds(folder, key)
    assert [found.round_number for found in rounds] == [0, 1, 2]
    model = ModelDigests.model_validate(json.loads((folder / "certificate.json").read_text())["model"])
    assert which_model(model, folder / "adapter", key) == ADAPTER  # by what is sealed in it
    assert_nothing_in_the_clear(folder)
    # Weights themselves, not only what surrounds them: a stretch of the last adapter's bytes is nowhere on the disk.
    stretch = rounds[-1].adapter[-64:]
    assert not any(stretch in path.read_bytes() for path in folder.rglob("*") if path.is_file())
    with pytest.raises(InputError, match="is encrypted"):
        commits.all_rounds(folder)


def test_the_wrong_key_and_no_key_are_one_clear_line(sealed, siloweave, tiny_run, tmp_path, monkeypatch):
    root, _ = sealed
    shutil.copytree(root / "runs", tmp_path / "runs")
    run = tmp_path / "runs" / "tiny"
    shutil.rmtree(run / "model")
    none = siloweave("export", "-c", "tiny", "--set", "pretrain.steps=20", cwd=tmp_path)
    assert none.returncode == 2, none.stderr
    assert "_states.pt: is encrypted; set run.encryption_key_file" in none.stderr
    assert "Traceback" not in none.stderr
    loose = tiny_run.config("pretrain.steps=20", f"run.encryption_key_file={tmp_path / 'no'}")
    with pytest.raises(InputError, match=r"no: the encryption key can't be read.*$"):
        export(loose, run)
    monkeypatch.setenv(ENVIRONMENT, bytes(range(32)).hex())
    with pytest.raises(InputError, match=r"_states\.pt: was encrypted with another key than SILOWEAVE_ENCRYPTION_KEY"):
        export(tiny_run.config("pretrain.steps=20"), run)


def put_in_place_of_another(folder, name, config_digest):
    """What somebody without the key can do: the manifest is theirs to write."""
    manifest = json.loads((folder / name).read_text())
    (folder / name).write_text(json.dumps({**manifest, "config_digest": config_digest}))


def test_what_another_run_encrypted_is_refused_in_its_place(sealed, tiny_run, tmp_path):
    root, key_file = sealed
    shutil.copytree(root / "runs" / "tiny", tmp_path / "tiny")
    run = tmp_path / "tiny"
    config = tiny_run.config("pretrain.steps=20", "run.seed=77", f"run.encryption_key_file={key_file}")
    digest = pretrain_digest(config, require_manifest(run / "corpus", "corpus", "prepare").content_digest)
    key = load_key(str(key_file))
    assert load_model(run / "model", key) is not None
    put_in_place_of_another(run / "model", "manifest.json", digest)
    with pytest.raises(InputError, match=rf"is the encrypted '[0-9a-f]{{64}}/model/.*', not '{digest}/model/"):
        load_model(run / "model", key)
    shutil.rmtree(run / "model")
    put_in_place_of_another(run / "pretrain" / "checkpoints" / "step-00000020", "COMMITTED", digest)
    with pytest.raises(InputError, match=rf"is the encrypted '[0-9a-f]{{64}}/step-00000020/.*', not '{digest}/step-"):
        export(config, run)


def test_a_model_of_the_first_version_is_still_read(sealed, monkeypatch, tmp_path):
    root, key_file = sealed
    key, old = load_key(str(key_file)), tmp_path / "model"
    shutil.copytree(root / "runs" / "tiny" / "model", old)
    shutil.copytree(old, tmp_path / "new")
    weights = unseal((old / "model.safetensors").read_bytes(), key, None, "model")
    monkeypatch.setattr("configs.storage.sealing._VERSION", 1)
    write_sealed(old / "model.safetensors", weights, key, "model/model.safetensors")
    monkeypatch.undo()
    assert load_model(old, key).state_dict().keys() == load_model(tmp_path / "new", key).state_dict().keys()


def test_the_decrypted_model_is_a_hugging_face_directory(sealed, siloweave, tmp_path):
    from transformers import AutoModelForCausalLM

    root, key_file = sealed
    model = root / "runs" / "tiny" / "model"
    done = siloweave("decrypt", str(model), str(tmp_path / "open"), "--key-file", str(key_file), "--json", cwd=tmp_path)
    assert json.loads(done.stdout) == {"files": 1, "target": str(tmp_path / "open")}
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path / "open")
    stored = safetensors.torch.load_file(tmp_path / "open" / "model.safetensors")
    assert all(torch.equal(value, stored[name]) for name, value in loaded.state_dict().items())
    refused = siloweave("decrypt", str(model), "again", cwd=tmp_path)
    assert refused.returncode == 2
    assert "SILOWEAVE_ENCRYPTION_KEY is not set" in refused.stderr
