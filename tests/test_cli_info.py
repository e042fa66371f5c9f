"""`mixkvq info` on a bare install: nothing but NumPy can be imported."""

from __future__ import annotations

import json
import os
import subprocess
import sys

import numpy as np
import pytest

import mixkvq
from mixkvq.cli import info

BARE = """
import sys
class Block:
    def find_spec(self, name, path=None, target=None):
        if name.split(".")[0] in ("torch", "transformers", "typer", "rich", "click", "matplotlib"):
            raise ModuleNotFoundError(f"No module named {name!r}", name=name.split(".")[0])
sys.meta_path.insert(0, Block())
from mixkvq.cli import main
status = main(sys.argv[1:])
assert not {"torch", "transformers", "typer", "rich"} & set(sys.modules), "imported in spite of the block"
sys.exit(status)
"""


def bare(*args: str, **environment: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-P", "-c", BARE, *args], capture_output=True, text=True, env=os.environ | environment
    )


def test_info_json_without_torch() -> None:
    done = bare("info", "--json", MIXKVQ_HOME="/somewhere")
    assert done.returncode == 0, done.stderr
    facts = json.loads(done.stdout)
    assert facts["mixkvq"] == mixkvq.__version__
    assert facts["NumPy"] == np.__version__
    assert facts["torch"].startswith("not installed")
    assert facts["MIXKVQ_HOME"] == "/somewhere"
    assert facts["isa chosen"] in facts["isa supported"]
    assert set(facts["isa supported"]) <= set(facts["isa built"])
    assert "scalar" in facts["isa built"]
    assert facts["CPUs usable"] >= 1


def test_info_tells_whether_cuda_kernels_are_there() -> None:
    facts = json.loads(bare("info", "--json", CUDA_VISIBLE_DEVICES="").stdout)
    built = facts["built: cuda_kernels"]
    assert facts["mixkvq._cuda"].startswith("absent (" if built is None else "present")
    assert built is None or "sm_" in built


def test_info_names_the_forced_instruction_set() -> None:
    facts = json.loads(bare("info", "--json", MIXKVQ_ISA="scalar").stdout)
    assert facts["isa chosen"] == "scalar"
    assert facts["MIXKVQ_ISA"] == "scalar"


def test_info_survives_a_core_that_does_not_load() -> None:
    done = bare("info", MIXKVQ_ISA="altivec")
    assert done.returncode == 0
    assert "NOT USABLE" in done.stdout and "altivec" in done.stdout


def test_no_arguments_mean_info() -> None:
    done = subprocess.run([sys.executable, "-P", "-m", "mixkvq"], capture_output=True, text=True)
    assert done.returncode == 0
    lines = dict(line.split(None, 1) for line in done.stdout.splitlines())
    assert lines["mixkvq"] == mixkvq.__version__
    assert lines["NumPy"] == np.__version__


def test_version() -> None:
    assert bare("--version").stdout == f"mixkvq {mixkvq.__version__}\n"


def test_other_commands_name_the_pip_line() -> None:
    for command in ("demo", "generate", "--help"):
        done = bare(command)
        assert done.returncode == 1
        assert "typer" in done.stderr and "pip install 'mixkvq[demo]'" in done.stderr
        assert "Traceback" not in done.stderr


@pytest.mark.parametrize(
    ("origin", "end"),
    [(None, " mixkvq"), ('{"url": "file:///src/mixkvq", "dir_info": {}}', " /src/mixkvq"), ("not json", " mixkvq")],
)
def test_reinstall_line_says_where_from(origin: str | None, end: str, monkeypatch: pytest.MonkeyPatch) -> None:
    class Distribution:
        def read_text(self, name: str) -> str | None:
            assert name == "direct_url.json"
            return origin

    monkeypatch.setattr(info.metadata, "distribution", lambda name: Distribution())
    assert info.reinstall_line().startswith("pip install --force-reinstall --no-deps")
    assert info.reinstall_line().endswith(end)
