"""What all command lines of the repository have in common."""

from __future__ import annotations

import ast
from collections.abc import Iterator
from pathlib import Path

ROOT = Path(__file__).parents[1]
FOLDERS = ("tools", "examples", "benchmarks", "megatron_vita", "tests")


def parsers() -> Iterator[tuple[str, ast.Call]]:
    """Every place where a parser, or a command's own, is made."""
    for path in sorted([*ROOT.glob("*.py"), *(one for folder in FOLDERS for one in (ROOT / folder).rglob("*.py"))]):
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.Call):
                name = node.func.attr if isinstance(node.func, ast.Attribute) else getattr(node.func, "id", "")
                if name in ("ArgumentParser", "add_parser"):
                    yield f"{path.relative_to(ROOT)}:{node.lineno}", node


def test_no_flag_may_be_shortened() -> None:
    """A flag that begins like another would change what a script means that was written before there was the other."""
    found = dict(parsers())
    assert len(found) > 20
    for place, call in found.items():
        given = {keyword.arg: keyword.value for keyword in call.keywords}
        value = given.get("allow_abbrev")
        assert isinstance(value, ast.Constant) and value.value is False, f"{place}: say allow_abbrev=False"  # noqa: PT018
