"""OpenAI's API of completions: bodies of requests and responses, for batch files and servers alike."""

from megatron_vita.inference.openai.chunks import Chunks
from megatron_vita.inference.openai.errors import RequestError, error_object
from megatron_vita.inference.openai.request import ChatRequest, chat_request
from megatron_vita.inference.openai.response import Kind, Spell, chat_response, response

__all__ = [
    "ChatRequest",
    "Chunks",
    "Kind",
    "RequestError",
    "Spell",
    "chat_request",
    "chat_response",
    "error_object",
    "response",
]
