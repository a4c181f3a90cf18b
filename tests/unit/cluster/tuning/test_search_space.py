"""Distributions as they are written, trials as they are drawn, and what is refused before anything starts."""

import math
import shlex

import pytest
from repository import REPOSITORY

from cluster.tuning.search import Search
from cluster.tuning.search_space import draw_trials, parse_parameters
from configs.errors import InputError
from configs.load import load

PAGE = REPOSITORY / "docs" / "tuning.md"
BASE = load("tiny")
LR = "pretrain.learning_rate=loguniform(1e-4,1e-2)"


def draws(text, count=40):
    trials = draw_trials(BASE, parse_parameters([text, "run.seed=randint(0,1000000)"]), count, "/trials")
    return [next(iter(trial.values.values())) for trial in trials]


def test_every_distribution_stays_in_its_range_and_reaches_its_ends():
    assert all(0.1 <= value <= 0.2 for value in draws("pretrain.weight_decay=uniform(0.1,0.2)"))
    logs = [math.log10(value) for value in draws(LR, 200)]
    assert all(-4 <= value <= -2 for value in logs)
    assert 60 < sum(value < -3 for value in logs) < 140
    assert set(draws("model.layers=randint(1,3)")) == {1, 2, 3}
    assert set(draws("pretrain.warmup_steps=lograndint(1,3)")) == {1, 2, 3}
    assert set(draws("pretrain.batch_size=choice(8,16)")) == {8, 16}
    assert set(draws('pretrain.precision=choice("fp32", "bf16")')) == set(draws("pretrain.precision=choice(fp32,bf16)"))


def test_trials_are_a_function_of_seed_parameters_and_number():
    parameters = parse_parameters([LR, "pretrain.batch_size=choice(8,16)"])
    some, more = (draw_trials(BASE, parameters, count, "/trials") for count in (3, 7))
    assert [trial.values for trial in more[:3]] == [trial.values for trial in some]
    other = draw_trials(load("tiny", ["run.seed=1"]), parameters, 3, "/trials")
    assert [trial.values for trial in other] != [trial.values for trial in some]
    config = some[1].config
    assert config.pretrain.learning_rate == some[1].values["pretrain.learning_rate"]
    assert (config.run.name, config.run.storage) == ("trial-0001", "/trials")
    assert config.model == BASE.model


def test_no_two_trials_are_equal():
    parameters = parse_parameters(["pretrain.batch_size=choice(8,16,24)"])
    assert sorted(t.values["pretrain.batch_size"] for t in draw_trials(BASE, parameters, 3, "/t")) == [8, 16, 24]
    with pytest.raises(InputError, match="these parameters have 3 different values; lower --trials"):
        draw_trials(BASE, parameters, 4, "/t")


@pytest.mark.parametrize(
    ("texts", "expected"),
    [
        ([], "--param is missing"),
        (["pretrain.learning_rate"], "write it as group.field=DISTRIBUTION"),
        (["pretrain.learning_rate=normal(0,1)"], "write it as group.field=DISTRIBUTION"),
        (["pretrain.learning_rate=loguniform(0,1)"], "give loguniform a lower end above 0 and a larger upper end"),
        (["pretrain.learning_rate=uniform(2,1)"], "give uniform a lower end and a larger upper end"),
        (["pretrain.learning_rate=uniform(1)"], "uniform takes two numbers"),
        (["pretrain.learning_rate=uniform(a,b)"], "uniform takes two numbers"),
        (["pretrain.learning_rate=uniform(0,inf)"], "uniform takes two numbers"),
        (["model.layers=randint(1,2.5)"], "randint takes whole numbers; for others there is uniform"),
        (["model.layers=lograndint(1.5,2)"], "lograndint takes whole numbers; for others there is loguniform"),
        (["model.layers=choice()"], "at least one value"),
        (["model.layers=choice(1,,2)"], "separate them with commas"),
        ([LR, LR], "given 2 times"),
        (["data.private.source=choice(a,b)"], "the private data are not a setting to search"),
        (["privacy.budget_epsilon=choice(1,8)"], "it changes nothing about what is learned"),
        (["federated.workers=choice(1,2)"], "it changes nothing about what is learned"),
        (["run.name=choice(a,b)"], "it changes nothing about what is learned"),
        (["monitoring.tensorboard=choice(true,false)"], "it changes nothing about what is learned"),
    ],
)
def test_what_is_malformed_is_one_clear_line(texts, expected):
    with pytest.raises(InputError) as caught:
        parse_parameters(texts)
    assert expected in str(caught.value)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("pretrain.learning_rat=uniform(0,1)", "--param pretrain.learning_rat: no such setting"),
        ("pretrain=choice(1,2)", "--param pretrain: no such setting"),
        ("pretrain.batch_size=choice(8,9)", "pretrain.batch_size is 9: give a multiple of cluster.world_size"),
        ("model.heads=choice(2,3)", r"trial-000\d \(model.heads=\d\): model.heads is 3"),
        ("pretrain.precision=choice(fp32,fp4)", "pretrain.precision is 'fp4'"),
    ],
)
def test_what_the_schema_refuses_is_said_with_the_trial(text, expected):
    with pytest.raises(InputError, match=expected.replace("(8", r"\(8")):
        draw_trials(BASE, parse_parameters([text]), 2, "/trials")


def test_a_loss_a_token_is_no_measure_across_tokenizers(tmp_path):
    base, parameters = (
        load("tiny", [f"run.storage={tmp_path}"]),
        parse_parameters(["tokenizer.vocab_size=choice(512,1024)"]),
    )
    with pytest.raises(InputError, match="validation_bits_per_char"):
        Search(base, parameters, 2, "validation_loss")
    with pytest.raises(InputError, match="give validation_loss or validation_bits_per_char"):
        Search(base, parameters, 2, "accuracy")
    assert len(Search(base, parameters, 2, "validation_bits_per_char").trials) == 2


def test_a_search_is_over_pretraining_or_over_federations(tmp_path):
    base, federated = load("tiny", [f"run.storage={tmp_path}"]), "federated.learning_rate=uniform(0.1,0.2)"
    search = Search(base, parse_parameters([federated, "privacy.epsilon=choice(1,2)"]), 2, "")
    assert search.metric == "held_out_bits_per_char"
    assert not search.trials[0].config.evaluate.without_dp
    assert Search(base, parse_parameters([LR]), 2, "").metric == "validation_loss"
    with pytest.raises(InputError, match="federations are searched on one base model"):
        Search(base, parse_parameters([federated, LR]), 2, "")
    with pytest.raises(InputError, match="give held_out_bits_per_char"):
        Search(base, parse_parameters([federated]), 2, "validation_loss")


def test_bad_input_ends_the_command_before_ray_starts(siloweave, tmp_path):
    for param in ("pretrain.steps=normal(1,2)", "privacy.epsilon=choice(0,2)", "pretrain.batch_size=choice(7,9)"):
        done = siloweave("tune", "-c", "tiny", "--param", param, "--trials", "2", cwd=tmp_path)
        assert done.returncode == 2, done.stderr
        assert done.stderr.startswith("error: ")
        assert done.stderr.count("\n") == 1
    assert not list(tmp_path.rglob("*"))


def test_a_search_is_submitted_with_all_its_parameters():
    from cluster.commands.jobs import _resolve

    given = ["--set", "run.storage=/shared", "--param", LR, "--param", "model.layers=choice(1,2)", "--trials", "3"]
    _, words = _resolve(["tune", "-c", "tiny", *given])
    assert words == ["tune", f"--param={LR}", "--param=model.layers=choice(1,2)", "--trials=3"]


def test_the_documents_search_is_one():
    (line,) = [line for line in PAGE.read_text().splitlines() if line.startswith("$ siloweave tune ")]
    words = shlex.split(line)
    texts = [words[at + 1] for at, word in enumerate(words) if word == "--param"]
    assert len(draw_trials(load("demo"), parse_parameters(texts), 8, "/trials")) == 8


def test_a_submitted_search_needs_the_ledgers_where_they_stay():
    from cluster.runtime.jobs import check_movable

    with pytest.raises(InputError, match=r"federated\.state_dir is empty: give an absolute path"):
        check_movable("tune", load("tiny", ["run.storage=/shared/runs"], elsewhere=True))
