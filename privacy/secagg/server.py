"""The server's side of one secure sum: takes the silos' messages of a phase, then answers those that sent one.

It adds vectors as they come, so its memory does not grow with the silos. Nothing that it does is trusted by a silo.
"""

from collections import defaultdict

import numpy as np
from cryptography.hazmat.primitives.asymmetric.x25519 import X25519PrivateKey

from privacy.secagg import sharing
from privacy.secagg.agreement import Agreement
from privacy.secagg.encoding import Words
from privacy.secagg.failures import (
    EarlyMessage,
    ForgedMessage,
    InconsistentView,
    MalformedMessage,
    RepeatedMessage,
    TooFewSilos,
    UnknownSilo,
)
from privacy.secagg.masks import KEY_BYTES, apply_mask, commitment, pair_key, self_key
from privacy.secagg.messages import Phase, open_silo_message, pack, server_message, text, unpack
from privacy.secagg.view import AdvertisedKeys, View


class Server:
    """One secure sum. ``receive`` what silos send, ``advance`` when enough or all have, five times; then ``total``."""

    def __init__(self, agreement: Agreement) -> None:
        self._agreement = agreement
        self._phase = Phase.KEYS
        self._expected: list[str] = sorted(agreement.roster)
        self._messages: dict[str, bytes] = {}  # of this phase, by silo; of vectors nothing is kept but their sum
        self._keys: dict[str, AdvertisedKeys] = {}
        self._sealed: dict[str, dict[str, bytes]] = {}  # by sender and receiver
        self._view = View({})
        self._sum = np.zeros(agreement.length, agreement.encoding.dtype)
        self._shares: dict[str, dict[int, bytes]] = defaultdict(dict)  # by owner and holder's number
        self._total: Words | None = None

    @property
    def phase(self) -> Phase:
        """Of which phase messages are taken."""
        return self._phase

    @property
    def waiting_for(self) -> list[str]:
        """Who has not answered in this phase."""
        return [name for name in self._expected if name not in self._messages]

    @property
    def survivors(self) -> list[str]:
        """Whose vectors the total is the sum of.

        Raises:
            EarlyMessage: they are not all there yet.
        """
        if self._phase < Phase.SURVIVORS:
            raise EarlyMessage("the survivors are known after phase 3")
        return self._view.survivors

    def receive(self, message: bytes) -> str:
        """Takes a silo's message, and returns the silo's name.

        Raises:
            SecureAggregationError: the message is not one that is due; nothing has changed.
        """
        agreement = self._agreement
        name, body = open_silo_message(message, self._phase, agreement.digest, agreement.roster)
        if name not in self._expected:
            raise UnknownSilo(f"{name} was gone before phase {self._phase:d}")
        if name in self._messages:
            raise RepeatedMessage(f"{name} has answered in phase {self._phase:d} before")
        match self._phase:
            case Phase.KEYS:
                self._keys[name] = AdvertisedKeys.parse(body)
            case Phase.SHARES:
                self._sealed[name] = self._ciphertexts(name, body)
            case Phase.MASKED:
                self._add(name, body)
            case Phase.SURVIVORS:
                if body != self._view.digest():
                    raise InconsistentView(f"{name} signs something else than it was told")
            case Phase.REVEALED:
                self._keep_shares(name, body)
        self._messages[name] = b"" if self._phase is Phase.MASKED else message
        return name

    def advance(self) -> dict[str, bytes]:
        """Ends a phase: what to send to each silo that has answered, or nothing after the last phase.

        Raises:
            TooFewSilos: too few have answered. More may still come; else the sum has failed.
            ForgedMessage: after the last phase: the shares give something else than was promised.
        """
        answered = sorted(self._messages)
        if self._phase is Phase.REVEALED:
            self._total = self._unmasked()
            return {}
        self._agreement.require(answered, self._expected)
        replies = self._replies(answered)
        self._expected, self._messages = answered, {}
        self._phase = Phase(self._phase + 1)
        return replies

    def total(self) -> Words:
        """The sum of the survivors' vectors.

        Raises:
            EarlyMessage: it is not unmasked yet.
        """
        if self._total is None:
            raise EarlyMessage("the sum is there after phase 5")
        return self._total

    def _replies(self, answered: list[str]) -> dict[str, bytes]:
        digest, names = self._agreement.digest, [name.encode() for name in answered]
        match self._phase:
            case Phase.SHARES:
                self._view = View(self._keys, answered)
                lists = pack(*names)
                return {
                    name: server_message(self._phase, digest, lists, pack(*self._delivery(name, answered)))
                    for name in answered
                }
            case Phase.MASKED:
                self._view.survivors = answered
                reply = server_message(self._phase, digest, *names)
            case _:
                reply = server_message(self._phase, digest, *(self._messages[name] for name in answered))
        return dict.fromkeys(answered, reply)

    def _delivery(self, receiver: str, shared: list[str]) -> list[bytes]:
        return [self._sealed[sender][receiver] for sender in self._agreement.neighbours(receiver, shared)]

    def _ciphertexts(self, name: str, body: bytes) -> dict[str, bytes]:
        pairs = [unpack(pair, 2) for pair in unpack(body)]
        sealed = {text(receiver): ciphertext for receiver, ciphertext in pairs}
        if len(sealed) != len(pairs) or set(sealed) != set(self._agreement.neighbours(name, self._keys)):
            raise MalformedMessage(f"{name} has not sent one share for each of its neighbours")
        return sealed

    def _add(self, name: str, body: bytes) -> None:
        if len(body) != self._sum.nbytes:
            raise MalformedMessage(f"the vector of {name} has {len(body)} bytes where {self._sum.nbytes} are due")
        self._sum += np.frombuffer(body, self._sum.dtype)

    def _keep_shares(self, name: str, body: bytes) -> None:
        pairs = [unpack(pair, 2) for pair in unpack(body)]
        owners = [text(owner) for owner, _ in pairs]
        due = {name, *self._agreement.neighbours(name, self._view.shared)}
        if len(owners) != len(due) or set(owners) != due or any(len(share) != KEY_BYTES for _, share in pairs):
            raise MalformedMessage(f"{name} has not revealed one share for each of its neighbours")
        for owner, (_, share) in zip(owners, pairs, strict=True):
            self._shares[owner][self._agreement.ring.neighbourhood(owner).index(name) + 1] = share

    def _unmasked(self) -> Words:
        """Takes the survivors' own masks off, and those that they share with who is gone."""
        digest, left, total = self._agreement.digest, self._view.survivors, self._sum.copy()
        for name in left:
            seed = self._recovered(name)
            if commitment(seed, digest, name) != self._keys[name].seed_commitment:
                raise ForgedMessage(f"the shares of {name} don't give the seed that it promised")
            apply_mask(total, self_key(seed, digest, name), -1)
        for name in sorted(set(self._view.shared) - set(left)):
            if neighbours := self._agreement.neighbours(name, left):
                self._take_off_pairs(total, name, neighbours)
        return total

    def _take_off_pairs(self, total: Words, gone: str, neighbours: list[str]) -> None:
        key = X25519PrivateKey.from_private_bytes(self._recovered(gone))
        if key.public_key().public_bytes_raw() != self._keys[gone].mask:
            raise ForgedMessage(f"the shares of {gone} don't give the key that it advertised")
        for name in neighbours:
            pair = pair_key(key, self._keys[name].mask, self._agreement.digest, (gone, name))
            apply_mask(total, pair, -1 if name < gone else 1)

    def _recovered(self, owner: str) -> bytes:
        shares, threshold = self._shares[owner], self._agreement.ring.threshold
        if len(shares) < threshold:
            raise TooFewSilos(f"{len(shares)} shares of {owner} were revealed, and {threshold} are needed")
        return sharing.combine(dict(sorted(shares.items())[:threshold]))
