"""The coordinator's end of the boundary: signed requests to the silos' nodes, and their replies, each checked."""

import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import InitVar, dataclass, field
from typing import Any

from flwr.app import Message

from configs.errors import PolicyRefusal, SiloweaveError
from configs.events import EventLog
from configs.schema.federated import FederatedSettings
from configs.storage.files import digest_bytes
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
from federated.coordinator.schedule.mail import QUERY, Mail
from federated.coordinator.schedule.quorum import Quorum, check_names
from federated.protocol import silo_pb2 as pb
from federated.protocol.clocks import EXPIRES
from federated.protocol.framing import version_of

_CONNECTS_S = 1.0


@dataclass(frozen=True)
class Bodies:
    """Requests to some silos, each made when it is sent: all at once they would hold a copy of the adapter per silo.

    Attributes:
        silos: who is asked.
        make: gives a silo's request, and the part of it that others have in common with it: its adapter, or nothing.
        patience_s: gives the seconds to wait for the replies, also anew while they come; None: each silo's deadline, as
            the settings say.
        reply_bytes: that a reply may have beyond those of its request.
    """

    silos: Sequence[str]
    make: Callable[[str], tuple[bytes, bytes]]
    patience_s: Callable[[], float] | None = None
    reply_bytes: int = 0


@dataclass
class SiloExchange:
    """One run's requests to the silos, and their checked replies.

    Attributes:
        grid: reaches the silos' nodes.
        run: the id under which silos take its requests, and until when.
        parties: the coordinator's key, and who is enrolled.
        settings: the deadline of a step, and how many silos it needs.
        log: receives refusals, rejected replies and time-outs.
        nodes: node of each silo that is there.
        keys: public key of each silo that has ever answered.
        secure: whether the silos are asked for masked updates alone.
        mail: carries requests and replies.
    """

    grid: Nodes
    run: RunTicket
    parties: Parties
    settings: FederatedSettings
    log: EventLog
    receipt_of: InitVar[Callable[[str], bytes]]
    secure: bool = False
    nodes: dict[str, int] = field(default_factory=dict)
    keys: dict[str, str] = field(default_factory=dict)
    mail: Mail = field(init=False)
    _refused: list[PolicyRefusal] = field(default_factory=list)  # when it was last looked who is there

    def __post_init__(self, receipt_of: Callable[[str], bytes]) -> None:
        if self.parties.roster:
            check_names(self.settings, self.parties.roster())
        self.mail = Mail(self.grid, self.parties.signer, self.settings, self.log, receipt_of)

    def wait_for(self, number: int, fewest: int) -> None:
        """Waits until so many have connected, or until the deadline, if those that are there are enough for a round.

        Raises:
            SiloweaveError: they are not.
        """
        deadline = time.monotonic() + self.settings.round_timeout_s
        while (found := len(list(self.grid.get_node_ids()))) < number:
            if time.monotonic() > deadline:
                if found >= fewest:
                    return
                raise SiloweaveError(f"{found} of {number} silos have connected; start the others")
            time.sleep(_CONNECTS_S)

    def wait_for_required(self, meet: Callable[[], None]) -> None:
        """Gives silos that no round may lack the time of a round to connect: the others would work for nothing."""
        seen, deadline = set(self.nodes.values()), time.monotonic() + self.settings.round_timeout_s
        while self.settings.missing(self.nodes) and time.monotonic() < deadline:
            if (there := set(self.grid.get_node_ids())) != seen:
                seen = there
                meet()
            time.sleep(min(_CONNECTS_S, self.settings.round_timeout_s / 10))

    def meet(self, admit: Callable[[str, pb.Described], None], patience_s: Callable[[], float]) -> None:
        """Looks who is there now.

        Args:
            admit: takes what a silo that was not there before tells of itself; a ValueError keeps it out.
            patience_s: gives the seconds to wait for that.
        """
        present, roster = set(self.grid.get_node_ids()), self.parties.roster() if self.parties.roster else None
        unknown = sorted(present - set(self.mail.silo_at))
        body, self._refused = self.body("describe", describe=pb.Describe()), []
        for node, message in self.mail.send(((node, body, body) for node in unknown), QUERY, "describe", patience_s):
            try:
                with sound_or_rejected():
                    reply = self._admitted(message, body, present, roster)
                    admit(reply.silo_id, reply.described)
            except PolicyRefusal as refusal:
                self._refused.append(self._explained(refusal))
                self._emit("rejected", "describe", node, self._refused[-1], rule=refusal.rule)
                continue
            except UnsoundReply as error:
                self._emit("rejected", "describe", node, error)
                continue
            self.mail.silo_at[node], self.keys[reply.silo_id] = reply.silo_id, reply.described.public_key
        enrolled = self.enrolled()
        here = {silo: node for node, silo in self.mail.silo_at.items() if node in present}
        self.nodes = {silo: node for silo, node in here.items() if enrolled.get(silo) == self.keys[silo]}

    def enrolled(self) -> Mapping[str, str]:
        """Public keys of the federation's silos now, by name, whoever is there."""
        return self.parties.roster() if self.parties.roster else self.keys

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
        if any(at in present and name == silo for at, name in self.mail.silo_at.items()):
            raise ValueError(f"silo {silo!r} is behind another node already")
        return reply

    def _content(self, message: Message) -> bytes:
        content = received(message)
        self.mail.bytes_moved += len(content)
        return content

    def body(self, request_id: str, silo: str = "", **kind: Any) -> bytes:
        """A request's bytes. The same step of the same run has the same bytes, so a restart asks nothing new."""
        return pb.Request(
            version=version_of(self.settings.update_dtype, secure=self.secure, compressed=self.settings.compressed),
            run_id=self.run.id,
            silo_id=silo,
            request_id=request_id,
            coordinator=self.parties.signer.public_key,
            expires=self.run.expires,
            study=self.settings.study,
            **kind,
        ).SerializeToString(deterministic=True)

    def collect(
        self,
        bodies: Bodies,
        kind: str,
        group: str,
        expected: str,
        accept: Callable[[Answer], None],
        quorum: Quorum,
    ) -> list[str]:
        """Sends the requests and accepts each sound reply as it comes; the others are recorded and passed over.

        Args:
            bodies: one request per silo; there may be none.
            kind: Flower's message type.
            group: the step, for the events.
            expected: kind of a reply.
            accept: takes a silo's reply; whatever it raises rejects it.
            quorum: which replies the step needs.

        Returns:
            The silos whose replies were accepted.

        Raises:
            PolicyRefusal: too few silos are left, and a policy refused.
            SiloweaveError: too few silos are left, or one that the step needs is not.
        """
        silo_of = {self.nodes[silo]: silo for silo in bodies.silos}
        asked: dict[str, Asked] = {}

        def sent() -> Iterator[tuple[int, bytes, bytes]]:
            for silo in bodies.silos:
                body, shared = bodies.make(silo)
                asked[silo] = Asked.of(body, bodies.reply_bytes)
                yield self.nodes[silo], body, shared

        for node, message in self.mail.send(sent(), kind, group, bodies.patience_s, quorum.over):
            silo = silo_of[node]
            self.take(silo, message, asked[silo], (group, expected), accept, quorum)
        self.require(quorum, len(bodies.silos), group)
        return sorted(quorum.answered)

    def take(
        self,
        silo: str,
        message: Message,
        asked: Asked,
        step: tuple[str, str],
        accept: Callable[[Answer], None],
        quorum: Quorum,
    ) -> bool:
        """Accepts a reply where it is sound, or records why it is not.

        Args:
            silo: who was asked.
            message: what came.
            asked: what it has to fit.
            step: its name for the events, and the kind of reply that it expects.
            accept: takes the reply; whatever it raises rejects it.
            quorum: counts it.

        Returns:
            Whether it was accepted.
        """
        group, expected = step
        try:
            with sound_or_rejected():
                accept(self._answer(silo, message, asked, expected))
        except PolicyRefusal as refusal:
            explained = self._explained(refusal)
            quorum.refusals.append((silo, explained))
            self._emit("refused", group, silo, explained, rule=refusal.rule)
            return False
        except UnsoundReply as error:
            self._emit("rejected", group, silo, error)
            return False
        quorum.answered.append(silo)
        return True

    def require_enrolled(self, silo: str) -> None:
        """Raises a ValueError where a silo is enrolled no longer with the key that it has answered with."""
        if self.parties.roster and self.parties.roster().get(silo) != self.keys[silo]:
            raise ValueError("it is no longer enrolled")

    def require(self, quorum: Quorum, asked: int, group: str) -> None:
        """Ends a step that too few, or not the required silos have answered.

        Args:
            quorum: what it needs and has.
            asked: how many were asked.
            group: its name.

        Raises:
            PolicyRefusal: a policy refused.
            SiloweaveError: none did.
        """
        left, missing = len(set(quorum.answered)) + quorum.already, quorum.missing(quorum.answered)
        if left >= quorum.fewest and not missing:
            return
        message = f"step {group}: {left} of {asked + quorum.already} silos answered, "
        if missing:
            message += f"without {', '.join(missing)}, and federated.required_silos names them: the step does not count"
        else:
            message += f"{quorum.rule} {quorum.fewest}"
        quorum.unmet = message
        if refusals := [*quorum.refusals, *(("", refusal) for refusal in self._refused)]:
            silo, first = min(refusals, key=lambda one: one[0] not in missing)  # of a silo that is missing, if one is
            told = f"{message}; {f'{silo} refuses: ' if silo else ''}{first}"
            quorum.unmet = told
            raise PolicyRefusal(told, rule=first.rule, asked=first.asked, allowed=first.allowed)
        raise SiloweaveError(f"{message}; see {self.log.path} and the silos' own logs, then run the same command again")

    def _explained(self, refusal: PolicyRefusal) -> PolicyRefusal:
        """A refusal with what the silo can't know: what the coordinator's own clock says, or which setting asks so."""
        message = str(refusal)
        if refusal.rule == EXPIRES:
            message += f"; {self.run.clocks()}: have the clock that is wrong set; if the time is up, {RENEW} helps"
        if refusal.rule == "version" and self.secure:
            message += "; federated.secure_aggregation is true: have the silo upgraded, or leave it out"
        elif refusal.rule == "version" and self.settings.compressed:
            message += "; federated.update_block or update_share is set: have the silo upgraded, or leave them out"
        elif refusal.rule == "version" and (dtype := self.settings.update_dtype) != "float32":
            message += f"; federated.update_dtype is {dtype!r}: have the silo upgraded, or leave it at 'float32'"
        return PolicyRefusal(message, rule=refusal.rule, asked=refusal.asked, allowed=refusal.allowed)

    def _answer(self, silo: str, message: Message, asked: Asked, expected: str) -> Answer:
        envelope, reply = opened(self._content(message), asked)
        if reply.silo_id != silo:
            raise ValueError("the reply is not to this request")
        require_signed(envelope, self.keys[silo])
        require_kind(reply, expected)
        return Answer(silo, reply, digest_bytes(envelope.body), envelope.body)

    def _emit(self, event: str, group: str, whose_reply: str | int, error: Exception, **values: str) -> None:
        """Why a reply is not used, in one line: whose it is, what is wrong with it, what happens next."""
        who = "node" if isinstance(whose_reply, int) else "silo"
        whose = "" if isinstance(error, PolicyRefusal) else f"{who} {whose_reply}: "
        self.log.emit(
            "federate",
            event,
            **{who: whose_reply},
            step=group,
            message=f"{whose}{error}; step {group} goes on",
            **values,
        )
