"""A silo's files may be replaced by newer ones: the ledger goes on, and the steward is told."""

import json

from silo_requests import ward

from configs.storage.layout import SiloFiles
from federated.silo.source_record import source_note
from federated.silo.units import rows_of


def note(config):
    rows_of.cache_clear()
    return source_note(config)


def test_newer_files_are_told_once(tmp_path):
    config = ward(tmp_path, tmp_path / "model")
    (tmp_path / "state").mkdir()
    assert (note(config), note(config)) == ("", "")
    (tmp_path / "data.jsonl").write_text(json.dumps({"text": "another note"}) + "\n")
    said = note(config)
    assert "other files than at the last start: 1 changed (data.jsonl); the ledger goes on" in said
    assert "another note" not in said
    assert note(config) == ""
    record = json.loads(SiloFiles(tmp_path / "state").source.read_text())
    assert list(record["files"]) == ["data.jsonl"]


def test_a_source_without_files_has_no_record(tmp_path):
    config = ward(tmp_path, tmp_path / "model")
    embedded = config.model_copy(update={"data": config.data.model_copy(update={"source": "embedded:plays"})})
    assert note(embedded) == ""
    assert not SiloFiles(tmp_path / "state").source.exists()
