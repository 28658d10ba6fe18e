"""Whether a prompt and its answer fit the model and the cache, before anything is computed."""

from __future__ import annotations

from megatron_vita.data.rejects import reject
from megatron_vita.inference.prompt import Request


def check_length(request: Request, length: int, *, positions: int, held: int, whole: bool = True) -> None:
    """Refuse a prompt that can never be answered.

    Args:
        request: what is asked.
        length: tokens of its prompt.
        whole: else these are its pictures' and frames' alone.
        positions: tokens of prompt and answer that the model handles; an answer that reaches this end is complete.
        held: tokens of one sequence that the key/value cache holds.

    Raises:
        DataError: overlong, with both numbers.
    """
    name, of = request.sample.id, "of" if whole else "of more than"
    asked = None if request.clamp_length else request.max_new_tokens
    if length >= min(positions, held):
        if held <= positions:
            where = f"the key/value cache holds {held}"
            how = "Give it more memory (--kv-cache-memory), use more context-parallel ranks, or shorten it."
        else:
            where = f"the model handles {positions}"
            how = "Shorten it, show fewer pictures, or see --max-position-embeddings."
        raise reject("overlong", f"{name}: a prompt {of} {length} tokens, but {where} with the answer. {how}")
    # An answer that ends for want of cache is not the answer: it would be another with more memory.
    if asked is not None and min(length + asked, positions) > held:
        raise reject(
            "overlong",
            f"{name}: a prompt {of} {length} tokens with an answer of up to {asked}, but the key/value cache holds "
            f"{held}. Give it more memory (--kv-cache-memory), use more context-parallel ranks, or ask for less.",
        )
