"""`lanes/transformers_tests.py`, which judges by transformers' own tests, on checkouts that are made here."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from textwrap import dedent

import pytest

import mixkvq

pytest.importorskip("transformers")

SCRIPT = Path(__file__).parent / "lanes" / "transformers_tests.py"
FAMILY = "tests/models/tiny/test_modeling_tiny.py"
TESTS = """
    import unittest

    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer, DynamicCache, LlamaConfig, LlamaForCausalLM

    SHAPE = dict(hidden_size=32, intermediate_size=32, num_hidden_layers=2, num_attention_heads=4, vocab_size=64)


    class TinyModelTest(unittest.TestCase):
        def test_generate(self):
            model = LlamaForCausalLM(LlamaConfig(**SHAPE, num_key_value_heads=2)).eval()
            prompt = torch.arange(8).view(1, 8) + 3
            got = model.generate(prompt, max_new_tokens=6, do_sample=False, return_dict_in_generate=True)
            self.assertIsInstance(got.past_key_values, DynamicCache)
            self.assertEqual(got.sequences.shape, (1, 14))

        def test_generate_stand_in(self):
            tokenizer = AutoTokenizer.from_pretrained("hf-internal-testing/tiny-random-gpt2")
            model = AutoModelForCausalLM.from_pretrained("hf-internal-testing/tiny-random-gpt2")
            prompt = tokenizer(["Blue is the color of", "Grey"], padding=True, return_tensors="pt")
            self.assertEqual(len(model.generate(**prompt, max_new_tokens=4)), 2)

        def test_generate_seed(self):
            self.assertAlmostEqual(float(torch.rand(())), 0.4962566, places=6)

        def test_cache_class(self):
            for case in range(2):
                with self.subTest(case=case):
                    self.assertTrue(case == 1 or type(DynamicCache()) is DynamicCache)

        def test_cache_offloading(self):
            self.assertIs(type(DynamicCache(offloading=True)), DynamicCache)

        def test_cache_data(self):
            pairs = [(torch.rand(1, 2, 9, 8), torch.rand(1, 2, 9, 8)) for _ in range(3)]
            cache = DynamicCache(pairs)
            self.assertEqual(len(cache.layers), 3)
            for (keys, values), layer in zip(pairs, cache.layers):
                torch.testing.assert_close(layer.keys, keys)
                torch.testing.assert_close(layer.values, values)

        def test_cache_always_fails(self):
            self.fail("as it does with every cache")

        @unittest.skip("not today")
        def test_cache_later(self):
            pass

        def test_other_subject(self):
            self.fail("not selected")
"""


def run(*arguments: object) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, SCRIPT, *arguments]
    path = os.pathsep.join([str(Path(mixkvq.__file__).parents[1]), *filter(None, [os.environ.get("PYTHONPATH")])])
    return subprocess.run(
        list(map(str, command)),
        env={**os.environ, "PYTHONPATH": path},
        capture_output=True,
        text=True,
        timeout=1800,
    )


@pytest.fixture(scope="module")
def checkout(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with one family's tests; it is judged on the installed transformers."""
    root = tmp_path_factory.mktemp("checkout")
    family = root / FAMILY
    family.parent.mkdir(parents=True)
    for folder in (family.parent, family.parents[1], family.parents[2]):
        (folder / "__init__.py").touch()
    family.write_text(dedent(TESTS))
    return root


@pytest.mark.slow
def test_a_test_that_fails_with_ours_only_is_found(checkout: Path, tmp_path: Path) -> None:
    result = run(checkout, "--installed", "--files", "tiny", "--json", tmp_path / "out.json")
    assert result.returncode == 1, result.stdout + result.stderr
    row = next(line for line in result.stdout.splitlines() if line.startswith(FAMILY)).split()
    assert row[1:7] == ["7", "2", "1", "6", "3", "1"]  # passed, failed, skipped: stock, ours
    assert row[7] == "2"  # packed layers
    assert f"NOT EXPECTED: {FAMILY}::TinyModelTest::test_cache_class {{'case': '0'}}\n" in result.stdout
    assert "verdict: BAD: 1 unexpected and 0 expected differences" in result.stdout
    out = json.loads((tmp_path / "out.json").read_text())
    assert out["files"][FAMILY]["mixkvq"]["swapped"]["caches"] == {"swapped": 3, "offloading, left as they are": 1}
    assert [difference["outcome"] for difference in out["differences"]] == ["failed"]


@pytest.mark.slow
def test_a_listed_difference_is_excused(checkout: Path, tmp_path: Path) -> None:
    listed = tmp_path / "expected.toml"
    listed.write_text('[[difference]]\ntest = "*::test_cache_class *"\nreason = "it compares classes by identity"\n')
    result = run(checkout, "--installed", "--files", FAMILY, "--expected", listed)
    assert result.returncode == 0, result.stdout + result.stderr
    assert "expected in 1 tests, since it compares classes by identity" in result.stdout
    assert "verdict: good: 0 unexpected and 1 expected differences, 2 packed layers" in result.stdout


@pytest.mark.slow
def test_stand_ins_take_the_place_of_downloads(checkout: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HF_HUB_CACHE", str(tmp_path))
    without = run(checkout, "--installed", "--files", "tiny", "--select", "generate")
    assert without.returncode == 0, without.stdout + without.stderr
    assert "stock cache: 2 passed, 1 failed, 0 skipped" in without.stdout
    result = run(checkout, "--installed", "--files", "tiny", "--select", "generate", "--stand-ins")
    assert result.returncode == 0, result.stdout + result.stderr
    assert "stock cache: 3 passed, 0 failed, 0 skipped" in result.stdout
    assert "verdict: good: 0 unexpected and 0 expected differences, 4 packed layers" in result.stdout


@pytest.mark.slow
def test_where_nothing_packs_nothing_is_judged(checkout: Path) -> None:
    result = run(checkout, "--installed", "--files", "tiny", "--select", "offloading")
    assert result.returncode == 1
    assert "nothing was packed" in result.stdout


@pytest.mark.slow
def test_a_file_that_cannot_be_imported_is_no_success(checkout: Path) -> None:
    broken = "tests/test_broken.py"
    (checkout / broken).write_text("import a_module_that_is_not_there\n")
    result = run(checkout, "--installed", "--files", "tiny", broken, "--select", "test_generate or broken")
    assert result.returncode == 1
    assert f"not judged, since no test passes or a run broke off: {broken}" in result.stdout
    assert "the tests need a_module_that_is_not_there, which is not installed" in result.stdout


def test_what_cannot_be_run_is_refused(checkout: Path, tmp_path: Path) -> None:
    assert run(tmp_path).returncode == 2
    assert "must have the folders tests and src/transformers" in run(checkout).stderr
    assert "tests/models/giant/test_modeling_giant.py not in" in run(checkout, "--installed", "--files", "giant").stderr
    listed = tmp_path / "expected.toml"
    listed.write_text('[[difference]]\ntest = "*"\n')
    result = run(checkout, "--installed", "--files", "tiny", "--expected", listed)
    assert result.returncode == 2
    assert "must have a test (a pattern) and a reason" in result.stderr
