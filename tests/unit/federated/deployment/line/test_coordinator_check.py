"""The way to a coordinator, over real sockets and real TLS: what is said of each thing that may be wrong on it."""

import socket

import pytest
from lines import ConnectProxy, TlsEnder, TlsServer
from ports import free_port

from configs.errors import InputError
from federated.deployment.line.coordinator_check import check_coordinator
from federated.deployment.line.site_proxy import SiteProxy, UnreachableError
from federated.identity.cards import CoordinatorCard
from federated.identity.keys import load_or_create_key
from federated.identity.x509 import CERTIFICATE_DAYS, CURVE, Authority

LOGIN = "north:s3cret: with @ signs/"


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Two authorities, each with a certificate for localhost."""
    folder = tmp_path_factory.mktemp("line")
    for name in ("net", "inspector"):
        authority = Authority(folder / f"{name}-ca.key", folder / f"{name}-ca.pem", f"{name} authority")
        key = load_or_create_key(folder / f"{name}.key", CURVE).public_key()
        authority.issue(folder / f"{name}.pem", key, name, ["localhost"], "server")
    return folder


@pytest.fixture
def coordinator(folder):
    with TlsServer(folder / "net.pem", folder / "net.key") as server:
        yield server


def card(folder, port, authority="net"):
    root = (folder / f"{authority}-ca.pem").read_text()
    return CoordinatorCard(name="net", public_key="0" * 64, address=f"localhost:{port}", root_certificate=root)


def through(proxy, login=""):
    return SiteProxy(f"127.0.0.1:{proxy.port}", login)


def refused(kind, *given):
    with pytest.raises(kind) as raised:
        check_coordinator(*given)
    said = str(raised.value)
    assert raised.value.__suppress_context__ or not raised.value.__context__
    assert "\n" not in said and "s3cret" not in said
    return said


def test_a_coordinator_is_reached_directly_and_through_a_proxy(folder, coordinator):
    known = card(folder, coordinator.port)
    way = check_coordinator(known, None)
    assert way.certificate_days_left == CERTIFICATE_DAYS - 1
    assert way.ahead_s is not None
    with ConnectProxy(login=LOGIN) as proxy:
        assert check_coordinator(known, through(proxy, LOGIN)).certificate_days_left == CERTIFICATE_DAYS - 1
        assert proxy.asked == [f"localhost:{coordinator.port}"]
        assert proxy.up > 0 and proxy.down > 0


def test_ambient_proxies_count_for_nothing(folder, coordinator, monkeypatch):
    for name in ("HTTPS_PROXY", "https_proxy", "ALL_PROXY", "http_proxy", "grpc_proxy"):
        monkeypatch.setenv(name, f"http://127.0.0.1:{free_port()}")
    check_coordinator(card(folder, coordinator.port), None)


def test_a_proxy_that_is_not_there(folder, coordinator):
    proxy = SiteProxy(f"127.0.0.1:{free_port()}", LOGIN)
    said = refused(UnreachableError, card(folder, coordinator.port), proxy)
    assert said == f"proxy {proxy}: not reachable (Connection refused); is this its address?"


def test_a_proxy_that_asks_for_a_login(folder, coordinator):
    known = card(folder, coordinator.port)
    with ConnectProxy(login=LOGIN) as proxy:
        assert (
            "asks for a login (407 Proxy Authentication Required); give USER:PASSWORD by proxy_login_file"
            in refused(InputError, known, through(proxy))
        )
        said = refused(InputError, known, through(proxy, "north:old s3cret"))
        assert "refuses the login (407 Proxy Authentication Required); set the login in proxy_login_file" in said
        assert proxy.asked == []
    with ConnectProxy(login=LOGIN, scheme="Negotiate") as proxy:
        assert "asks for a login that is not Basic (407" in refused(InputError, known, through(proxy))


@pytest.mark.parametrize(
    ("status", "kind", "words"),
    [
        (403, InputError, "refuses to connect to localhost:PORT (403 Forbidden); have whoever runs it allow CONNECT"),
        (302, InputError, "refuses to connect to localhost:PORT (302 Found)"),
        (502, UnreachableError, "does not reach the coordinator at localhost:PORT (502 Bad Gateway)"),
        (599, UnreachableError, "does not reach the coordinator at localhost:PORT (599)"),
    ],
)
def test_a_proxy_that_does_not_connect(folder, coordinator, status, kind, words):
    with ConnectProxy(refuses=status) as proxy:
        said = refused(kind, card(folder, coordinator.port), through(proxy))
        assert said.startswith(f"proxy http://127.0.0.1:{proxy.port}: ")
        assert words.replace("PORT", str(coordinator.port)) in said


def test_a_proxy_that_inspects_tls_is_named_with_its_issuer(folder, coordinator):
    with (
        TlsServer(folder / "inspector.pem", folder / "inspector.key") as inspector,
        ConnectProxy(inspected_by=inspector.port) as proxy,
    ):
        said = refused(InputError, card(folder, coordinator.port), through(proxy))
    assert "inspects TLS: the certificate that comes back" in said
    assert "is by CN=inspector authority, not by the confirmed authority (CN=net authority)" in said


def test_a_coordinator_that_is_not_there(folder):
    port = free_port()
    said = refused(UnreachableError, card(folder, port), None)
    assert said == f"localhost:{port}: the coordinator is not reachable (Connection refused)"


def test_what_is_no_proxy_and_what_is_no_coordinator(folder, coordinator):
    """Another TLS server as a proxy, and a proxy as a coordinator: neither speaks what is asked of it."""
    said = refused(UnreachableError, card(folder, coordinator.port), through(coordinator))
    assert "gives no answer that HTTP has" in said
    with ConnectProxy() as other:
        assert "does not answer by TLS" in refused(UnreachableError, card(folder, other.port), None)


@pytest.mark.parametrize(("ahead_s", "good"), [(0, True), (250, True), (-3, True), (-60, False), (400, False)])
def test_clocks_that_flower_would_refuse(folder, ahead_s, good):
    """The coordinator's clock: a SuperNode may be far behind it, and hardly ahead."""
    with TlsServer(folder / "net.pem", folder / "net.key", ahead_s) as server:
        known = card(folder, server.port)
        if good:
            found = check_coordinator(known, None).ahead_s
            assert found == pytest.approx(-ahead_s, abs=60)
        else:
            assert "set the one that is wrong; Flower turns a SuperNode away that is 5 s" in refused(
                InputError, known, None
            )


def test_the_bounds_of_clocks_are_flowers():
    from flwr.common.constant import SYSTEM_TIME_TOLERANCE, TIMESTAMP_TOLERANCE

    from federated.protocol.clocks import MOST_AHEAD_S, MOST_BEHIND_S

    assert (MOST_AHEAD_S, MOST_BEHIND_S) == (SYSTEM_TIME_TOLERANCE, TIMESTAMP_TOLERANCE + SYSTEM_TIME_TOLERANCE)


def test_a_document_without_a_certificate(folder):
    broken = card(folder, 1).model_copy(update={"root_certificate": "-----BEGIN CERTIFICATE-----\nx\n"})
    assert "its root_certificate is none in PEM" in refused(InputError, broken, None)


def test_a_coordinator_that_breaks_off(folder):
    with socket.create_server(("127.0.0.1", 0)) as listening, ConnectProxy() as proxy:
        proxy.cut_after = 0
        port = listening.getsockname()[1]
        assert "does not answer by TLS" in refused(UnreachableError, card(folder, port), through(proxy))


def test_a_load_balancer_that_ends_tls_with_its_own_certificate(folder, coordinator):
    """What silos are told to trust is then the authority of that certificate."""
    certificate, key = folder / "inspector.pem", folder / "inspector.key"
    with TlsEnder(certificate, key, coordinator.port, folder / "net-ca.pem", "localhost") as balancer:
        assert check_coordinator(card(folder, balancer.port, "inspector"), None).ahead_s is not None
        assert "of another authority" in refused(InputError, card(folder, balancer.port), None)
