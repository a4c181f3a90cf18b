"""Requests on their way to the silos' nodes, and replies as they come: those of one step, and those that outlast it."""

import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from itertools import zip_longest

from flwr.app import Message

from configs.events import EventLog
from configs.schema.federated import FederatedSettings
from federated.coordinator.flower_grid import Nodes
from federated.coordinator.replies import Asked
from federated.protocol.envelope import seal_request
from federated.transport.flower_messages import pack, takes_pieces
from privacy.signing import Signer

POLL_S, LONGEST_POLL_S = 0.05, 1.0
TRAIN, QUERY = "train", "query"


def pause_s(waited_s: float) -> float:
    """Seconds between two looks for replies, after so many of waiting."""
    return min(max(POLL_S, POLL_S * waited_s), LONGEST_POLL_S)


@dataclass(frozen=True)
class Posted:
    """A request whose reply may come while others are waited for.

    Attributes:
        silo: who is asked.
        node: where it was then.
        asked: what the reply has to fit.
        until: the monotonic clock's time from which the reply is not waited for.
        deadline_s: how long that was from the start.
    """

    silo: str
    node: int
    asked: Asked
    until: float
    deadline_s: float


@dataclass
class Mail:
    """One run's messages.

    Attributes:
        grid: reaches the silos' nodes.
        signer: the coordinator's key.
        settings: the silos' deadlines.
        log: receives time-outs.
        receipt_of: gives the last signed receipt of a silo; nothing where there is none.
        silo_at: the silos that have been met, by node.
        bytes_moved: bytes of requests and replies since it was set to zero.
        in_flight: requests that outlast a step, by the ids of their messages.
    """

    grid: Nodes
    signer: Signer
    settings: FederatedSettings
    log: EventLog
    receipt_of: Callable[[str], bytes]
    silo_at: dict[int, str] = field(default_factory=dict)
    bytes_moved: int = 0
    in_flight: dict[str, Posted] = field(default_factory=dict)
    _in_pieces: set[int] = field(default_factory=set)  # nodes that read them
    _early: list[Message] = field(default_factory=list)  # replies to those

    def send(
        self,
        bodies: Iterable[tuple[int, bytes, bytes]],
        kind: str,
        group: str,
        patience_s: Callable[[], float] | None,
        over: Callable[[], bool] = lambda: False,
    ) -> Iterator[tuple[int, Message]]:
        """Sends (node, body, its shared part) and yields what comes back as it comes, until all have or time is up."""
        waiting = self._pushed(bodies, kind, group, patience_s)
        began = time.monotonic()
        while waiting and not over():
            waited_s, patience = time.monotonic() - began, patience_s() if patience_s else None
            late = {name: one for name, one in waiting.items() if waited_s >= (patience or one.deadline_s)}
            if late:
                waiting = {name: one for name, one in waiting.items() if name not in late}
                self._timed_out(group, kind, list(late.values()), patience)
                continue
            came = False
            for message in self._pulled(waiting):
                came = True
                if message.metadata.reply_to_message_id in waiting:
                    yield waiting.pop(message.metadata.reply_to_message_id).node, message
                    if over():
                        return
            if waiting and not came:
                time.sleep(pause_s(waited_s))

    def _pushed(
        self,
        bodies: Iterable[tuple[int, bytes, bytes]],
        kind: str,
        group: str,
        patience_s: Callable[[], float] | None = None,
    ) -> dict[str, Posted]:
        """Sends (node, body, its shared part); by the ids of the messages."""
        messages, posted = [], []
        for node, body, shared in bodies:
            silo = self.silo_at.get(node, "")
            envelope = seal_request(self.signer, body, self.receipt_of(silo))
            self.bytes_moved += len(envelope)
            timeout_s = patience_s() if patience_s else self.settings.deadline_s(silo)
            posted.append(Posted(silo, node, Asked.of(body), time.monotonic() + timeout_s, timeout_s))
            # A node that is away must not find the message when it is back: its round is over by then.
            content = pack(envelope, shared, in_pieces=node in self._in_pieces)
            messages.append(Message(content, node, kind, group_id=group, ttl=timeout_s))
        # The silo is known by the message that is answered: what a reply says of its sender is the sender's own word.
        names = self.grid.push_messages(messages) if messages else ()
        sent = enumerate(zip_longest(names, posted))
        return {name or f"unsent {at} to {one.node}": one for at, (name, one) in sent}

    def _pulled(self, waiting: Mapping[str, Posted]) -> Iterator[Message]:
        """What has come of these; replies to requests in flight, which come beside them, are kept."""
        for message in self.grid.pull_messages([*waiting, *self.in_flight]):
            replied = message.metadata.reply_to_message_id
            asked = waiting.get(replied) or self.in_flight.get(replied)
            if asked is not None and message.has_content() and takes_pieces(message.content):
                self._in_pieces.add(asked.node)
            if replied in self.in_flight:
                self._early.append(message)
            else:
                yield message

    def post(self, node: int, body: bytes, shared: bytes, group: str) -> None:
        """Sends one request whose reply is waited for over steps."""
        self.in_flight |= self._pushed([(node, body, shared)], TRAIN, group)

    def landed(self) -> Iterator[tuple[Posted, Message]]:
        """The replies to requests in flight that have come; waits a moment where none has.

        Whoever takes no more of them finds the others there the next time.
        """
        if not self._early:
            list(self._pulled({}))
        if not self._early:
            time.sleep(POLL_S)
        while self._early:
            message = self._early.pop(0)
            if (posted := self.in_flight.pop(message.metadata.reply_to_message_id, None)) is not None:
                yield posted, message

    def overdue(self, group: str) -> list[Posted]:
        """The requests in flight whose time is up before a reply has come; nobody waits for them any longer."""
        now, came = time.monotonic(), {message.metadata.reply_to_message_id for message in self._early}
        late = {name: one for name, one in self.in_flight.items() if now >= one.until and name not in came}
        for name, one in late.items():
            del self.in_flight[name]
            self._timed_out(group, TRAIN, [one], None)
        return list(late.values())

    def _timed_out(self, group: str, kind: str, late: list[Posted], patience_s: float | None) -> None:
        """Tells who has not answered in time."""
        silent = sorted(self.silo_at.get(one.node, f"node {one.node}") for one in late)
        timeout_s = patience_s or max(one.deadline_s for one in late)
        message = f"no answer from {', '.join(silent)} in {timeout_s:g} s; the run goes on, and asks again later"
        if kind == TRAIN:
            message += "; what they spend on this step stays charged, and what comes of it later is not used"
        self.log.emit("federate", "timeout", step=group, missing=len(silent), silos=silent, message=message)
