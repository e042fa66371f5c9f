"""Files that appear under their name when they are complete."""

from __future__ import annotations

import errno
import os
import secrets
import stat
from collections.abc import Iterator
from contextlib import contextmanager, suppress
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
    made = path.with_name(f".{path.name[:200]}-{secrets.token_hex(4)}")
    os.close(os.open(made, os.O_CREAT | os.O_EXCL | os.O_WRONLY, 0o666 if mode is None else 0o600))
    try:
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
        raise OSError(errno.EINVAL, "not a regular file", str(path))
    return stat.S_IMODE(mode)


def _sync(path: Path) -> None:
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)
