"""Files that appear under their name when they are complete."""

from __future__ import annotations

import os
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from .errors import UserError


@contextmanager
def whole_file(path: Path) -> Iterator[Path]:
    """A temporary file beside ``path``, whose folder is made, that takes its place if the block ends well.

    Raises
    ------
    UserError
        If it cannot be written; what was there before stays.
    """
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        handle, name = tempfile.mkstemp(prefix=f".{path.name}-", dir=path.parent)
        os.close(handle)
        made = Path(name)
        try:
            yield made
            made.chmod(0o644)
            made.replace(path)
        finally:
            made.unlink(missing_ok=True)
    except OSError as error:
        raise UserError(f"{path} cannot be written ({error.strerror or error})") from error
