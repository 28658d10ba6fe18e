"""An answer on disk is used again only while all that decides it is the same; each factor is changed in turn."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Callable
from dataclasses import replace
from importlib import metadata
from pathlib import Path
from typing import Any

import pytest

from megatron_vita.checkpoint.integrity import INTEGRITY_FILE, Integrity, write_integrity
from megatron_vita.convert.exporter import export
from megatron_vita.data.sample import MediaFile, Message, Sample, Text, Video
from megatron_vita.errors import DataError
from megatron_vita.evaluation import evaluate as module
from megatron_vita.evaluation.evaluate import EvalSettings, evaluate
from megatron_vita.evaluation.question_key import QuestionKeys
from megatron_vita.evaluation.questions import Question
from megatron_vita.evaluation.tasks import Score
from megatron_vita.inference import answer_key
from megatron_vita.inference.prepare import Preparation
from megatron_vita.inference.prompt import Request
from megatron_vita.inference.sampling import SamplingConfig
from megatron_vita.inference.settings import EngineSettings
from tests.data.kit import picture
from tests.inference.tiny import save_checkpoint, write_media

SHORT = EvalSettings(max_new_tokens=2)
OTHER = EngineSettings(block_size=8, chunked_prefill_size=32, max_num_seqs=2, enable_prefix_caching=True)
QUESTIONS: list[dict[str, Any]] = [
    {"content": "Which digit?"},
    {"content": "<image>\nWhich digit?", "images": ["square.png"]},
    {"content": "<image>\nAnd this?", "images": ["wide.jpg"]},
    {"content": "<video>\nWhich three?", "videos": ["video.mp4"]},
]


def _write(path: Path, questions: list[dict[str, Any]]) -> None:
    lines = []
    for one in questions:
        talk = [{"role": "user", "content": one["content"]}, {"role": "assistant", "content": one.get("answer", "7")}]
        lines.append(json.dumps({"messages": talk, **{k: v for k, v in one.items() if k not in ("content", "answer")}}))
    path.write_text("\n".join(lines) + "\n")


def _replace(path: Path, content: bytes) -> None:
    """Other bytes of the same number under the same times."""
    before = path.stat()
    path.write_bytes(content[: before.st_size].ljust(before.st_size, b"\0"))
    os.utime(path, ns=(before.st_atime_ns, before.st_mtime_ns))


def _edit(path: Path, old: str, new: str) -> None:
    text = path.read_text()
    assert old in text, (path, old)
    path.write_text(text.replace(old, new))


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A checkpoint, the same model as a Hugging Face folder, media and questions."""
    folder = tmp_path_factory.mktemp("made")
    export(save_checkpoint(folder), folder / "hf", "internvl")
    write_media(folder)
    _write(folder / "q.jsonl", QUESTIONS)
    return folder


class Place:
    """A copy that a test may change, and how many questions it takes to bring its results up to date."""

    def __init__(self, folder: Path, seen: list[Sample]) -> None:
        self.folder = folder
        self._seen = seen

    def asked(self, model: str = "tiny", settings: EvalSettings = SHORT, **more: Any) -> int:
        before = len(self._seen)
        evaluate([str(self.folder / model)], [str(self.folder / "q.jsonl")], self.folder / "out", settings, **more)
        return len(self._seen) - before

    def results(self) -> list[dict[str, Any]]:
        return [json.loads(line) for line in (self.folder / "out/results.jsonl").read_text().splitlines()]


@pytest.fixture
def place(made: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Place:
    shutil.copytree(made, tmp_path / "copy")
    seen: list[Sample] = []
    plain = Preparation.__call__

    def prepare(self: Preparation, request: Request) -> Any:
        seen.append(request.sample)
        return plain(self, request)

    monkeypatch.setattr(Preparation, "__call__", prepare)
    return Place(tmp_path / "copy", seen)


def _weights(place: Place) -> None:
    file = next((place.folder / "hf").glob("*.safetensors"))
    content = file.read_bytes()
    _replace(file, content[:-4] + bytes([content[-4] ^ 1]) + content[-3:])  # the last bit of a number


def _other_checkpoint(place: Place) -> None:
    shutil.rmtree(place.folder / "tiny")
    save_checkpoint(place.folder, seed=5)


def _tokenizer(place: Place) -> None:
    """Another way to merge, in a checkpoint that was written so: one that was changed is refused."""
    (file,) = place.folder.glob("tiny/iter_*/tokenizer/tokenizer.json")
    folder = file.parents[1]
    files = Integrity.read(folder).files
    _edit(file, '"ignore_merges":false', '"ignore_merges":true ')
    (folder / INTEGRITY_FILE).unlink()
    write_integrity(folder, {name: one["pieces"] for name, one in files.items() if "pieces" in one})


@pytest.mark.slow
@pytest.mark.parametrize(
    ("model", "change"),
    [
        ("hf", _weights),
        ("tiny", _other_checkpoint),
        ("tiny", _tokenizer),
        ("hf", lambda p: _edit(p.folder / "hf/chat_template.jinja", "{%- if add_", "{#- now -#}{%- if add_")),
        ("hf", lambda p: (p.folder / "hf/chat_template.jinja").unlink()),
        ("hf", lambda p: _edit(p.folder / "hf/preprocessor_config.json", '"max_patches": 6', '"max_patches": 1')),
        ("hf", lambda p: _edit(p.folder / "hf/megatron_vita.json", '"max_frames": 8', '"max_frames": 2')),
        ("hf", lambda p: _edit(p.folder / "hf/config.json", '"rms_norm_eps": 1e-06', '"rms_norm_eps": 1e-05')),
    ],
    ids=["weights", "checkpoint", "tokenizer", "template", "no template", "tiles", "frames", "settings"],
)
def test_what_belongs_to_the_model(model: str, change: Callable[[Place], None], place: Place) -> None:
    assert place.asked(model) == 4
    assert place.asked(model) == 0
    change(place)
    assert place.asked(model) == 4
    assert len(place.results()) == 4


@pytest.mark.slow
@pytest.mark.parametrize(
    "settings",
    [
        EvalSettings(max_new_tokens=3),
        EvalSettings(max_new_tokens=2, sampling=SamplingConfig(temperature=0.5)),
        EvalSettings(max_new_tokens=2, sampling=SamplingConfig(top_k=3)),
        EvalSettings(max_new_tokens=2, sampling=SamplingConfig(top_p=0.5)),
        EvalSettings(max_new_tokens=2, sampling=SamplingConfig(seed=9)),
        EvalSettings(max_new_tokens=2, video_backend="decord"),
    ],
    ids=["length", "temperature", "top k", "top p", "seed", "decoder"],
)
def test_how_answers_are_generated(settings: EvalSettings, place: Place) -> None:
    assert place.asked() == 4
    assert place.asked(settings=settings) == 4
    assert place.asked(settings=settings) == 0
    assert len(place.results()) == 4


def test_another_judge(place: Place, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(module.TASKS, "always", lambda answer, question: Score(1.0))  # type: ignore[arg-type]
    assert place.asked() == 4
    assert place.asked(settings=EvalSettings(max_new_tokens=2, task="always")) == 4


@pytest.mark.slow
@pytest.mark.parametrize(
    ("number", "changes"),
    [
        (0, {"content": "Which digits?"}),
        (0, {"answer": "8"}),
        (0, {"depth": 0.5}),
        (1, {"images": ["wide.jpg"]}),
        (2, {"content": "And this?\n<image>"}),
        (3, {"content": "<video>\nWhich four?"}),
    ],
    ids=str,
)
def test_a_question_that_changes_is_asked_alone(number: int, changes: dict[str, Any], place: Place) -> None:
    assert place.asked() == 4
    questions = [dict(one) for one in QUESTIONS]
    questions[number] |= changes
    _write(place.folder / "q.jsonl", questions)
    assert place.asked() == 1
    assert sorted(one["line"] for one in place.results()) == [1, 2, 3, 4]


@pytest.mark.slow
@pytest.mark.parametrize("name", ["square.png", "wide.jpg", "video.mp4"])
def test_a_medium_that_changes_under_its_name(name: str, place: Place) -> None:
    """Of the same size and time: only its bytes tell."""
    path = place.folder / name
    fresh = picture(16, 16, seed=8) if name == "square.png" else picture(60, 22, seed=8, kind="JPEG")
    room = b"\0" * 500
    content = path.read_bytes() + room if name == "video.mp4" else (path.read_bytes()).ljust(len(fresh) + 500, b"\0")
    path.write_bytes(content)
    assert place.asked() == 4
    if name == "video.mp4":
        fresh = content[:-1] + b"\1"
    _replace(path, fresh)
    assert place.asked() == 1


@pytest.mark.slow
def test_questions_that_come_go_and_move(place: Place) -> None:
    assert place.asked() == 4
    more = [*QUESTIONS, {"content": "One more?"}]
    _write(place.folder / "q.jsonl", more)
    assert place.asked() == 1, "what stands before keeps its answers"
    _write(place.folder / "q.jsonl", [more[1], more[0], more[2]])
    assert place.asked() == 2
    assert [one["line"] for one in sorted(place.results(), key=lambda one: one["line"])] == [1, 2, 3]
    _write(place.folder / "q.jsonl", [more[1], more[0], more[3]])
    assert place.asked(limit=1) == 0
    assert [one["line"] for one in place.results()] == [1, 2], "beyond the limit, too, only what holds is counted"


def test_what_decides_nothing(place: Place) -> None:
    """Times, places of media that came along, notes for people, how the engine is laid out."""
    assert place.asked("hf") == 4
    for path in place.folder.rglob("*"):
        os.utime(path)
    (place.folder / "hf/README.md").write_text("Now better explained.")
    moved = place.folder / "media"
    moved.mkdir()
    for name in ("square.png", "wide.jpg", "video.mp4"):
        (place.folder / name).rename(moved / name)
    assert place.asked("hf", EvalSettings(max_new_tokens=2, engine=OTHER), media_root=moved) == 0


@pytest.mark.slow
@pytest.mark.parametrize("package", ["av", "decord", "pillow", "torch", "tokenizers"])
def test_what_decodes_and_computes(package: str, place: Place, monkeypatch: pytest.MonkeyPatch) -> None:
    assert place.asked() == 4
    plain = metadata.version
    monkeypatch.setattr(metadata, "version", lambda name: "99.0" if name == package else plain(name))
    assert place.asked() == 4


@pytest.mark.slow
@pytest.mark.parametrize("name", ["__version__", "_FORMAT"])
def test_another_package(name: str, place: Place, monkeypatch: pytest.MonkeyPatch) -> None:
    assert place.asked() == 4
    monkeypatch.setattr(answer_key, name, "99")
    assert place.asked() == 4


@pytest.mark.slow
def test_what_could_not_be_read_is_tried_again(place: Place, monkeypatch: pytest.MonkeyPatch) -> None:
    good = (place.folder / "square.png").read_bytes()
    (place.folder / "square.png").write_bytes(b"broken")
    assert place.asked() == 4
    assert [one["verdict"] for one in place.results()].count("unreadable") == 1
    assert place.asked() == 1, "and only that"
    assert sorted(one["line"] for one in place.results()) == [1, 2, 3, 4], "still unreadable, counted once"
    (row,) = json.loads((place.folder / "out/summary.json").read_text())
    assert (row["count"], row["unreadable"]) == (4, 1)
    (place.folder / "square.png").write_bytes(good)
    assert place.asked() == 1
    assert place.asked() == 0
    (row,) = json.loads((place.folder / "out/summary.json").read_text())
    assert (row["count"], row["unreadable"]) == (4, 0)


def test_a_medium_that_was_only_out_of_reach_is_tried_again(place: Place, monkeypatch: pytest.MonkeyPatch) -> None:
    """Not a byte of it changes: a network file system was away."""
    kept = Preparation.__call__

    def prepare(self: Preparation, request: Request) -> Any:
        if request.sample.images and request.sample.images[0].name.endswith("square.png"):
            raise DataError("media_missing: away for a moment")
        return kept(self, request)

    monkeypatch.setattr(Preparation, "__call__", prepare)
    place.asked()
    monkeypatch.setattr(Preparation, "__call__", kept)
    assert [one["verdict"] for one in place.results()].count("unreadable") == 1
    assert place.asked() == 1
    assert [one["verdict"] for one in place.results()].count("unreadable") == 0


def test_a_folder_of_frames_is_its_pictures_and_their_rate(tmp_path: Path) -> None:
    """Wherever it lies, and however it is called."""
    for name in ("here", "there"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "1.png").write_bytes(picture(16, 16, seed=1))

    def key(*files: MediaFile) -> str:
        talk = (Message("user", (Text("Which?"), *(Video(number) for number in range(len(files))))),)
        return keys.key(Question(Sample(talk, videos=files), "7", 1, {}))

    keys = QuestionKeys()
    here, there = (MediaFile(path=str(tmp_path / name)) for name in ("here", "there"))
    frames = MediaFile(frames=(MediaFile(path=str(tmp_path / "here/1.png")),))
    assert key(here) == key(there)
    for file in (here, frames):
        for other in ({"frame_rate": 2.0}, {"start": 1.0}, {"end": 2.0}):
            assert key(file) != key(replace(file, **other)), "other frames are sampled of it"  # type: ignore[arg-type]
    before = key(here)
    (tmp_path / "here/2.png").write_bytes(picture(16, 16, seed=2))
    keys = QuestionKeys()
    assert key(here) != before


def test_digests_of_media_are_kept_while_their_files_are_the_same(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    read: list[str] = []
    plain = answer_key._content

    def content(file: MediaFile) -> str:
        read.append(str(file.path))
        return plain(file)

    def key() -> str:
        talk = (Message("user", (Text("Which?"), Video(0))),)
        question = Question(Sample(talk, videos=(MediaFile(path=str(film)),)), "7", 1, {})
        return QuestionKeys(tmp_path / "media/digests.jsonl").key(question)

    monkeypatch.setattr(answer_key, "_content", content)
    film = tmp_path / "film.mp4"
    film.write_bytes(b"one")
    first = key()
    with (tmp_path / "media/digests.jsonl").open("a") as torn:
        torn.write('["film.mp4", 3')
    assert (key(), len(read)) == (first, 1), "read once"
    times = film.stat().st_atime_ns, film.stat().st_mtime_ns
    for number, text in enumerate((b"two", b"one"), 2):
        (tmp_path / "copy").write_bytes(text)
        os.utime(tmp_path / "copy", ns=times)
        os.replace(tmp_path / "copy", film)
        assert (key() == first, len(read)) == (text == b"one", number), "another file of the same size and time"
    film.unlink()
    assert key() != first, "one that is missing has a digest, too"
