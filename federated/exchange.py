"""The coordinator's end of the boundary: signed requests to the silos' nodes, and their replies, each checked."""

import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from flwr.app import Message
from flwr.serverapp import Grid

from configs.artifacts import digest_bytes
from configs.errors import PolicyRefusal, SiloweaveError
from configs.events import EventLog
from configs.federated_settings import FederatedSettings
from federated import silo_pb2 as pb
from federated.bounds import excess
from federated.client_app import pack, unpack
from federated.envelope import reply_holds, seal_request
from federated.protocol import PROTOCOL_VERSION
from federated.runs import Run
from privacy.ledger import Ledger
from privacy.signing import Signer

POLL_S = 0.05
TRAIN, QUERY = "train", "query"
Roster = Callable[[], Mapping[str, str]]


@dataclass(frozen=True)
class Parties:
    """Who takes part in a federation.

    Attributes:
        signer: the coordinator's key.
        num_silos: silos to wait for at the start.
        roster: gives the enrolled silos' public keys by name, read anew each round; None takes whoever answers, which
            is for simulations.
        open_ledger: opens the coordinator's ledger, which a run with clients as units needs.
    """

    signer: Signer
    num_silos: int
    roster: Roster | None = None
    open_ledger: Callable[[], Ledger] | None = None


@dataclass(frozen=True)
class Bodies:
    """A request to each of some silos, made when it is sent: all at once would hold the adapter once a silo.

    Attributes:
        silos: who is asked.
        make: gives a silo's request, and the part of it that others have in common with it: its adapter, or nothing.
    """

    silos: Sequence[str]
    make: Callable[[str], tuple[bytes, bytes]]


@dataclass
class Exchange:
    """Messages of one run.

    Attributes:
        grid: reaches the silos' nodes.
        run: under which id, and until when, silos take its requests.
        parties: the coordinator's key, and who is enrolled.
        settings: deadline, and how many silos a step needs.
        log: receives refusals, rejected replies and time-outs.
        receipt_of: gives the last signed receipt of a silo; nothing where there is none.
        nodes: node of each silo that is there.
        keys: public key of each silo that has ever answered.
        bytes_moved: requests and replies, since it was set to zero.
    """

    grid: Grid
    run: Run
    parties: Parties
    settings: FederatedSettings
    log: EventLog
    receipt_of: Callable[[str], bytes]
    nodes: dict[str, int] = field(default_factory=dict)
    keys: dict[str, str] = field(default_factory=dict)
    bytes_moved: int = 0
    _silo_at: dict[int, str] = field(default_factory=dict)

    def meet(self) -> list[tuple[str, pb.Described]]:
        """Looks who is there now. Returns the silos that were not known before, with what they tell of themselves."""
        present, roster = set(self.grid.get_node_ids()), self.parties.roster() if self.parties.roster else None
        unknown = sorted(present - set(self._silo_at))
        body = self.body("describe", describe=pb.Describe())
        met: list[tuple[str, pb.Described]] = []
        for node, envelope, reply in self._send(((node, body, body) for node in unknown), QUERY, "describe"):
            try:
                self._admit(reply, envelope, present, roster)
            except ValueError as error:
                self.log.emit("federate", "rejected", node=node, step="describe", message=str(error))
                continue
            silo = reply.silo_id
            if silo not in self.keys:
                met.append((silo, reply.described))
            self._silo_at[node], self.keys[silo] = silo, reply.described.public_key
        enrolled = self.parties.roster() if self.parties.roster else self.keys
        here = {silo: node for node, silo in self._silo_at.items() if node in present}
        self.nodes = {silo: node for silo, node in here.items() if enrolled.get(silo) == self.keys[silo]}
        return met

    def _admit(
        self, reply: pb.Reply, envelope: pb.Envelope, present: set[int], roster: Mapping[str, str] | None
    ) -> None:
        """Raises a ValueError where a node is not behind an enrolled silo, or another node is already."""
        if reply.WhichOneof("kind") != "described":
            raise ValueError(reply.refusal.message or f"the reply is {reply.WhichOneof('kind')}")
        silo, key = reply.silo_id, reply.described.public_key
        if not reply_holds(envelope, key):
            raise ValueError("its reply is not signed with the key that it gives")
        if roster is not None and roster.get(silo) != key:
            raise ValueError(f"silo {silo!r} is not enrolled with this key: `siloweave federation enrol` it")
        if self.keys.get(silo, key) != key:
            raise ValueError(f"silo {silo!r} has answered with another key before")
        if any(at in present and name == silo for at, name in self._silo_at.items()):
            raise ValueError(f"silo {silo!r} is behind another node already")

    def body(self, request_id: str, silo: str = "", **kind: Any) -> bytes:
        """A request's bytes. The same step of the same run has the same bytes, so a restart asks nothing new."""
        return pb.Request(
            version=PROTOCOL_VERSION,
            run_id=self.run.id,
            silo_id=silo,
            request_id=request_id,
            coordinator=self.parties.signer.public_key,
            expires=self.run.expires,
            **kind,
        ).SerializeToString(deterministic=True)

    def collect(
        self,
        bodies: Bodies,
        kind: str,
        group: str,
        accept: Callable[[str, pb.Reply], None],
        already: int = 0,
        enough: int = 0,
    ) -> list[str]:
        """Sends the requests and accepts each sound reply as it comes; the others are recorded and passed over.

        Args:
            bodies: a request a silo; none is also fine.
            kind: Flower's message type.
            group: the step, for the events.
            accept: takes a silo's reply; a ValueError rejects it.
            already: silos that need not be asked and count as having answered.
            enough: replies after which the others are not waited for; 0: all.

        Raises:
            PolicyRefusal: too few silos are left, and a policy refused.
            SiloweaveError: too few silos are left.
        """
        silo_of = {self.nodes[silo]: silo for silo in bodies.silos}
        digests: dict[str, str] = {}
        answered: list[str] = []
        refusals: list[PolicyRefusal] = []

        def sent() -> Iterator[tuple[int, bytes, bytes]]:
            for silo in bodies.silos:
                body, shared = bodies.make(silo)
                digests[silo] = digest_bytes(body)
                yield self.nodes[silo], body, shared

        for node, envelope, reply in self._send(sent(), kind, group):
            silo = silo_of[node]
            try:
                self._check(silo, envelope, reply, digests[silo])
                accept(silo, reply)
                answered.append(silo)
            except PolicyRefusal as refusal:
                refusals.append(refusal)
                self.log.emit("federate", "refused", silo=silo, step=group, rule=refusal.rule, message=str(refusal))
            except ValueError as error:
                self.log.emit("federate", "rejected", silo=silo, step=group, message=str(error))
            if 0 < enough <= len(answered):
                break
        self._require(len(answered) + already, len(bodies.silos) + already, group, refusals)
        return sorted(answered)

    def _require(self, answered: int, asked: int, group: str, refusals: list[PolicyRefusal]) -> None:
        fewest = self.settings.min_silos
        if answered >= fewest:
            return
        message = f"step {group}: {answered} of {asked} silos answered, federated.min_silos is {fewest}"
        if refusals:
            first = refusals[0]
            raise PolicyRefusal(f"{message}; {first}", rule=first.rule, asked=first.asked, allowed=first.allowed)
        raise SiloweaveError(f"{message}; see {self.log.path} and the silos' own logs, then run the same command again")

    def _check(self, silo: str, envelope: pb.Envelope, reply: pb.Reply, request_digest: str) -> None:
        kind = reply.WhichOneof("kind")
        if reply.silo_id != silo or reply.request_digest != request_digest:
            raise ValueError("the reply is not to this request")
        if not reply_holds(envelope, self.keys[silo]):
            raise ValueError("the reply is not signed by the silo")
        if kind == "refusal":
            refusal = reply.refusal
            message = f"silo {silo} refuses: {refusal.message}"
            raise PolicyRefusal(message, rule=refusal.rule, asked=refusal.asked, allowed=refusal.allowed)
        if kind in (None, "failure", "described"):
            raise ValueError(f"the reply is {kind}: {reply.failure.code}")

    def _send(
        self, bodies: Iterable[tuple[int, bytes, bytes]], kind: str, group: str
    ) -> Iterator[tuple[int, pb.Envelope, pb.Reply]]:
        """Sends (node, body, its shared part) and yields what comes back as it comes, until all have or time is up."""
        timeout_s = self.settings.round_timeout_s
        messages = []
        for node, body, shared in bodies:
            envelope = seal_request(self.parties.signer, body, self.receipt_of(self._silo_at.get(node, "")))
            self.bytes_moved += len(envelope)
            # A node that is away must not find the message when it is back: its round is over by then.
            messages.append(Message(pack(envelope, shared), node, kind, group_id=group, ttl=timeout_s))
        if not messages:
            return
        waiting = set(self.grid.push_messages(messages))
        deadline = time.monotonic() + timeout_s
        while waiting and time.monotonic() < deadline:
            came = list(self.grid.pull_messages(waiting))
            for message in came:
                waiting.discard(message.metadata.reply_to_message_id)
                found = self._parse(message, group)
                if found is not None:
                    yield message.metadata.src_node_id, *found
            if waiting and not came:
                time.sleep(POLL_S)
        if waiting:
            self.log.emit("federate", "timeout", step=group, missing=len(waiting))

    def _parse(self, message: Message, group: str) -> tuple[pb.Envelope, pb.Reply] | None:
        envelope, reply = pb.Envelope(), pb.Reply()
        try:
            if message.has_error():
                raise ValueError(f"Flower reports {message.error.code}: {message.error.reason}")
            content = unpack(message.content)
            self.bytes_moved += len(content)
            envelope.ParseFromString(content)
            reply.ParseFromString(envelope.body)
            if found := excess(envelope) or excess(reply):
                raise ValueError("the reply's {} has {}, allowed {}".format(*found))
        except Exception as error:  # protobuf's DecodeError lives in an untyped module
            node = message.metadata.src_node_id
            self.log.emit("federate", "rejected", node=node, step=group, message=str(error)[:500])
            return None
        return envelope, reply
