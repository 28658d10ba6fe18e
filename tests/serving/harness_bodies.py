"""Bodies and headers as lmms-eval 0.7 (`--model openai`) and VLMEvalKit (`run.py --base-url`) send them.

Written from their code: `lmms_eval/protocol.py` and `models/chat/openai.py`; `vlmeval/run.py`, `api/lmdeploy.py`,
`api/openai_sdk.py`, `api/gpt.py` and `api/adapters/internvl3.py` of ms-vlmeval 0.0.20. docs/evaluate.md has them as a
table.
"""

from __future__ import annotations

import base64
from collections.abc import Sequence
from typing import Any

VLMEVALKIT_HEADERS = {"Content-Type": "application/json", "User-Agent": "python-requests/2.34.2", "Accept": "*/*"}


def data_url(content: bytes, media_type: str) -> str:
    return f"data:{media_type};base64,{base64.b64encode(content).decode()}"


def lmms_eval(text: str, pictures: Sequence[bytes], *, model: str = "m", max_tokens: int = 16) -> dict[str, Any]:
    """Pictures, or frames of a video, each a PNG; then the text. Nothing else is ever sent."""
    parts = [{"type": "image_url", "image_url": {"url": data_url(one, "image/png")}} for one in pictures]
    content = [*parts, {"type": "text", "text": text}]
    return {
        "messages": [{"role": "user", "content": content}],
        "model": model,
        "max_tokens": max_tokens,
        "temperature": 0,
    }


def lmms_eval_reasoning(text: str, pictures: Sequence[bytes]) -> dict[str, Any]:
    """The same where the model's name has `o1`, `o3`, `o4` or `gpt-5` in it."""
    body = lmms_eval(text, pictures, model="my-o3-like")
    del body["temperature"], body["max_tokens"]
    return {**body, "response_format": {"type": "text"}, "max_completion_tokens": 5000}


def vlmevalkit(text: str, pictures: Sequence[bytes] = (), *, system: str | None = None, **extra: Any) -> dict[str, Any]:
    """The default: JPEGs with the keys of the data set's items, no limit but 32,768 tokens."""
    parts = [{"type": "image_url", "image_url": {"url": data_url(one, "image/jpeg")}} for one in pictures]
    content = [*parts, {"type": "text", "text": text}]
    messages = [] if system is None else [{"role": "system", "content": system}]
    messages.append({"role": "user", "content": content})
    return {"model": "m", "messages": messages, "n": 1, "max_tokens": 32768, "temperature": 0.0, **extra}


def vlmevalkit_internvl3(text: str, pictures: Sequence[bytes], tiles: int) -> dict[str, Any]:
    """`--custom-prompt internvl3`: pictures first, their places in the text, tiles of each."""
    named = text if len(pictures) != 1 else f"<IMAGE_TOKEN>\n{text}"
    if len(pictures) > 1:
        named = "".join(f"Image-{i + 1}: <IMAGE_TOKEN>\n" for i in range(len(pictures))) + text
    body = vlmevalkit(named, pictures)
    for part in body["messages"][-1]["content"][:-1]:
        part["image_url"]["max_dynamic_patch"] = tiles
    return body


def vlmevalkit_video(text: str, url: str, **extra: Any) -> dict[str, Any]:
    """`--video-llm`: the video whole, as data or, with `--local-media`, as a path."""
    body = vlmevalkit(text, **extra)
    body["messages"][-1]["content"].insert(0, {"type": "video_url", "video_url": {"url": url, "nframes": 8}})
    return body


def vlmevalkit_judge(text: str, picture: bytes) -> dict[str, Any]:
    """Its class GPT4V, which also asks judges: `detail` beside the URL."""
    part = {"type": "image_url", "image_url": {"url": data_url(picture, "image/jpeg"), "detail": "low"}}
    content = [{"type": "text", "text": text}, part]
    return {"model": "m", "messages": [{"role": "user", "content": content}], "temperature": 0, "max_tokens": 2048}
