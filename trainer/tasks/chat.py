"""Dialogues and instructions: what the assistant says is learnt, in the model's own chat template or in another one.

A chat template is shown who speaks, and never what is said: words come in where it has put a mark. So no record's words
can open or end a turn, and what a template does depends on nothing but whose turns there are.
"""

import re
from collections.abc import Sequence
from copy import copy
from functools import lru_cache
from typing import Any, NamedTuple, Self

from configs.errors import InputError
from configs.schema.tasks import TaskSpec
from trainer.data.reading.counts import ReadCounts, mended
from trainer.tasks import fields
from trainer.tasks.fields import Words
from trainer.tasks.marked import Mark, Marked, Part, encoded, own_backend, plain_backend
from trainer.tasks.task import Encoded, Opening, Row
from trainer.tasks.written import WrittenAnswerTask

ROLES = ("system", "user", "assistant")
SYSTEM, USER, ASSISTANT = range(len(ROLES))
Message = tuple[int, str]
"""Whose turn it is, by its place in ``ROLES``, and what is said."""
_ROLES = {**{role: number for number, role in enumerate(ROLES)}, "human": ROLES.index("user"), "gpt": ASSISTANT}
_KEYS = (("role", "content"), ("from", "value"))
_MARK = re.compile(r"(\t?)\[\[message (\d+)\]\](\t?)")
# Some templates write today's date: the same record would be other tokens tomorrow.
_SAME_DAY = "{% macro strftime_now(format) %}26 Jul 2024{% endmacro %}"


def messages(value: Any, column: str, where: str, _words: Words, counts: ReadCounts) -> tuple[Message, ...] | None:
    """The turns of a dialogue, up to the last one that says something as the assistant; None where there are none.

    Raises:
        InputError: it is no list of messages, or none of them is an answer.
    """
    if value is None or value == []:
        return None
    if not isinstance(value, list):
        raise InputError(
            f"{where}: column {column!r} holds no list; give a list of messages, each with `role` and `content`"
        )
    found = [_message(one, f"{where}: column {column!r}, message {number}") for number, one in enumerate(value, 1)]
    answers = [place for place, (role, said) in enumerate(found) if role == ASSISTANT and said.strip()]
    if not answers:
        raise InputError(f"{where}: column {column!r} holds no answer of the assistant's; take the record out")
    return tuple((role, mended(said, counts)) for role, said in found[: answers[-1] + 1])


def _message(value: Any, where: str) -> Message:
    keys = next((keys for keys in _KEYS if isinstance(value, dict) and all(key in value for key in keys)), None)
    if keys is None:
        raise InputError(f"{where} is no object with `role` and `content`; give both")
    role, said = (value[key] for key in keys)
    if not isinstance(role, str) or role not in _ROLES:
        raise InputError(f"{where}: its role is none of {', '.join(ROLES)}; give one of them, or take the record out")
    if not isinstance(said, str):
        raise InputError(f"{where}: what it says is no text; give a text, or take the record out")
    return _ROLES[role], said


class _Said(NamedTuple):
    """A place in a template where a message's words come in; white space at their ends is kept or not."""

    message: int
    left: bool
    right: bool


class _Token(NamedTuple):
    """A token of the template's own."""

    id: int
    learnt: bool


_Run = tuple[tuple[str | _Said, bool], ...]  # text between two such tokens, part by part; and whether it is learnt
_Frame = tuple[_Token | _Run, ...]


class ChatTemplate:
    """A model's chat template.

    Args:
        tokenizer: with the template.

    Raises:
        InputError: it has none, or one that writes no answer to a user.
    """

    def __init__(self, tokenizer: Any) -> None:
        if not tokenizer.chat_template:
            raise InputError(
                "federated.template is empty, and the model's tokenizer has no chat template; give a model that has "
                "one, or a template"
            )
        self._tokenizer, self._marked = tokenizer, own_backend(tokenizer)
        added = {number: token.content for number, token in self._marked.get_added_tokens_decoder().items()}
        self._added = set(added) - {tokenizer.unk_token_id}
        # Some models name their turns' tokens without saying that they are special.
        spelt = [text for text in added.values() if text.strip() and text in str(tokenizer.chat_template)]
        self._plain = plain_backend(tokenizer, spelt)
        self._frame = lru_cache(maxsize=1024)(self._made)  # whoever asks a service may take turns in many ways
        self.ends = self._ends()

    def _ends(self) -> tuple[int, ...]:
        frame = self._frame((USER, ASSISTANT), opening=False) or ()
        if not any(learnt for part in frame if not isinstance(part, _Token) for _, learnt in part):
            raise InputError(
                "the model's chat template writes no dialogue of a user and an assistant; give another model, or "
                "federated.template"
            )
        own = [part.id for part in frame if isinstance(part, _Token) and part.learnt]
        return tuple(dict.fromkeys([*own, self._tokenizer.eos_token_id]))

    def tokens(self, dialogue: Sequence[Message], *, shown: int = 0, opening: bool = False) -> Marked | None:
        """A dialogue's tokens, of which the assistant's words, and the token that ends them, are to be learnt.

        Args:
            dialogue: the messages.
            shown: how many of them, from the first one on, are there to be read alone.
            opening: whether the assistant's turn is opened after it.

        Returns:
            None where the template takes no dialogue with these turns.
        """
        frame = self._frame(tuple(role for role, _ in dialogue), opening=opening)
        if frame is None:
            return None
        found, message = Marked(), 0
        for part in frame:
            if isinstance(part, _Token):
                found.add([part.id], [Mark.LEARNT if part.learnt and message >= shown else Mark.FRAME])
                continue
            parts = list[Part]()
            for one, learnt in part:
                message = one.message if isinstance(one, _Said) else message
                parts.append((_text(one, dialogue), _mark(one, learnt and message >= shown)))
            found.add(*encoded(self._plain, parts))
        return found

    def _made(self, roles: tuple[int, ...], *, opening: bool) -> _Frame | None:
        """What the template writes around messages of these roles."""
        marks = [{"role": ROLES[role], "content": f"\t[[message {place}]]\t"} for place, role in enumerate(roles)]
        try:
            text = self._tokenizer.apply_chat_template(
                marks,
                chat_template=_SAME_DAY + self._tokenizer.get_chat_template(),
                tokenize=False,
                add_generation_prompt=opening,
            )
        except Exception:  # a template raises whatever its maker wants: that the system speaks, or a user twice
            return None
        kept = {int(place): _Said(int(place), bool(left), bool(right)) for left, place, right in _MARK.findall(text)}
        if any(place >= len(roles) for place in kept):  # the template spells a mark of its own
            return None
        text = _MARK.sub(r"[[message \2]]", text)
        return tuple(_with_answers(self._cut(text, kept), roles))

    def _cut(self, text: str, kept: dict[int, _Said]) -> list[int | list[str | _Said]]:
        """The template's own tokens, and the text between them with places for words."""
        found = self._marked.encode(text, add_special_tokens=False)
        cuts = [(number, *offset) for number, offset in zip(found.ids, found.offsets, strict=True)]
        pieces, start = list[int | list[str | _Said]](), 0
        for number, first, last in [cut for cut in cuts if cut[0] in self._added] + [(None, len(text), len(text))]:
            split = _MARK.split(text[start:first])  # text, then again and again: blank, number, blank, text
            parts: list[str | _Said] = [split[0]]
            for place, after in zip(split[2::4], split[4::4], strict=True):
                parts += [kept[int(place)], after]
            pieces.append([part for part in parts if part != ""])
            if number is not None:
                pieces.append(number)
            start = last
        return [piece for piece in pieces if piece != []]


def _with_answers(pieces: Sequence[int | list[str | _Said]], roles: Sequence[int]) -> list[_Token | _Run]:
    """What is to be learnt: the assistant's words, and the token behind them, white space between them included."""
    frame, answering = list[_Token | _Run](), False
    for piece in pieces:
        if isinstance(piece, int):
            frame.append(_Token(piece, answering))
            answering = False
            continue
        run: list[tuple[str | _Said, bool]] = []
        for part in piece:
            answering = answering and part.isspace() if isinstance(part, str) else roles[part.message] == ASSISTANT
            run.append((part, answering))
        frame.append(tuple(run))
    return frame


def _mark(part: str | _Said, learnt: bool) -> Mark:
    if learnt:
        return Mark.LEARNT
    return Mark.FRAME if isinstance(part, str) else Mark.READ


def _text(part: str | _Said, dialogue: Sequence[Message]) -> str:
    if isinstance(part, str):
        return part
    said = dialogue[part.message][1]
    said = said if part.left else said.lstrip()
    return said if part.right else said.rstrip()


class ChatTask(WrittenAnswerTask):
    """Each row is a dialogue; or, with a template, a question and its answer."""

    name = "chat"

    def __init__(self, tokenizer: Any, context_length: int, spec: TaskSpec) -> None:
        super().__init__(tokenizer, context_length, spec)
        self._chat = None if spec.template else ChatTemplate(tokenizer)
        self._dialogues: tuple[Message, ...] = ()

    @classmethod
    def fields(cls, spec: TaskSpec) -> dict[str, fields.Kind]:
        """The fields of the template, or the messages."""
        return super().fields(spec) if spec.template else {"messages": messages}

    def with_shots(self, rows: Sequence[Row]) -> Self:
        """The same task, with these dialogues before each one, without what is said as the system."""
        if self._chat is None:
            return super().with_shots(rows)
        found = copy(self)
        found._dialogues = tuple(message for row in rows for message in row["messages"] if message[0] != SYSTEM)
        return found

    @property
    def ends(self) -> tuple[int, ...]:
        """Tokens that end an answer: those of the chat template, too."""
        return super().ends if self._chat is None else self._chat.ends

    def _encoded(self, row: Row) -> Encoded | None:
        if self._chat is None:
            return super()._encoded(row)
        said = row["messages"]
        first = int(said[0][0] == SYSTEM)  # which has to come before all else
        dialogue = (*said[:first], *self._dialogues, *said[first:])
        found = self._chat.tokens(dialogue, shown=first + len(self._dialogues))
        return None if found is None else found.example(self.context_length)

    def opening(self, prompt: str) -> Opening:
        """The prompt as a user's message, or as the question."""
        return super().opening(prompt) if self._chat is None else self.opened({"messages": ((USER, prompt),)})

    def opened(self, row: Row) -> Opening:
        """The messages so far, or the question."""
        if self._chat is None:
            return super().opened(row)
        found = self._chat.tokens(row["messages"], opening=True)
        if found is None:
            raise InputError("the model's chat template opens no dialogue with a user's message; give another model")
        return Opening(tuple(found.ids), continued=False, ends=self.ends)
