"""The loss of packed documents is that of each document by itself; a spike is one by the losses before it."""

import pickle

import pytest
import torch

from configs.errors import SiloweaveError
from configs.load import load
from trainer.models.families import new_model
from trainer.objectives.causal import next_token_nats
from trainer.pretraining.rollback import Progress, RollBack


@pytest.mark.parametrize("family", ["llama", "gpt2"])
def test_attention_and_loss_stay_inside_a_document(family):
    config = load("tiny", [f"model.family={family}"])
    model = new_model(config.model, 512, seed=0)
    pieces = [torch.randint(512, (length,)) for length in (20, 1, 9)]
    padding = 64 - sum(map(len, pieces))
    tokens = torch.cat([*pieces, torch.zeros(padding, dtype=torch.int64)])[None]
    positions = torch.cat([*(torch.arange(len(piece)) for piece in pieces), torch.zeros(padding, dtype=torch.int64)])
    whole = torch.randint(512, (1, 64))
    alone = sum(next_token_nats(model, piece[None]) for piece in (pieces[0], pieces[2], whole[0]))
    packed = next_token_nats(
        model, torch.cat([tokens, whole]), torch.stack([positions, torch.arange(64)])
    )  # beside a window that is one piece
    assert packed.item() == pytest.approx(alone.item(), rel=1e-6)
    crossing = next_token_nats(model, torch.cat([tokens, whole]))
    assert crossing.item() != pytest.approx(alone.item(), rel=1e-4)


def test_a_spike_and_what_is_not_finite_roll_back_and_a_commit_remembers():
    settings = load("tiny").pretrain
    progress = Progress(settings, {}, [])
    for step in range(32):
        progress.require_good_loss(3.0 + 0.1 * (step % 3), step + 1, (0, step + 1))
    resumed = Progress(settings, {**progress.as_metadata(), "step": 32}, [(4, 9)])
    assert (resumed.committed, resumed.skipped) == (32, [(4, 9)])
    for loss, cause in ((6.3, "step 33: the loss is 6.3, 2.0 times the median"), (float("nan"), "the loss is nan")):
        with pytest.raises(RollBack, match=cause) as caught:
            resumed.require_good_loss(loss, 33, (32, 33))
    again = pickle.loads(pickle.dumps(caught.value))  # as Ray passes it on
    assert (again.step, again.skip, str(again)) == (33, (32, 33), str(caught.value))
    resumed.require_good_loss(6.0, 33, (32, 33))


def test_early_losses_are_no_spikes_and_a_ratio_of_zero_looks_for_none():
    progress = Progress(load("tiny").pretrain, {}, [])
    progress.require_good_loss(1.0, 1, (0, 1))
    progress.require_good_loss(50.0, 2, (0, 2))
    progress = Progress(load("tiny", ["pretrain.spike_ratio=0"]).pretrain, {"losses": [1.0] * 32}, [])
    progress.require_good_loss(50.0, 33, (32, 33))


def test_too_many_rollbacks_end_the_run_with_the_cause():
    settings = load("tiny", ["pretrain.max_rollbacks=2"]).pretrain
    progress = Progress(settings, {"skipped": [[0, 3]], "step": 10}, [(0, 3), (13, 15)])
    with pytest.raises(SiloweaveError, match=r"step 11: the loss is inf, after 2 rollbacks \(pretrain.max_rollbacks\)"):
        progress.require_good_loss(float("inf"), 11, (15, 16))
