"""The files that start a federation: valid, their commands exist, and their sandboxing is what the design asks for."""

import configparser
import re
import shlex
import shutil
import subprocess
from pathlib import Path

import pytest
import typer
import yaml
from repository import REPOSITORY

from configs.parse import parse
from configs.schema.deployment import RelayConfig

DEPLOY = REPOSITORY / "configs" / "deploy"
UNITS = ("siloweave-federation", "siloweave-silo", "siloweave-relay")


def unit(name):
    parser = configparser.ConfigParser(strict=False, interpolation=None)
    parser.optionxform = str
    parser.read_string((DEPLOY / f"{name}.service").read_text())
    return parser


def parsed(line):
    """The innermost command of a siloweave command line, its parameters checked."""
    import siloweave

    command, arguments = typer.main.get_command(siloweave.app), shlex.split(line)[1:]
    while hasattr(command, "commands"):
        command = command.commands[arguments.pop(0)]
    return command.make_context(command.name, arguments)


def composed():
    return yaml.safe_load((DEPLOY / "compose.yaml").read_text())


@pytest.mark.parametrize("name", UNITS)
def test_systemd_accepts_every_unit(name):
    if shutil.which("systemd-analyze") is None:
        pytest.skip("systemd-analyze is not installed")
    command = ["systemd-analyze", "verify", "--man=no", str(DEPLOY / f"{name}.service")]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    said = [line for line in done.stderr.splitlines() if f"{name}.service" in line]
    # The program is not installed where the unit says it is; everything else would be a mistake of ours.
    assert [line for line in said if "/opt/siloweave/bin/siloweave is not executable" not in line] == []


@pytest.mark.parametrize("name", UNITS)
def test_every_unit_starts_a_command_that_exists(name):
    assert parsed(unit(name)["Service"]["ExecStart"])


def test_service_and_relay_are_two_users_that_share_the_socket_alone():
    silo, relay = unit("siloweave-silo")["Service"], unit("siloweave-relay")["Service"]
    assert silo["User"] != relay["User"]
    assert silo["SupplementaryGroups"] == relay["Group"]
    assert silo["PrivateNetwork"] == "yes"
    assert relay["IPAddressDeny"] == "any"
    assert relay["IPAddressAllow"].split()[0] == "localhost"
    state = Path(parsed(silo["ExecStart"]).params["config"]).parent
    assert relay["InaccessiblePaths"] == str(state) == silo["ReadWritePaths"]
    assert Path(parsed(silo["ExecStart"]).params["socket"]).parent == Path("/run") / silo["RuntimeDirectory"]
    for service in (silo, relay, unit("siloweave-federation")["Service"]):
        assert (service["NoNewPrivileges"], service["ProtectSystem"], service["Restart"]) == ("yes", "strict", "always")
        assert service["CapabilityBoundingSet"] == ""


def test_the_compose_file_keeps_the_same_boundaries():
    services = composed()["services"]
    for service in services.values():
        assert parsed(service["command"])
        assert (service["cap_drop"], service["read_only"]) == (["ALL"], True)
    silo, relay = services["silo"], services["relay"]
    assert silo["network_mode"] == "none"
    assert silo["user"] != relay["user"]
    assert silo["group_add"] == [relay["user"].split(":")[1]]
    shared = {volume.split(":")[0] for volume in silo["volumes"]} & {v.split(":")[0] for v in relay["volumes"]}
    assert shared == {"socket"}
    assert "ports" not in silo and "ports" not in relay


def test_the_documents_settings_hold():
    import tomllib

    from configs.schema.silo import SiloConfig

    text = (REPOSITORY / "docs" / "deployment.md").read_text()
    relay, silo, proxy = (tomllib.loads(block) for block in re.findall(r"```toml\n(.*?)```", text, re.DOTALL))
    assert parse(RelayConfig, relay, "relay.toml").silo_address == "unix:/run/siloweave-silo/silo.sock"
    assert parse(RelayConfig, {**relay, **proxy}, "relay.toml").proxy == proxy["proxy"]
    assert parse(SiloConfig, silo, "silo.toml").silo.relay_user == unit("siloweave-relay")["Service"]["User"]


def test_the_documents_commands_exist():
    text = (REPOSITORY / "docs" / "deployment.md").read_text()
    lines = re.findall(r"^[\w-]*\$ (siloweave .*)$", text, re.MULTILINE)
    assert len(lines) >= 8
    for line in lines:
        assert parsed(line.split("  #")[0])
