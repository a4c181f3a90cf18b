"""The coordinator's end of the boundary: signed requests to the silos' nodes, and their replies, each checked."""

import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import zip_longest
from typing import Any, NoReturn

from flwr.app import Message

from configs.errors import PolicyRefusal, SiloweaveError
from configs.events import EventLog
from configs.schema.federated import FederatedSettings
from configs.schema.stages import frozen_below
from configs.schema.tasks import TaskSpec
from configs.storage.files import digest_bytes
from federated.adapters.arrays import to_bytes
from federated.adapters.warm_model import adaptation
from federated.aggregation.aggregation import Sent
from federated.coordinator.flower_grid import Nodes
from federated.coordinator.parties import Parties
from federated.coordinator.replies import (
    Answer,
    Asked,
    UnsoundReply,
    opened,
    received,
    require_description,
    require_kind,
    require_signed,
    sound_or_rejected,
)
from federated.coordinator.run_ticket import RENEW, RunTicket
from federated.protocol import silo_pb2 as pb
from federated.protocol.clocks import EXPIRES
from federated.protocol.envelope import seal_request
from federated.protocol.framing import PROTOCOL_VERSION, ROUNDED_VERSION
from federated.transport.flower_messages import pack, takes_pieces

POLL_S, LONGEST_POLL_S = 0.05, 1.0
TRAIN, QUERY = "train", "query"


@dataclass(frozen=True)
class Bodies:
    """Requests to some silos, each made when it is sent: all at once they would hold a copy of the adapter per silo.

    Attributes:
        silos: who is asked.
        make: gives a silo's request, and the part of it that others have in common with it: its adapter, or nothing.
        patience_s: gives the seconds to wait for the replies, also anew while they come; None: as the settings say.
    """

    silos: Sequence[str]
    make: Callable[[str], tuple[bytes, bytes]]
    patience_s: Callable[[], float] | None = None


def adapter_spec(settings: FederatedSettings, rank: int, alpha: float, **frozen: Any) -> pb.AdapterSpec:
    """What of the model a request asks to train. What is left empty says what requests of before have meant."""
    how = adaptation(settings)
    train = "" if how.train == "lora" else how.train
    dtype = "" if how.base_dtype == "float32" else how.base_dtype
    return pb.AdapterSpec(rank=rank, alpha=alpha, train=train, targets=how.targets, base_dtype=dtype, **frozen)


def task_spec(spec: TaskSpec) -> pb.TaskSpec:
    """What a request says of its task beside the name."""
    pooling = "" if spec.pooling == "model" else spec.pooling
    return pb.TaskSpec(labels=spec.labels, template=spec.template, pooling=pooling)


def training(settings: FederatedSettings, round_number: int, sent: Sent, **frozen: Any) -> dict[str, Any]:
    """What a request says of how a round trains, beside the adapter itself.

    Of what requests of before had no field for it says nothing where there is nothing to say.
    """
    of_round, stage, changed = settings.in_round(round_number), settings.stage_of(round_number), settings.augmentation
    return {
        "round": round_number,
        "adapter_spec": adapter_spec(settings, sent.rank, sent.alpha, **frozen),
        "learning_rate": of_round.learning_rate,
        "optimizer": settings.optimizer,
        "proximal_mu": settings.pull,
        "correction": to_bytes(sent.correction) if sent.correction else b"",
        "augmentation": pb.Augmentation(**changed.model_dump()) if changed.largest else None,
        "frozen_below": frozen_below(stage.frozen),
        "frozen": to_bytes(sent.frozen) if sent.frozen else b"",
        "context_length": stage.context_length or 0,
        "update_dtype": "" if settings.update_dtype == "float32" else settings.update_dtype,
    }


@dataclass
class SiloExchange:
    """One run's requests to the silos, and their checked replies.

    Attributes:
        grid: reaches the silos' nodes.
        run: the id under which silos take its requests, and until when.
        parties: the coordinator's key, and who is enrolled.
        settings: the deadline of a step, and how many silos it needs.
        log: receives refusals, rejected replies and time-outs.
        receipt_of: gives the last signed receipt of a silo; nothing where there is none.
        nodes: node of each silo that is there.
        keys: public key of each silo that has ever answered.
        bytes_moved: bytes of requests and replies since it was set to zero.
    """

    grid: Nodes
    run: RunTicket
    parties: Parties
    settings: FederatedSettings
    log: EventLog
    receipt_of: Callable[[str], bytes]
    nodes: dict[str, int] = field(default_factory=dict)
    keys: dict[str, str] = field(default_factory=dict)
    bytes_moved: int = 0
    _silo_at: dict[int, str] = field(default_factory=dict)
    _in_pieces: set[int] = field(default_factory=set)  # nodes that read them
    _refused: list[PolicyRefusal] = field(default_factory=list)  # when it was last looked who is there

    def meet(self, admit: Callable[[str, pb.Described], None], patience_s: Callable[[], float]) -> None:
        """Looks who is there now.

        Args:
            admit: takes what a silo that was not there before tells of itself; a ValueError keeps it out.
            patience_s: gives the seconds to wait for that.
        """
        present, roster = set(self.grid.get_node_ids()), self.parties.roster() if self.parties.roster else None
        unknown = sorted(present - set(self._silo_at))
        body, self._refused = self.body("describe", describe=pb.Describe()), []
        for node, message in self._send(((node, body, body) for node in unknown), QUERY, "describe", patience_s):
            try:
                with sound_or_rejected():
                    reply = self._admitted(message, body, present, roster)
                    admit(reply.silo_id, reply.described)
            except PolicyRefusal as refusal:
                self._refused.append(self._explained(refusal))
                self._emit("rejected", "describe", node, self._refused[-1])
                continue
            except UnsoundReply as error:
                self._emit("rejected", "describe", node, error)
                continue
            self._silo_at[node], self.keys[reply.silo_id] = reply.silo_id, reply.described.public_key
        enrolled = self.parties.roster() if self.parties.roster else self.keys
        here = {silo: node for node, silo in self._silo_at.items() if node in present}
        self.nodes = {silo: node for silo, node in here.items() if enrolled.get(silo) == self.keys[silo]}

    def _admitted(self, message: Message, body: bytes, present: set[int], roster: Mapping[str, str] | None) -> pb.Reply:
        """Raises a ValueError where a node is not behind an enrolled silo, or another node is already."""
        envelope, reply = opened(self._content(message), Asked.of(body))
        if roster is not None and reply.HasField("refusal"):  # it may become the run's own error: no stranger's word
            require_signed(envelope, roster.get(reply.silo_id, ""))
        require_kind(reply, "described")
        require_description(reply)
        silo, key = reply.silo_id, reply.described.public_key
        require_signed(envelope, key)
        if roster is not None and roster.get(silo) != key:
            raise ValueError(f"silo {silo!r} is not enrolled with this key: `siloweave federation enrol` it")
        if self.keys.get(silo, key) != key:
            raise ValueError(f"silo {silo!r} has answered with another key before")
        if any(at in present and name == silo for at, name in self._silo_at.items()):
            raise ValueError(f"silo {silo!r} is behind another node already")
        return reply

    def _content(self, message: Message) -> bytes:
        content = received(message)
        self.bytes_moved += len(content)
        return content

    def body(self, request_id: str, silo: str = "", **kind: Any) -> bytes:
        """A request's bytes. The same step of the same run has the same bytes, so a restart asks nothing new."""
        return pb.Request(
            version=PROTOCOL_VERSION if self.settings.update_dtype == "float32" else ROUNDED_VERSION,
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
        expected: str,
        accept: Callable[[Answer], None],
        already: int = 0,
        enough: int = 0,
        fewest: int | None = None,
    ) -> list[str]:
        """Sends the requests and accepts each sound reply as it comes; the others are recorded and passed over.

        Args:
            bodies: one request per silo; there may be none.
            kind: Flower's message type.
            group: the step, for the events.
            expected: kind of a reply.
            accept: takes a silo's reply; whatever it raises rejects it.
            already: silos that need not be asked and count as having answered.
            enough: replies after which the others are not waited for; 0: all.
            fewest: silos that have to be left; None: as many as the settings say.

        Returns:
            The silos whose replies were accepted.

        Raises:
            PolicyRefusal: too few silos are left, and a policy refused.
            SiloweaveError: too few silos are left.
        """
        silo_of = {self.nodes[silo]: silo for silo in bodies.silos}
        asked: dict[str, Asked] = {}
        answered: list[str] = []
        refusals: list[PolicyRefusal] = []

        def sent() -> Iterator[tuple[int, bytes, bytes]]:
            for silo in bodies.silos:
                body, shared = bodies.make(silo)
                asked[silo] = Asked.of(body)
                yield self.nodes[silo], body, shared

        for node, message in self._send(sent(), kind, group, bodies.patience_s):
            silo = silo_of[node]
            try:
                with sound_or_rejected():
                    accept(self._answer(silo, message, asked[silo], expected))
                answered.append(silo)
            except PolicyRefusal as refusal:
                refusals.append(self._explained(refusal))
                self._emit("refused", group, node, refusals[-1], rule=refusal.rule)
            except UnsoundReply as error:
                self._emit("rejected", group, node, error)
            if 0 < enough <= len(answered):
                break
        least = self.settings.min_silos if fewest is None else fewest
        if len(answered) + already < least:
            found = len(answered) + already, len(bodies.silos) + already
            self._too_few(*found, least, group, [*refusals, *self._refused])
        return sorted(answered)

    def _explained(self, refusal: PolicyRefusal) -> PolicyRefusal:
        """A refusal with what the silo can't know: what the coordinator's own clock says, or which setting asks so."""
        message = str(refusal)
        if refusal.rule == EXPIRES:
            message += f"; {self.run.clocks()}: have the clock that is wrong set; if the time is up, {RENEW} helps"
        if refusal.rule == "version" and (dtype := self.settings.update_dtype) != "float32":
            message += f"; federated.update_dtype is {dtype!r}: have the silo upgraded, or leave it at 'float32'"
        return PolicyRefusal(message, rule=refusal.rule, asked=refusal.asked, allowed=refusal.allowed)

    def _too_few(self, left: int, asked: int, least: int, group: str, refusals: list[PolicyRefusal]) -> NoReturn:
        message = f"step {group}: {left} of {asked} silos answered, federated.min_silos is {least}"
        if refusals:
            first = refusals[0]
            raise PolicyRefusal(f"{message}; {first}", rule=first.rule, asked=first.asked, allowed=first.allowed)
        raise SiloweaveError(f"{message}; see {self.log.path} and the silos' own logs, then run the same command again")

    def _answer(self, silo: str, message: Message, asked: Asked, expected: str) -> Answer:
        envelope, reply = opened(self._content(message), asked)
        if reply.silo_id != silo:
            raise ValueError("the reply is not to this request")
        require_signed(envelope, self.keys[silo])
        require_kind(reply, expected)
        return Answer(silo, reply, digest_bytes(envelope.body))

    def _send(
        self,
        bodies: Iterable[tuple[int, bytes, bytes]],
        kind: str,
        group: str,
        patience_s: Callable[[], float] | None,
    ) -> Iterator[tuple[int, Message]]:
        """Sends (node, body, its shared part) and yields what comes back as it comes, until all have or time is up."""
        patience_s = patience_s or (lambda: self.settings.round_timeout_s)
        timeout_s = patience_s()
        messages = []
        for node, body, shared in bodies:
            envelope = seal_request(self.parties.signer, body, self.receipt_of(self._silo_at.get(node, "")))
            self.bytes_moved += len(envelope)
            # A node that is away must not find the message when it is back: its round is over by then.
            content = pack(envelope, shared, in_pieces=node in self._in_pieces)
            messages.append(Message(content, node, kind, group_id=group, ttl=timeout_s))
        # The silo is known by the message that is answered: what a reply says of its sender is the sender's own word.
        sent = zip_longest(self.grid.push_messages(messages) if messages else (), messages)
        waiting = {name or f"unsent {at}": message.metadata.dst_node_id for at, (name, message) in enumerate(sent)}
        del messages
        began = time.monotonic()
        while waiting and (waited_s := time.monotonic() - began) < patience_s():
            came = False
            for message in self.grid.pull_messages(list(waiting)):
                came = True
                if message.metadata.reply_to_message_id in waiting:
                    node = waiting.pop(message.metadata.reply_to_message_id)
                    if message.has_content() and takes_pieces(message.content):
                        self._in_pieces.add(node)
                    yield node, message
            if waiting and not came:
                time.sleep(min(max(POLL_S, POLL_S * waited_s), LONGEST_POLL_S))
        if waiting:
            self._timed_out(group, sorted(waiting.values()), patience_s())

    def _timed_out(self, group: str, nodes: list[int], timeout_s: float) -> None:
        silent = [self._silo_at.get(node, f"node {node}") for node in nodes]
        message = f"no answer from {', '.join(silent)} in {timeout_s:g} s; the run goes on, and asks again later"
        self.log.emit("federate", "timeout", step=group, missing=len(silent), silos=silent, message=message)

    def _emit(self, event: str, group: str, node: int, error: Exception, **values: str) -> None:
        """Why a reply is not used, in one line: whose it is, what is wrong with it, what happens next."""
        silo = self._silo_at.get(node)
        who: dict[str, Any] = {"node": node} if silo is None else {"silo": silo}
        whose = "" if isinstance(error, PolicyRefusal) else f"node {node}: " if silo is None else f"silo {silo}: "
        self.log.emit("federate", event, **who, step=group, message=f"{whose}{error}; step {group} goes on", **values)
