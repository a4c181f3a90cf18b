"""What a relay's user can reach, by the permissions of real files; the operating system itself is the oracle."""

import os
import pwd
import subprocess
from pathlib import Path

import pytest

from configs.errors import InputError
from configs.load import load
from configs.silo import simulated_silo
from federated.separation import ENTER, READ, WRITE, Account, check_separation, share_socket

NOBODY = "nobody"


@pytest.fixture
def silo(tmp_path):
    """A silo whose every file is closed, below folders that everyone may enter."""
    config = simulated_silo(load("tiny"), "roman", tmp_path / "model")
    (tmp_path / "state").mkdir(mode=0o700)
    (tmp_path / "state" / "silo.key").write_bytes(b"secret")
    (tmp_path / "state" / "silo.key").chmod(0o600)
    (tmp_path / "state.anchor").mkdir(mode=0o700)
    for name in ("silo.toml", "records.jsonl"):
        (tmp_path / name).write_text("private")
        (tmp_path / name).chmod(0o600)
    settings = {"state_dir": str(tmp_path / "state"), "relay_user": NOBODY}
    data = {"source": str(tmp_path / "records.jsonl"), "public": False}
    return config.model_copy(
        update={
            "silo": config.silo.model_copy(update=settings),
            "data": config.data.model_copy(update=data),
        }
    )


@pytest.fixture
def opened(tmp_path):
    """Lets others down to the test's folder, as far as it is ours; restores it after."""
    before = {}
    for folder in [tmp_path, *tmp_path.parents]:
        if folder.stat().st_uid == os.geteuid() and not folder.stat().st_mode & 0o001:
            before[folder] = folder.stat().st_mode
            folder.chmod(folder.stat().st_mode | 0o001)
    yield tmp_path
    for folder, mode in before.items():
        folder.chmod(mode)


def refused(silo, tmp_path):
    try:
        check_separation(silo, tmp_path / "silo.toml")
    except InputError as error:
        return str(error)
    return ""


def test_a_closed_silo_is_accepted(silo, opened):
    assert refused(silo, opened) == ""


@pytest.mark.parametrize(
    ("path", "mode", "said"),
    [
        ("silo.toml", 0o604, "can read {path} (the policy)"),
        ("records.jsonl", 0o604, "can read {path} (the data)"),
        ("records.jsonl", 0o602, "can change {path} (the data)"),
        ("state", 0o702, "can change {path} (keys and ledger)"),
        ("state.anchor", 0o707, "can change {path} (the ledger's anchor)"),
    ],
)
def test_each_thing_within_reach_is_named(silo, opened, path, mode, said):
    (opened / path).chmod(mode)
    assert said.format(path=opened / path) in refused(silo, opened)


def test_a_key_in_a_folder_that_can_be_entered_is_found(silo, opened):
    (opened / "state").chmod(0o701)
    assert refused(silo, opened) == ""  # the file itself is closed
    (opened / "state" / "silo.key").chmod(0o604)
    assert f"can read {opened / 'state' / 'silo.key'} (keys and ledger)" in refused(silo, opened)


def test_a_link_is_followed_to_what_it_names(silo, opened):
    (opened / "state").chmod(0o701)
    (opened / "elsewhere").write_text("secret")
    (opened / "elsewhere").chmod(0o604)
    (opened / "state" / "link").symlink_to(opened / "elsewhere")
    assert f"can read {opened / 'elsewhere'}" in refused(silo, opened)


def test_a_folder_above_that_can_be_changed_is_found(silo, opened):
    opened.chmod(0o703)
    assert f"can replace what is in {opened}" in refused(silo, opened)


def test_the_services_own_user_and_root_are_no_relay(silo, tmp_path):
    own = pwd.getpwuid(os.geteuid()).pw_name
    for user in (own, "root"):
        other = silo.model_copy(update={"silo": silo.silo.model_copy(update={"relay_user": user})})
        assert "neither root nor the service's" in refused(other, tmp_path)


def test_a_user_who_is_not_there_is_named(silo, tmp_path):
    other = silo.model_copy(update={"silo": silo.silo.model_copy(update={"relay_user": "no-such-user"})})
    assert "no such user" in refused(other, tmp_path)


@pytest.mark.skipif(os.geteuid() != 0, reason="only root can act as another user")
@pytest.mark.parametrize("mode", [0o600, 0o604, 0o602, 0o640, 0o660, 0o606, 0o000])
@pytest.mark.parametrize("group", [0, None], ids=["root's group", "the user's group"])
def test_permissions_are_those_that_the_system_gives(opened, mode, group):
    """Against the operating system itself: the same file opened by the user."""
    entry = pwd.getpwnam(NOBODY)
    path: Path = opened / "file"
    path.write_text("x")
    os.chown(path, 0, entry.pw_gid if group is None else group)
    path.chmod(mode)
    account = Account.of(NOBODY)
    for wanted, action in ((READ, f"cat '{path}'"), (WRITE, f": >> '{path}'")):
        command = ["setpriv", f"--reuid={NOBODY}", f"--regid={entry.pw_gid}", "--init-groups", "sh", "-c", action]
        done = subprocess.run(command, capture_output=True, check=False)
        assert account.may(path, wanted) == (done.returncode == 0), (oct(mode), action)
    assert account.may(opened, ENTER)


@pytest.mark.skipif(os.geteuid() != 0, reason="only root can give files to another group")
def test_a_socket_is_shared_and_its_folder_only_where_the_relay_could_not_enter(opened):
    """A folder that others use as well, such as /run, stays as it is."""
    relay = Account.of(NOBODY)
    own, common, full = (opened / name for name in ("own", "common", "full"))
    for folder, mode in ((own, 0o700), (common, 0o755), (full, 0o700)):
        folder.mkdir()
        folder.chmod(mode)
        (folder / "silo.sock").touch(mode=0o600)
    (full / "another").touch()
    for folder in (own, common):
        share_socket(folder / "silo.sock", NOBODY)
        status = (folder / "silo.sock").stat()
        assert (status.st_mode & 0o777, status.st_gid) == (0o660, relay.gid)
    assert (own.stat().st_mode & 0o777, own.stat().st_gid) == (0o750, relay.gid)
    assert (common.stat().st_mode & 0o777, common.stat().st_gid) == (0o755, 0)
    with pytest.raises(InputError, match="it holds other files"):
        share_socket(full / "silo.sock", NOBODY)
    assert full.stat().st_mode & 0o777 == 0o700
