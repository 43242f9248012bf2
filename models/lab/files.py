"""Files written whole or not at all, and advice for the errors of the operating system."""

import contextlib
import errno
import os
import secrets
from collections.abc import Iterator
from pathlib import Path
from typing import IO


def advice(error: OSError, path: str | os.PathLike) -> str:
    """Return what to do about an error of the operating system in writing `path`."""
    if error.errno in (errno.EACCES, errno.EPERM, errno.EROFS):
        return f"you may not write {path}: ask its owner, or choose another folder"
    if error.errno in (errno.ENOTDIR, errno.EEXIST):
        return "a file stands where a folder is needed: move it away, or choose another folder"
    full = error.errno in (errno.ENOSPC, errno.EDQUOT)
    return "free some space, or choose another folder" if full else "choose another folder"


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
