"""Silos and a server of one secure sum, in one process."""

from dataclasses import dataclass, field

import numpy as np

from privacy.secagg.agreement import Agreement, least_survivors
from privacy.secagg.client import Client
from privacy.secagg.encoding import Encoding
from privacy.secagg.messages import Phase
from privacy.secagg.server import Server
from privacy.signing import Signer


def signers(folder, count):
    return {f"silo-{number:02}": Signer(folder / f"{number}.key") for number in range(count)}


def agreement_of(keys, *, colluders=0, min_survivors=None, length=50, context=b"round 1", encoding=None):
    return Agreement(
        roster={name: signer.public_key for name, signer in keys.items()},
        colluders=colluders,
        min_survivors=min_survivors or least_survivors(len(keys), colluders),
        encoding=encoding or Encoding(1.0, len(keys)),
        length=length,
        context=context,
    )


@dataclass
class SecureSum:
    """Runs the phases; who is in ``gone[phase]`` sends nothing from that phase on."""

    agreement: Agreement
    clients: dict[str, Client]
    words: dict[str, np.ndarray]
    gone: dict[Phase, set[str]] = field(default_factory=dict)

    def __post_init__(self):
        self.server = Server(self.agreement)
        self.inbox = dict.fromkeys(self.clients, b"")
        self.sent = {phase: {} for phase in Phase}

    @classmethod
    def of(cls, keys, agreement, gone=None, seed=0):
        drawn = np.random.default_rng(seed)
        words = {name: agreement.encoding.encode(drawn.uniform(-1, 1, agreement.length)) for name in keys}
        return cls(agreement, {name: Client(name, keys[name], agreement) for name in keys}, words, gone or {})

    def say(self, name, phase):
        """A silo's message of a phase, of what the server has last sent to it."""
        client, mail = self.clients[name], self.inbox[name]
        match phase:
            case Phase.KEYS:
                return client.advertise()
            case Phase.SHARES:
                return client.share(mail)
            case Phase.MASKED:
                return client.mask(mail, self.words[name])
            case Phase.SURVIVORS:
                return client.agree(mail)
        return client.reveal(mail)

    def collect(self, phase):
        for name in sorted(set(self.inbox) - self.gone.get(phase, set())):
            self.sent[phase][name] = self.say(name, phase)
            self.server.receive(self.sent[phase][name])

    def until(self, last):
        """All phases up to and including one, and the server's answer to it."""
        for phase in Phase:
            if phase <= last:
                self.collect(phase)
                self.inbox = self.server.advance()
        return self

    def total(self):
        return self.until(Phase.REVEALED).server.total()

    def expected(self, names):
        """The sum by Python's own integers."""
        bits = self.agreement.encoding.word_bits
        columns = zip(*(self.words[name].tolist() for name in names), strict=True)
        return [sum(column) % 2**bits for column in columns]
