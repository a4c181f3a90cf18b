"""A corpus prepared by tasks of Ray Data, killed in between: the same bytes as in one process."""

import json
import os
import subprocess
import sys
import time
from pathlib import Path

import pytest

from cluster.runtime.preparation import ray_map
from configs.errors import SiloweaveError

SILOWEAVE = Path(sys.executable).with_name("siloweave")


def content(run):
    manifest = json.loads((run / "corpus" / "manifest.json").read_text())
    return {name: entry["sha256"] for name, entry in manifest["files"].items()}, manifest["metadata"]


def held(folder):
    """An environment in which a preparation comes no further than its first part: whoever kills it is in time."""
    from repository import SUPPORT  # here: Ray's workers import this module, and have not that one

    (folder / "hold").touch()
    path = os.pathsep.join([str(SUPPORT / "held_parts"), os.environ.get("PYTHONPATH", "")])
    return {**os.environ, "PYTHONPATH": path, "SILOWEAVE_TEST_HOLD": str(folder / "hold")}


def test_preparation_on_ray_data_can_be_killed_and_makes_the_same_corpus(tmp_path):
    settings = ["-c", "tiny", "--set", "data.public.source=corpus.jsonl", "--set", "tokenizer.vocab_size=400"]
    # Parts of 2,000 rows: enough for several.
    lines = (
        json.dumps({"text": f"{i}: {'a b c d e f g'[: i % 13]} of subject {i * i % 911}, {i % 89}"})
        for i in range(9000)
    )
    (tmp_path / "corpus.jsonl").write_text("\n".join(lines))
    settings += ["--set", "data.min_characters=8", "--set", "data.near_duplicate_similarity=0.95"]
    alone = subprocess.run([SILOWEAVE, "prepare", *settings], cwd=tmp_path, capture_output=True, text=True, check=False)
    assert alone.returncode == 0, alone.stderr
    expected = content(tmp_path / "runs" / "tiny")
    run = tmp_path / "elsewhere" / "tiny"
    parallel = [SILOWEAVE, "prepare", *settings, "--set", "run.storage=elsewhere", "--set", "data.workers=2"]
    killed = subprocess.Popen(
        parallel, cwd=tmp_path, env=held(tmp_path), stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL
    )
    while not (cleaned := list(run.glob("corpus-parts/*/clean/part-*.parquet"))):
        assert killed.poll() is None
        time.sleep(0.01)
    killed.kill()
    killed.wait()
    stamps = {path: path.stat().st_mtime_ns for path in cleaned}
    assert len(cleaned) == 1
    assert not (run / "corpus").exists()
    again = subprocess.Popen(parallel, cwd=tmp_path, stderr=subprocess.PIPE, text=True)
    kept = set(stamps)
    while again.poll() is None:  # what was done before the kill is not done again
        kept &= {path for path, stamp in stamps.items() if not path.exists() or path.stat().st_mtime_ns == stamp}
        time.sleep(0.05)
    assert again.returncode == 0, again.stderr.read()
    assert kept == set(stamps)
    assert content(run) == expected


def failing(number):
    raise SiloweaveError(f"part {number} can't be read")


def test_what_a_task_says_is_said(shared_ray):
    with pytest.raises(SiloweaveError, match=r"^part 3 can't be read$"):
        list(ray_map(failing, [3]))
