"""A JSON schema becomes a grammar of llguidance, once a child process has tried it out.

Schemas come from strangers. llguidance bounds most of its work, but not all: patterns that must hold together, or
multiples of large numbers, take minutes. So a schema is compiled and used elsewhere first, and refused if that takes
long. The child imports no torch; it starts in a tenth of a second.
"""

from __future__ import annotations

import json
import os
import random
import resource
import signal
import subprocess
import sys
from functools import cache, lru_cache
from typing import TYPE_CHECKING, Any

from megatron_vita.errors import ConfigError

if TYPE_CHECKING:
    from llguidance import LLMatcher, LLTokenizer

ANY_OBJECT = '{"type": "object"}'
"""The schema of OpenAI's `json_object`."""
MAX_CHARACTERS = 1 << 16
"""Most characters of a schema."""
_SECONDS = 2
"""Of computing that trying a schema out may take."""
_MEMORY = 2 << 30
"""Bytes of address space that it may take."""
_TOKENS = 300
"""That it writes; each is a byte."""
_LIMITS = {
    "initial_lexer_fuel": 100_000,
    "step_lexer_fuel": 50_000,
    "step_max_items": 20_000,
    "max_items_in_row": 1_000,
    "max_lexer_states": 20_000,
    "max_grammar_size": 100_000,
    "verbose_errors": False,
}
_BLANKS = r" |\r?\n[ \t]{0,64}"
"""What may stand between JSON's tokens: one space, or a new line and its indent. With blanks without end a model that
does not know what to say says blanks."""


def check_guide(schema: str) -> None:
    """Refuse a schema that no answer can be guided by. Any thread may call it; a schema that is known costs nothing.

    Args:
        schema: a JSON schema, as JSON.

    Raises:
        ConfigError: it is no JSON object, uses what llguidance does not implement, contradicts itself, or takes too
            much work; or llguidance is not installed.
    """
    library()
    if (problem := _problem(schema)) is not None:
        raise ConfigError(f"the JSON schema cannot guide an answer: {problem}")


def grammar_of(schema: str) -> str:
    """llguidance's grammar of a schema.

    Raises:
        ValueError: it is no JSON object.
    """
    value = json.loads(schema)
    if not isinstance(value, dict):
        raise ValueError("it is no object")
    value.pop("x-guidance", None)  # llguidance's own options, which could ask for what is no JSON
    return library().LLMatcher.grammar_from_json_schema(
        json.dumps(value), overrides={"whitespace_flexible": True, "whitespace_pattern": _BLANKS}
    )


def matcher_of(tokenizer: LLTokenizer, grammar: str) -> LLMatcher:
    """What follows a grammar, within limits; it may be in error."""
    return library().LLMatcher(tokenizer, grammar, log_level=0, limits=library().LLParserLimits(**_LIMITS))


def error_of(matcher: LLMatcher) -> str | None:
    """Why a matcher cannot go on, in one line."""
    if not matcher.is_error():
        return None
    why = matcher.get_error().partition("\n")[0]
    return f"{why[:300]}..." if len(why) > 300 else why


@cache
def library() -> Any:
    """The package llguidance.

    Raises:
        ConfigError: it is not installed.
    """
    try:
        import llguidance
    except ImportError as error:
        raise ConfigError(
            "guided decoding (response_format) needs the package llguidance: pip install 'megatron-vita[serve]'."
        ) from error
    return llguidance


@lru_cache(maxsize=256)
def _problem(schema: str) -> str | None:
    """What is wrong with a schema, as a child finds it. Raises ConfigError: the child does not come to an end."""
    if schema == ANY_OBJECT:
        return None
    if len(schema) > MAX_CHARACTERS:
        return f"it has {len(schema)} characters, {MAX_CHARACTERS} at most. Make it smaller."
    path = os.pathsep.join(entry or os.getcwd() for entry in sys.path)
    try:
        child = subprocess.run(
            [sys.executable, "-m", "megatron_vita.inference.grammar"],
            input=schema.encode(),
            capture_output=True,
            env={**os.environ, "PYTHONPATH": path},
            timeout=30 * _SECONDS,
            check=False,
        )
    except subprocess.TimeoutExpired:  # the machine is busy, so this says little of the schema: it is not remembered
        raise ConfigError(
            f"trying the JSON schema out took more than {30 * _SECONDS} seconds. Simplify it, or try again."
        ) from None
    if child.returncode == -signal.SIGXCPU:
        return f"trying it out took more than {_SECONDS} seconds of computing. Simplify its patterns and multiples."
    if child.returncode:
        return f"trying it out failed (exit status {child.returncode}), most likely for memory. Simplify it."
    return json.loads(child.stdout)


def _try_out(schema: str) -> str | None:
    """What is wrong with a schema."""
    try:
        matcher = matcher_of(library().LLTokenizer("byte"), grammar_of(schema))
    except (ValueError, RecursionError) as error:
        return f"{str(error)[:300]}. Send a JSON object, not nested too deeply."
    choose = random.Random(0)
    for count in range(_TOKENS):
        bits = matcher.compute_bitmask()
        if (why := error_of(matcher)) is not None:
            empty = not count and why.startswith("NoExtension")
            return "no text matches it. Check its references." if empty else f"{why}. Simplify it."
        matcher.consume_token(choose.choice([one for one in range(8 * len(bits)) if bits[one // 8] >> one % 8 & 1]))
        if matcher.is_stopped() and not matcher.is_error():
            matcher.reset()
    return None


def main() -> None:
    """The child: a schema comes on standard input, what is wrong with it goes to standard output as JSON."""
    library()
    schema = sys.stdin.buffer.read().decode()
    resource.setrlimit(resource.RLIMIT_CPU, (_SECONDS, _SECONDS + 1))
    resource.setrlimit(resource.RLIMIT_AS, (_MEMORY, _MEMORY))
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    sys.stdout.write(json.dumps(_try_out(schema)))


if __name__ == "__main__":
    main()
