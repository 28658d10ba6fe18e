"""What stock transformers says of tiny models at every step, and engines that are fed the same tokens."""

from __future__ import annotations

import random
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

import numpy as np
import torch
from torch import Tensor

from megatron_vita import checkpoint
from megatron_vita.config import IMAGE_NORMS
from megatron_vita.convert.exporter import export
from megatron_vita.data.example import Example
from megatron_vita.data.sample import Sample
from megatron_vita.inference.engine import Engine
from megatron_vita.inference.prepare import Prepared
from megatron_vita.inference.prompt import Request
from megatron_vita.inference.prompt_media import PromptMedia
from megatron_vita.inference.sampling import GREEDY, Sampled
from megatron_vita.inference.settings import EngineSettings
from tests.inference.tiny import question, save_checkpoint, write_media

STEPS = 6
"""Generated tokens of each case."""
LENGTHS = (1, 2, 3, 5, 7, 15, 16, 17, 31, 32, 33, 63, 64, 65, 150)
"""Of prompts without media: shorter than the context ranks, around blocks and chunks, and far beyond YaRN's 64."""
MODELS: dict[str, dict[str, Any]] = {
    "qwen2": {"num_attention_heads": 8, "num_query_groups": 4, "kv_channels": 8},
    "qwen3": {"add_qkv_bias": False, "qk_layernorm": True, "kv_channels": 10},
    "glm": {"rotary_percent": 0.5, "rotary_interleaved": True, "kv_channels": 16},
    "yarn": {
        "position_embedding_type": "yarn",
        "yarn_rotary_scaling_factor": 8.0,
        "yarn_original_max_position_embeddings": 64,
        "rotary_base": 1e4,
    },
}
"""What of tests/inference/tiny.py differs."""


class NoMedia:
    """Media of a prompt without any."""

    def close(self) -> None:
        """Nothing to free."""

    def digests(self) -> list[bytes]:
        """Of nothing."""
        return []


@dataclass(frozen=True)
class Case:
    """A prompt, the tokens that follow it, and the reference's logits in the place of each of them."""

    name: str
    sample: Sample
    example: Example | None
    """None: prepared from the sample by the engine."""
    length: int
    """Tokens of the prompt."""
    forced: tuple[int, ...]
    """[STEPS]"""
    logits: Tensor
    """float32 [STEPS, v]"""


def write_cases(folder: str) -> None:
    """Make each model's checkpoint `folder/MODEL`, and what stock transformers says of it, `folder/MODEL.pt`."""
    root = Path(folder)
    media = write_media(root)
    samples = {
        "text": question("Which digit is this?"),
        "picture": question("Which digit is this?", images=[media["square"]]),
        "tiles": question("And the answer?", images=[media["wide"]]),
        "pictures": question("Which of the three?", images=[media["square"], media["wide"], media["square"]]),
        "video": question("Which digit is this picture?", videos=[media["video"]]),
        "all": question("the", images=[media["wide"]], videos=[media["video"]]),
    }
    for name, changes in MODELS.items():
        saved = save_checkpoint(root, name=name, **changes)
        exported = export(checkpoint.resolve(saved), root / f"{name}-hf", "internvl")
        torch.save(_cases(load(saved), exported, samples), root / f"{name}.pt")


@torch.no_grad()
def _cases(engine: Engine, exported: Path, samples: Mapping[str, Sample]) -> list[Case]:
    import transformers

    network, report = transformers.AutoModelForImageTextToText.from_pretrained(
        str(exported), dtype=torch.float32, attn_implementation="eager", output_loading_info=True
    )
    assert not any(report.values()), report
    draw = random.Random(1)
    found = []
    texts: dict[str, Sample | int] = {**samples, **{f"{length} tokens": length for length in LENGTHS}}
    for name, prompt in texts.items():
        forced = tuple(draw.randrange(256) for _ in range(STEPS))
        inputs: dict[str, Tensor] = {}
        if isinstance(prompt, int):
            sample = question(name)
            tokens = np.array([draw.randrange(256) for _ in range(prompt)], dtype=np.int32)
            example: Example | None = Example(tokens, np.full_like(tokens, -100))
        else:
            sample, example = prompt, None
            prepared, media = engine.prepare(Request(name, sample, GREEDY))
            tokens = prepared.tokens
            if prepared.tiles:
                mean, std = (torch.tensor(one).view(3, 1, 1) for one in IMAGE_NORMS["imagenet"])
                inputs["pixel_values"] = (media.tiles(0, len(prepared.tiles)).float() / 255 - mean) / std
        ids = torch.tensor([[*tokens.tolist(), *forced[:-1]]])
        logits = network.eval()(input_ids=ids, **inputs).logits[0, len(tokens) - 1 :].float()
        assert logits.shape[0] == STEPS
        found.append(Case(name, sample, example, len(tokens), forced, logits.clone()))
    return found


def read_cases(folder: str, model: str) -> list[Case]:
    """The cases of a model."""
    cases: list[Case] = torch.load(f"{folder}/{model}.pt", weights_only=False)
    return cases


def load(path: str | Path, **settings: Any) -> Engine:
    """An engine whose random model never ends an answer itself."""
    engine = Engine.load(path, EngineSettings(**{"kv_cache_memory": "8MiB", **settings}))
    engine.worker.ends = frozenset()
    return engine


def forced_logits(engine: Engine, cases: Sequence[Case], arrivals: Sequence[int]) -> dict[str, Tensor]:
    """Run cases through an engine, which takes their tokens whatever its logits are. Every rank calls it.

    Args:
        engine: with nothing to do.
        cases: of its model.
        arrivals: the step before which each case is asked.

    Returns:
        on the rank that samples, logits [STEPS, v] of each case, by name; else nothing.
    """
    by_name = {case.name: case for case in cases}
    rows: dict[str, list[Tensor]] = {}

    def choose(logits: Tensor, sequences: Sequence[Any]) -> list[Sampled]:
        chosen = []
        for sequence, row in zip(sequences, logits, strict=True):
            seen = rows.setdefault(sequence.request.id, [])
            assert len(seen) == len(sequence.generated), "a token was asked for twice"
            seen.append(row.float().clone())
            chosen.append(Sampled(by_name[sequence.request.id].forced[len(sequence.generated)]))
        return chosen

    engine.worker.runner.choose = choose  # type: ignore[method-assign]
    if not engine.leader:
        engine.follow()
        return {name: torch.stack(seen) for name, seen in rows.items()}
    prepare = engine.open

    def prepared(request: Request) -> Prepared:
        example, media = by_name[request.id].example, cast(PromptMedia, NoMedia())
        if example is None:
            return prepare(request)
        return Prepared(request, example, media, prepare._keys(request, example, media))

    engine.open = prepared  # type: ignore[assignment]
    answers: dict[str, tuple[int, ...]] = {}
    waiting = sorted(zip(arrivals, range(len(cases)), strict=True), reverse=True)
    step = 0
    while waiting or engine.busy:
        while waiting and waiting[-1][0] <= step:
            case = cases[waiting.pop()[1]]
            engine.add(Request(case.name, case.sample, GREEDY, max_new_tokens=STEPS))
        for output in engine.step():
            if output.outcome is not None:
                assert not isinstance(output.outcome, Exception), output.outcome
                answers[output.request_id] = output.outcome.ids
        step += 1
    engine.pause()
    engine.open = prepare
    assert answers == {case.name: case.forced for case in cases}
    assert engine.worker.blocks.free_blocks() == engine.worker.cache.num_blocks, "every block is given back"
    return {name: torch.stack(seen) for name, seen in rows.items()}


def compare(found: Mapping[str, Tensor], cases: Sequence[Case], where: str, tolerance: float = 1e-4) -> float:
    """Assert that logits are the reference's, and the largest the same one where that is clear; their distance."""
    assert set(found) == {case.name for case in cases}
    worst = 0.0
    for case in cases:
        got, want = found[case.name], case.logits
        gap = float((got - want).abs().max())
        assert gap < tolerance, f"{where}, {case.name}: logits differ by {gap:.1e}"
        best = want.topk(2).values
        clear = best[:, 0] - best[:, 1] > 1e-3
        assert torch.equal(got.argmax(1)[clear], want.argmax(1)[clear]), f"{where}, {case.name}: another token"
        worst = max(worst, gap)
    return worst
