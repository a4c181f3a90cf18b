"""What holds for the repository as a whole: directions of imports, sizes, generated files, the command line."""

import ast
import importlib
import pkgutil
import subprocess
import sys
from pathlib import Path

import pytest
from repository import REPOSITORY, found_below

PACKAGES = ("configs", "trainer", "privacy", "federated", "cluster")
ALLOWED = {
    "configs": set(),
    "trainer": {"configs"},
    "privacy": {"configs"},
    "federated": {"configs", "trainer", "privacy"},
    "cluster": {"configs", "trainer", "privacy", "federated"},
}


def sources(package):
    return [path for path in (REPOSITORY / package).rglob("*.py") if "app" not in path.parts[-2:-1]]


def imported(path):
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            yield from (name.name.split(".")[0] for name in node.names)
        elif isinstance(node, ast.ImportFrom) and node.module and not node.level:
            yield node.module.split(".")[0]


@pytest.mark.parametrize("package", PACKAGES)
def test_imports_point_in_one_direction(package):
    for path in sources(package):
        strangers = set(imported(path)) & set(PACKAGES) - ALLOWED[package] - {package}
        assert not strangers, f"{path} imports {strangers}"


@pytest.mark.parametrize("package", PACKAGES)
def test_packages_come_from_this_repository_and_every_module_imports(package):
    found = importlib.import_module(package)
    assert Path(found.__file__).parent == REPOSITORY / package
    for module in pkgutil.walk_packages(found.__path__, f"{package}."):
        importlib.import_module(module.name)


def test_which_task_there_is_only_the_registry_knows():
    for package in ("configs", "privacy", "federated", "cluster"):
        assert [path for path in sources(package) if "CausalTask" in path.read_text()] == []


def test_files_stay_readable():
    for package in PACKAGES:
        for path in sources(package):
            if not path.name.endswith(("_pb2.py", "_pb2_grpc.py")):
                assert len(path.read_text().splitlines()) <= 350, path


def run_python(code):
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, timeout=120)
    return done.stdout.split()


def test_the_relay_imports_neither_torch_nor_anything_that_reads_data():
    loaded = run_python("import sys, federated.transport.client_app; print(*sys.modules)")
    data = ("trainer", "privacy", "federated.silo", "federated.coordinator")
    assert not found_below(loaded, ("torch", "transformers", "sqlite3", *data))


def test_the_command_line_answers_without_heavy_imports(siloweave, tmp_path):
    loaded = run_python("import sys, siloweave; print(*sys.modules)")
    assert not {"torch", "ray", "flwr", "transformers", "deepspeed", "opacus", "spacy", "presidio_analyzer"} & set(
        loaded
    )
    done = siloweave("--help", cwd=tmp_path)
    assert done.returncode == 0
    for command in (
        "demo",
        "prepare",
        "pretrain",
        "export",
        "federate",
        "evaluate",
        "generate",
        "report",
        "audit",
        "plan",
        "doctor",
        "status",
        "tune",
        "submit",
        "job",
        "decrypt",
        "ledger",
        "silo",
        "federation",
    ):
        assert command in done.stdout


def test_the_stubs_are_those_of_silo_proto(tmp_path):
    """protoc's descriptor of silo.proto, as grpcio-tools made it, equals what a parse of the file gives today."""
    from federated.protocol import silo_pb2

    text = (REPOSITORY / "federated" / "protocol" / "silo.proto").read_text()
    code = [line.split("//")[0].strip() for line in text.splitlines()]
    messages = {line.split()[1] for line in code if line.startswith("message")}
    fields = {}
    current = ""
    for line in code:
        if line.startswith("message"):
            current = line.split()[1]
        elif line.endswith(";") and "=" in line and not line.startswith("syntax"):
            declaration, number = line.rstrip(";").split("=")
            *_, kind, name = declaration.split()  # "repeated" may stand before them
            fields[current, name] = (kind, int(number))
    described = {}
    for message in silo_pb2.DESCRIPTOR.message_types_by_name.values():
        for field in message.fields:
            kind = field.message_type.name if field.message_type else KINDS[field.type]
            described[message.name, field.name] = (kind, field.number)
    assert messages == set(silo_pb2.DESCRIPTOR.message_types_by_name)
    assert described == fields


KINDS = {1: "double", 4: "uint64", 9: "string", 12: "bytes", 13: "uint32"}
