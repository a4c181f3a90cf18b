"""What holds for the repository as a whole: directions of imports, sizes, generated files, the command line."""

import ast
import importlib
import pkgutil
import re
import subprocess
import sys
import tomllib
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
FLOORS = {
    "configs": (
        "ending errors findings imports",
        "printing",
        "identities parse",
        "schema",
        "storage",
        "events locks",
        "load run_directory salvage",
    ),
    "trainer": (
        "data device models rank",
        "metrics objectives",
        "tasks",
        "augmentation checkpoints explanation scoring",
        "pretraining",
        "export imported inference optimisation",
        "synthesis",
    ),
    "privacy": (
        "accounting clipping compression metric_release secure_sum signing",
        "secagg",
        "distributed",
        "declaration plan register",
        "mechanism plan_from_settings",
        "audit ledger",
        "mandate",
        "certificate",
        "commands",
    ),
    "federated": (
        "adapters identity protocol",
        "aggregation evaluation transport",
        "coordinator silo",
        "deployment simulation",
        "audit bundle",
        "commands",
    ),
    "cluster": (
        "monitoring report runtime",
        "finished run",
        "public_records",
        "calibrating checks optimising predicting serving",
        "exporting showing",
        "dashboard pipeline synthesising",
        "tuning",
        "commands",
    ),
}
"""The rooms of each package, from the ground up: one imports those below it, and no other one of its own floor."""
LARGEST_ROOM = 12
HEAVY = {"torch", "transformers", "deepspeed", "trainer", "privacy"}


def sources(package):
    return [path for path in (REPOSITORY / package).rglob("*.py") if "app" not in path.parts[-2:-1]]


def modules(path):
    """Names that a file imports, as far as they can be modules: ``from a import b`` may mean ``a.b``."""
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            yield from (name.name for name in node.names)
        elif isinstance(node, ast.ImportFrom) and node.module and not node.level:
            yield from (f"{node.module}.{name.name}" for name in node.names)


def room(package, module):
    """What a module of a package belongs to: a folder below the package, or the module itself."""
    return module.removeprefix(f"{package}.").split(".")[0]


@pytest.mark.parametrize("package", PACKAGES)
def test_imports_point_in_one_direction(package):
    for path in sources(package):
        strangers = {module.split(".")[0] for module in modules(path)} & set(PACKAGES) - ALLOWED[package] - {package}
        assert not strangers, f"{path} imports {strangers}"


@pytest.mark.parametrize("package", PACKAGES)
def test_rooms_import_only_what_lies_below_them(package):
    floor = {name: number for number, names in enumerate(FLOORS[package]) for name in names.split()}
    here = REPOSITORY / package
    there = {path.stem for path in here.iterdir() if path.suffix == ".py" or (path / "__init__.py").exists()}
    assert set(floor) == there - {"__init__", "app"}, "a room has no floor, or a floor has no such room"
    for path in sources(package):
        own = room(package, ".".join(path.relative_to(REPOSITORY).with_suffix("").parts))
        for module in modules(path):
            other = room(package, module) if module.startswith(f"{package}.") else own
            assert other == own or floor[other] < floor[own], f"{path} imports {module}"


def test_no_guarantee_is_an_assertion():
    """`python -O` leaves them out."""
    for package in PACKAGES:
        for path in sources(package):
            found = [node.lineno for node in ast.walk(ast.parse(path.read_text())) if isinstance(node, ast.Assert)]
            assert not found, f"{path}: an assert in line {found}; raise an error"


def test_the_transport_knows_neither_models_nor_privacy():
    for path in sources("federated/transport"):
        for module in modules(path):
            assert module.split(".")[0] not in HEAVY, f"{path} imports {module}"
            if module.split(".")[0] == "configs":
                assert module.startswith(("configs.errors.", "configs.printing.")), f"{path} imports {module}"


def test_the_bundle_names_the_two_apps_alone():
    (shim,) = (REPOSITORY / "federated" / "app").glob("*.py")
    named = set(re.findall(r"federated[.\w]+", shim.read_text()))
    assert named == {"federated.transport.client_app", "federated.coordinator.server_app"}


def test_no_room_is_too_large_to_overlook():
    for package in PACKAGES:
        for folder in {path.parent for path in sources(package)}:
            count = len([path for path in folder.glob("*.py") if path.name != "__init__.py"])
            assert count <= LARGEST_ROOM, f"{folder} has {count} modules"
            (purpose,) = ast.parse((folder / "__init__.py").read_text()).body
            assert isinstance(purpose.value.value, str), f"{folder}/__init__.py: give its purpose alone"


def test_every_folder_is_installed():
    """An editable install has them anyway; a wheel would lack one that the settings of the build don't list."""
    listed = tomllib.loads((REPOSITORY / "pyproject.toml").read_text())["tool"]["setuptools"]["packages"]
    found = {".".join(path.parent.relative_to(REPOSITORY).parts) for package in PACKAGES for path in sources(package)}
    assert found == set(listed)


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
    loaded = run_python("import sys, federated.transport.client_app, federated.transport.node; print(*sys.modules)")
    data = ("trainer", "privacy", "federated.silo", "federated.coordinator")
    assert not found_below(loaded, ("torch", "transformers", "sqlite3", *data))


def test_a_runs_files_and_ledgers_are_looked_at_without_torch():
    modules = ("cluster.pipeline", "cluster.monitoring.status", "cluster.report.report", "privacy.commands")
    loaded = run_python(f"import sys, {', '.join(modules)}; print(*sys.modules)")
    assert not {"torch", "ray", "transformers", "scipy"} & set(loaded)


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
        "import",
        "federate",
        "evaluate",
        "generate",
        "serve",
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


@pytest.mark.parametrize("file", ["federated/protocol/silo", "cluster/serving/rpc/serving"])
def test_the_stubs_are_those_of_the_proto_files(file):
    """protoc's descriptor of the file, as grpcio-tools made it, equals what a parse of the file gives today."""
    descriptor = importlib.import_module(f"{file.replace('/', '.')}_pb2").DESCRIPTOR
    text = (REPOSITORY / f"{file}.proto").read_text()
    code = [line.split("//")[0].strip() for line in text.splitlines()]
    messages = {line.split()[1] for line in code if line.startswith("message")}
    fields = {}
    current = ""
    for line in code:
        if line.startswith("message"):
            current = line.split()[1]
        elif line.endswith(";") and "=" in line and not line.startswith("syntax"):
            declaration, number = line.rstrip(";").split("=")
            *_, kind, name = declaration.split()  # "repeated", "optional" or a map's key may stand before them
            fields[current, name] = (kind, int(number))
    described = {}
    for message in descriptor.message_types_by_name.values():
        for field in message.fields:
            described[message.name, field.name] = (kind_of(field).removeprefix(f"{descriptor.package}."), field.number)
    assert messages == set(descriptor.message_types_by_name)
    assert described == fields


def kind_of(field):
    if not field.message_type:
        return KINDS[field.type]
    entry = field.message_type.GetOptions().map_entry
    return f"{KINDS[field.message_type.fields_by_name['value'].type]}>" if entry else field.message_type.full_name


KINDS = {1: "double", 3: "int64", 4: "uint64", 5: "int32", 8: "bool", 9: "string", 12: "bytes", 13: "uint32"}
