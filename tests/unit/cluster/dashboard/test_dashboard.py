"""The pages over HTTP: who gets them, what they let in, and that strangers' words in them are text."""

import re
import signal
import subprocess
import sys

import httpx
import pytest
from fastapi.testclient import TestClient
from service_client import refused
from shown_pages import FEDERATION, HOSTILE, REASON, made_up

from cluster.dashboard.dashboard import Dashboard, rendered
from configs.errors import InputError
from federated.deployment.steward.steward import figures


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    folder = tmp_path_factory.mktemp("north")
    return made_up(folder, coordinator="<b>net</b>", run=HOSTILE)


@pytest.fixture
def dashboard(made):
    return Dashboard(lambda: figures(made, None), "silo.html.j2")


def client(dashboard, sender="127.0.0.1"):
    return TestClient(dashboard.guard, base_url="http://127.0.0.1:8000", client=(sender, 50000))


def test_the_page_has_the_figures_and_strangers_words_as_text(dashboard, made):
    response = client(dashboard).get(dashboard.path)
    assert response.status_code == 200
    page, found = response.text, figures(made, None)
    assert "<script" not in page
    assert "<b>net</b>" not in page
    assert "&lt;script&gt;alert(1)&lt;/script&gt;\\u202e" in page
    assert REASON in page
    assert f'<td class="number">{found["budget"]["epsilon_left"]:.4g}</td>' in page
    for row in (found["runs"][0], found["mandates"][0]):
        assert f"<code>{row['stop']}</code>" in page
    assert "&lt;b&gt;net&lt;/b&gt;&#39;</code>" in page  # the command that distrusts it, quoted for a shell


def test_the_page_needs_nothing_from_elsewhere_and_runs_no_script(dashboard):
    response = client(dashboard).get(dashboard.path)
    policy = response.headers["content-security-policy"]
    assert policy.startswith("default-src 'none'; style-src 'sha256-")
    assert "frame-ancestors 'none'" in policy
    assert "script-src" not in policy
    assert (response.headers["cache-control"], response.headers["referrer-policy"]) == ("no-store", "no-referrer")
    assert not re.search(r"\b(src|href|action|style|on[a-z]+)=|@import|url\(", response.text)
    assert '<meta http-equiv="refresh" content="15">' in response.text


@pytest.mark.parametrize(
    ("headers", "sender"),
    [
        ({"host": "evil.example"}, "127.0.0.1"),
        ({"host": "127.0.0.1.evil.example:8000"}, "127.0.0.1"),
        ({"origin": "http://evil.example"}, "127.0.0.1"),
        ({"origin": "null"}, "127.0.0.1"),
        ({}, "192.0.2.7"),
        ({}, "fe80::1"),
        ({}, "no address"),
    ],
)
def test_nobody_else_gets_it(headers, sender, dashboard):
    response = client(dashboard, sender).get(dashboard.path, headers=headers)
    refused(response, 403, "sender, Host or Origin is none of this machine's")


def test_whoever_does_not_know_its_address_gets_nothing(dashboard):
    """Every user of a machine reaches loopback, also the silo's relay."""
    asking = client(dashboard)
    for path in ("/x", dashboard.path[:-1], dashboard.path + "x", "/%C3%A4"):
        refused(asking.get(path), 404, "open the address that the command has printed")
    for path in ("/", "/docs", "/openapi.json", "/health", dashboard.path + "/"):
        assert asking.get(path).status_code == 404
    assert Dashboard(dict, "silo.html.j2").path != dashboard.path


def test_nothing_but_a_look_is_taken(dashboard):
    for method in ("POST", "PUT", "DELETE", "PATCH"):
        assert client(dashboard).request(method, dashboard.path).status_code == 405
    refused(client(dashboard).post(dashboard.path, content=b"x"), 413, "bytes; send less")


def test_what_goes_wrong_is_one_line_and_the_next_look_is_whole_again(made, capsys):
    problem = [InputError("ledger.sqlite: entry 3 does not hold <b>; put its backup back"), KeyError("private")]

    def look():
        if problem:
            raise problem.pop(0)
        return figures(made, None)

    dashboard = Dashboard(look, "silo.html.j2")
    asking = TestClient(
        dashboard.guard, base_url="http://127.0.0.1:8000", client=("127.0.0.1", 1), raise_server_exceptions=False
    )
    said = asking.get(dashboard.path)
    assert said.status_code == 503
    assert '<p class="warning" id="problem">ledger.sqlite: entry 3 does not hold &lt;b&gt;;' in said.text
    assert "content-security-policy" in said.headers
    failed = asking.get(dashboard.path)
    assert (failed.status_code, "private" in failed.text) == (500, False)
    said = capsys.readouterr().err
    assert said.startswith("a look at the page has failed (KeyError), ")
    assert (said.count("\n"), "private" in said) == (1, False)
    assert asking.get(dashboard.path).status_code == 200


def test_a_silo_of_which_nothing_is_known_has_a_page():
    found = {
        "silo": "north",
        "dataset": "ward",
        "time": "2026-11-30T00:00:00+00:00",
        "serving": False,
        "last_reply": None,
        "doubt": "an old one",
        "budget": dict.fromkeys(("epsilon", "delta", "epsilon_left", "delta_left"), 1.0)
        | dict.fromkeys(("epsilon_spent", "delta_spent", "epsilon_within_24_hours"), 0.0)
        | {"max_epsilon_per_day": None},
        "left": {"releases": 0, "bytes": 0, "newest": []},
        **{name: [] for name in ("spent", "runs", "replies", "refused", "turned_away", "mandates", "trusted")},
        "roster": {},
        "certificate_days_left": {},
    }
    page = rendered("silo.html.j2", found)
    for words in (
        "not serving",
        "The ledger is in doubt",
        "No coordinator is trusted",
        "Nothing was spent",
        "There is no mandate",
    ):
        assert words in page


def test_the_command_serves_on_loopback_until_it_is_told_to_end(made):
    words = [sys.executable, "-m", "siloweave", "silo", "dashboard", "-c", str(made)]
    process = subprocess.Popen(words, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    try:
        line = process.stdout.readline()
        address = line.removeprefix("dashboard at ").strip()
        assert address.startswith("http://127.0.0.1:"), line + process.stderr.read()
        with httpx.Client(trust_env=False) as asking:
            assert "Silo north" in asking.get(address).text
            refused(asking.get(address, headers={"x-forwarded-for": "192.0.2.7"}), 403, "sender")
        process.send_signal(signal.SIGTERM)
        assert process.wait(timeout=300) == 0
        assert process.stderr.read() == "dashboard: stopped\n"
    finally:
        process.kill()
        process.wait()


def test_the_coordinators_page_has_sites_rounds_pace_and_what_came_to_nothing():
    page = rendered("federation.html.j2", FEDERATION)
    assert "<script" not in page
    for shown in ('<span class="good">up</span>', '<span class="bad">down</span>', "its relay is not connected"):
        assert shown in page
    assert page.count("refused at 3: &lt;script&gt;") == 1
    assert "61.5 s and 2.5 MB each (medians), 40.6 kB a second; the others take 1046 s at this pace" in page
    assert "updates are added up under masks" in page
    assert "1 of 9 lines" in page
    bare = {**FEDERATION, "silos": {}, "run": None, "pace": None, "rounds": [], "processes": {}, "unreadable": []}
    page = rendered("federation.html.j2", bare)
    for nothing in ("Not served.", "No silo is enrolled.", "No run was started here."):
        assert nothing in page
