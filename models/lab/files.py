"""Files written whole or not at all, and advice for the errors of the operating system."""

import contextlib
import errno
import os
import secrets
from collections.abc import Iterator
from pathlib import Path
from typing import IO

_ADVICE = {
    errno.ENOSPC: "free some space, or choose another folder",
    errno.EDQUOT: "your quota is used up: free some space, or choose another folder",
    errno.EROFS: "the file system can only be read: choose another folder",
    errno.ENOTDIR: "a file stands where a folder is needed: move it away, or choose another folder",
    errno.EEXIST: "a file stands where a folder is needed: move it away, or choose another folder",
    errno.EISDIR: "a folder stands where a file is needed: move it away",
    errno.ENAMETOOLONG: "choose a shorter path",
}


def advice(error: OSError, path: str | os.PathLike) -> str:
    """Return what to do about an error of the operating system with `path`, by its number."""
    if error.errno in (errno.EACCES, errno.EPERM):
        return f"{_owner(Path(path))} may write there: ask for permission, or choose another folder"
    return _ADVICE.get(error.errno, "choose another folder")


def _owner(path: Path) -> str:
    """Return who owns the path, or the nearest folder above it that can be seen."""
    for place in (path, *path.parents):
        with contextlib.suppress(OSError, KeyError, NotImplementedError):
            return f"only {place.owner()}, who owns {place},"
    return "only its owner"


@contextlib.contextmanager
def written_whole(path: Path) -> Iterator[IO[bytes]]:
    """Yield a file to write to, which appears as `path` only when it is complete. OSError."""
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{secrets.token_hex(4)}.tmp")
    try:
        with open(temporary, "xb") as file:  # its mode follows the umask
            yield file
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)
