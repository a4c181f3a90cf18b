"""Refusals over HTTP, in the shape that OpenAI's clients read."""

from collections.abc import Mapping
from typing import Any

from starlette.responses import JSONResponse


class ApiError(Exception):
    """A request that is refused or has failed.

    Attributes:
        status: of HTTP.
        message: one line for a person. Never a word of the prompt or the answer.
        code: for programs.
        param: the field that is wrong.
    """

    def __init__(self, status: int, message: str, code: str, param: str | None = None) -> None:
        super().__init__(message)
        self.status, self.message, self.code, self.param = status, message, code, param

    @property
    def document(self) -> dict[str, Any]:
        """The body."""
        kind = "invalid_request_error" if self.status < 500 else "server_error"
        return {"error": {"message": self.message, "type": kind, "param": self.param, "code": self.code}}

    def response(self) -> JSONResponse:
        """The response; who asked too much is told to come again."""
        headers: Mapping[str, str] = {"retry-after": "1"} if self.status in (429, 503) else {}
        if self.status == 401:
            headers = {"www-authenticate": "Bearer"}
        return JSONResponse(self.document, self.status, headers)


FAILED = ApiError(500, "the service failed at this request", "failed")


NO_SUCH_METHOD = "no such method at this path; see /docs"


def too_many() -> ApiError:
    """The refusal of whoever comes while there is no room."""
    return ApiError(429, "too many requests at one time; try again later", "rate_limit_exceeded")


def stopping() -> ApiError:
    """For requests that come after the signal to stop."""
    return ApiError(503, "the service is stopping; ask again when it is back", "stopping")
