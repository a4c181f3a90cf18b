"""Sealed files: what goes in comes out, and nothing that was changed, cut, moved or sealed by another key does."""

import base64
import os
import subprocess
import sys

import pytest
from cryptography.hazmat.primitives.ciphers.aead import AESGCM
from cryptography.hazmat.primitives.hashes import SHA256
from cryptography.hazmat.primitives.kdf.hkdf import HKDF
from hypothesis import given, settings
from hypothesis import strategies as st

from configs.errors import InputError
from configs.load import load
from configs.storage.sealing import (
    CHUNK_BYTES,
    ENVIRONMENT,
    MAGIC,
    MasterKey,
    decrypt_tree,
    is_sealed,
    load_key,
    opened,
    read_sealed,
    seal,
    sealing,
    unseal,
    write_sealed,
)

SECRET = bytes(range(100, 132))
KEY = MasterKey(SECRET, "key")
CONTEXT = "round-00001/adapter.safetensors"
HEADER_BYTES = 8 + 1 + 16 + 32 + 2 + len(CONTEXT)
WIDTH = CHUNK_BYTES + 16
LONG = os.urandom(1000) * (2 * CHUNK_BYTES // 1000 + 1)


@given(st.binary(max_size=300), st.binary(min_size=32, max_size=32), st.text(max_size=20))
@settings(max_examples=50, deadline=None)
def test_what_is_sealed_comes_back(content, secret, context):
    key = MasterKey(secret, "key")
    assert unseal(seal(content, key, context), key, context, "f") == content


@pytest.mark.parametrize("size", [0, 1, CHUNK_BYTES - 1, CHUNK_BYTES, CHUNK_BYTES + 1, 2 * CHUNK_BYTES, len(LONG)])
def test_chunks_of_every_fill_come_back(size):
    sealed = seal(LONG[:size], KEY, CONTEXT)
    assert unseal(sealed, KEY, CONTEXT, "f") == LONG[:size]
    assert len(sealed) == HEADER_BYTES + size + 16 * max(1, -(-size // CHUNK_BYTES))


def test_the_format_is_the_documented_one():
    """Decrypted by hand, chunk by chunk, from the module's description."""
    sealed = seal(LONG[: CHUNK_BYTES + 5], KEY, CONTEXT)
    header, body = sealed[:HEADER_BYTES], sealed[HEADER_BYTES:]
    assert header.startswith(MAGIC + b"\x02")
    assert header.endswith(len(CONTEXT).to_bytes(2, "big") + CONTEXT.encode())
    derived = HKDF(SHA256(), 39, salt=header[25:57], info=b"siloweave sealed file: content").derive(SECRET)
    cipher, prefix = AESGCM(derived[:32]), derived[32:]
    first = cipher.decrypt(prefix + b"\0\0\0\0\0", body[:WIDTH], header)
    last = cipher.decrypt(prefix + b"\0\0\0\1\1", body[WIDTH:], header)
    assert first + last == LONG[: CHUNK_BYTES + 5]


def test_equal_files_share_neither_salt_nor_ciphertext():
    sealed = {seal(b"same", KEY, CONTEXT)[HEADER_BYTES - len(CONTEXT) - 34 :] for _ in range(50)}
    assert len({file[:32] for file in sealed}) == len({file[-20:] for file in sealed}) == 50


@pytest.mark.parametrize(
    "position",
    {
        "magic": 3,
        "version": 8,
        "key id": 10,
        "salt": 30,
        "length": 58,
        "context": 70,
        "first chunk": HEADER_BYTES,
        "first tag": HEADER_BYTES + CHUNK_BYTES + 3,
        "middle chunk": HEADER_BYTES + WIDTH + 100,
        "last chunk": HEADER_BYTES + 2 * WIDTH + 10,
        "last tag": -1,
    }.items(),
    ids=lambda pair: pair[0],
)
def test_a_changed_bit_anywhere_is_found(position):
    sealed = bytearray(seal(LONG, KEY, CONTEXT))
    sealed[position[1]] ^= 1
    with pytest.raises(InputError, match=r"^f: "):
        unseal(bytes(sealed), KEY, CONTEXT, "f")
    with pytest.raises(InputError, match=r"^f: "):
        unseal(bytes(sealed), KEY, None, "f")


def test_every_single_byte_of_a_small_file_counts():
    sealed = seal(b"weights", KEY, CONTEXT)
    for position in range(len(sealed)):
        changed = bytearray(sealed)
        changed[position] ^= 0x80
        with pytest.raises(InputError):
            unseal(bytes(changed), KEY, CONTEXT, "f")
        with pytest.raises(InputError):
            unseal(sealed[:position], KEY, CONTEXT, "f")


def test_chunks_cut_off_swapped_doubled_or_appended_are_found():
    sealed = seal(LONG, KEY, CONTEXT)
    header, body = sealed[:HEADER_BYTES], sealed[HEADER_BYTES:]
    first, second, last = body[:WIDTH], body[WIDTH : 2 * WIDTH], body[2 * WIDTH :]
    assert last
    for chunks in ([first, second], [first], [], [second, first, last], [first, first, last], [first, last]):
        with pytest.raises(InputError, match="changed or cut"):
            unseal(b"".join([header, *chunks]), KEY, CONTEXT, "f")
    for extra in (b"x", last, first):
        with pytest.raises(InputError, match="changed or cut"):
            unseal(sealed + extra, KEY, CONTEXT, "f")
    other = seal(LONG, KEY, CONTEXT)  # the same content, place and key: a chunk still belongs to its own file
    with pytest.raises(InputError, match="changed or cut"):
        unseal(other[:HEADER_BYTES] + body, KEY, CONTEXT, "f")


def test_another_key_or_another_place_is_said(tmp_path):
    path = tmp_path / "adapter.safetensors"
    write_sealed(path, b"weights", KEY, CONTEXT)
    assert read_sealed(path, KEY, CONTEXT) == b"weights"
    with pytest.raises(InputError, match=r"adapter.safetensors: was encrypted with another key than /k"):
        read_sealed(path, MasterKey(bytes(range(32)), "/k"), CONTEXT)
    with pytest.raises(InputError, match=r"is the encrypted 'round-00001/.*', not 'round-00002/"):
        read_sealed(path, KEY, "round-00002/adapter.safetensors")


def test_a_missing_key_and_a_file_in_the_clear_are_refused(tmp_path):
    sealed, clear = tmp_path / "sealed", tmp_path / "clear"
    write_sealed(sealed, b"weights", KEY, CONTEXT)
    write_sealed(clear, b"weights", None, CONTEXT)
    assert clear.read_bytes() == read_sealed(clear, None, CONTEXT) == b"weights"
    with pytest.raises(InputError, match=r"sealed: is encrypted; set run.encryption_key_file"):
        read_sealed(sealed, None, CONTEXT)
    with pytest.raises(InputError, match=r"clear: is not encrypted, but a key is set \(key\)"):
        read_sealed(clear, KEY, CONTEXT)


def key_file(tmp_path, content, mode=0o600):
    path = tmp_path / "key"
    path.write_bytes(content)
    path.chmod(mode)
    return str(path)


@pytest.mark.parametrize(
    "content", [SECRET, SECRET.hex().encode() + b"\n", SECRET.hex().upper().encode(), base64.b64encode(SECRET) + b"\n"]
)
def test_a_key_file_is_raw_hexadecimal_or_base64(tmp_path, content):
    key = load_key(key_file(tmp_path, content))
    assert key.secret == SECRET
    assert SECRET.hex() not in repr(key)
    assert str(SECRET) not in repr(key)


@pytest.mark.parametrize("mode", [0o640, 0o604, 0o620, 0o777])
def test_a_key_that_others_can_reach_is_refused(tmp_path, mode):
    with pytest.raises(InputError, match=r"key: mode ... lets others read it or change it; `chmod 600`"):
        load_key(key_file(tmp_path, SECRET, mode))


@pytest.mark.parametrize(
    "content",
    [b"", b"correct horse battery staple 1234", b"a password of exactly 32 letters", bytes(32), SECRET[:-1], b"0" * 64],
)
def test_what_is_not_a_random_key_is_refused(tmp_path, content):
    with pytest.raises(InputError, match="not 32 random bytes"):
        load_key(key_file(tmp_path, content))


def test_no_key_file_and_no_variable_are_refused(tmp_path, monkeypatch):
    assert load_key("") is None
    with pytest.raises(InputError, match=r"nowhere: the encryption key can't be read"):
        load_key(str(tmp_path / "nowhere"))
    monkeypatch.delenv(ENVIRONMENT, raising=False)
    with pytest.raises(InputError, match="SILOWEAVE_ENCRYPTION_KEY is not set here"):
        load_key("env:")
    monkeypatch.setenv(ENVIRONMENT, SECRET.hex())
    assert load_key("env:").secret == SECRET


def test_a_key_in_the_environment_encrypts_without_a_setting(tmp_path, monkeypatch):
    monkeypatch.delenv(ENVIRONMENT, raising=False)
    assert load("tiny").run.encryption_key_file == ""
    monkeypatch.setenv(ENVIRONMENT, SECRET.hex())
    assert load("tiny").run.encryption_key_file == "env:"
    monkeypatch.chdir(tmp_path)
    assert load("tiny", ["run.encryption_key_file=key"]).run.encryption_key_file == str(tmp_path / "key")


def test_folders_are_sealed_on_the_way_in_and_opened_on_the_way_out(tmp_path):
    target = tmp_path / "model"
    with sealing(target, KEY, "model") as folder:
        (folder / "part").mkdir()
        (folder / "part" / "w.safetensors").write_bytes(b"weights")
        (folder / "config.json").write_text("{}")
        assert folder.stat().st_mode & 0o077 == 0
    assert not folder.exists()
    assert is_sealed(target / "part" / "w.safetensors")
    assert (target / "config.json").read_text() == "{}"
    with opened(target, KEY, "model") as folder:
        assert (folder / "part" / "w.safetensors").read_bytes() == b"weights"
        assert (folder / "part" / "w.safetensors").stat().st_mode & 0o077 == 0
    assert not folder.exists()
    with pytest.raises(InputError, match="is encrypted"), opened(target, None, "model"):
        pass
    (target / "stranger.safetensors").write_bytes(b"weights")
    with pytest.raises(InputError, match=r"stranger\.safetensors: is not encrypted"), opened(target, KEY, "model"):
        pass


def test_older_files_are_read_by_what_they_were_sealed_as(tmp_path, monkeypatch):
    monkeypatch.setattr("configs.storage.sealing._VERSION", 1)
    with sealing(tmp_path / "older", KEY, "model") as folder:
        (folder / "w.safetensors").write_bytes(b"old")
    whole = seal(b"round", KEY, CONTEXT)
    monkeypatch.undo()
    assert (tmp_path / "older" / "w.safetensors").read_bytes()[len(MAGIC)] == 1
    assert unseal(whole, KEY, CONTEXT, "f") == b"round"
    with opened(tmp_path / "older", KEY, "run/model", older="model") as folder:
        assert (folder / "w.safetensors").read_bytes() == b"old"
    with pytest.raises(InputError, match="is the encrypted"), opened(tmp_path / "older", KEY, "run/model"):
        pass
    with sealing(tmp_path / "new", KEY, "model") as folder:  # of this version, and it names no run
        (folder / "w.safetensors").write_bytes(b"new")
    with (
        pytest.raises(InputError, match=r"is the encrypted 'model/w.safetensors', not 'run/model/w.safetensors'"),
        opened(tmp_path / "new", KEY, "run/model", older="model"),
    ):
        pass


def test_decrypting_writes_a_private_copy_or_nothing(tmp_path):
    source, target = tmp_path / "source", tmp_path / "target"
    source.mkdir()
    write_sealed(source / "a.safetensors", b"weights", KEY, CONTEXT)
    (source / "config.json").write_text("{}")
    assert decrypt_tree(source, target, KEY) == 1
    assert (target / "a.safetensors").read_bytes() == b"weights"
    assert (target / "a.safetensors").stat().st_mode & 0o077 == 0
    with pytest.raises(InputError, match="target: exists"):
        decrypt_tree(source, target, KEY)
    assert decrypt_tree(source / "a.safetensors", tmp_path / "alone", KEY) == 1
    assert (tmp_path / "alone").read_bytes() == b"weights"
    with pytest.raises(InputError, match="nothing encrypted there"):
        decrypt_tree(target, tmp_path / "again", KEY)
    write_sealed(source / "b.safetensors", b"weights", MasterKey(bytes(range(32)), "other"), CONTEXT)
    with pytest.raises(InputError, match="another key"):
        decrypt_tree(source, tmp_path / "half", KEY)
    assert not (tmp_path / "half").exists()


def test_a_full_disk_leaves_the_sealed_file_before(tmp_path):
    path = tmp_path / "adapter"
    write_sealed(path, b"old", KEY, CONTEXT)
    script = (
        "import resource, signal, sys; from pathlib import Path; from configs.storage.sealing import *\n"
        "signal.signal(signal.SIGXFSZ, signal.SIG_IGN); resource.setrlimit(resource.RLIMIT_FSIZE, (1000, 1000))\n"
        "write_sealed(Path(sys.argv[1]), b'n' * 5000, MasterKey(bytes(range(100, 132)), 'key'), 'x')"
    )
    done = subprocess.run([sys.executable, "-c", script, str(path)], capture_output=True, text=True, check=False)
    assert "could not be written" in done.stderr
    assert read_sealed(path, KEY, CONTEXT) == b"old"
    assert [entry.name for entry in tmp_path.iterdir()] == ["adapter"]
