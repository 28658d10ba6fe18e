"""Answers as Markdown in a real browser: what it becomes, how it grows, and what a hostile model tries."""

from __future__ import annotations

import re

from tests.serving.fake_server import FakeServer
from tests.serving.visit import Visit

MARKDOWN = """# Top
Some **bold**, *it*, ***both***, ~~gone~~, `a < b`, snake_case_name, 2 * 3 * 4 and [site](https://example.org/a_(b)).
New line, see https://example.org/x_y.

- one
  - inner **x**

    1. deep
- two

3. three
4. four

> quoted
> - item

| a | b |
| :-- | --: |
| `x` | 1<br>2 |
| only |

```python
if a < b:

    print("*no*")
```
---
last"""
HOSTILE = """<script>window.hacked = 1</script> <img src=x onerror="window.hacked = 2">

[a](javascript:window.hacked=3) [b](JaVaScRiPt&#58;alert(1)) [c](data:text/html,<script>hacked=4</script>)
[d](//evil.example) [e](vbscript:x) ![f](https://evil.example/track.png) <https://good.example> <javascript:x>
<svg/onload=hacked=5> <iframe srcdoc="<script>parent.hacked=6</script>"></iframe> <style>*{display:none}</style>

| <img src=x onerror=hacked=7> | b |
|---|---|
| [x](javascript:hacked=8) | <a href="javascript:hacked=9">z</a> |

```"><script>hacked=10</script>
</code></pre><script>hacked=11</script>"""
SAME = """async () => {
  const { MarkdownView } = await import("./page/markdown.js");
  let state = 1;
  const random = (n) => (state = (state * 48271) % 2147483647) % n;
  const parts = ["- ", "1. ", "> ", "```", "```py", "\\n", "\\n", "\\n\\n", "  ", "    ", "| a | b |", "|--|--|", "|",
    "a", "b c", "**", "*", "_", "`", "[x](http://y.z)", "[", "](", "# ", "---", "~~", "\\\\", "<br>", "http://a.b/c",
    "\\t", "~~~", "é"];
  for (let round = 0; round < 400; round++) {
    let text = "";
    for (let i = random(60); i >= 0; i--) text += parts[random(parts.length)];
    const [whole, grown] = [document.createElement("div"), document.createElement("div")];
    new MarkdownView(whole).update(text);
    const view = new MarkdownView(grown);
    for (let end = 0; end < text.length; ) view.update(text.slice(0, (end += 1 + random(9))));
    if (whole.innerHTML !== grown.innerHTML) return [text, whole.innerHTML, grown.innerHTML];
    if (whole.querySelector("script, img, iframe, style, [onerror], a:not([href^=http])")) return [text];
  }
  return null;
}"""
HUGE = """async () => {
  const { MarkdownView } = await import("./page/markdown.js");
  const parts = ["*", "**a ", "_a ", "[", "](", "[a](", "`", "``a`", "> ", "- ", "  - ", "| ", "#", " #", "\\\\", "<",
    "http://", "![", "~~a", "a\\n", "\\n", "- a\\n\\n", "> a\\n", "1. a\\n", "|a|b|\\n", "```\\n", "(((", "|-", "a (http://b(",
    "\\t", " "];
  for (const one of parts) {
    const text = one.repeat(Math.ceil(20000 / one.length));
    new MarkdownView(document.createElement("div")).update(text);
  }
  return true;
}"""


def test_markdown_becomes_elements(desk: Visit, server: FakeServer) -> None:
    server.answers["Show"] = MARKDOWN
    desk.ask("Show")
    desk.answer()
    html = re.sub(r' (tabindex|rel|target|role|aria-label)="[^"]*"', "", desk.page.inner_html(".markdown"))
    html = re.sub(r"<button.*?</button>", "", html)
    assert html == (
        '<h3 class="level-1">Top</h3><p>Some <strong>bold</strong>, <em>it</em>, <strong><em>both</em></strong>, '
        "<del>gone</del>, <code>a &lt; b</code>, snake_case_name, 2 * 3 * 4 and "
        '<a href="https://example.org/a_(b)">site</a>.<br>New line, see '
        '<a href="https://example.org/x_y">https://example.org/x_y</a>.</p>'
        "<ul><li>one<ul><li>inner <strong>x</strong><ol><li>deep</li></ol></li></ul></li><li>two</li></ul>"
        '<ol start="3"><li>three</li><li>four</li></ol><blockquote><p>quoted</p><ul><li>item</li></ul></blockquote>'
        '<div class="table"><table><thead><tr><th>a</th><th class="right">b</th></tr></thead><tbody><tr><td>'
        '<code>x</code></td><td class="right">1<br>2</td></tr><tr><td>only</td><td class="right"></td></tr></tbody>'
        '</table></div><div class="code"><div class="bar"><span>python</span></div><pre><code>if a &lt; b:\n\n    '
        'print("*no*")</code></pre></div><hr><p>last</p>'
    )
    assert desk.page.get_attribute(".markdown a", "rel") == "noopener noreferrer nofollow"


def test_hostile_markdown_is_text(desk: Visit, server: FakeServer) -> None:
    server.answers["Attack"] = HOSTILE
    desk.ask("Attack")
    text = desk.answer()
    assert "<script>window.hacked = 1</script>" in text
    assert "[a](javascript:window.hacked=3)" in text
    assert desk.page.evaluate("window.hacked") is None
    links = desk.page.eval_on_selector_all(".markdown a", "all => all.map((one) => one.href)")
    assert links == ["https://evil.example/track.png", "https://good.example/"]
    assert desk.page.locator(".markdown").locator("script, img, iframe, style, svg:not(.icon), [onerror]").count() == 0
    # A breach would have been seen: the policy stops, and reports, what is put in by force.
    desk.page.evaluate("document.body.insertAdjacentHTML('beforeend', '<p id=x><img src=x onerror=\"hacked=1\"></p>')")
    desk.page.wait_for_selector("#x", state="attached")
    desk.page.evaluate("new Promise((done) => setTimeout(done))")
    assert desk.page.evaluate("window.broken.splice(0)") == ["script-src-attr"]
    assert desk.page.evaluate("window.hacked") is None


def test_markdown_that_grows_looks_as_if_it_came_at_once(desk: Visit) -> None:
    assert desk.page.evaluate(SAME) is None


def test_long_and_deep_markdown_is_rendered(desk: Visit) -> None:
    """No recursion overflows. What is quadratic in the text, or worse, would take minutes."""
    assert desk.page.evaluate(HUGE)
