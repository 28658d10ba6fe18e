"""The memory that a request of thousands of pictures takes beside its body."""

from __future__ import annotations

import base64
import tracemalloc
from pathlib import Path

from megatron_vita.data.sample import Sample
from megatron_vita.data.spec import PreprocessSpec
from megatron_vita.data.text.tokenizer import VitaTokenizer
from megatron_vita.inference.openai import Limits, ReadOptions, chat_request, parse_body
from megatron_vita.inference.prompt_media import PromptMedia
from tests.data.kit import picture, tokenizer_folder

FRAMES = 256
SPEC = PreprocessSpec(image_size=16, patch_size=4, max_tiles=1)


def jpeg(number: int, size: int) -> bytes:
    """A picture of 16 x 16 pixels, made larger by comments, whose content no other has."""
    plain = picture(16, 16, seed=1, kind="JPEG")
    comment = number.to_bytes(4, "big") * (size // 4)
    return plain[:2] + b"\xff\xfe" + (len(comment) + 2).to_bytes(2, "big") + comment + plain[2:]


def test_a_request_of_many_frames_takes_its_media_once_beside_the_body(tmp_path: Path) -> None:
    """Media are three quarters of the body; what comes to them is so little for each that 4,096 frames stay under 2 GiB
    beside the largest body that is allowed."""
    tokenizer = VitaTokenizer.load(tokenizer_folder(tmp_path))
    url = '{"type": "image_url", "image_url": {"url": "data:image/jpeg;base64,%s"}}'
    frames = (url % base64.b64encode(jpeg(number, 20_000)).decode() for number in range(FRAMES))
    raw = "".join(
        (
            '{"messages": [{"role": "user", "content": [',
            *(f"{frame}," for frame in frames),
            '{"type": "text", "text": "What?"}]}]}',
        )
    ).encode()
    size = len(raw)
    options = ReadOptions(strict=False, limits=Limits())
    tracemalloc.start()
    try:
        body = parse_body(raw)
        request = chat_request(body, id="r", options=options).requests[0]
        assert isinstance(request.sample, Sample)
        example, media = PromptMedia.open(request.sample, SPEC, tokenizer=tokenizer, limits=options.limits)
        media.digests()
        _, peak = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    assert len(example.tiles) == FRAMES
    beside = peak - 3 * size // 4
    assert beside < size // 4, f"{beside} bytes beside the media, of a body of {size}: media are there twice"
    assert 3 * Limits().body_bytes // 4 + beside * 4096 // FRAMES < 2 << 30
