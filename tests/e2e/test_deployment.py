"""Silos, keys, TLS and real processes on one machine: docs/deployment.md, step by step, and what must not work."""

import contextlib
import json
import os
import shutil
import signal
import socket
import ssl
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from importlib.util import find_spec
from pathlib import Path

import grpc
import psutil
import pytest
import tomli_w
from cryptography.hazmat.primitives.asymmetric import ec
from deployment import BIN, Deployment, as_user, users, why_not_two_users
from lines import ConnectProxy, TlsServer
from ports import free_port

from configs.storage.manifests import require_manifest
from federated.deployment.federation_folder import FederationFolder
from federated.deployment.flower_programs import flower_environment
from federated.deployment.proxy import FLEET_PATHS
from federated.deployment.superlink import APP, nodes
from federated.deployment.supervisor import end_tree
from federated.identity.keys import load_or_create_key
from federated.identity.x509 import CURVE, Authority
from federated.protocol.framing import LARGEST_MESSAGE_BYTES
from federated.transport.health import is_serving
from privacy.certificate.check import check_certificate

RUN_S = 400.0
TENSORBOARD = find_spec("tensorboard") is not None
FAST = ("federated.local_steps=2", "privacy.epsilon=1", "federated.min_silos=1")
PATIENT = f"federated.round_timeout_s={RUN_S}"  # where all silos answer, however slow the machine is
# The run that outlives: what a killed process held is sent again; what should be lost all the same is given up.
ONE = (
    "federated.rounds=3",
    f"federated.round_timeout_s={RUN_S / 4}",
    f"monitoring.tensorboard={str(TENSORBOARD).lower()}",
    *FAST,
)
STEWARD, RELAY = f"sw-silo-{os.getpid()}", f"sw-relay-{os.getpid()}"


@pytest.fixture(scope="module")
def root() -> Iterator[Path]:
    folder = Path(tempfile.mkdtemp(prefix="silos-"))  # pytest's own folders are closed to other users, and too long
    try:
        yield folder
    finally:
        shutil.rmtree(folder)


@pytest.fixture(scope="module")
def coordinator(root, tiny_run) -> Iterator[Deployment]:
    """A federation that is served, with one silo's keys and no silo's processes."""
    deployment = Deployment(root, tiny_run.model)
    try:
        deployment.init()
        deployment.serve()
        deployment.enrol(deployment.add_site("comedies"))
        yield deployment
    finally:
        deployment.end()


@pytest.fixture(scope="module")
def way_out() -> Iterator[ConnectProxy]:
    """The only way out of one site."""
    with ConnectProxy(login="site:s3cret/@:") as proxy:
        yield proxy


@pytest.fixture(scope="module")
def deployment(coordinator, way_out) -> Deployment:
    """The same with two silos that are online, one of them behind an HTTP proxy; others come and go."""
    coordinator.enrol(coordinator.add_site("histories", proxy=way_out))
    for site in coordinator.sites.values():
        coordinator.start_site(site)
    coordinator.wait_until("two silos that are online", lambda: online(coordinator) == {"comedies", "histories"})
    return coordinator


def online(deployment: Deployment) -> set[str]:
    found = nodes(FederationFolder(deployment.folder))
    return {name for name, node in found.items() if node["status"] == "online"}


def superlink_port(deployment: Deployment) -> int:
    return int((deployment.folder / "flower" / "config.toml").read_text().split("127.0.0.1:")[1].split('"')[0])


def ask(deployment: Deployment, line: bytes, *, port: int | None = None, size_bytes: int = 0) -> int:
    """HTTP status of a request line, sent byte for byte through the proxy by somebody who trusts its authority.

    Where a body is announced, it is not sent.
    """
    context = ssl.create_default_context(cafile=str(deployment.folder / "certificates" / "ca.pem"))
    with (
        socket.create_connection(("127.0.0.1", port or deployment.port), timeout=60) as plain,
        context.wrap_socket(plain, server_hostname="localhost") as connection,
    ):
        head = b"%s HTTP/1.1\r\nHost: localhost\r\nContent-Length: %d\r\nConnection: close\r\n\r\n"
        connection.sendall(head % (line, size_bytes))
        return int(connection.recv(1000).split()[1])


def flwr(deployment: Deployment, home: Path, *arguments: str) -> subprocess.CompletedProcess[str]:
    environment = {**os.environ, **flower_environment(home)}
    command = [str(BIN / "flwr"), *arguments]
    return subprocess.run(command, env=environment, capture_output=True, text=True, timeout=120, check=False)


def outside(deployment: Deployment, folder: Path) -> Path:
    """Flower's settings of somebody outside the coordinator's machine, who reaches the proxy and trusts it."""
    folder.mkdir()
    address, root = f"localhost:{deployment.port}", str(deployment.folder / "certificates" / "ca.pem")
    link = {"superlink": {"default": "siloweave", "siloweave": {"address": address, "root-certificates": root}}}
    (folder / "config.toml").write_text(tomli_w.dumps(link))
    (folder / "config.toml").chmod(0o600)
    return folder


@pytest.mark.parametrize(
    "line",
    [
        b"POST /v1/control/list-nodes",
        b"POST /v1/control/start-run",
        b"POST /v1/control/register-node",
        b"POST /v1/fleet/register-node",
        b"POST /v1/fleet/unregister-node",
        b"POST /v1/runtime/pull-task-input",
        b"POST /v1/fleet/../control/list-nodes",
        b"POST /v1/fleet/%2e%2e/control/list-nodes",
        b"POST /v1/fleet/pull-messages/../../control/list-nodes",
        b"POST //v1//control//list-nodes",
        b"POST /V1/FLEET/pull-messages",
        b"GET /v1/fleet/pull-messages",
        b"GET /health",
        b"GET /docs",
        b"GET /openapi.json",
    ],
)
def test_the_proxy_lets_nothing_but_the_fleets_paths_through(coordinator, line):
    assert ask(coordinator, line) == 403
    refused = coordinator.folder / "state" / "refused.log"
    coordinator.wait_until("a line in the proxy's log", lambda: line.decode() in refused.read_text())


def test_the_fleets_paths_ask_for_a_registered_key(coordinator):
    for path in FLEET_PATHS:  # past the proxy, and turned away by the SuperLink for want of a signature
        assert ask(coordinator, b"POST " + path.encode()) in (400, 401, 415, 422), path


def test_nothing_but_an_object_may_be_long(coordinator):
    """A reply's list of objects comes with its announcement, and the coordinator takes it in whole."""
    for path in set(FLEET_PATHS) - {"/v1/fleet/push-object"}:
        assert ask(coordinator, b"POST " + path.encode(), size_bytes=2**20 + 1) == 413, path
    assert ask(coordinator, b"POST /v1/fleet/push-object", size_bytes=LARGEST_MESSAGE_BYTES + 2**20 + 1) == 413


def test_the_fleets_paths_are_all_that_a_supernode_of_this_flower_calls():
    import inspect

    from flwr.supernode import fleet_http_client

    source = inspect.getsource(fleet_http_client)
    called = {line.split('"')[1] for line in source.splitlines() if 'path="' in line}
    assert called - set(FLEET_PATHS) == {"/v1/fleet/register-node", "/v1/fleet/unregister-node"}
    assert set(FLEET_PATHS) <= called


def test_flwr_run_and_register_work_on_loopback_only(coordinator, tmp_path):
    key = tmp_path / "key.pub"
    stranger = load_or_create_key(tmp_path / "stranger.ssh", ec.SECP384R1()).public_key()
    from cryptography.hazmat.primitives.serialization import Encoding, PublicFormat

    key.write_bytes(stranger.public_bytes(Encoding.OpenSSH, PublicFormat.OpenSSH))
    home = outside(coordinator, tmp_path / "outside")
    for arguments in (
        ["run", str(APP), "siloweave", "--format", "json"],
        ["supernode", "register", str(key), "siloweave"],
        ["supernode", "list", "siloweave"],
    ):
        done = flwr(coordinator, home, *arguments)
        assert "403 Forbidden" in done.stdout + done.stderr  # with --format json, Flower's status is 0 all the same
    inside = flwr(coordinator, coordinator.folder / "flower", "supernode", "list", "siloweave", "--format", "json")
    assert len(json.loads(inside.stdout[inside.stdout.index("{") :])["nodes"]) == 1


def test_plain_http_and_plaintext_grpc_get_nothing(coordinator):
    for port in (coordinator.port, superlink_port(coordinator)):
        with socket.create_connection(("127.0.0.1", port), timeout=60) as connection:
            connection.sendall(b"POST /v1/fleet/pull-messages HTTP/1.1\r\nHost: localhost\r\nContent-Length: 0\r\n\r\n")
            with contextlib.suppress(ConnectionResetError):
                answer = connection.recv(1000)
                assert answer == b"" or b" 400 " in answer
        assert not is_serving(f"localhost:{port}")
        with pytest.raises(grpc.RpcError), grpc.insecure_channel(f"localhost:{port}") as channel:
            channel.unary_unary("/flwr.proto.Fleet/PullMessages")(b"", timeout=5)


def test_the_superlink_listens_on_loopback_alone(coordinator):
    link = psutil.Process(coordinator.pid_of("superlink"))
    listening = {c.laddr.ip for c in link.net_connections("inet") if c.status == psutil.CONN_LISTEN}
    assert listening <= {"127.0.0.1", "::ffff:127.0.0.1"}


def test_a_supernode_with_an_unregistered_key_is_turned_away(coordinator, tmp_path):
    key = tmp_path / "stranger.ssh"
    load_or_create_key(key, ec.SECP384R1())
    command = [
        *(str(BIN / "flower-supernode"), "--superlink", f"localhost:{coordinator.port}"),
        *("--root-certificates", str(coordinator.folder / "certificates" / "ca.pem")),
        *("--auth-supernode-private-key", str(key), "--port", str(free_port())),
    ]
    status, said = stock_supernode(command, tmp_path)
    assert status != 0
    assert "Failed to activate SuperNode" in said
    assert online(coordinator) == set()


def stock_supernode(command: list[str], folder: Path) -> tuple[int, str]:
    """Flower's own program; its exit status and what it said. A pipe would stay open with its helper."""
    environment = {**os.environ, **flower_environment(folder / "flower")}
    with (folder / "supernode.log").open("wb") as log:
        process = psutil.Popen(command, env=environment, stdout=log, stderr=log, cwd=folder)
    try:
        status = process.wait(300)
    finally:
        end_tree([process], grace_s=5)
    return status, (folder / "supernode.log").read_text(errors="replace")


@pytest.mark.parametrize(
    ("case", "said"),
    [("foreign", "of another authority"), ("expired", "renew it"), ("elsewhere", "not for localhost")],
)
def test_a_relay_refuses_a_coordinator_whose_certificate_is_not_good(coordinator, case, said, tmp_path, monkeypatch):
    """By our own clear line, and by Flower's TLS below it, which is what protects."""
    import federated.identity.x509 as module
    from federated.identity.cards import CoordinatorCard, fingerprint, read_document, write_document

    known = Authority(tmp_path / "ca.key", tmp_path / "ca.pem", "known")
    signing = Authority(tmp_path / "other.key", tmp_path / "other.pem", "other") if case == "foreign" else known
    key = load_or_create_key(tmp_path / "server.key", CURVE)
    if case == "expired":
        monkeypatch.setattr(module, "CERTIFICATE_DAYS", -1)
        monkeypatch.setattr(module, "SKEW", module.timedelta(days=3))
    host = "elsewhere.example" if case == "elsewhere" else "localhost"
    signing.issue(tmp_path / "server.pem", key.public_key(), "server", [host], "server")
    with TlsServer(tmp_path / "server.pem", tmp_path / "server.key") as server:
        card = read_document(CoordinatorCard, coordinator.folder / "coordinator.json").model_copy(
            update={"address": f"localhost:{server.port}", "root_certificate": known.path.read_text()}
        )
        write_document(tmp_path / "coordinator.json", card)
        state = coordinator.sites["comedies"].folder / "relay" / "state"
        shutil.copytree(state, tmp_path / "state", ignore=shutil.ignore_patterns("*.log", "lock", "processes.json"))
        (tmp_path / "relay.toml").write_text(
            f'state_dir = "{tmp_path / "state"}"\ncoordinator = "{tmp_path / "coordinator.json"}"\n'
            f'coordinator_fingerprint = "{fingerprint(card)}"\nsilo_address = "unix:/none"\n'
        )
        done = coordinator.siloweave("silo", "relay", "-c", str(tmp_path / "relay.toml"), check=False)
        assert done.returncode == 2
        assert said in done.stderr and done.stderr.count("\n") == 1
        command = [
            *(str(BIN / "flower-supernode"), "--superlink", f"localhost:{server.port}", "--max-retries", "0"),
            *("--root-certificates", str(known.path), "--auth-supernode-private-key", str(state / "supernode.ssh")),
            *("--port", str(free_port())),
        ]
        status, said = stock_supernode(command, tmp_path)
        assert status != 0
        assert "certificate verify failed" in said.lower()


def test_a_wrong_fingerprint_changes_nothing(coordinator, tmp_path):
    site = coordinator.sites["comedies"]
    wrong = "0000-" * 9 + "0000"
    enrolment, card = str(coordinator.root / "comedies.json"), str(coordinator.root / "coordinator.json")
    before = sorted((coordinator.folder / "silos").iterdir()), sorted((site.state_dir / "trusted").iterdir())
    done = coordinator.siloweave(
        "federation", "enrol", str(coordinator.folder), enrolment, "--fingerprint", wrong, check=False
    )
    assert done.returncode == 2 and "its fingerprint is" in done.stderr
    done = coordinator.siloweave("silo", "trust", "-c", str(site.settings), card, "--fingerprint", wrong, check=False)
    assert done.returncode == 2 and "its fingerprint is" in done.stderr
    assert before == (sorted((coordinator.folder / "silos").iterdir()), sorted((site.state_dir / "trusted").iterdir()))


def rehearsed(deployment: Deployment, *overrides: str) -> tuple[int, dict]:
    """`federation rehearse`: its exit status, and what it has found."""
    model = deployment.root / "runs" / "tried" / "model"
    if not model.exists():
        shutil.copytree(deployment.model, model)
    given = ["federation", "rehearse", str(deployment.folder), *deployment.settings("tried", *overrides), "--json"]
    done = deployment.siloweave(*given, check=False)
    return done.returncode, json.loads(done.stdout)


def test_a_rehearsal_names_a_site_that_is_away(coordinator):
    status, found = rehearsed(coordinator)
    (check,) = found["sites"]["comedies"]["checks"]
    assert (status, found["go"], check["check"], check["found"]) == (1, False, "reached", "not online")
    assert "siloweave silo relay -c relay.toml --check" in check["fix"]
    site = seen(coordinator)["silos"]["comedies"]
    assert (site["state"], "its relay is not connected" in site["reason"]) == ("down", True)


def seen(deployment: Deployment) -> dict:
    """The figures of the coordinator's page."""
    return json.loads(deployment.siloweave("federation", "dashboard", str(deployment.folder), "--json").stdout)


def ledgers(deployment: Deployment) -> list[bytes]:
    """All that the ledgers of the silos keep."""
    kept = [path for site in deployment.sites.values() for path in site.state_dir.glob("ledger.sqlite*")]
    return [path.read_bytes() for path in sorted(kept) if not path.name.endswith("-shm")]


def test_a_rehearsal_tries_every_site_and_charges_nothing(deployment):
    before = ledgers(deployment)
    status, found = rehearsed(deployment, "federated.rounds=3", *FAST)
    assert {name: site["go"] for name, site in found["sites"].items()} == {"comedies": True, "histories": True}, found
    assert status == (0 if all(check["ok"] for check in found["coordinator"]) else 1)
    for site in found["sites"].values():
        assert [check["check"] for check in site["checks"]][:3] == ["reached", "version", "clock"]
        assert site["round"]["seconds"] > 0
    assert found["round"]["bytes"] == sum(
        site["round"]["request_bytes"] + site["round"]["reply_bytes"] for site in found["sites"].values()
    )
    first_s = max(site["round"]["first_s"] for site in found["sites"].values())
    assert found["run"]["seconds"] == pytest.approx(first_s + 3 * found["round"]["seconds"])
    assert ledgers(deployment) == before
    assert not (deployment.root / "runs" / "tried" / "config.toml").exists()  # nothing is begun


def kill(pid: int) -> None:
    os.kill(pid, signal.SIGKILL)


def server_app(deployment: Deployment) -> psutil.Process | None:
    link = deployment.pid_of("superlink")
    with contextlib.suppress(psutil.Error):
        for process in psutil.Process(link).children(recursive=True):
            with contextlib.suppress(psutil.Error):  # one that has just been killed
                if "flwr-serverapp" in " ".join(process.cmdline()):
                    return process
    return None


def test_a_run_outlives_the_death_of_each_of_its_processes(deployment):
    """One run of three rounds, and a SIGKILL of a silo service, the server app, the SuperLink and a SuperNode."""
    run = deployment.run("one", *ONE)

    def rounds() -> int:
        return len(deployment.events("one", "round"))

    deployment.wait_until("the first round", lambda: rounds() >= 1, run, RUN_S)
    service = deployment.sites["histories"]
    kill(service.service_process.pid)
    service.service_process.wait(300)
    deployment.start_service(service)  # systemd's part
    kill(server_app(deployment).pid)
    deployment.wait_until("another server app", lambda: server_app(deployment) is not None, run, RUN_S)
    kill(deployment.pid_of("superlink"))
    deployment.wait_until("the second round", lambda: rounds() >= 2, run, RUN_S)
    relay = deployment.sites["comedies"].folder / "relay" / "state"
    kill(deployment.pid_of("supernode", relay))
    assert run.wait(RUN_S) == 0, deployment.logs()
    certificate = json.loads((deployment.root / "runs" / "one" / "federated" / "certificate.json").read_text())
    check_certificate(certificate, "certificate")
    assert set(certificate["silos"]) == {"comedies", "histories"}
    federation = deployment.root / "runs" / "one" / "federated"
    assert (federation / "adapter" / "adapter_config.json").exists()  # what `silo personalise` and peft take
    require_manifest(federation, "federated", "federate")
    told = [event["message"] for kind in ("rejected", "timeout") for event in deployment.events("one", kind)]
    assert all(line.isprintable() for line in told), told
    log = (service.folder / "relay" / "state" / "supernode.log").read_text()
    assert "RpcError" not in log and "_MultiThreadedRendezvous" not in log, log
    found = deployment.status()
    assert found["processes"]["superlink"]["restarts"] >= 1
    assert (found["run"]["finished"], found["run"]["round"]) == (True, 3)
    assert found["silos"]["histories"]["epsilon_left"] == pytest.approx(31, abs=0.05)
    restarted = deployment.siloweave("silo", "status", "-c", str(deployment.sites["comedies"].relay_settings), "--json")
    assert json.loads(restarted.stdout)["restarts"] >= 1
    deployment.wait_until("the silo that was away", lambda: online(deployment) >= {"comedies"}, None, RUN_S)


def test_the_site_behind_a_proxy_took_part_through_it_and_told_nobody_its_login(deployment, way_out):
    """The proxy carried its rounds: each has one adapter there and one update back."""
    relay = deployment.sites["histories"].folder / "relay"
    rounds = [event for event in deployment.events("one", "round") if "histories" in event["answered"]]
    shares = sum(event["bytes"] / len(event["answered"]) for event in rounds)  # of what went, and as much came back
    assert set(way_out.asked) == {f"localhost:{deployment.port}"}
    assert rounds and min(way_out.up, way_out.down) > shares / 4
    supernode = psutil.Process(deployment.pid_of("supernode", relay / "state"))
    spoken = []
    for process in (supernode, *supernode.children(recursive=True)):
        with contextlib.suppress(psutil.NoSuchProcess):  # a ClientApp that has just ended
            spoken.append(" ".join(process.cmdline()))
    written = [path.read_bytes() for path in relay.rglob("*") if path.is_file() and path.name != "login"]
    assert spoken and not [text for text in (*spoken, deployment.logs()) if "s3cret" in text]
    assert not [content for content in written if b"s3cret" in content]


@pytest.mark.skipif(not TENSORBOARD, reason="the package tensorboard is not installed")
def test_tensorboard_has_the_rounds_of_the_run_that_was_killed(deployment):
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    read = EventAccumulator(str(deployment.root / "runs" / "one" / "tensorboard")).Reload()
    shown = {tag: {point.step: point.value for point in read.Scalars(tag)} for tag in read.Tags()["scalars"]}
    events = {event["round"]: event for event in deployment.events("one", "round")}  # the last of one done twice
    assert set(events) == {1, 2, 3}
    for name in ("bytes", "seconds", "epsilon_left"):
        assert shown[f"federated/{name}"] == {n: pytest.approx(event[name]) for n, event in events.items()}
    assert shown["federated/silos"] == {n: len(event["answered"]) for n, event in events.items()}


def test_evaluate_and_report_tell_what_the_coordinator_knows_of_the_run(deployment):
    (deployment.root / "public.txt").write_text("A text that everyone may read. " * 20)
    given = deployment.settings("one", *ONE, f"evaluate.public.source={deployment.root / 'public.txt'}")
    deployment.siloweave("evaluate", *given)
    deployment.siloweave("report", *given)
    directory = deployment.root / "runs" / "one"
    report = json.loads((directory / "report.json").read_text())
    certificate = json.loads((directory / "federated" / "certificate.json").read_text())
    assert report["privacy"]["epsilon"] == max(
        silo["receipt"]["epsilon_reserved"] for silo in certificate["silos"].values()
    )
    for name, silo in report["privacy"]["silos"].items():
        stated = certificate["silos"][name].get("statement", {})  # a silo that missed the close has stated nothing
        assert silo["charges"] == stated.get("rounds_charged")
    assert report["federated"]["not_available"] == "the silos keep their records"
    assert len(report["federated"]["public_text"]) == 4
    assert len(set(report["federated"]["public_text"])) == 4
    assert (report["pretrain"], report["simulation_only"]) == (None, [])
    page = (directory / "report.html").read_text()
    assert page.count("<svg") == 2
    assert "simulation_only" not in page
    assert "The coordinator's public text" in page


HOSTILE_SERVER = """
import json, time
from pathlib import Path
from flwr.app import ConfigRecord, Message, RecordDict
from flwr.serverapp import ServerApp
app = ServerApp()
@app.main()
def main(grid, context):
    node = int(context.run_config["node"])
    content = RecordDict({"ask": ConfigRecord({"ask": "anything"})})
    replies = list(grid.send_and_receive([Message(content, node, "query")], timeout=100))
    found = [r.content["told"]["told"] if r.has_content() else repr(r.error) for r in replies]
    Path(str(context.run_config["to"])).write_text(json.dumps(found))
"""
HOSTILE_CLIENT = """
from pathlib import Path
from flwr.app import ConfigRecord, RecordDict, Message
from flwr.clientapp import ClientApp
app = ClientApp()
@app.query()
def query(message, context):
    return Message(RecordDict({"told": ConfigRecord({"told": "the bundle was run"})}), reply_to=message)
"""
# What code would try that has somehow come to run as the relay.
ATTEMPTS = """
import json, os, sys
from pathlib import Path
def attempt(what):
    try:
        return "got " + repr(what())[:80]
    except OSError as error:
        return type(error).__name__
told = {"uid": os.getuid()}
for path in sys.argv[1:]:
    told[path] = {
        "read": attempt(lambda: Path(path).read_bytes()),
        "list": attempt(lambda: os.listdir(path)),
        "write": attempt(lambda: open(path, "ab")),
        "replace": attempt(lambda: os.rename(path, path + ".gone")),
        "mode": attempt(lambda: os.chmod(path, 0o777)),
    }
print(json.dumps(told))
"""


def hostile_app(folder: Path) -> Path:
    shutil.copytree(APP, folder, ignore=shutil.ignore_patterns("__pycache__"))
    (folder / "siloweave_app.py").unlink()
    (folder / "hostile_server.py").write_text(HOSTILE_SERVER)
    (folder / "hostile_client.py").write_text(HOSTILE_CLIENT)
    project = (folder / "pyproject.toml").read_text().split("[tool.flwr.app.components]")[0]
    (folder / "pyproject.toml").write_text(
        project + '[tool.flwr.app.components]\nserverapp = "hostile_server:app"\nclientapp = "hostile_client:app"\n'
        '[tool.flwr.app.config]\nnode = ""\nto = ""\n'
    )
    return folder


@pytest.fixture(scope="module")
def two_users(deployment):
    """A third silo, whose service and relay are two operating-system users, and whose data is not public."""
    if os.geteuid() != 0:
        pytest.skip("only root can make operating-system users; run this test as root")
    with users(STEWARD, RELAY):
        reason = why_not_two_users(deployment.root / "stage", RELAY)
        if reason:
            pytest.skip(reason)
        site = deployment.add_site("roman", STEWARD, RELAY)
        deployment.enrol(site)
        deployment.start_site(site)
        deployment.wait_until("the third silo", lambda: "roman" in online(deployment))
        yield site
        for process in (site.relay_process, site.service_process):
            process.terminate()
            process.wait(300)


def test_a_hostile_bundle_is_not_run_and_its_user_reaches_nothing(deployment, two_users, tmp_path):
    site = two_users
    secrets = [
        site.settings,
        site.folder / "silo" / "records.jsonl",
        site.state_dir,
        site.state_dir / "silo.key",
        site.state_dir / "ledger.sqlite",
        site.state_dir / "split.key",
        site.state_dir / "tls" / "service.key",
        Path(f"{site.state_dir}.anchor") / "ledger.anchor",
    ]
    assert all(path.exists() for path in secrets)
    answer = deployment.root / "hostile.json"
    node = nodes(FederationFolder(deployment.folder))["roman"]["node"]
    given = {
        "node": str(node),  # may be above what Flower takes as a number
        "to": str(answer),
    }
    settings = tmp_path / "run.toml"
    settings.write_text(tomli_w.dumps(given))
    app = hostile_app(tmp_path / "hostile-app")
    done = flwr(deployment, deployment.folder / "flower", "run", str(app), "siloweave", "--run-config", str(settings))
    assert done.returncode == 0, done.stdout + done.stderr
    deployment.wait_until("the hostile bundle's answer", answer.exists, None, RUN_S)
    (said,) = json.loads(answer.read_text())
    assert "the message holds no siloweave envelope" in said
    process = psutil.Process(deployment.pid_of("supernode", site.folder / "relay" / "state"))
    assert "SILOWEAVE_ENCRYPTION_KEY" not in process.environ()
    import pwd

    attempts = [sys.executable, "-c", ATTEMPTS, *map(str, secrets)]
    command = as_user(RELAY, deployment.root / "stage", attempts)
    told = json.loads(subprocess.run(command, capture_output=True, text=True, check=True).stdout)
    assert process.uids().real == told.pop("uid") == pwd.getpwnam(RELAY).pw_uid
    assert set(told) == {str(path) for path in secrets}
    outcomes = {outcome for attempts in told.values() for outcome in attempts.values()}
    assert outcomes == {"PermissionError"}, told


def test_serve_refuses_a_relay_that_reaches_what_the_silo_keeps(deployment, two_users):
    site = two_users
    records = site.folder / "silo" / "records.jsonl"
    command = ["silo", "serve", "-c", str(site.settings), "--socket", str(site.folder / "run" / "other.sock")]
    for path in (site.folder / "silo", records):
        path.chmod(path.stat().st_mode | 0o055)
    try:
        done = deployment.siloweave(*command, user=STEWARD, check=False)
    finally:
        records.chmod(0o600)
        (site.folder / "silo").chmod(0o700)
    assert done.returncode == 2
    assert f"can read {records} (the data)" in done.stderr


def test_silos_come_and_go_without_a_restart(deployment, two_users):
    """A silo that was enrolled after the start takes part; one that was revoked does not, and its node is cut off."""
    before = deployment.status()["processes"]["superlink"]["restarts"]
    deployment.siloweave("federation", "revoke", str(deployment.folder), "histories")
    revoked = deployment.sites["histories"].folder / "relay" / "state" / "supernode.log"
    deployment.wait_until("an unregistered node", lambda: "Failed to activate" in revoked.read_text(), None, RUN_S)
    run = deployment.run("two", "federated.rounds=1", PATIENT, *FAST)
    assert run.wait(RUN_S) == 0, deployment.logs()
    assert [event["answered"] for event in deployment.events("two", "round")] == [["comedies", "roman"]]
    assert set(deployment.status()["silos"]) == {"comedies", "roman"}
    assert deployment.status()["processes"]["superlink"]["restarts"] == before


def test_a_run_that_fails_says_so(deployment):
    """`flwr run` says that all is well; ours has the run's own line and status."""
    run = deployment.run("three", "federated.rounds=1", "privacy.epsilon=500", PATIENT, *FAST[:1], *FAST[2:])
    assert run.wait(RUN_S) == 3, deployment.logs()
    assert "min_noise_multiplier" in deployment.log("run-three")
    trouble = deployment.status()["run"]["trouble"]
    assert {event["rule"] for event in trouble if event["event"] == "refused"} == {"min_noise_multiplier"}
    site = seen(deployment)["silos"]["comedies"]
    assert (site["state"], "min_noise_multiplier" in site["reason"]) == ("refuses", True)


def test_stop_ends_everything(deployment):
    pids = [deployment.pid_of("superlink"), deployment.pid_of("nginx")]
    tree = [child for pid in pids for child in psutil.Process(pid).children(recursive=True)]
    deployment.siloweave("federation", "stop", str(deployment.folder))
    psutil.wait_procs(tree, timeout=300)
    assert not [process for process in tree if process.is_running()]
    assert not any(psutil.pid_exists(pid) for pid in pids)
    assert deployment.siloweave("federation", "stop", str(deployment.folder)).stdout == "nothing was running\n"
    assert deployment.status()["processes"] == {}
