"""Several threads of a server prepare prompts at once, with one tokenizer; another one reads their pixels."""

from __future__ import annotations

import threading
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from megatron_vita.data.media.image import read_image
from megatron_vita.data.sample import MediaFile
from megatron_vita.data.text.tokenizer import VitaTokenizer
from megatron_vita.errors import DataError
from megatron_vita.inference.prompt_media import PromptMedia
from tests.data.kit import picture, tokenizer_folder
from tests.inference.tiny import SPEC, question

THREADS = 8


def test_prompts_are_the_same_whatever_is_prepared_beside_them(tmp_path: Path) -> None:
    tokenizer = VitaTokenizer.load(tokenizer_folder(tmp_path / "tokenizer"))
    paths = []
    for number in range(4):
        paths.append(tmp_path / f"{number}.{'png' if number % 2 else 'jpg'}")
        paths[-1].write_bytes(picture(20 + 30 * number, 40, seed=number, kind="PNG" if number % 2 else "JPEG"))
    broken = MediaFile(data=picture(30, 30, seed=9)[:-20], label="cut.png")
    samples = [
        question(f"Which {'digit' * (1 + number % 7)} is \u00e9\U0001f600 {number}?", images=paths[: number % 5])
        for number in range(24)
    ]

    def prepare(number: int) -> tuple[Any, PromptMedia, list[str], str]:
        example, media = PromptMedia.open(samples[number], SPEC, tokenizer=tokenizer)
        text = f"{number} caf\u00e9 \u4f60\u597d " * 20
        texts = [tokenizer.decode(tokenizer.encode(text)), tokenizer.decode(tokenizer.encode(text[: number + 5]))]
        with pytest.raises(DataError) as error:
            read_image(broken)
        return example, media, texts, str(error.value)

    serial = [prepare(number) for number in range(len(samples))]
    fresh = VitaTokenizer.load(tmp_path / "tokenizer")  # whose memory of short texts is empty
    tokenizer, barrier = fresh, threading.Barrier(THREADS)

    def many(thread: int) -> list[tuple[Any, PromptMedia, list[str], str]]:
        barrier.wait(60)
        return [prepare((number + thread) % len(samples)) for number in range(len(samples))]

    with ThreadPoolExecutor(THREADS) as pool:
        together = list(pool.map(many, range(THREADS)))
    for thread, found in enumerate(together):
        for number, (example, media, texts, error) in enumerate(found):
            expected = serial[(number + thread) % len(samples)]
            assert np.array_equal(example.tokens, expected[0].tokens)
            assert (example.tiles, texts, error) == (expected[0].tiles, *expected[2:])
            if thread == number % THREADS and example.tiles:  # pixels are read in this thread
                got, want = (one.tiles(0, len(example.tiles)) for one in (media, expected[1]))
                assert bool((got == want).all())
