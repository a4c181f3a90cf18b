"""`siloweave silo relay --check`: the whole command, to a coordinator's proxy as far as TLS goes."""

import pytest
from lines import ConnectProxy, TlsServer
from ports import free_port
from typer.testing import CliRunner

from configs.errors import InputError
from configs.schema.deployment import FederationConfig
from federated.commands.silo import silo_app
from federated.deployment.federation_folder import FederationFolder
from federated.deployment.line.site_proxy import UnreachableError
from federated.identity.cards import fingerprint


@pytest.fixture
def relay(tmp_path):
    """A function that writes a relay's settings and gives the command's result."""
    config = FederationConfig(name="net", hosts=("localhost",), port=free_port(), listen="127.0.0.1")
    federation = FederationFolder.create(tmp_path / "federation", config)

    def check(*lines):
        (tmp_path / "relay.toml").write_text(
            "\n".join(
                (
                    'state_dir = "state"\ncoordinator = "federation/coordinator.json"\nsilo_address = "unix:/none"',
                    f'coordinator_fingerprint = "{fingerprint(federation.card)}"',
                    *lines,
                )
            )
        )
        return CliRunner().invoke(silo_app, ["relay", "--check", "-c", str(tmp_path / "relay.toml")])

    check.federation = federation
    return check


def test_the_command_says_what_it_found_in_one_line(relay, tmp_path):
    federation = relay.federation
    assert isinstance(relay().exception, UnreachableError)
    (tmp_path / "login").write_text("north:s3cret")
    (tmp_path / "login").chmod(0o600)
    certificate, key = federation.certificates / "proxy.pem", federation.keys / "proxy.key"
    with (
        TlsServer(certificate, key) as server,
        ConnectProxy(login="north:s3cret", inspected_by=server.port) as proxy,  # it knows the coordinator's port
    ):
        way = f'proxy = "http://127.0.0.1:{proxy.port}"'
        assert isinstance(relay(way).exception, InputError)
        done = relay(way, 'proxy_login_file = "login"')
    assert done.exception is None
    assert done.output.count("\n") == 1
    assert done.output.startswith(
        f"{federation.card.address}: reached through proxy http://127.0.0.1:{proxy.port}; certificate valid for 397 "
        "days; its clock and this one differ by "
    )
