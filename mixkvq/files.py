"""Files that appear under their name when they are complete."""

from __future__ import annotations

import errno
import os
import secrets
import stat
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from io import BufferedReader
from pathlib import Path
from typing import Any

from .errors import UserError


def checked_path(path: Any) -> Path:
    """A path of a file.

    Raises
    ------
    TypeError, ValueError
        Naming the argument ``path``.
    """
    if not isinstance(path, (str, os.PathLike)) or isinstance(os.fspath(path), bytes):
        raise TypeError(f"path is {path!r}, must be a str or a Path")
    if not os.fspath(path) or "\0" in os.fspath(path):
        raise ValueError(f"path is {path!r}, must name a file")
    return Path(path)


def opened(path: Path) -> BufferedReader:
    """Open a file for reading.

    Raises
    ------
    OSError
        If it cannot be read, or is no file: a pipe would block, a device may never end.
    """
    if path.exists() and not path.is_file():
        raise _irregular(path)
    file = path.open("rb")
    if not stat.S_ISREG(os.fstat(file.fileno()).st_mode):  # it was another a moment ago
        file.close()
        raise _irregular(path)
    return file


def _irregular(path: Path) -> OSError:
    return OSError(errno.EINVAL, "not a regular file", str(path))


@contextmanager
def whole_file(path: Path) -> Iterator[Path]:
    """As `replaced_file`, for the command line: the folder is made.

    Raises
    ------
    UserError
        If it cannot be written; what was there before stays.
    """
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with replaced_file(path) as made:
            yield made
    except OSError as error:
        raise UserError(f"{path} cannot be written ({error.strerror or error})") from error


@contextmanager
def replaced_file(path: Path) -> Iterator[Path]:
    """An empty temporary file beside ``path`` that takes its place, on the disk for good, if the block ends well.

    Whoever opens ``path`` meanwhile, or after a crash at any moment, finds the old file or the new one, whole. A link
    stays a link: the file it names is replaced. An old file's permissions are kept.

    Raises
    ------
    OSError
        If it cannot be written, or ``path`` is no file; what was there before stays, nothing is left beside it.
    """
    path = Path(os.path.realpath(path))
    mode = _mode(path)
    name = os.fsencode(path.name)[:200].decode(errors="ignore")  # a name has 255 bytes at most, not characters
    made = path.with_name(f".{name}-{secrets.token_hex(8)}")  # nobody else's, so that it can be removed unseen
    try:
        made.touch(0o666 if mode is None else 0o600, exist_ok=False)
        yield made
        if mode is not None:
            made.chmod(mode)
        _sync(made)
        made.replace(path)
    finally:
        made.unlink(missing_ok=True)
    with suppress(OSError):  # the file is there; not every file system can do this to a folder
        _sync(path.parent)


def _mode(path: Path) -> int | None:
    """Permissions of a file, None if there is none."""
    try:
        mode = path.stat().st_mode
    except FileNotFoundError:
        return None
    if stat.S_ISDIR(mode):
        raise IsADirectoryError(errno.EISDIR, os.strerror(errno.EISDIR), str(path))
    if not stat.S_ISREG(mode):
        raise _irregular(path)
    return stat.S_IMODE(mode)


def _sync(path: Path) -> None:
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)
