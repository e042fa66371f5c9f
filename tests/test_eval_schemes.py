"""What the names in ``--schemes`` mean."""

from __future__ import annotations

import pytest

pytest.importorskip("transformers")

from models import tiny
from transformers import DynamicCache

from mixkvq import MixKVQCache, MixKVQConfig, list_presets
from mixkvq.errors import UserError
from mixkvq.eval import rivals
from mixkvq.eval.schemes import parse_scheme, parse_schemes
from mixkvq.eval.simulate import SimulatedCache


def test_exact_is_a_dynamic_cache() -> None:
    scheme = parse_scheme("exact", {"sink_length": 4})
    assert scheme.kind == scheme.label == "exact" and type(scheme.cache(tiny())) is DynamicCache


@pytest.mark.parametrize("name", list_presets())
def test_presets_are_packed(name: str) -> None:
    scheme = parse_scheme(name)
    cache = scheme.cache(tiny())
    assert scheme.kind == "packed" and scheme.label == name and type(cache) is MixKVQCache
    assert cache.mixkvq_config == scheme.config == MixKVQConfig.preset(name)
    assert cache is not scheme.cache(tiny())


def test_own_fields_win_over_common_ones() -> None:
    common = {"sink_length": 4}
    assert parse_scheme("compact", common).config == MixKVQConfig.preset("compact", sink_length=4)
    scheme = parse_scheme("compact:sink_length=0:value_bits=3", common)
    assert scheme.config == MixKVQConfig.preset("compact", sink_length=0, value_bits=3)
    assert scheme.name == "compact:sink_length=0:value_bits=3"


def test_details_tell_schemes_apart() -> None:
    names = "default", "default:value_bits=4", "compact", "fixed", "error-only", "query-only", "magnitude", "kitty"
    every = [*map(parse_scheme, names), parse_scheme("default", {"sink_length": 8}), parse_scheme("simulated/default")]
    assert len({scheme.details for scheme in every}) == len(every)


@pytest.mark.parametrize("name", sorted(rivals.SIMULATED))
def test_rivals_on_the_reference_are_marked(name: str) -> None:
    scheme = parse_scheme(name)
    assert scheme.kind == "simulated" and scheme.label == f"{name} (simulated)"
    assert type(scheme.cache(tiny())) is SimulatedCache


def test_simulated_preset_has_the_preset_s_configuration() -> None:
    scheme = parse_scheme("simulated/compact:value_bits=3")
    assert scheme.kind == "simulated" and scheme.config == MixKVQConfig.preset("compact", value_bits=3)


@pytest.mark.parametrize("name", ["fixed", "error-only"])
def test_packed_rivals_share_one_plan(name: str) -> None:
    scheme = parse_scheme(name)
    assert scheme.kind == "packed" and scheme.config is not None
    assert [dict(p) for p in scheme.config.key_patterns] == [{4: 16, 3: 32, 2: 16}]
    assert scheme.config.salience == ("none" if name == "error-only" else "rms")


def test_commas_and_colons_inside_brackets_belong_to_a_value() -> None:
    text = "default:key_patterns=[[[4,16],[3,32],[2,16]]]:sink_length=2, compact"
    first, second = parse_schemes(text)
    assert [dict(p) for p in first.config.key_patterns] == [{4: 16, 3: 32, 2: 16}]
    assert first.config.sink_length == 2 and second.name == "compact"


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("defualt", "scheme 'defualt': unknown; known: exact, "),
        ("", "scheme '': unknown"),
        ("default:value_bits", "scheme 'default:value_bits': 'value_bits' must be FIELD=VALUE"),
        ("default:value_bits=7", "scheme 'default:value_bits=7': value_bits is 7"),
        ("default:bits=3", "scheme 'default:bits=3': .*bits"),
        ("simulated/nothing", "scheme 'simulated/nothing': .*nothing"),
        ("kitty:sink_length=-1", "scheme 'kitty:sink_length=-1': sink_length is -1"),
        ("exact:sink_length=3", "scheme 'exact:sink_length=3': exact has no fields"),
        ("hqq-5", "scheme 'hqq-5': hqq has 1, 2, 3, 4, 8 bits"),
        ("quanto-3", "scheme 'quanto-3': quanto has 2, 4 bits"),
        ("quanto-4:sink_length=4", "scheme 'quanto-4:sink_length=4': 'sink_length' is no field"),
    ],
)
def test_errors_name_the_scheme(text: str, message: str) -> None:
    with pytest.raises(UserError, match=message):
        parse_scheme(text, {"residual_length": 128})


def test_lists() -> None:
    assert [s.name for s in parse_schemes(" default ,compact,, exact")] == ["default", "compact", "exact"]
    for empty in ("", " , "):
        with pytest.raises(UserError, match="--schemes is empty"):
            parse_schemes(empty)
    with pytest.raises(UserError, match="must name every scheme once"):
        parse_schemes("default,compact,default")


@pytest.mark.parametrize("name", ["hqq-4", "quanto-2"])
def test_missing_back_end_names_the_pip_line(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    def missing(package: str) -> str:
        raise rivals.PackageNotFoundError(package)

    monkeypatch.setattr(rivals, "version", missing)
    package = "hqq" if name == "hqq-4" else "optimum-quanto"
    with pytest.raises(UserError, match=f"scheme {name} needs the package {package}: pip install {package}"):
        parse_scheme(name)


def test_back_ends_ignore_common_fields_and_keep_their_own(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(rivals, "version", lambda package: "9.9")
    scheme = parse_scheme("quanto-4:residual_length=64", {"sink_length": 4})
    assert scheme.kind == "transformers" and scheme.label == "quanto-4:residual_length=64"
    assert scheme.details == 'quanto-4 9.9 {"residual_length": 64}'
