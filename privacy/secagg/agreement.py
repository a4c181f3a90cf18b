"""What all silos of one secure sum have to agree on: its digest is in each message, in each mask's key, and signed."""

import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from functools import cached_property
from hashlib import sha256

from configs.errors import InputError
from privacy.secagg.encoding import Encoding
from privacy.secagg.failures import InconsistentView, TooFewSilos, UnknownSilo
from privacy.secagg.graph import Ring, reach_needed
from privacy.secagg.messages import pack

_PUBLIC_KEY = re.compile("[0-9a-f]{64}")  # one text for a key, so that no key is there twice


@dataclass(frozen=True)
class Agreement:
    """One secure sum.

    Attributes:
        roster: the silos' Ed25519 public keys in hexadecimal, by name, as this silo's steward knows them.
        colluders: how many of them may collude with the server; the argument holds for so many.
        min_survivors: with fewer silos left, in whatever phase, nothing is unmasked.
        encoding: how values become words.
        length: values in a vector.
        context: what the sum is for, in bytes: base model, adapter, plan, run and round.
    """

    roster: Mapping[str, str]
    colluders: int
    min_survivors: int
    encoding: Encoding
    length: int
    context: bytes

    def __post_init__(self) -> None:
        """Refuses a sum that would not be secure, before anything is drawn for it."""
        silos = len(self.roster)
        for name, key in self.roster.items():
            if not _PUBLIC_KEY.fullmatch(key):
                raise InputError(f"roster: the key of {name} is not 64 hexadecimal digits in small letters")
        if len(set(self.roster.values())) != silos:
            raise InputError("roster: two silos have the same key; each makes its own with `siloweave silo init`")
        if self.colluders < 0:
            raise InputError(f"colluders = {self.colluders}: give 0 or more")
        least = least_survivors(silos, self.colluders)
        if not least <= self.min_survivors <= silos:
            reason = f"{silos} silos with {self.colluders} colluders need at least {least}"
            raise InputError(f"min_survivors = {self.min_survivors}: {reason}, and no more than there are silos")
        if self.encoding.silos < silos:
            raise InputError(f"encoding.silos = {self.encoding.silos}: a sum of {silos} silos could wrap")
        if self.length < 1:
            raise InputError(f"length = {self.length}: give 1 or more")
        _ = self.ring  # raises where there are too many neighbours

    @cached_property
    def digest(self) -> bytes:
        """Of all terms."""
        numbers = (self.colluders, self.min_survivors, self.length, self.encoding.silos, self.encoding.word_bits)
        keys = [part.encode() for name, key in sorted(self.roster.items()) for part in (name, key)]
        terms = pack(self.context, repr((*numbers, float(self.encoding.clip))).encode(), pack(*keys))
        return sha256(b"siloweave secure aggregation 1\n" + terms).digest()

    @cached_property
    def ring(self) -> Ring:
        """Who masks against whom; the order follows from the digest, and the argument doesn't rest on it."""
        reach = reach_needed(len(self.roster), self.colluders, self.min_survivors)
        order = sorted(self.roster, key=lambda name: sha256(self.digest + name.encode()).digest())
        return Ring(tuple(order), reach, self.colluders)

    def neighbours(self, name: str, among: Iterable[str]) -> list[str]:
        """Those of some silos that share a mask with one."""
        there = set(among)
        return [other for other in self.ring.neighbourhood(name) if other != name and other in there]

    def require(self, left: list[str], before: Iterable[str]) -> None:
        """Checks who is left in a phase.

        Raises:
            InconsistentView: the names are not in order, or one is there twice.
            UnknownSilo: one was not there before.
            TooFewSilos: they are too few, or too few in one place.
        """
        if left != sorted(set(left)):
            raise InconsistentView("a list of silos is not in order, or names one twice")
        if not set(left) <= set(before):
            raise UnknownSilo("a list names a silo that was not there before")
        if len(left) < self.min_survivors:
            raise TooFewSilos(f"{len(left)} silos are left, and {self.min_survivors} have to be")
        if self.ring.cuts(left):
            raise TooFewSilos("too few silos are left in one part of the ring")


def least_survivors(silos: int, colluders: int) -> int:
    """How many have to survive: two lists of so many can't both be signed, and two honest silos are in each.

    An honest silo signs one list. Two lists of s signatures each need 2 (s - colluders) honest signers, and there are
    only ``silos - colluders``; so with 2 s > silos + colluders the server can't have both (Bonawitz et al. 2017).
    """
    return max((silos + colluders) // 2 + 1, colluders + 2)
