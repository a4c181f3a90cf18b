"""nginx itself reads the configuration of a federation, whatever its folder is called."""

import shutil
import socket
import subprocess
import sys
import threading
from pathlib import Path

import psutil
import pytest
from flwr.common.config import parse_config_args
from ports import free_port

from configs.errors import InputError
from configs.schema.deployment import FederationConfig
from federated.deployment.federation_folder import FederationFolder
from federated.deployment.ports import check_free, check_place
from federated.deployment.proxy import proxy
from federated.deployment.superlink import superlink
from federated.deployment.supervisor import STATE, Program, Supervisor

NAMES = ["plain", "a b", 'a"b', "a'b", "$host", "${host}", "a;b", "a{b}", "a#b", "a\\b", "a\nb", "ö 雪", "-p", "%d?x=1"]


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    """One federation, whose keys are made once: it is copied for each test."""
    config = FederationConfig(name="net", hosts=("localhost",), port=free_port(), listen="127.0.0.1")
    return FederationFolder.create(tmp_path_factory.mktemp("made") / "federation", config)


def copied(made, folder):
    shutil.copytree(made.folder, folder)
    return FederationFolder(folder)


@pytest.mark.parametrize("name", NAMES)
def test_nginx_takes_the_configuration_of_any_folder(made, name, tmp_path):
    federation = copied(made, tmp_path / name)
    program = proxy(federation, 1)
    done = subprocess.run([*program.command, "-t"], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert str(tmp_path) not in (federation.folder / "nginx.conf").read_text()


def test_a_proxy_serves_in_a_folder_of_any_name_and_keeps_its_files_there(made, tmp_path):
    federation = copied(made, tmp_path / 'it\'s "a" {b} $c; ö\n')
    ended, elsewhere = threading.Event(), tmp_path / "elsewhere"
    elsewhere.mkdir()
    shutil.move(federation.state, elsewhere / "state")  # on another disk
    federation.state.symlink_to(elsewhere / "state")
    Supervisor(federation.state, [proxy(federation, 1)]).run(ended, ready=ended.set, tick=lambda: None)
    assert {"nginx", "nginx.log", "refused.log"} <= {path.name for path in (elsewhere / "state").iterdir()}


@pytest.mark.parametrize("listen", ["::1", "::", "localhost"])
def test_nginx_takes_every_kind_of_host(made, listen, tmp_path):
    federation = copied(made, tmp_path / "f")
    federation.config = federation.config.model_copy(update={"listen": listen})
    done = subprocess.run([*proxy(federation, 1).command, "-t"], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr


def test_an_ipv6_coordinator_has_its_address_in_brackets(made, tmp_path):
    federation = copied(made, tmp_path / "f")
    federation.config = federation.config.model_copy(update={"hosts": ("::1",)})
    assert federation.card.address == f"[::1]:{made.config.port}"


@pytest.mark.parametrize("name", NAMES)
def test_flower_reads_the_paths_that_are_written_for_it(made, name, tmp_path):
    federation = copied(made, tmp_path / name)
    superlink(federation)
    (settings,) = federation.home.glob("*.toml")
    link = parse_config_args([str(settings)])
    assert link["superlink.siloweave.root-certificates"] == str(federation.authority.path)


def listener(host="127.0.0.1"):
    """Another process that listens on a port; it ends with its input."""
    family = "AF_INET6" if ":" in host else "AF_INET"
    script = f"import socket, sys; s = socket.create_server(({host!r}, 0), family=socket.{family}); "
    script += "print(s.getsockname()[1], flush=True); sys.stdin.read()"
    process = psutil.Popen([sys.executable, "-c", script], stdin=subprocess.PIPE, stdout=subprocess.PIPE)
    return process, int(process.stdout.readline())


def test_a_taken_port_is_named_with_its_process_before_anything_starts(made, tmp_path):
    process, port = listener()
    try:
        started = tmp_path / "started"
        first = Program("first", (sys.executable, "-c", f"open({str(started)!r}, 'w')"), {}, lambda: True)
        federation = copied(made, tmp_path / "f")
        federation.config = federation.config.model_copy(update={"port": port})
        supervisor = Supervisor(federation.state, [first, proxy(federation, 1)])
        with pytest.raises(InputError, match=rf"^127.0.0.1:{port}: port {port} is taken by process {process.pid} \("):
            supervisor.run(threading.Event(), ready=lambda: None, tick=lambda: None)
        assert not started.exists()
        assert not (federation.state / STATE).exists()
    finally:
        process.communicate()


@pytest.mark.parametrize(("taken", "wanted"), [("0.0.0.0", "127.0.0.1"), ("127.0.0.1", "0.0.0.0"), ("::1", "::")])
def test_an_address_for_all_meets_one_for_some(taken, wanted):
    process, port = listener(taken)
    try:
        with pytest.raises(InputError, match=f"is taken by process {process.pid} "):
            check_free(wanted, port)
    finally:
        process.communicate()


def test_a_port_whose_process_the_system_does_not_tell_is_named_too(monkeypatch):
    def denied(_):
        raise psutil.AccessDenied

    monkeypatch.setattr(psutil, "net_connections", denied)
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        with pytest.raises(InputError, match=f"port {port} is taken by a process that the system does not tell user"):
            check_free("127.0.0.1", port)
    assert check_place(None, f"127.0.0.1:{port}") == f"127.0.0.1:{port}"


def test_a_service_is_not_started_where_another_process_listens():
    process, port = listener()
    try:
        with pytest.raises(InputError, match=f"is taken by process {process.pid} "):
            check_place(None, f"127.0.0.1:{port}")
    finally:
        process.communicate()
    with pytest.raises(InputError, match=r"--socket is 'unix:/run/a[?]b'"):
        check_place(Path("/run/a?b"), None)


def test_an_address_of_another_machine_is_said_to_be_one():
    with pytest.raises(InputError, match=r"192.0.2.1:9092: can't listen there .*; give an address of this machine"):
        check_free("192.0.2.1", 9092)
    with pytest.raises(InputError, match=r"nobody.invalid: no address of this name"):
        check_free("nobody.invalid", 9092)
