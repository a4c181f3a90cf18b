"""A secret's file, by each of the three ways to read one: drawn once, its owner's alone, small, a file."""

import os
import subprocess
import sys
import tempfile
import threading
from pathlib import Path

import pytest
from cryptography.hazmat.primitives.serialization import Encoding, NoEncryption, PrivateFormat

from configs.errors import InputError, SiloweaveError
from configs.storage.sealing import load_key
from configs.storage.secrets import LARGEST_SECRET_BYTES, load_or_create_secret, load_or_draw, load_secret
from federated.identity.keys import load_or_create_key
from federated.identity.x509 import CURVE


def elliptic(path):
    key = load_or_create_key(path, CURVE)
    return key.private_bytes(Encoding.PEM, PrivateFormat.PKCS8, NoEncryption())


def users_key(path):
    return load_key(str(path)).secret


READERS = {"secret": load_secret, "drawn secret": load_or_create_secret, "key": elliptic, "user's key": users_key}
DRAWING = {"secret": load_or_create_secret, "key": elliptic}


@pytest.fixture(params=READERS)
def read(request):
    return READERS[request.param]


@pytest.fixture(params=DRAWING)
def draw(request):
    return DRAWING[request.param]


def made(path, read):
    """A sound secret's file, of the kind that the reader reads."""
    elliptic(path) if read is elliptic else load_or_create_secret(path)
    return path


@pytest.fixture
def secret(tmp_path, read):
    return made(tmp_path / "folder" / "a.key", read)


def test_a_sound_secret_is_read_again_and_nothing_else_lies_beside_it(secret, read):
    assert read(secret) == read(secret)
    assert secret.stat().st_mode & 0o777 == 0o600
    assert list(secret.parent.iterdir()) == [secret]


@pytest.mark.parametrize("mode", [0o604, 0o640, 0o602, 0o620, 0o601, 0o610])
def test_no_right_of_others_is_passed_over(secret, read, mode):
    secret.chmod(mode)
    with pytest.raises(InputError, match=f"a.key: mode {mode:o} lets others read it or change it; `chmod 600` it"):
        read(secret)
    secret.chmod(0o400)
    read(secret)


def test_a_link_is_as_private_as_what_it_leads_to(secret, read, tmp_path):
    link = tmp_path / "link.key"
    link.symlink_to(secret)
    assert read(link) == read(secret)
    secret.chmod(0o644)
    with pytest.raises(InputError, match=r"link.key: mode 644"):
        read(link)


def test_a_link_that_leads_nowhere_is_no_place_for_a_new_secret(read, tmp_path):
    link = tmp_path / "a.key"
    link.symlink_to(tmp_path / "backup.key")
    with pytest.raises(InputError, match=r"a.key: .*(backup|make one)"):
        read(link)
    assert list(tmp_path.iterdir()) == [link]


def test_a_pipe_is_refused_and_not_waited_for(read, tmp_path):
    os.mkfifo(tmp_path / "a.key", 0o600)
    with pytest.raises(InputError, match=r"a.key: is no regular file"):
        read(tmp_path / "a.key")


def test_a_folder_is_no_secret(read, tmp_path):
    (tmp_path / "a.key").mkdir(0o700)
    with pytest.raises(InputError, match=r"a.key: is no regular file"):
        read(tmp_path / "a.key")


def test_what_is_too_large_is_not_read(secret, read):
    secret.write_bytes(secret.read_bytes() + b"\n" * LARGEST_SECRET_BYTES)
    with pytest.raises(InputError, match=r"a.key: more than 4096 bytes"):
        read(secret)


def test_a_lost_secret_is_missed_where_none_may_be_drawn(tmp_path):
    with pytest.raises(InputError, match="no such key, and a new one would not be the same; put its backup back"):
        load_secret(tmp_path / "a.key")
    with pytest.raises(InputError, match=r"the encryption key can't be read \(no such file\); make one with"):
        users_key(tmp_path / "a.key")
    assert not list(tmp_path.iterdir())


@pytest.fixture
def another_user():
    """From here on this process is another user than the one who made the secret."""
    if os.geteuid() != 0:
        pytest.skip("only root can become another user")
    yield lambda: os.seteuid(65534)
    os.seteuid(0)


@pytest.mark.parametrize("mode", [0o700, 0o755])
def test_another_user_gets_one_line_and_no_secret(read, mode, another_user):
    with tempfile.TemporaryDirectory() as name:  # pytest's own folders are closed to others
        Path(name).chmod(0o755)
        secret = made(Path(name) / "folder" / "a.key", read)
        secret.parent.chmod(mode)
        another_user()
        with pytest.raises(SiloweaveError, match=rf"^{secret}: .*(may not read it|Permission denied)") as caught:
            read(secret)
        os.seteuid(0)
    assert "\n" not in str(caught.value)


def test_all_who_draw_at_once_have_the_same_secret(draw, tmp_path):
    """Threads of one process, which share its number, as well as processes."""
    path, start, found = tmp_path / "a.key", threading.Barrier(16), []

    def one():
        start.wait()
        found.append(draw(path))

    threads = [threading.Thread(target=one) for _ in range(16)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(found) == 16
    assert len(set(found)) == 1
    assert list(tmp_path.iterdir()) == [path]


_DRAW = """
import sys
from pathlib import Path
from configs.storage.secrets import load_or_create_secret
print("ready", flush=True)
sys.stdin.readline()
print(load_or_create_secret(Path(sys.argv[1])).hex())
"""


def test_all_processes_that_draw_at_once_have_the_same_secret(tmp_path):
    started = [
        subprocess.Popen(
            [sys.executable, "-c", _DRAW, str(tmp_path / "a.key")],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        )
        for _ in range(4)
    ]
    for process in started:
        assert process.stdout.readline() == "ready\n"
    for process in started:
        process.stdin.write("\n")
        process.stdin.flush()
    assert len({process.communicate(timeout=300)[0] for process in started}) == 1
    assert [path.name for path in tmp_path.iterdir()] == ["a.key"]


def test_what_was_there_first_is_the_secret(tmp_path):
    path = tmp_path / "a.key"

    def another_is_faster():
        load_or_create_secret(path)
        return bytes(32)

    assert load_or_draw(path, another_is_faster) == load_secret(path) != bytes(32)
    assert list(tmp_path.iterdir()) == [path]


def test_a_failed_draw_leaves_nothing_behind(tmp_path, monkeypatch):
    def full(*_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "link", full)
    with pytest.raises(SiloweaveError, match=r"a.key: could not be written \(No space left on device\)"):
        load_or_create_secret(tmp_path / "a.key")
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("size", [0, 31, 33, 64])
def test_a_secret_has_its_length(tmp_path, size):
    path = Path(tmp_path / "a.key")
    path.touch(0o600)
    path.write_bytes(os.urandom(size))
    with pytest.raises(InputError, match=f"{size} bytes, a key has 32; put the key's backup back"):
        load_or_create_secret(path)
    assert path.stat().st_size == size
