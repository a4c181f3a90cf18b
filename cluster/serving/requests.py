"""What may be asked: OpenAI's fields, as far as they mean something here. Any other is refused, not ignored."""

import secrets
from typing import Annotated, Any, Literal

from pydantic import AfterValidator, BaseModel, ConfigDict, Field, StringConstraints

from trainer.inference.sampling import Sampling

_COLDEST = 0.01  # below it the softmax of float32 is a choice of the likeliest token anyway, or not a number
_SEEDS = 2**63
_LONGEST = 2**16  # characters of a record
_MOST_EXPLAINED = 2000  # characters of a text: each takes 64 passes forward and back over all of it


def _whole(text: str) -> str:
    """JSON can spell half of a pair of surrogates, which is no character."""
    if any("\ud800" <= sign <= "\udfff" for sign in text):
        raise ValueError("has half of a surrogate pair; send whole characters")
    return text


Words = Annotated[str, AfterValidator(_whole)]
Stop = Annotated[Words, StringConstraints(min_length=1, max_length=200)]


class _Strict(BaseModel):
    model_config = ConfigDict(extra="forbid", allow_inf_nan=False)


class StreamOptions(_Strict):
    """How a stream ends.

    Attributes:
        include_usage: a last event counts tokens.
    """

    include_usage: bool = False


class _Request(_Strict):
    model: str = Field(max_length=200)
    max_tokens: int | None = Field(None, ge=1)
    temperature: float = Field(1.0, ge=0, le=2)
    top_p: float = Field(1.0, gt=0, le=1)
    top_k: int = Field(0, ge=0)
    repetition_penalty: float = Field(1.0, ge=0.1, le=10)
    seed: int | None = Field(None, ge=-_SEEDS, lt=_SEEDS)
    stop: Stop | Annotated[list[Stop], Field(max_length=4)] | None = None
    stream: bool = False
    stream_options: StreamOptions | None = None
    user: str | None = Field(None, max_length=200)
    n: Literal[1] | None = 1
    presence_penalty: Literal[0] | None = 0
    frequency_penalty: Literal[0] | None = 0
    logit_bias: dict[str, float] | None = Field(None, max_length=0)

    @property
    def most(self) -> int | None:
        """Most tokens of the answer; None: as many as there may be."""
        return self.max_tokens

    def sampling(self, most: int, ends: tuple[int, ...]) -> Sampling:
        """How the answer's tokens are chosen."""
        return Sampling(
            max_new_tokens=most,
            temperature=self.temperature if self.temperature >= _COLDEST else 0.0,
            top_k=self.top_k,
            top_p=self.top_p,
            repetition_penalty=self.repetition_penalty,
            seed=secrets.randbits(63) if self.seed is None else self.seed,
            stop=(self.stop,) if isinstance(self.stop, str) else tuple(self.stop or ()),
            ends=ends,
        )


class CompletionRequest(_Request):
    """A text that the model goes on with."""

    prompt: Words
    max_tokens: int | None = Field(16, ge=1)
    echo: Literal[False] | None = False
    best_of: Literal[1] | None = 1
    logprobs: None = None
    suffix: None = None


def _short(record: dict[str, Any]) -> dict[str, Any]:
    """A text is read in windows, and one of them all would keep others waiting."""
    if len(str(record)) > _LONGEST:
        raise ValueError(f"has more than {_LONGEST} characters; send less of it")
    return record


Record = Annotated[dict[str, Any], AfterValidator(_short)]


class PredictRequest(_Strict):
    """Records that a model gives labels to. What their fields are called the model says, in /v1/models."""

    model: str = Field(max_length=200)
    records: list[Record] = Field(min_length=1, max_length=256)


class ExplainRequest(_Strict):
    """A text whose words are weighed; of entities, its words with blanks between them."""

    model: str = Field(max_length=200)
    text: Words = Field(min_length=1, max_length=_MOST_EXPLAINED)


class TextPart(_Strict):
    """A part of a message: text, and nothing else."""

    type: Literal["text"]
    text: Words


class ChatMessage(_Strict):
    """Who says what."""

    role: Literal["system", "developer", "user", "assistant"]
    content: Words | list[TextPart]
    name: str | None = Field(None, max_length=200)

    def turn(self) -> tuple[str, str]:
        """The role that chat templates know, and the words."""
        words = self.content if isinstance(self.content, str) else "".join(part.text for part in self.content)
        return "system" if self.role == "developer" else self.role, words


class ChatRequest(_Request):
    """A dialogue that the model answers."""

    messages: list[ChatMessage] = Field(min_length=1, max_length=512)
    max_completion_tokens: int | None = Field(None, ge=1)
    logprobs: Literal[False] | None = False
    tools: list[Any] | None = Field(None, max_length=0)
    response_format: dict[Literal["type"], Literal["text"]] | None = None

    @property
    def most(self) -> int | None:
        """By its new name or the old one."""
        return self.max_completion_tokens or self.max_tokens
