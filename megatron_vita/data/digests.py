"""SHA-256 of files that other processes are still writing: each block is read while it is still in memory."""

from __future__ import annotations

import hashlib
import threading
from collections.abc import Mapping
from pathlib import Path
from types import TracebackType

_BLOCK = 1 << 20


class FollowingDigests:
    """One thread a file digests it from its beginning up to where it is known to be final. (hashlib frees the GIL.)"""

    def __init__(self, files: Mapping[str, Path]) -> None:
        self._changed = threading.Condition()
        self._limits = dict.fromkeys(files, 0)
        self._digests = {name: hashlib.sha256() for name in files}
        self._stop = self._abandoned = False
        self._failure: OSError | None = None
        self._threads = [
            threading.Thread(target=self._follow, args=(name, path), name=f"sha256 {name}", daemon=True)
            for name, path in files.items()
        ]

    def __enter__(self) -> FollowingDigests:
        for thread in self._threads:
            thread.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._abandoned = kind is not None
        self._end()

    def advance(self, name: str, limit: int) -> None:
        """The first `limit` bytes of a file are final."""
        with self._changed:
            self._limits[name] = max(self._limits[name], limit)
            self._changed.notify_all()

    def result(self) -> dict[str, dict[str, int | str]]:
        """Bytes and SHA-256 of each file as far as it is final, as the manifest holds them."""
        self._end()
        if self._failure is not None:
            raise self._failure
        return {name: {"bytes": self._limits[name], "sha256": one.hexdigest()} for name, one in self._digests.items()}

    def _end(self) -> None:
        with self._changed:
            self._stop = True
            self._changed.notify_all()
        for thread in self._threads:
            thread.join()

    def _follow(self, name: str, path: Path) -> None:
        done = 0
        digest = self._digests[name]
        buffer = memoryview(bytearray(_BLOCK))
        try:
            with path.open("rb", buffering=0) as stream:
                while True:
                    with self._changed:
                        while self._limits[name] == done and not self._stop:
                            self._changed.wait()
                        limit = self._limits[name]
                    if limit == done or self._abandoned:
                        return
                    while done < limit and not self._abandoned:
                        count = stream.readinto(buffer[: min(_BLOCK, limit - done)])
                        if not count:
                            raise OSError(f"{path} ends at byte {done}, not {limit}")
                        digest.update(buffer[:count])
                        done += count
        except OSError as error:
            self._failure = error
