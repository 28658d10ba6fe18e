"""Why a record is rejected: the error codes. (A rejected record itself is a `manifest.Reject`.)"""

from __future__ import annotations

from megatron_vita.errors import DataError

CODES: dict[str, str] = {
    "bad_json": "the record is not valid JSON (or not UTF-8)",
    "bad_record": "a field is missing or of another type than the source's row in the table says",
    "bad_role": "a turn's role is not known",
    "bad_order": "turns do not alternate user, assistant",
    "empty_turn": "a turn says nothing",
    "tokenizer_failed": "the tokenizers library fails on the text",
    "answer_joins": "the tokenizer joins the beginning of an answer with what stands before it",
    "no_answer": "the record has no answer or text to learn from",
    "media_count": "placeholders and media do not match",
    "media_missing": "the picture or video file does not exist",
    "media_ambiguous": "several files bear the name, and they differ",
    "media_remote": "the medium is a web address; nothing is downloaded",
    "path_escape": "the path leaves the media root",
    "media_broken": "the picture cannot be decoded",
    "media_truncated": "the picture file ends early",
    "media_bomb": "the picture has too many pixels",
    "media_changed": "the picture or video changed on disk while it was being used",
    "media_size": "the picture has no area",
    "video_broken": "the video cannot be decoded",
    "video_codec": "this build has no decoder for the video's codec",
    "video_inexact": "decord does not give the frames that were asked for",
    "video_timeout": "decoding the video took longer than --video-timeout",
    "video_memory": "decoding the video took more memory than --video-memory",
    "media_crash": "decoding the medium killed its process",
    "undeclared_media": "the record holds media, but its source declares none",
    "media_unread": "the record names a medium that nothing reads",
    "tools_unread": "the record defines or calls functions, and the chat template has no place for them",
    "reasoning_unread": "the record holds reasoning beside an answer, and the chat template has no place for it",
    "field_unread": "the record holds words that a chat template could write, and nothing reads them",
    "video_span": "the record asks for a part of a video",
    "loss_weight": "a mark says that something is learnt by a weight, or that a question is",
    "overlong": "the sample is longer than a pack",
}
"""Every error code with its meaning."""


def reject(code: str, message: str) -> DataError:
    """A DataError whose message begins with its error code."""
    return DataError(f"{code}: {message}")


def code_of(error: DataError) -> tuple[str, str]:
    """(error code, message without it) of a DataError; `bad_record` where it names no known code."""
    code, colon, rest = str(error).partition(": ")
    return (code, rest) if colon and code in CODES else ("bad_record", str(error))


def counted(count: int, one: str, several: str | None = None) -> str:
    """A number with its noun: `1 record`, `2 records`.

    Args:
        count: how many.
        one: the noun of a count of 1, with its verb if need be.
        several: that of other counts; None: `one` and an s.
    """
    return f"{count} {one if count == 1 else several or f'{one}s'}"
