"""A coordinator whose address is not where its proxy listens: nginx itself behind NAT, and behind what ends TLS."""

import threading
from contextlib import contextmanager

import pytest
from lines import Forwarder, TlsEnder
from ports import free_port
from typer.testing import CliRunner

from configs.errors import InputError
from configs.parse import parse
from configs.schema.deployment import FederationConfig
from federated.commands.federation import federation_app
from federated.deployment.federation_folder import FederationFolder
from federated.deployment.line.coordinator_check import check_coordinator
from federated.deployment.proxy import proxy
from federated.deployment.supervisor import Supervisor
from federated.identity.cards import CoordinatorCard, fingerprint, read_document
from federated.identity.keys import load_or_create_key
from federated.identity.x509 import CURVE, Authority

HOST = "inside.example"


@contextmanager
def served(folder, **given):
    """A federation whose nginx runs, and which nobody at a silo's side knows the own host and port of."""
    port = free_port()
    config = FederationConfig(name="net", hosts=(HOST,), port=port, listen="127.0.0.1", **given)
    federation = FederationFolder.create(folder, config)
    ready, ended = threading.Event(), threading.Event()
    supervisor = Supervisor(federation.state, [proxy(federation, 1)])
    thread = threading.Thread(target=supervisor.run, args=(ended, ready.set, lambda: None))
    thread.start()
    try:
        assert ready.wait(300)
        yield federation
    finally:
        ended.set()
        thread.join(300)


def test_a_forwarded_port(tmp_path):
    with Forwarder() as nat, served(tmp_path / "f", advertise=f"localhost:{nat.port}") as federation:
        nat.target = federation.config.port
        card = read_document(CoordinatorCard, federation.card_file)
        assert card.address == f"localhost:{nat.port}"
        assert check_coordinator(card, None).ahead_s is not None  # the certificate is for that name, too
        assert nat.up > 0 and nat.down > 0


def test_tls_that_a_load_balancer_ends(tmp_path):
    """Silos are told its authority, and it knows the federation's."""
    authority = Authority(tmp_path / "lb-ca.key", tmp_path / "lb-ca.pem", "provider authority")
    key = load_or_create_key(tmp_path / "lb.key", CURVE).public_key()
    authority.issue(tmp_path / "lb.pem", key, "balancer", ["localhost"], "server")
    root = tmp_path / "f" / "certificates" / "ca.pem"
    given = {"advertise": f"localhost:{free_port()}", "advertise_authority": str(authority.path)}
    with served(tmp_path / "f", **given) as federation:
        card = read_document(CoordinatorCard, federation.card_file)
        assert card.root_certificate == authority.path.read_text()
        with TlsEnder(tmp_path / "lb.pem", tmp_path / "lb.key", federation.config.port, root, HOST) as balancer:
            outside = card.model_copy(update={"address": f"localhost:{balancer.port}"})
            assert check_coordinator(outside, None).ahead_s is not None
            own = outside.model_copy(update={"root_certificate": root.read_text()})
            with pytest.raises(InputError, match="of another authority"):
                check_coordinator(own, None)


def test_settings_that_change_rewrite_what_silos_get(tmp_path):
    config = FederationConfig(name="net", hosts=(HOST,))
    federation = FederationFolder.create(tmp_path / "f", config)
    assert federation.card.address == f"{HOST}:9092"
    before = fingerprint(federation.card)
    assert not FederationFolder(tmp_path / "f").renew_card()
    settings = tmp_path / "f" / "federation.toml"
    settings.write_text(settings.read_text().replace('advertise = ""', 'advertise = "fed.example.org:443"'))
    changed = FederationFolder(tmp_path / "f")
    assert changed.renew_card() and not changed.renew_card()
    card = read_document(CoordinatorCard, federation.card_file)
    assert (card.address, card.public_key) == ("fed.example.org:443", federation.card.public_key)
    assert fingerprint(card) != before
    federation.card_file.write_text("damaged")
    assert changed.renew_card()


def test_the_command_writes_it(tmp_path):
    given = ["init", str(tmp_path / "f"), "--name", "net", "--host", HOST, "--advertise", "[2001:db8::1]:443"]
    assert CliRunner().invoke(federation_app, given).exception is None
    assert read_document(CoordinatorCard, tmp_path / "f" / "coordinator.json").address == "[2001:db8::1]:443"


@pytest.mark.parametrize(
    ("given", "said"),
    [
        ({"advertise": "fed.example.org"}, "advertise is 'fed.example.org': give HOST:PORT"),
        ({"advertise": "0.0.0.0:443"}, "advertise is '0.0.0.0': nobody can connect"),
        ({"advertise": "https://fed.example.org:443"}, "advertise is "),
        ({"advertise_authority": "/ca.pem"}, "advertise_authority is given and advertise is not"),
    ],
)
def test_what_is_no_address(given, said):
    with pytest.raises(InputError, match=said):
        parse(FederationConfig, {"name": "n", "hosts": ["h"], **given}, "federation.toml")


@pytest.mark.parametrize(("content", "said"), [(b"no pem", "no certificate in PEM"), (None, "can't be read")])
def test_an_authority_that_is_none(tmp_path, content, said):
    if content is not None:
        (tmp_path / "ca.pem").write_bytes(content)
    given = {"advertise": "h:443", "advertise_authority": str(tmp_path / "ca.pem")}
    with pytest.raises(InputError, match=said):
        FederationFolder.create(tmp_path / "f", FederationConfig(name="net", hosts=(HOST,), **given))
