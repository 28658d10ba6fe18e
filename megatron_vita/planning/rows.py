"""What a micro-batch holds: documents, tiles and labels of one packed sequence, as far as plans depend on them."""

from __future__ import annotations

from dataclasses import dataclass

from megatron_vita.config import StageConfig

PICTURE_FRACTION = 0.5
"""Fraction of the tokens that are visual, where nobody says otherwise."""
DOCUMENT_TOKENS = 2048
"""Tokens of a document under document masking, where nobody says otherwise."""


@dataclass(frozen=True, slots=True)
class Row:
    """One packed sequence: a micro-batch of a data-parallel rank."""

    documents: tuple[int, ...]
    """Tokens of each document; attention is causal within each."""
    tiles: int
    """Tiles of its pictures and frames."""
    labelled: int
    """Tokens with a label, which go through the output layer."""

    @property
    def tokens(self) -> int:
        """Tokens of the packed sequence."""
        return sum(self.documents)

    @property
    def pairs(self) -> int:
        """Query-key pairs of causal attention within the documents, all context ranks together."""
        return sum(length * (length + 1) // 2 for length in self.documents)


def assumed_row(
    stage: StageConfig, *, picture_fraction: float = PICTURE_FRACTION, document_tokens: int = DOCUMENT_TOKENS
) -> Row:
    """A full micro-batch of a stage, before there are shards.

    Args:
        stage: sequence length, micro-batch size and document masking are used.
        picture_fraction: fraction of the tokens that are visual; the others have labels.
        document_tokens: tokens of a document under document masking; without it a pack is one document.
    """
    packs, length = stage.train.micro_batch_size, stage.data.seq_length
    each = min(document_tokens, length) if stage.data.reset_per_document else length
    pack = (each,) * (length // each) + ((length % each,) if length % each else ())
    tiles = 0
    if stage.model.vision is not None:
        tiles = int(length * picture_fraction / (stage.model.vision.tokens_per_tile + 2))
    visual = tiles * stage.model.vision.tokens_per_tile if stage.model.vision else 0
    labelled = min(length - visual, round(length * (1 - picture_fraction))) if stage.model.vision else length
    return Row(pack * packs, tiles * packs, labelled * packs)
