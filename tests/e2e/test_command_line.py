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
            "nowhere.toml: no such file; give a TOML file or a preset (chat, classify, demo, entities, gpu, qa,",
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
        (["federate", "-c", "tiny", "--set", "model.family=bert"], "'masked' predicts no next token"),
        (["prepare", "-c", "tiny", "--set", "model.config=a.jsonl"], "model_type is None"),
        (["evaluate", "-c", "tiny"], "run `siloweave federate` first"),
        (["generate", "-c", "tiny"], "run `siloweave federate` first"),
        (["report", "-c", "tiny"], "run `siloweave federate` first"),
        (["explain", "-c", "tiny"], "no text is given"),
        (["explain", "-c", "tiny", "--file", "none.txt"], "none.txt: no such file"),
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
    assert plan["federated"]["adapter_parameters"] > 0  # which a test of its own counts
    assert not list(tmp_path.iterdir())
    text = siloweave("plan", "-c", "demo", cwd=tmp_path).stdout
    assert "noise_multiplier: " in text


def test_the_plans_adapter_size_is_that_of_the_adapter(tiny_run):
    from cluster.checks.estimate import adapter_parameters
    from federated.adapters.arrays import from_bytes
    from federated.coordinator import round_commits as commits

    arrays = from_bytes(commits.all_rounds(tiny_run.directory / "federated")[0].adapter)
    assert adapter_parameters(tiny_run.config()) == sum(array.size for array in arrays.values())


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


def test_prepare_ends_with_a_table_of_what_was_replaced_and_dropped(siloweave, tmp_path):
    line = '{"text": "caf\u00e9 number %d, a public sentence about the things of this world and of %d others"}\n'
    lines = [(line % (i, i * i)).encode() for i in range(400)]
    lines[:8] = [content.replace(b"number", b"\xff\xfe") for content in lines[:8]]
    rest = ['{"text": "half \\ud800 of a character, in a sentence that is long enough to be kept by cleaning"}\n']
    (tmp_path / "c.jsonl").write_bytes(
        b"".join([*lines, lines[9], *(text.encode() for text in rest), b'{"text": ""}\n'])
    )
    (tmp_path / "latin.jsonl").write_bytes(b"".join(lines[8:]).decode().encode("latin-1"))
    arguments = ["-c", "tiny", "--set", "data.near_duplicate_similarity=0.95", "--set", "tokenizer.vocab_size=300"]
    done = siloweave("prepare", *arguments, "--set", 'data.public.source="c.jsonl"', cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    table = [" ".join(shown.split()) for shown in done.stdout.splitlines()]
    assert table[0] == "text of the public corpora"
    assert table[1:9] == [
        "replaced: invalid bytes 8 of 403 1.99%",
        "replaced: half characters 1 of 403 0.25%",
        "replaced: NUL 0 of 403 0.00%",
        "dropped: no text 1 of 403 0.25%",
        "dropped: shorter than data.min_characters 0 of 403 0.00%",
        "dropped: exact copies 1 of 403 0.25%",
        "dropped: near copies 0 of 403 0.00%",
        "changed by cleaning, beyond white space 0 of 403 0.00%",
    ]
    assert table[9] == "warning: replaced: invalid bytes: 1.99%, which is more than 1%; look at the data"
    assert table[10].startswith("prepare: done in ")
    again = siloweave("prepare", *arguments, "--set", 'data.public.source="c.jsonl"', "--json", cwd=tmp_path)
    document = json.loads(again.stdout)
    assert document["text"]["replaced: invalid bytes"] == {"count": 8, "of": 403}
    assert document["warnings"] == [table[9]]
    manifest = json.loads((tmp_path / "runs" / "tiny" / "corpus" / "manifest.json").read_text())
    assert manifest["metadata"]["reading"]["invalid_bytes"] == 8

    latin = ["--set", 'data.public.source="latin.jsonl"', "--set", "run.name=latin"]
    refused = siloweave("prepare", *arguments, *latin, cwd=tmp_path)
    assert refused.returncode != 0
    assert [
        shown for shown in refused.stderr.splitlines() if "latin.jsonl" in shown and 'encoding = "latin-1"' in shown
    ]
    declared = siloweave("prepare", *arguments, *latin, "--set", "data.public.encoding=latin-1", cwd=tmp_path)
    assert declared.returncode == 0, declared.stderr
