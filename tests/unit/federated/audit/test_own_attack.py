"""A silo's attack on what left finds members where nothing protects them, and refuses what does not belong together."""

import json
import re
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from attacked_silos import ALPHA, NO_NOISE, RANK, WITH_NOISE, notes, opened, public_base, silo_config, train
from silo_requests import ask
from typer.testing import CliRunner

from configs.errors import InputError
from configs.parse import to_toml
from configs.storage.manifests import Manifest, commit_manifest, read_manifest
from federated.adapters.arrays import from_bytes, to_bytes
from federated.adapters.warm_model import put_on
from federated.audit.own_attack import attack
from federated.audit.own_records import Wanted, subject
from federated.protocol import silo_pb2 as pb
from federated.silo.released.released import Released
from federated.silo.units import rows_of, unit_digest, units_of
from privacy.ledger.runs import Runs
from siloweave import app
from trainer.models.adapters import Adaptation, adapted
from trainer.models.load import load_model
from trainer.tasks.task import task_of

TEXTS = notes(160)


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    return public_base(tmp_path_factory.mktemp("attacked") / "model")


@pytest.fixture(scope="module")
def clear(tmp_path_factory, base):
    """A silo whose updates left without noise, and what its ledger says. Nothing is changed in it."""
    silo = opened(silo_config(tmp_path_factory.mktemp("clear"), base, TEXTS))
    train(silo, NO_NOISE)
    bodies = silo.ledger.journal.bodies()
    silo.close()
    return silo.config, bodies


@pytest.fixture(scope="module")
def found(clear):
    passes = []
    document = attack(*clear, Wanted(), lambda done, of: passes.append((done, of)))
    assert passes == [(number, 6) for number in range(1, 7)]
    return document


@pytest.fixture
def copied(clear, tmp_path):
    """The same silo in a folder that a test may spoil."""
    place = shutil.copytree(clear[0].silo.state_dir, tmp_path / "state")
    return silo_config(tmp_path, clear[0].silo.base_model, TEXTS, silo={"state_dir": str(place)}), clear[1]


def test_without_noise_members_are_found(found):
    """Each update holds the gradients of notes that no other text explains."""
    last = found["rounds"][-1]
    assert last["round"] == 2
    assert last["loss"]["auc"] >= 0.7
    assert last["loss_against_start"]["auc"] >= 0.7
    for name in ("updates", "updates_lowered_loss"):
        assert found["attacks"][name]["auc_interval"][0] > 0.5
    assert (found["rounds_left"], found["epsilon"]) == (2, None)
    assert found["members"] + found["held_out"] == 160


def test_the_figures_are_those_of_a_loop_over_single_records(clear):
    config, bodies = clear
    found = attack(config, bodies, Wanted(records=20))
    (run,) = Runs(bodies)
    base = Path(config.silo.base_model)
    sides, task, pairs = subject(config, bodies, Wanted(records=20)), task_of(config.task_spec, base), []
    model = adapted(load_model(base), Adaptation(RANK, ALPHA), 0)
    for released in Released(Path(config.silo.state_dir)).rounds(run, bodies):
        asked, update = released.read()
        assert asked.round == released.number
        put_on(model, from_bytes(asked.adapter))
        pairs.append([[_along(model, task, unit, update) for unit in side] for side in (sides.members, sides.others)])
    members, others = (np.sum([pair[side] for pair in pairs], axis=0) for side in (0, 1))
    won = (members[:, None] > others) + 0.5 * (members[:, None] == others)
    assert found["attacks"]["updates"]["auc"] == pytest.approx(won.mean(), abs=2e-3)


def _along(model, task, unit, update):
    """One record's clipped descent times the update, by autograd."""
    model.zero_grad()
    task.record_losses(model, task.collate(task.examples(unit))).sum().backward()
    gradients = {name: value.grad.double() for name, value in model.named_parameters() if value.requires_grad}
    norm = float(torch.sqrt(sum((one**2).sum() for one in gradients.values())))
    along = sum(float((gradients[name] * torch.from_numpy(value)).sum()) for name, value in update.items())
    return -along * min(1.0, NO_NOISE.max_grad_norm / norm)


def of_data(config, **values):
    return config.model_copy(update={"data": config.data.model_copy(update=values)}), Wanted()


def replaced(config, _):
    path = Path(config.data.source)
    path.write_text(path.read_text().replace(units_of(config).train[0][0]["text"], notes(1, seed=9)[0]))
    rows_of.cache_clear()


def another_base(config, _):
    model = public_base(Path(config.data.source).parent / "other", seed=5)
    return config.model_copy(update={"silo": config.silo.model_copy(update={"base_model": str(model)})}), Wanted()


def damaged(config, _):
    path = next(Path(config.silo.state_dir, "released").glob("*/reply"))
    path.write_bytes(path.read_bytes()[:-1])


def swapped(config, _):
    """Whoever may write there may write a manifest, too; the ledger is signed."""
    folder, other, *_ = Path(config.silo.state_dir, "released").iterdir()
    shutil.copy(other / "request", folder / "request")
    manifest = read_manifest(folder, "released")
    commit_manifest(folder, Manifest("released", "", inputs=manifest.inputs))


def few(config, _):
    path = Path(config.data.source).with_name("few.jsonl")
    members = [row["text"] for unit in units_of(config).train for row in unit]
    path.write_text("".join(json.dumps({"text": text}) + "\n" for text in [*notes(10, seed=3), *members]))
    return Wanted(held_out=path)


def forgotten(config, _):
    shutil.rmtree(Path(config.silo.state_dir, "released"))


def model_alone(config, _):
    folder = Path(config.data.source).with_name("adapter")
    folder.mkdir()
    return Wanted(model=folder)


def of_another_run(config, bodies):
    wanted = model_alone(config, bodies)
    wanted.model.with_name("certificate.json").write_text(json.dumps({"run_id": "run-\x1b2"}))
    return wanted


BAD = {
    "round 1 of run 'run-1' trained on other records than are there now": replaced,
    "data.held_out_fraction is 0.01, which leaves . records": lambda c, _: of_data(c, held_out_fraction=0.01),
    ". training records; an attack shows nothing with fewer than 20": lambda c, _: of_data(c, held_out_fraction=0.98),
    "few.jsonl has 10 records that were not trained on; give 20 or more": few,
    "missing.jsonl": lambda c, _: Wanted(held_out=Path("missing.jsonl")),
    "--run 'other': no update has left in a run of this name; updates have left in 'run-1'": lambda *_: Wanted("other"),
    "round 1 of run 'run-1' began with": another_base,
    "is not what left, by its own manifest or the silo's ledger": damaged,
    "not what left, by its own manifest or the silo's ledger; delete": swapped,
    "run 'run-1': nothing of what left is kept here, and no model is given": forgotten,
    "adapter: no certificate.json beside it": model_alone,
    r"is of run 'run-\\x1b2', and what is attacked is run 'run-1'": of_another_run,
}


@pytest.mark.parametrize("message", BAD)
def test_what_does_not_belong_together_is_refused_in_one_line(copied, message):
    config, bodies = copied
    changed = BAD[message](config, bodies) or Wanted()
    config, wanted = changed if isinstance(changed, tuple) else (config, changed)
    with pytest.raises(InputError, match=message) as caught:
        attack(config, bodies, wanted)
    assert "\n" not in str(caught.value)
    assert not any(text in str(caught.value) for text in TEXTS)


def test_a_silo_that_nothing_has_left_has_nothing_to_attack(tmp_path, base):
    silo = opened(silo_config(tmp_path, base, TEXTS))
    ask(silo, "reserve", reserve=pb.Reserve(plan=WITH_NOISE.model_dump_json()))
    bodies = silo.ledger.journal.bodies()
    silo.close()
    with pytest.raises(InputError, match="silo 'north': no update has left in any run"):
        attack(silo.config, bodies, Wanted())


def test_records_of_a_file_take_the_place_of_held_out_ones_but_for_members(copied, tmp_path):
    config, bodies = copied
    path = tmp_path / "others.jsonl"
    path.write_text("".join(json.dumps({"text": text}) + "\n" for text in [*notes(30, seed=3), *TEXTS]))
    found = attack(config, bodies, Wanted(held_out=path, records=40))
    assert (found["members"], found["held_out"]) == (40, 40)
    units = units_of(config)
    rows_of.cache_clear()
    sides = subject(config, bodies, Wanted(held_out=path))
    assert len(sides.others) == 30 + len(units.held_out)
    assert not {unit_digest(unit) for unit in sides.others} & {unit_digest(unit) for unit in units.train}


def test_keeping_changes_no_byte_of_what_leaves(tmp_path, base):
    replies = {}
    for keeps in (True, False):
        folder = tmp_path / str(keeps)
        silo = opened(silo_config(folder, base, TEXTS, silo={"keep_released": keeps}))
        adapter = train(silo, WITH_NOISE)
        replies[keeps] = to_bytes(adapter)
        assert (folder / "state" / "released").exists() == keeps
        silo.close()
    assert replies[True] == replies[False]
    kept = tmp_path / "True" / "state" / "released"
    assert len(list(kept.iterdir())) == WITH_NOISE.rounds
    assert all(path.stat().st_mode & 0o077 == 0 for path in (kept, *kept.iterdir()))


def test_an_update_with_noise_is_known_by_its_replys_digest(tmp_path, base):
    silo = opened(silo_config(tmp_path, base, TEXTS))
    train(silo, WITH_NOISE)
    bodies = silo.ledger.journal.bodies()
    silo.close()
    found = attack(silo.config, bodies, Wanted(records=20))
    assert [one["round"] for one in found["rounds"]] == [1, 2]
    assert found["epsilon"] == pytest.approx(WITH_NOISE.epsilon)
    (first,) = (path for path in (tmp_path / "state" / "released").iterdir() if _round(path) == 1)
    (second,) = (path for path in (tmp_path / "state" / "released").iterdir() if _round(path) == 2)
    shutil.copy(second / "reply", first / "reply")
    commit_manifest(first, Manifest("released", "", inputs=read_manifest(first, "released").inputs))
    with pytest.raises(InputError, match="is not what left, by its own manifest or the silo's ledger"):
        attack(silo.config, bodies, Wanted(records=20))


def _round(folder):
    return pb.Request.FromString((folder / "request").read_bytes()).train.round


def test_the_command_leaves_private_files_and_says_nothing_of_records(copied, tmp_path):
    config, _ = copied
    (tmp_path / "silo.toml").write_text(to_toml(config))
    done = CliRunner().invoke(app, ["silo", "attack", "-c", str(tmp_path / "silo.toml"), "--records", "30"])
    assert done.exception is None, done.output
    folder = tmp_path / "state" / "attack"
    assert folder.stat().st_mode & 0o777 == 0o700
    assert {path.name: path.stat().st_mode & 0o777 for path in folder.iterdir()} == {
        "attack.json": 0o600,
        "attack.html": 0o600,
    }
    page, document = (folder / "attack.html").read_text(), json.loads((folder / "attack.json").read_text())
    assert "this silo's updates, by where they point: AUC" in done.stdout
    assert f"private data, not to be passed on: {folder / 'attack.html'}" in done.stdout
    assert page.count("<svg") == 2
    assert "http" not in re.sub(r'(xmlns|xlink|href|about|rdf|cc|dc)[^"]*="[^"]*"', "", page)
    assert document["attacks"]["updates"]["roc"]["true_positive_rate"][-1] == 1
    for said in (done.output, page, json.dumps(document)):
        assert not any(text in said for text in TEXTS)
