"""Mutual TLS between a silo's service and its relay: real handshakes with good and bad certificates on both sides."""

from datetime import UTC, datetime, timedelta

import grpc
import pytest
from cryptography import x509
from silo_requests import COORDINATOR, TRUSTED, body_of, opened

import federated.identity.x509 as module
from configs.errors import InputError
from configs.schema.silo import SiloConfig
from federated.identity.keys import load_or_create_key
from federated.identity.x509 import CURVE, Authority, check_x509, days_left, read_certificate
from federated.protocol import silo_pb2 as pb
from federated.protocol.envelope import seal_request
from federated.silo.silo import Silo
from federated.transport.service import ServiceTls, serve
from federated.transport.service_client import AUTHORITY, CERTIFICATE, KEY, ask_service

BODY = body_of("who", silo_id="", describe=pb.Describe())


@pytest.fixture
def silo(tmp_path, tiny_model):
    (tmp_path / "data.jsonl").write_text('{"text": "a note of the ward"}\n' * 100)
    config = SiloConfig(
        silo={
            "id": "north",
            "dataset_id": "ward",
            "state_dir": str(tmp_path / "state"),
            "base_model": str(tiny_model),
            "public_record_count": 100,
        },
        data={"source": str(tmp_path / "data.jsonl")},
        policy={"budget_epsilon": 8.0, "budget_delta": 1e-4},
    )
    silo = Silo(config, TRUSTED)
    yield silo
    silo.close()


class Pki:
    """A silo's authority, and certificates that it, or another one, gives out."""

    def __init__(self, folder, monkeypatch):
        self.folder, self._monkeypatch = folder, monkeypatch
        self.ours = Authority(folder / "ca.key", folder / "ca.crt", "ours")
        self.foreign = Authority(folder / "foreign.key", folder / "foreign.crt", "foreign")

    def issue(self, name, purpose, hosts=("localhost",), authority=None, days=None):
        key = load_or_create_key(self.folder / f"{name}.key", CURVE)
        with self._monkeypatch.context() as patch:
            if days is not None:
                patch.setattr(module, "CERTIFICATE_DAYS", days)
                patch.setattr(module, "SKEW", timedelta(days=3))
            path = self.folder / f"{name}.crt"
            (authority or self.ours).issue(path, key.public_key(), name, hosts, purpose)
        return (self.folder / f"{name}.key").read_bytes(), path.read_bytes()

    def relay_folder(self, name, pair, authority=None):
        folder = self.folder / name
        folder.mkdir()
        for file, content in zip((KEY, CERTIFICATE), pair, strict=True):
            (folder / file).write_bytes(content)
        (folder / AUTHORITY).write_bytes((authority or self.ours).path.read_bytes())
        return str(folder)


@pytest.fixture
def pki(tmp_path, monkeypatch):
    return Pki(tmp_path, monkeypatch)


def ask(silo, pki, service, relay_folder):
    """A relay's question over TLS; the service shows the pair that is given."""
    server, port = serve(
        silo.handle,
        silo.config.policy.max_request_bytes,
        "127.0.0.1:0",
        ServiceTls(*service, pki.ours.path.read_bytes()),
    )
    try:
        content = seal_request(COORDINATOR, BODY)
        answer = ask_service(f"localhost:{port}", content, tls_folder=relay_folder, timeout_s=120)
        return opened(answer, silo).WhichOneof("kind")
    except grpc.RpcError as error:
        return error.code()
    finally:
        server.stop(None).wait()


NEVER = (grpc.StatusCode.UNAVAILABLE, grpc.StatusCode.DEADLINE_EXCEEDED)


def test_good_certificates_on_both_sides_reach_the_silo(silo, pki):
    relay = pki.relay_folder("relay-folder", pki.issue("relay", "client", ("relay",)))
    assert ask(silo, pki, pki.issue("service", "server"), relay) == "described"


@pytest.mark.parametrize(
    ("case", "changes"),
    [
        ("of another authority", {"authority": "foreign"}),
        ("expired", {"days": -1}),
        ("of a server, not of a client", {"purpose": "server"}),
    ],
)
def test_a_relay_whose_certificate_is_not_good_gets_nothing(silo, pki, case, changes):
    changes = {"purpose": "client", "hosts": ("relay",), **changes}
    if "authority" in changes:
        changes["authority"] = pki.foreign
    relay = pki.relay_folder("relay-folder", pki.issue("relay", **changes))
    assert ask(silo, pki, pki.issue("service", "server"), relay) in NEVER, case


@pytest.mark.parametrize(
    ("case", "changes"),
    [
        ("of another authority", {"authority": "foreign"}),
        ("expired", {"days": -1}),
        ("for another host", {"hosts": ("elsewhere.example",)}),
        ("of a client, not of a server", {"purpose": "client"}),
    ],
)
def test_a_relay_tells_nothing_to_a_service_whose_certificate_is_not_good(silo, pki, case, changes):
    if "authority" in changes:
        changes = {"authority": pki.foreign}
    service = pki.issue("service", **{"purpose": "server", **changes})
    relay = pki.relay_folder("relay-folder", pki.issue("relay", "client", ("relay",)))
    assert ask(silo, pki, service, relay) in NEVER, case


def test_a_caller_without_a_certificate_or_without_tls_gets_nothing(silo, pki):
    tls = ServiceTls(*pki.issue("service", "server"), pki.ours.path.read_bytes())
    server, port = serve(silo.handle, silo.config.policy.max_request_bytes, "127.0.0.1:0", tls)
    try:
        credentials = grpc.ssl_channel_credentials(pki.ours.path.read_bytes())
        with grpc.secure_channel(f"localhost:{port}", credentials) as channel, pytest.raises(grpc.RpcError):
            channel.unary_unary("/siloweave.v1.Silo/Exchange")(b"", timeout=5)
        with pytest.raises(grpc.RpcError):
            ask_service(f"localhost:{port}", seal_request(COORDINATOR, BODY), timeout_s=3)
    finally:
        server.stop(None).wait()


@pytest.mark.parametrize(
    ("changes", "host", "said"),
    [
        (
            {"authority": "foreign"},
            None,
            r"of another authority \(CN=foreign\) than .* \(CN=ours\)",
        ),
        ({"days": -1}, None, "renew it, or set this machine's clock"),
        ({}, "elsewhere.example", "is for localhost, not for elsewhere.example"),
    ],
)
def test_a_bad_certificate_is_one_clear_line(pki, changes, host, said):
    if "authority" in changes:
        changes = {"authority": pki.foreign}
    pki.issue("service", "server", **changes)
    certificate = read_certificate(pki.folder / "service.crt")
    with pytest.raises(InputError, match=said) as caught:
        check_x509(certificate, pki.ours.certificate, "localhost:1", host)
    assert "\n" not in str(caught.value)


def test_a_certificate_is_renewed_in_its_last_month_and_not_before(pki):
    first = pki.issue("service", "server")[1]
    assert pki.issue("service", "server")[1] == first
    assert days_left(read_certificate(pki.folder / "service.crt")) == module.CERTIFICATE_DAYS - 1
    assert pki.issue("service", "server", ("localhost", "127.0.0.1"))[1] != first  # another host
    last_month = pki.issue("soon", "server", days=module.RENEW_DAYS - 1)[1]
    assert pki.issue("soon", "server")[1] != last_month


def test_an_authority_signs_no_other_authorities(pki):
    constraints = pki.ours.certificate.extensions.get_extension_for_class(x509.BasicConstraints)
    assert (constraints.value.ca, constraints.value.path_length, constraints.critical) == (True, 0, True)
    pki.issue("service", "server")
    issued = read_certificate(pki.folder / "service.crt")
    assert not issued.extensions.get_extension_for_class(x509.BasicConstraints).value.ca
    assert issued.not_valid_before_utc < datetime.now(UTC)
