"""Other ways to choose bits or to code, for comparison at the same schedule; see `mixkvq.eval.schemes` for their names.

``fixed`` and the four rankings below share one plan (16 channels of 4 bits, 32 of 3, 16 of 2 per 64) and the codec of
`default`; they differ in who gets the bits:

==================  =======================================================================
``fixed``           I_d S_d (query-aware; packed for real)
``error-only``      S_d (packed for real)
``query-only``      I_d
``magnitude``       mean |k_d|
``random-tiers``    chance
``int4-token``      no tiers: 4 bits, one group per token, keys and values
``kitty``           a quarter of the key channels, by magnitude, at 4 bits, the rest at 2; values 2 bits per token
``hadamard-token``  no tiers: keys and values rotated, 3 bits, one group per token (as QuaRot and TurboQuant do)
==================  =======================================================================
"""

from __future__ import annotations

import json
from collections.abc import Callable
from importlib.metadata import PackageNotFoundError, version
from typing import Any

import numpy as np
from numpy.typing import NDArray

from .. import reference
from ..config import MixKVQConfig
from ..errors import UserError
from ..policy.patterns import counts_of, scale_counts

Floats = NDArray[np.float32]
Ranking = Callable[[Floats, "Floats | None", dict[str, Any]], Floats]
"""(keys [H, T, D], I_d [H, D] or None, state) -> score [H, D]; the largest scores get the most bits."""

_PLAN = {4: 16, 3: 32, 2: 16}
PACKED: dict[str, tuple[str, dict[str, Any]]] = {
    "fixed": ("default", {"key_patterns": (_PLAN,)}),
    "error-only": ("default", {"key_patterns": (_PLAN,), "salience": "none"}),
}
"""Rivals that are presets with other fields."""


def _query(k: Floats, importance: Floats | None, state: dict[str, Any]) -> Floats:
    return np.ones((len(k), k.shape[2]), np.float32) if importance is None else importance


def _magnitude(k: Floats, importance: Floats | None, state: dict[str, Any]) -> Floats:
    return np.asarray(np.abs(k).mean(1), np.float32)


def _random(k: Floats, importance: Floats | None, state: dict[str, Any]) -> Floats:
    generator = np.random.default_rng((state["layer"], state["block"]))
    return generator.random((len(k), k.shape[2]), np.float32)


class Ranked:
    """The reference codec with key channels ranked by something else, one fixed plan of bits."""

    def __init__(self, config: MixKVQConfig, ranking: Ranking) -> None:
        self.config, self._ranking = config, ranking

    def code(
        self, k: Floats, v: Floats, importance: Floats | None, state: dict[str, Any]
    ) -> tuple[Floats, Floats, float]:
        """As in `mixkvq.eval.simulate.Simulator`."""
        codec = self.config.codec(k.shape[2], state["dtype"])
        counts = scale_counts(counts_of(dict(self.config.key_patterns[0])), k.shape[2])
        scores = self._ranking(k, importance, state)
        mu = state.setdefault("mu", [None] * len(k))
        out_k, out_v, nbytes = np.empty_like(k), np.empty_like(v), 0
        for h, (x, y) in enumerate(zip(k, v, strict=True)):
            x, y = reference.narrow(x, codec.dtype), reference.narrow(y, codec.dtype)
            tiers = reference.assign(scores[h], counts)
            record, mu[h], _ = reference.pack_block(codec, x, y, None, mu[h], tiers=tiers)
            out_k[h], out_v[h] = reference.unpack(record, mu[h])
            nbytes += len(record)
        return out_k, out_v, float(nbytes)


class PerToken:
    """Keys and values with one scale and zero point (float16) per token and head."""

    def __init__(self, config: MixKVQConfig, bits: int, *, rotate: bool) -> None:
        self.config, self._bits, self._rotate = config, bits, rotate

    def code(
        self, k: Floats, v: Floats, importance: Floats | None, state: dict[str, Any]
    ) -> tuple[Floats, Floats, float]:
        """As in `mixkvq.eval.simulate.Simulator`."""
        decoded = [self._one(x) for x in (k, v)]
        nbytes = 2 * k.size * self._bits / 8 + 2 * k.shape[0] * k.shape[1] * 4
        return decoded[0], decoded[1], nbytes

    def _one(self, x: Floats) -> Floats:
        y = reference.hadamard(x) if self._rotate else x
        coded = reference.code_groups(np.ascontiguousarray(y.transpose(2, 0, 1)), self._bits, "minmax", "fp16")
        out = reference.values_of(coded.codes, coded.scale, coded.offset).transpose(1, 2, 0)
        return reference.hadamard(np.ascontiguousarray(out)) if self._rotate else np.ascontiguousarray(out)


def _ranked(ranking: Ranking) -> Callable[[dict[str, Any]], Ranked]:
    return lambda fields: Ranked(MixKVQConfig.preset("default", **{"key_patterns": (_PLAN,), **fields}), ranking)


def _kitty(fields: dict[str, Any]) -> Ranked:
    plan = {
        "key_patterns": ({4: 16, 2: 48},),
        "key_group_size": 128,
        "value_group_size": 0,
        "salience": "none",
    }
    return Ranked(MixKVQConfig.preset("kivi-2", **{**plan, **fields}), _magnitude)


def _per_token(bits: int, *, rotate: bool) -> Callable[[dict[str, Any]], PerToken]:
    return lambda fields: PerToken(MixKVQConfig.preset("kivi-2", **fields), bits, rotate=rotate)


SIMULATED: dict[str, Callable[[dict[str, Any]], Any]] = {
    "query-only": _ranked(_query),
    "magnitude": _ranked(_magnitude),
    "random-tiers": _ranked(_random),
    "kitty": _kitty,
    "int4-token": _per_token(4, rotate=False),
    "hadamard-token": _per_token(3, rotate=True),
}
"""Rivals that run on the reference: fields of `MixKVQConfig` -> simulator."""


BACKENDS: dict[str, tuple[str, tuple[int, ...]]] = {
    "hqq": ("hqq", (1, 2, 3, 4, 8)),
    "quanto": ("optimum-quanto", (2, 4)),
}
"""Back ends of transformers' `QuantizedCache`: the package that each needs, and its numbers of bits."""

_BACKEND_FIELDS = ("residual_length", "q_group_size", "axis_key", "axis_value")


def transformers_cache(backend: str, bits: int, fields: dict[str, Any]) -> tuple[str, Callable[[Any], Any]]:
    """transformers' `QuantizedCache`.

    It has no sinks, and it does not keep what it has coded: the first call codes all of its tokens, the newest ones
    too, and whenever the exact window reaches ``residual_length`` everything is decoded and coded again, window and
    history alike (transformers 5.23, ``QuantizedLayer.update``). It keeps full attention in every layer, sliding ones
    included.

    Parameters
    ----------
    backend : {"hqq", "quanto"}
    bits : int
    fields : dict
        Of ``residual_length`` (default 128), ``q_group_size`` (64), ``axis_key``, ``axis_value`` (0).

    Returns
    -------
    details : str
        Back end, its version, and the fields.
    build : callable
        Model -> empty cache.

    Raises
    ------
    ValueError
        For another number of bits or another field.
    UserError
        If the back end's package is not installed.
    """
    package, known = BACKENDS[backend]
    if bits not in known:
        raise ValueError(f"{backend} has {', '.join(map(str, known))} bits")
    for name in fields:
        if name not in _BACKEND_FIELDS:
            raise ValueError(f"{name!r} is no field of transformers' QuantizedCache: {', '.join(_BACKEND_FIELDS)}")
    try:
        found = version(package)
    except PackageNotFoundError:
        raise UserError(f"scheme {backend}-{bits} needs the package {package}: pip install {package}") from None
    options = {"residual_length": 128, **fields}

    def build(model: Any) -> Any:
        from transformers import QuantizedCache

        return QuantizedCache(backend, model.config, nbits=bits, **options)

    return f"{backend}-{bits} {found} {json.dumps(options, sort_keys=True)}", build
