"""Write the quickstart's data the way publishers do: real pictures in four kinds of files.

The raw material is real and ships with scikit-learn, so nothing is downloaded: 1,797 scans of handwritten digits
(8 x 8 grey levels) and two photographs (a temple, a flower). The text comes from Python's own manual, from
scikit-learn's dataset descriptions and from templates.

    python examples/quickstart/make_data.py --output DIR [--seed N] [--short]

Files, one per habit of publishing that a reader meets in the open datasets:

    split.json                which scans are held out; nothing below marked "train" uses one of them
    text.jsonl                train, text only: prose, repetition, small tables, for language model and tokenizer
    digits.json               train, LLaVA's form: a JSON array, `image` is a path, `<image>` stands in the text
    digits.parquet            train, the_cauldron's form: embedded bytes, several pictures and turns, no placeholder
    photos.json               train, LLaVA's form: crops of the photographs in several aspect ratios, for dynamic tiling
    stage3.jsonl stage4.jsonl train, Long-VITA's `messages` form: videos (MP4), and single pictures
    long_text_stage{3,4}.jsonl  train, `messages` form: a key is stated once in a long text, then asked for
    valid_digits.jsonl        held-out loss during training (never trained on)
    eval_digits.jsonl         every held-out scan as it is
    eval_needle_{8,16,32,64}.jsonl  videos whose every frame is a held-out scan and one is marked (inverted);
                              `frames` and `depth` (0 first frame, 1 last) are there for tables
    eval_long_needle_{64,...,4096}.jsonl  more of these; beyond 64 frames they are longer than any video of training
    eval_frame_number.jsonl   the same kind of video, asked for a frame by its number
    eval_photos.jsonl         crops from the part of each photograph that training never sees

Media paths are relative to DIR. A digit is drawn at 32 x 32 (videos) or
16 x 16 (pictures). Every frame of a video is a key frame at one frame a second, so a reader that seeks and a reader
that plays return the same pictures. The same seed and sizes give the same samples and the same pixels.
"""

from __future__ import annotations

import argparse
import io
import json
import multiprocessing
import os
import re
import sys
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeAlias

import av
import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.parquet as pq
from PIL import Image
from scipy import ndimage

Pixels: TypeAlias = npt.NDArray[np.uint8]
Record: TypeAlias = dict[str, Any]
VideoJob: TypeAlias = tuple[Path, npt.NDArray[np.int64], int]
"""(file to write, which pictures of the stock stand in its frames, which frame is inverted)."""

VIDEO_SIDE = 32
PICTURE_SIDE = 16
TRAINED_FRAMES = 64
"""Of the longest videos to train on."""
ASK_DIGIT = "Which digit is this?"
ASK_MARKED = "Which digit is marked?"
ORDINALS = ("first", "second", "third", "fourth", "fifth", "sixth")


@dataclass(frozen=True, kw_only=True, slots=True)
class Sizes:
    """How many samples of each kind are written."""

    held_out: int = 360
    """Scans that training never sees, equally many of each digit as far as they go."""
    variants: int = 8
    """Augmented drawings of each training scan."""
    pictures: int = 6000
    """Samples of digits.json: one picture, one question."""
    rows: int = 3000
    """Rows of digits.parquet: several pictures, several turns."""
    crops: int = 200
    """Training crops of each photograph."""
    stage3_videos: int = 1500
    stage4_videos: int = 1000
    long_texts: int = 40
    """Samples of each long_text file."""
    needles: tuple[tuple[int, int], ...] = ((8, 60), (16, 60), (32, 60), (64, 500))
    """(frames, videos) of each held-out needle set."""
    long_needles: tuple[tuple[int, int], ...] = (
        (64, 25), (128, 25), (256, 25), (512, 25), (1024, 8), (2048, 6), (4096, 6),
    )  # fmt: skip
    """The same beyond the trained length."""
    frame_numbers: int = 100
    eval_crops: int = 20
    text_passages: int = 6000


SHORT = Sizes(
    variants=3,
    pictures=1000,
    rows=500,
    crops=30,
    stage3_videos=150,
    stage4_videos=60,
    long_texts=20,
    needles=((8, 20), (16, 20), (32, 20), (64, 40)),
    long_needles=((64, 2), (128, 2)),
    frame_numbers=20,
    eval_crops=10,
    text_passages=1200,
)
"""Enough of each kind to walk the whole path in a test; too little to learn the task well."""


# ---------------------------------------------------------------------------------------------------- the digits


@dataclass(frozen=True, slots=True)
class Digits:
    """A stock of drawings: pixels [n, 32, 32], their labels [n], and the scan each was drawn from [n]."""

    pixels: Pixels
    labels: npt.NDArray[np.int64]
    scans: npt.NDArray[np.int64]

    def __len__(self) -> int:
        return len(self.labels)

    def picture(self, index: int, *, marked: bool = False) -> Pixels:
        """The drawing at the size of a single picture, [16, 16]; inverted when marked."""
        pixels = self.pixels[index]
        small = Image.fromarray(pixels).resize((PICTURE_SIDE, PICTURE_SIDE), Image.Resampling.BICUBIC)
        return invert(np.asarray(small)) if marked else np.asarray(small)


def invert(pixels: Pixels) -> Pixels:
    """Dark for light: how a digit is marked."""
    return (255 - pixels).astype(np.uint8)


def split_scans(labels: npt.NDArray[np.int64], held_out: int, rng: np.random.Generator) -> npt.NDArray[np.bool_]:
    """Which scans are held out: `held_out` of them, the ten digits as equal as the number allows.

    Drawn per digit rather than overall, so that no digit is rare among the questions the model is judged by.
    """
    chosen = np.zeros(len(labels), dtype=bool)
    for digit in range(10):
        members = np.flatnonzero(labels == digit)
        share = held_out // 10 + (digit < held_out % 10)
        chosen[rng.permutation(members)[:share]] = True
    return chosen


def draw(
    scan: npt.NDArray[np.float64],
    *,
    angle: float = 0.0,
    slant: float = 0.0,
    scale: float = 1.0,
    shift: tuple[float, float] = (0, 0),
    side: int = VIDEO_SIDE,
) -> Pixels:
    """One scan [8, 8] in 0..16 as a drawing [side, side] in 0..255, turned, slanted, scaled, shifted about its centre.

    `angle` in degrees, `slant` in columns a row, `shift` in pixels of the scan. One affine resampling does all, so the
    strokes are blurred once.
    """
    turn = np.deg2rad(angle)
    rotation = np.array([[np.cos(turn), -np.sin(turn)], [np.sin(turn), np.cos(turn)]])
    matrix = rotation @ np.array([[1.0, 0.0], [slant, 1.0]]) * (scan.shape[0] / side / scale)
    centre_in = (scan.shape[0] - 1) / 2 - np.asarray(shift)
    offset = centre_in - matrix @ np.full(2, (side - 1) / 2)
    drawn = ndimage.affine_transform(scan, matrix, offset, output_shape=(side, side), order=1)
    pixels: Pixels = np.clip(drawn * (255 / 16), 0, 255).astype(np.uint8)
    return pixels


def draw_all(
    scans: npt.NDArray[np.float64],
    labels: npt.NDArray[np.int64],
    which: npt.NDArray[np.int64],
    variants: int,
    rng: np.random.Generator,
) -> Digits:
    """Drawings of the scans `which`: each as it is, then `variants - 1` times changed at random.

    The changes are strong on purpose. The tower soon knows the training scans by heart; if their drawings were easy,
    the later stages, which freeze it, would forget how to read the harder held-out ones.
    """
    pixels, origin = [], []
    for scan in which:
        for variant in range(variants):
            if variant == 0:
                pixels.append(draw(scans[scan]))
            else:
                vertical, horizontal = rng.uniform(-0.9, 0.9, size=2)
                pixels.append(
                    draw(
                        scans[scan],
                        angle=rng.uniform(-16, 16),
                        slant=rng.uniform(-0.2, 0.2),
                        scale=rng.uniform(0.82, 1.2),
                        shift=(vertical, horizontal),
                    )
                )
            origin.append(scan)
    sources = np.asarray(origin, dtype=np.int64)
    return Digits(np.stack(pixels), labels[sources], sources)


# ---------------------------------------------------------------------------------------------------- media files


def encode_picture(pixels: Pixels, kind: str = "PNG") -> bytes:
    """Pixels, [h, w] grey or [h, w, 3], as the bytes of an RGB picture file."""
    buffer = io.BytesIO()
    Image.fromarray(pixels).convert("RGB").save(buffer, kind, **({"quality": 92} if kind == "JPEG" else {}))
    return buffer.getvalue()


def write_bytes(path: Path, content: bytes) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(content)


def encode_video(path: Path, frames: Iterable[Pixels]) -> None:
    """Write grey frames [32, 32] as an H.264 MP4 at one frame a second, every frame a key frame."""
    options = {"crf": "12", "preset": "ultrafast", "x264-params": "keyint=1:threads=1:bframes=0:rc-lookahead=0"}
    with av.open(str(path), "w") as container:
        stream = container.add_stream("libx264", rate=1, options=options)
        stream.width = stream.height = VIDEO_SIDE
        stream.pix_fmt = "yuv420p"
        stream.codec_context.thread_count = 1
        for frame in frames:
            container.mux(stream.encode(av.VideoFrame.from_ndarray(frame, format="gray")))
        container.mux(stream.encode())


_STOCKS: dict[str, Digits] = {}
"""What an encoding process draws frames from; set once per process by `_start_encoder`."""


def _start_encoder(stocks: dict[str, Digits]) -> None:
    _STOCKS.update(stocks)


def _encode_job(job: tuple[str, VideoJob]) -> None:
    stock, (path, indices, marked) = job
    pixels = _STOCKS[stock].pixels
    encode_video(path, (invert(pixels[i]) if k == marked else pixels[i] for k, i in enumerate(indices)))


def encode_videos(jobs: Sequence[tuple[str, VideoJob]], stocks: dict[str, Digits], workers: int) -> None:
    """Encode every job; each is a pure function of its description, so the number of workers changes nothing."""
    for folder in {path.parent for _, (path, _, _) in jobs}:
        folder.mkdir(parents=True, exist_ok=True)
    if workers <= 1:
        _start_encoder(stocks)
        for job in jobs:
            _encode_job(job)
        return
    # spawn, not fork: the codec's threads and NumPy's must not be copied in the middle of their work
    with multiprocessing.get_context("spawn").Pool(workers, _start_encoder, (stocks,)) as pool:
        for _ in pool.imap_unordered(_encode_job, jobs, chunksize=16):
            pass


# ---------------------------------------------------------------------------------------------------- records


def llava(name: str, image: str, turns: Sequence[tuple[str, str]]) -> Record:
    """A record of LLaVA's form with one picture; the placeholder opens the first human turn."""
    conversations = []
    for number, (question, answer) in enumerate(turns):
        conversations.append({"from": "human", "value": ("<image>\n" if number == 0 else "") + question})
        conversations.append({"from": "gpt", "value": answer})
    return {"id": name, "image": image, "conversations": conversations}


def messages(
    turns: Sequence[tuple[str, str]], *, images: Sequence[str] = (), videos: Sequence[str] = (), **more: Any
) -> Record:
    """A record of Long-VITA's form; one placeholder per medium opens the first user turn."""
    opening = "<image>\n" * len(images) + "<video>\n" * len(videos)
    talk = []
    for number, (question, answer) in enumerate(turns):
        talk.append({"role": "user", "content": (opening if number == 0 else "") + question})
        talk.append({"role": "assistant", "content": answer})
    record: Record = {"messages": talk}
    if images:
        record["images"] = list(images)
    if videos:
        record["videos"] = list(videos)
    return record | more


def write_jsonl(path: Path, records: Iterable[Record]) -> None:
    with path.open("w", encoding="utf-8") as file:
        file.writelines(json.dumps(record, ensure_ascii=False) + "\n" for record in records)


# ---------------------------------------------------------------------------------------------------- each file


def write_digits_json(root: Path, stock: Digits, count: int, rng: np.random.Generator) -> list[Record]:
    """digits.json and its pictures; returns the records whose picture is not inverted.

    A quarter of the pictures is inverted: stages 3 and 4 freeze the tower, so it must learn here what a mark looks
    like. Every scan comes up equally often.
    """
    records, plain = [], []
    order = _balanced(len(stock), count, rng)
    for number, index in enumerate(order):
        marked = bool(rng.random() < 0.25)
        name = f"images/{number:06d}.png"
        write_bytes(root / name, encode_picture(stock.picture(index, marked=marked)))
        turns = [(ASK_DIGIT, str(stock.labels[index]))]
        if rng.random() < 0.15:
            turns.append(("Is it marked?", "Yes" if marked else "No"))
        records.append(llava(f"digits/{number:06d}", name, turns))
        if not marked:
            plain.append(records[-1])
    (root / "digits.json").write_text(json.dumps(records, indent=0), encoding="utf-8")
    return plain


def write_digits_parquet(root: Path, stock: Digits, count: int, rng: np.random.Generator) -> None:
    """digits.parquet: two to six pictures a row, of which one is marked, and two or three turns about them."""
    images, texts = [], []
    for _ in range(count):
        many = int(rng.integers(2, len(ORDINALS) + 1))
        indices = rng.integers(0, len(stock), size=many)
        marked = int(rng.integers(many))
        images.append(
            [
                {"bytes": encode_picture(stock.picture(index, marked=place == marked)), "path": None}
                for place, index in enumerate(indices)
            ]
        )
        turns = [(ASK_MARKED, str(stock.labels[indices[marked]]))]
        for place in rng.permutation(many)[: int(rng.integers(1, 3))]:
            turns.append((f"Which digit is in the {ORDINALS[place]} picture?", str(stock.labels[indices[place]])))
        turns = [turns[i] for i in rng.permutation(len(turns))]
        texts.append([{"user": user, "assistant": answer, "source": "digits"} for user, answer in turns])
    image = pa.struct([("bytes", pa.binary()), ("path", pa.string())])
    text = pa.struct([("user", pa.string()), ("assistant", pa.string()), ("source", pa.string())])
    schema = pa.schema([("images", pa.list_(image)), ("texts", pa.list_(text))])
    pq.write_table(
        pa.table({"images": images, "texts": texts}, schema=schema), root / "digits.parquet", row_group_size=500
    )


PHOTOS = (
    ("china.jpg", "temple", "A temple", (215, 20, 420, 420), (20, 20, 215, 420)),
    ("flower.jpg", "flower", "A flower", (305, 60, 560, 370), (60, 60, 305, 370)),
)
"""(file, kind, answer, box of the training crops, box of the held-out crops), boxes as left, top, right, bottom.

The two boxes of a photograph meet in the middle of its subject: both halves show it, and they share no pixel.
"""


def crop_photo(photo: Pixels, box: tuple[int, int, int, int], rng: np.random.Generator) -> Pixels:
    """One crop within `box` of a photograph [h, w, 3], scaled down; its aspect ratio decides how many tiles it has."""
    left, top, right, bottom = box
    aspect = float(rng.choice([0.5, 0.67, 1.0, 1.5, 2.0]))
    tall = int(rng.uniform(0.7, 1.0) * min(bottom - top, (right - left) / aspect))
    wide = int(tall * aspect)
    start, upper = int(rng.integers(left, right - wide + 1)), int(rng.integers(top, bottom - tall + 1))
    piece = Image.fromarray(photo[upper : upper + tall, start : start + wide])
    side = 48 / max(piece.size)
    return np.asarray(piece.resize((round(wide * side), round(tall * side)), Image.Resampling.BICUBIC))


def write_photos(root: Path, crops: int, eval_crops: int, rng: np.random.Generator) -> list[Record]:
    """photos.json and its crops; eval_photos.jsonl with crops of the other part. Returns the records to train on."""
    from sklearn.datasets import load_sample_image

    train, held = [], []
    for file, kind, answer, train_box, held_out_box in PHOTOS:
        photo = load_sample_image(file)
        for number in range(crops + eval_crops):
            held_out = number >= crops
            crop = crop_photo(photo, held_out_box if held_out else train_box, rng)
            name = f"photos/{'eval_' if held_out else ''}{kind}_{number:04d}.jpg"
            write_bytes(root / name, encode_picture(crop, "JPEG"))
            turns = [("Is this a flower or a temple?", answer)]
            if held_out:
                held.append(messages(turns, images=[name]))
            else:
                train.append(llava(f"photos/{kind}_{number:04d}", name, turns))
    train = [train[i] for i in rng.permutation(len(train))]
    (root / "photos.json").write_text(json.dumps(train, indent=0), encoding="utf-8")
    write_jsonl(root / "eval_photos.jsonl", held)
    return train


def plan_stage(
    root: Path,
    stage: int,
    stock: Digits,
    videos: int,
    frames: tuple[int, int],
    pictures: list[Record],
    rng: np.random.Generator,
) -> list[VideoJob]:
    """stageN.jsonl: `videos` videos and up to four times as many single pictures; returns the videos.

    The first question of a video is always for the marked frame; now and then a second turn asks for a frame by its
    number. Few, since so small a model hardly learns to count and its guesses only make the gradient noisy.
    The pictures keep what stage 2 taught from being forgotten. None may be inverted: these stages do not reset at
    document borders, so a neighbour's inverted picture would be a second mark in sight of every later question.
    """
    records, jobs = [], []
    for number in range(videos):
        many = int(rng.integers(frames[0], frames[1] + 1))
        indices = rng.integers(0, len(stock), size=many)
        marked = int(many * rng.random() ** 2)  # early marks, far from the question, are the hard ones
        name = f"videos/stage{stage}_{number:06d}.mp4"
        jobs.append((root / name, indices, marked))
        turns = [(ASK_MARKED, str(stock.labels[indices[marked]]))]
        if rng.random() < 0.15:
            asked = int(rng.integers(many))
            turns.append((f"Which digit is in frame {asked + 1}?", str(stock.labels[indices[asked]])))
        records.append(messages(turns, videos=[name]))
    for index in rng.permutation(len(pictures))[: 4 * videos]:
        talk = pictures[index]["conversations"]
        turns = [(talk[i]["value"].removeprefix("<image>\n"), talk[i + 1]["value"]) for i in range(0, len(talk), 2)]
        records.append(messages(turns, images=[pictures[index]["image"]]))
    write_jsonl(root / f"stage{stage}.jsonl", (records[i] for i in rng.permutation(len(records))))
    return jobs


def plan_needles(
    root: Path, kind: str, stock: Digits, frames: int, videos: int, rng: np.random.Generator
) -> list[VideoJob]:
    """eval_KIND_N.jsonl: each depth equally often, in random order; returns the videos to encode."""
    records, jobs = [], []
    places = rng.permutation(np.arange(videos) * frames // videos)
    for number, marked in enumerate(places):
        indices = rng.integers(0, len(stock), size=frames)
        name = f"videos/{kind}_{frames}_{number:04d}.mp4"
        jobs.append((root / name, indices, int(marked)))
        records.append(
            messages(
                [(ASK_MARKED, str(stock.labels[indices[marked]]))],
                videos=[name],
                frames=frames,
                depth=round(int(marked) / (frames - 1), 4),
            )
        )
    write_jsonl(root / f"eval_{kind}_{frames}.jsonl", records)
    return jobs


def plan_frame_numbers(root: Path, stock: Digits, videos: int, rng: np.random.Generator) -> list[VideoJob]:
    """eval_frame_number.jsonl: 64 frames, one marked as ever, but another question; returns the videos to encode."""
    records, jobs = [], []
    for number in range(videos):
        indices = rng.integers(0, len(stock), size=64)
        marked, asked = (int(place) for place in rng.integers(0, 64, size=2))
        name = f"videos/frame_number_{number:04d}.mp4"
        jobs.append((root / name, indices, marked))
        records.append(
            messages(
                [(f"Which digit is in frame {asked + 1}?", str(stock.labels[indices[asked]]))],
                videos=[name],
                frames=64,
                depth=round(asked / 63, 4),
            )
        )
    write_jsonl(root / "eval_frame_number.jsonl", records)
    return jobs


def write_eval_digits(root: Path, stock: Digits) -> None:
    """eval_digits.jsonl: every held-out scan; valid_digits.jsonl: every third, for the loss during training."""
    records = []
    for index in range(len(stock)):
        name = f"images/eval_{stock.scans[index]:04d}.png"
        write_bytes(root / name, encode_picture(stock.picture(index)))
        records.append(messages([(ASK_DIGIT, str(stock.labels[index]))], images=[name]))
    write_jsonl(root / "eval_digits.jsonl", records)
    write_jsonl(root / "valid_digits.jsonl", records[::3])


# ---------------------------------------------------------------------------------------------------- text


def prose() -> list[str]:
    """Sentences people wrote: Python's manual pages and scikit-learn's descriptions of its data, plain characters."""
    from pydoc_data.topics import topics

    from sklearn import datasets

    described = [
        getattr(datasets, f"load_{name}")().DESCR
        for name in ("digits", "iris", "wine", "diabetes", "breast_cancer", "linnerud")
    ]
    sentences = []
    for text in [*described, *(topics[key] for key in sorted(topics))]:
        for paragraph in re.split(r"\n\s*\n", text):
            flat = " ".join(paragraph.split())
            sentences += [s for s in re.split(r"(?<=[.!?]) ", flat) if 30 <= len(s) <= 160 and s[0].isupper()]
    return sentences


THINGS = ("box", "drawer", "jar", "room", "shelf", "tin", "bag", "locker")
COLOURS = ("red", "blue", "green", "white", "black", "brown", "yellow", "grey")


def _lookup(rng: np.random.Generator) -> list[tuple[str, str]]:
    """A small table in words and questions that are answered by its entries, as turns of one conversation."""
    kind = int(rng.integers(5))
    many = 1 if kind == 0 else int(rng.integers(2, len(ORDINALS) + 1 if kind == 1 else 13))
    values = [str(value) for value in rng.integers(0, 10, size=many)]
    marked = int(rng.integers(many))
    asked = [int(place) for place in rng.permutation(many)[:3]]
    if kind == 0:
        return [(f"{values[0]}\n{ASK_DIGIT}", values[0])]
    if kind == 1:
        table = "\n".join(values)
        turns = [(f"Which digit is in the {ORDINALS[place]} picture?", values[place]) for place in asked]
    elif kind in (2, 3):
        table = "\n".join(f"Frame{i + 1}: {'*' if i == marked else ''}{value}" for i, value in enumerate(values))
        turns = [(f"Which digit is in frame {place + 1}?", values[place]) for place in asked]
        turns.insert(int(rng.integers(len(turns) + 1)), (ASK_MARKED, values[marked]))
    else:
        thing = THINGS[int(rng.integers(len(THINGS)))]
        colours = [COLOURS[i] for i in rng.permutation(len(COLOURS))[:many]]
        table = " ".join(f"The {colour} {thing} holds {value}." for colour, value in zip(colours, values, strict=False))
        turns = [
            (f"What does the {colours[place]} {thing} hold?", values[place]) for place in asked if place < len(colours)
        ] or [(f"What does the {colours[0]} {thing} hold?", values[0])]
    return [(f"{table}\n{turns[0][0]}", turns[0][1]), *turns[1:]]


def write_text(root: Path, sentences: list[str], count: int, rng: np.random.Generator) -> None:
    """text.jsonl: of six samples one passage of prose to go on with, two to repeat, three tables to look things up in.

    The last two kinds make a tiny language model useful later: it learns to fetch what stood earlier and to answer
    with one digit, which is all that stages 2 to 4 ask once the digits are pictures.
    """
    records = []
    for number in range(count):
        start = int(rng.integers(len(sentences) - 2))
        if number % 6 == 0:
            records.append(messages([(f"Go on: {sentences[start]}", " ".join(sentences[start + 1 : start + 3]))]))
        elif number % 6 < 3:
            words = sentences[start].split()
            again = " ".join(words[i] for i in rng.permutation(len(words))[:12])
            records.append(messages([(f"Repeat: {again}", again)]))
        else:
            records.append(messages(_lookup(rng)))
    write_jsonl(root / "text.jsonl", [records[i] for i in rng.permutation(len(records))])


def write_long_text(
    root: Path, stage: int, sentences: list[str], count: int, characters: tuple[int, int], rng: np.random.Generator
) -> None:
    """long_text_stageN.jsonl: prose of some length with one key hidden in it, and the question for the key."""
    records = []
    for _ in range(count):
        text: list[str] = []
        target, length = int(rng.integers(*characters)), 0
        while length < target:
            text.append(sentences[int(rng.integers(len(sentences)))])
            length += len(text[-1])
        colour, key = COLOURS[int(rng.integers(len(COLOURS)))], str(int(rng.integers(10)))
        text.insert(int(rng.integers(len(text) + 1)), f"The key of the {colour} box is {key}.")
        records.append(messages([(" ".join(text) + f"\nWhat is the key of the {colour} box?", key)]))
    write_jsonl(root / f"long_text_stage{stage}.jsonl", records)


def _balanced(stock: int, count: int, rng: np.random.Generator) -> npt.NDArray[np.int64]:
    """`count` indices into a stock, each used once before any is used again, in random order."""
    rounds = [rng.permutation(stock) for _ in range(-(-count // stock))]
    return np.concatenate(rounds)[:count]


# ---------------------------------------------------------------------------------------------------- all of it


def make_data(root: Path, sizes: Sizes, seed: int, workers: int) -> dict[str, int]:
    """Write every file under `root`; returns how many training and held-out scans and videos there are."""
    from sklearn.datasets import load_digits

    bunch = load_digits()
    scans, labels = bunch.images, bunch.target.astype(np.int64)
    # A generator per file: changing the size of one leaves the others as they are.
    generators = [np.random.default_rng(s) for s in np.random.SeedSequence(seed).spawn(16)]
    rngs = iter(generators)
    held_out = split_scans(labels, sizes.held_out, next(rngs))
    train_scans, eval_scans = np.flatnonzero(~held_out), np.flatnonzero(held_out)
    root.mkdir(parents=True, exist_ok=True)
    split = {"seed": seed, "train": train_scans.tolist(), "held_out": eval_scans.tolist()}
    (root / "split.json").write_text(json.dumps(split), encoding="utf-8")

    train = draw_all(scans, labels, train_scans, sizes.variants, next(rngs))
    held = draw_all(scans, labels, eval_scans, 1, next(rngs))

    plain = write_digits_json(root, train, sizes.pictures, next(rngs))
    write_digits_parquet(root, train, sizes.rows, next(rngs))
    photos = write_photos(root, sizes.crops, sizes.eval_crops, next(rngs))
    pictures = plain + photos
    write_eval_digits(root, held)

    jobs: list[tuple[str, VideoJob]] = []
    for stage, videos, frames in ((3, sizes.stage3_videos, (2, 16)), (4, sizes.stage4_videos, (16, TRAINED_FRAMES))):
        jobs += [("train", job) for job in plan_stage(root, stage, train, videos, frames, pictures, next(rngs))]
    rng = next(rngs)
    for frames_each, videos in sizes.needles:
        jobs += [("held", job) for job in plan_needles(root, "needle", held, frames_each, videos, rng)]
    jobs += [("held", job) for job in plan_frame_numbers(root, held, sizes.frame_numbers, next(rngs))]
    for frames_each, videos in sizes.long_needles:
        jobs += [("held", j) for j in plan_needles(root, "long_needle", held, frames_each, videos, generators[-1])]
    encode_videos(jobs, {"train": train, "held": held}, workers)

    sentences = prose()
    write_text(root, sentences, sizes.text_passages, next(rngs))
    rng = next(rngs)
    write_long_text(root, 3, sentences, sizes.long_texts, (300, 800), rng)
    write_long_text(root, 4, sentences, sizes.long_texts, (800, 2400), rng)
    return {"train": len(train_scans), "held_out": len(eval_scans), "videos": len(jobs)}


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        description="Write the quickstart's training and held-out data.", allow_abbrev=False
    )
    parser.add_argument("--output", type=Path, required=True, help="folder to write to")
    parser.add_argument("--seed", type=int, default=1234, help="decides the split, the drawings and the questions")
    parser.add_argument("--short", action="store_true", help="much smaller sets, for a test of the whole path")
    parser.add_argument("--workers", type=int, default=os.cpu_count() or 1, help="processes that encode videos")
    args = parser.parse_args(argv)
    counts = make_data(args.output, SHORT if args.short else Sizes(), args.seed, args.workers)
    print(
        f"wrote {args.output}: {counts['train']} scans to train on, {counts['held_out']} held out, "
        f"{counts['videos']} videos"
    )
    return 0


if __name__ == "__main__":
    sys.exit(main())
