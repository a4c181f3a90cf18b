"""Bad input at the command line: one clear line, the right exit status, nothing half-written."""

import json

import pytest


def one_line(done, status):
    assert done.returncode == status, done.stderr
    lines = [line for line in done.stderr.splitlines() if line.strip()]
    assert "Traceback" not in done.stderr
    return next(line for line in lines if line.startswith("error:"))


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (
            ["prepare", "-c", "nowhere.toml"],
            "nowhere.toml: no such file; give a TOML file or a preset (demo, gpu, tiny)",
        ),
        (["prepare", "-c", "tiny", "--set", "model.size=3"], "model.size: no such setting"),
        (["plan", "-c", "tiny", "--set", "privacy.delta=1"], "privacy.delta is 1"),
        (
            ["plan", "-c", "tiny", "--set", "privacy.epsilon=1e-9", "--set", "privacy.delta=1e-12"],
            "raise privacy.epsilon",
        ),
        (["prepare", "-c", "tiny", "--set", 'data.public.source="none.jsonl"'], "none.jsonl: no such file"),
        (
            ["prepare", "-c", "tiny", "--set", 'data.public.text="body"', "--set", 'data.public.source="a.jsonl"'],
            "no column 'body'",
        ),
        (["export", "-c", "tiny"], "run `siloweave prepare` first"),
        (["federate", "-c", "tiny"], "run `siloweave export` first"),
        (["evaluate", "-c", "tiny"], "run `siloweave federate` first"),
        (["generate", "-c", "tiny"], "run `siloweave federate` first"),
        (["report", "-c", "tiny"], "run `siloweave federate` first"),
        (["ledger", "show", "nowhere"], "no such ledger"),
        (["ledger", "verify"], "nothing to verify"),
        (["ledger", "verify", "--certificate", "none.json"], "none.json: can't be read"),
        (["ledger", "export", "nowhere", "--to", "out.jsonl"], "no such ledger"),
        (["ledger", "backup", "nowhere", "--to", "out.sqlite"], "no such ledger"),
        (["silo", "budget", "reconcile", "silo.toml"], "silo.toml: no such file"),
        (["silo", "budget", "reconcile", "."], "no ledger, and no anchor"),
        (["silo", "serve", "-c", "silo.toml", "--socket", "s.sock"], "silo.toml: no such file"),
    ],
)
def test_bad_input_is_one_clear_line(siloweave, tmp_path, arguments, message):
    (tmp_path / "a.jsonl").write_text('{"text": "hello"}\n')
    assert message in one_line(siloweave(*arguments, cwd=tmp_path), 2)


def test_errors_are_json_where_asked_and_a_traceback_where_asked(siloweave, tmp_path):
    done = siloweave("prepare", "-c", "nowhere.toml", "--json", cwd=tmp_path)
    assert json.loads(done.stdout)["exit_status"] == 2
    debug = siloweave("--debug", "prepare", "-c", "nowhere.toml", cwd=tmp_path)
    assert "Traceback" in debug.stderr
    assert debug.returncode == 2


def test_the_plan_is_shown_before_anything_runs(siloweave, tmp_path):
    done = siloweave("plan", "-c", "demo", "--json", cwd=tmp_path)
    plan = json.loads(done.stdout)
    assert 1e6 < plan["model"]["parameters"] < 2e6
    assert plan["privacy"]["epsilon"] <= 8
    assert plan["privacy"]["silos"]["comedies"]["expected_batch"] == pytest.approx(120)
    assert plan["pretrain"]["batch"] == {"sequences": 8, "ranks": 2, "micro_batch": 4, "accumulation": 1}
    stages = plan["pretrain"]["state_bytes_per_rank"]
    # A model of small matrices stays whole under ZeRO-3, so that only 1 to 2 must be less.
    assert sum(stages["1"].values()) > sum(stages["2"].values())
    assert plan["pretrain"]["placed_bytes_per_rank"]["device"] == pytest.approx(sum(stages["2"].values()))
    assert plan["pretrain"]["not_supported_here"] == []
    assert not list(tmp_path.iterdir())
    text = siloweave("plan", "-c", "demo", cwd=tmp_path).stdout
    assert "noise_multiplier: " in text


def test_the_plans_adapter_size_is_that_of_the_adapter(tiny_run, siloweave, tmp_path):
    from federated.adapters.arrays import from_bytes
    from federated.coordinator import round_commits as commits

    plan = json.loads(siloweave("plan", "-c", "tiny", "--json", cwd=tmp_path).stdout)
    arrays = from_bytes(commits.all_rounds(tiny_run.directory / "federated")[0].adapter)
    assert plan["federated"]["adapter_parameters"] == sum(array.size for array in arrays.values())


def test_doctor_finds_a_stale_build_lock_and_says_the_fix(siloweave, tmp_path):
    import os

    done = siloweave("doctor", "-c", "tiny", "--json", cwd=tmp_path, TORCH_EXTENSIONS_DIR=str(tmp_path))
    findings = {finding["check"]: finding for finding in json.loads(done.stdout)}
    assert findings["DeepSpeed build locks"]["ok"]
    lock = tmp_path / "py311_cpu" / "deepspeed_shm_comm" / "lock"
    lock.parent.mkdir(parents=True)
    lock.touch()
    os.utime(lock, (0, 0))
    again = siloweave("doctor", "-c", "tiny", cwd=tmp_path, TORCH_EXTENSIONS_DIR=str(tmp_path))
    assert again.returncode == 1
    assert f"FIX DeepSpeed build locks: {lock}; rm {lock}" in again.stdout


def test_doctor_looks_at_the_address(siloweave, tmp_path):
    done = siloweave("doctor", "-c", "tiny", "--set", 'cluster.address="127.0.0.1:1"', cwd=tmp_path)
    assert done.returncode == 1
    assert "FIX Ray address: cluster.address '127.0.0.1:1': no Ray answers there" in done.stdout


def test_invalid_utf8_and_long_records_are_taken_and_counted(siloweave, tmp_path):
    line = b'{"text": "caf\xe9 number %d, a public sentence about the things of this world and of %d others"}\n'
    (tmp_path / "c.jsonl").write_bytes(b"".join(line % (i, i * i) for i in range(400)))
    arguments = ["--set", 'data.public.source="c.jsonl"', "--set", "data.near_duplicate_similarity=0.95"]
    done = siloweave("prepare", "-c", "tiny", *arguments, "--set", "tokenizer.vocab_size=300", cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    manifest = json.loads((tmp_path / "runs" / "tiny" / "corpus" / "manifest.json").read_text())
    assert manifest["metadata"]["replaced_utf8"] == 400
