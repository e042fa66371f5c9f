"""Tests that need torch and transformers are left out where those are not installed."""

from importlib.util import find_spec

collect_ignore_glob = []
if find_spec("torch") is None or find_spec("transformers") is None:
    collect_ignore_glob = ["test_cache_*.py", "test_agreement.py", "test_handle.py", "test_hook.py", "test_store.py"]
