"""A person in front of the page: drops files, asks, reads answers."""

from __future__ import annotations

import base64
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

LISTEN = "window.broken = []; addEventListener('securitypolicyviolation', (e) => broken.push(e.violatedDirective));"
DROP = """([name, type, content, kinds]) => {
  const bytes = Uint8Array.from(atob(content), (one) => one.charCodeAt(0));
  const data = new DataTransfer();
  data.items.add(new File([bytes], name, { type }));
  const options = { dataTransfer: data, clipboardData: data, bubbles: true, cancelable: true };
  for (const kind of kinds)
    document.querySelector("main").dispatchEvent(new (kind == "paste" ? ClipboardEvent : DragEvent)(kind, options));
}"""


class Visit:
    """A page that a person looks at."""

    def __init__(self, page: Any) -> None:
        self.page = page
        page.set_default_timeout(20000)

    def drop(
        self, name: str, kind: str, content: bytes, kinds: tuple[str, ...] = ("dragenter", "dragover", "drop")
    ) -> None:
        """Drop a file on the page, or paste it."""
        self.page.evaluate(DROP, [name, kind, base64.b64encode(content).decode(), kinds])

    def ask(self, question: str) -> None:
        """Type a question and send it."""
        self.page.fill("#input", question)
        self.page.press("#input", "Enter")

    def answer(self, number: int = 1) -> str:
        """Text of an answer that is complete."""
        return self.page.inner_text(f".exchange:nth-child({number}) .answer[aria-busy=false] .markdown")

    def note(self, number: int = 1) -> str:
        """What the page says about an answer that has ended."""
        return self.page.inner_text(f".exchange:nth-child({number}) .answer[aria-busy=false] .note:not([hidden])")


@contextmanager
def visit(browser: Any, url: str, **options: Any) -> Iterator[Visit]:
    """Open the page; at the end nothing has broken the policy, failed in a script, or left this machine."""
    context = browser.new_context(**options)
    context.add_init_script(LISTEN)
    page = context.new_page()
    errors: list[str] = []
    page.on("pageerror", lambda error: errors.append(str(error)))
    page.on("request", lambda one: one.url.startswith((url, "blob:", "data:")) or errors.append(one.url))
    page.goto(url)
    page.wait_for_selector("body[data-server=ready]")
    yield Visit(page)
    assert page.evaluate("window.broken") == []
    assert errors == []
    context.close()
