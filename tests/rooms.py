"""The packages of megatron_vita, bottom up: what each does, and what it may import.

The one definition: tests/test_rooms.py holds the sources against it, and docs/architecture.md shows it as a table.

    python -m tests.rooms        writes that table anew
"""

from __future__ import annotations

import ast
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1] / "megatron_vita"
DOCUMENT = ROOT.parent / "docs/architecture.md"
BEGIN = "<!-- This table is written by `python -m tests.rooms`. -->"
END = "<!-- End of the table. -->"


@dataclass(frozen=True)
class Room:
    """A package, or a module right below megatron_vita."""

    name: str
    """Dotted, below megatron_vita. A file belongs to the room with the longest name that fits."""
    does: str
    on: tuple[str, ...] = ()
    """Rooms, or single modules of them, that it may import. `errors` and `log` are everybody's."""


ROOMS = (
    Room("errors", "errors that a user can fix"),
    Room("log", "a log where rank 0 speaks"),
    Room("files", "sync, atomic replacement, locks, digests, sizes; what macOS lacks"),
    Room("config", "frozen dataclasses, one a concern; YAML and command line → one `StageConfig` a stage"),
    Room("device", "CUDA or CPU: the one module that knows"),
    Room("kernels", "which kernel computes what on which device: one table",
         ("config", "device")),
    Room("core_optimizer", "megatron-core's distributed optimizer, taken apart for checkpoints"),
    Room("seed", "a seed for every purpose, by name"),
    Room("layout", "who owns which token and tile: index arithmetic"),
    Room("planning", "parameters, operations, memory, before any rank starts", ("config",)),
    Room("data", "types: Sample, Example, settings, reject codes", ("config",)),
    Room("data.media", "bytes → pixels: pictures, videos, tiles", ("files", "config", "data")),
    Room("data.text", "Sample → Example: tokenizer, template, labels, placeholders", ("data", "data.media")),
    Room("data.sources.fields", "what the field calls things: names of media, marks, weights",
         ("data", "data.media.names")),
    Room("data.sources.media_store", "where a dataset's media lie: folders, archives, indexes",
         ("files", "data", "data.media.names")),
    Room("data.sources.readers", "data files → records",
         ("data", "data.media.names", "data.sources.fields", "data.sources.media_store")),
    Room("data.sources", "records → Sample: dataset table, mix, mappers, lint",
         ("config", "files", "data", "data.media.names", "data.sources.fields", "data.sources.media_store",
          "data.sources.readers")),
    Room("data.shards", "the packed format, its manifest and its reader", ("files", "config", "layout", "data")),
    Room("data.shards.writer", "Examples → packs → a published set", ("files", "layout", "data", "data.shards")),
    Room("data.compile", "`preprocess_data`: sources, media, text and shards in many processes",
         ("files", "layout", "data", "data.media", "data.text", "data.sources", "data.sources.media_store",
          "data.sources.readers", "data.shards", "data.shards.writer")),
    Room("data.loading", "shards → this rank's `Batch`",
         ("config", "layout", "data", "data.media", "data.shards", "data.text.tokenizer")),
    Room("data.inspect", "what is in a set, for people",
         ("layout", "data", "data.media", "data.text", "data.shards", "data.loading")),
    Room("data.tokenizer", "import path that outside scripts know, of data/text/tokenizer.py", ("data.text",)),
    Room("data.tiling", "import path that outside scripts know, of data/media/tiling.py", ("data.media",)),
    Room("data.video", "import path that outside scripts know, of data/media/video/open.py", ("data.media",)),
    Room("parallel", "many ranks, no model: groups, attention, tile exchange, loss",
         ("config", "device", "kernels", "layout")),
    Room("models", "tensors in, tensors out: tower, projector, decoder",
         ("config", "device", "kernels", "seed", "layout", "parallel")),
    Room("checkpoint", "sharded save and load, run state, integrity; what all ranks must agree on",
         ("files", "config", "device", "core_optimizer", "data.spec")),
    Room("convert", "Hugging Face in and out, with proofs",
         ("files", "config", "device", "layout", "data.spec", "data.text.backends", "data.text.tokenizer",
          "parallel", "models", "checkpoint")),
    Room("training", "set-up, step, optimizer, loop, ledger, stages",
         ("files", "config", "device", "kernels", "core_optimizer", "data.loading", "data.shards",
          "data.text.tokenizer", "parallel", "models", "checkpoint", "convert")),
    Room("checks", "parity: one step in any layout, and every fused kernel, against plain PyTorch",
         ("config", "device", "kernels", "seed", "layout", "data", "data.loading", "parallel", "models", "training")),
    Room("inference", "engine with KV cache, sampling, batches of requests in OpenAI's form",
         ("files", "config", "device", "layout", "data", "data.media", "data.text", "data.sources", "parallel",
          "models", "checkpoint", "convert")),
    Room("evaluation", "benchmarks: questions, tasks that judge answers, results that survive a kill, tables",
         ("files", "config", "data", "data.media", "data.text", "data.sources", "data.sources.readers", "inference")),
    Room("serving", "OpenAI's HTTP API over the engine, its web page, metrics",
         ("files", "config", "data", "data.media", "inference")),
    Room("dryrun", "a rank's step at full size on fake CUDA tensors; a process of its own",
         ("files", "config", "device", "kernels", "core_optimizer", "layout", "planning", "data", "data.loading",
          "data.shards", "parallel", "models", "training", "inference")),
)  # fmt: skip

EVERYBODY = ("errors", "log", "__init__", "__version__")
_BY_NAME = {room.name: room for room in ROOMS}


def modules() -> dict[str, Path]:
    """Every module of the package: its dotted name below megatron_vita, and its file."""
    found = {}
    for path in sorted(ROOT.rglob("*.py")):
        parts = path.relative_to(ROOT).with_suffix("").parts
        found[".".join(parts[:-1] if parts[-1] == "__init__" else parts) or "__init__"] = path
    return found


@lru_cache
def imports_of(path: Path) -> frozenset[str]:
    """Dotted names that a file imports, at any depth of its code."""
    names: set[str] = set()
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            names.update(alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}: relative imports hide which room is meant"
            names.update(f"{node.module}.{alias.name}" for alias in node.names)
    return frozenset(names)


def ours(path: Path) -> Iterator[str]:
    """Names below megatron_vita that a file imports."""
    for name in imports_of(path):
        if name.startswith("megatron_vita."):
            yield name.removeprefix("megatron_vita.")


def room_of(name: str) -> str | None:
    """The room that a module, or a name of one, belongs to."""
    fitting = [room.name for room in ROOMS if name == room.name or name.startswith(room.name + ".")]
    return max(fitting, key=len, default=None)


def may_import(room: str, target: str) -> bool:
    """Whether a room may import a module, or a name of one."""
    home = room_of(target)
    if target.split(".")[0] in EVERYBODY or home == room:
        return True
    allowed = _BY_NAME[room].on
    return home in allowed or any(
        target == one or target.startswith(one + ".") for one in allowed if one not in _BY_NAME
    )


def floors(above: Mapping[str, Iterable[str]]) -> dict[str, int]:
    """For each node how many stand upon each other down to the ground, itself counted.

    Args:
        above: node -> nodes that it stands on.

    Raises:
        ValueError: some stand on each other in a circle, which is named.
    """
    height: dict[str, int] = {}

    def climb(node: str, path: tuple[str, ...]) -> int:
        if node in path:
            raise ValueError(f"a circle: {' → '.join((*path[path.index(node) :], node))}")
        if node not in height:
            height[node] = 1 + max((climb(one, (*path, node)) for one in above.get(node, ())), default=0)
        return height[node]

    for node in above:
        climb(node, ())
    return height


def rooms_of_data() -> dict[str, set[str]]:
    """What stands on what in data/: its rooms, and each file that lies flat in it, as nodes."""
    names = modules()

    def node(name: str) -> str | None:
        """The room of a module or of a name in one; of the flat files, the file."""
        room = room_of(name)
        if room is None or room.split(".")[0] != "data":
            return None
        return ".".join(name.split(".")[:2]) if room == "data" else room

    graph: dict[str, set[str]] = {}
    for name, path in names.items():
        here = node(name)
        if here is not None and name != "data":
            graph.setdefault(here, set()).update({one for target in ours(path) if (one := node(target))} - {here})
    return graph


def table() -> str:
    """The rooms as a Markdown table."""
    lines = ["| package | what it does | may import |", "| --- | --- | --- |"]
    for room in ROOMS:
        path = ROOT / room.name.replace(".", "/")
        shown = f"{room.name.replace('.', '/')}{'/' if path.is_dir() else '.py'}"
        on = [one if one != "data" else "data (types)" for one in room.on]
        lines.append(f"| `{shown}` | {room.does} | {', '.join(on).replace('.', '/') or 'nothing'} |")
    return "\n".join(lines)


def with_table(document: str) -> str:
    """The document with the table as it is now between its two marks."""
    before, _, rest = document.partition(BEGIN)
    _, _, after = rest.partition(END)
    assert after, f"{DOCUMENT}: the marks around the table are missing"
    return f"{before}{BEGIN}\n\n{table()}\n\n{END}{after}"


if __name__ == "__main__":
    DOCUMENT.write_text(with_table(DOCUMENT.read_text(encoding="utf-8")), encoding="utf-8")
