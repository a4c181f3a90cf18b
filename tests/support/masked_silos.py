"""Silos of a made-up federation that send their updates under masks, by the code that real ones use."""

import numpy as np
from flwr.app import Error, Message
from signed_silos import InProcess, SignedSilo, adapter

from configs.errors import PolicyRefusal
from configs.schema.silo import SiloPolicy
from federated.aggregation.secure_sum import length_of, vector
from federated.silo.masking.masking import Masking
from federated.silo.masking.terms import agreed, check_roster, check_secure, shared_noise
from federated.silo.requests import refusal_message
from federated.transport.flower_messages import unpack


class MaskedSilo(SignedSilo):
    """One silo. ``roster`` is what its steward has confirmed; ``gone`` the kinds and phases that it does not answer."""

    def __init__(self, name, change=None, value=0.5):
        super().__init__(name, change, value)
        self.masking, self.stored, self.roster = Masking(name, self.signer), {}, {}
        self.gone, self.asked, self.trained = set(), [], []
        self.policy = SiloPolicy(budget_epsilon=8, budget_delta=1e-5, honest_silos=3)

    def update(self):
        return {name: np.full_like(array, self.value) for name, array in adapter().items()}

    def answer(self, request, reply):
        try:
            self.masked(request, reply)
        except PolicyRefusal as refusal:
            reply.refusal.CopyFrom(refusal_message(refusal))

    def masked(self, request, reply):
        kind = request.WhichOneof("kind")
        step = kind if kind != "aggregate" else f"phase {request.aggregate.phase}"
        self.asked.append((step, reply.request_digest))
        if step in self.gone:
            raise ConnectionError("no answer")
        if kind == "aggregate":
            reply.aggregated.message = self.masking.of(request).answer(request.aggregate, reply.request_digest)
            return
        super().answer(request, reply)
        if kind == "reserve":
            check_secure(self.plan, self.policy)
            check_roster(self.plan, request.reserve.secure.roster, lambda: self.roster)
        if kind == "train":
            self.train(request, reply)

    def train(self, request, reply):
        known, asked = agreed(request, self.plan, lambda: self.roster, length_of(adapter())), reply.request_digest
        if self.stored.setdefault(request.train.round, (asked, None))[0] != asked:
            raise PolicyRefusal.of("request_id", asked, "the request that was charged")
        if self.stored[request.train.round][1] is None:
            release = (request.run_id, request.request_id, asked, request.train.round, "", request.coordinator)
            noise, part = shared_noise(self.plan, known, length_of(adapter())), self.update()
            if noise is not None:  # then it is a sum of gradients
                draws = np.random.default_rng([*self.name.encode(), request.train.round])
                part = noise.encode(vector(part, np.inf), draws)
            opened = self.masking.begun(known, part, self.plan.digest, release)
            self.masking.keep(request, opened)
            reply.trained.ClearField("update")
            reply.trained.keys = opened.keys
            self.stored[request.train.round] = asked, reply.SerializeToString()
            self.trained.append(request.train.round)
        reply.ParseFromString(self.stored[request.train.round][1])

    def restart(self):
        """The process is another one; what lies on disk is there."""
        self.masking = Masking(self.name, self.signer)


class MaskedGrid(InProcess):
    """A grid of them; a silo that does not answer is a node whose reply is an error of Flower's."""

    def __init__(self, silos):
        super().__init__(silos)
        roster = {silo.name: silo.signer.public_key for silo in silos}
        for silo in silos:
            silo.roster = silo.roster or dict(roster)

    def pull_messages(self, message_ids):
        asked = [self._asked.pop(one) for one in list(message_ids) if one in self._asked]
        replies = []
        for message in asked:
            try:
                content = self.silos[message.metadata.dst_node_id].handle(unpack(message.content))
            except ConnectionError as error:
                replies.append(Message(Error(1, str(error)), reply_to=message))
            else:
                replies.append(self.message_of(content, message))
        return replies
