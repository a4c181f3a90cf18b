"""A dialogue that a person has with a model: what was said so far, as what the model reads next."""

from dataclasses import replace
from typing import Any

from configs.errors import InputError
from trainer.data.tokenizer import first_token
from trainer.inference.decoding import Decoding
from trainer.inference.generation import OnText, write
from trainer.tasks.chat import ASSISTANT, USER, ChatTemplate, Message
from trainer.tasks.marked import plain_backend
from trainer.tasks.task import Opening, WritingTask

_NAMES = {USER: "User", ASSISTANT: "Assistant"}


class Dialogue:
    """Turns of a person and a model. What is said stays text, whatever special tokens it spells.

    Args:
        model: that answers; a decoder.
        tokenizer: the model's.
        task: that it was trained for.

    Raises:
        InputError: it writes no text, or is no decoder.
    """

    def __init__(self, model: Any, tokenizer: Any, task: Any) -> None:
        if not isinstance(task, WritingTask):
            raise InputError(f"this model was trained for {task.name!r} and writes no text; give one that does")
        if model.config.is_encoder_decoder:
            raise InputError("this model is an encoder-decoder, which holds no dialogue; use `siloweave generate`")
        self._model, self._tokenizer, self._context = model, tokenizer, task.context_length
        self._template = ChatTemplate(tokenizer) if tokenizer.chat_template else None
        self._backend = plain_backend(tokenizer)
        self._turns = list[Message]()

    @property
    def plain(self) -> bool:
        """Whether the model has no chat template, so that its turns are lines which begin with a name."""
        return self._template is None

    def reset(self) -> None:
        """Forgets what was said."""
        self._turns.clear()

    def answer(self, said: str, decoding: Decoding, on_text: OnText) -> None:
        """Has the model answer, and keeps both turns; what an interruption leaves of an answer is kept, too.

        The oldest turns are forgotten where the model's context is too short for them and an answer.

        Raises:
            InputError: what is said fills the context by itself.
        """
        opening, turns = self._opening([*self._turns, (USER, said)], decoding)
        if self.plain:
            decoding = replace(decoding, stop=(*decoding.stop, *(f"\n{name}:" for name in _NAMES.values())))
        shown = list[str]()

        def both(text: str) -> None:
            shown.append(text)
            on_text(text)

        try:
            write(self._model, self._tokenizer, opening, self._context, decoding, both)
        finally:
            if answer := "".join(shown).strip():
                self._turns = [*turns, (ASSISTANT, answer)]

    def _opening(self, turns: list[Message], decoding: Decoding) -> tuple[Opening, list[Message]]:
        most = self._context - min(decoding.max_new_tokens, self._context // 2)
        while len((opening := self._opened(turns)).ids) > most and len(turns) > 1:
            turns = turns[2:]
        return opening, turns

    def _opened(self, turns: list[Message]) -> Opening:
        if self._template is None:
            lines = "".join(f"{_NAMES[role]}: {said}\n" for role, said in turns)
            ids = self._backend.encode(f"{lines}{_NAMES[ASSISTANT]}:", add_special_tokens=False).ids
            eos = self._tokenizer.eos_token_id
            return Opening((first_token(self._tokenizer), *ids), continued=False, ends=(eos,))
        found = self._template.tokens(turns, opening=True)
        if found is None:
            raise InputError("the model's chat template takes no dialogue of a user and an assistant; give another one")
        return Opening(tuple(found.ids), continued=False, ends=self._template.ends)
