"""``mixkvq info``: what a bug report needs. Works where only NumPy is installed, except for ``--model``."""

from __future__ import annotations

import argparse
import json
import os
import platform
import sys
from collections.abc import Sequence
from importlib import import_module, metadata
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from ..config import list_presets
from ..errors import missing_package
from ..origin import reinstall_line
from ..version import __version__

_ENVIRONMENT = ("OMP_NUM_THREADS", "CUDA_VISIBLE_DEVICES", "CC", "CXX", "CFLAGS")


def cpu_model() -> str:
    """Marketing name of the processor, or the machine type where the system does not say."""
    try:
        for line in Path("/proc/cpuinfo").read_text().splitlines():
            if line.startswith("model name"):
                return line.split(":", 1)[1].strip()
    except OSError:
        pass
    return platform.processor() or platform.machine()


def usable_cpus() -> int:
    """Number of logical processors that this process may use."""
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1


def _version(package: str) -> str:
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return "not installed"


def _core() -> dict[str, Any]:
    try:
        from .. import _core
    except ImportError as error:  # not built, or MIXKVQ_ISA names one that this CPU lacks: say so, go on
        return {"core": f"NOT USABLE: {error}"}
    isas = _core.isas()
    facts: dict[str, Any] = {f"built: {key}": value for key, value in _core.build_info().items()}
    facts["isa built"] = [name for name, _ in isas]
    facts["isa supported"] = [name for name, supported in isas if supported]
    facts["isa chosen"] = _core.isa()
    return facts


def _torch_module() -> str:
    if find_spec("mixkvq._torch") is None:
        return f"absent (installed before torch, or with MIXKVQ_TORCH=off); to build it: {reinstall_line()}"
    try:
        import_module("mixkvq._torch")
    except (ImportError, OSError) as error:
        return f"NOT USABLE: {error}; to build it again: {reinstall_line()}"
    return "present"


def _cuda_module() -> str:
    """Whether the CUDA kernels are there, and what there is to run them."""
    if find_spec("mixkvq._cuda") is None:
        return "absent (installed where nvcc was not found, or with MIXKVQ_CUDA=off)"
    try:
        from .. import _cuda

        driver = _cuda.versions()[1]
        devices = _cuda.devices() if driver else []
    except (ImportError, OSError) as error:
        return f"NOT USABLE: {error}"
    except RuntimeError as error:
        return f"present, but no device can be used: {error}"
    if not driver:
        return "present; this machine has no CUDA driver"
    names = [f"{name} (sm_{major}{minor}, {memory / 2**30:.0f} GiB)" for name, major, minor, memory in devices]
    return f"present; driver of CUDA {driver // 1000}.{driver % 1000 // 10}; devices: {', '.join(names) or 'none'}"


def _torch() -> dict[str, Any]:
    try:
        import torch
    except ModuleNotFoundError:
        return {"torch": "not installed (NumPy interface only)"}
    except (ImportError, OSError) as error:
        return {"torch": f"{_version('torch')}, NOT USABLE: {error}"}
    cuda = f"{torch.version.cuda or 'torch built without'}"
    if torch.cuda.is_available():
        cuda += f", {torch.cuda.get_device_name(0)}"
    return {
        "torch": torch.__version__,
        "torch threads": torch.get_num_threads(),
        "mixkvq._torch": _torch_module(),
        "CUDA": cuda,
    }


def collect() -> dict[str, Any]:
    """Facts about this installation and machine, in printing order: strings, numbers and lists of strings."""
    facts: dict[str, Any] = {
        "mixkvq": __version__,
        "folder": str(Path(__file__).resolve().parents[1]),
        **_core(),
        "mixkvq._cuda": _cuda_module(),
        "Python": f"{platform.python_version()} ({sys.executable})",
        "NumPy": _version("numpy"),
        **_torch(),
        "transformers": _version("transformers"),
        "system": platform.platform(),
        "CPU": cpu_model(),
        "CPUs usable": usable_cpus(),
    }
    shown = (name for name in sorted(os.environ) if name.startswith("MIXKVQ_") or name in _ENVIRONMENT)
    return facts | {name: os.environ[name] for name in shown}


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="mixkvq info",
        description="Print what a bug report needs; with --model, which layers of a model are packed, why the others "
        "are not and what to do about it, and how many bytes that saves. The model is loaded, reads 512 tokens "
        "of documentation and decodes 8, once with each cache.",
    )
    parser.add_argument("--json", action="store_true", help="print one JSON object")
    add = parser.add_argument_group("a model").add_argument
    add(
        "--model",
        metavar="DIR",
        help="a folder with a model that continues text, with or without an encoder (with config.json only: random "
        "weights); or a name, as for mixkvq generate",
    )
    add("--tokens", type=int, help="tokens of documentation to read; default 512, or what the model has positions for")
    add("--preset", default="default", help=f"one of {', '.join(list_presets())}; default: %(default)s")
    add("--attn", metavar="IMPLEMENTATION", help="attn_implementation, such as sdpa or eager; default: the model's")
    add("--dtype", default="auto", help="auto, float32, float16 or bfloat16; default: %(default)s, as the model says")
    return parser


def _model_info(options: argparse.Namespace) -> int:
    try:
        from .model_info import ModelInfoOptions, inspect_model
    except ModuleNotFoundError as error:
        raise missing_package(error, "mixkvq info --model") from error
    names = ("model", "tokens", "preset", "attn", "dtype")
    found = inspect_model(ModelInfoOptions(**{name: getattr(options, name) for name in names}))
    print(json.dumps(found.facts(), indent=2) if options.json else found)
    return 0


def main(argv: Sequence[str]) -> int:
    """Print `collect`, or what ``--model`` shows; as text or with ``--json`` as one JSON object.

    Returns
    -------
    int
        The exit status.

    Raises
    ------
    UserError
        For a model that cannot be shown.
    """
    options = _parser().parse_args(argv)
    if options.model is not None:
        return _model_info(options)
    facts = collect()
    if options.json:
        print(json.dumps(facts, indent=2, default=str))
        return 0
    width = max(map(len, facts))
    for name, value in facts.items():
        text = ", ".join(map(str, value)) if isinstance(value, (list, tuple)) else str(value)
        print(f"{name:<{width}}  {text}")
    return 0
