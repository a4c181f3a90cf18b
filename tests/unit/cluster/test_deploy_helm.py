"""The Helm chart: rendered by Helm's own code, valid by Kubernetes' schemas, and as closed as the systemd units."""

import shlex
import tomllib

import pytest
import typer
import yaml
from repository import REPOSITORY

helm = pytest.importorskip("helm_python", reason="Helm's own code (helm-python-sdk, of the extra `test`) is missing")
kubernetes_validate = pytest.importorskip("kubernetes_validate")

CHART = REPOSITORY / "configs" / "deploy" / "helm"
SILO = {"role": "silo", "relay": {"coordinator": "192.0.2.10/32"}}
COORDINATOR = {"role": "coordinator"}
OLDEST, NEWEST = "1.25", "1.37"


def rendered(values):
    """The chart's documents by kind and name."""
    with helm.Chart.load(CHART) as chart:
        files = chart.render(values=values, name="north", namespace="siloweave")
    texts = files.values() if isinstance(files, dict) else files
    found = [one for text in texts for one in yaml.safe_load_all(text) if one]
    return {(one["kind"], one["metadata"]["name"]): one for one in found}


def pods(documents):
    """Each pod's specification, by the name of what makes it."""
    return {name: one["spec"]["template"]["spec"] for (kind, name), one in documents.items() if kind == "StatefulSet"}


def context(command):
    """A siloweave command line, its parameters checked."""
    import siloweave

    found, arguments = typer.main.get_command(siloweave.app), list(command[1:])
    while hasattr(found, "commands"):
        found = found.commands[arguments.pop(0)]
    return found.make_context(found.name, arguments)


@pytest.mark.parametrize("version", [OLDEST, NEWEST])
@pytest.mark.parametrize("values", [SILO, COORDINATOR, {**SILO, "paused": True}])
def test_every_document_is_valid_by_the_schemas_of_kubernetes(values, version):
    documents = rendered(values)
    assert len(documents) == (3 if values["role"] == "coordinator" else 5)
    for document in documents.values():
        kubernetes_validate.validate(document, version, strict=True)


def test_the_schemas_find_a_mistake():
    policy = rendered(SILO)["NetworkPolicy", "north-silo"]
    policy["spec"]["egres"] = policy["spec"].pop("egress")
    with pytest.raises(kubernetes_validate.ValidationError):
        kubernetes_validate.validate(policy, NEWEST, strict=True)


@pytest.mark.parametrize("values", [SILO, COORDINATOR])
def test_helm_finds_nothing_wrong(values):
    found = helm.lint(CHART, values=values, strict=True)
    said = found["messages"] if isinstance(found, dict) else found
    assert [one for one in said if "icon" not in str(one).lower()] == []


@pytest.mark.parametrize(
    "values",
    [
        {"role": "both"},
        {"role": "silo"},  # no way out is named
        {**SILO, "relay": {"coordinator": "everywhere"}},
        {**SILO, "privileged": True},
        {**SILO, "silo": {"port": 0}},
    ],
)
def test_values_that_mean_nothing_are_refused(values):
    with pytest.raises(helm.HelmError):
        rendered(values)


@pytest.mark.parametrize("values", [SILO, COORDINATOR])
def test_every_container_is_as_closed_as_its_unit(values):
    for spec in pods(rendered(values)).values():
        (container,) = spec["containers"]
        assert (spec["automountServiceAccountToken"], spec["enableServiceLinks"]) == (False, False)
        user = spec["securityContext"]
        assert user["runAsNonRoot"] and user["seccompProfile"] == {"type": "RuntimeDefault"}
        assert container["securityContext"] == {
            "allowPrivilegeEscalation": False,
            "readOnlyRootFilesystem": True,
            "capabilities": {"drop": ["ALL"]},
        }
        unit = (CHART.parent / f"siloweave-{container['name']}.service").read_text()
        written = {mount["mountPath"] for mount in container["volumeMounts"] if not mount.get("readOnly")}
        assert f"ReadWritePaths={container['workingDir']}\n" in unit
        assert written - {"/srv/anchor"} == {container["workingDir"], "/tmp"}  # the anchor's is a drop-in of the unit
        assert context(container["command"])
        began = next(line for line in unit.splitlines() if line.startswith("ExecStart="))
        assert shlex.split(began)[1:3] == container["command"][1:3]
        assert f"TimeoutStopSec={spec['terminationGracePeriodSeconds']}\n" in unit


def test_service_and_relay_are_two_users_with_the_images_numbers_that_share_nothing():
    specs = pods(rendered(SILO))
    silo, relay = specs["north-silo"], specs["north-relay"]
    image = (CHART.parent / "Dockerfile").read_text()
    for spec, name in ((silo, "siloweave-silo"), (relay, "siloweave-relay")):
        user = spec["securityContext"]
        assert user["runAsUser"] == user["runAsGroup"] == user["fsGroup"]
        assert f"groupadd --gid {user['runAsUser']} {name} " in f"{image} "
    secrets = [
        volume["secret"]["secretName"] for spec in (silo, relay) for volume in spec["volumes"] if "secret" in volume
    ]
    assert secrets == ["siloweave-silo", "siloweave-relay"]
    assert relay["containers"][0]["resources"]["limits"] == {"memory": "4Gi"}


def test_what_may_reach_whom():
    documents = rendered(SILO)
    silo = documents["NetworkPolicy", "north-silo"]["spec"]
    relay = documents["NetworkPolicy", "north-relay"]["spec"]
    coordinator = rendered(COORDINATOR)["NetworkPolicy", "north-federation"]["spec"]
    for policy in (silo, relay, coordinator):
        assert policy["policyTypes"] == ["Ingress", "Egress"]
    assert silo["egress"] == [] and coordinator["egress"] == [] and relay["ingress"] == []
    assert silo["ingress"][0]["from"] == [{"podSelector": {"matchLabels": {"app": "north-relay"}}}]
    ways = [(way["to"][0], [port["port"] for port in way["ports"]]) for way in relay["egress"]]
    assert ways[0] == ({"ipBlock": {"cidr": "192.0.2.10/32"}}, [9092])
    assert ways[1] == ({"podSelector": {"matchLabels": {"app": "north-silo"}}}, [9443])
    assert ways[2][1] == [53, 53] and len(ways) == 3
    for policy in (silo, relay, coordinator):  # each is of a pod that there is
        name = policy["podSelector"]["matchLabels"]["app"]
        template = {**documents, **rendered(COORDINATOR)}["StatefulSet", name]["spec"]["template"]
        assert template["metadata"]["labels"] == {"app": name}


def test_the_chart_is_packed_with_the_program():
    """A bundle takes deploy/ from what is installed."""
    listed = tomllib.loads((REPOSITORY / "pyproject.toml").read_text())["tool"]["setuptools"]["package-data"]["configs"]
    found = {file for pattern in listed for file in (REPOSITORY / "configs").glob(pattern) if file.is_file()}
    assert {file for file in CHART.rglob("*") if file.is_file()} <= found
