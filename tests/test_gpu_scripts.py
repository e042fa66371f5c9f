"""benchmarks/gpu.sh and the programs that it runs, rehearsed without a GPU."""

# ruff: noqa: E402  (imports follow the skip where an optional package is absent)
from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from dataclasses import asdict
from pathlib import Path
from typing import Any

import pytest

torch = pytest.importorskip("torch")
pytest.importorskip("transformers")

ROOT = Path(__file__).parents[1]
sys.path.append(str(ROOT / "benchmarks"))  # behind what is installed

from gpu import attention, batches, bench, goals, model, one, options, rates, record, sanitize, table, timing, verbs
from gpu.record import Row


@pytest.fixture(autouse=True)
def one_thread():
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


def rehearsed(program: Any, tmp_path: Path, *more: str) -> list[Row]:
    out = tmp_path / "gpu.jsonl"
    program.main(["--rehearse", "--out", str(out), *more])
    return record.read(out)


# ---- programs ------------------------------------------------------------------------------------------------------
def test_rates(tmp_path, capsys):
    rows = rehearsed(rates, tmp_path)
    memory, operands = (row for row in rows if row.step == "rate")
    assert memory.values["copy_gbps"] > 0 and memory.values["read_gbps"] > 0
    assert operands.values == {"ratio": None} and operands.facts["why"] == "no program given"
    assert capsys.readouterr().out.startswith("== copy ")


def test_what_the_program_for_subnormals_says_is_recorded(tmp_path):
    program = tmp_path / "subnormals"
    found = {"wrong": 0, "subnormal_tflops": 600.0, "normal_tflops": 600.0, "ratio": 1.0}
    program.write_text(f"#!/bin/sh\necho '{json.dumps(found)}'\n")
    program.chmod(0o755)
    rows = rehearsed(rates, tmp_path, "--subnormals", str(program))
    assert rows[-1].values == found
    assert "exact" in rates.subnormals(record.Log(None, "cpu"), str(program))


def test_attention_is_checked_timed_and_compared(tmp_path, capsys):
    rows = [row for row in rehearsed(attention, tmp_path) if row.step == "kernels"]
    packed = [row for row in rows if row.facts["role"] == "packed"]
    assert {(row.case, row.where["group"]) for row in packed} == {(p, g) for p in ("default", "kivi-2") for g in (1, 4)}
    for row in packed:
        assert row.values["error"] <= attention.BOUND
        rivals = [r for r in rows if r.where == row.where and r.facts.get("best_rival")]
        assert [r.case for r in rivals] == [row.facts["rival"]]
        assert row.values["bytes"] < rivals[0].values["bytes"]
        assert "copy goal" not in row.facts  # far from a gigabyte
    assert "4 packed cases at 2 shapes" in capsys.readouterr().out


def test_one_shape_for_a_profiler(capsys):
    one.main(["--rehearse", "--tokens", "300", "--head-dim", "64", "--preset", "kivi-2"])
    assert capsys.readouterr().out.startswith("== kivi-2: 2 rows of 300 tokens, 0.000 GB")


def test_a_wrong_result_ends_the_run(tmp_path, monkeypatch):
    real = attention.ops.attend
    monkeypatch.setattr(attention.ops, "attend", lambda *args, **options: 1.1 * real(*args, **options))
    with pytest.raises(SystemExit, match=r"default at .*: relative error 0\.1"):
        rehearsed(attention, tmp_path)


def test_the_other_calls(tmp_path):
    rows = {row.case: row for row in rehearsed(verbs, tmp_path) if row.step == "verbs"}
    for preset in verbs.PRESETS:
        for name in ("prompt", "step"):
            assert rows[f"pack, {name}, {preset}"].values["us_per_head_block"] > 0
    assert {"append", "salience, step", "salience, prompt", "unpack, default"} <= set(rows)


def test_end_to_end(tmp_path, capsys):
    rows = [row for row in rehearsed(model, tmp_path) if row.step == "model"]
    parts = {(row.facts.get("part"), row.case) for row in rows}
    assert {("decode", "default"), ("decode", bench.DYNAMIC), ("decode", "DynamicCache, 1 token")} <= parts
    assert {(part, name) for part in ("prefill", "largest batch") for name in ("default", bench.DYNAMIC)} <= parts
    ours = next(row for row in rows if row.case == "default" and row.facts.get("part") == "decode")
    assert ours.facts["paths"] == ["packed"]
    assert ours.values["share_of_kv_bytes"] < 1
    left_out = [row for row in rows if row.case == "QuantizedCache hqq-4"]
    if left_out[0].values["tokens_per_second"] is None:
        assert "hqq" in left_out[0].facts["why"]
    assert "== default: " in capsys.readouterr().out


def test_a_batch_that_does_not_fit_is_tried_smaller(monkeypatch):
    tried = []

    class Bench:
        device, caches, row_bytes = "cpu", {bench.DYNAMIC: object, "default": object}, {"default": 10.0}
        sizes, log = bench.TINY, record.Log(None, "cpu")

        def fill(self, cache, rows, tokens, chunk):
            tried.append(rows)
            if rows > 6:
                raise torch.OutOfMemoryError

        def where(self, **more):
            return more

        def free(self):
            pass

        def step(self, cache, rows):
            pass

    batches.largest(Bench())
    assert tried == [8, 7, 7, 7, 6]
    assert Bench.log.rows[0].values == {"rows": 6, "computed_rows": 8}


def test_without_a_gpu_programs_say_so(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(SystemExit, match="no NVIDIA GPU that torch can use"):
        options.parse("About.", [])


# ---- rows, goals, tables -------------------------------------------------------------------------------------------
def test_goals():
    assert goals.COPY_SHARE.verdict(0.49) == "misses floor"
    assert [goals.COPY_SHARE.verdict(x) for x in (0.5, 0.65, 0.8)] == ["meets floor", "meets target", "meets stretch"]
    assert goals.MEMORY_RATIO.verdict(0.3) == "meets floor"
    assert goals.MEMORY_RATIO.verdict(0.31) == "misses floor"
    assert goals.SDPA_RATIO.verdict(None) == "not measured"
    assert (
        goals.kernels_count(32768, 1e9) and not goals.kernels_count(32767, 1e9) and not goals.kernels_count(32768, 9e8)
    )


def test_rows_are_checked(tmp_path):
    good = asdict(Row("rate", "memory", {}, {"copy_gbps": 1.0, "read_gbps": None}, {}, "cpu"))
    assert record.problem(good) is None
    for change, why in (
        ({"step": "rates"}, "step is 'rates'"),
        ({"values": {"x": float("nan")}}, "values: x is nan, must be a finite number"),
        ({"values": {"x": True}}, "values: x is True"),
        ({"where": []}, "where is"),
        ({"more": 1}, "keys are"),
    ):
        assert why in record.problem({**good, **change})
    with pytest.raises(ValueError, match="must be a finite number"):
        record.Log(None, "cpu").add("rate", "memory", {}, {"x": float("inf")})
    file = tmp_path / "rows"
    record.main([str(file), "build", "build", "seconds=1.5", "exit=0", "--note", "built"])
    assert record.read(file) == [Row("build", "build", {}, {"seconds": 1.5, "exit": 0.0}, {"note": "built"}, "")]
    file.write_text(json.dumps({**good, "step": "x"}) + "\n")
    with pytest.raises(ValueError, match=r"rows:1: step is 'x'"):
        record.read(file)


def test_tables_judge_the_worst_case_and_take_the_last_run():
    where = {"head_dim": 128, "tokens": 32768, "group": 4, "batch": 48, "heads": 8}

    def packed(name: str, share: float, times: float) -> Row:
        values = {"us": 1.0, "us_graph": None, "gbps": 9.0, "share_of_copy": share, "times_faster": times}
        facts = {"role": "packed", "copy goal": goals.COPY_SHARE.verdict(share), "sdpa goal": "-"}
        return Row("kernels", name, where, values, facts, "GPU")

    rows = [packed("default", 0.1, 1.0), packed("default", 0.7, 4.0), packed("compact", 0.6, 2.0)]
    rows.append(Row("sanitize", "memcheck", {}, {"findings": None}, {"note": "does not work on this machine"}, "GPU"))
    text = table.render(rows)
    assert "| share of the copy rate" not in text
    lines = {line.split(" | ")[0].strip("| "): line for line in text.splitlines() if line.startswith("|")}
    assert "0.6 to 0.7 | 2 | meets floor" in lines[goals.COPY_SHARE.name]
    assert "2 to 4 | 2 | misses floor" in lines[goals.SDPA_RATIO.name]
    assert "- | 0 | not measured" in lines[goals.FINDINGS.name]
    assert "| sanitize | memcheck | findings - | does not work on this machine |" in text


# ---- timing --------------------------------------------------------------------------------------------------------
def test_turns_are_paired_and_prepared():
    calls: list[str] = []
    slow = timing.Case("slow", lambda: calls.append("slow"), before=lambda: calls.append("before"), most=1)
    fast = timing.Case("fast", lambda: calls.append("fast"), most=3)
    timing.take_turns([slow, fast], "cpu", 4)
    assert len(slow.seconds) == len(fast.seconds) == 4
    assert calls.count("slow") == 2 + 4 and calls.count("before") == 1 + 4 and calls.count("fast") == 2 + 3 * 4
    slow.seconds, fast.seconds = [4.0, 9.0, 2.0], [2.0, 3.0, 2.0]
    assert timing.times_faster(fast, slow) == 2.0
    assert timing.graphed(lambda: None, "cpu") == (None, "no graphs on the CPU")
    assert timing.Deadline(0).passed() and not timing.Deadline(60).passed(30) and timing.Deadline(60).passed(61)


# ---- compute-sanitizer ---------------------------------------------------------------------------------------------
def fake_sanitizer(tmp_path: Path, planted: str, small: str) -> str:
    tool = tmp_path / "compute-sanitizer"
    tool.write_text(f"#!/bin/sh\ncase $* in *planted*) printf '{planted}';; *) printf '{small}';; esac\n")
    tool.chmod(0o755)
    return str(tool)


@pytest.mark.parametrize(
    ("planted", "small", "found", "note", "code"),
    [
        ("=== ERROR SUMMARY: 2 errors\\n", "small: 9 calls right\\n=== ERROR SUMMARY: 0 errors\\n", 0, "9 calls", 0),
        ("=== RACECHECK SUMMARY: 1 hazard displayed (1 error)\\n",
         "small: 9 calls right\\n=== RACECHECK SUMMARY: 3 hazards displayed (3 errors)\\n", 3, "9 calls", 1),
        ("=== Error: Device not supported\\n", "", None, "does not work on this machine", 0),
        ("=== ERROR SUMMARY: 0 errors\\n", "", None, "the planted error: missed", 0),
        ("=== ERROR SUMMARY: 1 error\\n", "=== Error: out of memory\\n", None, "no result: Error: out of memory", 0),
        ("=== ERROR SUMMARY: 1 error\\n", "small: pack differs from the CPU core\\n=== ERROR SUMMARY: 0 errors\\n",
         None, "small: pack differs", 1),
        ("=== ERROR SUMMARY: 1 error\\n", "Traceback: fails\\n=== ERROR SUMMARY: 0 errors\\n",
         None, "the workload did not end: Traceback: fails", 1),
    ],
)  # fmt: skip
def test_findings_are_counted_only_where_the_tool_works(tmp_path, planted, small, found, note, code):
    out = tmp_path / "rows"
    command = ["--sanitizer", fake_sanitizer(tmp_path, planted, small), "--planted", "planted", "--rehearse"]
    with pytest.raises(SystemExit) as ended:
        sanitize.main([*command, "--out", str(out), "--small", "workload"])
    assert int(ended.value.code) == code
    rows = record.read(out)
    assert [row.case for row in rows] == list(sanitize.TOOLS)
    assert {row.values["findings"] for row in rows} == {found}
    assert all(note in row.facts["note"] for row in rows)


def test_a_missing_sanitizer_is_no_clean_bill(tmp_path):
    with pytest.raises(SystemExit):
        sanitize.main(
            ["--sanitizer", str(tmp_path / "none"), "--planted", "x", "--rehearse", "--out", str(tmp_path / "r")]
        )
    assert {row.values["findings"] for row in record.read(tmp_path / "r")} == {None}


KERNELS = {path.stem for path in (ROOT / "csrc/cuda").glob("*.cu")}


@pytest.mark.skipif(not {"append", "attend", "pack", "salience"} <= KERNELS, reason="not all kernels are there")
def test_the_workload_under_the_sanitizers():
    import emulator
    from gpu import small

    if problem := emulator.emulator_build.missing():
        pytest.skip(problem)
    for seed in (1, 3):
        assert list(small.check(*small.CASES[seed], seed)) == ["salience", "pack", "unpack", "append", "attend"]


# ---- gpu.sh --------------------------------------------------------------------------------------------------------
def script(tmp_path: Path, *arguments: str, **environment: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        ["bash", str(ROOT / "benchmarks/gpu.sh"), *arguments],
        capture_output=True,
        text=True,
        timeout=60,
        env={**os.environ, "OUT": str(tmp_path / "out"), "PYTHON": sys.executable, **environment},
    )


def stub(tmp_path: Path, line: str = ":") -> str:
    """An interpreter that writes down what it is asked for."""
    python = tmp_path / "python"
    python.write_text(f'#!/bin/sh\nprintf "%s\\n" "$*" >>"{tmp_path}/asked"\n{line}\n')
    python.chmod(0o755)
    return str(python)


def test_the_script_is_sound_bash():
    subprocess.run(["bash", "-n", str(ROOT / "benchmarks/gpu.sh")], check=True)


def test_the_script_needs_a_gpu_and_known_steps(tmp_path):
    (tmp_path / "bin").mkdir()
    smi = tmp_path / "bin/nvidia-smi"
    smi.write_text("#!/bin/sh\nexit 9\n")
    smi.chmod(0o755)
    done = script(tmp_path, PATH=f"{tmp_path}/bin:{os.environ['PATH']}", PYTHON=stub(tmp_path))
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr == "gpu.sh: no NVIDIA GPU here (nvidia-smi lists none); --rehearse needs none\n"
    done = script(tmp_path, "build", "kernel")
    assert done.returncode == 2 and done.stderr.startswith("gpu.sh: unknown step 'kernel', must be one of build test ")


def test_steps_run_in_the_order_given_and_share_the_time(tmp_path):
    done = script(tmp_path, "--rehearse", "rate", "kernels", PYTHON=stub(tmp_path, "echo == said"), SECONDS_TOTAL="100")
    assert done.returncode == 0, done.stderr
    assert [line.split()[0] for line in done.stdout.splitlines() if " done " in line] == ["rate", "kernels"]
    asked = (tmp_path / "asked").read_text().splitlines()
    programs = [line.split() for line in asked if line.startswith("-m gpu.") and "--rehearse" in line]
    assert [words[1] for words in programs] == ["gpu.rates", "gpu.attention", "gpu.verbs"]
    seconds = [float(words[words.index("--seconds") + 1]) for words in programs]
    assert 10 <= seconds[0] <= 18 and 55 <= seconds[1] <= 75 and 70 <= seconds[2] <= 100


def test_a_step_that_takes_too_long_is_stopped_and_a_failed_build_ends_all(tmp_path):
    slow = stub(tmp_path, 'case $* in *gpu.rates*) exec sleep 30;; esac; echo "== said"')
    done = script(tmp_path, "--rehearse", "rate", PYTHON=slow, SECONDS_TOTAL="1")
    assert done.returncode == 1 and "stopped after 1 s" in done.stdout
    broken = stub(tmp_path, 'case $* in *setup.py*) echo "no compiler"; exit 3;; esac')
    done = script(tmp_path, "--rehearse", "build", "rate", PYTHON=broken)
    assert done.returncode == 1 and "failed (3)" in done.stdout
    assert "no compiler" in done.stdout and "nothing can be measured without a build" in done.stdout
    assert "gpu.record" in (tmp_path / "asked").read_text()


def test_tests_that_would_all_be_skipped_fail(tmp_path):
    inside = {
        "GPU_REHEARSE": "",
        "GPU_ARCH": "90a",
        "PYTHON": stub(tmp_path, "case $* in *CUDA_PROBLEM*) exit 1;; esac"),
    }
    assert script(tmp_path, "--inside", "test", "9", **inside).returncode == 1
    assert "pytest" not in (tmp_path / "asked").read_text()


@pytest.mark.slow
def test_the_tests_of_a_gpu_are_sound():
    """They run on CPU tensors; what they find then says nothing of a GPU."""
    command = [sys.executable, "-P", "-m", "pytest", "-q", "-p", "no:cacheprovider", "tests/test_gpu_kernels.py"]
    done = subprocess.run(
        command, capture_output=True, text=True, timeout=300, cwd=ROOT, env={**os.environ, "MIXKVQ_REHEARSE": "1"}
    )
    assert done.returncode == 0 and "skipped" not in done.stdout, done.stdout


@pytest.mark.slow
@pytest.mark.skipif(shutil.which("nvcc") is None, reason="nvcc is not found")
@pytest.mark.parametrize("name", ["subnormals", "planted"])
def test_helper_programs_compile_without_warnings(name, tmp_path):
    flags = ["-std=c++20", "-O1", "-arch=sm_80", "-Werror", "all-warnings", "-Xcompiler", "-Wall,-Wextra"]
    source = ROOT / f"benchmarks/gpu/{name}.cu"
    subprocess.run(["nvcc", *flags, "-c", str(source), "-o", str(tmp_path / "x.o")], check=True)
