"""The main job in miniature: open data -> packed shards -> parts -> four stages -> Hugging Face -> an answer.

    python examples/quickstart/quickstart.py --output runs/quickstart [--seed N] [--short] [--needle]

Every step is a command that a user of the large system runs too; each is shown before it runs. Finished steps are
remembered in the output folder, so a run that was stopped goes on where it was. `--short` walks the same way with
little data and few steps: it shows that everything works, not that it learns. `--needle` adds videos of 1,024 to 4,096
frames to the curve of videos that are longer than any of training.
"""

from __future__ import annotations

import argparse
import json
import os
import shlex
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
HERE = "examples/quickstart"
STAGES = ("stage1", "stage2", "stage3", "stage4")
SEQUENCE_LENGTHS = {"text": 512, "valid": 512, "stage1": 512, "stage2": 1024, "stage3": 512, "stage4": 1024}
NUMBER_OF_STEPS = 10
LONGER, LONGEST = (64, 128, 256, 512), (1024, 2048, 4096)
"""Frames of the videos of `make quickstart` and of `--needle`; training has up to 64 frames, in 1,024 tokens."""
YARN = {"rope_type": "yarn", "factor": LONGEST[-1] / 64, "original_max_position_embeddings": SEQUENCE_LENGTHS["stage4"]}


@dataclass(frozen=True)
class Step:
    """A step: its name, what it shows, and its lanes. Commands of a lane run one after the other, lanes in parallel."""

    name: str
    says: str
    lanes: list[list[list[str]]]


def steps(run: str, *, seed: int, short: bool, needle: bool = False) -> Iterator[Step]:
    """The whole way, in order. `run` is the output folder, relative to the checkout or absolute.

    Steps are made one by one, when the one before is done: the last asks about a picture that the first wrote.
    """
    python = sys.executable
    less = ["--short"] if short else []
    seeds = ["--seed", str(seed)]
    few = ["--train-iters", "4", "--eval-iters", "1"] if short else []

    def example(script: str, *flags: str) -> list[str]:
        return [python, f"{HERE}/{script}", *flags]

    def tool(script: str, *flags: str) -> list[str]:
        return [python, f"tools/{script}", *flags]

    def convert(*flags: str) -> list[str]:
        return tool("convert_ckpt.py", *flags)

    def preprocess(name: str) -> list[str]:
        paths = ["--tokenizer", f"{run}/tokenizer", "--output", f"{run}/shards/{name}"]
        sizes = ["--seq-length", str(SEQUENCE_LENGTHS[name]), "--image-size", "16", "--patch-size", "4"]
        media = ["--max-tiles", "6", "--max-frames", "64", "--workers", "1", "--resume"]
        return tool("preprocess_data.py", "--data-config", f"{HERE}/mixes/{name}.yaml", *paths, *sizes, *media)

    def ranks(number: int) -> list[str]:
        return [python, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(number)]

    def train(config: str, number: int) -> list[str]:
        return [*ranks(number), "pretrain_vita.py", "--config", f"{HERE}/{config}", *seeds, *few]

    def evaluate(output: str, models: Sequence[str], sets: Sequence[str], *flags: str) -> list[str]:
        files = [flag for name in sets for flag in ("--data", f"{run}/data/eval_{name}.jsonl")]
        budget = ["--max-new-tokens", "4", "--output", f"{run}/eval/{output}", *flags]
        return tool("evaluate.py", "--task", "exact_match", "--model", *models, *files, *budget)

    def evaluate_long(output: str, frames: Sequence[int], *flags: str) -> list[str]:
        """By two context-parallel ranks; one question at a time, so that its prefill can be timed."""
        sets = [f"long_needle_{number}" for number in frames]
        alone = ["--context-parallel-size", "2", "--max-num-seqs", "1", "--max-frames", str(LONGEST[-1])]
        return [*ranks(2), *evaluate(output, saved[-1:], sets, *alone, *flags)[1:]]

    def with_yarn(frames: Sequence[int], part: str) -> list[str]:
        return evaluate_long(f"long_{part}_yarn", frames, "--rope-scaling", json.dumps(YARN))

    def as_trained(frames: Sequence[int], part: str) -> list[str]:
        """But that the model takes any length."""
        return evaluate_long(f"long_{part}", frames, "--max-position-embeddings", str(16 * LONGEST[-1]))

    limit = ["--limit", "20"] if short else []
    saved = [f"{run}/save/{stage}" for stage in STAGES]
    thirty = ["--steps", "30"] if short else []
    yield Step(
        "data",
        "Write scikit-learn's digits and photographs the way publishers do",
        [[example("make_data.py", "--output", f"{run}/data", *seeds, *less)]],
    )
    yield Step(
        "tokenizer",
        "Train a byte-level BPE on the text",
        [[example("make_tokenizer.py", "--data", f"{run}/data", "--output", f"{run}/tokenizer")]],
    )
    llm, vision, start = f"{run}/parts/llm", f"{run}/parts/vision", f"{run}/parts/start"
    yield Step(
        "shards and parts",
        "Compile the data into packed shards; train a tiny Qwen2.5 on text and a tiny InternViT on digits",
        [
            [preprocess("text"), train("lm.yaml", 1), preprocess("stage3"), preprocess("stage1")],
            [
                example("make_tower.py", "--data", f"{run}/data", "--output", vision, *seeds, *thirty),
                preprocess("stage2"),
                preprocess("stage4"),
                preprocess("valid"),
            ],
        ],
    )
    yield Step(
        "import",
        "Write the decoder as a publisher would, then join the two Hugging Face folders into a fresh model",
        [
            [
                convert("export", "--checkpoint", f"{run}/parts/lm/text", "--output", llm, "--format", "llm"),
                convert("import", "--config", f"{HERE}/run.yaml", "--llm", llm, "--vision", vision, "--output", start),
            ]
        ],
    )
    yield Step(
        "train",
        "Four stages in two processes: data, tensor and sequence, pipeline, context parallel",
        [[train("run.yaml", 2)]],
    )
    yield Step(
        "export and evaluate",
        "Ask about held-out pictures after every stage; write a folder that stock transformers agrees with",
        [
            [
                evaluate("final", saved[-1:], ["needle_64", "needle_32", "needle_8", "frame_number"], *limit),
                convert("export", "--checkpoint", saved[-1], "--output", f"{run}/hf", "--format", "internvl"),
                convert("verify", saved[-1], f"{run}/hf", "--logits"),
            ],
            [
                evaluate("stages", saved, ["digits", "photos", "needle_16"], *limit),
                evaluate("earlier", saved[:-1], ["needle_64"], "--limit", "20" if short else "100"),
                evaluate("blind", saved[-1:], ["needle_64"], "--zero-tiles", *limit),
            ],
        ],
    )
    yield Step(
        "longer than trained",
        "Ask about videos of up to 512 frames, which no training has seen, in two context-parallel processes",
        [[with_yarn(LONGER[:2] if short else LONGER, "512")]],
    )
    yield Step(
        "report", "Draw the loss, the needle heat map and a page of answers", [[example("report.py", "--run", run)]]
    )
    first = (ROOT / run / "data" / "eval_digits.jsonl").open(encoding="utf-8").readline()
    unseen = f"{run}/data/{json.loads(first)['images'][0]}"
    yield Step(
        "chat",
        "Ask about a picture it has never seen",
        [[tool("chat.py", "--model", f"{run}/hf", "--image", unseen, "Which digit is this?")]],
    )
    yield Step("check", "Hold the run to what was promised", [[example("check.py", "--run", run, *less)]])
    if needle:
        yield Step(
            "needle",
            "Ask about videos of up to 4,096 frames, without YaRN too; draw the report again",
            [
                [
                    as_trained(LONGER, "512"),
                    as_trained(LONGEST, "4096"),
                    with_yarn(LONGEST, "4096"),
                    example("report.py", "--run", run),
                ]
            ],
        )


class Lane:
    """Commands that run one after the other; with other lanes in parallel, each command writes to a log file."""

    def __init__(self, commands: list[list[str]], logs: list[Path] | None) -> None:
        self.commands, self.logs = commands, logs
        self.at = -1
        self.process: subprocess.Popen[bytes] | None = None
        self.shown = ""
        self._next()

    def _next(self) -> None:
        self.at += 1
        self.process = None
        if self.at < len(self.commands):
            command = self.commands[self.at]
            print("  $ " + shlex.join("python" if part == sys.executable else part for part in command), flush=True)
            output = self.logs[self.at].open("wb") if self.logs else None
            self.process = subprocess.Popen(command, cwd=ROOT, stdout=output, stderr=output)

    def poll(self) -> bool:
        """Go on to the next command when one is done; false when all are.

        Raises:
            subprocess.CalledProcessError: a command failed; the end of its log is shown.
        """
        if self.process is None:
            return False
        status = self.process.poll()
        if status is not None:
            if self.logs and status:
                print(self.logs[self.at].read_text(encoding="utf-8", errors="replace")[-4000:], flush=True)
            elif self.logs:
                print(f"    {last_line(self.logs[self.at])}", flush=True)
            if status:
                raise subprocess.CalledProcessError(status, self.commands[self.at])
            self._next()
        return self.process is not None

    def show(self) -> None:
        """The running command's last line of output, if it has changed."""
        line = last_line(self.logs[self.at]) if self.logs and self.process else ""
        if line and line != self.shown:
            self.shown = line
            print(f"    ... {line}", flush=True)

    def stop(self) -> None:
        """Terminate the running command."""
        if self.process is not None and self.process.poll() is None:
            self.process.terminate()


def run_step(step: Step, *, log_folder: Path) -> None:
    """Run a step's lanes side by side.

    Raises:
        subprocess.CalledProcessError: a command failed; the other lanes are stopped.
    """
    log_folder.mkdir(parents=True, exist_ok=True)
    lanes = []
    for number, commands in enumerate(step.lanes, 1):
        names = [log_folder / f"{step.name.replace(' ', '_')}_{number}{at}.log" for at in range(1, len(commands) + 1)]
        lanes.append(Lane(commands, names if len(step.lanes) > 1 else None))
    shown = time.monotonic()
    try:
        while sum(lane.poll() for lane in lanes):  # not any(): every lane must be polled
            time.sleep(0.1)
            if time.monotonic() > shown + 5:
                shown = time.monotonic()
                for lane in lanes:
                    lane.show()
    finally:
        for lane in lanes:
            lane.stop()


def last_line(log: Path) -> str:
    """The last line of a command's output; a carriage return, as of progress bars, ends a line too."""
    text = log.read_bytes()[-2000:].decode("utf-8", "replace").replace("\r", "\n")
    lines = [line.strip() for line in text.splitlines() if line.strip()]
    return lines[-1][:150] if lines else ""


def main(argv: Sequence[str] | None = None) -> int:
    """Run all steps; returns 0 if all succeed, the final check included."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False
    )
    parser.add_argument(
        "--output", default="runs/quickstart", help="folder of the run, within the checkout or absolute"
    )
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--short", action="store_true", help="little data, few steps: shows that it runs")
    parser.add_argument("--needle", action="store_true", help="also ask about videos of 1,024 to 4,096 frames")
    arguments = parser.parse_args(argv)
    if arguments.short and arguments.needle:
        parser.error("--needle asks what has been learnt; leave out --short")
    run = ROOT / arguments.output
    run.mkdir(parents=True, exist_ok=True)
    os.environ.update(RUN=arguments.output, OMP_NUM_THREADS="1", TOKENIZERS_PARALLELISM="false", HF_HUB_OFFLINE="1")
    record = run / "steps.json"
    settings = {"seed": arguments.seed, "short": arguments.short}
    done: dict[str, float] = {}
    if record.exists():
        kept = json.loads(record.read_text(encoding="utf-8"))
        if kept["settings"] != settings:
            print(f"quickstart: {run} holds a run with {kept['settings']}; choose another --output.", file=sys.stderr)
            return 2
        done = kept["seconds"]
    way = steps(arguments.output, seed=arguments.seed, short=arguments.short, needle=arguments.needle)
    head = f"/{NUMBER_OF_STEPS + arguments.needle}]"
    began = time.monotonic()
    for number, step in enumerate(way, 1):
        if step.name in done:
            print(f"[{number}{head} {step.name}: done before, in {done[step.name]:.0f} s", flush=True)
            continue
        elapsed = time.monotonic() - began
        print(f"[{number}{head} {step.says}  ({elapsed:.0f} s gone)", flush=True)
        started = time.monotonic()
        try:
            run_step(step, log_folder=run / "logs")
        except subprocess.CalledProcessError as error:
            print(f"quickstart: the step {step.name!r} failed with exit status {error.returncode}.", file=sys.stderr)
            print("The same command goes on from there once the cause is mended.", file=sys.stderr)
            return 1
        done[step.name] = time.monotonic() - started
        record.write_text(json.dumps({"settings": settings, "seconds": done}, indent=1), encoding="utf-8")
    print("\nseconds by step")
    for name, seconds in done.items():
        print(f"  {name:28} {seconds:7.1f}")
    print(f"  {'all':28} {sum(done.values()):7.1f}")
    print(
        f"wrote {arguments.output}: report/report.md, hf (the model for transformers), save (checkpoints), tensorboard"
    )
    return 0


if __name__ == "__main__":
    sys.exit(main())
