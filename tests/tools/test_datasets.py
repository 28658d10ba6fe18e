"""MovieNet-Summary and Comic-9K, made from what is published of them."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from comic9k import build_comic
from movienet import build_movienet

from megatron_vita.data.sample import Sample
from megatron_vita.data.sources import load_mix, record_to_sample
from megatron_vita.data.sources.media_store.store import open_store
from megatron_vita.errors import ConfigError
from tests.data.fixtures_kit import dot, jpg, messages, put, put_split, put_tar, put_zip, tar_bytes, turns
from tests.scripts import load_script

FILMS = [f"tt000000{number}" for number in range(1, 8)]


def film_frames(film: str, shots: list[int]) -> dict[str, bytes]:
    seed = int(film[-1]) * 30
    return {
        f"{film}/shot_{shot:04}_img_{image}.jpg": jpg(seed + 3 * shot + image) for shot in shots for image in range(3)
    }


@pytest.fixture
def movienet(tmp_path: Path) -> Path:
    """Two films as a folder and a tar, and five that cannot be used."""
    frames = tmp_path / "movienet/240P"
    for name, data in film_frames(FILMS[0], [0, 1, 2, 3, 4]).items():
        put(frames / name, data)
    for film, shots in zip(FILMS[1:6], ([0, 1], [0, 2], [0], [0], [0]), strict=True):
        put_tar(frames / f"{film}.tar", film_frames(film, shots))
    put_tar(frames / f"{FILMS[6]}.tar", {f"{FILMS[6]}/poster.jpg": jpg(1)})
    put(frames / "README.txt", b"no film")
    told: dict[str, Any] = {film: {"imdb_id": film, "synopsis": f"Of {film}."} for film in FILMS}
    told[FILMS[1]]["synopsis"] = ["First.", "Then."]
    told[FILMS[3]] = {"overview": "Short."}
    members = {f"meta/{film}.json": json.dumps(one).encode() for film, one in told.items() if film != FILMS[5]}
    members[f"meta/{FILMS[4]}.json"] = b"{"
    put_zip(tmp_path / "movienet/meta.v1.zip", members)
    return tmp_path / "movienet"


def samples(folder: Path, source: str, work: Path) -> list[Sample]:
    (folder / "mix.yaml").write_text(
        json.dumps({"dataset": {"one": {"source": source, "data_paths": [str(folder / "summary.jsonl")]}}})
    )
    (file,) = load_mix(folder / "mix.yaml")
    reader, store = file.reader(work), open_store(file.media, work)
    made = [
        record_to_sample(record, file.row, store=store, source="s", line=line)[0]
        for line, record in reader.read(reader.index())
    ]
    assert all(isinstance(one, Sample) for one in made)
    return made  # type: ignore[return-value]


def rejected(folder: Path) -> list[tuple[int, str]]:
    lines = (folder / "summary.rejects.jsonl").read_text().splitlines()
    return [(one["line"], one["code"]) for one in map(json.loads, lines)]


def test_movienet_as_pictures(movienet: Path, tmp_path: Path) -> None:
    built = build_movienet(movienet / "240P", movienet / "meta.v1.zip", movienet, most=3, prompt="Tell.")
    assert (built.read, built.written, built.images) == (7, 2, 5)
    assert built.read == built.written + built.rejected.total()
    assert rejected(movienet) == [
        (3, "media_missing"), (4, "no_answer"), (5, "bad_json"), (6, "no_answer"), (7, "media_missing"),
    ]  # fmt: skip
    records = [json.loads(line) for line in (movienet / "summary.jsonl").read_text().splitlines()]
    assert records[0] == {
        "messages": [
            {"role": "user", "content": "<image><image><image>\nTell."},
            {"role": "assistant", "content": "Of tt0000001."},
        ],
        "images": [f"240P/tt0000001/shot_{shot:04}_img_1.jpg" for shot in (0, 1, 3)],
    }
    assert records[1]["messages"][1]["content"] == "First.\n\nThen."
    one, other = samples(movienet, "movienet", tmp_path / "work")
    assert len(one.images) == 3
    assert Path(str(one.images[0].path)).read_bytes() == jpg(30 + 1)
    place = other.images[1]
    assert Path(str(place.path)).read_bytes()[place.offset :][: place.size] == jpg(60 + 3 + 1)


def test_movienet_as_videos(movienet: Path, tmp_path: Path) -> None:
    output = tmp_path / "elsewhere"
    built = build_movienet(
        movienet / "240P",
        movienet / "meta.v1.zip",
        output,
        form="video",
        gaps=True,
        text_fields=["synopsis", "overview"],
    )
    assert (built.written, built.images, dict(built.rejected)) == (
        4, 0, {"bad_json": 1, "no_answer": 1, "media_missing": 1},
    )  # fmt: skip
    records = [json.loads(line) for line in (output / "summary.jsonl").read_text().splitlines()]
    assert [record["videos"] for record in records] == [[film] for film in FILMS[:4]]
    (movienet / "240P/summary.jsonl").write_bytes((output / "summary.jsonl").read_bytes())
    made = samples(movienet / "240P", "movienet", tmp_path / "work")
    assert [len(one.videos) for one in made] == [1] * 4


def test_movienet_inputs_that_are_none(movienet: Path, tmp_path: Path) -> None:
    for keyframes, meta, complaint in (
        (tmp_path / "none", movienet / "meta.v1.zip", "no such folder"),
        (tmp_path, movienet / "meta.v1.zip", "no film"),
        (movienet / "240P", movienet / "240P/README.txt", "neither a folder"),
    ):
        with pytest.raises(ConfigError, match=complaint):
            build_movienet(keyframes, meta, tmp_path / "out")
    with pytest.raises(ConfigError, match="form"):
        build_movienet(movienet / "240P", movienet / "meta.v1.zip", tmp_path / "out", form="frames")


@pytest.fixture
def comic(tmp_path: Path) -> Path:
    """Four parts of a tar, and a summary whose paths begin otherwise."""
    root = tmp_path / "Comic-9K"
    pages = {f"./images/{book}/{n:03}.png": dot(20 * ord(book) + n) for book in "abc" for n in range(12)}
    pages |= {"images/x/a/001.png": dot(1)}
    put_split(root / "images.tar.gz", tar_bytes(pages, "gz"), ("aa", "ab", "ac", "ad"))

    def book(name: str, count: int, question: str, answer: str = "A robot.") -> dict[str, Any]:
        names = [f"Comic/images/{name}/{n:03}.png" for n in range(count)]
        return {"messages": messages(question, answer), "images": names}

    tags = "<image>" * 12
    records = [
        book("a", 12, f"{tags}\nSummarise."),
        {"conversations": turns("Summarise.", "A robot."), "images": book("b", 12, "")["images"][::-1]},
        book("c", 12, "Summarise."),
        book("c", 13, "Summarise."),
        book("c", 12, "<image> Summarise."),
        book("c", 12, "Summarise.", " "),
        {"messages": messages("q", "a"), "images": None},
        {"messages": messages("q", "a"), "images": ["../images/a/001.png"]},
        {"messages": messages("q", "a"), "images": ["a/001.png"]},
        {"messages": [{"role": "tool", "content": "q"}, *messages("q", "a")], "images": ["images/a/001.png"]},
    ]
    put(root / "summary.jsonl", b"".join(json.dumps(one).encode() + b"\n" for one in records) + b"{oops\n")
    return root


def test_comic9k_from_its_parts(comic: Path, tmp_path: Path) -> None:
    output = tmp_path / "built"
    built = build_comic(comic / "summary.jsonl", comic / "images.tar.gz.aa", output)
    assert (built.read, built.written, built.images, built.unsorted) == (11, 3, 36, 1)
    assert built.read == built.written + built.rejected.total()
    assert rejected(output) == [
        (4, "media_missing"), (5, "media_count"), (6, "no_answer"), (7, "media_missing"), (8, "path_escape"),
        (9, "media_ambiguous"), (10, "bad_role"), (11, "bad_json"),
    ]  # fmt: skip
    made = samples(output, "comic9k", tmp_path / "work")
    assert [len(one.images) for one in made] == [12, 12, 12]
    for sample, book, order in zip(made, "abc", (1, -1, 1), strict=True):
        for image, n in zip(sample.images, range(12)[::order], strict=True):
            assert Path(str(image.path)).read_bytes()[image.offset :][: image.size] == dot(20 * ord(book) + n)
    stamp = (output / "images.tar").stat().st_mtime_ns
    assert build_comic(comic / "summary.jsonl", comic / "images.tar.gz.aa", output).written == 3
    assert (output / "images.tar").stat().st_mtime_ns == stamp


def test_comic9k_inputs_that_are_none(comic: Path, tmp_path: Path) -> None:
    for summary, pages, output, complaint in (
        (tmp_path / "none", comic / "images.tar.gz.aa", tmp_path, "no such file"),
        (comic / "summary.jsonl", tmp_path / "none", tmp_path, "no such archive"),
        (comic / "summary.jsonl", comic / "images.tar.gz.aa", comic, "own folder"),
    ):
        with pytest.raises(ConfigError, match=complaint):
            build_comic(summary, pages, output)
    (comic / "images.tar.gz.ab").unlink()
    with pytest.raises(ConfigError, match="missing"):
        build_comic(comic / "summary.jsonl", comic / "images.tar.gz.aa", tmp_path / "built")
    assert not (tmp_path / "built/summary.jsonl").exists()


def test_the_command(comic: Path, movienet: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    comic9k, films = load_script("tools/datasets/comic9k.py"), load_script("tools/datasets/movienet.py")
    pages = ["--pages", str(comic / "images.tar.gz.aa")]
    assert comic9k.main(["--summary", str(comic / "summary.jsonl"), *pages, "--output", f"{tmp_path}/c"]) == 0
    out = capsys.readouterr().out
    assert "1 book has pages out of the order" in out
    assert f"wrote {tmp_path}/c/summary.jsonl: 3 of 11 records, 36 pictures; rejected: 1 bad_json, 1 bad_role" in out
    given = ["--keyframes", f"{movienet}/240P", "--output", f"{tmp_path}/m", "--meta"]
    assert films.main([*given, f"{movienet}/meta.v1.zip"]) == 0
    assert films.main([*given, f"{movienet}/none.zip"]) == 2
    assert films.main([*given, f"{movienet}/meta.v1.zip", "--text-fields", "plot"]) == 1
