"""A silo's side of one secure sum, as a state machine over bytes: five calls, each once, in this order.

A call that raises has sent nothing and changed nothing. What the server says is believed only as far as the silos
have signed it (Bonawitz et al. 2017, with their protection against a server that lies).
"""

import secrets

from cryptography.exceptions import InvalidTag
from cryptography.hazmat.primitives.asymmetric.x25519 import X25519PrivateKey
from cryptography.hazmat.primitives.ciphers.aead import ChaCha20Poly1305

from configs.errors import InputError
from privacy.secagg import sharing
from privacy.secagg.agreement import Agreement
from privacy.secagg.encoding import Words
from privacy.secagg.failures import (
    EarlyMessage,
    ForgedMessage,
    InconsistentView,
    LateMessage,
    MalformedMessage,
    RepeatedMessage,
    TooFewSilos,
    UnknownSilo,
)
from privacy.secagg.masks import KEY_BYTES, agreed_secret, apply_mask, commitment, derive, pair_key, self_key
from privacy.secagg.messages import Phase, open_server_message, open_silo_message, pack, silo_message, text, unpack
from privacy.secagg.view import AdvertisedKeys, View
from privacy.signing import Signer

_NONCE = bytes(12)  # each key of a direction encrypts one message


class Client:
    """One silo in one secure sum. Its keys are made here, for this sum alone, and never leave but as shares.

    Make one for a context, ever: two sums of the same vectors over different survivors would give their difference
    away.
    """

    def __init__(self, name: str, signer: Signer, agreement: Agreement) -> None:
        """Draws the keys.

        Raises:
            InputError: the roster does not know this silo by this key.
        """
        if agreement.roster.get(name) != signer.public_key:
            raise InputError(f"roster: {name} is not there with this silo's own key")
        self._name, self._signer, self._agreement = name, signer, agreement
        self._cipher_key, self._mask_key = X25519PrivateKey.generate(), X25519PrivateKey.generate()
        self._seed = secrets.token_bytes(KEY_BYTES)
        self._next = int(Phase.KEYS)
        self._view = View({})
        self._held: dict[str, tuple[bytes, bytes]] = {}  # by owner: my share of its mask's seed, and of its mask key

    def advertise(self) -> bytes:
        """Phase 1: this silo's public keys, and what it promises its own mask's seed by."""
        self._check(Phase.KEYS)
        own = commitment(self._seed, self._agreement.digest, self._name)
        public = (key.public_key().public_bytes_raw() for key in (self._cipher_key, self._mask_key))
        return self._send(Phase.KEYS, pack(*public, own))

    def share(self, all_keys: bytes) -> bytes:
        """Phase 2: shares of both secrets, encrypted for each neighbour.

        Args:
            all_keys: what the silos advertised, from the server.

        Raises:
            SecureAggregationError: a key is not signed by a silo of the roster, for this very sum, or too few are
                there.
        """
        self._check(Phase.SHARES)
        digest, roster = self._agreement.digest, self._agreement.roster
        keys = {}
        for message in open_server_message(all_keys, Phase.KEYS, digest):
            name, body = open_silo_message(message, Phase.KEYS, digest, roster)
            if name in keys:
                raise RepeatedMessage(f"{name} advertises keys twice")
            keys[name] = AdvertisedKeys.parse(body)
        self._agreement.require(list(keys), roster)
        if keys.get(self._name) != self._own_keys():
            raise InconsistentView("the server does not pass on this silo's own keys")
        return self._share_among(View(keys))

    def mask(self, delivery: bytes, words: Words) -> bytes:
        """Phase 3: the vector under this silo's own mask and one with each neighbour.

        Args:
            delivery: who has shared, and what is for this silo, from the server.
            words: the vector, as ``Encoding.encode`` makes it.

        Raises:
            SecureAggregationError: a share is not of whom it claims, or too few have shared.
        """
        self._check(Phase.MASKED)
        agreement = self._agreement
        if words.dtype != agreement.encoding.dtype or words.shape != (agreement.length,):
            raise InputError(f"words: give {agreement.length} of {agreement.encoding.dtype}, got {words.shape}")
        listed, packed = open_server_message(delivery, Phase.SHARES, agreement.digest, 2)
        shared = [text(name) for name in unpack(listed)]
        agreement.require(shared, self._view.keys)
        self._require_self(shared)
        neighbours = agreement.neighbours(self._name, shared)
        ciphertexts = unpack(packed, len(neighbours))
        held = {name: self._decrypted(name, sealed) for name, sealed in zip(neighbours, ciphertexts, strict=True)}
        masked = self._masked(words, neighbours)
        self._held |= held
        self._view.shared = shared
        return self._send(Phase.MASKED, masked.tobytes())

    def agree(self, survivors: bytes) -> bytes:
        """Phase 4: a signature of everything that the server has said, the survivors above all.

        Args:
            survivors: whose vectors have come, from the server.

        Raises:
            SecureAggregationError: too few are left, or the list lacks this silo, or names others than have shared.
        """
        self._check(Phase.SURVIVORS)
        left = [text(name) for name in open_server_message(survivors, Phase.MASKED, self._agreement.digest)]
        self._agreement.require(left, self._view.shared)
        self._require_self(left)
        self._view.survivors = left
        return self._send(Phase.SURVIVORS, self._view.digest())

    def reveal(self, signatures: bytes) -> bytes:
        """Phase 5: of each neighbour one share: of its own mask's seed if it survived, else of its mask key.

        Args:
            signatures: the survivors' messages of phase 4, from the server.

        Raises:
            SecureAggregationError: too few have signed, or one has signed something else than this silo.
        """
        self._check(Phase.REVEALED)
        digest, roster, own = self._agreement.digest, self._agreement.roster, self._view.digest()
        signed = set()
        for message in open_server_message(signatures, Phase.SURVIVORS, digest):
            name, body = open_silo_message(message, Phase.SURVIVORS, digest, roster)
            if body != own:
                raise InconsistentView(f"{name} was told of other keys or survivors than this silo")
            if name not in self._view.survivors:
                raise UnknownSilo(f"{name} has signed, and is none of the survivors")
            signed.add(name)
        if len(signed) < self._agreement.min_survivors:
            raise TooFewSilos(f"{len(signed)} survivors have signed, and {self._agreement.min_survivors} have to")
        left = set(self._view.survivors)
        shares = (pack(name.encode(), held[name not in left]) for name, held in sorted(self._held.items()))
        message = self._send(Phase.REVEALED, pack(*shares))
        self._held.clear()
        return message

    def _check(self, phase: Phase) -> None:
        if phase != self._next:
            error = LateMessage if phase < self._next else EarlyMessage
            raise error(f"phase {phase:d} of a sum in which this silo is at phase {self._next}")

    def _send(self, phase: Phase, body: bytes) -> bytes:
        message = silo_message(self._signer, self._name, phase, self._agreement.digest, body)
        self._next = phase + 1
        return message

    def _own_keys(self) -> AdvertisedKeys:
        cipher, mask = (key.public_key().public_bytes_raw() for key in (self._cipher_key, self._mask_key))
        return AdvertisedKeys(cipher, mask, commitment(self._seed, self._agreement.digest, self._name))

    def _require_self(self, names: list[str]) -> None:
        if self._name not in names:
            raise InconsistentView("the server's list lacks this silo, which has answered")

    def _share_among(self, view: View) -> bytes:
        """Splits both secrets over the neighbourhood: what is for who isn't there is never sent."""
        ring = self._agreement.ring
        holders = ring.neighbourhood(self._name)
        if sum(name in view.keys for name in holders) < ring.threshold:
            raise TooFewSilos("too few neighbours of this silo are there to hold its shares")
        secret_parts = (self._seed, self._mask_key.private_bytes_raw())
        halves = (sharing.split(secret, ring.threshold, len(holders)) for secret in secret_parts)
        shares = dict(zip(holders, zip(*halves, strict=True), strict=True))
        sealed = [
            pack(
                name.encode(), self._cipher(name, view, self._name, name).encrypt(_NONCE, b"".join(shares[name]), None)
            )
            for name in self._agreement.neighbours(self._name, view.keys)
        ]
        self._view, self._held[self._name] = view, shares[self._name]
        return self._send(Phase.SHARES, pack(*sealed))

    def _cipher(self, peer: str, view: View, sender: str, receiver: str) -> ChaCha20Poly1305:
        secret = agreed_secret(self._cipher_key, view.keys[peer].cipher)
        return ChaCha20Poly1305(derive(secret, self._agreement.digest, "shares", sender, receiver))

    def _decrypted(self, sender: str, sealed: bytes) -> tuple[bytes, bytes]:
        try:
            shares = self._cipher(sender, self._view, sender, self._name).decrypt(_NONCE, sealed, None)
        except InvalidTag:
            raise ForgedMessage(f"shares that came as {sender}'s are not") from None
        if len(shares) != 2 * KEY_BYTES:
            raise MalformedMessage(f"the shares of {sender} have another length than shares have")
        return shares[:KEY_BYTES], shares[KEY_BYTES:]

    def _masked(self, words: Words, neighbours: list[str]) -> Words:
        masked, digest = words.copy(), self._agreement.digest
        apply_mask(masked, self_key(self._seed, digest, self._name), 1)
        for name in neighbours:
            key = pair_key(self._mask_key, self._view.keys[name].mask, digest, (self._name, name))
            apply_mask(masked, key, 1 if self._name < name else -1)
        return masked
