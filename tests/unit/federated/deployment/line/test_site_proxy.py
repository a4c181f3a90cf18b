"""A site's HTTP proxy: its settings, its login, and what Flower's own client makes of it."""

import httpx
import pytest
from flwr.supernode.fleet_http_client import FleetHttpClient
from lines import ConnectProxy, TlsServer
from ports import free_port

from configs.errors import InputError
from configs.parse import parse
from configs.schema.deployment import RelayConfig
from federated.deployment.line.site_proxy import SiteProxy, site_proxy
from federated.identity.keys import load_or_create_key
from federated.identity.x509 import CURVE, Authority
from federated.transport.health import is_serving

RELAY = {"state_dir": "/s", "coordinator": "/c", "coordinator_fingerprint": "x", "silo_address": "unix:/none"}
LOGIN = "north:s3cret: with @ signs/ü"
FILE = f"{LOGIN}\n".encode()


def settings(**given):
    return parse(RelayConfig, {**RELAY, **given}, "relay.toml")


def login_file(folder, content=FILE, mode=0o600):
    path = folder / "login"
    path.write_bytes(content)
    path.chmod(mode)
    return str(path)


def test_a_site_without_a_proxy():
    assert site_proxy(settings()) is None


@pytest.mark.parametrize("text", ["http://proxy.example:3128", "http://[::1]:3128/", "http://10.0.0.1:80"])
def test_proxies(text):
    assert str(site_proxy(settings(proxy=text))) == text.rstrip("/")


@pytest.mark.parametrize(
    "text", ["proxy:3128", "https://proxy:3128", "http://proxy", "http://pro xy:1", "http://p:1/x", "socks5://p:1"]
)
def test_what_is_no_proxy(text):
    with pytest.raises(InputError, match="proxy is "):
        settings(proxy=text)


def test_a_password_in_the_settings_is_refused_and_not_repeated():
    with pytest.raises(InputError, match="write USER:PASSWORD into a file of mode 0600") as raised:
        settings(proxy="http://north:s3cret@proxy:3128")
    assert "s3cret" not in str(raised.value)


def test_a_login_without_a_proxy():
    with pytest.raises(InputError, match="proxy_login_file is given and proxy is not"):
        settings(proxy_login_file="/login")


def test_a_login_is_in_no_text_of_its_proxy(tmp_path):
    proxy = site_proxy(settings(proxy="http://p:1", proxy_login_file=login_file(tmp_path)))
    assert proxy.login == LOGIN
    assert "s3cret" not in f"{proxy} {proxy!r}"


@pytest.mark.parametrize(
    "content", [b"", b"\n", b"north", b":s3cret", b"a:s3cret\nb:s3cret", b"\xff:s3cret", b"a\0:s3cret"]
)
def test_a_file_without_a_login(tmp_path, content):
    given = settings(proxy="http://p:1", proxy_login_file=login_file(tmp_path, content))
    with pytest.raises(InputError, match="does not hold USER:PASSWORD on one line") as raised:
        site_proxy(given)
    assert "s3cret" not in str(raised.value)


def test_a_login_that_others_may_read_and_one_that_is_missing(tmp_path):
    given = settings(proxy="http://p:1", proxy_login_file=login_file(tmp_path, mode=0o644))
    with pytest.raises(InputError, match="mode 644 lets others read it"):
        site_proxy(given)
    with pytest.raises(InputError, match="no such file; write USER:PASSWORD into it, mode 0600"):
        site_proxy(settings(proxy="http://p:1", proxy_login_file=str(tmp_path / "none")))


def test_flowers_client_takes_the_environment_and_nothing_that_speaks_grpc_does(tmp_path, monkeypatch):
    """The SuperNode's own client over real TLS; a server of gRPC at this site is not looked for behind the proxy."""
    authority = Authority(tmp_path / "ca.key", tmp_path / "ca.pem", "net authority")
    key = load_or_create_key(tmp_path / "server.key", CURVE).public_key()
    authority.issue(tmp_path / "server.pem", key, "net", ["localhost", "127.0.0.1"], "server")
    with ConnectProxy(login=LOGIN) as proxy, TlsServer(tmp_path / "server.pem", tmp_path / "server.key") as server:
        for name, value in SiteProxy(f"127.0.0.1:{proxy.port}", LOGIN).environment().items():
            monkeypatch.setenv(name, value)
        for host, asked in (("127.0.0.1", []), ("localhost", [f"localhost:{server.port}"])):
            client = FleetHttpClient.from_server_address(f"{host}:{server.port}", False, str(authority.path), ())
            with client, pytest.raises(httpx.HTTPStatusError, match="403 Forbidden"):
                client.PullMessages(_nothing())
            assert proxy.asked == asked
        assert not is_serving(f"localhost:{free_port()}")
        monkeypatch.setenv("http_proxy", f"http://127.0.0.1:{proxy.port}")
        assert not is_serving(f"localhost:{free_port()}")
        assert proxy.asked == asked


def _nothing():
    from flwr.proto.fleet_pb2 import PullMessagesRequest

    return PullMessagesRequest()
