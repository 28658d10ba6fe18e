"""Make MovieNet-Summary of MovieNet's key frames and synopses. (Its own page on the hub is empty.)

    python tools/datasets/movienet.py --keyframes 240P --meta meta.v1.zip --output DIR

Writes DIR/summary.jsonl in Long-VITA's form, and DIR/summary.rejects.jsonl with what is incomplete, and why. In a data
mix: `source: movienet`. Exit status 2 for a usage error, 1 if nothing could be written.

What is known of MovieNet's files, from its documents and from public code that reads them:

* key frames: `movie1K.keyframes.240p.v1.zip` holds a tar for each film, `240P/tt0120338.tar`, that unpacks to a folder
  `tt0120338/` with `shot_0000_img_0.jpg` and so on, three for each shot;
* `meta.v1.zip`: `meta/tt0120338.json`, one JSON object a film, with `imdb_id`, `title` and, for some films, a synopsis.

Not verified: that the synopsis' field is called `synopsis` (`text_fields` takes others), that shots are numbered
without gaps (`gaps` takes films with gaps), and how Long-VITA's authors chose frames and worded the question.
"""

from __future__ import annotations

import argparse
import json
import os
import re
import sys
import zipfile
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

from common import Built, run, write_records

from megatron_vita.data.rejects import reject
from megatron_vita.data.sources.fixes import IMAGE_TAG, VIDEO_TAG
from megatron_vita.data.sources.media_store import open_archive
from megatron_vita.data.sources.media_store.members import REJECTED
from megatron_vita.errors import ConfigError

MOVIE_PROMPT = "These are key frames of a film, in their order. Write its synopsis."
_FRAME = re.compile(r"(?:^|/)shot_(\d+)_img_(\d+)\.(?:jpg|jpeg|png)$")
_FILM = re.compile(r"^tt\d+$")
_MAX_META = 64 << 20
"""Bytes of one film's JSON, at most: they are kilobytes."""


def build_movienet(
    keyframes: Path,
    meta: Path,
    output: Path,
    *,
    form: str = "images",
    most: int = 1024,
    text_fields: Sequence[str] = ("synopsis",),
    gaps: bool = False,
    prompt: str = MOVIE_PROMPT,
) -> Built:
    """Write `summary.jsonl`: a record for each film, its key frames asked for its synopsis.

    Args:
        keyframes: folder of films: a folder (`tt0120338/`) or a tar (`tt0120338.tar`) of key frames each.
        meta: folder of `tt0120338.json`, or the zip of it.
        output: folder to write to. Paths are relative to it if the key frames lie below it, else to `keyframes`.
        form: `images`: the middle key frame of each shot; `video`: the film's folder, to be sampled as a video is.
        most: pictures of a film at most, spread evenly over it (form `images`).
        text_fields: fields of the meta file that may hold the synopsis, the first that does.
        gaps: take films with shots that have no key frame.
        prompt: what the user asks.

    Raises:
        ConfigError: an input is not there or holds no film; an unknown form.
    """
    if form not in ("images", "video") or most < 1:
        raise ConfigError(f"form {form!r}, at most {most} pictures: choose images or video, and at least 1.")
    films = _films(keyframes)
    read_meta = _meta(meta)
    base = output.resolve() if output.resolve() in [keyframes.resolve(), *keyframes.resolve().parents] else keyframes

    def records() -> Iterator[tuple[int, Callable[[], dict[str, Any]]]]:
        for number, (film, place) in enumerate(films.items(), 1):
            yield number, lambda film=film, place=place: record(film, place)  # type: ignore[misc]

    def record(film: str, place: Path) -> dict[str, Any]:
        synopsis = _synopsis(read_meta, film, text_fields)
        shots = _shots(place, film, gaps)
        above = os.path.relpath(keyframes.resolve(), base.resolve())
        folder = film if above == "." else f"{above}/{film}"
        if form == "video":
            return _conversation(VIDEO_TAG, prompt, synopsis, videos=[folder])
        middle = [frames[len(frames) // 2] for frames in shots]
        some = middle if len(middle) <= most else [middle[at * len(middle) // most] for at in range(most)]
        return _conversation(IMAGE_TAG * len(some), prompt, synopsis, images=[f"{folder}/{name}" for name in some])

    return write_records(output, records())


def _conversation(tags: str, prompt: str, answer: str, **media: list[str]) -> dict[str, Any]:
    messages = [{"role": "user", "content": f"{tags}\n{prompt}"}, {"role": "assistant", "content": answer}]
    return {"messages": messages, **media}


def _films(keyframes: Path) -> dict[str, Path]:
    """IMDb id -> the film's folder or tar, in order."""
    if not keyframes.is_dir():
        raise ConfigError(f"{keyframes}: no such folder. Unpack movie1K.keyframes.240p.v1.zip, and name its 240P.")
    places = [place for place in keyframes.iterdir() if place.is_dir() or place.suffix == ".tar"]
    films = {place.name.removesuffix(".tar"): place for place in sorted(places, key=lambda one: one.is_dir())}
    films = {film: films[film] for film in sorted(films) if _FILM.match(film)}
    if not films:
        raise ConfigError(f"{keyframes}: no film (tt0120338 or tt0120338.tar) in it. Name the folder 240P.")
    return films


def _shots(place: Path, film: str, gaps: bool) -> list[list[str]]:
    """Names of the key frames of each shot, relative to the film's folder, both in order."""
    if place.is_dir():
        names = [path.name for path in place.iterdir() if path.is_file()]
    else:
        try:
            members = [member for member in open_archive(place).members() if member.kind not in REJECTED]
        except ConfigError as error:
            raise reject("media_broken", str(error)) from None
        inside = f"{film}/"
        names = [member.name.removeprefix(inside) for member in members if member.name.startswith(inside)]
    shots: dict[int, list[tuple[int, str]]] = {}
    for name in names:
        if (match := _FRAME.search(name)) and "/" not in name:
            shots.setdefault(int(match.group(1)), []).append((int(match.group(2)), name))
    if not shots:
        raise reject("media_missing", f"{film}: no key frame shot_0000_img_0.jpg under {place}.")
    missing = sorted(set(range(max(shots))) - set(shots))
    if missing and not gaps:
        raise reject("media_missing", f"{film}: {len(missing)} shots have no key frame, the first is {missing[0]}.")
    return [[name for _, name in sorted(shots[shot])] for shot in sorted(shots)]


def _meta(meta: Path) -> Callable[[str], bytes | None]:
    """The JSON of a film, by its id."""
    if meta.is_dir():

        def from_folder(film: str) -> bytes | None:
            path = meta / f"{film}.json"
            return path.read_bytes() if path.is_file() and path.stat().st_size <= _MAX_META else None

        return from_folder
    if not zipfile.is_zipfile(meta):
        raise ConfigError(f"{meta}: neither a folder of tt0120338.json nor the zip of one (meta.v1.zip).")
    archive = zipfile.ZipFile(meta)
    entries = {info.filename.rpartition("/")[2]: info for info in archive.infolist()}

    def from_zip(film: str) -> bytes | None:
        info = entries.get(f"{film}.json")
        return archive.read(info) if info is not None and info.file_size <= _MAX_META else None

    return from_zip


def _synopsis(read_meta: Callable[[str], bytes | None], film: str, fields: Sequence[str]) -> str:
    text = read_meta(film)
    if text is None:
        raise reject("no_answer", f"{film}: no meta file {film}.json.")
    try:
        content = json.loads(text.decode("utf-8"))
    except ValueError as error:
        raise reject("bad_json", f"{film}: {error}.") from None
    for name in fields:
        value = content.get(name) if isinstance(content, dict) else None
        if isinstance(value, list):
            value = "\n\n".join(one for one in value if isinstance(one, str))
        if isinstance(value, str) and value.strip():
            return value.strip()
    raise reject("no_answer", f"{film}: no synopsis in {', '.join(fields)}.")


def parser() -> argparse.ArgumentParser:
    """The command line."""
    out = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False
    )
    add = out.add_argument
    add("--keyframes", required=True, type=Path, metavar="240P", help="folder with a folder or tar for each film")
    add("--meta", required=True, type=Path, metavar="ZIP_or_DIR", help="meta.v1.zip, or the folder in it")
    add("--form", choices=("images", "video"), default="images", help="a list of pictures, or the folder as a video")
    add("--max-images", type=int, default=1024, metavar="N", help="pictures of a film at most (form images)")
    add("--text-fields", nargs="+", default=["synopsis"], metavar="NAME", help="fields that may hold the synopsis")
    add("--gaps", action="store_true", help="take films with shots that have no key frame")
    add("--prompt", default=MOVIE_PROMPT, help="what the user asks")
    add("--output", required=True, type=Path, metavar="DIR", help="folder to write to")
    return out


def main(argv: Sequence[str] | None = None) -> int:
    args = parser().parse_args(argv)
    return run(
        lambda: build_movienet(
            args.keyframes,
            args.meta,
            args.output,
            form=args.form,
            most=args.max_images,
            text_fields=args.text_fields,
            gaps=args.gaps,
            prompt=args.prompt,
        ),
        args.output,
    )


if __name__ == "__main__":
    sys.exit(main())
