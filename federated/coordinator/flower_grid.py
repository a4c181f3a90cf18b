"""Flower's grid over the network, wrapped so that one reply, or one message, is lost alone or not at all.

Flower's grid takes replies off the SuperLink first and fetches and reads their objects then; one that it can't read
raises, and takes with it all that came beside it. A SuperNode chooses every byte of what is read there, how many there
are, and when they come: it may announce a reply and send none of it.

The SuperLink gives a message to its node once. Where the node has come anew since, or the SuperLink has given it up,
the message is sent again: it has the same content, so the silo charges nothing, and only what lacks is carried.
"""

import time
from collections.abc import Iterable, Iterator
from contextlib import contextmanager, suppress
from copy import copy
from dataclasses import dataclass, field
from threading import Event, Lock, Thread
from typing import Any, Protocol, cast

import httpx
from flwr.app import Error, Message, MessageType, Metadata
from flwr.app.message.message import make_message
from flwr.common.constant import ErrorCode
from flwr.supercore.inflatable.inflatable_utils import ObjectPushError
from flwr.supercore.run import RunNotRunningException

from configs.errors import SiloweaveError
from federated.coordinator.replies import LARGEST_EXTRA_BYTES, UnsoundReply
from federated.transport.flower_messages import again, size_bytes

_UNREADABLE = 1
_AT_ONCE, _PATIENCE_S = 4, 1.0
_FIRST_LOOK_S, _LOOK_SHARE, _LONGEST_LOOK_S = 0.02, 0.05, 1.0  # for an object that is on its way
_LOST = {ErrorCode.MESSAGE_UNAVAILABLE, ErrorCode.REPLY_MESSAGE_UNAVAILABLE, ErrorCode.NODE_UNAVAILABLE}
_RETURNS_S = 30.0  # a relay that died is there again by then, if it comes at all
_MOST_PUSHES = 4  # in a row that a SuperLink lets break off
_MOST_TIMES = 32  # one message is sent; a node that comes anew for ever is not waited for


class Nodes(Protocol):
    """What the coordinator asks of a grid."""

    def get_node_ids(self) -> Iterable[int]:
        """The nodes that are there."""

    def push_messages(self, messages: Iterable[Message]) -> Iterable[str]:
        """Sends messages, and gives their ids in the same order."""

    def pull_messages(self, message_ids: Iterable[str]) -> Iterable[Message]:
        """The replies to these messages that have come."""


class _Objects:
    """A SuperLink's client that gives the objects of one reply, and no more bytes of them than a reply may have.

    It waits for an object that is on its way: Flower's grid would look for it every second, then every ten.
    """

    def __init__(self, client: Any, most_bytes: int, over: Event) -> None:
        self._client, self._most_bytes, self._over = client, most_bytes, over
        self._lock, self._given_bytes = Lock(), 0

    def __getattr__(self, name: str) -> Any:
        return getattr(self._client, name)

    def PullObject(self, request: Any) -> Any:  # noqa: N802  (Flower's name)
        began = time.monotonic()
        while not self._over.is_set():
            response = self._client.PullObject(request)
            if response.object_available or not response.object_found:
                break
            waited_s = time.monotonic() - began
            self._over.wait(min(max(_FIRST_LOOK_S, _LOOK_SHARE * waited_s), _LONGEST_LOOK_S))
        else:
            raise UnsoundReply("its step is over")
        with self._lock:  # Flower fetches two at a time
            self._given_bytes += len(response.object_content)
            if self._given_bytes > self._most_bytes:
                raise UnsoundReply(f"the reply has more than the {self._most_bytes} bytes that one may have")
        return response


@dataclass
class _Pull:
    """One reply on its way, in a thread of its own.

    The thread is a daemon, and none of an executor's, which the interpreter would wait for at its end.

    Attributes:
        message_id: the message that is answered.
        grid: Flower's.
        most_bytes: the most that all the reply's objects may have together.
        over: set when nobody waits for the reply any more.
        done: set when ``replies`` and ``error`` are final.
        replies: what has come; nothing where none has.
        error: what ends the run; None where nothing does.
    """

    message_id: str
    grid: Nodes
    most_bytes: int
    over: Event = field(default_factory=Event)
    done: Event = field(default_factory=Event)
    replies: list[Message] = field(default_factory=list)
    error: BaseException | None = None

    def start(self) -> None:
        Thread(target=self._run, daemon=True).start()

    def _run(self) -> None:
        try:
            self.replies = list(self._bounded().pull_messages([self.message_id]))
            for reply in self.replies:
                reply.metadata.__dict__["_reply_to_message_id"] = self.message_id  # and not what its sender says
        except UnsoundReply as error:
            self.replies = [_unreadable(self.message_id, str(error))]
        except httpx.HTTPError as error:  # the SuperLink's trouble and not the reply's
            self.error = error
        except Exception as error:
            reason = f"Flower can't read its reply ({type(error).__name__}: {error})"
            self.replies = [_unreadable(self.message_id, reason)]
        except BaseException as error:  # so Flower says that the run was stopped
            self.error = error
        finally:
            self.done.set()

    def _bounded(self) -> Nodes:
        """Flower's grid with a bound on the bytes of a reply's objects; a simulation's grid has no such objects."""
        from flwr.superlink.grid.http_grid import HttpGrid  # slow to import, and not needed without Flower

        if not isinstance(self.grid, HttpGrid):
            return self.grid
        grid = copy(self.grid)
        grid._client = cast("Any", _Objects(self.grid._runtime_client, self.most_bytes, self.over))
        return grid

    def result(self) -> list[Message]:
        """Raises what ends the run."""
        if self.error is not None:
            with _told_if_stopped():
                raise self.error
        return self.replies


@contextmanager
def _told_if_stopped() -> Iterator[None]:
    """Says in a line what Flower's exception has no words for."""
    try:
        yield
    except RunNotRunningException:
        raise SiloweaveError("Flower has stopped this run; run the same command again to go on with it") from None


@dataclass
class _Sent:
    """A message that waits for its reply.

    Attributes:
        message: as it was sent first.
        until: when nobody waits for it any more.
        since: since when its node has been there, as the SuperLink said before the message was sent the last time.
        names: the ids under which it was sent.
        lost: the SuperLink's word that it gave the message up, and when that came.
    """

    message: Message
    until: float
    since: str
    names: list[str]
    lost: tuple[Message, float] | None = None

    def once_more(self) -> Message:
        """The same content for the time that is left."""
        return _anew(self.message, self.names, max(self.until - time.monotonic(), 1.0))


def _anew(message: Message, earlier: list[str], ttl: float) -> Message:
    """The same content as another message, which says under which ids it was sent before."""
    told, step = message.metadata, message.metadata.group_id.partition(" ")[0]
    return Message(message.content, told.dst_node_id, told.message_type, group_id=again(step, earlier), ttl=ttl)


class OneByOne:
    """A grid that is asked for each reply by itself, and waits for none that does not come.

    Args:
        grid: Flower's.
    """

    def __init__(self, grid: Nodes) -> None:
        self._grid, self.get_node_ids = grid, grid.get_node_ids
        self._most_bytes = 0
        self._pulls: dict[str, _Pull] = {}
        self._sent: dict[str, _Sent] = {}
        self._looked = 0.0

    def push_messages(self, messages: Iterable[Message]) -> Iterable[str]:
        """Sends messages. No reply may have more bytes than the largest request so far and some to spare."""
        messages = list(messages)
        largest = max((size_bytes(message.content) for message in messages), default=0)
        self._most_bytes = max(self._most_bytes, largest + LARGEST_EXTRA_BYTES)  # some may outlast a step
        with _told_if_stopped():
            since, self._looked = self._since(), time.monotonic()
            names, messages, earlier = self._pushed(messages)
        for name, message, before in zip(names, messages, earlier, strict=False):
            if name:
                node, until = message.metadata.dst_node_id, self._looked + message.metadata.ttl
                self._sent[name] = _Sent(message, until, since.get(node, ""), [*before, name])
        return names

    def _pushed(self, messages: list[Message]) -> tuple[list[str], list[Message], list[list[str]]]:
        """Sends messages; gives their ids, what was sent, and the ids under which it was sent before.

        A SuperLink that dies meanwhile knows the messages, and not all of their objects, which it takes no more. So
        they are sent anew, as other messages: a node that has got one of them all the same answers it once.
        """
        earlier: list[list[str]] = [[] for _ in messages]
        for _ in range(_MOST_PUSHES):
            with suppress(ObjectPushError):
                return list(self._grid.push_messages(messages)), messages, earlier
            earlier = [[*ids, message.metadata.message_id] for ids, message in zip(earlier, messages, strict=True)]
            messages = [
                _anew(message, ids, message.metadata.ttl) for ids, message in zip(earlier, messages, strict=True)
            ]
        return list(self._grid.push_messages(messages)), messages, earlier

    def pull_messages(self, message_ids: Iterable[str]) -> Iterator[Message]:
        """The replies to these messages that have come whole; what can't be read is an error's message.

        Others are not waited for any more: what comes of them is dropped.

        Raises:
            SiloweaveError: Flower has stopped the run.
        """
        asked = set(message_ids)
        self._sent = {name: sent for name, sent in self._sent.items() if name in asked}
        with _told_if_stopped():
            self._send_again()
        first_of = {one: name for name, sent in self._sent.items() for one in sent.names}
        for reply in self._replies({name: name for name in asked} | first_of):
            name = first_of.get(reply.metadata.reply_to_message_id, reply.metadata.reply_to_message_id)
            reply.metadata.__dict__["_reply_to_message_id"] = name
            if self._may_return(name, reply) or (name in first_of and name not in self._sent):
                continue  # the latter was answered under another id a moment ago
            self._sent.pop(name, None)
            yield reply
        yield from self._given_up()

    def _since(self) -> dict[int, str]:
        """Since when each node that is there has been there; nothing of a grid whose nodes are always there."""
        get_nodes = getattr(self._grid, "get_nodes", None)
        return {} if get_nodes is None else {node.node_id: node.last_activated_at for node in get_nodes()}

    def _send_again(self) -> None:
        now = time.monotonic()
        if not self._sent or now - self._looked < _PATIENCE_S:
            return
        self._looked, there = now, self._since()
        for sent in self._sent.values():
            since = there.get(sent.message.metadata.dst_node_id)
            if since is not None and (sent.lost or since != sent.since) and len(sent.names) < _MOST_TIMES:
                sent.since, sent.lost = since, None
                with suppress(ObjectPushError):  # the SuperLink takes no more of it; the next time it is sent again
                    sent.names += [name for name in self._grid.push_messages([sent.once_more()]) if name]

    def _may_return(self, name: str, reply: Message) -> bool:
        """Whether a message was given up whose node may be there again soon."""
        sent = self._sent.get(name)
        if sent is None or not reply.has_error() or reply.error.code not in _LOST or len(sent.names) >= _MOST_TIMES:
            return False
        sent.lost = sent.lost or (reply, time.monotonic())
        return True

    def _given_up(self) -> Iterator[Message]:
        for name, sent in list(self._sent.items()):
            if sent.lost and time.monotonic() - sent.lost[1] > _RETURNS_S:
                del self._sent[name]
                yield sent.lost[0]

    def _replies(self, first_of: dict[str, str]) -> Iterator[Message]:
        """What has come under these ids."""
        for message_id in self._pulls.keys() - first_of.keys():
            self._pulls.pop(message_id).over.set()
        fresh = [message_id for message_id in first_of if message_id not in self._pulls]
        yield from self._whole()
        # Few at once, since each may hold an adapter. One that doesn't end in a moment is looked at in the next call,
        # and its place is another's then.
        for first in range(0, len(fresh), _AT_ONCE):
            ended = self._ended(fresh[first : first + _AT_ONCE])
            yield from self._whole()
            if not ended:
                return

    def _ended(self, message_ids: list[str]) -> bool:
        """Starts these messages' pulls, and says whether all end in a moment."""
        started = [_Pull(message_id, self._grid, self._most_bytes) for message_id in message_ids]
        for pull in started:
            self._pulls[pull.message_id] = pull
            pull.start()
        until = time.monotonic() + _PATIENCE_S
        return all(pull.done.wait(max(until - time.monotonic(), 0)) for pull in started)

    def _whole(self) -> Iterator[Message]:
        for pull in [pull for pull in self._pulls.values() if pull.done.is_set()]:
            del self._pulls[pull.message_id]
            yield from pull.result()


def _unreadable(message_id: str, reason: str) -> Message:
    """An error message like Flower's own for a reply that never arrived whole: from nobody, in answer to this one."""
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
