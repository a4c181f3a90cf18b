"""Nothing of a record is in what is raised, printed, logged or written when its file is refused."""

import logging
import sys
import traceback
import warnings

import pytest
from bad_files import MARKER, bad_files

import siloweave
from configs.errors import InputError
from configs.schema.silo import SiloDataSettings
from federated.silo.units import rows_of

BAD = dict(bad_files())
bad = pytest.mark.parametrize("name", BAD)


def written(folder, name):
    file, content, _ = BAD[name]
    (folder / "in").mkdir()
    path = folder / "in" / file
    path.write_bytes(content)
    return path


def chain(error):
    """All that hangs on an exception, also what a traceback would not show."""
    while error is not None:
        yield from (str(error), repr(error), repr(error.args), repr(vars(error)))
        yield from (repr(getattr(error, name)) for name in ("doc", "object", "filename") if hasattr(error, name))
        yield "".join(traceback.format_exception(error))
        error = error.__cause__ or error.__context__


@bad
def test_a_refusal_is_one_line_with_file_and_fix_and_holds_no_value(tmp_path, name, capfd, caplog):
    caplog.set_level(logging.DEBUG)
    path = written(tmp_path, name)
    with warnings.catch_warnings(record=True) as warned, pytest.raises(InputError) as refused:
        rows_of(SiloDataSettings(source=str(path), silo="site", unit="patient"))
    message = str(refused.value)
    assert message.startswith(str(path))
    assert BAD[name][2] in message
    assert "\n" not in message
    found = [*chain(refused.value), *capfd.readouterr(), caplog.text, *(str(one.message) for one in warned)]
    assert not [text for text in found if MARKER in text]


def run(monkeypatch, capfd, tmp_path, command, *changes):
    places = [f"run.storage={tmp_path / 'runs'}", f"federated.state_dir={tmp_path / 'state'}"]
    arguments = [one for setting in (*places, *changes) for one in ("--set", setting)]
    monkeypatch.setattr(sys, "argv", ["siloweave", "--debug", command, "-c", "tiny", *arguments])
    with pytest.raises(SystemExit) as ended:
        siloweave.main()
    return ended.value.code, "".join(capfd.readouterr())


def holding_a_value(folder):
    """Files of a run that do; a corpus' own parts are there to hold it."""
    files = [file for file in folder.rglob("*") if file.is_file() and "corpus-parts" not in file.parts]
    return [file for file in files if MARKER.encode() in file.read_bytes()]


@bad
def test_a_command_over_a_bad_corpus_shows_and_writes_no_value(tmp_path, name, capfd, caplog, monkeypatch):
    caplog.set_level(logging.DEBUG)
    path = written(tmp_path, name)
    status, shown = run(monkeypatch, capfd, tmp_path, "prepare", f"data.public.source={path}")
    assert status == 2
    assert "error: " in shown
    assert MARKER not in shown + caplog.text
    assert not holding_a_value(tmp_path / "runs")


@pytest.mark.parametrize(
    "name", ["csv: more fields, text first", "jsonl: messages", "parquet: no UTF-8", "txt: another column"]
)
def test_a_command_over_bad_records_of_silos_shows_and_writes_no_value(tmp_path, name, capfd, caplog, monkeypatch):
    caplog.set_level(logging.DEBUG)
    path = written(tmp_path, name)
    private = [f"data.private.source={path}", "data.private.silo=site", "data.private.unit=patient"]
    _, shown = run(monkeypatch, capfd, tmp_path, "plan", *private)
    assert f"not looked at: {path}" in shown
    assert MARKER not in shown + caplog.text
    assert not holding_a_value(tmp_path / "runs") + holding_a_value(tmp_path / "state")


@pytest.mark.parametrize("name", ["csv: no header", "jsonl: a line cut short", "jsonl: messages"])
def test_what_the_library_behind_hf_says_of_a_file_is_not_shown(tmp_path, name, capfd, caplog, monkeypatch):
    caplog.set_level(logging.DEBUG)
    folder = written(tmp_path, name).parent
    monkeypatch.setenv("HF_DATASETS_CACHE", str(tmp_path / "cache"))
    status, shown = run(monkeypatch, capfd, tmp_path, "prepare", f"data.public.source=hf:{folder}")
    assert status == 2
    assert "error: hf:" in shown
    assert MARKER not in shown + caplog.text
