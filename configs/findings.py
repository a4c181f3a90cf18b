"""What a check has found, and what to do about it: of a machine, or of a site before a run."""

from dataclasses import dataclass


@dataclass(frozen=True)
class Finding:
    """One check.

    Attributes:
        check: what was looked at.
        ok: whether it holds.
        found: what was found.
        fix: what to do, where it doesn't hold.
    """

    check: str
    ok: bool
    found: str
    fix: str = ""

    def __str__(self) -> str:
        return f"{'ok  ' if self.ok else 'FIX '}{self.check}: {self.found}" + ("" if self.ok else f"; {self.fix}")
