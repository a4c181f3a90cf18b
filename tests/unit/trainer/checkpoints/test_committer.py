"""The commit protocol, with an engine that only writes files: killed at every point, full, slow, and with two ranks."""

import hashlib
import json
import os
import resource
import signal
import sys
import threading
import time
from types import SimpleNamespace

import pytest

from configs.errors import InputError, SiloweaveError
from configs.load import load
from configs.storage.bucket import Bucket
from configs.storage.storage import COMMITTED, Folder, committed, prune
from trainer.checkpoints import checkpoints
from trainer.checkpoints.committer import Committer
from trainer.checkpoints.scratch import scratch_folder
from trainer.rank import Rank

SHARD_BYTES = 50_000


class Engine:
    """Writes one shard, as each rank of ZeRO does."""

    def __init__(self, rank=0, world_size=1):
        self.rank, self.world_size = rank, world_size

    def save_checkpoint(self, root, tag, save_latest):
        folder = checkpoints.Path(root) / tag
        folder.mkdir(parents=True)
        content = f"{tag} {self.rank} {self.world_size}".encode().ljust(SHARD_BYTES, b".")
        (folder / f"zero_pp_rank_{self.rank}_mp_rank_00_optim_states.pt").write_bytes(content)


def folder(tmp_path):
    return Folder(tmp_path / "checkpoints")


def bucket(tmp_path):
    """fsspec's folder, which behaves like a store once it makes folders by itself."""
    storage = Bucket(f"file://{tmp_path}/store/checkpoints", tmp_path / "fetched")
    storage._fs.auto_mkdir = True
    return storage


def stored(tmp_path):
    """A store that says which parts of a file have arrived."""
    return Bucket(f"memory:///{tmp_path.name}", tmp_path / "fetched")


def committer(storage, tmp_path, rank=0, world_size=1, attempt="a", start=0, events=None, patience_s=300):
    config = load("tiny", [f"cluster.hang_timeout_s={patience_s}"])
    place = Rank(rank, world_size, rank, world_size, "127.0.0.1", 1, "cpu", 1)
    report = ([] if events is None else events).append
    return Committer(config, storage, tmp_path / "scratch", place, attempt, start, "digest", report)


def commit(storage, tmp_path, *steps, **arguments):
    """Commits of one rank on its own, one after the other."""
    commits = committer(storage, tmp_path, **arguments)
    for step in steps:
        commits.commit(Engine(), step, {})
    commits.finish()


def eventually(true, seconds=300):
    deadline = time.monotonic() + seconds
    while not true():
        assert time.monotonic() < deadline
        time.sleep(0.01)


def in_a_process(work):
    """Runs it in a fork, without pytest's ways out. Returns the exit status as the system gives it."""
    child = os.fork()
    if child == 0:
        try:
            work()
            os._exit(0)
        except BaseException:
            os._exit(1)
    return os.waitpid(child, 0)[1]


def killed_at(storage, moment):
    """The storage, with a SIGKILL before its n-th change, or right after it: one lot of moments, counted from 0."""
    changes = 0

    def around(change):
        def changed(*arguments):
            nonlocal changes
            if 2 * changes == moment:
                os.kill(os.getpid(), signal.SIGKILL)
            done = change(*arguments)
            if 2 * changes + 1 == moment:
                os.kill(os.getpid(), signal.SIGKILL)
            changes += 1
            return done

        return changed

    for name in ("put", "write", "remove"):
        setattr(storage, name, around(getattr(storage, name)))
    return storage


@pytest.mark.parametrize("place", [folder, bucket])
def test_a_kill_between_any_two_stages_leaves_a_newest_that_holds(place, tmp_path):
    """Steps 1 to 3 are there, the fourth is made: its shard, its list, COMMITTED, and step 2 pruned."""
    survived = 0
    for moment in range(100):
        root = tmp_path / str(moment)
        root.mkdir()
        commit(place(root), root, 1, 2, 3)
        status = in_a_process(lambda root=root, moment=moment: commit(killed_at(place(root), moment), root, 4, start=3))
        if os.WIFEXITED(status):
            assert os.WEXITSTATUS(status) == 0
            break
        survived += 1
        found = checkpoints.newest(place(root), "digest", pytest.fail)
        stands = (place(root).read(f"{checkpoints.step_name(4)}/{COMMITTED}")) is not None
        assert found.step == (4 if stands else 3)
        assert len(checkpoints.steps(place(root))) >= 2
        # And the next start goes on from there as if nothing had happened.
        commit(place(root), root, *range(found.step + 1, 6), start=found.step)
        assert checkpoints.steps(place(root)) == [4, 5]
        assert set(place(root).children()) == {"step-00000004", "step-00000005"}
    assert survived == 8  # before and after each of: shard, list, COMMITTED, remove


def test_a_kill_inside_a_removal_leaves_garbage_and_no_damaged_commit(tmp_path):
    """COMMITTED goes first, on a folder and in a store."""
    for place in (folder, bucket):
        root = tmp_path / place.__name__
        root.mkdir()
        commit(place(root), root, 1)
        seen = []
        storage = place(root)
        original = os.unlink if isinstance(storage, Folder) else storage._fs.rm_file

        def spy(path, *rest, seen=seen, original=original, **named):
            seen.append(os.path.basename(path))  # noqa: PTH119
            return original(path, *rest, **named)

        with pytest.MonkeyPatch.context() as patch:
            if isinstance(storage, Folder):
                patch.setattr(os, "unlink", spy)
            else:
                patch.setattr(storage._fs, "rm_file", spy)
            storage.remove("step-00000001")
        assert seen[0] == COMMITTED
        assert not storage.children().get("step-00000001")


def test_training_goes_on_during_a_copy_and_the_next_commit_waits_for_it(tmp_path, monkeypatch):
    events, storage, go_on, asked = [], folder(tmp_path), threading.Event(), []
    put = storage.put
    storage.put = lambda *arguments: go_on.wait(300) and put(*arguments)

    def clock():
        """Stands until the second commit has asked when its waiting begins; then the first one's copy may go on."""
        asked.append(1)
        if len(asked) == 4:
            go_on.set()
        return 0.5 * (len(asked) > 4)

    monkeypatch.setattr("trainer.checkpoints.committer.time", SimpleNamespace(perf_counter=clock, monotonic=clock))
    commits = committer(storage, tmp_path, events=events)
    commits.commit(Engine(), 1, {})  # returns though nothing is copied
    commits.check()
    assert events == []
    assert checkpoints.newest(storage, "digest", pytest.fail) is None
    assert len(asked) == 3
    commits.commit(Engine(), 2, {})
    assert [event["step"] for event in events[:1]] == [1]  # the first stands before the second begins
    commits.finish()
    assert [event["step"] for event in events] == [1, 2]
    assert [(event["waited_s"], event["blocked_s"]) for event in events] == [(0, 0), (0.5, 0.5)]
    assert events[0]["seconds"] == 0.5
    assert events[0]["size_bytes"] == SHARD_BYTES
    assert not any((tmp_path / "scratch" / "rank-0").iterdir())


def test_waiting_for_a_part_is_alive_while_the_storage_takes_it_and_no_longer(tmp_path):
    storage, alive, go_on = folder(tmp_path), [], threading.Event()
    put = storage.put

    def slow(source, name, moved):
        for number in range(1, 6):
            moved()
            eventually(lambda number=number: len(alive) == number)
        stands.set()
        go_on.wait(300)
        return put(source, name, moved)

    storage.put = slow
    commits = committer(storage, tmp_path)
    commits.await_part(lambda: pytest.fail("nothing is under way"))
    commits.commit(Engine(), 1, {})
    copied, looks, stands = commits._copied.wait, [], threading.Event()
    commits._copied.wait = lambda _: looks.append(1) or copied(0.01)
    waiting = threading.Thread(target=lambda: commits.await_part(lambda: alive.append(1)))
    waiting.start()
    assert stands.wait(300)
    before = len(looks)
    eventually(lambda: len(looks) >= before + 5)
    assert len(alive) == 5  # it has stood still since
    assert waiting.is_alive()
    go_on.set()
    waiting.join(300)
    commits.finish()
    assert checkpoints.steps(storage) == [1]


def test_a_part_that_can_not_be_copied_is_said_to_who_waits_for_it(tmp_path):
    storage = folder(tmp_path)
    commits = committer(storage, tmp_path, rank=1, world_size=2)
    (tmp_path / "checkpoints").write_text("no folder")
    commits.commit(Engine(1, 2), 1, {})
    with pytest.raises(SiloweaveError, match="could not be written"):
        commits.await_part(pytest.fail)


@pytest.mark.parametrize("place", [folder, stored])
def test_parts_of_a_file_are_told_as_they_arrive(place, tmp_path):
    """Not a file alone: a shard of tens of GB takes longer than cluster.hang_timeout_s."""
    source, told = tmp_path / "shard", []
    content = os.urandom(2**20) * 9
    source.write_bytes(content)
    storage = place(tmp_path)
    entry = storage.put(source, "step-00000001/shard", lambda: told.append(time.monotonic()))
    assert entry == {"size_bytes": len(content), "sha256": hashlib.sha256(content).hexdigest()}
    assert storage.read("step-00000001/shard") == content
    assert len(told) >= 3


def test_rank_0_waits_for_a_slow_part_for_as_long_as_that_takes(tmp_path):
    """Its patience begins when all parts are said to be there."""
    storage = folder(tmp_path)
    first = committer(storage, tmp_path, 0, 2, patience_s=0.3)
    first.commit(Engine(0, 2), 1, {})
    first.await_part(lambda: None)
    time.sleep(1)
    first.check()
    second = committer(storage, tmp_path, 1, 2)
    second.commit(Engine(1, 2), 1, {})
    second.await_part(lambda: None)
    first.finish()
    assert checkpoints.steps(storage) == [1]


def test_a_commit_stands_when_every_rank_has_copied_and_has_all_their_files(tmp_path):
    storage, events = folder(tmp_path), []
    first = committer(storage, tmp_path, 0, 2, events=events)
    second = committer(storage, tmp_path, 1, 2, events=events)
    first.commit(Engine(0, 2), 1, {})
    time.sleep(0.2)
    assert events == []
    second.commit(Engine(1, 2), 1, {})
    second.finish()
    first.finish()
    assert [event["size_bytes"] for event in events] == [2 * SHARD_BYTES]
    found = checkpoints.newest(tmp_path / "checkpoints", "digest", pytest.fail)
    assert found.manifest.metadata == {"step": 1, "world_size": 2}
    assert len(found.manifest.files) == 2
    assert checkpoints.newest(storage, "other settings", pytest.fail) is None


def test_a_rank_that_dies_during_a_copy_leaves_no_commit_and_its_list_serves_no_other_start(tmp_path):
    storage = folder(tmp_path)
    commit(storage, tmp_path, 1)
    # 1. Rank 1 is killed after its shard, before its list; rank 0 waits no longer than it is told to.
    status = in_a_process(
        lambda: killed_at_commit(storage, tmp_path, rank=1, moment=2, attempt="first", world_size=2, start=1)
    )
    assert os.WTERMSIG(status) == signal.SIGKILL
    waiting = committer(storage, tmp_path, 0, 2, "first", 1, patience_s=0.5)
    waiting.commit(Engine(0, 2), 2, {})
    with pytest.raises(SiloweaveError, match=r"rank 1 has not copied its part within 0.5 s.*reaches the storage"):
        waiting.finish()
    assert checkpoints.newest(storage, "digest", pytest.fail).step == 1
    # 2. It is killed after its list: a start that follows does not take that list for its own rank's.
    in_a_process(lambda: killed_at_commit(storage, tmp_path, rank=1, moment=3, attempt="second", world_size=2, start=1))
    assert "rank-00001.json" in storage.names("step-00000002")
    third = committer(storage, tmp_path, 0, 2, "third", 2, patience_s=0.5)  # start 2: nothing is cleaned away
    third.commit(Engine(0, 2), 2, {})
    with pytest.raises(SiloweaveError, match="rank 1 has not copied"):
        third.finish()
    assert checkpoints.steps(storage) == [1]


def killed_at_commit(storage, tmp_path, rank, moment, attempt, world_size, start):
    commits = committer(killed_at(storage, moment), tmp_path, rank, world_size, attempt, start)
    commits.commit(Engine(rank, world_size), 2, {})
    commits.finish()


def test_a_full_storage_is_said_at_the_next_look_and_the_commit_before_is_intact(tmp_path):
    """The real thing: the system does not let a file grow (RLIMIT_FSIZE)."""
    storage = folder(tmp_path)
    commit(storage, tmp_path, 1)

    def fill():
        signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
        put = storage.put

        def full(*arguments):
            resource.setrlimit(resource.RLIMIT_FSIZE, (20_000, 20_000))
            return put(*arguments)

        storage.put = full
        commits = committer(storage, tmp_path, start=1)
        commits.commit(Engine(), 2, {})
        commits._flight.join()
        for look in (commits.check, lambda: commits.commit(Engine(), 3, {}), commits.finish):
            with pytest.raises(
                SiloweaveError, match=r"could not be written.*File too large.*`ulimit -f`.*another place"
            ):
                look()

    assert in_a_process(fill) == 0
    assert checkpoints.newest(storage, "digest", pytest.fail).step == 1
    assert COMMITTED not in storage.names("step-00000002")


def test_what_lies_beyond_the_start_is_cleaned_before_it_is_written_anew(tmp_path):
    """A damaged newest, and shards of another number of ranks in a folder that was never committed."""
    for place in (folder, bucket):
        root = tmp_path / place.__name__
        root.mkdir()
        storage, said = place(root), []
        commit(storage, root, 1, 2)
        shard = "step-00000002/zero_pp_rank_0_mp_rank_00_optim_states.pt"
        storage.write(shard, b"damaged")
        storage.write("step-00000003/zero_pp_rank_7_mp_rank_00_optim_states.pt", b"of eight ranks")
        found = checkpoints.newest(storage, "digest", said.append)
        assert found.step == 1
        assert said == [f"{storage}/{shard}: its digest doesn't hold; going back to the commit before"]
        commit(storage, root, 2, 3, start=1)
        assert len(storage.names("step-00000003")) == 3
        assert checkpoints.newest(storage, "digest", pytest.fail).step == 3


def test_a_step_that_is_made_again_is_no_commit_until_all_of_it_is_new(tmp_path):
    """After a rollback beyond it."""
    storage, seen = folder(tmp_path), []
    commits = committer(storage, tmp_path)
    for step in (1, 2):
        commits.commit(Engine(), step, {})
    commits.finish()
    put = storage.put
    storage.put = lambda *arguments: seen.append(checkpoints.steps(storage)) or put(*arguments)
    commits.commit(Engine(), 2, {})
    commits.finish()
    assert seen == [[1]]
    assert checkpoints.newest(storage, "digest", pytest.fail).step == 2


def test_pruning_keeps_the_newest_and_leaves_alone_what_is_not_a_step(tmp_path):
    storage = folder(tmp_path)
    commit(storage, tmp_path, 1)
    for name in (
        "step-00000000/garbage",
        "step-00000009/under way",
        "universal/COMMITTED",
        "step-1-universal/COMMITTED",
    ):
        storage.write(name, b"{}")
    commit(storage, tmp_path, 2, 3, start=10)
    assert set(storage.children()) == {
        "step-00000002",
        "step-00000003",
        "step-00000009",
        "universal",
        "step-1-universal",
    }
    prune(storage, "step", 1)
    assert committed(storage, "step") == ["step-00000003"]
    assert "under way" in storage.names("step-00000009")


def test_what_an_earlier_start_left_in_scratch_is_removed(tmp_path):
    left = tmp_path / "scratch" / "rank-0" / "step-00000001" / "shard.pt"
    left.parent.mkdir(parents=True)
    left.touch()
    committer(folder(tmp_path), tmp_path)
    assert not left.exists()


def test_a_fetched_commit_is_checked_and_fetched_again_where_it_is_damaged(tmp_path):
    storage = bucket(tmp_path)
    commit(storage, tmp_path, 1, 2)
    found = checkpoints.newest(storage, "digest", pytest.fail)
    assert found.directory == tmp_path / "fetched" / "step-00000002"
    shard = next(found.directory.glob("*.pt"))
    content = shard.read_bytes()
    shard.write_bytes(b"damaged on this machine")
    (tmp_path / "fetched" / "step-00000001").mkdir()  # of an earlier time
    assert checkpoints.newest(storage, "digest", pytest.fail).directory == found.directory
    assert shard.read_bytes() == content
    assert [path.name for path in (tmp_path / "fetched").iterdir()] == ["step-00000002"]
    listed = json.loads((found.directory / COMMITTED).read_text())
    assert set(listed["files"]) == {shard.name}


def test_scratch_that_others_can_write_to_is_refused(tmp_path):
    config = load("tiny", [f"cluster.scratch_dir={tmp_path}"])
    mine = scratch_folder(config, tmp_path / "runs" / "tiny")
    assert mine.is_dir()
    assert (tmp_path / f"siloweave-{os.getuid()}").stat().st_mode & 0o077 == 0
    (tmp_path / f"siloweave-{os.getuid()}").chmod(0o777)
    with pytest.raises(InputError, match="only this user can write to"):
        scratch_folder(config, tmp_path / "runs" / "tiny")
    full = load("tiny", ["cluster.scratch_dir=/proc"])
    with pytest.raises(SiloweaveError, match="could not be written"):
        scratch_folder(full, tmp_path / "runs" / "tiny")


def test_a_store_whose_package_is_missing_is_said_with_the_extra(tmp_path, monkeypatch):
    import fsspec  # noqa: F401

    for name in [name for name in sys.modules if name.split(".")[0] == "s3fs"]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.setitem(sys.modules, "s3fs", None)
    monkeypatch.delitem(sys.modules["fsspec.registry"]._registry, "s3", raising=False)
    with pytest.raises(InputError, match=r"run.storage is 's3://bucket'.*pip install 'siloweave\[s3\]'"):
        Bucket("s3://bucket", tmp_path)
