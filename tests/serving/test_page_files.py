"""The page's files: headers, sources, colours. No browser is needed."""

from __future__ import annotations

import re

import pytest
from fastapi import FastAPI
from fastapi.testclient import TestClient

from megatron_vita.serving.page import FOLDER, POLICY, page_router
from tests.serving.browser import find_browser


def test_files_come_with_the_policy_and_are_asked_for_again_by_tag() -> None:
    app = FastAPI()
    app.include_router(page_router())
    client = TestClient(app)
    for path in ["", *(f"page/{one.name}" for one in FOLDER.iterdir())]:
        answer = client.get(f"/{path}")
        assert answer.status_code == 200, path
        assert answer.headers["content-security-policy"] == POLICY
        assert answer.headers["x-content-type-options"] == "nosniff"
        assert answer.headers["referrer-policy"] == "no-referrer"
        assert client.get(f"/{path}", headers={"if-none-match": answer.headers["etag"]}).status_code == 304
        assert client.head(f"/{path}").headers["content-length"] == str(len(answer.content))
    for path in ("page/missing.js", "page/..%2fpage.py", "page/%2e%2e/page.py", "page/"):
        assert client.get(f"/{path}").status_code == 404, path


def test_sources_hold_no_markup_from_strings_and_no_long_files() -> None:
    for path in FOLDER.iterdir():
        if path.suffix in (".js", ".html", ".css"):
            source = path.read_text(encoding="utf-8")
            assert not re.search(r"innerHTML|outerHTML|insertAdjacentHTML|document\.write|eval\(|\bstyle=", source), (
                path
            )
            assert source.count("\n") <= 300, path
            assert not re.search(r"<script(?! type=\"module\" src)|\son\w+=", source), path


@pytest.mark.parametrize("dark", [False, True])
def test_colours_can_be_told_apart(dark: bool) -> None:
    """Contrast of texts is at least 4.5 : 1 (WCAG 2.1, 1.4.3)."""
    style = (FOLDER / "style.css").read_text(encoding="utf-8")
    light, _, rest = style.partition("@media (prefers-color-scheme: dark)")
    found = dict(re.findall(r"--([\w-]+): #(\w{6});", light))
    if dark:
        found |= dict(re.findall(r"--([\w-]+): #(\w{6});", rest))

    def light_of(name: str) -> float:
        parts = (int(found[name][i : i + 2], 16) / 255 for i in (0, 2, 4))
        linear = (one / 12.92 if one <= 0.04045 else ((one + 0.055) / 1.055) ** 2.4 for one in parts)
        return sum(weight * one for weight, one in zip((0.2126, 0.7152, 0.0722), linear, strict=True))

    pairs = [(one, ground) for one in ("text", "soft", "accent") for ground in ("ground", "raised", "sunken")]
    for one, ground in [
        *pairs,
        ("text", "tint"),
        ("accent", "tint"),
        ("danger", "danger-tint"),
        ("on-accent", "accent"),
    ]:
        dim, bright = sorted((light_of(one), light_of(ground)))
        assert (bright + 0.05) / (dim + 0.05) >= 4.5, (one, ground)


@pytest.mark.parametrize(("ci", "outcome"), [("true", pytest.fail.Exception), ("", pytest.skip.Exception)])
def test_only_ci_insists_on_a_browser(ci: str, outcome: type[BaseException], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", "")
    monkeypatch.setenv("CI", ci)
    with pytest.raises(outcome, match="apt-get install chromium-headless-shell"):
        find_browser()
