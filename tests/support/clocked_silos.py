"""Silos that take their time by a clock which a test turns, and that keep what they have answered, as a ledger does."""

from types import SimpleNamespace

import numpy as np
from signed_silos import InProcess, SignedSilo

from configs.storage.files import digest_bytes
from federated.adapters.arrays import from_bytes, to_bytes
from federated.coordinator.schedule import mail, quorum
from federated.protocol import silo_pb2 as pb


class KeepingSilo(SignedSilo):
    """Trains once for a round: the same request again gets the same bytes, another one for that round is refused.

    What it releases depends on every byte of its request, so that another model, or another order, shows.
    """

    def __init__(self, name, change=None, value=0.5):
        super().__init__(name, change, value)
        self.kept, self.asked = {}, []

    def handle(self, content):
        request = pb.Request.FromString(pb.Envelope.FromString(content).body)
        if not request.HasField("train"):
            return super().handle(content)
        digest = digest_bytes(pb.Envelope.FromString(content).body)
        self.asked.append((request.train.round, digest))
        held = self.kept.get(request.train.round)
        if held is None:
            held = self.kept[request.train.round] = digest, super().handle(content)
        return held[1] if held[0] == digest else self.refusal(content)

    def refusal(self, content):
        self.change, change = lambda _, reply, __: _refused(reply), self.change
        try:
            return super().handle(content)
        finally:
            self.change = change

    def answer(self, request, reply):
        super().answer(request, reply)
        if not request.HasField("train"):
            return
        self.charged = len(self.kept) + 1
        draws = np.random.default_rng(int(reply.request_digest[:15], 16))
        shared = from_bytes(request.train.adapter)
        reply.trained.update = to_bytes(
            {
                name: (0.1 * (self.value - array) + draws.normal(0, 0.01, array.shape)).astype(np.float32)
                for name, array in shared.items()
            }
        )

    def released(self, round_number):
        """What a round has released: the arrays, and the digest of the whole reply."""
        body = pb.Envelope.FromString(self.kept[round_number][1]).body
        return from_bytes(pb.Reply.FromString(body).trained.update), digest_bytes(body)


def _refused(reply):
    refusal = pb.Refusal(rule="request_id", asked="another", allowed="the first", message="this round was another one")
    reply.refusal.CopyFrom(refusal)
    return reply


class ClockedGrid(InProcess):
    """A grid whose silos train for so many ticks each, one request after the other. Asking in vain is a tick."""

    def __init__(self, silos, ticks):
        super().__init__(silos)
        self.ticks, self.now, self.away = dict(zip(self.silos, ticks, strict=True)), 0, set()
        self._ready, self._free_at = {}, dict.fromkeys(self.silos, 0)

    def get_node_ids(self):
        return [node for node, silo in self.silos.items() if silo.name not in self.away]

    def push_messages(self, messages):
        messages = list(messages)
        ids = super().push_messages(messages)
        for name, message in zip(ids, messages, strict=True):
            node = message.metadata.dst_node_id
            if message.metadata.message_type == mail.TRAIN:
                self._free_at[node] = max(self._free_at[node], self.now) + self.ticks[node]
                self._ready[name] = self._free_at[node]
        return ids

    def pull_messages(self, message_ids):
        there = [one for one in message_ids if one in self._asked and self._ready.get(one, 0) <= self.now]
        if not there:
            self.now += 1
        return super().pull_messages(sorted(there, key=lambda one: (self._ready.get(one, 0), int(one))))


def turn_by(grid, monkeypatch):
    """Has the coordinator's own clock show the grid's ticks."""
    clock = SimpleNamespace(monotonic=lambda: float(grid.now), sleep=lambda _: None)
    monkeypatch.setattr(mail, "time", clock)
    monkeypatch.setattr(quorum, "time", clock)
