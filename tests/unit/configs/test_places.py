"""One rule for every path in settings, wherever a command is given."""

import os
import pwd
import re
from pathlib import Path
from types import NoneType
from typing import Annotated, get_args, get_origin

import pytest
from pydantic import BaseModel

from configs.errors import InputError
from configs.load import load
from configs.parse import PRESETS, read_toml, to_toml
from configs.run_directory import bind_run_directory
from configs.schema import places
from configs.schema.deployment import FederationConfig, RelayConfig, load_relay
from configs.schema.places import Place, rooted
from configs.schema.schema import RunConfig
from configs.schema.silo import SiloConfig, load_silo
from configs.storage.files import write_atomic

SETTINGS = """
[run]
name = "own"
encryption_key_file = "keys/run.key"

[data.public]
source = "text/public.jsonl"

[data.corpora.more]
source = "~/more"

[data.private]
source = "../records.csv"
dataset_id = "ward"
public_record_count = 5000

[data.deidentify]
names_file = "names.txt"
spacy_model = "./model"

[pretrain]
offload_optimizer = "nvme"
zero_stage = 3
offload_folder = "offload"

[cluster]
scratch_dir = "scratch"

[evaluate.public]
source = "embedded:python-docs"
"""
SILO = """
[silo]
id = "north"
dataset_id = "ward"
state_dir = "state"
anchor_dir = "../anchor"
base_model = "model"
public_record_count = 5000

[data]
source = "records.csv"

[policy]
budget_epsilon = 20.0
budget_delta = 1e-4
"""
RELAY = """
state_dir = "relay"
coordinator = "coordinator.json"
coordinator_fingerprint = "x"
silo_address = "unix:/run/silo.sock"
"""
NO_PATHS = {
    # Names and words.
    "run.name",
    "data.text",
    "data.split",
    "data.encoding",
    "data.columns",
    "data.labels",
    "data.language",
    "data.private.columns",
    "data.private.labels",
    "data.private.language",
    "evaluate.public.columns",
    "evaluate.public.labels",
    "evaluate.public.language",
    "federated.labels",
    "federated.template",
    "federated.study",
    "policy.labels",
    "policy.template",
    "data.private.dataset_id",
    "data.private.silo",
    "data.private.unit",
    "data.public.text",
    "data.public.split",
    "data.public.encoding",
    "data.private.text",
    "data.private.split",
    "data.private.encoding",
    "data.corpora.text",
    "data.corpora.split",
    "data.corpora.encoding",
    "data.corpora",
    "data.private.public_record_counts",
    "data.deidentify.countries",
    "data.deidentify.medical_record_pattern",
    "data.silo",
    "data.unit",
    "evaluate.public.text",
    "evaluate.public.split",
    "evaluate.public.encoding",
    "evaluate.prompt",
    "evaluate.prompts",
    "federated.lora_ranks",
    "federated.deadlines_s",
    "federated.required_silos",
    "federated.adapter_targets",
    "monitoring.mlflow_experiment",
    "policy.base_models",
    "policy.label_sets",
    "pretrain.stages.weights",
    "privacy.evaluation_labels",
    "silo.id",
    "silo.dataset_id",
    "silo.device",
    "silo.relay_user",
    "name",
    "coordinator_fingerprint",
    # Addresses.
    "cluster.address",
    "monitoring.mlflow",
    "hosts",
    "listen",
    "silo_address",
    "proxy",
    "advertise",
}

PATHS = {
    "run.storage",
    "model.source",
    "model.config",
    "run.encryption_key_file",
    "data.public.source",
    "data.corpora.source",
    "data.private.source",
    "data.deidentify.names_file",
    "data.deidentify.spacy_model",
    "pretrain.offload_folder",
    "cluster.scratch_dir",
    "federated.state_dir",
    "federated.continue_from",
    "evaluate.public.source",
    "silo.state_dir",
    "silo.anchor_dir",
    "silo.base_model",
    "silo.encryption_key_file",
    "data.source",
    "state_dir",
    "coordinator",
    "proxy_login_file",
    "advertise_authority",
}


@pytest.fixture
def folder(tmp_path):
    """A folder of settings with two others to stand in."""
    for name in ("settings", "settings/below", "elsewhere"):
        (tmp_path / name).mkdir()
    for name, text in (("own.toml", SETTINGS), ("silo.toml", SILO), ("relay.toml", RELAY)):
        (tmp_path / "settings" / name).write_text(text)
    return tmp_path / "settings"


def texts(annotation):
    """Whether a value may hold text that anybody chooses."""
    if annotation is str:
        return True
    if get_origin(annotation) is Annotated:
        return texts(get_args(annotation)[0])
    return any(texts(inner) for inner in get_args(annotation) if inner not in (NoneType, Ellipsis))


def fields(schema, prefix=""):
    """(name, place or None) of every text in a schema, those of groups by name included."""
    for name, field in schema.model_fields.items():
        kinds = [field.annotation, *get_args(field.annotation)]
        for kind in kinds:
            if isinstance(kind, type) and issubclass(kind, BaseModel):
                yield from fields(kind, f"{prefix}{name}.")
        if texts(field.annotation):
            yield f"{prefix}{name}", next((item for item in field.metadata if isinstance(item, Place)), None)


def test_every_text_says_whether_it_is_a_path():
    """Fails for a new setting until its schema says that it names a place, or this list that it names none."""
    found = [item for schema in (RunConfig, SiloConfig, RelayConfig, FederationConfig) for item in fields(schema)]
    assert {name for name, place in found if place is None} == NO_PATHS
    assert {name for name, place in found if place is not None} == PATHS


def test_settings_mean_the_same_from_wherever_they_are_read(folder, monkeypatch, tmp_path):
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    found = []
    for stand in (folder, folder / "below", tmp_path / "elsewhere"):
        monkeypatch.chdir(stand)
        given = [os.path.relpath(folder / name, stand) for name in ("own.toml", "silo.toml", "relay.toml")]
        found.append((load(given[0]), load_silo(Path(given[1])), load_relay(Path(given[2]))))
    assert found[0] == found[1] == found[2]
    run, silo, relay = found[0]
    assert run.run.storage == f"{folder}/runs"
    assert run.run.encryption_key_file == f"{folder}/keys/run.key"
    assert run.data.public.source == f"{folder}/text/public.jsonl"
    assert run.data.corpora["more"].source == f"{tmp_path}/home/more"
    assert run.data.private.source == f"{folder}/../records.csv"
    assert run.data.deidentify.names_file == f"{folder}/names.txt"
    assert run.data.deidentify.spacy_model == f"{folder}/model"
    assert run.pretrain.offload_folder == f"{folder}/offload"
    assert run.cluster.scratch_dir == f"{folder}/scratch"
    assert run.evaluate.public.source == "embedded:python-docs"
    assert run.federated.state_dir == f"{os.environ['XDG_STATE_HOME']}/siloweave/ledgers"
    assert (silo.silo.state_dir, silo.silo.anchor_dir) == (f"{folder}/state", f"{folder}/../anchor")
    assert (silo.silo.base_model, silo.data.source) == (f"{folder}/model", f"{folder}/records.csv")
    assert silo.silo.encryption_key_file == ""
    assert (relay.state_dir, relay.coordinator) == (f"{folder}/relay", f"{folder}/coordinator.json")


def test_a_link_to_the_settings_folder_leads_to_the_same_places(folder, tmp_path):
    (tmp_path / "link").symlink_to(folder, target_is_directory=True)
    assert load(str(tmp_path / "link" / "own.toml")) == load(str(folder / "own.toml"))


def test_what_is_set_on_the_command_line_is_below_where_one_stands(folder, monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path / "elsewhere")
    given = ["run.storage=mine", 'data.public={source = "a.txt"}', "data.corpora.more.source=b.txt"]
    found = load(str(folder / "own.toml"), [*given, "data.private.source=hf:mine", "cluster.scratch_dir="])
    assert found.run.storage == f"{tmp_path}/elsewhere/mine"
    assert found.data.public.source == f"{tmp_path}/elsewhere/a.txt"
    assert found.data.corpora["more"].source == f"{tmp_path}/elsewhere/b.txt"
    assert (found.data.private.source, found.cluster.scratch_dir) == ("hf:mine", "")
    assert found.run.encryption_key_file == f"{folder}/keys/run.key"


def test_a_presets_runs_lie_where_one_stands_and_its_ledgers_in_one_place(monkeypatch, tmp_path):
    found = []
    for name in ("a", "b"):
        (tmp_path / name).mkdir()
        monkeypatch.chdir(tmp_path / name)
        found.append(load("tiny"))
        assert found[-1].run.storage == f"{tmp_path}/{name}/runs"
    assert found[0].federated.state_dir == found[1].federated.state_dir == str(places.ledgers())
    assert not Path(found[0].federated.state_dir).is_relative_to(PRESETS)


@pytest.mark.parametrize(
    "given",
    [
        'data.public.source=""',
        "data.private.source=",
        'data.corpora.x={source=" "}',
        "run.storage=",
        'federated.state_dir=" "',
        'data.deidentify.names_file=" "',
    ],
)
def test_an_empty_path_is_refused(given, tmp_path, monkeypatch):
    """Before: an empty source read the folder where one stood."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "secret.txt").write_text("a text that nobody named")
    with pytest.raises(InputError, match="is empty: give the path of") as caught:
        load("tiny", [given])
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("text", ["s3://bucket/x", "a\\u0000b", "~nobody-of-this-name/x"])
def test_what_is_no_path_is_refused(text):
    with pytest.raises(InputError, match=r"federated\.state_dir is "):
        load("tiny", [f'federated.state_dir="{text}"'])


def test_urls_and_names_stay_as_they_are():
    given = ["run.storage=s3://bucket/x", "data.public.source=hf:a/b", "run.encryption_key_file=env:"]
    found = load("tiny", [*given, "data.deidentify.spacy_model=en_core_web_sm"])
    assert (found.run.storage, found.data.public.source) == ("s3://bucket/x", "hf:a/b")
    assert (found.run.encryption_key_file, found.data.deidentify.spacy_model) == ("env:", "en_core_web_sm")


def test_an_empty_path_in_a_silos_and_a_relays_settings_is_refused(folder):
    for name, load_it, field in (("silo", load_silo, "silo.state_dir"), ("relay", load_relay, "state_dir")):
        path = folder / f"{name}.toml"
        path.write_text(re.sub('state_dir = ".*"', 'state_dir = ""', path.read_text()))
        with pytest.raises(InputError, match=rf"{name}\.toml: {field} is empty: give the path of"):
            load_it(path)


@pytest.mark.parametrize("home", [None, "", "relative"])
def test_without_a_home_it_is_the_systems(home, monkeypatch):
    for name in ("HOME", "XDG_STATE_HOME"):
        monkeypatch.delenv(name, raising=False)
    if home is not None:
        monkeypatch.setenv("HOME", home)
        monkeypatch.setenv("XDG_STATE_HOME", home)
    expected = Path(pwd.getpwuid(os.getuid()).pw_dir) / ".local" / "state" / "siloweave" / "ledgers"
    assert load("tiny").federated.state_dir == str(expected)
    assert load("tiny", ["federated.state_dir=~/x"]).federated.state_dir == str(expected.parents[3] / "x")


def test_a_user_without_any_home_is_told_what_to_set(monkeypatch):
    for name in ("HOME", "XDG_STATE_HOME"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setattr(os, "getuid", lambda: 2**31 - 7)  # a container's user without an entry
    with pytest.raises(InputError, match="set HOME, or XDG_STATE_HOME"):
        load("tiny")
    load("tiny", ["federated.state_dir=/shared/state"])  # needs none


def test_what_others_will_read_holds_absolute_paths_alone(folder):
    with pytest.raises(InputError, match=r"run\.encryption_key_file is 'keys/run\.key': give an absolute path"):
        load(str(folder / "own.toml"), elsewhere=True)
    assert load("tiny", ["run.storage=/shared"], elsewhere=True).federated.state_dir == ""
    with pytest.raises(InputError, match=r"run\.storage is '~/x': give an absolute path"):
        load("tiny", ["run.storage=~/x"], elsewhere=True)


def test_what_was_rooted_stays(folder):
    config = load(str(folder / "own.toml"))
    tree = rooted(RunConfig, config.model_dump(mode="json"), Path("/other"), "x", fill=True)
    assert RunConfig.model_validate(tree) == config


def older(tmp_path, config, state_dir):
    """The run's directory as an older version left it, after its federation."""
    directory = tmp_path / "runs" / "tiny"
    text = to_toml(config).replace(f'state_dir = "{config.federated.state_dir}"', f'state_dir = "{state_dir}"')
    text = text.replace(f'storage = "{config.run.storage}"', 'storage = "runs"')
    write_atomic(directory / "config.toml", text.encode())
    (directory / "federated").mkdir()
    return directory


def test_a_run_of_relative_paths_goes_on_with_its_own_ledgers(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    directory = older(tmp_path, load("tiny"), "state")
    with pytest.raises(InputError, match=r"federated\.state_dir was 'state', below the folder where the run was star"):
        bind_run_directory(load("tiny"))
    config = load("tiny", ["federated.state_dir=state"])
    assert bind_run_directory(config) == directory
    assert read_toml(directory / "config.toml")["federated"]["state_dir"] == f"{tmp_path}/state"
    assert bind_run_directory(config) == directory


def test_a_path_may_follow_what_says_its_kind(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert load("tiny", ['model.source="gguf:a.gguf"']).model.source == f"gguf:{tmp_path / 'a.gguf'}"
    assert load("tiny", ['model.source="hf:org/name@1"']).model.source == "hf:org/name@1"
    with pytest.raises(InputError, match=r"model\.source is empty"):
        load("tiny", ['model.source="gguf:"'])


def test_a_group_that_may_be_left_out_has_its_paths_by_the_same_rule(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert load("tiny", ["data.public.source=a.jsonl"]).data.public.source == str(tmp_path / "a.jsonl")
