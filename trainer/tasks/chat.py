"""Dialogues and instructions: what the assistant says is learnt, in the model's own chat template or in another one."""

from typing import Any

from configs.errors import InputError
from configs.schema.tasks import TaskSpec
from trainer.tasks import fields
from trainer.tasks.answers import AnswerTask
from trainer.tasks.dialogue import ROLES, ChatTemplate, messages
from trainer.tasks.task import Encoded, Opening, Row


class ChatTask(AnswerTask):
    """Each row is a dialogue; or, with a template, a question and its answer."""

    name = "chat"

    def __init__(self, tokenizer: Any, context_length: int, spec: TaskSpec) -> None:
        super().__init__(tokenizer, context_length, spec)
        self._chat = None if spec.template else ChatTemplate(tokenizer)

    @classmethod
    def fields(cls, spec: TaskSpec) -> dict[str, fields.Kind]:
        """The fields of the template, or the messages."""
        return super().fields(spec) if spec.template else {"messages": messages}

    @property
    def ends(self) -> tuple[int, ...]:
        """Tokens that end an answer: those of the chat template, too."""
        return super().ends if self._chat is None else self._chat.ends

    def _encoded(self, row: Row) -> Encoded | None:
        if self._chat is None:
            return super()._encoded(row)
        found = self._chat.tokens(row["messages"])
        return None if found is None else found.example(self.context_length)

    def opening(self, prompt: str) -> Opening:
        """The prompt as a user's message, or as the question."""
        if self._chat is None:
            return super().opening(prompt)
        found = self._chat.tokens([(ROLES.index("user"), prompt)], opening=True)
        if found is None:
            raise InputError("the model's chat template opens no dialogue with a user's message; give another model")
        return Opening(tuple(found.ids), continued=False, ends=self.ends)
