import ast
from pathlib import Path

import pytest
from pydantic import BaseModel
from repository import REPOSITORY

from configs.errors import InputError
from configs.load import _apply, load
from configs.parse import presets, to_toml
from configs.run_directory import _LATER, _MOVABLE, bind_run_directory, config_digest, flatten
from configs.schema.deployment import FederationConfig, RelayConfig
from configs.schema.schema import RunConfig
from configs.schema.silo import SiloConfig, load_silo
from configs.storage.files import digest_json

PACKAGES = ("cluster", "federated", "privacy", "trainer", "configs")


def fields(model: type[BaseModel]) -> set[str]:
    found = set()
    for name, field in model.model_fields.items():
        nested = field.annotation
        if isinstance(nested, type) and issubclass(nested, BaseModel):
            found |= fields(nested)
        found.add(name)
    return found


@pytest.mark.parametrize("preset", presets())
def test_every_preset_loads_and_survives_toml(preset, tmp_path):
    config = load(preset)
    (tmp_path / "again.toml").write_text(to_toml(config))
    assert load(str(tmp_path / "again.toml")) == config


def test_shipped_presets_are_the_documented_ones():
    assert presets() == ["chat", "classify", "demo", "entities", "gpu", "qa", "summarise", "tiny", "translate"]


@pytest.mark.parametrize("schema", [RunConfig, SiloConfig, FederationConfig, RelayConfig])
def test_every_setting_is_read_somewhere(schema):
    read = set()
    for package in PACKAGES:
        for path in (REPOSITORY / package).rglob("*.py"):
            if not path.name.endswith(("schema.py", "settings.py")):
                tree = ast.parse(path.read_text())
                read |= {node.attr for node in ast.walk(tree) if isinstance(node, ast.Attribute)}
    # The group `run` and its like are reached by name, too: config.run, config.data, ...
    assert fields(schema) - read == set()


def test_every_setting_has_a_description():
    for group in RunConfig.model_fields.values():
        for name, field in group.annotation.model_fields.items():
            assert field.description, name


@pytest.mark.parametrize(
    ("override", "expected"),
    [
        ("pretrain.learning_rat=1", "pretrain.learning_rat: no such setting"),
        ("pretrain.steps=0", "pretrain.steps is 0: input should be greater than or equal to 1"),
        ("privacy.sampling_rate=1.5", "privacy.sampling_rate is 1.5: input should be less than 1"),
        ("privacy.delta=1e-3", "privacy.delta is 0.001: input should be less than or equal to 0.00001"),
        ("privacy.unit=person", "privacy.unit is 'person': input should be 'record' or 'client'"),
        ("privacy.unit=client", "privacy.num_clients is 0: with privacy.unit 'client' give federated.min_silos (1) to"),
        ("privacy.sampler=shuffle", "privacy.sampler is 'shuffle': input should be 'poisson' or 'truncated_poisson'"),
        ("privacy.max_batch_size=7", "privacy.max_batch_size is 7 and privacy.sampler 'poisson': give 0"),
        ("pretrain.batch_size=7", "pretrain.batch_size is 7: give a multiple of cluster.world_size (2)"),
        ("pretrain.warmup_steps=40", "pretrain.warmup_steps is 40: give less than pretrain.steps (40)"),
        ("model.heads=3", "model.heads is 3"),
        ("data.private.public_record_count=1000000", "public_record_count 1000000 allows at most 1e-07"),
        ("data.private.public=false", "evaluate.without_dp is true"),
        ("run.storage=s3://", "run.storage is 's3://': give a folder, or a URL"),
        ("run.storage=memory://runs", "run.storage is 'memory://runs': give a folder, or a URL"),
        ("run.storage=s3://key:secret@bucket", "run.storage holds credentials: leave them out"),
        ("privacy.budget_epsilon=inf", "privacy.budget_epsilon is inf"),
        ('data.private.public_record_counts={"North "=1, North=2}', "'North' is there twice, in two spellings"),
        ('federated.lora_ranks={" "=1}', "the name ' ' is none; give a silo's name"),
        ('privacy.evaluation_labels=["caf\u00e9", "cafe\u0301"]', "give two or more, each once"),
        ('federated.required_silos=["a", " a"]', "the name 'a' is there twice, in two spellings"),
        ("federated.deadlines_s={a=0}", "federated.deadlines_s.a is 0: input should be greater than 0"),
        ("federated.grace_s=3", "federated.grace_s is 3 and federated.enough_silos 0: a round waits for every silo"),
        ("federated.buffer=2", "federated.buffer is 2: federated.schedule 'synchronous' has no use for it"),
        ("federated.max_staleness=3", "federated.max_staleness is 3: federated.schedule 'synchronous' has no use"),
        ("federated.schedule=buffered", "federated.buffer is 0 with federated.schedule 'buffered': give the number of"),
        ("nonsense", "write it as group.field=value"),
    ],
)
def test_a_bad_setting_is_one_clear_line(override, expected):
    with pytest.raises(InputError) as caught:
        load("tiny", [override])
    assert expected in str(caught.value)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("overrides", "expected"),
    [
        (["federated.min_silos=3"], "federated.min_silos is 3 and federated.buffer 2"),
        (['federated.required_silos=["a"]'], "federated.required_silos is ('a',) with federated.schedule 'buffered'"),
        (["federated.enough_silos=2"], "federated.enough_silos is 2 with federated.schedule 'buffered'"),
        (["federated.stages=[{rounds=1}, {rounds=1}]", "federated.rounds=2"], "federated.stages has 2 with"),
        (["federated.aggregation=scaffold", "federated.optimizer=sgd"], "federated.aggregation is 'scaffold' with"),
        (["federated.aggregation=median"], "federated.aggregation is 'median' with federated.schedule 'buffered'"),
        (["federated.adapters=product"], "federated.adapters is 'product' with federated.schedule 'buffered'"),
        (["privacy.evaluations=2"], "privacy.evaluations is 2 with federated.schedule 'buffered'"),
        (
            ["privacy.unit=client", "privacy.num_clients=5", "evaluate.without_dp=false"],
            "federated.schedule is 'buffer",
        ),
    ],
)
def test_what_means_nothing_in_buffered_rounds_is_refused_in_one_line(overrides, expected):
    with pytest.raises(InputError) as caught:
        load("tiny", ["federated.schedule=buffered", "federated.buffer=2", *overrides])
    assert expected in str(caught.value)
    assert "\n" not in str(caught.value)


def test_settings_name_silos_and_labels_as_the_data_are_read():
    counts = 'data.private.public_record_counts={" North"=1, "Jose\u0301"=2, "17.0"=3, north=4}'
    labels = 'privacy.evaluation_labels=["cafe\u0301", "tea"]'
    found = load("tiny", [counts, labels, "privacy.evaluations=1"])
    assert found.data.private.public_record_counts == {"North": 1, "Jos\u00e9": 2, "17": 3, "north": 4}
    assert found.privacy.evaluation_labels == ("caf\u00e9", "tea")


def test_overrides_are_read_as_toml_or_text():
    config = load("tiny", ["pretrain.steps=50", "run.name=other", 'data.private.source="x.jsonl"'])
    assert (config.pretrain.steps, config.run.name) == (50, "other")
    assert config.data.private.source == str(Path.cwd() / "x.jsonl")


@pytest.mark.parametrize(
    ("override", "keys", "expected"),
    [
        ("federated.lora_ranks={north=2}", ("federated", "lora_ranks"), {"north": 2}),
        ('privacy.evaluation_labels=["yes","no"]', ("privacy", "evaluation_labels"), ["yes", "no"]),
        ('data.counts."St. Mary"=100', ("data", "counts", "St. Mary"), 100),
        ("data.counts.'a=b'=100", ("data", "counts", "a=b"), 100),
        (r'data.counts."a \" . \u00e4"=1', ("data", "counts", 'a " . ä'), 1),
        (' data . "counts" = 1', ("data", "counts"), 1),
        ("data.counts.St Mary=1", ("data", "counts", "St Mary"), 1),
        ("run.name=other", ("run", "name"), "other"),
        ("run.name=", ("run", "name"), ""),
        ("run.name=a=b", ("run", "name"), "a=b"),
        ("run.name=it's", ("run", "name"), "it's"),
        ("run.name='[1'", ("run", "name"), "[1"),
        ("run.name=1e", ("run", "name"), "1e"),
        ("run.name=x\ny = 2", ("run", "name"), "x\ny = 2"),
        ("run.name=" + "9" * 5000, ("run", "name"), "9" * 5000),
    ],
)
def test_keys_and_values_of_an_override_are_those_of_toml(override, keys, expected):
    tree = {"data": {"counts": {"kept": 7}}}
    _apply(tree, override, Path("/"))
    for key in keys[:-1]:
        tree = tree[key]
    assert tree[keys[-1]] == expected
    assert tree.get("kept", 7) == 7


@pytest.mark.parametrize(
    ("override", "expected"),
    [
        ("privacy.evaluation_labels=[yes,no]", "'[yes,no]' is no TOML (Invalid value); write a list as"),
        ("federated.lora_ranks={north}", "is no TOML"),
        ('run.name="open', "is no TOML"),
        ("run.name=" + "[" * 10_000, "is no TOML"),
        ("run.name=[1]\ny = 2", "more than one value"),
        ('run."name=1', "write it as group.field=value"),
        ("run..name=1", "write it as group.field=value"),
        (".name=1", "write it as group.field=value"),
        ("name=1", "write it as group.field=value"),
        ('"run.name"=1', "write it as group.field=value"),
        ('run."na\nme"=1', "write it as group.field=value"),
        (r'run."\q"=1', "write it as group.field=value"),
        ("run.storage.x=1", "storage is a value, not a group"),
        ("", "write it as group.field=value"),
    ],
)
def test_an_override_that_does_not_parse_is_one_clear_line(override, expected):
    with pytest.raises(InputError) as caught:
        _apply({"run": {"storage": "runs"}}, override, Path("/"))
    assert expected in str(caught.value)
    assert repr(override) in str(caught.value)
    assert "\n" not in str(caught.value)


def test_a_table_takes_the_place_of_the_whole_and_an_entry_is_added():
    base = ["federated.adapters=product"]
    whole = load("tiny", [*base, "data.private.public_record_counts={roman=5000}"])
    assert whole.data.private.public_record_counts == {"roman": 5000}
    one = load("tiny", [*base, 'data.private.public_record_counts."St. Mary"=5000'])
    assert one.data.private.public_record_counts["St. Mary"] == 5000
    assert len(one.data.private.public_record_counts) == 6


def test_missing_and_broken_files_are_named(tmp_path):
    with pytest.raises(InputError, match="no such file"):
        load(str(tmp_path / "nowhere.toml"))
    (tmp_path / "broken.toml").write_text("[run\n")
    with pytest.raises(InputError, match="not TOML"):
        load(str(tmp_path / "broken.toml"))
    with pytest.raises(InputError, match="no such file"):
        load_silo(tmp_path / "silo.toml")


def test_a_run_directory_of_another_configuration_is_refused(tmp_path):
    base = [f"run.storage={tmp_path}"]
    directory = bind_run_directory(load("tiny", base))
    (directory / "corpus").mkdir()
    (directory / "corpus" / "manifest.json").touch()  # a stage has committed something
    before = (directory / "config.toml").read_bytes()
    with pytest.raises(InputError, match=r"pretrain.steps was 40 and is 41.*choose another run.name"):
        bind_run_directory(load("tiny", [*base, "pretrain.steps=41"]))
    assert (directory / "config.toml").read_bytes() == before


def test_where_ray_runs_may_change_between_two_starts(tmp_path):
    base = [f"run.storage={tmp_path}"]
    bind_run_directory(load("tiny", base))
    moved = load("tiny", [*base, "cluster.max_failures=3", "federated.workers=3", "privacy.budget_epsilon=99"])
    bind_run_directory(moved)
    assert load(str(tmp_path / "tiny" / "config.toml")) == moved
    assert config_digest(moved) == config_digest(load("tiny", base))


def test_a_run_from_before_later_settings_keeps_its_digest(tmp_path):
    """With another one its commits would count for nothing, and its rounds be charged again."""
    config = load("tiny", [f"run.storage={tmp_path}"])
    before = {name: value for name, value in flatten(config) if name not in {*_MOVABLE, *_LATER}}
    assert config_digest(config) == digest_json(before)
    other = config.model_copy(update={"federated": config.federated.model_copy(update={"task": "classify"})})
    assert config_digest(other) != config_digest(config)


def test_a_start_that_made_nothing_does_not_bind_the_directory(tmp_path):
    base = [f"run.storage={tmp_path}"]
    bind_run_directory(load("tiny", [*base, "data.public.source=typo.jsonl"]))
    assert bind_run_directory(load("tiny", base)) == tmp_path / "tiny"
