"""Schedules, optimizers and what becomes of the settings: nothing here starts a rank."""

from copy import deepcopy

import pytest
import torch
from transformers import get_scheduler

from cluster.checks.doctor import examine
from cluster.checks.estimate import estimate
from configs.errors import InputError
from configs.load import load
from trainer.models.families import model_config, new_model, parameter_sizes
from trainer.objectives.causal import next_token_nats
from trainer.pretraining.deepspeed_settings import deepspeed_config, require_supported, unsupported
from trainer.pretraining.dropout import seed_dropout
from trainer.pretraining.optimizers import hold_back, learning_rate, new_optimizer
from trainer.rank import Rank, device_index

STEPS, WARMUP = 50, 5
SIZES = [4096, 64, 300_000]


def settings(*overrides):
    return load("tiny", [f"pretrain.{override}" for override in overrides]).pretrain


def schedule(*overrides):
    chosen = settings(f"steps={STEPS}", f"warmup_steps={WARMUP}", "learning_rate=1.0", *overrides)
    return [learning_rate(chosen, step) for step in range(STEPS)]


@pytest.mark.parametrize(
    ("name", "overrides", "theirs", "specific"),
    [
        ("cosine", ["min_learning_rate_ratio=0.0"], "cosine", {}),
        ("cosine", ["min_learning_rate_ratio=0.1"], "cosine_with_min_lr", {"min_lr_rate": 0.1}),
        ("linear", ["min_learning_rate_ratio=0.0"], "linear", {}),
        ("constant", [], "constant_with_warmup", {}),
        (
            "wsd",
            ["min_learning_rate_ratio=0.2", "decay_share=0.3"],
            "warmup_stable_decay",
            {"num_decay_steps": 15, "decay_type": "linear", "min_lr_ratio": 0.2},
        ),
    ],
)
def test_schedules_are_those_of_transformers(name, overrides, theirs, specific):
    """After the warm-up: ours is one step ahead there, so that the first step has a learning rate."""
    optimizer = torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))], lr=1.0)
    scheduler = get_scheduler(theirs, optimizer, WARMUP, STEPS, scheduler_specific_kwargs=specific)
    expected = []
    for _ in range(STEPS):
        expected.append(scheduler.get_last_lr()[0])
        optimizer.step()
        scheduler.step()
    found = schedule(f"schedule={name}", *overrides)
    assert found[WARMUP:] == pytest.approx(expected[WARMUP:], abs=1e-12)
    assert found[:WARMUP] == pytest.approx([(step + 1) / WARMUP for step in range(WARMUP)])


def test_a_schedule_without_warm_up_starts_at_the_peak():
    for name in ("cosine", "linear", "wsd", "constant"):
        assert learning_rate(settings(f"schedule={name}", "warmup_steps=0", "learning_rate=0.5"), 0) == 0.5


def test_a_stage_with_a_rate_of_its_own_has_its_own_schedule_and_others_go_on_with_the_whole_one():
    """40 steps as tiny has them, with a warm-up of 4."""
    whole, own = settings(), settings("steps=15", "learning_rate=0.5")
    staged = settings("stages=[{steps=10}, {steps=15, learning_rate=0.5}, {steps=15}]")
    found = [learning_rate(staged, step) for step in range(40)]
    assert found[:10] == [learning_rate(whole, step) for step in range(10)]
    assert found[10:25] == [learning_rate(own, step) for step in range(15)]
    assert found[25:] == [learning_rate(whole, step) for step in range(25, 40)]


FROZEN = "stages=[{steps=10, frozen=1}, {steps=20, frozen='embeddings'}, {steps=10}]"


@pytest.mark.parametrize("optimizer", ["adamw", "momentum"])
def test_a_step_passes_over_what_is_frozen_and_goes_on_from_its_moments_later(optimizer):
    chosen = load("tiny", [f"pretrain.{FROZEN}", f"pretrain.optimizer={optimizer}"])
    model = new_model(chosen.model, 64, seed=0)
    optimizer, frozen = new_optimizer(chosen.pretrain, model), hold_back(model, chosen)
    groups = [(group["depth"], group["weight_decay"] > 0) for group in optimizer.param_groups]
    assert groups == [(0, True), (1, True), (2, True), (1, False), (2, False)]  # no vector is an embedding

    def step(below):
        frozen.below = below
        for group in optimizer.param_groups:
            group["frozen"] = group["depth"] < below
        next_token_nats(model, torch.arange(32).reshape(2, 16)).backward()
        gradients = {name: value.grad.clone() for name, value in model.named_parameters()}
        before = {name: value.detach().clone() for name, value in model.named_parameters()}
        moments = {name: deepcopy(optimizer.state.get(value)) for name, value in model.named_parameters()}
        optimizer.step()
        optimizer.zero_grad()
        moved = {name for name, value in model.named_parameters() if not torch.equal(value, before[name])}
        for name, value in model.named_parameters():
            assert (name in moved) == bool(gradients[name].any())
            if name not in moved:
                assert str(optimizer.state.get(value)) == str(moments[name])
        return moved

    every = {name for name, _ in model.named_parameters()}
    embeddings = {name for name in every if "embed_tokens" in name}
    assert step(0) == every
    assert step(2) == every - embeddings - {name for name in every if "layers.0." in name}
    assert step(1) == every - embeddings
    assert step(0) == every


@pytest.mark.parametrize(
    ("overrides", "expected"),
    [
        (["pretrain.stages=[{steps=30}]"], "their steps add up to 30, and pretrain.steps is 40"),
        (["pretrain.stages=[{steps=39}, {steps=1, learning_rate=1}]"], "pretrain.stages.1.steps is 1: a stage with a"),
        (["pretrain.stages=[{steps=40, context_length=65}]"], "pretrain.stages.0.context_length is 65: give at most"),
        (["pretrain.stages=[{steps=40, frozen=3}]"], "pretrain.stages.0.frozen is 3: give at most model.layers (2)"),
        (["pretrain.stages=[{steps=40, frozen=0}]"], "frozen is 0: give a number of layers, 1 or more, or 'embed"),
        (["pretrain.stages=[{steps=40, weights={more=1}}]"], "pretrain.stages.0.weights has 'more': no such corpus"),
        (["pretrain.stages=[{steps=40, weights={public=0}}]"], "pretrain.stages.0.weights.public is 0"),
        (["pretrain.stages=[{rounds=40}]"], "pretrain.stages.0.rounds: no such setting"),
        (["federated.stages=[{rounds=1}]"], "their rounds add up to 1, and federated.rounds is 2"),
        (["federated.stages=[{rounds=2, context_length=65}]"], "federated.stages.0.context_length is 65: give at most"),
        (["federated.stages=[{rounds=2, frozen=3}]"], "federated.stages.0.frozen is 3: give at most model.layers (2)"),
        (["federated.stages=[{rounds=2, learning_rate=2}]", "federated.proximal_mu=1"], "learning_rate 2: their"),
    ],
)
def test_stages_that_do_not_fit_the_whole_are_refused_by_name(overrides, expected):
    with pytest.raises(InputError) as caught:
        load("tiny", overrides)
    assert expected in str(caught.value)
    assert "\n" not in str(caught.value)


def test_layers_that_a_configuration_file_has_not_got_are_refused_when_it_is_built(tmp_path):
    file = tmp_path / "config.json"
    file.write_text('{"model_type": "gpt2", "n_embd": 16, "n_layer": 2, "n_head": 2, "n_positions": 64}')
    config = load("tiny", [f"model.config={file}", "pretrain.stages=[{steps=40, frozen=3}]"])
    with pytest.raises(InputError, match=r"3 layers are frozen, and .*config.json' has 2; give at most that"):
        hold_back(new_model(config.model, 64, seed=0), config)


@pytest.mark.parametrize(
    ("name", "kind", "expected"),
    [
        ("adamw", torch.optim.AdamW, {"betas": (0.8, 0.9)}),
        ("adam", torch.optim.Adam, {"betas": (0.8, 0.9), "decoupled_weight_decay": False}),
        ("sgd", torch.optim.SGD, {"momentum": 0.0}),
        ("momentum", torch.optim.SGD, {"momentum": 0.8, "nesterov": False}),
    ],
)
def test_matrices_decay_and_vectors_do_not(name, kind, expected):
    config = load("tiny")
    model = new_model(config.model, 64, seed=0)
    optimizer = new_optimizer(settings(f"optimizer={name}", "beta1=0.8", "beta2=0.9", "weight_decay=0.3"), model)
    assert type(optimizer) is kind
    matrices, vectors = optimizer.param_groups
    assert {key: matrices[key] for key in expected} == expected
    assert (matrices["weight_decay"], vectors["weight_decay"]) == (0.3, 0.0)
    assert all(parameter.ndim == 2 for parameter in matrices["params"])
    norms = {name for name, parameter in model.named_parameters() if parameter.ndim < 2}
    assert len(vectors["params"]) == len(norms)
    assert all("norm" in name for name in norms)


@pytest.mark.parametrize(
    ("overrides", "expected"),
    [
        (["offload_optimizer=cpu", "zero_stage=0"], "pretrain.offload_optimizer is 'cpu': needs pretrain.zero_stage 1"),
        (["offload_optimizer=nvme", "offload_folder=/x"], "'nvme': needs pretrain.zero_stage 3 or more, and it is 2"),
        (["offload_parameters=cpu"], "pretrain.offload_parameters is 'cpu': needs pretrain.zero_stage 3"),
        (["offload_optimizer=nvme", "zero_stage=3"], "pretrain.offload_folder is '': give a folder"),
        (["offload_folder=/x"], "pretrain.offload_folder is '/x'"),
        (["torch_compile=true", "zero_stage=3"], "pretrain.torch_compile is true"),
        (["schedule=wsd", "decay_share=0.95"], "pretrain.decay_share is 0.95: the decay and pretrain.warmup_steps (4)"),
        (["optimizer=lion"], "pretrain.optimizer is 'lion'"),
        (["dropout=1.0"], "pretrain.dropout is 1.0"),
    ],
)
def test_settings_that_do_not_fit_each_other_are_refused_by_name(overrides, expected):
    with pytest.raises(InputError) as caught:
        settings(*overrides)
    assert expected in str(caught.value)


NVME = ["zero_stage=3", "offload_optimizer=nvme", "offload_parameters=nvme"]


@pytest.mark.parametrize(
    "overrides",
    [
        *([f"zero_stage={stage}", f"precision={precision}"] for stage in range(4) for precision in ("bf16", "fp16")),
        *([f"zero_stage={stage}", "offload_optimizer=cpu"] for stage in (1, 2, 3)),
        ["zero_stage=3", "offload_optimizer=cpu", "offload_parameters=cpu"],
        [*NVME, "offload_folder=/local"],
    ],
)
def test_deepspeeds_own_settings_class_takes_them_as_they_are_meant(overrides):
    from deepspeed.runtime.config import DeepSpeedConfig

    chosen = settings(*overrides)
    read = DeepSpeedConfig(deepspeed_config(chosen, 1, SIZES, "cuda"))
    zero = read.zero_config
    assert (zero.stage, zero.reduce_bucket_size) == (chosen.zero_stage, sum(SIZES))
    assert read.gradient_clipping == chosen.max_grad_norm
    assert read.gradient_accumulation_steps == 2
    assert (read.bfloat16_config.enabled, read.float16_config.enabled) == (
        chosen.precision == "bf16",
        chosen.precision == "fp16",
    )
    assert read.float16_config.loss_scale == 0  # dynamic
    for found, place in (
        (zero.offload_optimizer, chosen.offload_optimizer),
        (zero.offload_param, chosen.offload_parameters),
    ):
        assert (found.device if found else "none") == place
        if found:
            assert found.pin_memory
            assert str(found.nvme_path or "") == (chosen.offload_folder if place == "nvme" else "")
    if chosen.offload_parameters == "nvme":
        assert zero.offload_param.buffer_size == max(SIZES)


def test_what_this_machine_can_not_do_is_named(tmp_path, monkeypatch):
    assert unsupported(settings(), "cpu") == []
    nvme = unsupported(settings(*NVME, f"offload_folder={tmp_path}"), "cpu")
    assert all("libaio" in line for line in nvme)  # this machine has it or not
    assert unsupported(settings("precision=fp16"), "cuda") == []
    assert "pretrain.precision is 'fp16': runs on GPUs only" in unsupported(settings("precision=fp16"), "cpu")[0]
    monkeypatch.setenv("CXX", "no-such-compiler")
    assert "there is no C++ compiler (no-such-compiler)" in unsupported(settings("torch_compile=true"), "cpu")[0]


@pytest.fixture
def nvme(tmp_path, monkeypatch):
    """A run's settings with offload to a folder, on a machine whose libaio is there or not."""
    from deepspeed.ops.op_builder import AsyncIOBuilder

    def with_libaio(there, folder=tmp_path):
        monkeypatch.setattr(AsyncIOBuilder, "is_compatible", lambda self, verbose=False: there)
        return load("tiny", [f"pretrain.{override}" for override in (*NVME, f"offload_folder={folder}")])

    return with_libaio


def test_offload_to_a_folder_that_can_not_take_it_is_one_clear_line(nvme, tmp_path):
    assert "DeepSpeed needs libaio with its headers" in unsupported(nvme(there=False).pretrain, "cuda")[0]
    assert unsupported(nvme(there=True).pretrain, "cuda") == []
    missing = unsupported(nvme(True, tmp_path / "nowhere").pretrain, "cuda")
    assert len(missing) == 1
    assert "can't be written (No such file or directory); give a folder" in missing[0]
    rank = Rank(0, 2, 0, 2, "127.0.0.1", 1, "cuda", 1)
    require_supported(nvme(True), rank, 512)
    with pytest.raises(InputError, match=r"GiB free, and this node's ranks need \d+\.\d; free some space"):
        require_supported(nvme(True), rank, 10**15)


def test_doctor_and_plan_name_what_a_run_would_be_refused_for():
    config = load("tiny", ["pretrain.precision=fp16", "cluster.device=cpu"])
    finding = next(found for found in examine(config) if found.check == "pretraining options")
    assert not finding.ok
    assert "fp16" in finding.found
    assert "runs on GPUs only" in estimate(config)["pretrain"]["not_supported_here"][0]


@pytest.mark.parametrize(("visible", "expected"), [("3", 0), ("0,1,2,3", 1), (None, 1), ("GPU-5c3f", 0)])
def test_a_rank_takes_its_own_gpu_under_ray_and_under_torchrun(monkeypatch, visible, expected):
    """Ray shows an actor one GPU, which is device 0; torchrun shows all of them, or none of it says which."""
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    if visible is not None:
        monkeypatch.setenv("CUDA_VISIBLE_DEVICES", visible)
    assert device_index(Rank(1, 4, 1, 4, "127.0.0.1", 1, "cuda", 1)) == expected


def test_dropout_masks_depend_on_seed_step_and_rank_alone():
    def masks(*place):
        seed_dropout(*place)
        return torch.rand(8).tolist()

    drawn = [masks(0, 1, 0), masks(0, 2, 0), masks(0, 1, 1), masks(1, 1, 0)]
    assert masks(0, 1, 0) == drawn[0]
    assert len({tuple(values) for values in drawn}) == 4


def test_dropout_is_in_the_model_that_trains_only():
    model = load("tiny").model
    assert model_config(model, 64, 0.25).attention_dropout == 0.25
    assert model_config(model, 64).attention_dropout == 0.0  # what is exported, and trained under DP
    tokens = torch.arange(1, 9)[None]  # 0 pads: its embedding is zero
    active = new_model(model, 64, seed=0, dropout=0.5).train()
    assert not torch.equal(active(input_ids=tokens).logits, active(input_ids=tokens).logits)


def test_sizes_are_those_of_the_model():
    model = load("tiny").model
    assert parameter_sizes(model, 64) == [p.numel() for p in new_model(model, 64, seed=0).parameters()]
