"""An installed wheel as a user meets it, for `wheel.sh`: python -I smoke_wheel.py [--torch], from any folder.

Without --torch: an environment with NumPy only. With it: also torch and transformers, whose models generate.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path

import mixkvq
from mixkvq import _core

LEVEL = "from mixkvq import _core; print(_core.isa())"


def printed(*command: str, **environment: str) -> str:
    return subprocess.run(command, env=os.environ | environment, check=True, capture_output=True, text=True).stdout


def check_installation() -> None:
    assert Path(sys.prefix) in Path(mixkvq.__file__).parents, mixkvq.__file__
    info = json.loads(printed(str(Path(sys.prefix) / "bin/mixkvq"), "info", "--json"))
    shown = ("mixkvq", "Python", "NumPy", "torch", "transformers", "mixkvq._torch", "isa chosen", "built: modules")
    print(*(f"{key} {info[key]}" for key in shown if key in info), sep=", ")
    built = info["built: cuda_kernels"]
    print(f"CUDA kernels: {built or 'not built'}; mixkvq._cuda {info['mixkvq._cuda']}")
    assert info["built: modules"] == "_core _torch" + " _cuda" * (built is not None)
    assert info["mixkvq._cuda"].startswith("present" if built else "absent")


def check_levels() -> None:
    """Every level that this machine has can be chosen; without a choice, the best is."""
    supported = [name for name, there in _core.isas() if there]
    assert [printed(sys.executable, "-I", "-c", LEVEL, MIXKVQ_ISA=name).strip() for name in supported] == supported
    assert _core.isa() == os.environ.get("MIXKVQ_ISA", supported[-1])
    if "avx2" in dict(_core.isas()):
        assert [name for name, _ in _core.isas()] == ["scalar", "avx2", "avx512"]


def check_bare() -> None:
    assert find_spec("torch") is None
    try:
        mixkvq.MixKVQCache  # noqa: B018
    except ImportError as error:
        assert "mixkvq.MixKVQCache needs torch: pip install 'mixkvq[hf]'" in str(error), error
    else:
        raise AssertionError("MixKVQCache without torch")


def check_torch() -> None:
    """Operators, torch's pool, an error that crosses libtorch, and a model that generates."""
    import torch
    from transformers import DynamicCache, LlamaConfig, LlamaForCausalLM

    from mixkvq import torch_module
    from mixkvq.compat import cache_argument

    assert torch_module.PROBLEM is None and torch_module.PARALLEL, torch_module.PROBLEM
    total, query = torch.zeros(1, 2, 64, dtype=torch.float64), torch.ones(1, 4, 3, 64)
    torch.ops.mixkvq.salience_(total, query, 2, 1, None)
    assert total.eq(6).all(), total
    try:
        torch.ops.mixkvq.salience_(total.float(), query, 2, 1, None)
    except RuntimeError as error:
        assert "sum has the wrong dtype" in str(error), error
    else:
        raise AssertionError("a sum of another dtype was taken")

    torch.manual_seed(0)
    sizes = {"hidden_size": 128, "intermediate_size": 128, "num_hidden_layers": 2, "vocab_size": 100}
    model = LlamaForCausalLM(LlamaConfig(**sizes, num_attention_heads=2, num_key_value_heads=1)).eval()
    ids = torch.randint(0, 100, (1, 400))
    tokens, cached = {}, {}
    for name in ("plain", "lossless", "default"):
        cached[name] = DynamicCache() if name == "plain" else mixkvq.MixKVQCache(name)
        options = {"max_new_tokens": 20, "do_sample": False, **cache_argument(cached[name])}
        tokens[name] = model.generate(ids, **options).tolist()
    assert tokens["plain"] == tokens["lossless"]
    report = cached["default"].report()
    assert [layer.path for layer in report.layers] == ["packed"] * 2
    print("generated with packed layers:", len(tokens["default"][0]), "tokens")


check_installation()
check_levels()
check_torch() if "--torch" in sys.argv else check_bare()
