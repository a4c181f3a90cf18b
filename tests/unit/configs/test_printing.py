"""Strangers' words on a steward's terminal: shown, never obeyed. Through the real commands, with real files."""

import ast
import io
import json
import sys

import pytest
from model_parts import model_of
from repository import REPOSITORY
from rich.table import Table

import siloweave
from cluster.monitoring.console import Progressing, Terminal
from configs.events import EventLog
from configs.printing import answer, printable, stream
from configs.storage.files import canonical_json
from federated.deployment.federation_folder import FederationFolder
from federated.deployment.relay import SUPERNODE_CURVE
from federated.deployment.served_run import CURRENT
from federated.identity.cards import EnrolledSilo, TrustedCoordinator
from federated.identity.keys import load_or_create_key, ssh_public_key
from federated.identity.trust import trust
from privacy.certificate.certificate import certificate
from privacy.ledger.chain import Budget
from privacy.ledger.ledger import Ledger
from privacy.plan import PlanTerms

# Clears the screen, sets the window's title, turns the line's direction, is rich's markup, forges a line, is C1's CSI.
HOSTILE = "\x1b[2J\x1b]0;own\x07\u202e[red]x[/]\nleft: epsilon 99\r\x9b31m\x7f"
SHOWN = r"\x1b[2J\x1b]0;own\x07\u202e[red]x[/]\nleft: epsilon 99\r\x9b31m\x7f"
TRIAL = {
    "time": 0.0,
    "stage": "tune",
    "event": "trial",
    "trial": 3,
    "done": 4,
    "of": 4,
    "status": "x",
    "cause": HOSTILE,
}
PLAN = PlanTerms(sampling_rate=0.02, max_grad_norm=1.0, noise_multiplier=0.9, rounds=3, steps_per_round=4, delta=1e-5)


WRITERS = {
    "print",
    "Console",
    "typer.echo",
    "typer.secho",
    "typer.confirm",
    "typer.prompt",
    "click.echo",
    "traceback.print_exc",
    "sys.stdout",
    "sys.stderr",
}


def test_nothing_prints_but_the_one_place():
    """Fails for a print, an echo, a question or a console of rich's anywhere else."""
    files = [REPOSITORY / "siloweave.py"]
    for package in ("configs", "trainer", "privacy", "federated", "cluster"):
        files += (REPOSITORY / package).rglob("*.py")
    nodes = ((path, node) for path in files for node in ast.walk(ast.parse(path.read_text())))
    names = {(path, ast.unparse(node)) for path, node in nodes if isinstance(node, ast.Name | ast.Attribute)}
    found = {(path.relative_to(REPOSITORY).as_posix(), name) for path, name in names if name in WRITERS}
    assert found == {
        ("configs/printing.py", "typer.echo"),
        ("configs/printing.py", "typer.confirm"),
        ("configs/printing.py", "sys.stdout"),  # for their encoding
        ("configs/printing.py", "sys.stderr"),
        ("cluster/monitoring/console.py", "Console"),  # what Terminal is
    }


@pytest.fixture
def run(monkeypatch, capsys):
    """A command, and what it wrote: all of it is one terminal's printable lines."""

    def run(*arguments, asked="", status=0):
        monkeypatch.setattr(sys, "argv", ["siloweave", *map(str, arguments)])
        monkeypatch.setattr(sys, "stdin", io.StringIO(asked))
        with pytest.raises(SystemExit) as ended:
            siloweave.main()
        written = capsys.readouterr()
        text = written.out + written.err
        assert ended.value.code == status, text
        assert all(line.isprintable() for line in text.split("\n")), text
        return text

    return run


@pytest.fixture(scope="module")
def silo(tmp_path_factory):
    """A silo whose coordinator chose the run's and the requests' names, and which chose its own."""
    folder = tmp_path_factory.mktemp("silo")
    ledger = Ledger.open(folder / "state", HOSTILE, "ward", Budget(20.0, 3e-5))
    ledger.reserve(HOSTILE, PLAN.bind(5000))
    ledger.charge(HOSTILE, HOSTILE, "aa" * 32, 1)
    held = {"dataset_id": "ward", "public_key": ledger.public_key, "public_record_count": 5000}
    held["receipt"] = ledger.close(HOSTILE).model_dump(mode="json")
    held["statement"] = ledger.statement(HOSTILE, {"torch": "2"}, attests_disjoint_units=True).model_dump(mode="json")
    ledger.close_file()
    document = certificate(HOSTILE, PLAN, {HOSTILE: held}, model_of(*[{}] * PLAN.rounds))
    (folder / "certificate.json").write_text(json.dumps(document))
    (folder / "state" / "silo.log").write_text(f"2026-01-01 00:00:00,0 WARNING refused {HOSTILE}\n")
    trust(folder / "state", TrustedCoordinator(name=HOSTILE, public_key=ledger.public_key))
    (folder / "silo.toml").write_text(f"""
[silo]
id = {json.dumps(HOSTILE).replace(chr(127), chr(92) + "u007f")}
dataset_id = "ward"
state_dir = "{folder}/state"
base_model = "/nowhere"
public_record_count = 100
[data]
source = "nowhere"
[policy]
budget_epsilon = 20.0
budget_delta = 3e-5
""")
    return folder


def test_a_ledger_and_a_certificate_are_shown_line_by_line(run, silo):
    """Before: a run's id cleared the screen and wrote the line `left: epsilon 99`, as if the ledger said so."""
    shown = run("ledger", "show", silo / "state")
    assert len([line for line in shown.split("\n") if line.startswith("left:")]) == 1
    assert rf"run={SHOWN[:8]}" in shown
    assert SHOWN in run("ledger", "verify", silo / "state", "--certificate", silo / "certificate.json")
    export = silo / "export.jsonl"
    run("ledger", "export", silo / "state", "--to", export)
    assert run("ledger", "show", export) == shown
    for arguments in (("show", silo / "state"), ("verify", "--certificate", silo / "certificate.json")):
        assert HOSTILE in _texts(json.loads(run("ledger", *arguments, "--json")))  # machines get it as it is


def _texts(value):
    if isinstance(value, dict):
        return [text for key, item in value.items() for text in [key, *_texts(item)]]
    if isinstance(value, list):
        return [text for item in value for text in _texts(item)]
    return [value]


def test_a_certificate_that_does_not_hold_is_one_line(run, silo, tmp_path):
    document = json.loads((silo / "certificate.json").read_text())
    document["silos"][HOSTILE]["statement"]["epsilon"] = 0.1
    (tmp_path / "certificate.json").write_text(json.dumps(document))
    said = run("ledger", "verify", "--certificate", tmp_path / "certificate.json", status=2)
    assert said.count("\n") == 1
    (tmp_path / "certificate.json").write_text(json.dumps({HOSTILE: 1, "kind": HOSTILE}))
    assert run("ledger", "verify", "--certificate", tmp_path / "certificate.json", status=2).count("\n") == 1


def test_silo_status_shows_names_runs_and_lines_of_the_log(run, silo):
    shown = run("silo", "status", "-c", silo / "silo.toml")
    assert f"silo: {SHOWN}" in shown
    assert f"trusted: {SHOWN}: " in shown
    assert SHOWN.split(r"\n", maxsplit=1)[0] in shown.split("refusals: ")[1]
    assert run("silo", "status", "-c", silo / "silo.toml", "--json").count("\n") == 1


def test_documents_that_came_by_mail(run, silo, tmp_path):
    """An enrolment and a coordinator's document whose names are hostile, and files that are named so."""
    run("federation", "init", tmp_path / "f", "--name", "net", "--host", "localhost")
    node_key = ssh_public_key(load_or_create_key(tmp_path / "node.ssh", SUPERNODE_CURVE))
    card = EnrolledSilo(silo=HOSTILE, public_key="aa" * 32, node_key=node_key)
    path = tmp_path / "enrol\x1b[2Jment.json"
    path.write_bytes(canonical_json(card.model_dump()))
    assert r"enrol\x1b[2Jment.json: fingerprint" in run("federation", "enrol", tmp_path / "f", path, asked="y\n")
    directory = tmp_path / "run"
    EventLog(directory / "events.jsonl").emit("federate", "refused", silo=HOSTILE, step="1", message=HOSTILE)
    current = FederationFolder(tmp_path / "f").state / CURRENT
    current.parent.mkdir(exist_ok=True)
    current.write_text(json.dumps({"directory": str(directory), "run": HOSTILE}))
    status = run("federation", "status", tmp_path / "f")
    assert f"silo {SHOWN}: " in status
    assert f"refused at 1: {SHOWN}" in status
    name = HOSTILE[:80]
    coordinator = {**json.loads((tmp_path / "f" / "coordinator.json").read_text()), "name": name}
    (tmp_path / "c.json").write_text(json.dumps(coordinator))
    assert f"{printable(name)}: trusted" in run(
        "silo", "trust", "-c", silo / "silo.toml", tmp_path / "c.json", asked="y\n"
    )
    run("silo", "distrust", "-c", silo / "silo.toml", name)
    wrong = {**coordinator, HOSTILE: 1, "public_key": HOSTILE}
    (tmp_path / "c.json").write_text(json.dumps(wrong))
    assert run("silo", "trust", "-c", silo / "silo.toml", tmp_path / "c.json", status=2).count("\n") == 1


@pytest.mark.parametrize("debug", ["", "1"])
def test_an_error_is_shown_with_its_words_escaped(run, tmp_path, debug, monkeypatch):
    monkeypatch.setenv("SILOWEAVE_DEBUG", debug)
    arguments = ["--debug"] if debug else []
    said = run(*arguments, "ledger", "show", tmp_path / "no\x1b[2Jsuch", status=2)
    assert r"no\x1b[2Jsuch" in said


def test_events_are_no_markup_and_move_no_cursor(capsys):
    with Progressing() as shown:
        shown({"time": 0.0, "stage": "federate", "event": "refused", "silo": HOSTILE, "message": HOSTILE})
        shown(TRIAL)
    lines = capsys.readouterr().err.split("\n")
    assert lines == [f"federate: refused: {SHOWN}", f"tune: 4/4 trial 3 x: {SHOWN}", ""]


def test_a_real_terminal_gets_no_sequence_but_richs_own(monkeypatch):
    class Tty(io.StringIO):
        def isatty(self):
            return True

    screen = Tty()
    monkeypatch.setenv("TERM", "xterm")
    monkeypatch.setenv("COLUMNS", "200")
    table = Table(title=HOSTILE, caption=HOSTILE)
    table.add_column(HOSTILE)
    table.add_row(HOSTILE)
    Terminal(file=screen).print(table)
    monkeypatch.setattr(sys, "stderr", screen)
    with Progressing() as shown:
        shown({"time": 0.0, "stage": "federate", "event": "rejected", "message": HOSTILE})
        shown(TRIAL)
    text = screen.getvalue()
    assert text.count(SHOWN) >= 6
    for sequence in ("\x1b[2J", "\x1b]0;", "\x07", "\u202e", "\x9b", "\x7f"):
        assert sequence not in text


def test_what_machines_read_and_what_a_model_writes(capsys):
    answer(True, {"run": HOSTILE}, "not shown")
    line = capsys.readouterr().out
    assert line.rstrip("\n").isprintable()
    assert json.loads(line) == {"run": HOSTILE}
    stream("two\nlines\tand \x1b[2J")
    assert capsys.readouterr().out == "two\nlines\tand \\x1b[2J"
    stream("क्\u200dष 👨\u200d👩 می\u200cکند 完\u3000了 \u00a0\u202etxt\u2066")
    assert capsys.readouterr().out == "क्\u200dष 👨\u200d👩 می\u200cکند 完\u3000了 \u00a0\\u202etxt\\u2066"
