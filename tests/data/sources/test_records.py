"""Records: media under any of the field's names are read, marks are kept, and what nothing reads rejects the record."""

from __future__ import annotations

import base64
import itertools
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from megatron_vita.data.rejects import CODES
from megatron_vita.data.sample import Document, Sample
from megatron_vita.data.sources import detect_row, load_table, record_to_sample
from megatron_vita.data.sources import fields as names
from megatron_vita.data.sources.media_store.store import MediaRule, open_store
from megatron_vita.data.sources.to_sample import Changes
from megatron_vita.errors import DataError
from tests.data.fixtures_kit import messages, turns
from tests.data.kit import picture
from tests.data.sources.test_datasets import shown

PNG = picture(4, 4)
BASE64 = base64.b64encode(PNG).decode()


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("root")
    for name in ("a.png", "b.png", "c.png", "v.mp4", "w.mp4"):
        (folder / name).write_bytes(name.encode())
    return folder


def convert(record: Any, root: Path, row: str | None = None, **fields: Any) -> tuple[Sample | Document, Changes]:
    chosen = load_table()[row] if row else detect_row(record, "test")
    if fields:
        chosen = type(chosen)(**{**{f: getattr(chosen, f) for f in chosen.__dataclass_fields__}, "fields": fields})
    return record_to_sample(record, chosen, store=open_store(MediaRule(root=root)), source="s", line=1)


def outcome(record: Any, root: Path, row: str | None = None, **fields: Any) -> Any:
    """(question, pictures, videos) of a record, or the code it is rejected with."""
    try:
        sample = convert(record, root, row, **fields)[0]
        if isinstance(sample, Sample):
            sample.check()  # what a template without a place for calls and reasoning does
        good = shown(sample)
    except DataError as error:
        return str(error).partition(":")[0]
    return good.turns[0][1], good.images, good.videos


def asked(question: str = "<image>\nq", turn: dict[str, Any] | None = None, **record: Any) -> dict[str, Any]:
    first, second = turns(question, "a")
    return {**record, "conversations": [{**first, **(turn or {})}, second]}


def spoken(*contents: Any, **record: Any) -> dict[str, Any]:
    return {**record, "messages": messages(*contents)}


# ------------------------------------------------------------------------------------------------ names of media

A, B, V = b"a.png", b"b.png", b"v.mp4"


def spellings(name: str) -> set[str]:
    words = name.split("_")
    camel = words[0] + "".join(word.title() for word in words[1:])
    return {name, name.upper(), name.title(), camel, name.replace("_", "-"), name.replace("_", " ")}


@pytest.mark.slow
@pytest.mark.parametrize("row", ["llava", "sharegpt", "openai", "long_vita", "alpaca", "pair", "long_context_qa"])
@pytest.mark.parametrize("kind", ["image", "video"])
def test_media_under_every_known_name_are_read(root: Path, row: str, kind: str) -> None:
    path, wanted = ("a.png", ([A], [])) if kind == "image" else ("v.mp4", ([], [V]))
    tag = f"<{kind}>\nq"
    content = {
        "llava": asked(tag), "sharegpt": asked(tag), "openai": spoken(tag, "a"), "long_vita": spoken(tag, "a"),
        "alpaca": {"instruction": tag, "output": "a"}, "pair": {"prompt": tag, "response": "a"},
        "long_context_qa": {"context": tag, "questions": ["r"], "answers": ["a"]},
    }[row]  # fmt: skip
    known = names.IMAGE_NAMES if kind == "image" else names.VIDEO_NAMES
    tried = 0
    for name, value in itertools.product(
        known, (path, [path], {"path": path}, {"path": path, "bytes": None}, [{"url": path}])
    ):
        for spelt in spellings(name) if value == path else (name,):
            got = outcome({spelt: value, **content}, root, row)
            assert not isinstance(got, str), (spelt, value, got)
            assert got[1:] == wanted
            tried += 1
    assert tried > 500
    for empty in (None, [], "", {}, {"path": None, "bytes": None}):  # a field of no medium is none
        plain = outcome({known[0]: empty, **content}, root, row)
        assert isinstance(plain, str) or plain[1:] == ([], [])


FORMS: list[tuple[Any, bytes]] = [
    (PNG, PNG), (bytearray(PNG), PNG), ({"bytes": PNG, "path": "x/gone.png"}, PNG), ([{"bytes": PNG}], PNG),
    (BASE64, PNG), ("data:image/png;base64," + BASE64, PNG), ({"base64": BASE64}, PNG), ({"data": BASE64}, PNG),
    ({"url": "data:image/png;base64," + BASE64}, PNG), ("a.png", A), ("./a.png", A), ({"file_name": "a.png"}, A),
]  # fmt: skip


@pytest.mark.parametrize(("value", "wanted"), FORMS)
def test_media_in_every_form(root: Path, value: Any, wanted: bytes) -> None:
    for name in ("image", "images", "img", "picture", "image_bytes"):
        assert outcome(asked(**{name: value}), root)[1] == [wanted]
    assert outcome(asked(turn={"image": value}), root)[1] == [wanted]
    one = value[0] if isinstance(value, list) else value
    content = [{"type": "image", "image": one}, {"type": "text", "text": "q"}]
    assert outcome(spoken(content, "a"), root)[1] == [wanted]


LAID: list[tuple[dict[str, Any], Any]] = [
    # several names: the same medium once, or a contradiction
    (asked(image="a.png", image_path="old/a.jpg"), ("[i0]\nq", [A], [])),
    (asked(image="a.png", image_url="https://x.invalid/z.jpg"), ("[i0]\nq", [A], [])),
    (asked(image_url="https://x.invalid/z.jpg", image_path="a.png"), ("[i0]\nq", [A], [])),
    (asked(image={"bytes": PNG}, image_path="anything.jpg"), ("[i0]\nq", [PNG], [])),
    (asked(image="a.png", file_name="a.png", original_image="x/a.png"), ("[i0]\nq", [A], [])),
    (asked(image="a.png", image_path="b.png"), "bad_record"),
    (asked(image="a.png", images=["b.png"]), "bad_record"),
    (asked(image="a.png", pictures=["a.png", "b.png"]), "bad_record"),
    (asked(image="a.png", second="b.png"), "media_unread"),
    (asked(image_url="https://x.invalid/z.jpg"), "media_remote"),
    # numbered, by tag, by suffix
    (asked("<image><image>q", image_2="b.png", image_1="a.png"), ("[i0][i1]q", [A, B], [])),
    (asked("<image><image>q", image_10="b.png", image_9="a.png", image_11=None), ("[i0][i1]q", [A, B], [])),
    (asked("<image_2> and <image_1>", images=["a.png", "b.png"]), ("[i1] and [i0]", [A, B], [])),
    (asked("<|image_1|><|image_2|>q", images=["a.png", "b.png"]), ("[i0][i1]q", [A, B], [])),
    (asked("<image 1> q", image="a.png"), ("[i0] q", [A], [])),
    (asked("<image 1> q <image 1>", image="a.png"), "media_count"),
    (asked("<image_3> q", image="a.png"), "media_count"),
    (asked("<image_01>x<image_00>", image={"<image_00>": "a.png", "<image_01>": "b.png"}), ("[i1]x[i0]", [A, B], [])),
    (asked("<image_00>", image={"<image_00>": "a.png", "<image_01>": "b.png"}), "media_count"),
    (asked("<image>q", file_name="a.png"), ("[i0]q", [A], [])),
    (asked("<video>q", file_name="v.mp4"), ("[v0]q", [], [V])),
    (asked("<image>q", path=["a.png"]), ("[i0]q", [A], [])),
    # paths in the text, as older Qwen-VL and ms-swift write them
    (asked("Picture 1: <img>a.png</img>\nq"), ("Picture 1: [i0]\nq", [A], [])),
    (asked("<img>a.png</img><img>b.png</img>q"), ("[i0][i1]q", [A, B], [])),
    (asked("<video>v.mp4</video>q"), ("[v0]q", [], [V])),
    (asked("<img>a.png</img>q", images=["a.png"]), ("[i0]q", [A], [])),
    (asked("<img>a.png</img>q", images=["b.png"]), "bad_record"),
    (asked("<audio>a.wav</audio>q"), "media_unread"),
    (asked("what is <img>bold</img>?"), ("what is <img>bold</img>?", [], [])),
    # inside a turn
    (asked(turn={"image": "a.png"}), ("[i0]\nq", [A], [])),
    (asked(turn={"images": ["a.png"]}), ("[i0]\nq", [A], [])),
    (asked("q", turn={"images": ["a.png", "b.png"]}), ("[i0]\n[i1]\nq", [A, B], [])),
    (asked("q", turn={"image_path": "a.png", "video": "v.mp4"}), ("[v0]\n[i0]\nq", [A], [V])),
    (asked("<image><image>q", turn={"images": ["a.png"]}), "media_count"),
    (asked(turn={"image": "a.png"}, image="a.png"), ("[i0]\nq", [A], [])),
    (asked(turn={"image": "a.png"}, image="b.png"), "bad_record"),
    (asked(turn={"image": "a.png", "picture": "b.png"}), "bad_record"),
    (asked(turn={"audio": "a.wav"}), "media_unread"),
    (asked(turn={"image": ""}, image="a.png"), ("[i0]\nq", [A], [])),
    # frames
    (asked("<video>q", frames=["a.png", "b.png"]), ("[v0]q", [], [[A, B]])),
    (asked("<video>q", video=["a.png", "b.png"]), ("[v0]q", [], [[A, B]])),
    (asked("<video><video>q", videos=[["a.png", "b.png"], ["c.png"]]), ("[v0][v1]q", [], [[A, B], [b"c.png"]])),
    (asked("<video><video>q", videos=["v.mp4", "w.mp4"]), ("[v0][v1]q", [], [V, b"w.mp4"])),
    (asked("<image>q", frames=["a.png", "b.png"]), "media_count"),
    # media without a tag
    (asked("q", image="a.png"), "media_count"),
    ({"instruction": "q", "output": "a", "images": ["a.png"]}, ("[i0]\nq", [A], [])),
]  # fmt: skip


@pytest.mark.parametrize(("record", "wanted"), LAID)
def test_where_media_are_found(root: Path, record: dict[str, Any], wanted: Any) -> None:
    assert outcome(record, root) == wanted


def part(kind: str, **more: Any) -> dict[str, Any]:
    return {"type": kind, "text": None, "index": None, **more}


TEXT = part("text", text="q")
PARTS: list[tuple[dict[str, Any], Any]] = [
    (spoken([part("image"), part("image"), TEXT], "a", images=["a.png", "b.png"]), ("[i0][i1]q", [A, B], [])),
    (spoken([part("image"), TEXT], "a", image="a.png"), ("[i0]q", [A], [])),
    (spoken([part("image"), TEXT], "a", image={"bytes": PNG, "path": None}), ("[i0]q", [PNG], [])),
    (spoken([part("image_url"), TEXT], "a", img="a.png"), ("[i0]q", [A], [])),
    (spoken([TEXT, part("video")], "a", videos=["v.mp4"]), ("q[v0]", [], [V])),
    (spoken([part("image"), part("video"), TEXT], "a", image="a.png", video="v.mp4"), ("[i0][v0]q", [A], [V])),
    (spoken([part("image", index=1), part("image", index=0), TEXT], "a", images=["a.png", "b.png"]),
     ("[i1][i0]q", [A, B], [])),
    (spoken([part("image", index=0), part("image", index=0), TEXT], "a", images=["a.png", "b.png"]),
     ("[i0][i1]q", [A, B], [])),  # the same index for all: a column's default
    (spoken([part("image", index=0.0), TEXT], "a", images=["a.png"]), ("[i0]q", [A], [])),
    (spoken([part("image", index=0), part("image", index=2)], "a", images=["a.png", "b.png"]), "media_count"),
    (spoken([part("image", index=5), TEXT], "a", images=["a.png"]), "media_count"),
    (spoken([part("image", index=1), part("image", index=1)], "a", images=["a.png", "b.png"]), "media_count"),
    (spoken([part("image", index=0), part("image")], "a", images=["a.png", "b.png"]), "media_count"),
    (spoken([part("image"), TEXT], "a", images=["a.png", "b.png"]), "media_count"),
    (spoken([part("image"), part("image"), TEXT], "a", images=["a.png"]), "media_count"),
    (spoken([part("image"), TEXT], "a"), "media_count"),
    (spoken([TEXT], "a", images=["a.png"]), "media_count"),
    (spoken([part("text", text="<image>\nq")], "a", images=["a.png"]), ("[i0]\nq", [A], [])),
    (spoken([part("image", image="b.png"), part("image"), TEXT], "a", images=["a.png"]), ("[i0][i1]q", [B, A], [])),
    (spoken([part("image", path="a.png"), TEXT], "a", images=["a.png"]), ("[i0]q", [A], [])),
    (spoken([part("image", path="a.png"), TEXT], "a", images=["b.png"]), "bad_record"),
    (spoken([part("image", path="a.png", url="b.png"), TEXT], "a"), "bad_record"),
    (spoken([{"image": "a.png"}, {"text": "q"}], "a"), ("[i0]q", [A], [])),
    (spoken([{"video": "v.mp4"}, {"text": "q"}], "a"), ("[v0]q", [], [V])),
    (spoken([part("video", video=["a.png", "b.png"]), TEXT], "a"), ("[v0]q", [], [[A, B]])),
    (spoken([part("image", source={"type": "base64", "media_type": "image/png", "data": BASE64}), TEXT], "a"),
     ("[i0]q", [PNG], [])),
    (spoken([part("image_url", image_url={"url": "a.png", "detail": "high"}), TEXT], "a"), ("[i0]q", [A], [])),
    (spoken([part("image", base64=BASE64), TEXT], "a"), ("[i0]q", [PNG], [])),
    (spoken(["q", part("image", image="a.png")], "a"), ("q[i0]", [A], [])),
    ({"conversations": [{"from": "human", "value": [part("image"), TEXT]}, turns("", "a")[1]], "image": "a.png"},
     ("[i0]q", [A], [])),
    (spoken([part("image"), TEXT], [part("text", text="a")], images=["a.png"]), ("[i0]q", [A], [])),
    (spoken([TEXT], [part("image"), part("text", text="a")], images=["a.png"]), "media_count"),
    (spoken([part("audio", audio="a.wav"), TEXT], "a"), "media_unread"),
    (spoken([part("input_audio", input_audio={"data": "x"}), TEXT], "a"), "media_unread"),
    (spoken([part("file", file={"file_id": "x"}), TEXT], "a"), "media_unread"),
    (spoken([part("point_cloud"), TEXT], "a"), "media_unread"),
    (spoken([part("text", text="q", audio="a.wav")], "a"), "media_unread"),
    (spoken([part("image", image="a.png", mask="m.png"), TEXT], "a"), "media_unread"),
    (spoken([part("video", video="v.mp4", video_start=1.0), TEXT], "a"), "video_span"),
    (spoken([part("video", video="v.mp4", fps=2, max_pixels=9), TEXT], "a"), ("[v0]q", [], [V])),
    (spoken([part("tool_use", name="f"), TEXT], "a"), "tools_unread"),
    (spoken("q", [part("thinking", thinking="hm"), part("text", text="a")]), "reasoning_unread"),
    (spoken([part("smell"), TEXT], "a"), "bad_record"),
]  # fmt: skip


@pytest.mark.parametrize(("record", "wanted"), PARTS)
def test_parts_of_content(root: Path, record: dict[str, Any], wanted: Any) -> None:
    row = "sharegpt" if "conversations" in record else "openai"
    assert outcome(record, root, row) == wanted


@settings(deadline=None, max_examples=100)
@given(order=st.permutations(range(5)), count=st.integers(1, 5), said=st.booleans(), split=st.integers(0, 5))
def test_bare_parts_take_the_pictures_in_order(order: list[int], count: int, said: bool, split: int) -> None:
    chosen = [number for number in order if number < count]
    pictures = [{"bytes": bytes([n]), "path": None} for n in range(count)]
    parts = [part("image", index=number if said else None) for number in chosen]
    record = spoken([*parts[:split], TEXT], "a", [*parts[split:], TEXT], "b", images=pictures)
    sample, _ = convert(record, Path(), "openai")
    assert isinstance(sample, Sample)
    seen = [p.index for m in sample.messages for p in m.parts if not hasattr(p, "text")]
    assert [sample.images[index].data for index in seen] == [bytes([n]) for n in (chosen if said else range(count))]


# ---------------------------------------------------------------------------------------- what nothing reads

UNREAD = [
    *(("media_unread", {name: value}) for name in ("audio", "audios", "sound", "pdf", "point_cloud", "audio_path")
      for value in ("x", ["x.wav"], {"path": "x"}, b"x")),
    *(("media_unread", {"anything": value}) for value in (
        "x.wav", "a/b.PDF", ["x.ply"], "photo of it.jpg", {"deep": [{"er": "x.npy"}]}, {"bytes": b"x", "path": None},
        b"x", BASE64, "data:audio/wav;base64,AAAA", "https://x.invalid/a.png?size=3", ["t", {"u": "x.mp4"}],
    )),
    ("media_unread", {"pixel_values": [[1.0]]}), ("media_unread", {"image_info": [{"image_name": "x"}]}),
    ("media_unread", {"depth": "d.png"}), ("media_unread", {"mask": "m.png", "sound": "x"}),
    ("tools_unread", {"tools": '[{"name": "f"}]'}), ("tools_unread", {"tools": [{"name": "f"}]}),
    ("tools_unread", {"functions": [{"name": "f"}]}), ("tools_unread", {"available_tools": "f"}),
    ("reasoning_unread", {"reasoning": "hm"}), ("reasoning_unread", {"thinking": "hm"}),
    ("field_unread", {"documents": [{"title": "t", "text": "words"}]}), ("field_unread", {"refusal": "I will not."}),
    ("loss_weight", {"train_on_input": True}), ("loss_weight", {"train_on_inputs": 1}),
]  # fmt: skip


@pytest.mark.parametrize(("code", "more"), UNREAD)
def test_what_nothing_reads_rejects_the_record(root: Path, code: str, more: dict[str, Any]) -> None:
    (key,) = list(more)[-1:]
    forms = {"sharegpt": asked("q"), "openai": spoken("q", "a"), "alpaca": {"instruction": "q", "output": "a"}}
    forms |= {"metamath": {"query": "q", "response": "a"}, "lima": {"conversations": ["q", "a"]}}
    forms |= {"long_context_qa": {"context": "c", "questions": ["q"], "answers": ["a"]}, "text": {"text": "words"}}
    for row, record in forms.items():
        assert outcome({**record, **more}, root, row) == code, row
        assert not isinstance(outcome({**record, **dict.fromkeys(more)}, root, row) if row != "text" else (), str)
        if row in ("sharegpt", "openai", "lima"):  # the way out that the message names
            assert not isinstance(outcome({**record, **more}, root, row, ignore=list(more)), str)
    if code != "loss_weight":
        assert outcome(asked("q", turn={key: more[key]}), root, "sharegpt") == code


def test_calls_and_reasoning_in_turns(root: Path) -> None:
    call = {"name": "f", "arguments": "{}"}
    for more, code in (
        ({"tool_calls": [{"id": "1", "type": "function", "function": call}]}, "tools_unread"),
        ({"function_call": call}, "tools_unread"),
        ({"reasoning_content": "think hard"}, "reasoning_unread"),
        ({"reasoning": "think hard"}, "reasoning_unread"),
        ({"thinking": "think hard"}, "reasoning_unread"),
    ):
        for content in ("a", None) if code == "tools_unread" else ("a",):
            record = spoken("q", "a")
            record["messages"][1] |= {**more, "content": content}
            assert outcome(record, root, "openai") == code
    for role in ("tool", "function", "observation", "ipython", "tool_response", "call"):
        talk = [*turns("q"), {"from": role, "value": "x"}, {"from": "gpt", "value": "a"}]
        assert outcome({"conversations": talk}, root, "sharegpt") == "bad_role"
    for empty in ({"tool_calls": []}, {"tool_calls": None, "function_call": None}, {"reasoning_content": ""}):
        record = spoken("q", "a")
        record["messages"][1] |= empty
        assert outcome(record, root, "openai") == ("q", [], [])


SPANS = ("video_start", "video_end", "start", "end", "start_time", "end_time", "clip_start", "startTime", "video_span")


@pytest.mark.parametrize("name", SPANS)
def test_a_part_of_a_video_is_not_taught_as_the_whole(root: Path, name: str) -> None:
    for value in (3, 2.5, "00:03", [1, 2]):
        assert outcome(asked("<video>q", video="v.mp4", **{name: value}), root) == "video_span"
        assert outcome(asked("<video>q", turn={"video": "v.mp4", name: value}), root, "sharegpt") == "video_span"
        assert outcome(asked("q", **{name: value}), root) == ("q", [], [])  # says nothing of a text
    for value in (None, 0, 0.0):
        assert outcome(asked("<video>q", video="v.mp4", **{name: value}), root) == ("[v0]q", [], [V])


HARMLESS = {
    "id": "a/b.png", "uid": "x.jpg", "source": "report.pdf", "url": "https://x.invalid/a.jpg", "dataset": "d", "idx": 4,
    "width": 3, "height": 4, "width_list": [3], "language": "en", "meta": {"k": "v", "file": "x.png"}, "license": "MIT",
    "__key__": "k.jpg", "__url__": "x.tar", "image_id": "7.jpg", "num_turns": 3, "token_count": 3, "clip_score": 0.3,
    "has_image": False, "score": 0.1, "category": "c", "created_at": "2024", "clip": 0.31, "depth": 3, "duration": 2.5,
}  # fmt: skip


def test_metadata_are_left_out_without_a_word(root: Path) -> None:
    for row, record in (
        ("sharegpt", asked("q")),
        ("openai", spoken("q", "a")),
        ("metamath", {"query": "q", "response": "a"}),
    ):
        sample, changes = convert({**record, **HARMLESS}, root, row)
        assert shown(sample).turns == [("user", "q"), ("assistant", "a")]
        assert changes == Changes()


def test_other_words_are_left_out_and_told(root: Path) -> None:
    record = asked(
        "q", turn={"gloss": "words", "n": 3}, explanation="because", steps=["one"], flag=True, count=3, void=[]
    )
    assert convert(record, root, "sharegpt")[1].unread == {"explanation", "steps", "turn.gloss"}
    assert convert(record, root, "sharegpt", ignore=["explanation", "gloss"])[1].unread == {"steps"}
    assert convert({"text": "words", "comment": "words"}, root, "text")[1].unread == {"comment"}
    assert convert({"texts": [{"user": "q", "assistant": "a", "why": "so"}]}, root, "the_cauldron")[1].unread == {
        "turn.why"
    }


@pytest.mark.parametrize("row", ["sharegpt", "openai", "lima", "alpaca", "long_context_qa"])
def test_the_systems_turn_may_be_a_field(root: Path, row: str) -> None:
    forms = {"sharegpt": asked("q"), "openai": spoken("q", "a"), "alpaca": {"instruction": "q", "output": "a"}}
    forms |= {"lima": {"conversations": ["q", "a"]}}
    forms |= {"long_context_qa": {"context": "c", "questions": ["q"], "answers": ["a"]}}
    for name in ("system", "system_prompt", "system_message"):
        sample, changes = convert({**forms[row], name: "be brief"}, root, row)
        assert shown(sample).turns[0] == ("system", "be brief")
        assert not changes.unread


def test_a_systems_field_beside_another_is_told(root: Path) -> None:
    record = spoken("q", "a", system="be brief", system_prompt="be long", system_message="be brief")
    sample, changes = convert(record, root, "long_vita")
    assert shown(sample).turns[0] == ("system", "be brief")
    assert changes.unread == {"system_prompt"}
    record["messages"].insert(0, {"role": "system", "content": "be kind"})
    sample, changes = convert(record, root, "long_vita")
    assert shown(sample).turns[0] == ("system", "be kind")
    assert changes.unread == {"system", "system_prompt", "system_message"}
    record["messages"][0]["content"] = ""  # says nothing, and is none
    sample, changes = convert(record, root, "long_vita")
    assert shown(sample).turns[:2] == [("system", "be brief"), ("user", "q")]
    assert changes.unread == {"system_prompt"}


def test_a_tag_without_a_picture_is_counted(root: Path) -> None:
    for record, row, count in (
        (asked("<image>\nq"), "llava", 1), (asked("<image> <image> q"), "sharegpt", 1),
        (spoken("<image>", "a"), "openai", 1), (asked("<image>\nq", image="a.png"), "llava", 0),
        (asked("q"), "llava", 0), (asked("<video>q"), "allava_text", 0),
        ({"query": "<image>", "response": "a"}, "metamath", 0),
        (asked("<image><video>q", image="a.png"), "llava", 1), (asked("<image><video>q", image=PNG), "llava_recap", 0),
    ):  # fmt: skip
        assert convert(record, root, row)[1].tag_as_text == count, record
    answer = {"conversations": turns("q", "an <image>")}
    assert convert(answer, root, "llava")[1].tag_as_text == 0


# ------------------------------------------------------------------------------------------------------- marks

LEARNT: tuple[dict[str, Any], ...] = (
    {"weight": 1}, {"weight": 1.0}, {"loss": True}, {"train": True}, {"loss_mask": 1}, {"mask": False},
    {"weight": None},
    {"train_on_turn": True}, {"loss": "true"}, {"masked": False}, {"loss_weight": 1}, {"weight": float("nan")},
)  # fmt: skip
MASKED: tuple[dict[str, Any], ...] = (
    {"weight": 0}, {"weight": 0.0}, {"loss": False}, {"loss": 0}, {"train": False}, {"loss_mask": 0}, {"mask": True},
    {"is_train": False}, {"train_on_turn": False}, {"loss": "false"}, {"masked": True}, {"loss_weight": 0},
    {"trainable": False}, {"Weight": 0}, {"trainOnTurn": False}, {"loss_scale": 0.0}, {"calculate_loss": False},
)  # fmt: skip
NEITHER: tuple[dict[str, Any], ...] = (
    {"weight": 0.5}, {"weight": 2}, {"weight": -1}, {"loss": 0.3}, {"mask": 1}, {"mask": 0}, {"weight": "much"},
    {"loss_mask": [0, 1]}, {"loss": True, "weight": 0}, {"train_detail": [{"begin_offset": 0}]},
)  # fmt: skip


def marked(mark: dict[str, Any]) -> list[Any]:
    plain: Any = {"conversations": turns("q", "BAD", "r", "GOOD")}
    plain["conversations"][1] |= mark
    spoken_: Any = {"messages": messages("q", "BAD", "r", "GOOD")}
    spoken_["messages"][1] |= mark
    return [
        plain,
        spoken_,
        spoken_["messages"],
        {"texts": [{"user": "q", "assistant": "BAD", **mark}, {"user": "r", "assistant": "b"}]},
    ]  # type: ignore[list-item]


def learnt(record: Any, root: Path) -> list[bool]:
    sample, _ = convert(record, root)
    assert isinstance(sample, Sample)
    return [message.learnt for message in sample.messages if message.role == "assistant"]


@pytest.mark.parametrize(
    ("mark", "wanted"),
    [*((one, True) for one in LEARNT), *((one, False) for one in MASKED), *((one, None) for one in NEITHER)],
)
def test_marks_of_answers(root: Path, mark: dict[str, Any], wanted: bool | None) -> None:
    for record in marked(mark):
        if wanted is None:
            with pytest.raises(DataError, match=r"^loss_weight: "):
                learnt(record, root)
        else:
            assert learnt(record, root) == [wanted, True]


def test_marks_of_questions_and_records(root: Path) -> None:
    for mark, wanted in (
        ({"weight": 0}, [True]), ({"weight": 1}, [True]), ({"loss": False}, [True]), ({"train": False}, [True]),
        ({"loss": True}, None), ({"train": True}, None), ({"mask": False}, None),
    ):  # fmt: skip
        record = asked("q", turn=mark)
        if wanted is None:
            with pytest.raises(DataError, match=r"^loss_weight: .*answers alone"):
                learnt(record, root)
        else:
            assert learnt(record, root) == wanted
    talk = messages("q", "a", "r", "b")
    for more, marks in (
        ({"mask_history": True}, [False, True]), ({"mask_history": False}, [True, True]),
        ({"loss_mask": [0, 0, 0, 1]}, [False, True]), ({"weights": [1, 1, 1, 0]}, [True, False]),
        ({"train": [False, True, False, None]}, [True, True]), ({"loss": False}, [False, False]),
        ({"weight": 1.0}, [True, True]), ({"mask": "User"}, [True, True]), ({"mask": "gpt"}, [False, False]),
        ({"loss_mask": [0, 1]}, None), ({"loss_mask": [1, 1, 1, 1]}, None), ({"weight": 0.7}, None),
    ):  # fmt: skip
        if marks is None:
            with pytest.raises(DataError, match=r"^loss_weight: "):
                learnt({"messages": talk, **more}, root)
        else:
            assert learnt({"messages": talk, **more}, root) == marks, more
    ignored, _ = convert({"messages": talk, "weight": 0.7}, root, "openai", ignore="weight")
    assert all(message.learnt for message in ignored.messages)  # type: ignore[union-attr]


@pytest.mark.parametrize(
    ("mark", "code"),
    [
        ({"weight": 0}, "no_answer"),
        ({"train": False}, "no_answer"),
        ({"mask": True}, "no_answer"),
        ({"weight": 0.5}, "loss_weight"),
    ],
)
def test_marks_of_plain_text(root: Path, mark: dict[str, Any], code: str) -> None:
    with pytest.raises(DataError, match=f"^{code}: .*{next(iter(mark))}"):
        convert({"text": "words", **mark}, root, "text")
    assert convert({"text": "words", "weight": 1, "train": True, "mask": None}, root, "text")[0] == Document(
        "words", "s", 1
    )


def test_what_a_tag_asks_for_is_not_passed_over_as_metadata(root: Path) -> None:
    for more in (
        {"image_id": "a.png"},
        {"id": "x/a.png"},
        {"url": "https://x.invalid/a.jpg"},
        {"meta": {"image": "a.png"}},
    ):
        assert outcome(asked("<image>\nq", **more), root, "llava") == "media_unread"
        assert outcome(asked("<image>\nq", image="a.png", **more), root, "llava") == ("[i0]\nq", [A], [])
        assert outcome(asked("q", **more), root, "llava") == ("q", [], [])
        assert outcome(asked("<image>\nq", **more), root, "llava", ignore=list(more)) == ("<image>\nq", [], [])
    assert outcome(asked("<image>\nq", id="a.png"), root, "allava_text") == ("<image>\nq", [], [])  # a set of texts


def test_fields_that_say_none_in_words(root: Path) -> None:
    for nothing in ("[]", "{}", "null", "None", " "):
        assert outcome(asked("q", tools=nothing, turn={"tool_calls": nothing}), root, "sharegpt") == ("q", [], [])


KEYS = st.sampled_from([
    "messages", "conversations", "texts", "text", "images", "image", "img", "video", "frames", "image_1", "tools",
    "system", "tool_calls", "function_call", "reasoning", "weight", "loss_mask", "mask", "train", "start", "audio",
    "file_name", "meta", "role", "from", "content", "value", "type", "index", "user", "assistant", "instruction",
    "output", "name", "history",
])  # fmt: skip
WORDS = st.sampled_from([
    "user", "assistant", "gpt", "human", "tool", "function_call", "<image>", "<image_1>", "a.png", "[]", "image",
    "video", "text", "<img>a.png</img>", '{"name": "f"}', "",
])  # fmt: skip
VALUES = st.recursive(
    st.none() | st.booleans() | st.integers(-1, 2) | st.floats(allow_infinity=True) | WORDS | st.binary(max_size=2),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(KEYS, inner, max_size=5),
    max_leaves=12,
)


@settings(deadline=None, max_examples=300)
@given(record=st.dictionaries(KEYS, VALUES, max_size=6), row=st.sampled_from(sorted(load_table())))
def test_whatever_a_record_holds_it_is_a_sample_or_rejected_by_code(
    root: Path, record: dict[str, Any], row: str
) -> None:
    code = next(iter(CODES))
    try:
        convert(record, root, row)
    except DataError as error:
        code = str(error).partition(":")[0]
    assert code in CODES
