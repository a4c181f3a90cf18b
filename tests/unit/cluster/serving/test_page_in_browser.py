"""The page for people in a real browser: what they see, press and read, with a service behind it."""

import threading
from contextlib import contextmanager

import pytest
import uvicorn
from chromium import Chromium, needs_chromium
from served_models import CONTEXT, a_labelling_run, a_model
from service_client import ask

from cluster.serving.app import Service
from cluster.serving.keys import ApiKeys
from cluster.serving.models import ServedModel, find, load
from cluster.serving.requests import ChatRequest
from cluster.serving.server import listen
from trainer.inference.batching import Engine, EngineLimits

pytestmark = needs_chromium
KEY = "key-of-the-clinic-0001"
AUTHORISED = {"authorization": f"Bearer {KEY}"}
SEED = 3
MARKUP = "<img src=/x onerror=alert(1)><b>the old ship</b>"


@contextmanager
def over_http(service):
    """The address of a service, in a thread of this process."""
    with listen("127.0.0.1", 0, 60) as listener:
        server = uvicorn.Server(uvicorn.Config(service.guard, log_config=None, lifespan="off", ws="none"))
        thread = threading.Thread(target=server.run, args=[[listener]])
        thread.start()
        yield f"http://127.0.0.1:{listener.getsockname()[1]}"
        server.should_exit = True
        thread.join()


@pytest.fixture(scope="module")
def service(tmp_path_factory):
    folder = tmp_path_factory.mktemp("models")
    base = a_model(folder / "ship")
    run, _, _ = a_labelling_run(folder / "reviews", base, "classification", ("bad", "good"))
    served = load([find(str(place), None) for place in (base, run)], None)
    writing = {name: one.voice for name, one in served.items() if isinstance(one, ServedModel)}
    engine = Engine(writing, EngineLimits(2, 2 * CONTEXT, 2))
    keys = folder / "keys"
    keys.write_text(KEY)
    keys.chmod(0o600)
    yield Service(served, engine, ApiKeys(keys), 300, 4)
    engine.close()


@pytest.fixture(scope="module")
def browser_at(service):
    with over_http(service) as url, Chromium() as browser:
        yield browser, url


@pytest.fixture
def page(browser_at, monkeypatch):
    """The page, open and with a key; whatever a test does there, nothing may go wrong unseen."""
    browser, url = browser_at
    monkeypatch.setattr("cluster.serving.requests.secrets.randbits", lambda _: SEED)  # the page asks for no seed
    monkeypatch.setattr(ChatRequest, "most", property(lambda _: 20))  # nor for a short answer
    page = browser.open(url)
    page.wait_for("the API key is missing or wrong", "#log .error")
    page.troubles.clear()  # the browser notes that 401
    page.write("#key", KEY)
    page.click("h1")  # leaves the field
    page.wait("document.querySelectorAll('#models option').length === 2")
    yield page
    assert page.troubles == []
    assert {address.removeprefix(url).split("/")[0] for address in page.requests} == {""}, page.requests


def said(page, kind):
    return page.run(f"[...document.querySelectorAll('#log .{kind}')].map(line => line.textContent)")


def answers(page, number):
    """What the model has said, once that many answers are whole."""
    page.wait(
        f"document.querySelectorAll('#log .model').length === {number} && !document.querySelector('#send').disabled"
    )
    return said(page, "model")


def test_a_person_talks_to_a_model_and_reads_what_is_claimed_of_it(page, service, tmp_path):
    assert page.text("#privacy").startswith("Privacy: no certificate lies with this model")
    page.write("#fields textarea", "the red ship")
    page.click("#send")
    (first,) = answers(page, 1)
    asked = {"model": "ship", "messages": [{"role": "user", "content": "the red ship"}]}
    (found,) = ask(service, ("POST", "/v1/chat/completions", {"json": asked, "headers": AUTHORISED}))
    assert first == found.json()["choices"][0]["message"]["content"] != ""
    page.write("#fields textarea", MARKUP)
    page.click("#send")
    assert answers(page, 2)[0] == first
    assert said(page, "user") == ["the red ship", MARKUP]  # as text
    assert page.run("document.querySelectorAll('#log img, #log b').length") == 0
    page.screenshot(tmp_path / "page.png")
    assert (tmp_path / "page.png").read_bytes().startswith(b"\x89PNG")
    page.click("#again")
    assert page.text("#log") == ""


def test_stop_ends_an_answer_and_frees_its_slot(page, service):
    # A stream that stands still after its first piece: the page can only be waiting for more.
    going, go = threading.Event(), threading.Event()
    submit = service._engine.submit

    def slowly(voice, ids, how, on_output, *, continued):
        def came(output):
            on_output(output)
            if output.text and not output.finish:
                going.set()
                go.wait(300)

        return submit(voice, ids, how, came, continued=continued)

    service._engine.submit = slowly
    try:
        page.write("#fields textarea", "the red ship")
        page.click("#send")
        assert going.wait(300)
        page.click("#stop")
        page.wait("!document.querySelector('#send').disabled")
        while service.guard.active:
            pass
    finally:
        go.set()
        del service._engine.submit
    while service._engine.running:
        pass
    assert said(page, "error") == []


def test_a_record_is_labelled_and_its_words_are_coloured(page, service):
    page.choose("#models", "reviews")
    assert page.run("[...document.querySelectorAll('#fields textarea')].map(area => area.name)") == ["text"]
    page.write("#fields textarea", "the old ship sails")
    page.click("#send")
    (shown,) = answers(page, 1)
    given = {"model": "reviews", "records": [{"text": "the old ship sails"}]}
    (found,) = ask(service, ("POST", "/predict", {"json": given, "headers": AUTHORISED}))
    (expected,) = found.json()["predictions"]
    assert shown.split("\n")[0] == expected["answer"]
    assert [line.split(": ")[0] for line in shown.split("\n")[1:]] == ["bad", "good"]
    page.click("#log .words button")
    page.wait("document.querySelectorAll('#log .words span').length > 0")
    words = page.run("[...document.querySelectorAll('#log .words span')].map(one => [one.textContent, one.title])")
    assert "".join(word for word, _ in words).strip() == "the old ship sails"
    assert all(title.endswith(" nats") for _, title in words)
    colours = page.run("[...document.querySelectorAll('#log .words span')].map(one => one.style.background)")
    assert all(colour.startswith(("rgba(42, 111, 219", "rgba(232, 131, 42", "rgb(")) for colour in colours)


def test_a_refusal_is_shown_and_the_dialogue_goes_on(page, service):
    page.run("document.querySelector('#fields textarea').value = 'ship '.repeat(3000)")
    page.click("#send")
    page.wait_for("shorten one of them", "#log .error")
    page.troubles.clear()  # the browser notes that 400
    page.run("document.querySelector('#fields textarea').value = 'the red ship'")
    page.click("#send")
    page.wait("[...document.querySelectorAll('#log .model')].some(line => line.textContent)")
    answers(page, 1)
