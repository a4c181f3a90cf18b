"""The two pages as a person sees them, in a real browser."""

import threading
from contextlib import contextmanager

import pytest
import uvicorn
from chromium import WAIT_S, Chromium, needs_chromium
from shown_pages import FEDERATION, HOSTILE, PLAN, REASON, made_up

from cluster.dashboard import dashboard as pages
from cluster.dashboard.dashboard import Dashboard
from cluster.serving.server import listen
from federated.deployment.steward.steward import figures

pytestmark = needs_chromium


@pytest.fixture(scope="module")
def browser():
    with Chromium() as found:
        yield found


@pytest.fixture
def still(monkeypatch):
    """A page that stays while a test looks at it."""
    monkeypatch.setattr(pages, "REFRESH_S", 86_400)


@contextmanager
def served(look, template):
    """The address of a page, in a thread of this process."""
    dashboard = Dashboard(look, template)
    with listen("127.0.0.1", 0, 60) as listener:
        server = uvicorn.Server(uvicorn.Config(dashboard.guard, log_config=None, lifespan="off", ws="none"))
        thread = threading.Thread(target=server.run, args=[[listener]])
        thread.start()
        yield f"http://127.0.0.1:{listener.getsockname()[1]}{dashboard.path}"
        server.should_exit = True
        thread.join()


def test_a_steward_sees_what_was_spent_and_refused_and_copies_what_stops_it(browser, still, tmp_path):
    toml = made_up(tmp_path, run=HOSTILE)
    with served(lambda: figures(toml, None), "silo.html.j2") as address:
        page = browser.open(address)
        assert page.text("h1") == "Silo north"
        assert f"{2 * PLAN.terms.epsilon:.4g}" in page.text("#budget")
        assert REASON in page.text("#refused")
        assert page.text("#runs tr:nth-child(2) td:nth-child(2)") == HOSTILE.replace("\u202e", r"\u202e")
        page.click("#runs code")  # one press marks the whole command, for the clipboard
        stop = figures(toml, None)["runs"][0]["stop"]
        assert page.run("getSelection().toString().trim()") == stop
        assert page.run("document.scripts.length") == 0
        assert page.run("getComputedStyle(document.querySelector('.number')).textAlign") == "right"  # its style holds
        assert (set(page.requests), page.troubles) == ({address}, [])


def test_a_coordinator_sees_a_site_that_is_down_and_one_that_refuses(browser, still):
    with served(lambda: FEDERATION, "federation.html.j2") as address:
        page = browser.open(address)
        said = page.text("#sites")
        for words in ("north\tup", "down\tits relay is not connected", f"refuses\trefused at 3: {HOSTILE[:-1]}"):
            assert words in said
        colours = page.run("[...document.querySelectorAll('#sites span')].map(one => getComputedStyle(one).color)")
        assert colours[1] == colours[2] != colours[0]
        assert "61.5 s" in page.text("#pace")
        assert (set(page.requests), page.troubles) == ({address}, [])


def test_the_page_looks_again_by_itself(browser, monkeypatch):
    monkeypatch.setattr(pages, "REFRESH_S", 1)
    looks = threading.Semaphore(0)

    def look():
        looks.release()
        return FEDERATION

    with served(look, "federation.html.j2") as address:
        browser.send("Target.createTarget", url=address)
        for _ in range(3):
            assert looks.acquire(timeout=WAIT_S)
