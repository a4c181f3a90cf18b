"""What a relay keeps of a message, and what becomes of files that are not what they were."""

import logging
from hashlib import sha256

import pytest

from federated.transport.node_memory import NodeMemory
from federated.transport.piece_store import PieceStore

PIECE = bytes(range(256)) * 256
NAME = sha256(PIECE).hexdigest()


def test_a_piece_is_there_after_a_restart_for_this_user_alone(tmp_path):
    PieceStore(tmp_path / "pieces").put(NAME, PIECE)
    assert PieceStore(tmp_path / "pieces").get(NAME) == PIECE
    assert [path.stat().st_mode & 0o777 for path in (tmp_path / "pieces", tmp_path / "pieces" / NAME)] == [0o700, 0o600]


def test_what_is_changed_or_cut_short_is_asked_for_again(tmp_path):
    store = PieceStore(tmp_path)
    store.put(NAME, PIECE)
    for content in (PIECE[:-1], b"", b"x" + PIECE[1:]):
        (tmp_path / NAME).write_bytes(content)
        assert store.get(NAME) is None


@pytest.mark.parametrize("name", ["../outside", "a" * 63, "A" * 64, "0x" + "a" * 62, "a" * 64 + "\n", ""])
def test_a_name_that_is_no_digest_touches_no_file(tmp_path, name):
    store = PieceStore(tmp_path / "pieces")
    store.put(name, PIECE)
    assert store.get(name) is None
    assert [path.name for path in tmp_path.rglob("*")] == ["pieces"]


def test_what_other_messages_have_left_is_removed(tmp_path):
    store = PieceStore(tmp_path)
    store.put(NAME, PIECE)
    (tmp_path / f"{'b' * 64}.part").write_bytes(b"of a relay that was killed")
    (tmp_path / ("c" * 64)).write_bytes(PIECE)
    store.keep_only({NAME, "d" * 64})
    assert [path.name for path in tmp_path.iterdir()] == [NAME]
    store.keep_only(set())
    assert not list(tmp_path.iterdir())


def test_a_disk_that_is_full_costs_a_line_in_the_log_and_no_message(tmp_path, caplog):
    store = PieceStore(tmp_path)
    (tmp_path / f"{NAME}.part").symlink_to("/dev/full")
    with caplog.at_level(logging.WARNING, "siloweave.relay"):
        store.put(NAME, PIECE)
    (line,) = [record.getMessage() for record in caplog.records]
    assert line == f"{tmp_path}: pieces can't be kept (No space left on device); a restart will fetch them again"
    assert store.get(NAME) is None
    assert not list(tmp_path.iterdir())


def test_the_node_remembers_its_number_and_what_it_has_answered_last(tmp_path):
    memory = NodeMemory(tmp_path / "node.json")
    memory.is_node(2**64 - 1)
    for number in range(100):
        memory.has_answered(str(number))
    again = NodeMemory(tmp_path / "node.json")
    assert (again.node, again.answered) == (2**64 - 1, {str(number) for number in range(36, 100)})
    again.is_node(7)
    assert not NodeMemory(tmp_path / "node.json").answered


@pytest.mark.parametrize("content", [b"", b"[]", b"{}", b'{"node": "x", "answered": []}', b'{"node": 1}', b"\xff"])
def test_a_memory_that_is_damaged_is_none(tmp_path, content):
    (tmp_path / "node.json").write_bytes(content)
    assert (NodeMemory(tmp_path / "node.json").node, NodeMemory(tmp_path / "node.json").answered) == (0, set())
