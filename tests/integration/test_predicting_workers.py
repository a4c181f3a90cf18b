"""`siloweave predict --workers`: real processes of Ray Data answer a file, to the bytes that one process writes."""

import json
import os

import pytest
from served_models import a_labelling_run, a_model

from cluster import predicting
from cluster.predicting import Asked, by_workers
from configs.errors import InputError, SiloweaveError
from federated.adapters.merged import merge
from trainer.inference.predicting import CHUNK, predict

WORKERS = 2


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    folder = tmp_path_factory.mktemp("models")
    run, *_ = a_labelling_run(folder / "reviews", a_model(folder / "ship"), "classification", ("bad", "good"))
    return merge(run, None, None)[0]


def lines(count):
    for number in range(count):
        yield json.dumps({"id": number, "text": f"the {'old ' * (number % 7)}ship number {number}"})
        if number % 100 == 7:
            yield "no record"


def test_workers_write_the_bytes_of_one_process_also_after_an_interruption(run, tmp_path, shared_ray):
    source = tmp_path / "in.jsonl"
    source.write_text("\n".join(lines(3 * CHUNK + 20)))
    asked = Asked(run, None, (), 4)
    _, asking, _ = asked.load()
    alone = predict(asking, ("bad", "good"), source, tmp_path / "alone.jsonl", {"model": "1"})
    output = tmp_path / "out.jsonl"

    def interrupted(done, of):
        assert of == alone.records
        if done >= 2 * CHUNK:
            raise KeyboardInterrupt

    with by_workers(asked, WORKERS) as by:
        with pytest.raises(KeyboardInterrupt):
            predict(asking, ("bad", "good"), source, output, {"model": "1"}, interrupted, by)
        made = predict(asking, ("bad", "good"), source, output, {"model": "1"}, by=by)
    assert (made.records, made.bad, made.resumed) == (alone.records, alone.bad, 2 * CHUNK)
    for suffix in ("", ".bad.jsonl"):
        mine, whole = (tmp_path / f"{name}.jsonl{suffix}" for name in ("out", "alone"))
        assert mine.read_bytes() == whole.read_bytes()


def test_a_file_that_has_gone_is_named_as_one_process_would(run, tmp_path, shared_ray):
    source = tmp_path / "in.jsonl"
    source.write_text('{"text": "the ship"}\n')
    asked = Asked(run, None, (), 4)
    with by_workers(asked, 1) as by:
        source.unlink()  # after it was counted
        with pytest.raises(InputError, match=r"in\.jsonl: no such file"):
            list(by(source, 0))
    with pytest.raises(InputError, match="--workers 1000: they need 1000 CPUs"), by_workers(asked, 1000):
        pass


def test_a_chunk_that_kills_its_worker_ends_the_command(tmp_path, shared_ray, monkeypatch):
    source, deaths = tmp_path / "in.jsonl", tmp_path / "deaths"
    source.write_text('{"text": "the ship"}\n')

    class Dying:
        def __init__(self, asked):
            pass

        def __call__(self, batch):
            with deaths.open("a") as file:
                file.write("x")
            os._exit(1)

    monkeypatch.setattr(predicting, "_Worker", Dying)
    monkeypatch.setattr(predicting, "_AGAIN", 1)
    failing = pytest.raises(SiloweaveError, match="a worker has failed: ")
    with by_workers(Asked(tmp_path, None, (), 4), 1) as by, failing as failure:
        list(by(source, 0))
    assert "\n" not in str(failure.value)
    assert deaths.read_text() == "xx"
