"""`mixkvq estimate`: the table and the JSON object, for a folder that has nothing but a configuration."""

# ruff: noqa: E402  (imports follow the skip where an optional package is absent)
from __future__ import annotations

import json

import pytest

torch = pytest.importorskip("torch")
pytest.importorskip("transformers")
for package in ("typer", "rich"):
    pytest.importorskip(package)
from models import tiny

from mixkvq import compat, estimate, largest_batch, largest_tokens, list_presets
from mixkvq.calibration import Calibration
from mixkvq.cli import main
from mixkvq.fingerprint import fingerprint

pytestmark = pytest.mark.skipif(
    not compat.RUNS_WITHOUT_NUMBERS, reason="before transformers 5.0 no model runs without numbers"
)


@pytest.fixture
def folder(tmp_path):
    """config.json alone."""
    tiny().config.save_pretrained(tmp_path / "m")
    return tmp_path / "m"


def told(capsys, *arguments) -> dict:
    assert main(["estimate", "--json", *map(str, arguments)]) == 0
    return json.loads(capsys.readouterr().out)


def test_every_preset_as_json(folder, capsys):
    found, config = told(capsys, "--model", folder, "--tokens", 700, "--batch", 2, "--dtype", "bfloat16"), tiny().config
    assert [row["preset"] for row in found["presets"]] == list_presets()
    assert (found["tokens"], found["batch"], found["dtype"], found["layers"]) == (700, 2, "bfloat16", 2)
    for row in found["presets"]:
        want = estimate(config, tokens=700, batch=2, preset=row["preset"], dtype="bfloat16")
        assert (row["nbytes"], row["least_nbytes"], row["most_nbytes"]) == (
            want.nbytes,
            want.least_nbytes,
            want.most_nbytes,
        )
        assert found["dynamic_cache_nbytes"] == want.dynamic_nbytes and row["packed_layers"] == 2
        if row["preset"] == "paper":
            assert row["nbytes"] is row["share_of_dynamic_cache"] is None
        else:
            assert row["share_of_dynamic_cache"] == pytest.approx(row["nbytes"] / found["dynamic_cache_nbytes"])


def test_the_table_names_every_preset_and_how_to_measure_thresholds(folder, capsys):
    assert main(["estimate", "--model", str(folder), "--tokens", "700"]) == 0
    text = capsys.readouterr().out
    assert all(preset in text for preset in list_presets())
    assert f"{estimate(tiny().config, tokens=700).nbytes / 1e6:,.2f}" in text
    assert "2 of 2 layers packed" in text and "calibrate" in text and "--trials 0" in text


def test_one_preset(folder, capsys):
    (row,) = told(capsys, "--model", folder, "--tokens", 300, "--preset", "compact")["presets"]
    assert row["preset"] == "compact"


@pytest.mark.parametrize(("memory", "nbytes"), [("3MB", 3_000_000), ("2 MiB", 2 << 20), ("2500000", 2_500_000)])
def test_what_fits(folder, capsys, memory, nbytes):
    found = told(capsys, "--model", folder, "--tokens", 700, "--preset", "default", "--memory", memory)
    (row,) = found["presets"]
    assert found["memory"] == nbytes
    assert row["largest_batch"] == largest_batch(tiny().config, nbytes, tokens=700) > 1
    assert row["largest_tokens"] == largest_tokens(tiny().config, nbytes) > 700
    assert main(["estimate", "--model", str(folder), "--tokens", "700", "--memory", memory]) == 0
    assert f"{row['largest_tokens']:,}" in capsys.readouterr().out


def test_a_calibration_is_for_its_preset(folder, capsys, tmp_path):
    path, config = tmp_path / "c.json", tiny().config
    summary = {"records": {"dtype": "float32", "layers": {"0": [2048.0, 1.5], "1": [2112.0, 2.0]}}}
    path.write_text(Calibration(fingerprint(config), "paper", {"thresholds": [3.0, 1.0]}, {}, summary).to_json())
    found = told(capsys, "--model", folder, "--tokens", 700, "--calibration", path)
    rows = {row["preset"].split()[0]: row for row in found["presets"]}
    assert rows["paper"]["preset"] == "paper (calibrated)"
    want = estimate(config, tokens=700, preset="paper", calibration=path)
    assert rows["paper"]["nbytes"] == want.nbytes is not None
    assert [layer.record_bytes.expected for layer in want.layers] == [2 * 5 * 2048, 2 * 5 * 2112]
    assert rows["default"]["nbytes"] == estimate(config, tokens=700).nbytes


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("--tokens", "0"), "--tokens is 0, must be at least 1"),
        (("--tokens", "9", "--batch", "0"), "--batch is 0, must be at least 1"),
        (("--tokens", "9", "--preset", "defualt"), "did you mean 'default'"),
        (("--tokens", "9", "--dtype", "int8"), "--dtype is 'int8', must be one of auto"),
        (("--tokens", "9", "--memory", "8 apples"), "--memory is '8 apples', must be a number of bytes such as 8GB"),
        (("--tokens", "9", "--calibration", "nowhere.json"), "--calibration"),
    ],
)
def test_wrong_options(folder, capsys, arguments, message):
    assert main(["estimate", "--model", str(folder), *arguments]) == 1
    assert message in capsys.readouterr().err


def test_no_model(tmp_path, capsys):
    assert main(["estimate", "--model", str(tmp_path), "--tokens", "9"]) == 1
    assert "must be a folder with config.json" in capsys.readouterr().err


def test_a_model_that_has_no_such_cache(tmp_path, capsys):
    from transformers import ViTConfig

    ViTConfig().save_pretrained(tmp_path)
    assert main(["estimate", "--model", str(tmp_path), "--tokens", "9"]) == 1
    assert "--model is" in capsys.readouterr().err
