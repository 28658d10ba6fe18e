"""OpenAI's API of completions: bodies of requests and responses, for batch files and servers alike."""

from megatron_vita.inference.openai.body import parse_body
from megatron_vita.inference.openai.chunks import Chunks
from megatron_vita.inference.openai.errors import RequestError, error_object, status_of
from megatron_vita.inference.openai.limits import LimitError, Limits
from megatron_vita.inference.openai.request import ApiRequest, ReadOptions, chat_request, completion_request
from megatron_vita.inference.openai.response import Kind, Spell, chat_response, response

__all__ = [
    "ApiRequest",
    "Chunks",
    "Kind",
    "LimitError",
    "Limits",
    "ReadOptions",
    "RequestError",
    "Spell",
    "chat_request",
    "chat_response",
    "completion_request",
    "error_object",
    "parse_body",
    "response",
    "status_of",
]
