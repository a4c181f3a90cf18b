"""Numbers of ranks: which ones may train, and a commit's elements under another number."""

import math
import threading
import time
from contextlib import suppress
from itertools import count
from pathlib import Path

import pytest
import torch

from cluster.checks.verify_resume import _largest, _remove, sizes_of, verify_resume
from cluster.runtime.placement import await_room, bundle_of, pick_device, room
from configs.errors import InputError, SiloweaveError
from configs.load import load
from configs.run_directory import bind_run_directory
from configs.storage.manifests import Manifest, commit_manifest
from trainer.checkpoints.checkpoints import pretrain_digest
from trainer.checkpoints.resize import Piece, Shard, collect, equal_parts

GROUPS = [{"embedding": 35, "matrix": 24, "tiny": 1}, {"norm": 7, "scale": 2}]


@pytest.mark.parametrize(
    ("overrides", "expected"),
    [
        ([], [2]),
        (["cluster.min_world_size=1"], [2, 1]),
        (["cluster.world_size=4", "cluster.min_world_size=1", "pretrain.micro_batch_size=1"], [4, 2, 1]),
        (["cluster.world_size=8", "cluster.min_world_size=3", "pretrain.micro_batch_size=1"], [8, 4]),
    ],
)
def test_a_start_may_have_the_sizes_that_share_the_batch(overrides, expected):
    assert load("tiny", overrides).world_sizes == expected


@pytest.mark.parametrize(
    ("overrides", "expected"),
    [
        (["cluster.world_size=3"], r"times pretrain.micro_batch_size \(4\); .* cluster.world_size can be 1, 2$"),
        (["pretrain.batch_size=12", "cluster.world_size=2"], "cluster.world_size can be 1, 3$"),
        (["pretrain.batch_size=6"], "cluster.world_size can be no number at all$"),
        (["cluster.min_world_size=3"], r"cluster.min_world_size is 3: give at most cluster.world_size \(2\)"),
    ],
)
def test_a_batch_that_can_not_be_shared_says_among_how_many_it_can(overrides, expected):
    with pytest.raises(InputError, match=expected):
        load("tiny", overrides)


def test_a_run_continues_with_other_ranks_and_other_commits(tmp_path):
    base = load("tiny", [f"run.storage={tmp_path}"])
    directory = bind_run_directory(base)
    (directory / "COMMITTED").touch()
    changed = ["cluster.world_size=1", "pretrain.micro_batch_size=2", "pretrain.commit_every=5"]
    other = load("tiny", [f"run.storage={tmp_path}", *changed])
    assert bind_run_directory(other) == directory
    assert pretrain_digest(base, "corpus") == pretrain_digest(other, "corpus")
    assert pretrain_digest(base, "corpus") != pretrain_digest(load("tiny", ["pretrain.zero_stage=1"]), "corpus")


@pytest.mark.parametrize(("most", "expected"), [(1, [1, 1]), (2, [1, 2, 1]), (4, [1, 2, 4, 2]), (8, [1, 4, 8, 4])])
def test_resuming_is_verified_up_to_the_run_s_size_and_down_again(most, expected):
    assert sizes_of(load("tiny", [f"cluster.world_size={most}", "pretrain.micro_batch_size=1"])) == expected


def test_resuming_is_not_verified_where_no_tolerance_is_known(tmp_path):
    (tmp_path / "corpus").mkdir()
    commit_manifest(tmp_path / "corpus", Manifest("corpus", "digest"))
    with pytest.raises(InputError, match=r"pretrain.precision is 'fp16': .* --set pretrain.precision=bf16 or fp32"):
        verify_resume(load("tiny", ["pretrain.precision=fp16"]), tmp_path, lambda event: None, [1, 2])


def committed(rank, world_size, state):
    """One rank's shard in ZeRO-3's layout, with padding that must not be read."""
    pieces = list(equal_parts(GROUPS, rank, world_size))
    flats = []
    for group in range(len(GROUPS)):
        mine = [piece for piece in pieces if piece.group == group]
        flat = torch.full((flat_size(group, world_size),), float("nan"))
        for piece in mine:
            flat[piece.start : piece.start + piece.numel] = state[piece.name][piece.offset :][: piece.numel]
        flats.append({"fp32": flat, "exp_avg": -flat})
    return Shard(pieces, flats, [{"step": torch.tensor(3.0 + group)} for group in range(len(GROUPS))], {"rank": rank})


def flat_size(group, world_size):
    return sum(-(-numel // world_size) for numel in GROUPS[group].values())


@pytest.mark.parametrize(("before", "after"), [(1, 2), (2, 4), (4, 2), (3, 5), (5, 1), (4, 4), (1, 40)])
def test_every_element_finds_its_new_place(before, after):
    state = {name: torch.randn(numel) for group in GROUPS for name, numel in group.items()}
    for rank in range(after):
        wanted, sizes = list(equal_parts(GROUPS, rank, after)), [flat_size(group, after) for group in range(2)]
        shards = (committed(old, before, state) for old in range(before))
        states, scalars, content = collect(wanted, sizes, shards, Path("step-1"))
        assert content == {"rank": 0}
        assert [values["step"].item() for values in scalars] == [3.0, 4.0]
        covered = [torch.zeros(size, dtype=torch.bool) for size in sizes]
        for piece in wanted:
            here = slice(piece.start, piece.start + piece.numel)
            expected = state[piece.name][piece.offset : piece.offset + piece.numel]
            assert torch.equal(states[piece.group]["fp32"][here], expected)
            assert torch.equal(states[piece.group]["exp_avg"][here], -expected)
            covered[piece.group][here] = True
        for group in range(2):  # padding takes part in no gradient norm
            assert not states[group]["fp32"][~covered[group]].any()


def test_a_commit_that_lacks_a_rank_is_refused():
    state = {name: torch.randn(numel) for group in GROUPS for name, numel in group.items()}
    shards = iter([committed(0, 2, state)])
    with pytest.raises(SiloweaveError, match=r"step-1: holds \d+ of 60 elements of fp32 in group 0"):
        collect(list(equal_parts(GROUPS, 0, 1)), [60, 9], shards, Path("step-1"))


def test_a_partition_of_padding_alone_has_the_optimizer_s_state_too():
    state = {name: torch.randn(numel) for group in GROUPS for name, numel in group.items()}
    wanted = [Piece("matrix", 0, 0, 0, 24), Piece("norm", 1, 0, 0, 0)]
    states, scalars, _ = collect(wanted, [24, 2], iter([committed(0, 1, state)]), Path("step-1"))
    assert states[1]["exp_avg"].tolist() == [0.0, 0.0]
    assert scalars[1]["step"].item() == 4.0


@pytest.fixture
def nodes(monkeypatch):
    """A Ray cluster of these nodes, by their resources; a node of None is dead."""
    import ray

    living = []
    monkeypatch.setattr(ray, "nodes", lambda: [{"Alive": node is not None, "Resources": node or {}} for node in living])
    totals = lambda: {name: sum((node or {}).get(name, 0) for node in living) for name in ("CPU", "GPU")}  # noqa: E731
    monkeypatch.setattr(ray, "cluster_resources", totals)
    return living


ELASTIC = ["cluster.world_size=4", "cluster.min_world_size=2", "pretrain.micro_batch_size=1"]


def wait_for_room(*overrides, patient):
    config, told = load("tiny", [*ELASTIC, *overrides]), []
    began = time.monotonic()
    fitting = await_room(config, bundle_of(config, "cpu"), began + 0.1, told.append, patient=patient)
    return fitting, [event["message"] for event in told]


def test_room_is_counted_node_by_node(nodes):
    nodes += [{"CPU": 3.0, "GPU": 1.0}, {"CPU": 1.0}, None]
    assert room({"CPU": 1}) == 4
    assert room({"CPU": 2}) == 1
    assert room({"CPU": 1, "GPU": 1}) == 1


def test_the_first_start_waits_for_all_ranks_and_a_restart_takes_what_there_is(nodes):
    nodes += [{"CPU": 3.0}]
    fitting, told = wait_for_room(patient=True)
    assert fitting == [2]
    assert told == [
        "cluster.world_size 4: the gang needs 4 CPU, the Ray cluster has 3; waiting up to 60 s for nodes, "
        "then going on with 2"
    ]
    assert wait_for_room(patient=False) == ([2], [])
    nodes += [{"CPU": 1.0}]
    assert wait_for_room(patient=True) == ([4, 2], [])


def test_a_restart_waits_for_the_fewest_ranks(nodes):
    nodes += [{"CPU": 1.0}]
    with pytest.raises(InputError, match=r"the Ray cluster has 1; lower cluster.min_world_size or"):
        wait_for_room(patient=False)
    nodes += [{"CPU": 3.0}]
    with pytest.raises(InputError, match=r"nodes have room for 1 times \{'CPU': 2\}; lower cluster.world_size or"):
        wait_for_room("cluster.threads_per_rank=2", "cluster.world_size=2", "cluster.min_world_size=0", patient=False)


def test_a_gang_takes_gpus_where_its_fewest_ranks_could_have_them():
    assert pick_device(load("tiny", ELASTIC), 2) == "cuda"
    assert pick_device(load("tiny", [*ELASTIC, "cluster.min_world_size=0"]), 2) == "cpu"
    assert pick_device(load("tiny", [*ELASTIC, "cluster.device=cpu"]), 2) == "cpu"


def test_a_folder_is_removed_while_a_killed_rank_still_writes_there(tmp_path):
    (tmp_path / "run" / "scratch").mkdir(parents=True)
    ends = time.monotonic() + 0.5

    def write():
        with suppress(FileNotFoundError):
            for number in count():
                (tmp_path / "run" / "scratch" / f"{number}").touch()
                if time.monotonic() > ends:
                    return

    writer = threading.Thread(target=write)
    writer.start()
    _remove(tmp_path / "run")
    writer.join()
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize("losses", [[0.1, math.nan], [math.nan, 0.1], [math.nan]])
def test_a_loss_that_is_no_number_does_not_pass_for_a_small_deviation(losses):
    assert math.isnan(_largest(losses))
    assert _largest([0.1, 0.3, 0.2]) == 0.3
