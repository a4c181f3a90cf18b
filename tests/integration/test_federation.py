"""Federations over the local grid with real silos: resume, budgets, refusals, and what is committed."""

import json
import os
import shutil
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from flwr.app import Error, Message
from transformers import AutoModelForCausalLM, AutoTokenizer

from configs.errors import InputError, PolicyRefusal, SiloweaveError
from configs.events import read_events
from configs.storage.files import digest_file
from configs.storage.manifests import read_manifest
from configs.storage.secrets import load_secret
from federated.adapters.arrays import from_bytes, to_bytes
from federated.adapters.warm_model import adaptation, warm_model
from federated.coordinator import round_commits as commits
from federated.coordinator.rounds import Coordinator
from federated.coordinator.schedule.mail import TRAIN, Mail
from federated.evaluation.label_counts import examples_of, label_counts
from federated.evaluation.private_sums import evaluated
from federated.silo.units import load_units
from federated.simulation.in_the_clear import evaluate_rounds, score_held_out
from federated.simulation.local_grid import LocalGrid
from federated.simulation.simulated_places import simulated_silo
from federated.simulation.simulation import simulate
from privacy.certificate.check import check_certificate
from privacy.certificate.model_digests import ADAPTER, BASE_MODEL, ModelDigests, which_model
from privacy.ledger.chain import verify_entries
from privacy.ledger.file import read_only
from trainer.data.tokenizer import load_tokenizer
from trainer.models.load import load_model
from trainer.tasks.text import CausalTask, joined

SEED = bytes(range(32))


@pytest.fixture
def federation(tiny_run, warm_ray, tmp_path):
    """Runs a federation of the tiny settings on two genres, in a folder and with silo states of its own.

    On one worker, which has hosted the silos of others, where a test doesn't ask for more.
    """
    return starter(tiny_run, warm_ray, tmp_path)


@pytest.fixture
def begun_anew(tiny_run, shared_ray, tmp_path):
    """The same on workers of its own."""
    return starter(tiny_run, shared_ray, tmp_path)


@pytest.fixture(scope="module")
def finished(tiny_run, shared_ray, tmp_path_factory):
    """(settings, folder) of one that ran to its end on two workers, for tests that only look at it."""
    root = tmp_path_factory.mktemp("finished")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("XDG_STATE_HOME", f"{root}.state")
        return starter(tiny_run, shared_ray, root)("federated.workers=2"), root


def starter(tiny_run, shared_ray, root):
    source = root / "plays.jsonl"
    rows = [row for row in plays_rows() if row["silo"] in ("roman", "romances")]
    source.write_text("".join(json.dumps(row) + "\n" for row in rows))

    def run(*overrides, name="federated", **options):
        config = tiny_run.config(
            f'data.private.source="{source}"',
            "data.private.public_record_counts={roman=3300, romances=2600}",
            f"federated.state_dir={root / 'state'}",
            "federated.workers=1",
            *overrides,
        )
        simulate(shared_ray, config, tiny_run.model, root / name, on_event=lambda _: None, **options)
        return config

    return run


def plays_rows():
    from trainer.data.embedded import plays

    return plays()


def adapters(folder):
    return {found.round_number: found.adapter for found in commits.all_rounds(folder)}


def ledger_kinds(tmp_path, silo="roman"):
    path = tmp_path / "state" / "plays-tiny" / silo / "ledger.sqlite"
    return [body["kind"] for body in verify_entries(read_only(path), str(path))]


def charged_rounds(tmp_path, silo):
    path = tmp_path / "state" / "plays-tiny" / silo / "ledger.sqlite"
    return [body["round"] for body in verify_entries(read_only(path), str(path)) if body["kind"] == "charge"]


def test_rounds_are_committed_charged_and_closed(finished):
    _, root = finished
    assert sorted(adapters(root / "federated")) == [0, 1, 2]
    assert ledger_kinds(root) == ["open", "reserve", "charge", "release", "charge", "release", "close"]
    certificate = json.loads((root / "federated" / "certificate.json").read_text())
    assert set(certificate["silos"]) == {"roman", "romances"}
    assert certificate["epsilon"] <= 8
    assert certificate["epsilon_sum"] == pytest.approx(2 * certificate["epsilon"])
    check_certificate(certificate, "test")
    assert certificate["headline"]["epsilon"] == certificate["epsilon"]
    assert all(silo["statement"]["rounds_charged"] == 2 for silo in certificate["silos"].values())
    rounds = [event for event in read_events(root / "federated" / "events.jsonl") if event["event"] == "round"]
    assert all(event["answered"] == ["roman", "romances"] for event in rounds)
    left = min(silo["receipt"]["epsilon_left"] for silo in certificate["silos"].values())
    assert [event["epsilon_left"] for event in rounds] == [left, left]


def test_buffered_rounds_are_charged_like_others_and_are_made_again_to_the_same_bytes(
    federation, tmp_path, monkeypatch
):
    """Steps of one update each. The last one is lost before the run is closed, and made of what was kept of it."""
    buffered = ("federated.schedule=buffered", "federated.buffer=1", "privacy.evaluations=1")
    save, last = commits.save, tmp_path / "federated" / "round-00002"

    def dies(directory, digest, commit, *rest):
        save(directory, digest, commit, *rest)
        if commit.round_number == 2:
            raise KeyboardInterrupt
        return commit

    monkeypatch.setattr(commits, "save", dies)
    with pytest.raises(KeyboardInterrupt):
        federation(*buffered)
    monkeypatch.undo()
    before = adapters(tmp_path / "federated")
    assert sorted(before) == [0, 1, 2]
    shutil.rmtree(last)
    federation(*buffered)
    assert adapters(tmp_path / "federated") == before
    certificate = json.loads((tmp_path / "federated" / "certificate.json").read_text())
    check_certificate(certificate, "test")
    updates = [update for one in certificate["model"]["rounds"] for update in one["updates"]]
    assert len(updates) == 2
    for silo in ("roman", "romances"):
        rounds = [number for number in charged_rounds(tmp_path, silo) if number]
        assert rounds == list(range(1, len(rounds) + 1)) and len(rounds) <= 2
        assert {update["round"] for update in updates if update["silo"] == silo} <= set(rounds)


def test_silos_evaluate_privately_what_a_scorer_reads_in_the_clear(federation, tiny_model, tmp_path):
    """Little noise, so that the figures of base model and last round can be told from the exact ones."""
    certain(tmp_path)  # five times the error is exceeded once in 300,000 rounds otherwise
    labels = ("yes", "no")
    source = labelled_plays(tmp_path / "labelled.jsonl", labels)
    config = federation(
        f'data.private.source="{source}"',
        "data.private.held_out_fraction=0.5",
        "federated.rounds=1",
        "privacy.evaluations=2",
        "privacy.evaluation_noise_multiplier=1.3",
        f"privacy.evaluation_labels={json.dumps(labels)}",
        injected_seed=SEED,
    )
    events = list(read_events(tmp_path / "federated" / "events.jsonl"))
    found = [event for event in events if event["event"] == "private_evaluation"]
    assert [event["round"] for event in found] == [0, 1]
    for event, adapter in zip(found, (None, adapters(tmp_path / "federated")[1]), strict=True):
        silos = [simulated_silo(config, name, tiny_model) for name in ("roman", "romances")]
        first, second = (score_held_out(config, silo, adapter, 10_000) for silo in silos)
        bits = (first + second).main
        assert abs(event["bits_per_char"] - bits) < 5 * event["bits_per_char_error"] + 0.02 * bits
        assert event["bits_per_char_error"] < 0.2 * bits
        counts = sum(counts_in_the_clear(config, silo, adapter, labels) for silo in silos)
        for (label, shown), (right, extra, missed) in zip(event["f1_by_label"].items(), counts.T, strict=True):
            assert abs(shown["f1"] - 2 * right / (2 * right + extra + missed)) < 5 * shown["f1_error"] < 0.9, label
        values = [shown["f1"] for shown in event["f1_by_label"].values()]
        assert event["macro_f1"] == pytest.approx(sum(values) / 2)
    certificate = json.loads((tmp_path / "federated" / "certificate.json").read_text())
    check_certificate(certificate, "test")
    text = "2 times the noised sums of the metric held_out with counts of the labels yes, no"
    assert text in certificate["left_each_silo"]
    assert certificate["headline"]["epsilon"] <= 8
    charges = ["charge", "release"] * 3
    assert ledger_kinds(tmp_path) == ["open", "reserve", *charges, "close"]


def certain(tmp_path):
    """Keys and a run id that are the same in every session: with an injected seed, so are all draws."""
    state, run = tmp_path / "state", tmp_path / "federated"
    for path in (
        state / "coordinator.key",
        *(state / "plays-tiny" / silo / "split.key" for silo in ("roman", "romances")),
    ):
        path.parent.mkdir(parents=True, exist_ok=True)
        path.touch(mode=0o600)
        path.write_bytes(SEED)
    run.mkdir()
    (run / "run.json").write_text(json.dumps({"run_id": "certain", "expires": 2**32}))


def labelled_plays(path, labels):
    """Some speeches of each silo, with a label after each."""
    with path.open("w") as file:
        for silo in ("roman", "romances"):
            rows = [row for row in plays_rows() if row["silo"] == silo and len(row["text"]) > 100][:450]
            for number, row in enumerate(rows):
                file.write(json.dumps({**row, "text": f"{row['text'][:60]} {labels[number % 3 == 0]}"}) + "\n")
    return path


def counts_in_the_clear(config, silo, adapter, labels):
    units = load_units(silo, load_secret(Path(silo.silo.state_dir) / "split.key"))
    base = Path(silo.silo.base_model)
    task = CausalTask(load_tokenizer(base), config.model.context_length)
    model = warm_model(base, adaptation(config.federated))
    with evaluated(model, from_bytes(adapter) if adapter else None):
        return label_counts(model, task, examples_of(task, list(map(joined, units.held_out)), labels), len(labels))


def test_one_or_two_workers_and_a_restart_give_the_same_bytes(begun_anew, tmp_path, monkeypatch):
    """The same injected seeds and run id: killed after a round and continued, on one worker or on two.

    With control variates, which a restart has to find again or the silos refuse another request of the same id, and a
    frozen A, which every worker draws by itself.
    """
    chosen = ("federated.aggregation=scaffold", "federated.optimizer=sgd", "federated.adapters=ffa")
    (tmp_path / "a").mkdir()
    run = json.dumps({"run_id": "same", "expires": int(time.time()) + 3600})
    (tmp_path / "a" / "run.json").write_text(run)
    begun_anew("federated.workers=2", *chosen, name="a", injected_seed=SEED)
    keys = {path.parent.name: path.read_bytes() for path in (tmp_path / "state").rglob("split.key")}
    coordinator = (tmp_path / "state" / "coordinator.key").read_bytes()
    shutil.rmtree(tmp_path / "state")
    (tmp_path / "state").mkdir()
    (tmp_path / "state" / "coordinator.key").touch(mode=0o600)
    (tmp_path / "state" / "coordinator.key").write_bytes(coordinator)
    for silo, key in keys.items():
        folder = tmp_path / "state" / "plays-tiny" / silo
        folder.mkdir(parents=True)
        (folder / "split.key").write_bytes(key)
        (folder / "split.key").chmod(0o600)

    (tmp_path / "b").mkdir()
    (tmp_path / "b" / "run.json").write_text(run)
    whole_round = Coordinator._round

    def dies_in_round_two(self, number, adapter):
        result = whole_round(self, number, adapter)
        if number == 2:
            raise KeyboardInterrupt  # after the silos were charged and answered, before the commit
        return result

    monkeypatch.setattr(Coordinator, "_round", dies_in_round_two)
    with pytest.raises(KeyboardInterrupt):
        begun_anew(*chosen, name="b", injected_seed=SEED)
    monkeypatch.undo()
    assert sorted(adapters(tmp_path / "b")) == [0, 1]
    # From here on no seed is injected: round two has to come out of the ledger.
    begun_anew(*chosen, name="b")
    assert adapters(tmp_path / "a") == adapters(tmp_path / "b")
    states = [[found.server_state for found in commits.all_rounds(tmp_path / name)] for name in ("a", "b")]
    assert states[0] == states[1]
    assert all(states[0][1:])
    assert json.loads((tmp_path / "b" / "certificate.json").read_text())["seeds"].startswith(
        "INJECTED in roman, romances"
    )
    assert ledger_kinds(tmp_path).count("charge") == 2


def test_silos_of_different_ranks_and_a_server_optimizer(federation, tmp_path):
    federation(
        "federated.rounds=1",
        "federated.adapters=product",
        "federated.lora_ranks={roman=2}",
        "federated.aggregation=fedyogi",
        "federated.workers=2",
        name="ranks",
    )
    start, after = commits.all_rounds(tmp_path / "ranks")
    shapes = [{name: array.shape for name, array in from_bytes(one.adapter).items()} for one in (start, after)]
    assert shapes[0] == shapes[1]
    assert (start.server_state, bool(after.server_state)) == (b"", True)
    rounds = [event for event in read_events(tmp_path / "ranks" / "events.jsonl") if event["event"] == "round"]
    assert rounds[0]["answered"] == ["roman", "romances"]
    with pytest.raises(InputError, match=r"federated\.lora_ranks .*'nowhere'"):
        federation("federated.adapters=product", "federated.lora_ranks={nowhere=2}", name="typo")


def test_a_second_run_is_a_new_reservation_until_the_budget_is_spent(federation, tiny_run, tmp_path):
    """One of them goes on from what an earlier run has made, and its certificate says so."""
    federation("federated.rounds=1", "privacy.budget_epsilon=17", name="one")
    continued = (f'federated.continue_from="{tiny_run.directory}"', "federated.anchor=0.5")
    federation("federated.rounds=1", "privacy.budget_epsilon=17", *continued, name="two")
    assert (
        adapters(tmp_path / "two")[0] == adapters(tiny_run.directory / "federated")[2] != adapters(tmp_path / "one")[0]
    )
    certificate = json.loads((tmp_path / "two" / "certificate.json").read_text())
    check_certificate(certificate, "test")
    earlier = tiny_run.directory / "federated" / "certificate.json"
    assert certificate["model"]["continues"] == digest_file(earlier)
    assert (tmp_path / "two" / "earlier-certificate.json").read_bytes() == earlier.read_bytes()
    assert certificate["model"]["continues"] in (tmp_path / "two" / "adapter" / "README.md").read_text()
    with pytest.raises(PolicyRefusal, match=r"silo roman.* refuses: budget_epsilon") as caught:
        federation("federated.rounds=1", "privacy.budget_epsilon=17", name="three")
    assert caught.value.exit_status == 3
    assert ledger_kinds(tmp_path).count("reserve") == 2
    assert sorted(adapters(tmp_path / "three")) == [0]


def test_a_damaged_round_is_passed_over_for_the_one_before(finished, tmp_path):
    config, root = finished
    shutil.copytree(root / "federated", tmp_path / "federated")
    newest = tmp_path / "federated" / "round-00002"
    (newest / commits.ADAPTER).write_bytes(b"damaged")
    said = []
    digest = read_manifest(newest, commits.KIND, name=commits.COMMITTED).config_digest
    found = commits.newest(tmp_path / "federated", digest, said.append)
    assert found.round_number == 1
    assert "digest doesn't hold" in said[0]
    assert config.federated.rounds == 2


def test_a_full_disk_leaves_the_last_round_intact(tmp_path):
    script = (
        "import resource, signal, sys; from pathlib import Path\n"
        "from federated.coordinator import round_commits as commits\n"
        "commits.save(Path(sys.argv[1]), 'digest', commits.Round(1, b'small', {}), 'run')\n"
        "signal.signal(signal.SIGXFSZ, signal.SIG_IGN); resource.setrlimit(resource.RLIMIT_FSIZE, (9000, 9000))\n"
        "commits.save(Path(sys.argv[1]), 'digest', commits.Round(2, b'x' * 20_000, {}), 'run')"
    )
    done = subprocess.run([sys.executable, "-c", script, str(tmp_path)], capture_output=True, text=True, check=False)
    assert done.returncode == 1
    assert "could not be written" in done.stderr
    assert commits.newest(tmp_path, "digest", pytest.fail).adapter == b"small"


def test_no_silo_answers_in_time(federation, tmp_path):
    with pytest.raises(SiloweaveError, match=r"0 of 2 silos answered|silos answered, federated.min_silos"):
        federation("federated.round_timeout_s=0.01", name="late")
    kinds = [event["event"] for event in read_events(tmp_path / "late" / "events.jsonl")]
    assert "timeout" in kinds


def test_a_silo_without_records_stops_the_simulation(federation):
    with pytest.raises(InputError, match=r"no record for silo \['west'\]"):
        federation("data.private.public_record_counts={west=3000}", name="west")


def test_a_silo_that_has_spent_stays_in_the_certificate(federation, tmp_path, monkeypatch):
    """Stopped after round one; at the restart a silo's answers are lost: what it has spent is still claimed."""
    whole_round, send = Coordinator._round, Mail.send

    def dies(self, number, adapter):
        if number == 2:
            raise KeyboardInterrupt
        return whole_round(self, number, adapter)

    def deaf(self, *arguments):
        return (found for found in send(self, *arguments) if self.grid._silo_of[found[0]] != "roman")

    monkeypatch.setattr(Coordinator, "_round", dies)
    with pytest.raises(KeyboardInterrupt):
        federation()
    monkeypatch.undo()
    monkeypatch.setattr(Mail, "send", deaf)
    federation()
    certificate = json.loads((tmp_path / "federated" / "certificate.json").read_text())
    assert certificate["epsilon_sum"] == pytest.approx(2 * certificate["epsilon"])


def test_the_coordinators_receipts_find_a_silo_that_was_put_back_with_its_anchor(
    federation, tmp_path, monkeypatch, siloweave
):
    """Stopped after round one; one silo's whole folder is put back from before; at the restart it refuses, and the rest
    go on; the refused silo's spend stays in the certificate, and can be taken in from it."""
    whole_round, places = (
        Coordinator._round,
        [tmp_path / "state" / "plays-tiny" / f"roman{end}" for end in ("", ".anchor")],
    )

    def dies(self, number, adapter):
        if number == 1:
            for place in places:
                shutil.copytree(place, tmp_path / "copy" / place.name)
        if number == 2:
            raise KeyboardInterrupt
        return whole_round(self, number, adapter)

    monkeypatch.setattr(Coordinator, "_round", dies)
    with pytest.raises(KeyboardInterrupt):
        federation()
    monkeypatch.undo()
    for place in places:
        shutil.rmtree(place)
        shutil.copytree(tmp_path / "copy" / place.name, place)
    # On one worker: a second one would open the silo after it has refused, and stop the simulation for that.
    federation()
    events = list(read_events(tmp_path / "federated" / "events.jsonl"))
    refused = [event for event in events if event["event"] == "refused"]
    assert {(event["silo"], event["rule"]) for event in refused} == {("roman", "rollback")}
    assert [event["answered"] for event in events if event["event"] == "round"][-1] == ["romances"]
    path = tmp_path / "federated" / "certificate.json"
    certificate = json.loads(path.read_text())
    check_certificate(certificate, "test")
    assert "statement" not in certificate["silos"]["roman"]
    assert certificate["headline"]["epsilon"] == pytest.approx(2 * certificate["epsilon"])  # roman attests nothing
    mended = siloweave("silo", "budget", "reconcile", str(places[0]), str(path), "--json", cwd=tmp_path)
    assert json.loads(mended.stdout)["epsilon_left"] == pytest.approx(32 - certificate["epsilon"]), mended.stderr
    assert ledger_kinds(tmp_path) == ["open", "reserve", "close", "reconcile"]
    federation("federated.rounds=1", name="next")
    (tmp_path / "next" / "certificate.json").read_text()


def test_the_run_without_dp_has_no_certificate_and_charges_nothing(federation, tmp_path):
    federation("federated.rounds=1", name="plain", with_dp=False)
    assert sorted(adapters(tmp_path / "plain")) == [0, 1]
    assert not (tmp_path / "plain" / "certificate.json").exists()
    assert not list((tmp_path / "state").rglob("ledger.sqlite"))


def test_a_silo_that_is_away_for_three_rounds_comes_back(begun_anew, tmp_path, monkeypatch):
    """Its machine is lost with round two in its hands, process and all, and is there again for round five."""
    push, node_ids, at = LocalGrid.push_messages, LocalGrid.get_node_ids, {"round": 0}

    def node_of(grid, silo):
        return next(node for node, name in grid._silo_of.items() if name == silo)

    def present(self):
        return [node for node in node_ids(self) if at["round"] not in (2, 3) or node != node_of(self, "roman")]

    def lose(self, messages):
        sent = list(messages)
        if sent[0].metadata.message_type == TRAIN:
            at["round"] = int(sent[0].metadata.group_id)
        lost = [one for one in sent if at["round"] == 2 and one.metadata.dst_node_id == node_of(self, "roman")]
        for message in lost:
            self._ray.kill(self._home[message.metadata.dst_node_id].actor, no_restart=True)
            message.metadata.__dict__["_message_id"] = "lost"  # Flower answers so for a node that is gone
            self._replies["lost"] = Message(Error(code=1, reason="the node is gone"), reply_to=message)
        pushed = iter(push(self, [one for one in sent if one not in lost]))
        return ["lost" if one in lost else next(pushed) for one in sent]

    monkeypatch.setattr(LocalGrid, "push_messages", lose)
    monkeypatch.setattr(LocalGrid, "get_node_ids", present)
    begun_anew("federated.rounds=5", "federated.local_steps=2", "federated.workers=2")
    events = list(read_events(tmp_path / "federated" / "events.jsonl"))
    assert [event["answered"] for event in events if event["event"] == "round"] == [
        ["roman", "romances"],
        *[["romances"]] * 3,
        ["roman", "romances"],
    ]
    assert ["the node is gone" in event["message"] for event in events if event["event"] == "rejected"] == [True]
    assert [charged_rounds(tmp_path, silo) for silo in ("roman", "romances")] == [[1, 5], [1, 2, 3, 4, 5]]
    certificate = json.loads((tmp_path / "federated" / "certificate.json").read_text())
    check_certificate(certificate, "test")
    statements = {name: silo["statement"]["rounds_charged"] for name, silo in certificate["silos"].items()}
    assert statements == {"roman": 2, "romances": 5}
    adapter = adapters(tmp_path / "federated")
    assert len(adapter) == 6 and len(set(adapter.values())) == 6


def test_a_silo_host_that_dies_is_replaced_and_the_round_goes_on(begun_anew, tmp_path, monkeypatch):
    import psutil

    dispatch, killed = LocalGrid._dispatch, []

    def kill_one(self):
        dispatch(self)
        hosts = [p for p in psutil.process_iter(["cmdline"]) if "SiloHost.handle" in " ".join(p.info["cmdline"] or [])]
        mine = [p for p in hosts if any(parent.pid == os.getpid() for parent in p.parents())]
        if mine and not killed:
            killed.append(mine[0].pid)
            mine[0].kill()

    monkeypatch.setattr(LocalGrid, "_dispatch", kill_one)
    begun_anew("federated.rounds=2", "federated.workers=2", name="dying")
    assert killed
    assert sorted(adapters(tmp_path / "dying")) == [0, 1, 2]


def test_the_adapter_in_a_commit_is_the_released_one(finished):
    _, root = finished
    before, *later = (from_bytes(adapter) for _, adapter in sorted(adapters(root / "federated").items()))
    assert len(later) == 2
    for after in later:
        assert all((before[name] != after[name]).any() for name in before)
        before = after


def test_where_the_models_own_parameters_train_a_whole_model_comes_out(federation, shared_ray, tiny_model, tmp_path):
    """One round with private evaluations before and after it, the first of the base model itself."""
    config = federation(
        "federated.train=full",
        "federated.rounds=1",
        "federated.local_steps=2",
        "data.private.held_out_fraction=0.01",
        "evaluate.max_records_per_silo=8",
        "privacy.evaluations=2",
        injected_seed=SEED,
    )
    folder, base = tmp_path / "federated", load_model(tiny_model)
    made = folder / "model"
    start, after = (from_bytes(found.adapter) for found in commits.all_rounds(folder))
    assert set(start) == {name for name, _ in base.named_parameters()}
    plain = AutoModelForCausalLM.from_pretrained(made)
    for name, value in plain.named_parameters():
        assert torch.equal(value, torch.from_numpy(after[name])), name
        assert not torch.equal(value, base.get_parameter(name)), name
    assert AutoTokenizer.from_pretrained(made)("text").input_ids == load_tokenizer(tiny_model)("text").input_ids
    certificate = json.loads((folder / "certificate.json").read_text())
    check_certificate(certificate, "test")
    digests = ModelDigests(**certificate["model"])
    assert which_model(digests, made, None) == ADAPTER
    assert which_model(digests, tiny_model, None) == BASE_MODEL
    events = list(read_events(folder / "events.jsonl"))
    assert [event["round"] for event in events if event["event"] == "private_evaluation"] == [0, 1]
    scores = evaluate_rounds(shared_ray, config, tiny_model, {"federated": folder}, lambda **_: None)
    before = score_held_out(config, simulated_silo(config, "roman", tiny_model), to_bytes(start), 8)
    assert scores["base"]["by_silo"]["roman"]["bits_per_char"] == pytest.approx(before.main)
    (made / "generation_config.json").write_text("{}")
    with pytest.raises(InputError, match=r"generation_config.json: (its digest is|no file of)"):
        which_model(digests, made, None)
