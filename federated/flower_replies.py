"""Flower's grid over the network, where a reply that Flower itself can't read is lost alone.

Flower's grid takes replies off the SuperLink first and reads them then; one that it can't read raises, and takes with
it all that came beside it. A SuperNode chooses every byte of what is read there.
"""

import time
from collections.abc import Iterable, Iterator
from typing import Protocol

import httpx
from flwr.app import Error, Message, MessageType, Metadata
from flwr.app.message.message import make_message

_UNREADABLE = 1


class Nodes(Protocol):
    """What the coordinator asks of a grid."""

    def get_node_ids(self) -> Iterable[int]:
        """The nodes that are there."""

    def push_messages(self, messages: Iterable[Message]) -> Iterable[str]:
        """Sends messages, and gives their ids in the same order."""

    def pull_messages(self, message_ids: Iterable[str]) -> Iterable[Message]:
        """The replies to these messages that have come."""


class OneByOne:
    """A grid that is asked for each reply by itself.

    Args:
        grid: Flower's.
    """

    def __init__(self, grid: Nodes) -> None:
        self._grid = grid
        self.get_node_ids, self.push_messages = grid.get_node_ids, grid.push_messages

    def pull_messages(self, message_ids: Iterable[str]) -> Iterator[Message]:
        """The replies to these messages that have come. What can't be read is an error's message."""
        for message_id in message_ids:
            try:
                for reply in self._grid.pull_messages([message_id]):
                    reply.metadata.__dict__["_reply_to_message_id"] = message_id  # and not what its sender says
                    yield reply
            except httpx.HTTPError:  # the SuperLink's trouble and not the reply's
                raise
            except Exception as error:
                yield _unreadable(message_id, f"Flower can't read its reply ({type(error).__name__}: {error})")


def _unreadable(message_id: str, reason: str) -> Message:
    """Made as Flower makes the message of a reply that never arrived whole: from nobody, in answer to this one."""
    metadata = Metadata(
        run_id=0,
        message_id="",
        src_node_id=0,
        dst_node_id=0,
        reply_to_message_id=message_id,
        group_id="",
        created_at=time.time(),
        ttl=0,
        message_type=MessageType.QUERY,
    )
    return make_message(metadata, error=Error(_UNREADABLE, reason))
