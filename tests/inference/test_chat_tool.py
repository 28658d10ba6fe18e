"""tools/chat.py from end to end, and how it refuses."""

from __future__ import annotations

from pathlib import Path

import pytest

from megatron_vita import checkpoint
from megatron_vita.convert.exporter import export
from megatron_vita.convert.identity import fingerprint
from megatron_vita.data.sample import Image, Text, Video
from megatron_vita.inference.engine import Engine, Output, model_name
from megatron_vita.inference.prompt import Generation, Request
from megatron_vita.inference.sampling_config import GREEDY, SamplingConfig
from tests.data.videos import write_numbered
from tests.inference.tiny import question, save_checkpoint, write_media
from tests.scripts import load_script

CHAT = load_script("tools/chat.py")


@pytest.fixture(scope="module")
def here(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("chat")
    save_checkpoint(folder)
    write_media(folder)
    return folder


def ask(here: Path, *words: str) -> int:
    return CHAT.main(["--model", str(here / "tiny"), "--max-new-tokens", "5", *words])


def test_it_prints_the_engines_answer(here: Path, capsys: pytest.CaptureFixture[str]) -> None:
    engine = Engine.load(here / "tiny")
    image, video = here / "wide.jpg", here / "video.mp4"
    sample = question("Which digit is this?", images=[image], videos=[video])
    (expected,) = engine.generate([sample], max_new_tokens=5)
    assert ask(here, "--image", str(image), "--video", str(video), "Which digit is this?") == 0
    said = capsys.readouterr()
    assert said.out == expected.text.strip() + "\n"
    assert ("cut after 5 tokens" in said.err) == (not expected.finished)


def test_an_exported_folder_answers_as_its_checkpoint(here: Path, capsys: pytest.CaptureFixture[str]) -> None:
    export(here / "tiny", here / "hf", "internvl")
    words = ["--image", str(here / "wide.jpg"), "--video", str(here / "video.mp4"), "Which digit is this?"]
    said = []
    for model in ("tiny", "hf"):
        assert CHAT.main(["--model", str(here / model), "--max-new-tokens", "8", *words]) == 0
        said.append(capsys.readouterr().out)
    assert said[0] == said[1]
    samples = [question("And the answer?", images=[here / "square.png"]), question("the")]
    imported, exported = (Engine.load(here / model) for model in ("tiny", "hf"))
    sampling = SamplingConfig(logprobs=3, prompt_logprobs=3)
    one, other = (engine.generate(samples, max_new_tokens=8, sampling=sampling) for engine in (imported, exported))
    assert one == other, "to the last bit"
    assert model_name(here / "hf") == "hf"
    assert fingerprint(here / "hf") != fingerprint(checkpoint.resolve(here / "tiny"))


class Streams:
    """An engine that gives an answer in these pieces."""

    def __init__(self, pieces: list[str]) -> None:
        self._left = [Output("chat", piece) for piece in pieces]

    @property
    def busy(self) -> bool:
        return bool(self._left)

    def add(self, request: Request) -> None:
        self._left.append(Output(request.id, "", Generation("all", (1,), "stop")))

    def step(self) -> list[Output]:
        return [self._left.pop(0)]


@pytest.mark.parametrize(
    ("pieces", "printed"),
    [
        ([" ", "\n a", " b", "", " \n", "c", " ", "\n"], "a b \nc"),
        (["  "], ""),
        ([], ""),
        (["a"], "a"),
        ([" a b ", "  c"], "a b   c"),
    ],
)
def test_an_answer_is_printed_as_it_comes(pieces: list[str], printed: str, capsys: pytest.CaptureFixture[str]) -> None:
    engine = Streams(pieces)
    answer = CHAT.say(engine, Request("chat", question("the"), GREEDY))
    assert answer.text == "all"
    assert capsys.readouterr().out == printed + "\n"


def test_who_decodes_the_video_is_the_users_to_say(
    here: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    pytest.importorskip("decord")
    open_gop = {"bf": "3", "x264-params": "open-gop=1:keyint=12:scenecut=0"}
    clip = write_numbered(tmp_path / "clip.ts", 60, options=open_gop)
    assert ask(here, "--video", str(clip), "--video-backend", "pyav", "Which?") == 0
    assert ask(here, "--video", str(clip), "--video-backend", "decord", "Which?") == 1
    assert "video_inexact: " in capsys.readouterr().err


def test_a_seed_repeats_a_warm_answer(here: Path, capsys: pytest.CaptureFixture[str]) -> None:
    answers = []
    for seed in ("1", "1", "2"):
        assert ask(here, "--temperature", "2", "--top-k", "50", "--top-p", "0.99", "--seed", seed, "the") == 0
        answers.append(capsys.readouterr().out)
    assert answers[0] == answers[1] != answers[2]


def test_the_last_word_is_the_question(here: Path) -> None:
    args = CHAT.arguments(["--model", "m", "--image", "a.png", "b.png", "What?"])
    assert (args.image, args.question) == (["a.png", "b.png"], "What?")
    args = CHAT.arguments(["--model", "m", "--image", "a.png", "--video", "v.mp4", "What?"])
    assert (args.image, args.video, args.question) == (["a.png"], ["v.mp4"], "What?")
    args = CHAT.arguments(["What?", "--image", "a.png", "b.png", "--model", "m"])
    assert (args.image, args.question) == (["a.png", "b.png"], "What?")
    for missing in (["--model", "m"], ["--model", "m", "--image", "a.png"]):
        with pytest.raises(SystemExit) as usage:
            CHAT.arguments(missing)
        assert usage.value.code == 2


def test_pictures_come_before_videos_before_the_question(here: Path) -> None:
    sample = CHAT.question_sample("What?", [str(here / "wide.jpg")], [str(here / "video.mp4")])
    assert sample.messages[0].parts == (Image(0), Video(0), Text("\nWhat?"))
    sample.check()


def test_clear_errors(here: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    def fails(status: int, says: str, *words: str, model: Path = here / "tiny") -> None:
        assert CHAT.main(["--model", str(model), *words]) == status
        said = capsys.readouterr()
        assert says in said.err
        assert said.err.count("\n") == 1, "one line"
        assert said.out == ""

    fails(2, "gone.png: no such file", "--image", "gone.png", "What?")
    fails(2, "no such folder", "What?", model=tmp_path / "none")
    fails(2, "the question is empty", "  ")
    fails(2, "temperature", "--temperature", "-1", "What?")
    fails(2, "block_size=0", "--block-size", "0", "What?")
    (tmp_path / "fake.png").write_text("no picture")
    fails(1, "fake.png", "--image", str(tmp_path / "fake.png"), "What?")
    (tmp_path / "empty").mkdir()
    fails(2, "neither a finished checkpoint nor a Hugging Face folder", "What?", model=tmp_path / "empty")
    text = save_checkpoint(tmp_path, vision=False, name="text")
    capsys.readouterr()
    fails(2, "text-only", "--image", str(here / "wide.jpg"), "What?", model=text)
