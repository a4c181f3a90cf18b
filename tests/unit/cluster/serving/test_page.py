"""The page for people, as far as HTTP shows it: it is there, whole in itself, and its policy lets in nothing else."""

import re
import tomllib
from base64 import b64encode
from hashlib import sha256
from html.parser import HTMLParser
from pathlib import Path

import pytest
from service_client import ask

from cluster.serving.app import Service
from cluster.serving.keys import ApiKeys
from trainer.inference.batching import Engine, EngineLimits

REPOSITORY = Path(__file__).parents[4]


class Elements(HTMLParser):
    """All elements of a page with their attributes."""

    def __init__(self, text):
        super().__init__()
        self.found = []
        self.feed(text)

    def handle_starttag(self, tag, attributes):
        self.found.append((tag, dict(attributes)))


@pytest.fixture(scope="module")
def served(tmp_path_factory):
    """The response of a service that asks for keys, without one."""
    path = tmp_path_factory.mktemp("keys") / "keys"
    path.write_text("key-of-the-clinic-0001\n")
    path.chmod(0o600)
    engine = Engine({}, EngineLimits(1, 1, 1))
    service = Service({}, engine, ApiKeys(path), 5, 2)
    (response,) = ask(service, ("GET", "/", {}))
    engine.close()
    return response


def inside(response, element):
    (found,) = re.findall(rf"<{element}>(.*?)</{element}>", response.text, re.DOTALL)
    return found


def test_it_is_served_to_whoever_comes_and_kept_nowhere(served):
    assert served.status_code == 200
    assert served.headers["content-type"] == "text/html; charset=utf-8"
    assert served.headers["cache-control"] == "no-store"
    assert served.headers["referrer-policy"] == "no-referrer"
    assert "key-of-the-clinic" not in served.text


def test_its_policy_lets_in_its_own_script_and_style_and_nothing_else(served):
    policy = dict(part.strip().split(" ", 1) for part in served.headers["content-security-policy"].split(";"))
    expected = dict.fromkeys(("default-src", "base-uri", "form-action", "frame-ancestors"), "'none'")
    for element in ("script", "style"):
        digest = b64encode(sha256(inside(served, element).encode()).digest()).decode()
        expected[f"{element}-src"] = f"'sha256-{digest}'"
    assert policy == {**expected, "connect-src": "'self'"}


def test_it_needs_nothing_from_elsewhere(served):
    assert "//" not in re.sub(r"^\s*// .*$", "", served.text, flags=re.MULTILINE)
    assert not re.search(r"@import|url\(|import\s*\(", served.text)
    for tag, attributes in Elements(served.text).found:
        assert tag not in {"link", "img", "iframe", "object", "embed", "base"}
        # The policy would forbid handlers and styles in attributes, too.
        assert not [name for name in attributes if name in {"src", "href", "action", "style"} or name.startswith("on")]


def test_what_it_shows_is_put_in_as_text_and_what_it_is_told_is_not_stored(served):
    script = inside(served, "script")
    markup = r"innerHTML|outerHTML|insertAdjacentHTML|document\.write|\beval\b|Function\(|setHTML|DOMParser|srcdoc"
    assert not re.search(markup, script)
    assert not re.search(r"localStorage|sessionStorage|cookie|indexedDB|location", script)


def test_it_asks_at_the_services_own_paths_and_finds_its_own_elements(served):
    script = inside(served, "script")
    assert set(re.findall(r'ask\("(.*?)"', script)) == {"/v1/models", "/v1/chat/completions", "/predict", "/explain"}
    known = {attributes["id"] for _, attributes in Elements(served.text).found if "id" in attributes}
    assert set(re.findall(r'at\("(.*?)"\)', script)) == known


def test_a_wheel_holds_it():
    data = tomllib.loads((REPOSITORY / "pyproject.toml").read_text())["tool"]["setuptools"]["package-data"]
    assert "*.html" in data["cluster.serving"]
