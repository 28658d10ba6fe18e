"""Rejected records at the end of a run: their counts by code, and the share of a source at which a run is refused."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence

from megatron_vita.data.rejects import counted
from megatron_vita.data.shards.manifest import SourceCounts

WARN_ABOVE = 0.05
"""Share of rejected records of a source above which a run ends with a warning."""
MAX_REJECTED = 0.5
"""Default of `--max-rejected`: a run is refused if a larger share of a source's records is rejected."""
FEWEST = 8
"""Smallest number of a source's records to which the default share applies."""
_LISTED = 20


def too_many(sources: Sequence[SourceCounts], limit: float | None) -> list[SourceCounts]:
    """Sources with a larger rejected share than `limit`; None: than the default."""
    if limit is None:
        return [one for one in sources if one.read >= FEWEST and _rejected(one) > MAX_REJECTED * one.read]
    return [one for one in sources if _rejected(one) > limit * one.read]


def describe(source: SourceCounts) -> str:
    """`NAME: 3 of 10 records are rejected (2 media_missing, 1 bad_json)`."""
    number = _rejected(source)
    return (
        f"{source.name}: {number} of {counted(source.read, 'record')} {'is' if number == 1 else 'are'} rejected "
        f"({by_code(source.rejected)})"
    )


def by_code(counts: Mapping[str, int]) -> str:
    """`2 media_missing, 1 bad_json`, most frequent first; `none`."""
    ordered = sorted(((-count, code) for code, count in counts.items() if count))
    return ", ".join(f"{-count} {code}" for count, code in ordered) or "none"


def warnings(sources: Sequence[SourceCounts]) -> list[str]:
    """A line for each source of which more than WARN_ABOVE is rejected, the worst first."""
    found = [one for one in sources if _rejected(one) > WARN_ABOVE * one.read]
    found.sort(key=lambda one: -_rejected(one) / one.read)
    lines = [f"warning: {describe(one)}" for one in found[:_LISTED]]
    if len(found) > _LISTED:
        more = counted(len(found) - _LISTED, "more source has", "more sources have")
        lines.append(f"warning: {more} more than {WARN_ABOVE:.0%} rejected")
    return lines


def total(sources: Sequence[SourceCounts]) -> str:
    """`rejected: none`, or how many of how many records, by code."""
    codes = sum((Counter(one.rejected) for one in sources), Counter[str]())
    if not codes.total():
        return "rejected: none"
    return f"rejected: {codes.total()} of {counted(sum(one.read for one in sources), 'record')} ({by_code(codes)})"


def _rejected(source: SourceCounts) -> int:
    return sum(source.rejected.values())
