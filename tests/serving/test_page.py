"""The web page in a real browser: what a person does with mouse, keyboard and phone, and what a hostile model tries."""

from __future__ import annotations

import base64
import re
import threading
from pathlib import Path
from typing import Any

from fastapi import FastAPI

from megatron_vita.inference.openai.limits import Limits
from megatron_vita.serving.page import FOLDER
from tests.serving import fakes
from tests.serving.browser import serving
from tests.serving.fake_server import SLOW, FakeServer
from tests.serving.fakes import FakeEngine
from tests.serving.visit import Visit, visit

DIGIT = (FOLDER / "digit_3.png").read_bytes()
WIDE = f"""{"wide" * 60}

```
{"wide" * 60}
```
|{"a|" * 40}
|{"-|" * 40}

- 1
  - 2
    - [3](https://example.org)"""


def _data_url(content: bytes) -> str:
    return f"data:image/png;base64,{base64.b64encode(content).decode()}"


def test_a_dropped_picture_is_asked_about_in_several_turns(desk: Visit, server: FakeServer, tmp_path: Path) -> None:
    server.answers["Which digit?"] = "It is a **3**."
    desk.drop("three.png", "image/png", DIGIT)
    desk.page.wait_for_selector(".strip img[alt^='three.png']")
    desk.ask("Which digit?")
    assert desk.answer() == "It is a 3."
    assert desk.page.inner_text(".answer strong") == "3"
    desk.ask("Sure?")
    assert desk.answer(2) == "You said: Sure?"
    first, second = server.bodies
    picture = {"type": "image_url", "image_url": {"url": _data_url(DIGIT)}}
    question = {"role": "user", "content": [picture, {"type": "text", "text": "Which digit?"}]}
    assert first["messages"] == [question]
    assert (first["stream"], first["stream_options"]) == (True, {"include_usage": True})
    assert (first["temperature"], first["max_completion_tokens"], "seed" in first) == (0, 1024, False)
    assert second["messages"][:2] == [question, {"role": "assistant", "content": "It is a **3**."}]
    stats = desk.page.inner_text(".exchange:nth-child(2) .stats").replace("\xa0", " ")
    assert re.fullmatch(
        r"1,234 tokens read · 3 written( · [\d.,]+ tokens/s)? · first after [\d.]+ s · [\d.]+ s in all", stats
    ), stats
    desk.page.screenshot(path=tmp_path / "page.png")
    assert (tmp_path / "page.png").stat().st_size > 5000


def test_an_answer_is_stopped_and_its_beginning_stays(desk: Visit, server: FakeServer) -> None:
    server.answers[SLOW] = "Once upon a time"
    for number, stop in enumerate((lambda: desk.page.keyboard.press("Escape"), lambda: desk.page.click("#send")), 1):
        desk.ask(SLOW)
        desk.page.wait_for_selector(f".exchange:nth-child({number}) .markdown p:text-is('Once upon a time')")
        assert desk.page.get_attribute("#send", "aria-label") == "Stop"
        stop()
        assert desk.note(number) == "Stopped."
        assert server.left.wait(20), "the server still writes"
        server.left.clear()
    desk.ask("And then?")
    assert desk.answer(3) == "You said: And then?"
    assert [one["content"] for one in server.bodies[-1]["messages"]] == [
        SLOW, "Once upon a time", SLOW, "Once upon a time", "And then?",
    ]  # fmt: skip


def test_errors_are_said_in_words_and_can_be_tried_again(desk: Visit, server: FakeServer) -> None:
    server.refusals = [
        (429, {"error": {"message": "request:1: 9 requests wait. Send this one again in 2 s."}}, {"Retry-After": "2"}),
        (503, {"detail": "no"}, {"Retry-After": "5"}),
        (500, {}, {}),
    ]
    desk.ask("Hello")
    assert desk.note() == "9 requests wait. Send this one again in 2 s."
    for words in (r"The server cannot answer now: .* Try again in 5 s\.", r"The server failed \(HTTP status 500\)\."):
        desk.page.click(".retry")
        desk.page.wait_for_selector(f".note.error:text-matches({words!r})")
    desk.page.route("**/v1/**", lambda route: route.abort("connectionrefused"))
    desk.page.click(".retry")
    desk.page.wait_for_selector(".note.error:text-matches('The server cannot be reached')")
    desk.page.unroute("**/v1/**")
    server.broken = True
    desk.page.click(".retry")
    assert desk.note() == "The connection ended before the answer was complete."
    assert desk.answer() == "You sai"
    server.broken = False
    desk.page.click(".retry")
    desk.page.wait_for_selector(".markdown p:text-is('You said: Hello')")
    assert server.bodies[-1]["messages"] == [{"role": "user", "content": "Hello"}]


def test_errors_name_the_file_that_is_meant(desk: Visit, server: FakeServer) -> None:
    words = "messages[1].content[1].image_url.url: the picture is damaged; messages[9].content[0].image_url.url is not."
    server.refusals = [(400, {"error": {"message": words}}, {})]
    desk.page.evaluate("document.getElementById('instructions').value = 'Be brief.'")
    for number, name in enumerate(("a.png", "b.png"), 1):
        desk.drop(name, "image/png", DIGIT)
        desk.page.wait_for_selector(f".strip .medium:nth-child({number})")
    desk.ask("Hello")
    assert desk.note() == "b.png: the picture is damaged; messages[9].content[0].image_url.url is not."


def test_an_error_within_a_stream_is_said(desk: Visit) -> None:
    event = 'data: {"error": {"message": "the engine has ended.", "status": 503}}\n\ndata: [DONE]\n\n'
    desk.page.route("**/v1/**", lambda route: route.fulfill(body=event, content_type="text/event-stream"))
    desk.ask("Hello")
    assert desk.note() == "The engine has ended."


def test_keyboard_alone_is_enough(desk: Visit, server: FakeServer) -> None:
    press = desk.page.keyboard.press
    focus = "document.activeElement.id || document.activeElement.className"
    assert desk.page.evaluate(focus) == "input"
    desk.page.wait_for_selector(".sample")
    for _ in range(6):  # back over the licence's two links, and the three samples
        press("Shift+Tab")
        if desk.page.evaluate(focus) == "sample":
            break
    assert desk.page.evaluate("getComputedStyle(document.activeElement).outlineStyle") == "solid"
    press("Enter")
    desk.page.wait_for_selector(".strip .medium")
    assert desk.page.evaluate(focus) == "input"
    assert desk.page.input_value("#input") == "Which digit is marked?"
    press("Shift+Enter")
    desk.page.keyboard.type("Say it.")
    press("Enter")
    assert desk.answer() == "You said: Which digit is marked?\nSay it."
    video = server.bodies[0]["messages"][0]["content"][0]
    assert video["video_url"]["url"].startswith("data:video/mp4;base64,")
    desk.page.focus("#open-settings")
    press("Enter")
    desk.page.wait_for_selector("#settings[open]")
    for key in ("ArrowRight", "ArrowRight", "Tab"):
        press(key)
    for key in "7", "Tab", "5", "Tab", "9":
        press(key)
    press("Escape")
    desk.page.wait_for_selector("#settings:not([open])", state="attached")
    desk.ask("Again")
    desk.answer(2)
    asked = server.bodies[1]
    assert (asked["temperature"], asked["max_completion_tokens"], asked["seed"]) == (0.2, 7, 5)
    assert asked["media_io_kwargs"] == {"video": {"num_frames": 9}}
    assert desk.page.inner_text("#status") == "You said: Again"


def test_a_question_is_edited_an_answer_tried_again_the_chat_cleared(desk: Visit, server: FakeServer) -> None:
    desk.drop("three.png", "image/png", DIGIT)
    desk.page.wait_for_selector(".strip img")
    for number, question in enumerate(("One", "Two"), 1):
        desk.ask(question)
        desk.answer(number)
    desk.page.hover(".question")
    for give_up in (lambda: desk.page.keyboard.press("Escape"), lambda: desk.page.click("#keep")):
        desk.page.click(".exchange:first-child .edit")
        assert desk.page.input_value("#input") == "One"
        assert desk.page.is_visible("#editing")
        desk.page.click(".strip .remove")
        give_up()
        assert (desk.page.input_value("#input"), desk.page.locator(".strip .medium").count()) == ("", 0)
    assert desk.page.locator(".exchange").count() == 2
    desk.page.click(".exchange:first-child .edit")
    desk.ask("Uno")
    assert desk.answer() == "You said: Uno"
    assert desk.page.locator(".exchange").count() == 1
    desk.page.click(".retry")
    desk.page.wait_for_selector(".answer[aria-busy=false]")
    assert server.bodies[-1] == server.bodies[-2]
    assert len(server.bodies[-1]["messages"][0]["content"]) == 2, "the picture stays"
    desk.page.click("#clear")
    assert desk.page.locator(".exchange").count() == 0
    desk.page.wait_for_selector("#welcome")
    desk.ask("New")
    desk.answer()
    assert len(server.bodies[-1]["messages"]) == 1


def test_many_pictures_are_chosen_and_pasted(desk: Visit, server: FakeServer) -> None:
    frames = [{"name": f"{i}.png", "mimeType": "image/png", "buffer": DIGIT} for i in range(14)]
    desk.page.set_input_files("#files", frames)
    desk.page.wait_for_selector(".strip .medium:nth-child(14)")
    desk.drop("15.png", "", DIGIT, kinds=("paste",))
    desk.page.wait_for_selector(".strip .medium:nth-child(15)")
    desk.page.click(".strip .medium:first-child .remove")
    desk.ask("medium-1 \u2028 😀")
    assert desk.answer() == "You said: medium-1 \u2028 😀"
    content = server.bodies[0]["messages"][0]["content"]
    assert [one["type"] for one in content] == ["image_url"] * 14 + ["text"]
    assert {one["image_url"]["url"] for one in content[:-1]} == {_data_url(DIGIT)}
    assert desk.page.locator(".question .medium").count() == 12
    assert desk.page.inner_text(".more") == "and 2 more"


def test_the_end_stays_in_view_unless_the_reader_has_left_it(desk: Visit, server: FakeServer) -> None:
    server.answers["Long"] = "\n\n".join(map(str, range(200)))
    desk.ask("Long")
    desk.answer()
    main = desk.page.locator("main")
    below = "(main) => Math.round(main.scrollHeight - main.scrollTop - main.clientHeight)"
    frame = "new Promise((done) => requestAnimationFrame(() => requestAnimationFrame(done)))"
    for number, place in enumerate((0, main.evaluate("(main) => main.scrollHeight") // 2), 1):
        if place:
            main.evaluate("(main, place) => main.scrollTop = place", place)
        desk.page.evaluate(frame)
        for name in "ab":
            desk.drop(f"{name}.png", "image/png", DIGIT)
        desk.page.wait_for_selector(f".strip .medium:nth-child({2 * number})")
        desk.page.evaluate(frame)
        assert main.evaluate("(main) => main.scrollTop") == place if place else main.evaluate(below) == 0


def test_answers_and_code_are_copied(desk: Visit, server: FakeServer) -> None:
    desk.page.context.grant_permissions(["clipboard-read", "clipboard-write"])
    server.answers["Code"] = "Look:\n```\na <b>\n```"
    desk.ask("Code")
    desk.answer()
    for button, text in ((".bar button", "a <b>"), (".copy", server.answers["Code"])):
        desk.page.click(button)
        desk.page.wait_for_selector(f"{button}:has-text('Copied')")
        assert desk.page.evaluate("navigator.clipboard.readText()") == text


def test_what_the_limits_forbid_is_refused_before_it_is_sent(
    browser: Any, fake: tuple[FakeServer, str], server: FakeServer
) -> None:
    server.info = {"limits": {"picture_bytes": 700, "pictures": 1, "picture_pixels": 300, "body_bytes": 2000}}
    with visit(browser, fake[1]) as page:
        alert = page.page.locator("#alerts p")
        for name, kind, content, words in (
            ("notes.txt", "text/plain", b"hello", "notes.txt is neither a picture"),
            ("empty.png", "image/png", b"", "empty.png is empty."),
            ("large.png", "image/png", bytes(701), "large.png has 701 bytes; the server takes files of 700 bytes."),
            ("bad.png", "image/png", b"no picture", "bad.png cannot be read as a picture"),
        ):
            page.drop(name, kind, content)
            alert.filter(has_text=words).wait_for()
        page.drop("a.png", "image/png", DIGIT)
        page.page.wait_for_selector(".strip img")
        page.drop("b.png", "image/png", DIGIT)
        alert.filter(has_text="That makes 2 pictures and videos in this chat; the server takes 1.").wait_for()
        page.ask("x" * 2000)
        assert re.match(r"This chat has \d\.\d KB; the server takes 2.0 KB\.", page.note())
    server.info = {"limits": {"picture_pixels": 255}}
    with visit(browser, fake[1]) as page:
        page.drop("a.png", "image/png", DIGIT)
        page.page.wait_for_selector("#alerts p:text-matches('a.png has 256 pixels; the server takes 255')")
    server.info = {"vision": False}
    with visit(browser, fake[1]) as page:
        assert not page.page.is_visible("#attach")
        page.drop("a.png", "image/png", DIGIT)
        page.page.wait_for_selector("#alerts p:text-is('This model reads text only.')")
    assert server.bodies == []


def test_the_key_is_asked_for_and_forgotten_with_the_tab(
    browser: Any, fake: tuple[FakeServer, str], server: FakeServer
) -> None:
    server.key = "right"
    with visit(browser, fake[1]) as page:
        for key in ("wrong", "right"):
            page.page.wait_for_selector("#key[open]")
            page.page.fill("#key-field", key)
            page.page.press("#key-field", "Enter")
            if key == "wrong":
                page.ask("Hello")
                page.page.wait_for_selector("#key-message:text-is('The server does not take this key.')")
        assert page.answer() == "You said: Hello"
        assert page.page.evaluate("[Object.values(sessionStorage).includes('right'), localStorage.length]") == [True, 0]


def test_a_phone_shows_everything(browser: Any, fake: tuple[FakeServer, str], server: FakeServer) -> None:
    server.answers["Show"] = WIDE
    small = {"width": 360, "height": 740}
    with visit(browser, fake[1], viewport=small, is_mobile=True, has_touch=True, color_scheme="dark") as phone:
        phone.page.tap(".sample")
        phone.page.wait_for_selector(".strip img")
        phone.page.fill("#input", "Show")
        phone.page.tap("#send")
        phone.answer()
        phone.page.tap("#open-settings")
        for fits in ("document.documentElement", "document.querySelector('main')"):
            assert phone.page.evaluate(f"{fits}.scrollWidth <= 360")
        too_small = """all => all.filter((one) => one.offsetWidth && (one.offsetWidth < 44 || one.offsetHeight < 44))
            .map((one) => one.outerHTML)"""
        assert phone.page.eval_on_selector_all("button, input:not([hidden])", too_small) == []
        assert phone.page.evaluate("getComputedStyle(document.body).backgroundColor") == "rgb(19, 21, 22)"


def test_a_server_that_is_gone_or_loading_is_waited_for(browser: Any, fake: tuple[FakeServer, str]) -> None:
    server, url = fake
    server.info = {"state": "loading"}
    page = browser.new_page()
    page.clock.install()
    page.goto(url)
    page.wait_for_selector("#model:text-is('digits-1b is loading')")
    assert page.is_disabled("#send")
    page.route("**/info", lambda route: route.abort())
    page.clock.run_for(1100)
    page.wait_for_selector("#alerts p:text-matches('The server cannot be reached')")
    page.unroute("**/info")
    server.info = {}
    page.clock.run_for(2100)
    page.wait_for_selector("body[data-server=ready]")
    assert page.inner_text("#alerts") == ""
    page.route("**/*", lambda route: route.abort())
    page.fill("#input", "Hello")
    page.press("#input", "Enter")
    page.wait_for_selector(".note.error:text-matches('The server cannot be reached')")
    page.wait_for_selector("body[data-server=gone] #alerts p")
    page.unroute("**/*")
    page.clock.run_for(2100)
    page.wait_for_selector("body[data-server=ready]")
    assert page.inner_text("#alerts") == ""
    page.close()


def test_the_page_works_below_a_prefix(browser: Any) -> None:
    proxy = FastAPI()
    proxy.mount("/vita", FakeServer().app())
    with serving(proxy) as url, visit(browser, f"{url}vita/") as page:
        page.page.click(".sample")
        page.page.wait_for_selector(".strip img")
        page.page.click("#send")
        assert page.answer() == "You said: Which digit is this?"


class _Engine(FakeEngine):
    """Says when a request is given up."""

    def abort(self, request_id: str) -> None:
        super().abort(request_id)
        self.gave_up.set()


def test_the_server_itself_answers_the_page(browser: Any) -> None:
    gate = threading.Semaphore(0)
    engine = _Engine(gate=gate)
    engine.gave_up = threading.Event()
    limits = Limits(text_characters=60)
    with fakes.serving(engine, api_key="secret", limits=limits) as (address, _), visit(browser, f"{address}/") as page:
        page.page.fill("#key-field", "secret")
        page.page.press("#key-field", "Enter")
        page.drop("three.png", "image/png", DIGIT)
        page.page.wait_for_selector(".strip img")
        gate.release(2)
        page.ask("one two three")
        page.page.wait_for_selector(".markdown p:text-is('one two')")
        page.page.keyboard.press("Escape")
        assert page.note() == "Stopped."
        assert engine.gave_up.wait(20)
        gate.release(100)
        page.ask("four **five**")
        assert page.answer(2) == "four five"
        assert [one.closed for one in engine.media] == [True, True]
        assert "10 tokens read" in page.page.inner_text(".exchange:last-child .stats").replace("\xa0", " ")
        page.ask("x" * 60)
        assert "text_characters=60 is the limit" in page.note(3)
        page.page.click("#clear")
        page.ask("six")
        assert page.answer() == "six"
