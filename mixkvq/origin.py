"""How this package was installed, for messages that say how to install it again."""

from __future__ import annotations

import json
from contextlib import suppress
from importlib import metadata


def reinstall_line() -> str:
    """The pip line that builds the package again: from where it came (PEP 610), or else from the package index."""
    source = "mixkvq"
    with suppress(metadata.PackageNotFoundError, ValueError):
        origin = json.loads(metadata.distribution("mixkvq").read_text("direct_url.json") or "{}")
        source = str(origin.get("url", source)).removeprefix("file://")
    return f"pip install --force-reinstall --no-deps --no-cache-dir {source}"
