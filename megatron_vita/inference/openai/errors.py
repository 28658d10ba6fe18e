"""Errors of a request, in the form of OpenAI's error object."""

from __future__ import annotations

from typing import Any

from megatron_vita.data.rejects import CODES, code_of
from megatron_vita.errors import DataError, VitaError

_THEIR_CODES = {"overlong": "context_length_exceeded"}
"""Error codes that OpenAI's clients know under another name."""


class RequestError(DataError):
    """A request that cannot be answered as it stands."""

    def __init__(self, message: str, *, param: str | None = None, code: str | None = None) -> None:
        """Build the error.

        Args:
            message: what is wrong, and how to mend it.
            param: field of the body that is wrong, such as `messages[0].content`.
            code: short name of the error.
        """
        super().__init__(message)
        self.param = param
        self.code = code


def error_object(error: VitaError) -> dict[str, Any]:
    """OpenAI's error object {message, type, param, code} of a request that was refused or failed; HTTP status 400."""
    param = code = None
    message = str(error)
    if isinstance(error, RequestError):
        param, code = error.param, error.code
    elif isinstance(error, DataError) and message.partition(": ")[0] in CODES:
        code, message = code_of(error)
    return {
        "message": message,
        "type": "invalid_request_error",
        "param": param,
        "code": _THEIR_CODES.get(code, code) if code else None,
    }
