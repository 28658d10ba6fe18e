"""Fixtures: datasets with pictures, in their publishers' schemas and with their quirks."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

from tests.data.fixtures_kit import (
    CONVERSATIONS,
    PAIRS,
    Good,
    Pairs,
    Promise,
    Wanted,
    array,
    dot,
    fill,
    jpg,
    lines,
    messages,
    put,
    put_split,
    put_tar,
    put_zip,
    qa,
    shards,
    struct,
    tar_bytes,
    turns,
)

_CAULDRON = """
chart2text cocoqa datikz diagram_image_to_text docvqa finqa geomverse iam intergps localized_narratives mimic_cgd
multihiertt nlvr2 ocrvqa okvqa plotqa raven rendered_text robut_sqa robut_wikisql screen2words spot_the_diff
tabmwp tat_qa textvqa vistext visualmrc vqav2 websight
"""
CAULDRON = _CAULDRON.split()
"""The subsets that Long-VITA takes."""
_ONEVISION = """
CLEVR-Math(MathV360K) FigureQA(MathV360K) GEOS(MathV360K) GeoQA+(MathV360K) Geometry3K(MathV360K)
IconQA(MathV360K) MapQA(MathV360K) PMC-VQA(MathV360K) Super-CLEVR(MathV360K) TabMWP(MathV360K) UniGeo(MathV360K)
VisualWebInstruct(filtered) VizWiz(MathV360K) ai2d(cauldron,llava_format) ai2d(gpt4v) ai2d(internvl)
aokvqa(cauldron,llava_format) chartqa(cauldron,llava_format) chrome_writting clevr(cauldron,llava_format)
dvqa(cauldron,llava_format) figureqa(cauldron,llava_format) geo170k(align) geo170k(qa) geo3k
hateful_memes(cauldron,llava_format) hitab(cauldron,llava_format) hme100k iconqa(cauldron,llava_format) iiit5k
image_textualization(filtered) infographic(gpt4v) infographic_vqa infographic_vqa_llava_format k12_printing
llavar_gpt4_20k lrv_chart lrv_normal(filtered) magpie_pro(l3_80b_mt) magpie_pro(l3_80b_st)
magpie_pro(qwen2_72b_st) mapqa(cauldron,llava_format) mathqa mavis_math_metagen mavis_math_rule_geo orand_car_a
robut_wtq(cauldron,llava_format) scienceqa(cauldron,llava_format) scienceqa(nona_context) sharegpt4o sroie
st_vqa(cauldron,llava_format) tallyqa(cauldron,llava_format) textcaps textocr(gpt4v)
tqa(cauldron,llava_format) ureader_cap ureader_ie vision_flan(filtered) visual7w(cauldron,llava_format)
vqarad(cauldron,llava_format) vsr(cauldron,llava_format)
"""
ONEVISION = _ONEVISION.split()
"""Likewise; three more are no parquet."""
PROMPT = "Please describe this image in detail."
HTML = "<html><img src='a.png'><video></video><|im_start|> Answer: 7</html>"
"""Text that must not become special tokens."""


def llava_recap(root: Path) -> Iterator[Promise]:
    """The question is the picture alone."""

    def row(image: int | None, *texts: str, first: str = "human") -> dict[str, Any]:
        path = None if image is None else f"{image}.jpg"
        return {"id": "1", "image": struct(image, path), "conversations": turns(*texts, first=first),
                "data_source": "demo"}  # fmt: skip

    def plain(name: str) -> Iterator[tuple[Any, Wanted]]:
        for n in range(99):
            yield row(n, "<image>", f"{name} {n}."), qa(f"[i0]\n{PROMPT}", f"{name} {n}.", images=[dot(n)])

    odd: Pairs = [
        (row(1, "<image>\nAnd a <video> tag?", "No."), qa("[i0]\nAnd a <video> tag?", "No.", images=[dot(1)])),
        (row(2, "", "A cup."), qa(f"[i0]\n{PROMPT}", "A cup.", images=[dot(2)])),
        (row(3, "<image><image>", "a"), "media_count"),
        (row(None, "<image>", "a"), "media_missing"),
        (row(None, "Two plus two?", "Four."), "media_missing"),
        (row(4, "<image>", "a", "and?"), "no_answer"),
        (row(5, "a", "<image>", first="gpt"), "bad_order"),
    ]
    yield from shards(
        root / "lmms-lab/LLaVA-ReCap-558K/data", "llava_recap", fill(odd, plain("558K"), 23), CONVERSATIONS, 2
    )
    for name in ("118K", "CC3M"):
        folder = root / f"lmms-lab/LLaVA-ReCap-{name}/data"
        yield from shards(folder, "llava_recap", fill([], plain(name)), CONVERSATIONS)


def allava(root: Path) -> Iterator[Promise]:
    """Ten zips made to be unpacked flat, one of another repository, placeholders at either end, `idx` in the text."""
    root = root / "FreedomIntelligence/ALLaVA-4V"
    for part in (0, 1):
        members = {f"some/where/{n}.jpeg": jpg(n) for n in range(part * 6, part * 6 + 6)}
        put_zip(root / f"allava_laion/image_chunks/images_{part}.zip", members)
    long = "TRAIN_coco+" + "x" * 90
    members = {f"images_191task_1k/{long}_{n}.jpg": jpg(n) for n in range(9)}
    put_zip(root / "allava_vflan/images/image_191-task_1k.zip", members)
    for kind, text in (("Caption", "<image>\nSay it."), ("Instruct", "Why?\n<image>")):
        for name, folder in (
            ("LAION", "allava_laion/images/{}.jpeg"),
            ("VFLAN", f"allava_vflan/images/images_191task_1k/{long}_{{}}.jpg"),
        ):
            extra = {"original_caption": "mug", "url": "https://example.invalid/7.jpg"} if name == "LAION" else {}
            pairs: Pairs = [
                ({"id": str(n), "image": folder.format(n), "conversations": turns(text, "Blue."), **extra},
                 qa(text.replace("<image>", "[i0]"), "Blue.", images=[jpg(n)]))
                for n in range(9)
            ]  # fmt: skip
            missing = {"id": "x", "image": folder.format(77), "conversations": turns(text, "a")}
            path = root / f"allava_{name.lower()}/ALLaVA-{kind}-{name}-4V.json"
            yield array(path, "allava", [(missing, "media_missing"), *pairs])
    texts: Pairs = [
        ({"idx": n, "conversations": turns(f"Evolve {n}.", HTML)}, qa(f"Evolve {n}.", HTML)) for n in range(9)
    ]
    texts.append(({"idx": 9, "image": "a.png", "conversations": turns("q", "a")}, "undeclared_media"))
    yield array(root / "allava_text/Evol-Instruct-GPT4-Turbo-143K.json", "allava_text", texts)
    for name in ("Instruct-LAION-4oiterative", "Instruct-LAION-4v_gemini_claude-ensembled"):
        pairs = [
            ({"id": name, "image": f"allava_laion/images/{n}.jpeg", "conversations": turns("<image>\nq", "a")},
             qa("[i0]\nq", images=[jpg(n)]))
            for n in range(10)
        ]  # fmt: skip
        yield array(root / f"others/{name}.json", "allava", pairs)


def pictures_of_others(root: Path) -> None:
    """COCO as its zip and as a folder, one of SA-1B's tars."""
    root = root / "images"
    put_zip(root / "coco/train2017.zip", {f"train2017/{n:012}.jpg": jpg(n) for n in range(10)})
    for n in range(5):
        put(root / f"coco/val2017/{n:012}.jpg", jpg(20 + n))
        put(root / f"llava/llava_pretrain/images/00000/{n}.jpg", jpg(30 + n))
    put_tar(root / "sam/images/sa_000000.tar", {f"./sa_{n}.jpg": jpg(40 + n) for n in range(5)})


def sharegpt4v(root: Path) -> Iterator[Promise]:
    """Pictures of five other publishers; some conversations begin with the model."""
    folder, media = root / "Lin-Chen/ShareGPT4V", root / "images"

    def row(image: str | None, *texts: str, first: str = "human") -> dict[str, Any]:
        return {"id": "1", **({"image": image} if image else {}), "conversations": turns(*texts, first=first)}

    sam = [
        (row(f"sam/images/sa_{n}.jpg", "See?\n<image>", "Two."), qa("See?\n[i0]", "Two.", images=[jpg(40 + n)]))
        for n in range(5)
    ]
    pairs: Pairs = [
        *sam,
        (row("coco/train2017/000000000001.jpg", "Hi.", "<image>\nq", "a", first="gpt"), qa("[i0]\nq", images=[jpg(1)])),
        (row("llava/llava_pretrain/images/00000/2.jpg", "<image>\nq", "a"), qa("[i0]\nq", images=[jpg(32)])),
        (row("wikiart/images/none.jpg", "<image>\nq", "a"), "media_missing"),
        (row("sam/images/../../../secret.jpg", "<image>\nq", "a"), "path_escape"),
        (row("../../outside.jpg", "<image>\nq", "a"), "path_escape"),
    ]
    yield array(folder / "share-captioner_coco_lcs_sam_1246k_1107.json", "sharegpt4v", pairs, media)
    yield array(folder / "sharegpt4v_instruct_gpt4-vision_cap100k.json", "sharegpt4v", fill([], sam * 2), media)
    mix: Pairs = [
        (row(None, "Write <image> in HTML.", HTML), qa("Write <image> in HTML.", HTML)),
        (row("coco/train2017/000000000003.jpg", "<image>\nq", "a", "r", "b"),
         Good([("user", "[i0]\nq"), ("assistant", "a"), ("user", "r"), ("assistant", "b")], [jpg(3)])),
    ]  # fmt: skip
    yield array(root / "liuhaotian/LLaVA-Instruct-150K/llava_v1_5_mix665k.json", "llava_mix665k", mix, media)


def lvis(root: Path) -> Iterator[Promise]:
    """COCO train2017 (a zip here) and val2017 (a folder), several turns."""
    pairs: Pairs = []
    for n in range(5):
        talk = [("user", "[i0]\nHow many?"), ("assistant", "3"), ("user", "Which?"), ("assistant", "Brown.")]
        for part, number in (("train2017", n), ("val2017", 20 + n)):
            record = {"id": "1", "image": f"coco/{part}/{n:012}.jpg",
                      "conversations": turns("<image>\nHow many?", "3", "Which?", "Brown.")}  # fmt: skip
            pairs.append((record, Good(talk, [jpg(number)])))
    pairs.append(({"id": "2", "conversations": turns("No picture.", "None.")}, qa("No picture.", "None.")))
    yield array(root / "X2FD/LVIS-Instruct4V/lvis_instruct4v_220k.json", "lvis", pairs, root / "images")


def ov_mid(root: Path) -> Iterator[Promise]:
    """Tars that are no WebDataset, beside each file; one subset is text."""
    root = root / "lmms-lab/LLaVA-OneVision-Mid-Data"
    for name, inside in (("synthdog_en", "synthdog-en/train"), ("synthdog_zh", "synthdog-zh/train"),
                         ("ureader_tr", "ureader-instruction-1.0/docs")):  # fmt: skip
        pairs: Pairs = []
        for part in (1, 2):
            paths = {f"{inside}/{part}_{n}.jpg": jpg(10 * part + n) for n in range(5)}
            put_tar(root / f"{name}/{name}_images_{part}.tar.gz", paths)
            pairs += [
                ({"id": path, "image": path, "conversations": turns("<image>\nRead.", "alpha")},
                 qa("[i0]\nRead.", "alpha", images=[data]))
                for path, data in paths.items()
            ]  # fmt: skip
        gone = {"id": "x", "image": f"{inside}/9.jpg", "conversations": turns("<image>\nRead.", "a")}
        yield array(root / f"{name}/{name}_processed.json", "ov_mid", [*pairs, (gone, "media_missing")])
    texts: Pairs = [({"id": str(n), "conversations": turns("q", HTML)}, qa("q", HTML)) for n in range(10)]
    yield array(root / "evol_instruct/evol_instruct_processed.json", "ov_mid_text", texts)


def _cauldron_row(images: list[int | None] | None, *pairs: tuple[str, str]) -> dict[str, Any]:
    texts = [{"user": user, "assistant": assistant, "source": "demo"} for user, assistant in pairs]
    return {"images": None if images is None else [struct(n) for n in images], "texts": texts}


def _cauldron_plain(subset: str) -> Iterator[tuple[Any, Wanted]]:
    for number in range(99):
        record = _cauldron_row([number], (subset, "Answer: the second."), ("By what?", "Two."))
        talk = [("user", f"[i0]\n{subset}"), ("assistant", "the second."), ("user", "By what?"), ("assistant", "Two.")]
        yield record, Good(talk, [dot(number)])


def the_cauldron(root: Path) -> Iterator[Promise]:
    """No placeholders in the text; several questions and pictures a row."""
    root = root / "HuggingFaceM4/the_cauldron"
    odd: dict[str, Pairs] = {
        "nlvr2": [
            (_cauldron_row([1, 2], ("Same?", "No.")), qa("[i0]\n[i1]\nSame?", "No.", images=[dot(1), dot(2)])),
            (_cauldron_row([1, 2], ("<image> or?", "No.")), "media_count"),
            (_cauldron_row([1, None], ("Same?", "No.")), "media_missing"),
        ],
        "websight": [(_cauldron_row([3], ("Code it.", HTML)), qa("[i0]\nCode it.", HTML, images=[dot(3)]))],
        "tat_qa": [
            (_cauldron_row([], ("Sum?", "Answer: Answer: 3")), qa("Sum?", "Answer: 3")),
            (_cauldron_row(None, ("Sum?", "3")), qa("Sum?", "3")),
            (_cauldron_row([1]), "bad_order"),
            (_cauldron_row([1], ("Sum?", "")), "empty_turn"),
        ],
    }
    for name in CAULDRON:
        pairs = fill(odd.get(name, []), _cauldron_plain(name), 13 if name == "rendered_text" else 10)
        yield from shards(root / name, "the_cauldron", pairs, PAIRS, 2 if name == "rendered_text" else 1)


def docmatix(root: Path) -> Iterator[Promise]:
    """Pages in order, many questions; the pdf/ files beside are another configuration."""
    root = root / "HuggingFaceM4/Docmatix"
    pages = _cauldron_row([4, 3, 2, 1], *((f"q{n}", f"a{n}") for n in range(6)))
    talk = [turn for n in range(6) for turn in (("user", f"q{n}"), ("assistant", f"a{n}"))]
    talk[0] = ("user", "[i0]\n[i1]\n[i2]\n[i3]\nq0")
    wanted = Good(talk, [dot(4), dot(3), dot(2), dot(1)])
    yield from shards(root / "data", "docmatix", fill([(pages, wanted)], _cauldron_plain("docmatix")), PAIRS)
    put(root / "pdf/train-00000-of-00001.parquet", b"never read")


def onevision(root: Path) -> Iterator[Promise]:
    """Folders with brackets, commas and plus signs in their names; pictures that are null; roles of no one."""
    root = root / "lmms-lab/LLaVA-OneVision-Data"

    def row(name: str, image: int | None, talk: list[dict[str, str]]) -> dict[str, Any]:
        return {"id": f"{name}/1.png", "image": struct(image), "conversations": talk, "data_source": name}

    for number, name in enumerate(ONEVISION):
        tag = "" if "cauldron" in name else "<image>\n"
        pairs: Pairs = []
        if name.startswith("magpie"):
            plain = ((row(name, None, turns(f"q{n}", "a")), qa(f"q{n}")) for n in range(99))
        else:
            plain = ((row(name, number + n, turns(f"{tag}q{n}", "a")), qa(f"[i0]\nq{n}", images=[dot(number + n)]))
                     for n in range(99))  # fmt: skip
        if name == "geo3k":
            noted = [{"from": "note", "value": "x"}, *turns("<image>\nq", "a")]
            pairs = [(row(name, 1, noted), qa("[i0]\nq", images=[dot(1)])),
                     (row(name, 1, turns("<image> and <image>", "a")), "media_count"),
                     (row(name, 1, turns("<image>\nq")), "no_answer")]  # fmt: skip
        yield from shards(root / name, "onevision", fill(pairs, plain), CONVERSATIONS)
    put(root / "clevr/train-00000-of-00001.parquet", b"a subset of a like name that no mix lists")
    for name in ("cambrian(filtered)", "ureader_kg", "ureader_qa"):
        inside = {f"docvqa/{name}_{n}.png": dot(n) for n in range(10)}
        put_tar(root / name / f"{name}_images_1.tar.gz", inside)
        pairs = [({"id": path, "image": path, "conversations": turns("q", "a")}, qa("[i0]\nq", images=[data]))
                 for path, data in inside.items()]  # fmt: skip
        pairs.append(({"id": "x", "image": "docvqa/none.png", "conversations": turns("q", "a")}, "media_missing"))
        yield array(root / f"{name}/{name}_processed.json", "onevision_tar", pairs)


def m4_image(root: Path) -> Iterator[Promise]:
    """Interleaved pictures; one zip for each source, named as the first folder of the path."""
    root = root / "lmms-lab/M4-Instruct-Data"
    for source in ("HQ-Edit", "nlvr2"):
        put_zip(root / f"{source}.zip", {f"{source}/images/{n}.png": dot(n) for n in range(8)})

    def row(paths: list[str] | str | None, talk: list[dict[str, str]], number: Any = 3) -> dict[str, Any]:
        return {"sample_id": number, "conversations": talk, "image": paths, "metadata": {"dataset": "HQ-Edit"}}

    plain = (
        (row([f"HQ-Edit/images/{n}.png", f"nlvr2/images/{n + 1}.png"], turns("Was: <image> Is: <image> What?", "It.")),
         qa("Was: [i0] Is: [i1] What?", "It.", images=[dot(n), dot(n + 1)]))
        for n in range(7)
    )  # fmt: skip
    one = "HQ-Edit/images/1.png"
    odd: Pairs = [
        (row([one], turns("<image> q", "a", first="gpt"), "x-1"), qa("[i0] q", images=[dot(1)])),
        (row(one, turns("q<image>", "a")), qa("q[i0]", images=[dot(1)])),
        (row([one, one], turns("<image> q", "a")), "media_count"),
        (row([one, "HQ-Edit/images/77.png"], turns("<image><image> q", "a")), "media_missing"),
        (row(None, turns("<image> q", "a")), "media_missing"),
    ]
    yield array(root / "m4_instruct_annotations.json", "m4_image", fill(odd, plain, 11))


def comic9k(root: Path) -> Iterator[Promise]:
    """One split tar of all pages; a book is a record."""
    root = root / "VITA-MLLM/Comic-9K"
    pages = {f"images/{book}/{n:03}.png": dot(10 * number + n) for number, book in enumerate("abc") for n in range(4)}
    put_split(root / "images.tar.gz", tar_bytes(pages, "gz"), ("aa", "ab", "ac"))

    def row(*names: str, key: str = "messages") -> dict[str, Any]:
        question = "<image>" * len(names) + "\nSummarise."
        talk = messages(question, "A robot.") if key == "messages" else turns(question, "A robot.")
        return {key: talk, "images": list(names)}

    def book(name: str, *, key: str = "messages") -> tuple[Any, Wanted]:
        names = [path for path in pages if f"/{name}/" in path]
        shown = "".join(f"[i{n}]" for n in range(4)) + "\nSummarise."
        return row(*names, key=key), qa(shown, "A robot.", images=[pages[path] for path in names])

    pairs: Pairs = [book("a"), book("b", key="conversations"), book("c"), (row("images/a/999.png"), "media_missing")]
    yield lines(root / "summary.jsonl", "comic9k", pairs)


def movienet(root: Path) -> Iterator[Promise]:
    """What tools/datasets writes, and a record that names a folder of frames."""
    root = root / "VITA-MLLM/MovieNet"
    frames = {f"240P/tt0000001/shot_{n:04}_img_0.jpg": jpg(n) for n in range(11)}
    for path, data in frames.items():
        put(root / path, data)
    some = list(frames)[:3]
    pairs: Pairs = [
        ({"messages": messages("<image><image><image>\nPlot?", "A pilot."), "images": some},
         qa("[i0][i1][i2]\nPlot?", "A pilot.", images=[frames[path] for path in some])),
        ({"messages": messages("<video>\nPlot?", "A pilot."), "images": [], "videos": ["240P/tt0000001"]},
         qa("[v0]\nPlot?", "A pilot.", videos=[list(frames.values())])),
        ({"messages": messages("<image>\nPlot?", "A pilot."), "images": ["240P/tt0000002/shot_0000_img_0.jpg"]},
         "media_missing"),
    ]  # fmt: skip
    yield lines(root / "summary.jsonl", "movienet", pairs)


PICTURES = (
    llava_recap, allava, sharegpt4v, lvis, ov_mid, the_cauldron, docmatix, onevision, m4_image, comic9k, movienet,
)  # fmt: skip
