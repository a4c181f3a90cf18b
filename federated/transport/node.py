"""The relay's SuperNode: takes the coordinator's messages, has the silo answer them, and sends the replies.

It stands where Flower's own SuperNode would, and speaks to the same SuperLink with the same client. Unlike that one, it
takes no app from the coordinator and starts no process for a message; it asks for one five times a second while
there is work; and what has come of a message outlives it (``piece_store.py``).
"""

import argparse
import logging
import signal
import sys
import time
from functools import partial
from pathlib import Path
from threading import Event
from typing import cast

import httpx
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.hazmat.primitives.serialization import load_ssh_private_key
from flwr.app import Message
from flwr.proto.message_pb2 import ObjectTree
from flwr.supercore.grpc_health import run_health_server_grpc_no_tls
from flwr.supercore.inflatable.inflatable_object import iterate_object_tree
from flwr.supercore.inflatable.inflatable_utils import inflate_object_from_contents, pull_objects

from federated.transport.client_app import Handler, answered, seconds_left
from federated.transport.fleet import LARGEST_ANSWER_BYTES, LINE_ERRORS, Fleet, UnsoundMessageError, at_once, reason
from federated.transport.flower_messages import MOST_PIECES, sent_before
from federated.transport.node_memory import NodeMemory
from federated.transport.piece_store import PieceStore
from federated.transport.service_client import ask

PIECES, MEMORY = "pieces", "node.json"
_MOST_OBJECTS = MOST_PIECES + 4  # message, its content, two records
_POLL_S, _POLL_SHARE, _LONGEST_POLL_S = 0.2, 0.05, 2.0
_FIRST_LOOK_S, _LONGEST_LOOK_S = 0.05, 2.0
_log = logging.getLogger("siloweave.relay")


class RelayNode:
    """A node that hands each message to one silo.

    Args:
        fleet: the node at the SuperLink.
        memory: what it has answered.
        store: what has come of a message.
        reach: gives, for so many seconds, what answers an envelope with one.
        ended: set when it is to stop.
    """

    def __init__(
        self, fleet: Fleet, memory: NodeMemory, store: PieceStore, reach: "partial[bytes]", ended: Event
    ) -> None:
        self._fleet, self._memory, self._store, self._reach, self._ended = fleet, memory, store, reach, ended

    def run(self) -> None:
        """Serves until it is told to end.

        Raises:
            httpx.HTTPError: the SuperLink takes no such node.
        """
        self._fleet.come()
        _log.info("waiting for messages, as node %d", self._memory.node)
        busy = time.monotonic()
        while not self._ended.is_set():
            came = self._fleet.next_message()
            if came is not None:
                self._serve(*came)
                busy = time.monotonic()
            else:  # what has been quiet for long need not be quick
                self._ended.wait(min(max(_POLL_S, _POLL_SHARE * (time.monotonic() - busy)), _LONGEST_POLL_S))

    def _serve(self, message: Message, tree: ObjectTree) -> None:
        told = message.metadata
        step = f"message {told.message_id[:8]} of run {told.run_id}"
        try:
            if sent_before(told.group_id) & self._memory.answered:
                # Not confirmed: its objects, which that would remove, may be on their way from the coordinator still.
                _log.info("%s: was answered before it was sent again", step)
                return
            self._answer(self._whole(message, tree), step)
            self._fleet.confirm(told.run_id, told.message_id)  # now, where nobody waits for that
        except httpx.HTTPStatusError as error:
            if error.response.status_code == httpx.codes.UNAUTHORIZED:
                raise
            _log.warning("%s: not answered: %s", step, reason(error))
            if error.response.is_server_error:  # as where the SuperLink is being stopped: it is asked again
                self._fleet.come()
        except Exception as error:  # a stranger's message must not end the relay
            _log.warning("%s: not answered: %s", step, reason(error))

    def _whole(self, message: Message, tree: ObjectTree) -> Message:
        """A message with its content: what came before a restart, and from the SuperLink what lacks."""
        told, names = message.metadata, set[str]()
        for node in iterate_object_tree(tree):
            names.add(node.object_id)
            if len(names) > _MOST_OBJECTS:
                raise UnsoundMessageError(f"a message of more than {_MOST_OBJECTS} objects")
        self._store.keep_only(names)
        contents = pull_objects(
            sorted(names),
            _Bounded(self._fleet, self._store, told.run_id).object,
            max_concurrent_pulls=at_once(len(names)),
            max_time=seconds_left(message),
            max_tries_per_object=None,
            initial_backoff=_FIRST_LOOK_S,
            backoff_cap=_LONGEST_LOOK_S,
        )
        found = inflate_object_from_contents(told.message_id, contents)
        if not isinstance(found, Message):
            raise UnsoundMessageError("a message that is none")
        found.metadata.__dict__["_message_id"] = told.message_id
        return found

    def _answer(self, message: Message, step: str) -> None:
        began, told = time.monotonic(), message.metadata
        handler = cast("Handler", partial(self._reach, timeout_s=seconds_left(message)))
        reply = answered(message, handler, takes_pieces=True)
        seconds = time.monotonic() - began
        if self._fleet.send(reply, seconds):
            self._memory.has_answered(told.message_id)
            _log.info("%s (%s): answered; the silo took %.1f s", step, told.group_id.split(" ")[0][:40], seconds)
        else:
            _log.warning("%s: nobody waits for its reply any more", step)
        self._store.keep_only(frozenset())


class _Bounded:
    """The objects of one message, from disk or from the SuperLink, and no more bytes than a message may have."""

    def __init__(self, fleet: Fleet, store: PieceStore, run_id: int) -> None:
        self._fleet, self._store, self._run_id, self._bytes = fleet, store, run_id, 0

    def object(self, name: str) -> bytes:
        content = self._store.get(name)
        if content is None:
            content = self._fleet.object(self._run_id, name)
            self._store.put(name, content)
        self._bytes += len(content)
        if self._bytes > LARGEST_ANSWER_BYTES:
            raise UnsoundMessageError(f"a message of more than {LARGEST_ANSWER_BYTES} bytes")
        return content


def main(arguments: list[str] | None = None) -> None:
    """The program that the relay's supervisor keeps running."""
    parser = argparse.ArgumentParser(description=__doc__)
    for name in ("superlink", "root-certificates", "key", "health", "state", "silo-address"):
        parser.add_argument(f"--{name}", required=True)
    parser.add_argument("--silo-tls", default="")
    given = parser.parse_args(arguments)
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(message)s")
    logging.getLogger("httpx").setLevel(logging.WARNING)  # a line for each request
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(0))
    key = cast("ec.EllipticCurvePrivateKey", load_ssh_private_key(Path(given.key).read_bytes(), None))
    state, ended = Path(given.state), Event()
    memory, store = NodeMemory(state / MEMORY), PieceStore(state / PIECES)
    health = run_health_server_grpc_no_tls(given.health)
    fleet = Fleet(given.superlink, Path(given.root_certificates).read_bytes(), key, memory, ended)
    try:
        RelayNode(fleet, memory, store, partial(ask, given.silo_address, tls_folder=given.silo_tls), ended).run()
    except (*LINE_ERRORS, UnsoundMessageError) as error:
        sys.exit(f"coordinator {given.superlink}: {reason(error)}")
    finally:
        ended.set()
        fleet.leave()
        health.stop(grace=None)


if __name__ == "__main__":
    main()
