"""Who may read what is written, whatever the umask is; and what is said where nothing can be written."""

import errno
import os
import resource
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from configs.errors import InputError, SiloweaveError
from configs.storage.files import private_folder, write_atomic, write_failure
from configs.storage.layout import SiloFiles
from configs.storage.secrets import load_or_create_secret
from federated.identity.keys import load_or_create_key
from federated.identity.trust import coordinator_signer
from federated.identity.x509 import CURVE
from privacy.ledger.chain import Budget
from privacy.ledger.ledger import Ledger


@pytest.fixture(params=[0o000, 0o022, 0o077, 0o027], ids=oct)
def umask(request):
    before = os.umask(request.param)
    yield request.param
    os.umask(before)


def mode(path):
    return path.stat().st_mode & 0o777


def test_a_file_is_as_closed_as_the_umask_has_it(tmp_path, umask):
    """Before: a chmod to 0644 after the fact, whatever the user's umask was."""
    for wanted in (0o644, 0o600):
        write_atomic(tmp_path / "a", b"x", mode=wanted)
        assert mode(tmp_path / "a") == wanted & ~umask


def test_keys_ledgers_and_anchors_are_their_owners_alone(tmp_path, umask):
    """Before: an anchor's and a simulated coordinator's folder were as open as the umask left them."""
    ledger = Ledger.open(
        tmp_path / "silo", "north", "ward", Budget(1.0, 1e-5), anchor_dir=tmp_path / "elsewhere" / "it"
    )
    ledger.close_file()
    coordinator_signer(tmp_path / "coordinator")
    load_or_create_key(private_folder(tmp_path / "tls") / "service.key", CURVE)
    secret = tmp_path / "made" / "split.key"
    load_or_create_secret(secret)
    folders = [tmp_path / "silo", tmp_path / "elsewhere" / "it", tmp_path / "coordinator", tmp_path / "tls"]
    assert [oct(mode(folder)) for folder in folders] == ["0o700"] * 4
    files = [path for folder in (*folders, secret.parent) for path in folder.iterdir()]
    assert len(files) >= 6
    assert {path.name: oct(mode(path)) for path in files if mode(path) != 0o600} == {}


def test_a_folder_of_keys_that_was_open_is_closed(tmp_path):
    for make in (
        private_folder,
        coordinator_signer,
        lambda folder: Ledger.open(folder, "north", "ward", Budget(1.0, 1e-5)).close_file(),
    ):
        folder = tmp_path / f"open-{len(list(tmp_path.iterdir()))}"
        folder.mkdir()
        folder.chmod(0o777)
        make(folder)
        assert mode(folder) == 0o700
    with pytest.raises(InputError, match=r"can't be made a folder of your own \(File exists\)"):
        private_folder(SiloFiles(folder).key)


def test_a_name_as_long_as_a_name_may_be_is_written(tmp_path):
    """Before: the file that becomes it had a longer one, which no file system takes."""
    path = tmp_path / ("n" * 255)
    write_atomic(path, b"x")
    assert path.read_bytes() == b"x"
    assert list(tmp_path.iterdir()) == [path]


def _long(folder):
    return folder / ("n" * 256)


def _folder(folder):
    (folder / "a").mkdir()
    return folder / "a"


def _below_a_file(folder):
    (folder / "a").write_text("x")
    return folder / "a" / "b" / "c"


def _circle(folder):
    (folder / "a").symlink_to(folder / "b")
    (folder / "b").symlink_to(folder / "a")
    return folder / "a" / "c"


@pytest.mark.parametrize(
    ("make", "told"),
    [
        (_long, "choose a shorter name"),
        (_folder, "a folder is there"),
        (_below_a_file, "what is above it is no folder"),
        (_circle, "links there lead in a circle|something else is there"),
    ],
)
def test_what_stands_in_the_way_is_said_as_what_it_is(tmp_path, make, told):
    """Before: `free some space`, of whatever it was."""
    path = make(tmp_path)
    before = sorted(tmp_path.rglob("*"))
    with pytest.raises(SiloweaveError, match=told) as caught:
        write_atomic(path, b"x")
    assert "space" not in str(caught.value)
    assert "what was committed before is intact" in str(caught.value)
    assert sorted(tmp_path.rglob("*")) == before


def test_no_file_can_be_opened_any_more(tmp_path):
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    used = os.open("/dev/null", os.O_RDONLY)
    try:
        resource.setrlimit(resource.RLIMIT_NOFILE, (used, hard))
        with pytest.raises(SiloweaveError, match=rf"Too many open files.*`ulimit -n`, {used} now"):
            write_atomic(tmp_path / "a", b"x")
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))
        os.close(used)


_WRITE = """
import sys
from pathlib import Path
from configs.storage.files import write_atomic
for path in map(Path, sys.argv[1:]):
    try:
        write_atomic(path, b"x" * 2**20)
    except Exception as error:
        print(type(error).__name__, error)
"""


@pytest.mark.skipif(os.geteuid() != 0 or shutil.which("unshare") is None, reason="only root can mount a full disk")
def test_a_full_a_closed_and_a_read_only_file_system(tmp_path):
    """Real ones, in a view of the mounts that ends with the process; written to by a user without rights."""
    for name in ("full", "fixed", "closed"):
        (tmp_path / name).mkdir()
    script = (
        f"set -e; mount -t tmpfs -o size=64k,mode=777 tmpfs '{tmp_path}/full'; "
        f"mount -t tmpfs -o ro tmpfs '{tmp_path}/fixed'; chmod 700 '{tmp_path}/closed'; exec \"$@\""
    )
    # Root may write anywhere; without this capability it is a user like others.
    plain = ["setpriv", "--bounding-set=-dac_override,-dac_read_search", "--inh-caps=-dac_override,-dac_read_search"]
    os.chown(tmp_path / "closed", 12345, 12345)
    paths = [str(tmp_path / name / "a") for name in ("full", "fixed", "closed")]
    command = ["unshare", "--mount", "--propagation", "private", "sh", "-c", script, "sh", *plain]
    command += [sys.executable, "-c", _WRITE, *paths]
    done = subprocess.run(command, capture_output=True, text=True, check=False, timeout=120)
    full, fixed, closed = done.stdout.splitlines()
    assert "No space left on device" in full and "free some space" in full
    assert "Read-only file system" in fixed and "mounted for writing" in fixed and "space" not in fixed
    assert "Permission denied" in closed and "let user root write there" in closed and "space" not in closed


def test_a_quota_is_told_as_one():
    told = str(write_failure(Path("a"), OSError(errno.EDQUOT, os.strerror(errno.EDQUOT))))
    assert "have the quota raised" in told
    other = str(write_failure(Path("a"), OSError(errno.EIO, os.strerror(errno.EIO))))
    assert "Input/output error" in other and "space" not in other
