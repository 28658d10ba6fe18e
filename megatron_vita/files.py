"""A disk that has no room left, told apart from a defect."""

from __future__ import annotations

import errno

_NO_ROOM = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EROFS)


def no_room(error: OSError) -> bool:
    """Did a write fail for want of room: disk full, quota or file size exceeded, file system read-only by now?"""
    return error.errno in _NO_ROOM
