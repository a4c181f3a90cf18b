"""A run whose public files change between its stages: nothing goes on with another corpus, and every stage says so."""

import json
import shutil

import pytest

from cluster import pipeline
from cluster.run import Run
from configs.errors import InputError
from configs.load import load


def lines(first, count):
    numbers = range(first, first + count)
    rows = ({"text": f"public text number {i} about subject {i % 7} and its {i * i} neighbours"} for i in numbers)
    return "".join(json.dumps(row) + "\n" for row in rows)


@pytest.fixture
def source(tmp_path):
    folder = tmp_path / "texts"
    folder.mkdir()
    (folder / "a.jsonl").write_text(lines(0, 300))
    return folder


@pytest.fixture
def run(tmp_path, source, shared_ray):
    values = ["tokenizer.vocab_size=300", "data.near_duplicate_similarity=0.95", "pretrain.steps=4"]
    values += ["pretrain.commit_every=2", "pretrain.keep_commits=2", "pretrain.warmup_steps=1", "cluster.world_size=1"]
    events = []
    config = load("tiny", [f"run.storage={tmp_path / 'runs'}", f'data.public.source="{source}"', *values])
    run = Run(config, (events.append,))
    run.said = lambda: [event["message"] for event in events if event["event"] == "source"]
    return run


def test_a_corpus_is_made_anew_until_something_is_trained_on_it(run, source):
    pipeline.prepare(run)
    changes = f"data.public.source '{source}': other files than were prepared: 1 new (b.jsonl)"
    assert run.said() == [f"data.public.source: {source}: files read: 1; left out: none"]
    (source / "b.jsonl").write_text(lines(300, 300))
    with pytest.raises(InputError, match="run `siloweave prepare` again") as refused:
        pipeline.pretrain(run)
    assert str(refused.value).startswith(changes)
    pipeline.prepare(run)
    assert run.said()[1:] == [
        f"{changes}; the corpus is prepared again",
        f"data.public.source: {source}: files read: 2; left out: none",
    ]
    pipeline.pretrain(run)

    # From here on there are commits, and the corpus is whole: it may be gone on with, and not be replaced.
    (source / "b.jsonl").unlink()
    with pytest.raises(InputError, match=r"1 gone \(b\.jsonl\); 4 steps are trained on the files as they were"):
        pipeline.prepare(run)
    shutil.rmtree(run.files.checkpoints / "step-00000004")
    pipeline.pretrain(run)
    assert run.said()[-1].endswith("1 gone (b.jsonl); the corpus as prepared is used")
    pipeline.export(run)
    assert len(run.said()) == 5

    # A corpus that was taken away and made of other files is another one.
    shutil.rmtree(run.files.corpus)
    pipeline.prepare(run)
    with pytest.raises(InputError, match="step 4 was trained on another corpus than the one that is prepared now"):
        pipeline.pretrain(run)
    shutil.rmtree(run.files.corpus)
    (source / "b.jsonl").write_text(lines(300, 300))
    pipeline.prepare(run)
    pipeline.pretrain(run)
