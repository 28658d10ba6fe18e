"""Realistic samples as numbers: tokens and tiles of the data mixes that Long-VITA's stages train on.

The shares are those of the datasets that the published stage files list, by their published counts (shares in
per cent of the samples):

    kind        what                                                        stages 1, 2   stages 3, 4
    caption     one picture, a paragraph (LLaVA-ReCap, ALLaVA, ShareGPT4V)           37            16
    vqa         one picture, a few short turns (Cauldron, OneVision, LVIS)           34            15
    several     two to eight pictures of one tile (M4-Instruct)                       3             1
    document    one to four pages (Docmatix)                                          8             4
    text        instructions and mathematics (OpenHermes, MetaMath, Magpie)          11             5
    video       one frame a second of a clip (VideoGPT-plus, ShareGemini; LLaVA-Video)  7         50
    long text   5,000 tokens to the whole sequence (LongAlign, LongCite, ...)         0             8
    book        the pages of a comic, one tile each (Comic-9K)                        0             1

A picture has 1, 3, 5, 7, 9, 10 or 13 tiles, as the aspect ratios of photographs give them; a page (A4) has 7. A video
holds at least one frame and at most what the sequence holds: 61 at 16K, 123 at 32K, 490 at 128K, layout `internvl`.
Texts are lognormal.
"""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

Int64 = npt.NDArray[np.int64]

KINDS = ("caption", "vqa", "several", "document", "text", "video", "long text", "book")
SHARES = {False: (37, 34, 3, 8, 11, 7, 0, 0), True: (16, 15, 1, 4, 5, 50, 8, 1)}
"""By whether it is a long-context stage."""

_TILES = np.array([1, 3, 5, 7, 9, 10, 13])
_TILE_SHARES = (0.2, 0.08, 0.12, 0.22, 0.05, 0.03, 0.3)
_PER_TILE, _PER_FRAME = 256, 264


def samples(number: int, seq_length: int, *, long: bool, seed: int = 0) -> tuple[Int64, Int64]:
    """Tokens and tiles of a realistic mix, in random order.

    Args:
        number: samples.
        seq_length: the longest sample; what would be longer has its frames reduced or its text cut.
        long: the mix of stages 3 and 4 instead of that of stages 1 and 2.
        seed: of the draw.

    Returns:
        (tokens `[number]`, tiles `[number]`).
    """
    rng = np.random.default_rng(seed)
    kind = rng.choice(len(KINDS), number, p=np.array(SHARES[long]) / 100)
    one = rng.choice(_TILES, number, p=_TILE_SHARES)
    pages = np.minimum(rng.geometric(0.55, number), 4) * 7
    several = rng.integers(2, 9, number)
    most = (seq_length - 200) // _PER_FRAME
    seconds = rng.lognormal(np.log(100 if long else 30), 0.8, number).astype(np.int64)
    frames = np.clip(seconds, 1, most)
    book = np.clip(rng.lognormal(np.log(60), 0.7, number).astype(np.int64), 4, most)
    none = np.zeros(number, dtype=np.int64)
    tiles = np.choose(kind, [one, one, several, pages, none, frames, none, book])

    def text(median: float, spread: float) -> npt.NDArray[np.float64]:
        return rng.lognormal(np.log(median), spread, number)

    words = [(200, 0.5), (90, 0.9), (150, 0.8), (350, 0.6), (350, 0.9), (160, 0.8), (14000, 0.8), (700, 0.4)]
    spoken = np.choose(kind, [text(*one) for one in words]).astype(np.int64)
    picture, pictures = tiles * _PER_TILE + 3, tiles * 259
    document, video = tiles * _PER_TILE + tiles // 7 * 3, tiles * _PER_FRAME
    media = np.choose(kind, [picture, picture, pictures, document, none, video, none, pictures])
    return np.clip(media + 20 + spoken, 24, seq_length), tiles.astype(np.int64)
