"""Keys and values as a model hands them over: what is refused, what stays in full precision, how the rest is coded."""

from __future__ import annotations

from typing import Any

import torch

from . import reasons, torch_module
from .config import BlockCodec, MixKVQConfig
from .reasons import Reason

DTYPES = {torch.float32: "float32", torch.float16: "float16", torch.bfloat16: "bfloat16"}


def check_states(key: Any, value: Any) -> None:
    """Refuse keys and values that do not belong together.

    Raises
    ------
    TypeError, ValueError
        Naming the argument, its value and what is allowed.
    """
    for name, states in (("key_states", key), ("value_states", value)):
        if not isinstance(states, torch.Tensor):
            raise TypeError(f"{name} is {type(states).__name__}, must be a tensor [batch, heads, tokens, head_dim]")
    if key.device != value.device:
        raise ValueError(f"value_states is on {value.device}, must be on {key.device} as key_states")
    if key.dim() < 3 or key.shape[:1] != value.shape[:1] or key.shape[-2] != value.shape[-2]:
        raise ValueError(
            f"value_states has shape {list(value.shape)}, must have batch and tokens of key_states {list(key.shape)}"
        )


def check_continues(key: torch.Tensor, value: torch.Tensor, have: tuple[torch.Tensor, torch.Tensor]) -> None:
    """Refuse tokens that do not fit to those cached before.

    Parameters
    ----------
    key, value : tensor [B, H, n, D]
        New tokens.
    have : pair of tensors [B, H, N, D]
        Cached keys and values.

    Raises
    ------
    TypeError, ValueError
        Naming the argument and both shapes, devices or dtypes.
    """
    for name, new, old in zip(("key_states", "value_states"), (key, value), have, strict=True):
        if (new.shape[:-2], new.shape[-1]) != (old.shape[:-2], old.shape[-1]):
            want = ", ".join(map(str, [*old.shape[:-2], "n", old.shape[-1]]))
            raise ValueError(f"{name} has shape {list(new.shape)}, must be [{want}] as the tokens cached before")
        if new.device != old.device:
            raise ValueError(f"{name} is on {new.device}, must be on {old.device} as the tokens cached before")
        if old.is_floating_point() and not new.is_floating_point():
            raise TypeError(f"{name} is {new.dtype}, must be floating point as the tokens cached before ({old.dtype})")


def obstacle(config: MixKVQConfig, key: torch.Tensor, value: torch.Tensor) -> Reason | None:
    """Why records cannot hold these keys and values, if they cannot."""
    if key.dim() != 4 or key.shape != value.shape:
        return reasons.latent(list(key.shape), list(value.shape))
    if key.is_cuda and (problem := torch_module.cuda_problem(key.device)) is not None:
        return reasons.cuda(key.device, *problem)
    if not (key.is_cpu or key.is_cuda):
        return reasons.device(key.device)
    if key.dtype != value.dtype and not torch.is_autocast_enabled(key.device.type):
        return reasons.different_dtypes(key.dtype, value.dtype)
    if (dtype := common_dtype(key, value)) not in DTYPES:
        return reasons.dtype(dtype)
    try:
        codec_of(config, key, value)
    except ValueError as error:
        return reasons.codec(str(error))
    return None


def codec_of(config: MixKVQConfig, key: torch.Tensor, value: torch.Tensor) -> BlockCodec:
    """The block codec for these keys and values.

    Raises
    ------
    ValueError
        If packed kernels do not support their head_dim or dtype.
    """
    dtype = common_dtype(key, value)
    return config.codec(key.shape[-1], DTYPES.get(dtype, str(dtype).removeprefix("torch.")))


def common_dtype(key: torch.Tensor, value: torch.Tensor) -> torch.dtype:
    """Autocast gives float32 keys and 16-bit values, and computes attention with both in 16 bits."""
    return min(key.dtype, value.dtype, key=lambda dtype: dtype.itemsize)


def holds(old: torch.dtype, new: torch.dtype) -> bool:
    """Whether tokens that came in one dtype can be followed by such of another, as far as that dtype goes."""
    return torch.promote_types(old, new) == old


def own(tensor: torch.Tensor) -> torch.Tensor:
    """The tensor, copied if it is a view of something larger."""
    if tensor.untyped_storage().nbytes() == tensor.nbytes:
        return tensor
    return tensor.clone(memory_format=torch.contiguous_format)
