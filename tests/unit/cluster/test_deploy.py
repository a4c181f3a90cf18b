"""The deployment files: valid by their schema where there is one, and every command and setting in them exists."""

import re
import shlex
import subprocess
from pathlib import Path

import jsonschema
import pytest
import ray
import yaml
from repository import REPOSITORY

from cluster.runtime.jobs import check_movable
from configs.parse import parse, presets
from configs.schema.schema import RunConfig

DEPLOY = REPOSITORY / "configs" / "deploy"
# The fields of ray.io/v1 in KubeRay's API reference, as far as they are of use here.
RAYJOB = {
    "entrypoint",
    "submissionMode",
    "backoffLimit",
    "activeDeadlineSeconds",
    "shutdownAfterJobFinishes",
    "ttlSecondsAfterFinished",
    "rayClusterSpec",
}
CLUSTER = {"rayVersion", "headGroupSpec", "workerGroupSpecs"}
HEAD = {"rayStartParams", "template"}
WORKERS = {"groupName", "replicas", "minReplicas", "maxReplicas", *HEAD}


def text(name):
    return (DEPLOY / name).read_text()


def commands(script):
    """Every siloweave command line of a script, its comments included."""
    joined = re.sub(r"\\\n#?", " ", script)
    found = re.findall(r"(?:^ *|/bin/|# +)(siloweave +[a-z].*)", joined, re.MULTILINE)
    return [shlex.split(line)[1:] for line in found]


@pytest.fixture(scope="module")
def documents():
    return list(yaml.safe_load_all(text("rayjob.yaml")))


@pytest.mark.parametrize(("name", "least"), [("rayjob.yaml", 4), ("ray-up.yaml", 2), ("slurm.sh", 4)])
def test_every_command_exists_with_its_options(name, least):
    import typer

    import siloweave

    group = typer.main.get_command(siloweave.app)
    found = commands(text(name))
    assert len(found) >= least
    for command, *arguments in found:
        context = group.commands[command].make_context(command, list(arguments))
        if command == "submit":  # what comes after `--` is a command as well
            inner, *more = context.params["command"]
            context = group.commands[inner].make_context(inner, more)
        config = context.params["config"]
        assert config in presets() or config in ("/etc/siloweave/run.toml", "$config")


def test_the_rayjob_uses_documented_fields_only(documents):
    config_map, job = documents
    assert (config_map["apiVersion"], config_map["kind"]) == ("v1", "ConfigMap")
    assert (job["apiVersion"], job["kind"]) == ("ray.io/v1", "RayJob")
    spec = job["spec"]
    cluster = spec["rayClusterSpec"]
    assert set(spec) <= RAYJOB
    assert set(cluster) == CLUSTER
    assert set(cluster["headGroupSpec"]) == HEAD
    for group in cluster["workerGroupSpecs"]:
        assert set(group) == WORKERS
    assert cluster["rayVersion"] == ray.__version__
    assert f"ray=={ray.__version__}" in (REPOSITORY / "constraints.txt").read_text()


def test_the_rayjobs_settings_hold_and_fit_its_cluster(documents):
    import tomllib

    config_map, job = documents
    config = parse(RunConfig, tomllib.loads(config_map["data"]["run.toml"]), "run.toml")
    check_movable("pretrain", config)
    cluster = job["spec"]["rayClusterSpec"]
    pods = [cluster["headGroupSpec"], *cluster["workerGroupSpecs"]]
    for pod in (group["template"]["spec"] for group in pods):
        container = pod["containers"][0]
        mounts = {mount["name"]: mount["mountPath"] for mount in container["volumeMounts"]}
        assert Path(config.run.storage).is_relative_to(mounts["shared"])
        assert Path(config.data.public.source).is_relative_to(mounts["shared"])
        assert mounts["settings"] == "/etc/siloweave"
        assert set(mounts) == {volume["name"] for volume in pod["volumes"]}
        assert container["resources"]["requests"] == container["resources"]["limits"]
    names = {volume["configMap"]["name"] for volume in pods[0]["template"]["spec"]["volumes"] if "configMap" in volume}
    assert names == {config_map["metadata"]["name"]}
    assert job["spec"]["entrypoint"].split()[-1] == "/etc/siloweave/run.sh"
    (workers,) = cluster["workerGroupSpecs"]
    cpus = workers["replicas"] * int(workers["template"]["spec"]["containers"][0]["resources"]["limits"]["cpu"])
    assert cpus >= config.cluster.world_size * config.cluster.threads_per_rank


def test_the_rayjobs_script_is_a_shell_script(documents):
    subprocess.run(["bash", "-n"], input=documents[0]["data"]["run.sh"], text=True, check=True)


def test_the_ray_up_file_is_valid_by_rays_own_schema_and_checks():
    from ray.autoscaler._private.util import prepare_config, validate_config

    config = yaml.safe_load(text("ray-up.yaml"))
    prepared = prepare_config(config)
    validate_config(prepared)  # against ray/autoscaler/ray-schema.json
    with pytest.raises(jsonschema.ValidationError, match="max_worker"):
        validate_config({**prepared, "max_worker": 2})
    assert prepared["available_node_types"]["local.cluster.node"]["min_workers"] == 2
    assert "file_mounts" not in config  # a checkout may hold data and ledgers


def test_every_ray_start_option_exists():
    from ray.scripts.scripts import cli

    known = {
        name
        for command in ("start", "stop", "health-check")
        for option in cli.commands[command].params
        for name in (*option.opts, *option.secondary_opts)
    }
    used = set()
    for name in ("ray-up.yaml", "slurm.sh"):
        for line in re.sub(r"\\\n", " ", re.sub(r"\n    --", " --", text(name))).splitlines():
            if re.search(r"\bray (start|health-check)\b|^ *node ", line) and not line.lstrip().startswith("#"):
                used |= set(re.findall(r"(?<= )--[a-z-]+", line.split("ray start")[-1]))
    assert len(used) > 6
    assert used - {"--nodelist", "--exclude"} <= known  # those two are srun's


def test_the_slurm_script_is_a_shell_script():
    subprocess.run(["bash", "-n", str(DEPLOY / "slurm.sh")], check=True)
    directives = re.findall(r"^#SBATCH (--[a-z-]+)", text("slurm.sh"), re.MULTILINE)
    assert set(directives) == {
        "--job-name",
        "--exclusive",
        "--ntasks-per-node",
        "--cpus-per-task",
        "--time",
        "--requeue",
    }
    # sbatch stops reading directives at the first command.
    assert text("slurm.sh").index("set -euo") > text("slurm.sh").rindex("#SBATCH")
