"""Files written whole or not at all, and what to do about errors of the operating system."""

import contextlib
import errno
import os
import secrets
from collections.abc import Iterator
from pathlib import Path
from typing import IO

ROOT = Path(__file__).resolve().parents[2]  # of the repository


@contextlib.contextmanager
def explained(path: str | Path) -> Iterator[None]:
    """Raise an error of the operating system in writing `path` as RuntimeError that says what to do."""
    try:
        yield
    except OSError as error:
        todo = "choose another folder"
        if error.errno in (errno.EACCES, errno.EPERM, errno.EROFS):
            todo = f"ask its owner, or {todo}"
        elif error.errno in (errno.ENOTDIR, errno.EEXIST):
            todo = f"a file stands where a folder is needed: move it away, or {todo}"
        elif error.errno in (errno.ENOSPC, errno.EDQUOT):
            todo = f"free some space, or {todo}"
        raise RuntimeError(f"could not write {path} ({error}): {todo}") from error


@contextlib.contextmanager
def written_whole(path: Path) -> Iterator[IO[bytes]]:
    """Yield a file to write to, which appears as `path` only when it is complete. RuntimeError."""
    temporary = path.with_name(f".{secrets.token_hex(4)}.tmp")
    with explained(path):
        path.parent.mkdir(parents=True, exist_ok=True)
        try:
            with open(temporary, "xb") as file:  # its mode follows the umask
                yield file
                file.flush()
                os.fsync(file.fileno())
            os.replace(temporary, path)
        finally:
            temporary.unlink(missing_ok=True)
