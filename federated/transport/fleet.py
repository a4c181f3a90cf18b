"""The relay's side of Flower's Fleet API, over Flower's own client: questions that outlive a cut line, bounded answers.

What Flower's SuperNode does not do: it gives up a reply where the answer to a piece was lost on the way, and a message
where the SuperLink's answer was. Here the node then comes anew, which the coordinator sees, and asks it again.
"""

import logging
from collections.abc import Callable
from contextlib import suppress
from functools import partial
from threading import Event
from typing import TypeVar

import httpx
from cryptography.hazmat.primitives.asymmetric import ec
from flwr.app import Message
from flwr.app.message import remove_content_from_message
from flwr.common.constant import HEARTBEAT_DEFAULT_INTERVAL
from flwr.common.serde import message_from_proto, message_to_proto
from flwr.proto.fleet_pb2 import ActivateNodeRequest, DeactivateNodeRequest, PullMessagesRequest, PushMessagesRequest
from flwr.proto.heartbeat_pb2 import SendNodeHeartbeatRequest
from flwr.proto.message_pb2 import ConfirmMessageReceivedRequest, ObjectTree, PullObjectRequest, PushObjectRequest
from flwr.proto.node_pb2 import Node
from flwr.supercore.error import FlowerError
from flwr.supercore.heartbeat import HeartbeatSender
from flwr.supercore.inflatable.inflatable_object import (
    get_all_nested_objects,
    get_object_id,
    get_object_tree,
    no_object_id_recompute,
)
from flwr.supercore.inflatable.inflatable_utils import ObjectPullError, ObjectUnavailableError, push_objects
from flwr.supercore.interceptors.http.runtime_version import RuntimeVersionHttpInterceptor
from flwr.supercore.primitives.asymmetric import public_key_to_bytes
from flwr.supernode.fleet_http_client import FleetHttpClient
from flwr.supernode.node_auth_http_interceptor import NodeAuthHttpInterceptor

from configs.printing import printable
from federated.protocol.clocks import ahead_of, clock_problem
from federated.transport.node_memory import NodeMemory

LARGEST_ANSWER_BYTES = 2**31  # no envelope is longer: protobuf's own limit
_FIRST_PAUSE_S, _LONGEST_PAUSE_S, _LONGEST_DETAIL = 0.2, 5.0, 300
_SHORT = 4  # objects of a message in one piece
_PASSES = {httpx.codes.TOO_MANY_REQUESTS, httpx.codes.BAD_GATEWAY, httpx.codes.SERVICE_UNAVAILABLE}
_PASSES |= {httpx.codes.GATEWAY_TIMEOUT, httpx.codes.REQUEST_TIMEOUT}
_NEVER_SENT = (httpx.ConnectError, httpx.ConnectTimeout, httpx.PoolTimeout)
LINE_ERRORS = (httpx.TransportError, httpx.HTTPStatusError)
_log = logging.getLogger("siloweave.relay")
T = TypeVar("T")


class UnsoundMessageError(ValueError):
    """What the SuperLink sends is not what it says."""


class Fleet:
    """One node at the SuperLink.

    Args:
        address: of the coordinator, ``HOST:PORT``.
        root_certificates: of its authority, PEM.
        key: by which it knows the node.
        memory: the node's number, so that one that was killed can come anew at once.
        ended: nothing is asked any more once it is set.
    """

    def __init__(
        self, address: str, root_certificates: bytes, key: ec.EllipticCurvePrivateKey, memory: NodeMemory, ended: Event
    ) -> None:
        self._address, self._memory, self._ended = address, memory, ended
        self._public_key = public_key_to_bytes(key.public_key())
        signs = NodeAuthHttpInterceptor(key, key.public_key())
        says = RuntimeVersionHttpInterceptor(component_name="SuperNode")
        self._client = FleetHttpClient.from_server_address(address, False, root_certificates, [says, signs])
        bounded(self._client._client)
        self._heartbeats: HeartbeatSender | None = None

    @property
    def _node(self) -> Node:
        return Node(node_id=self._memory.node)

    def come(self) -> None:
        """Says that the node is there anew; the coordinator asks again what has not been answered.

        Raises:
            httpx.HTTPError: the SuperLink takes no such node.
        """
        if self._memory.node:
            leaves = DeactivateNodeRequest(node_id=self._memory.node)
            try:
                self._answer(partial(self._client.DeactivateNode, leaves))
            except httpx.HTTPStatusError as error:  # it is not there, or has been given another number
                _log.info("%s", reason(error))
        comes = ActivateNodeRequest(public_key=self._public_key, heartbeat_interval=HEARTBEAT_DEFAULT_INTERVAL)
        self._memory.is_node(self._answer(partial(self._client.ActivateNode, comes)).node_id)
        if self._heartbeats is None:
            self._heartbeats = HeartbeatSender(self._beat)
            self._heartbeats.start()

    def leave(self) -> None:
        """Says that the node goes, once."""
        if self._memory.node:
            try:
                self._client.DeactivateNode(DeactivateNodeRequest(node_id=self._memory.node))
            except LINE_ERRORS as error:
                _log.info("%s", reason(error))
        self._client.close()

    def _beat(self) -> bool:
        asks = SendNodeHeartbeatRequest(node=self._node, heartbeat_interval=HEARTBEAT_DEFAULT_INTERVAL)
        try:
            return bool(self._client.SendNodeHeartbeat(asks).success)
        except (httpx.HTTPError, RuntimeError):  # the latter where the client is closed
            return False

    def next_message(self) -> tuple[Message, ObjectTree] | None:
        """The next message, without content, and its objects' names; None where there is none.

        The SuperLink gives a message once. So the node comes anew where the answer was lost, with a message or not.

        Raises:
            httpx.HTTPStatusError: the SuperLink refuses.
        """
        try:
            response = self._client.PullMessages(PullMessagesRequest(node=self._node))
        except LINE_ERRORS as error:
            if self._ended.is_set() or not _may_pass(error):
                raise
            _log.warning("coordinator %s: %s", self._address, reason(error))
            self._ended.wait(_FIRST_PAUSE_S)
            if not isinstance(error, _NEVER_SENT):
                self.come()
            return None
        if not response.messages_list:
            return None
        return message_from_proto(response.messages_list[0]), response.message_object_trees[0]

    def object(self, run_id: int, name: str) -> bytes:
        """An object of a message.

        Raises:
            ObjectUnavailableError: it has not come to the SuperLink yet.
            ObjectPullError: it never will.
            UnsoundMessageError: its bytes are not those that it is named after.
        """
        asks = PullObjectRequest(node=self._node, run_id=run_id, object_id=name)
        response = self._answer(partial(self._client.PullObject, asks))
        if not response.object_found:
            raise ObjectPullError(name, "the object could not be found")
        if not response.object_available:
            raise ObjectUnavailableError(name)
        if get_object_id(response.object_content) != name:
            raise UnsoundMessageError("a piece's bytes are not those that its digest names")
        return response.object_content

    def confirm(self, run_id: int, message_id: str) -> None:
        """Has the SuperLink forget a message's objects; those of a run that has ended it forgets by itself."""
        came = ConfirmMessageReceivedRequest(node=self._node, run_id=run_id, message_object_id=message_id)
        with suppress(httpx.HTTPStatusError):
            self._answer(partial(self._client.ConfirmMessageReceived, came))

    def send(self, reply: Message, seconds: float) -> bool:
        """Sends what the SuperLink lacks of a reply, and says whether it is whole there."""
        with no_object_id_recompute():
            reply.metadata.__dict__["_message_id"] = reply.object_id
            request = PushMessagesRequest(
                node=self._node,
                messages_list=[message_to_proto(remove_content_from_message(reply))],
                message_object_trees=[get_object_tree(reply)],
                clientapp_runtime_list=[seconds],
            )
            response, tries = self._counted(partial(self._client.PushMessages, request))
            push = partial(self._push, reply.metadata.run_id, response.session_id)
            wanted = set(response.objects_to_push)
            objects, many = get_all_nested_objects(reply), at_once(len(wanted))
            push_objects(objects, push, object_ids_to_push=wanted, max_concurrent_pushes=many)
        # A reply's own object is always new. Nothing is wanted where nobody waits for the reply any more, or where it
        # was announced and the answer to that was lost.
        if not wanted and tries > 1:
            self.come()
        return bool(wanted)

    def _push(self, run_id: int, session: str, name: str, content: bytes) -> None:
        request = PushObjectRequest(
            node=self._node, run_id=run_id, session_id=session, object_id=name, object_content=content
        )
        response, tries = self._counted(partial(self._client.PushObject, request))
        # "Not stored" may mean that it was, and that the answer to that was lost.
        if not response.stored and tries == 1:
            raise UnsoundMessageError("the SuperLink takes no more of the reply: it came too late")

    def _counted(self, ask: Callable[[], T]) -> tuple[T, int]:
        """An answer, and how often it was asked for."""
        tries = 0

        def counting() -> T:
            nonlocal tries
            tries += 1
            return ask()

        return self._answer(counting), tries

    def _answer(self, ask: Callable[[], T]) -> T:
        """Asks until there is an answer; a line that was cut, or a SuperLink that is started anew, only delays it."""
        pause_s = _FIRST_PAUSE_S
        while True:
            try:
                return ask()
            except LINE_ERRORS as error:
                if self._ended.is_set() or not _may_pass(error):
                    raise
                _log.warning("coordinator %s: %s; asked again in %g s", self._address, reason(error), pause_s)
            self._ended.wait(pause_s)
            pause_s = min(2 * pause_s, _LONGEST_PAUSE_S)


def at_once(objects: int) -> int:
    """How many objects are on their way together: all of a short message, in one round trip; of pieces, two."""
    return _SHORT if objects <= _SHORT else 2


def _may_pass(error: httpx.HTTPError) -> bool:
    return not isinstance(error, httpx.HTTPStatusError) or error.response.status_code in _PASSES


def reason(error: BaseException) -> str:
    """Why something failed, in one line."""
    said, clock = str(error) or type(error).__name__, ""
    if isinstance(error, httpx.HTTPStatusError):
        told = FlowerError.from_json(error.response.text)
        said = f"{told.message} ({error.response.status_code})" if told else f"HTTP {error.response.status_code}"
        if error.response.status_code == httpx.codes.UNAUTHORIZED:  # Flower's word for a wrong clock, too
            clock = clock_problem(ahead_of(error.response.headers.get("date")))
    return printable(" ".join(said[:_LONGEST_DETAIL].split())) + (f"; {clock}" if clock else "")


def bounded(client: httpx.Client) -> None:
    """Has an answer refused before it is read where it says no length, or one that no message has, or is compressed.

    Flower's client would read whatever comes.
    """

    def check(response: httpx.Response) -> None:
        length = response.headers.get("content-length", "")
        if response.is_success and not (length.isdecimal() and int(length) <= LARGEST_ANSWER_BYTES):
            raise UnsoundMessageError(f"the coordinator answers with no length from 0 to {LARGEST_ANSWER_BYTES}")
        if "content-encoding" in response.headers:
            raise UnsoundMessageError("the coordinator's answer is compressed, which was not asked for")

    client.headers["accept-encoding"] = "identity"
    client.event_hooks = {"response": [check]}
