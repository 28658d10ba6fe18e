"""The main job in miniature: open data -> packed shards -> parts -> four stages -> Hugging Face -> an answer.

    python examples/quickstart/quickstart.py --output runs/quickstart [--seed N] [--short]

Every step is a command that a user of the large system runs too; each is shown before it runs. Finished steps are
remembered in the output folder, so a run that was stopped goes on where it was. `--short` walks the same way with
little data and few steps: it shows that everything works, not that it learns.
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
NUMBER_OF_STEPS = 11


@dataclass(frozen=True)
class Step:
    """What a step is called, what it shows, and its commands, which run side by side."""

    name: str
    says: str
    commands: tuple[list[str], ...]


def steps(run: str, *, seed: int, short: bool) -> Iterator[Step]:
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

    def preprocess(name: str, workers: int) -> list[str]:
        paths = ["--tokenizer", f"{run}/tokenizer", "--output", f"{run}/shards/{name}"]
        sizes = ["--seq-length", str(SEQUENCE_LENGTHS[name]), "--image-size", "16", "--patch-size", "4"]
        media = ["--max-tiles", "6", "--max-frames", "64", "--workers", str(workers)]
        return tool("preprocess_data.py", "--data-config", f"{HERE}/mixes/{name}.yaml", *paths, *sizes, *media)

    def train(config: str, ranks: int) -> list[str]:
        launch = [python, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(ranks)]
        return [*launch, "pretrain_vita.py", "--config", f"{HERE}/{config}", *seeds, *few]

    def evaluate(output: str, models: Sequence[str], sets: Sequence[str], *flags: str) -> list[str]:
        files = [flag for name in sets for flag in ("--data", f"{run}/data/eval_{name}.jsonl")]
        budget = ["--max-new-tokens", "4", "--output", f"{run}/eval/{output}", *flags]
        return tool("evaluate.py", "--task", "exact_match", "--model", *models, *files, *budget)

    limit = ["--limit", "20"] if short else []
    saved = [f"{run}/save/{stage}" for stage in STAGES]
    thirty = ["--steps", "30"] if short else []
    yield Step(
        "data",
        "Write scikit-learn's digits and photographs the way publishers do",
        (example("make_data.py", "--output", f"{run}/data", *seeds, *less),),
    )
    yield Step(
        "tokenizer",
        "Train a byte-level BPE on the text",
        (example("make_tokenizer.py", "--data", f"{run}/data", "--output", f"{run}/tokenizer"),),
    )
    yield Step(
        "shards",
        "Compile text and the first two stages into packed shards",
        (preprocess("text", 1), preprocess("stage2", 1)),
    )
    yield Step(
        "parts",
        "Train a tiny Qwen2.5 on text and a tiny InternViT on digits; compile the other shards meanwhile",
        (
            train("lm.yaml", 1),
            example("make_tower.py", "--data", f"{run}/data", "--output", f"{run}/parts/vision", *seeds, *thirty),
            *(preprocess(name, 1) for name in ("stage1", "valid", "stage3", "stage4")),
        ),
    )
    yield Step(
        "export the language model",
        "Write the decoder as a publisher would",
        (convert("export", "--checkpoint", f"{run}/parts/lm/text", "--output", f"{run}/parts/llm", "--format", "llm"),),
    )
    yield Step(
        "import",
        "Join the two Hugging Face folders into a fresh vision-language model",
        (
            convert(
                "import",
                "--llm",
                f"{run}/parts/llm",
                "--vision",
                f"{run}/parts/vision",
                "--output",
                f"{run}/parts/start",
            ),
        ),
    )
    yield Step(
        "train",
        "Four stages in two processes: data, tensor and sequence, pipeline, context parallel",
        (train("run.yaml", 2),),
    )
    yield Step(
        "export",
        "Write the stage-4 model as a Hugging Face folder",
        (convert("export", "--checkpoint", saved[-1], "--output", f"{run}/hf", "--format", "internvl"),),
    )
    yield Step(
        "evaluate",
        "Short and long questions about held-out pictures after every stage; stock transformers agrees with us",
        (
            evaluate("stages", saved, ["digits", "photos", "needle_16"], *limit),
            evaluate("final", saved[-1:], ["needle_64", "needle_32", "needle_8", "frame_number"], *limit),
            evaluate("blind", saved[-1:], ["needle_64"], "--zero-tiles", *limit),
            convert("verify", saved[-1], f"{run}/hf", "--logits"),
        ),
    )
    yield Step(
        "report",
        "Draw the loss, the needle heat map and a page of answers; check what was promised",
        (
            example("report.py", "--run", run),
            example("check.py", "--run", run, *less),
        ),
    )
    first = (ROOT / run / "data" / "eval_digits.jsonl").open(encoding="utf-8").readline()
    unseen = f"{run}/data/{json.loads(first)['images'][0]}"
    yield Step(
        "chat",
        "Ask about a picture it has never seen",
        (tool("chat.py", "--model", f"{run}/hf", "--image", unseen, "Which digit is this?"),),
    )


def run_step(step: Step, *, log_folder: Path) -> None:
    """Run a step's commands side by side; what they say goes to the screen if there is one, else to a log each.

    Raises:
        subprocess.CalledProcessError: a command failed; the others of the step are stopped, and its log is shown.
    """
    running = []
    for number, command in enumerate(step.commands, 1):
        shown = ["python" if part == sys.executable else part for part in command]
        print("  $ " + shlex.join(shown), flush=True)
        log = None
        if len(step.commands) > 1:
            log_folder.mkdir(parents=True, exist_ok=True)
            log = log_folder / f"{step.name.replace(' ', '_')}_{number}.log"
        output = log.open("wb") if log else None
        running.append((subprocess.Popen(command, cwd=ROOT, stdout=output, stderr=output), command, log))
    watch(step, running)


def watch(step: Step, running: list[tuple[subprocess.Popen[bytes], list[str], Path | None]]) -> None:
    """Wait for a step's commands, showing every few seconds the last line each has logged."""
    last_shown: dict[int, str] = {}
    try:
        for process, command, log in running:
            while True:
                try:
                    status = process.wait(timeout=5)
                    break
                except subprocess.TimeoutExpired:
                    for number, (_, _, other) in enumerate(running, 1):
                        line = last_line(other) if other else ""
                        if line and last_shown.get(number) != line:
                            last_shown[number] = line
                            print(f"    [{number}] {line}", flush=True)
            if status:
                if log:
                    print(log.read_text(encoding="utf-8", errors="replace")[-4000:], flush=True)
                raise subprocess.CalledProcessError(status, command)
            if log:
                print(f"    {last_line(log)}", flush=True)
    finally:
        for process, _, _ in running:
            if process.poll() is None:
                process.terminate()


def last_line(log: Path) -> str:
    """What a command said last; progress bars overwrite their line, so a carriage return ends one as well."""
    text = log.read_bytes()[-2000:].decode("utf-8", "replace").replace("\r", "\n")
    lines = [line.strip() for line in text.splitlines() if line.strip()]
    return lines[-1][:150] if lines else ""


def main(argv: Sequence[str] | None = None) -> int:
    """Walk the whole way; 0 when everything, the promises at the end included, holds."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--output", default="runs/quickstart", help="folder of the run, within the checkout or absolute"
    )
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--short", action="store_true", help="little data, few steps: shows that it runs")
    arguments = parser.parse_args(argv)
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
    way = steps(arguments.output, seed=arguments.seed, short=arguments.short)
    head = f"/{NUMBER_OF_STEPS}]"
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
