"""OpenAI's chat completions API: bodies of requests and responses, for batch files and servers alike."""

from megatron_vita.inference.openai.errors import RequestError, error_object
from megatron_vita.inference.openai.request import ChatRequest, chat_request
from megatron_vita.inference.openai.response import chat_response

__all__ = ["ChatRequest", "RequestError", "chat_request", "chat_response", "error_object"]
