"""Errors of a request, in the form of OpenAI's error object."""

from __future__ import annotations

import re
from typing import Any

from megatron_vita.data.rejects import CODES, code_of
from megatron_vita.errors import ConfigError, DataError, VitaError

_THEIR_CODES = {"overlong": "context_length_exceeded"}
"""Error codes that OpenAI's clients know under another name."""
_MEDIUM = re.compile(r"messages\[\d+\]\.content\[\d+\]\.\w+\.url(?=: )")
"""Where an error of a medium that came in a body begins: its label is its field."""


class RequestError(DataError):
    """A request that cannot be answered as it stands."""

    def __init__(self, message: str, *, param: str | None = None, code: str | None = None, status: int = 400) -> None:
        """Build the error.

        Args:
            message: what is wrong, and how to mend it.
            param: field of the body that is wrong, such as `messages[0].content`.
            code: short name of the error.
            status: HTTP status, 400 to 499.
        """
        super().__init__(message)
        self.param = param
        self.code = code
        self.status = status


def status_of(error: VitaError) -> int:
    """HTTP status of a request that was refused or failed: 4xx where the request is at fault, else 500."""
    if isinstance(error, RequestError):
        return error.status
    return 400 if isinstance(error, DataError | ConfigError) else 500


def error_object(error: VitaError) -> dict[str, Any]:
    """OpenAI's error object {message, type, param, code} of a request that was refused or failed; see `status_of`."""
    param = code = None
    message = str(error)
    if isinstance(error, RequestError):
        param, code = error.param, error.code
    elif isinstance(error, DataError) and message.partition(": ")[0] in CODES:
        code, message = code_of(error)
        named = _MEDIUM.match(message)
        param = named[0] if named is not None else None
    return {
        "message": message,
        "type": "invalid_request_error" if status_of(error) < 500 else "server_error",
        "param": param,
        "code": _THEIR_CODES.get(code, code) if code else None,
    }
