"""Combinations of optimizer, ZeRO stage and other options, trained by one pair of ranks against plain PyTorch."""

import json
import os
import shutil
import subprocess
import sys

import pytest
import torch
from engine_pair import SAVED, STEPS, VOCABULARY, batch, settings
from ports import free_port
from repository import SUPPORT

from trainer.models.families import new_model
from trainer.objectives.causal import next_token_nats
from trainer.pretraining.optimizers import learning_rate

PAIR = SUPPORT / "engine_pair.py"
OPTIMIZERS, STAGES = ("adamw", "adam", "sgd", "momentum"), (0, 1, 2, 3)
PLAIN = [[f"optimizer={optimizer}", f"zero_stage={stage}"] for optimizer in OPTIMIZERS for stage in STAGES]
OFFLOADED = [
    *(["zero_stage=" + stage, "offload_optimizer=cpu"] for stage in "123"),
    ["zero_stage=3", "offload_optimizer=cpu", "offload_parameters=cpu"],
    ["zero_stage=2", "optimizer=momentum", "offload_optimizer=cpu"],
]
CHECKPOINTING = [[f"zero_stage={stage}", "activation_checkpointing=true"] for stage in (2, 3)]
HALVES = [[f"zero_stage={stage}", "precision=bf16"] for stage in STAGES]
# The first boundary is where the checkpoint is saved, the second one after it.
FREEZING = (
    "stages=[{steps=2, frozen=1, context_length=8}, {steps=1, learning_rate=0.02}, {steps=37, frozen='embeddings'}]"
)
STAGED = [[f"zero_stage={stage}", "warmup_steps=0", FREEZING] for stage in STAGES]
STAGED_OTHERWISE = [
    ["zero_stage=2", "optimizer=momentum", "offload_optimizer=cpu", "warmup_steps=0", FREEZING],
    ["zero_stage=3", "precision=bf16", "warmup_steps=0", FREEZING],
]
FROZEN = [("embed_tokens", "layers.0."), (), ("embed_tokens",)]  # by stage
DROPOUT = ["dropout=0.5", "activation_checkpointing=true"]
MEMORY = [
    ["zero_stage=1", "precision=bf16"],
    ["zero_stage=2"],
    ["zero_stage=2", "precision=bf16", "optimizer=momentum"],
    ["zero_stage=3", "precision=bf16"],
    ["zero_stage=2", "precision=bf16", "offload_optimizer=cpu"],
]


def named(options):
    return [option if "." in option.split("=")[0] else f"pretrain.{option}" for option in options]


def run_pair(kinds, folder):
    """What one pair of processes finds for all combinations, by kind and options."""
    cases, errors, port = folder / "cases.json", folder / "errors", str(free_port())
    cases.write_text(json.dumps([[kind, named(options)] for kind, options in kinds]))
    with errors.open("wb") as log:
        ranks = [
            subprocess.Popen(
                [sys.executable, PAIR, str(rank), "2", port, cases],
                stdout=subprocess.PIPE if rank == 0 else subprocess.DEVNULL,
                stderr=log,
                text=True,
                env={**os.environ, "OMP_NUM_THREADS": "1"},
            )
            for rank in range(2)
        ]
        try:
            output, _ = ranks[0].communicate(timeout=800)
            assert [rank.wait(timeout=300) for rank in ranks] == [0, 0], errors.read_text()[-3000:]
        finally:
            for rank in ranks:
                rank.kill()
    rows = [json.loads(line) for line in output.splitlines() if line.startswith("{")]
    return {(row["kind"], tuple(row["overrides"])): row for row in rows}


ALL = [*PLAIN, *OFFLOADED, *CHECKPOINTING, *HALVES, *STAGED, *STAGED_OTHERWISE, DROPOUT]


@pytest.fixture(scope="module")
def found(tmp_path_factory):
    studies = [("study", options) for options in ALL]
    return run_pair([*studies, *(("memory", options) for options in MEMORY)], tmp_path_factory.mktemp("pair"))


def plain_losses(options):
    """The same steps without DeepSpeed, on the whole batch at once."""
    config = settings(named(options), 1)
    chosen = config.pretrain
    model = new_model(config.model, VOCABULARY, config.run.seed).train()
    matrices = [p for p in model.parameters() if p.ndim >= 2]
    vectors = [p for p in model.parameters() if p.ndim < 2]
    groups = [{"params": matrices, "weight_decay": chosen.weight_decay}, {"params": vectors, "weight_decay": 0.0}]
    optimizer = {
        "adamw": lambda: torch.optim.AdamW(groups, betas=(0.9, 0.95)),
        "adam": lambda: torch.optim.Adam(groups, betas=(0.9, 0.95)),
        "sgd": lambda: torch.optim.SGD(groups, lr=1.0),
        "momentum": lambda: torch.optim.SGD(groups, lr=1.0, momentum=0.9),
    }[chosen.optimizer]()
    losses = []
    for step in range(STEPS):
        tokens = batch(config, step)
        for group in optimizer.param_groups:
            group["lr"] = learning_rate(chosen, step)
        if chosen.stages:
            for name, parameter in model.named_parameters():  # what has no gradient is passed over
                parameter.requires_grad_(not any(part in name for part in FROZEN[max(0, step - 1)]))
        loss = next_token_nats(model, tokens) / tokens[:, 1:].numel()
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), chosen.max_grad_norm)
        optimizer.step()
        losses.append(loss.item())
    return losses


@pytest.mark.parametrize("options", [*PLAIN, *OFFLOADED, *CHECKPOINTING, *STAGED], ids=" ".join)
def test_two_ranks_train_as_plain_pytorch_does(found, options):
    row = found["study", tuple(named(options))]
    expected = plain_losses(options)
    assert row["losses"] == pytest.approx(expected, rel=1e-4)
    assert len(set(row["losses"])) == STEPS


@pytest.mark.parametrize("options", ALL, ids=" ".join)
def test_a_checkpoint_goes_on_as_if_nothing_had_happened(found, options):
    """Optimizer state included, and with dropout the same masks."""
    row = found["study", tuple(named(options))]
    assert row["resumed"] == pytest.approx(row["losses"][SAVED:], rel=1e-6)


@pytest.mark.parametrize("options", [*PLAIN, *OFFLOADED, *HALVES], ids=" ".join)
def test_a_gradient_that_is_not_finite_is_noticed_before_a_commit(found, options):
    assert found["study", tuple(named(options))]["nan_noticed"]


@pytest.mark.parametrize("options", HALVES, ids=" ".join)
def test_bf16_stays_near_float32(found, options):
    assert found["study", tuple(named(options))]["losses"] == pytest.approx(plain_losses([]), rel=5e-3)


def test_dropout_changes_the_losses_and_does_not_break_them(found):
    losses = found["study", tuple(named(DROPOUT))]["losses"]
    assert losses != pytest.approx(plain_losses([]), rel=1e-4)
    assert losses == pytest.approx(plain_losses([]), rel=0.05)


@pytest.mark.parametrize("options", MEMORY, ids=" ".join)
def test_memory_is_what_the_formula_says(found, options):
    row = found["memory", tuple(named(options))]
    assert row["measured_peak"] == pytest.approx(row["formula_peak"], rel=0.05)


@pytest.mark.skipif(shutil.which("g++") is None, reason="torch.compile needs a C++ compiler on CPUs")
def test_compiled_training_is_the_same_training(tmp_path):
    options = ["zero_stage=2", "torch_compile=true", "model.layers=1"]
    row = run_pair([("train", options)], tmp_path)["train", tuple(named(options))]
    assert row["losses"] == pytest.approx(plain_losses(options), rel=1e-4)
    assert row["compiled"]
