"""Errors as clients of OpenAI's API know them: an HTTP status and an error object."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from megatron_vita.errors import ConfigError, DataError, VitaError
from megatron_vita.inference.openai import error_object, status_of

_TYPES = {401: "authentication_error", 429: "rate_limit_error"}


class HttpError(VitaError):
    """A request that is refused with a status of its own."""

    def __init__(
        self, status: int, message: str, *, code: str | None = None, headers: Mapping[str, str] | None = None
    ) -> None:
        """Build the error.

        Args:
            status: HTTP status, 400 to 599.
            message: what is wrong, and how to mend it.
            code: short name of the error.
            headers: of the response.
        """
        super().__init__(message)
        self.status, self.code, self.headers = status, code, dict(headers or {})


def status_and_object(error: Exception) -> tuple[int, dict[str, Any], dict[str, str]]:
    """HTTP status, body `{"error": {...}}` and headers of a request that failed.

    A request's own fault is a 4xx; what went wrong in the server tells no more than that it did.
    """
    if isinstance(error, HttpError):
        kind = _TYPES.get(error.status, "invalid_request_error" if error.status < 500 else "server_error")
        told = {"message": str(error), "type": kind, "param": None, "code": error.code}
        return error.status, {"error": told}, error.headers
    if isinstance(error, DataError | ConfigError):
        found = error_object(error)
        found["message"] = found["message"].removeprefix("request:1: ")  # its place in a batch file, which is none here
        return status_of(error), {"error": found}, {}
    message = str(error) if isinstance(error, VitaError) else "the server failed; its log says why."
    return 500, {"error": {"message": message, "type": "server_error", "param": None, "code": None}}, {}
