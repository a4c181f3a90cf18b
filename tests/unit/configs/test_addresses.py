"""Hosts, ports and addresses are refused where they enter, in one line, and before anything is made for them."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

import siloweave
from configs.errors import InputError
from configs.parse import parse
from configs.schema.addresses import check_address, check_host, check_reachable, check_service, join_address
from configs.schema.deployment import FederationConfig, RelayConfig
from federated.identity.cards import CoordinatorCard

HOSTS = ["localhost", "fed.example.org", "a", "x" * 63, ".".join(["x" * 63] * 3), "10.0.0.1", "::1", "2001:db8::7"]
HOSTS += ["xn--bcher-kva.example", "3com.com", "a--b.c", "::ffff:10.0.0.1"]
NO_HOSTS = ["", " ", "a b", "a\n", "-a", "a-", ".a", "a.", "a..b", "a_b", "x" * 64, ".".join(["x" * 63] * 4)]
NO_HOSTS += ["1.2.3", "1.2.3.256", "256", "01.2.3.4", "[::1]", "::1%lo", ":::", "bücher.example", "a/b", "https://a"]
NO_HOSTS += [
    "a:1",
    'a"',
    "a;",
    "$host",
    "{",
    "a\0",
    "0x7f.1",
    "1.0x7f",
    "\u0661.\u0662.\u0663",
    "unix:/s",
    "\ud800",
    "*",
]
RELAY = {"state_dir": "/a", "coordinator": "/b", "coordinator_fingerprint": "c"}


@pytest.mark.parametrize("host", HOSTS)
def test_hosts(host):
    assert check_host(host, "x") == host
    assert check_address(join_address(host, 65535), "x") == (host, 65535)


@pytest.mark.parametrize("host", NO_HOSTS)
def test_what_is_no_host(host):
    with pytest.raises(InputError, match=r"^x is '.*no host; give a name"):
        check_host(host, "x")


@pytest.mark.parametrize("host", ["0.0.0.0", "::", "224.0.0.1", "ff02::1", "255.255.255.255"])
def test_an_address_that_is_nobodys_is_listened_on_and_not_enrolled_by(host):
    assert check_host(host, "listen") == host
    with pytest.raises(InputError, match="nobody can connect"):
        check_reachable(host, "hosts")


@pytest.mark.parametrize("port", ["", "0", "65536", "-1", "+1", " 1", "1 ", "1.0", "9" * 5000, "²", "٣", "http"])
def test_what_is_no_port(port):
    with pytest.raises(InputError, match="a port from 1 to 65535"):
        check_address(f"localhost:{port}", "x")


@pytest.mark.parametrize("text", ["::1:80", "[::1", "localhost", "[::1]80", "[a b]:80", "host :80"])
def test_what_is_no_address(text):
    with pytest.raises(InputError, match=r"^x is "):
        check_address(text, "x")


CARD = {"name": "n", "public_key": "0" * 64, "root_certificate": ""}


@pytest.mark.parametrize("address", ["fed.example.org:9092", "[::1]:9092", "::1:9092"])
def test_a_coordinators_document_is_read_as_it_was_written(address):
    """Earlier versions wrote no brackets, and the fingerprint covers what they wrote."""
    assert parse(CoordinatorCard, {**CARD, "address": address}, "coordinator.json").address == address


@pytest.mark.parametrize("address", ["a b:1", "--insecure", "fed.example.org", "fed.example.org:0", "http://a:1", ""])
def test_a_coordinators_document_with_an_impossible_address_is_refused(address):
    with pytest.raises(InputError, match="address is "):
        parse(CoordinatorCard, {**CARD, "address": address}, "coordinator.json")


@given(st.text())
def test_any_text_is_an_address_or_is_refused_in_one_short_line(text):
    try:
        host, port = check_address(text, "x")
    except InputError as error:
        assert len(str(error)) < 1000
        assert "\n" not in str(error)
    else:
        assert check_address(join_address(host, port), "x") == (host, port)


@pytest.mark.parametrize("text", ["unix:/run/a b/ö.sock", "silo.internal:50051", "[::1]:1"])
def test_places_of_a_service(text):
    assert parse(RelayConfig, {**RELAY, "silo_address": text}, "relay.toml").silo_address == text


@pytest.mark.parametrize("text", ["unix:", "unix:s", "unix:/a?b", "unix:/a#b", "unix:/a%20b", "unix:/a\0", "/a", "a"])
def test_what_is_no_place_of_a_service(text):
    """gRPC reads the path as that of a URI: it would listen at one place, and be looked for at another."""
    with pytest.raises(InputError, match="silo_address is "):
        parse(RelayConfig, {**RELAY, "silo_address": text}, "relay.toml")
    with pytest.raises(InputError, match=r"^x is "):
        check_service(text, "x")


def test_proxy_and_superlink_can_not_share_a_port():
    with pytest.raises(InputError, match="superlink_port is 9092, which is the proxy's port"):
        parse(FederationConfig, {"name": "n", "hosts": ["h"], "superlink_port": 9092}, "federation.toml")


def run(monkeypatch, capsys, *arguments):
    """Exit status and error lines of a command."""
    monkeypatch.setattr("sys.argv", ["siloweave", *arguments])
    with pytest.raises(SystemExit) as ended:
        siloweave.main()
    return ended.value.code, capsys.readouterr().err.splitlines()


BAD = [["--host", "a b"], ["--host", "ok", "--host", "-a"], ["--host", "0.0.0.0"], ["--host", "ok", "--port", "0"]]
BAD += [["--host", "ok", "--port", "70000"], ["--host", "ok", "--listen", "0.0.0.0;"], ["--host", ""]]


@pytest.mark.parametrize("options", BAD)
def test_init_with_bad_input_makes_nothing(options, tmp_path, monkeypatch, capsys):
    status, lines = run(monkeypatch, capsys, "federation", "init", str(tmp_path / "a" / "f"), "--name", "n", *options)
    assert (status, len(lines)) == (2, 1)
    assert repr(options[-1]) in lines[0] or f" {options[-1]}: " in lines[0]
    assert not list(tmp_path.iterdir())


def test_init_where_no_folder_can_be_says_so_in_one_line(tmp_path, monkeypatch, capsys):
    (tmp_path / "file").write_text("")
    for place, said in (("file", "can't be made"), ("file/f", "can't be made"), ("\udcff", "is not UTF-8")):
        options = ["--name", "n", "--host", "localhost"]
        status, lines = run(monkeypatch, capsys, "federation", "init", str(tmp_path / place), *options)
        assert (status, len(lines)) == (2, 1)
        assert said in lines[0]
    assert [path.name for path in tmp_path.iterdir()] == ["file"]


def test_a_silo_makes_no_keys_for_a_host_that_can_not_be(tmp_path, monkeypatch, capsys):
    files = ["-c", str(tmp_path / "silo.toml"), "--relay", str(tmp_path / "relay.json")]
    assert run(monkeypatch, capsys, "silo", "init", *files, "--host", "a b")[0] == 2
    status, lines = run(monkeypatch, capsys, "silo", "serve", *files[:2], "--address", "localhost:0")
    assert (status, len(lines)) == (2, 1)
    assert "--address is 'localhost:0'" in lines[0]
    assert not list(tmp_path.iterdir())
