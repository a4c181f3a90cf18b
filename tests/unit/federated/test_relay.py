"""What crosses between coordinator and relay inside Flower's messages."""

import pytest
from flwr.app import ConfigRecord, RecordDict
from hypothesis import given
from hypothesis import strategies as st

from federated.client_app import SHARED, pack, size_bytes, unpack


@given(st.binary(), st.binary(), st.binary())
def test_an_envelope_arrives_as_it_was_whatever_is_shared(head, shared, tail):
    assert unpack(pack(head + shared + tail, shared)) == head + shared + tail
    assert unpack(pack(head, shared)) == head  # what is said to be shared is not in it
    assert unpack(pack(head)) == head


def test_what_is_shared_is_one_record_with_one_name_for_flower():
    one, other = (pack(silo + bytes(1000) + b"end", bytes(1000)) for silo in (b"one", b"other"))
    assert one[SHARED].object_id == other[SHARED].object_id
    assert one["siloweave"].object_id != other["siloweave"].object_id
    assert sum(len(part) for part in one["siloweave"].values()) == len(b"oneend")


def test_what_is_shared_is_found_behind_what_begins_like_it():
    shared = bytes(100) + b"adapter"
    content = pack(b"head" + bytes(100) + b"correction" + shared + b"tail", shared)
    assert content[SHARED]["content"] == shared
    assert size_bytes(content) == len(unpack(content)) == 4 + 100 + 10 + 107 + 4


@pytest.mark.parametrize(
    "content",
    [
        RecordDict(),
        RecordDict({"siloweave": ConfigRecord({"head": b"a", "tail": b"b"})}),
        RecordDict({"siloweave": ConfigRecord({"head": "a", "tail": b""}), SHARED: ConfigRecord({"content": b""})}),
    ],
)
def test_what_was_not_packed_is_refused(content):
    with pytest.raises(ValueError, match="no siloweave envelope"):
        unpack(content)
