"""The three ways a command can end other than well, each with its exit status.

A message is one line for a person: the field or the file, the value found, and what to do about it.
"""

from functools import partial

LARGEST_ECHO = 100  # characters of a request that a refusal repeats


def lines_of(error: BaseException) -> list[str]:
    """What another library's error says, by lines: one at least, its class where it says nothing."""
    return (str(error).strip() or type(error).__name__).splitlines()


class SiloweaveError(Exception):
    """The run failed; exit status 1."""

    exit_status = 1


class InputError(SiloweaveError, ValueError):
    """What the user gave is wrong (a setting, a file, a machine too small); exit status 2."""

    exit_status = 2


class PolicyRefusal(SiloweaveError):
    """A silo's privacy policy or budget refuses; exit status 3.

    Attributes:
        rule: name of the rule that refuses, for instance ``budget_epsilon``.
        asked: the value that was asked for.
        allowed: the value that the rule allows.
    """

    exit_status = 3

    def __init__(self, message: str, *, rule: str, asked: str, allowed: str) -> None:
        super().__init__(message)
        self.rule, self.asked, self.allowed = rule, asked, allowed

    @classmethod
    def of(cls, rule: str, asked: str, allowed: str, message: str = "") -> "PolicyRefusal":
        """A refusal whose message begins with its rule; without words of its own it repeats what was asked, in part."""
        if not message:
            asked = asked[:LARGEST_ECHO]
            message = f"asked {asked}, allowed {allowed}"
        return cls(f"{rule}: {message}", rule=rule, asked=asked, allowed=allowed)

    def __reduce__(self) -> tuple[object, ...]:
        # Exceptions pickle by their positional arguments; the keywords have to travel too (Ray, multiprocessing).
        return partial(PolicyRefusal, rule=self.rule, asked=self.asked, allowed=self.allowed), (str(self),)
