"""Check the results of a quickstart run against their expected values.

    python examples/quickstart/check.py --run DIR [--short]

Stage 1 must have changed nothing but the projector (every tensor's digest is compared with the start's) and lowered the
held-out loss by at least 30 %. After stage 2 at least 90 % of the held-out digits must be read right. After stage 4 at
least 80 % of the 64-frame videos, at least 70 % in each of five depth bands, at most 15 % with its tiles zeroed, and
the digits within 2 points of stage 2. `--short` checks what does not depend on having learnt.

Exit status 1 if a promise is broken; every one is printed with its figure either way.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from megatron_vita import log
from megatron_vita.evaluation.score import DEPTH_BANDS, RIGHT, depth_band


@dataclass(frozen=True)
class Promise:
    """One expected result, the measured value, and whether it holds."""

    says: str
    figure: str
    holds: bool


def check_projector_only(run: Path) -> Promise:
    """Stage 1 against the weights it started from."""
    from megatron_vita.checkpoint import resolve, tensor_digests

    start, end = run / "parts" / "start", run / "save" / "stage1"
    before, after = (tensor_digests(resolve(folder)) for folder in (start, end))
    changed = sorted(name for name in before if before[name] != after.get(name))
    foreign = [name for name in changed if not name.startswith("vision_projection.")]
    same_names = before.keys() == after.keys()
    figure = f"{len(changed)} of {len(before)} tensors changed" + (f", among them {foreign[:3]}" if foreign else "")
    return Promise("stage 1 changes projector tensors only", figure, bool(changed) and not foreign and same_names)


def check_held_out_loss(run: Path) -> Promise:
    """The first and last validation loss of stage 1."""
    lines = [json.loads(line) for line in (run / "save" / "stage1" / "validation.jsonl").read_text().splitlines()]
    first, last = lines[0]["loss"], lines[-1]["loss"]
    figure = f"{first:.3f} to {last:.3f} ({1 - last / first:.0%} lower)"
    return Promise("stage 1 lowers the held-out loss by 30 %", figure, last <= 0.7 * first)


def accuracy(results: Iterable[Mapping[str, Any]]) -> float:
    """Fraction of correct answers; NaN without answers."""
    verdicts = [result["verdict"] == RIGHT for result in results]
    return sum(verdicts) / len(verdicts) if verdicts else float("nan")


def different(results: Iterable[Mapping[str, Any]]) -> int:
    """Number of questions; None if one occurs twice, because then the lines are not of a single evaluation."""
    lines = [result["line"] for result in results]
    return len(lines) if len(set(lines)) == len(lines) else 0


def check_learning(run: Path) -> list[Promise]:
    """The accuracies, from the evaluation's result lines."""
    lines = [json.loads(line) for path in (run / "eval").rglob("results.jsonl") for line in path.open()]

    def select(stage: str, data: str, *, zeroed: bool = False) -> list[dict[str, Any]]:
        return [
            line
            for line in lines
            if Path(line["model"]).name == stage
            and Path(line["data"]).stem == f"eval_{data}"
            and line["zero_tiles"] == zeroed
        ]

    short2, short4 = accuracy(select("stage2", "digits")), accuracy(select("stage4", "digits"))
    needles = select("stage4", "needle_64")
    bands = [accuracy(n for n in needles if depth_band(n["fields"]["depth"]) == band) for band in range(DEPTH_BANDS)]
    blind = accuracy(select("stage4", "needle_64", zeroed=True))
    long4 = accuracy(needles)
    asked = [
        different(select("stage2", "digits")),
        different(select("stage4", "digits")),
        different(needles),
        different(select("stage4", "needle_64", zeroed=True)),
    ]
    enough = min(asked[:2]) >= 360 and min(asked[2:]) >= 500
    shown = ", ".join(f"{band:.0%}" for band in bands)
    return [
        Promise("at least 360 digits and 500 videos were asked", " and ".join(map(str, asked)), enough),
        Promise("held-out digits after stage 2 at least 90 %", f"{short2:.1%}", short2 >= 0.9),
        Promise("64-frame needles after stage 4 at least 80 %", f"{long4:.1%}", long4 >= 0.8),
        Promise("each of five depth bands at least 70 %", shown, all(band >= 0.7 for band in bands)),
        Promise("with zeroed tiles at most 15 %", f"{blind:.1%}", blind <= 0.15),
        Promise("digits after stage 4 within 2 points of stage 2", f"{short4:.1%}", short4 >= short2 - 0.02),
    ]


def main(argv: Sequence[str] | None = None) -> int:
    """Check and print."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False
    )
    parser.add_argument("--run", type=Path, required=True, help="output folder of quickstart.py")
    parser.add_argument("--short", action="store_true", help="leave out what needs a full training")
    arguments = parser.parse_args(argv)
    log.configure()
    promises = [check_projector_only(arguments.run)]
    if not arguments.short:
        promises += [check_held_out_loss(arguments.run), *check_learning(arguments.run)]
    for promise in promises:
        print(f"{'kept' if promise.holds else 'BROKEN':7} {promise.says}: {promise.figure}")
    broken = sum(not promise.holds for promise in promises)
    print(f"{len(promises) - broken} of {len(promises)} promises kept")
    return 1 if broken else 0


if __name__ == "__main__":
    sys.exit(main())
