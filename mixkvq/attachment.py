"""`attach`: gives every `generate` of a model a fresh `MixKVQCache`, for programs that cannot pass one.

`GenerationMixin` makes a cache where the caller gave none. That one method is wrapped, once per process, and looks the
model up here; nothing is written to the model, so that copying, pickling and saving it go on as before.
"""

from __future__ import annotations

import functools
import threading
import weakref
from pathlib import Path
from typing import Any
from weakref import WeakKeyDictionary

from transformers import DynamicCache, EncoderDecoderCache, GenerationMixin

from . import compat
from .cache import MixKVQCache
from .calibration import Calibration
from .config import MixKVQConfig
from .layer import MixKVQLayer
from .parallel import check_tensor_parallel

_METHOD = "_prepare_cache_for_generation"
_lock = threading.Lock()
_attachments: WeakKeyDictionary[Any, tuple[Attachment, ...]] = WeakKeyDictionary()
"""Of every model, the newest last: that one makes the caches."""
_installed = False


class Attachment:
    """What `attach` returns; a context manager that detaches at its end.

    Attributes
    ----------
    cache : MixKVQCache or None
        The newest one that was made, for its ``report()``. It is let go when the next ``generate`` begins, so that
        never more than one stays for this.
    made : int
        How many caches were made: 0 says that no ``generate`` of the model came by.
    """

    def __init__(self, model: Any, preset: str | MixKVQConfig, options: dict[str, Any]) -> None:
        self._model, self._name = weakref.ref(model), type(model).__name__
        self._preset, self._options = preset, options
        self.cache: MixKVQCache | None = None
        self.made = 0

    @property
    def attached(self) -> bool:
        """Whether it is still in force, or would be if newer ones were detached."""
        model = self._model()
        return model is not None and self in _attachments.get(model, ())

    def detach(self) -> None:
        """End it; one that was attached before is in force again. Caches that are in use go on. Does nothing twice."""
        model = self._model()
        with _lock:
            if model is not None and model in _attachments:
                _keep(model, tuple(other for other in _attachments[model] if other is not self))

    def __enter__(self) -> Attachment:
        return self

    def __exit__(self, *_: object) -> None:
        self.detach()

    def __repr__(self) -> str:
        preset = self._preset if isinstance(self._preset, str) else self._preset.name
        state = "attached to" if self.attached else "detached from"
        return f"<Attachment of {preset!r}, {state} {self._name}, {self.made} caches made>"

    def make(self, config: Any) -> MixKVQCache:
        """An empty cache for a model of this configuration."""
        return MixKVQCache(self._preset, config=config, **self._options)

    def _replace(self, model: Any, made: Any) -> Any:
        """Our cache in the place of transformers' own default, also as the half of a pair; anything else as it is."""
        pair = isinstance(made, EncoderDecoderCache)
        if type(made.self_attention_cache if pair else made) is not DynamicCache:
            return made
        self.cache = None  # before there is another
        self.cache = cache = self.make(model.config)
        self.made += 1
        if not pair:
            return cache
        made.self_attention_cache = cache
        return made


def attach(model: Any, preset: str | MixKVQConfig = "default", **options: Any) -> Attachment:
    """Give every ``generate`` of this model a fresh `MixKVQCache`, until the result is detached.

    Only where transformers would make its default `DynamicCache`: a call that passes a cache of its own, names a
    ``cache_implementation`` or says ``use_cache=False`` gets what it asks for. Calls of the model itself
    (``model(...)``) are left alone; they are exact. A model with an encoder gets a `MixKVQCache` for the decoder's
    self-attention. Copies of the model are not attached. Attached twice, the newest holds until it is detached.

    Parameters
    ----------
    model : transformers model with ``generate``
        Compiled, or with adapters of PEFT: what is inside is attached.
    preset : str or MixKVQConfig
        As in `MixKVQCache`.
    **options
        Of `MixKVQCache`: ``calibration``, ``precision``, fields of `MixKVQConfig`; not ``config``, the model has one.

    Returns
    -------
    Attachment

    Raises
    ------
    TypeError
        If ``model`` is none, or makes caches in a way of its own.
    ValueError
        If its ``generation_config`` asks for another cache or for none, so that there would be no effect; if its KV
        heads cannot be spread over its processes; and for what `MixKVQCache` refuses.

    Examples
    --------
    >>> handle = mixkvq.attach(model)  # pipelines, servers, evaluations: from here on
    >>> with mixkvq.attach(model, "compact") as handle:  # or for a while
    ...     pipeline(prompts)
    >>> print(handle.cache.report())
    """
    target = _generating(model)
    for name in ("config", "ddp_cache_data"):
        if name in options:
            raise TypeError(f"{name} is given, must not be: every cache is made empty, for the model's configuration")
    if isinstance(options.get("calibration"), (str, Path)):
        options["calibration"] = Calibration.of(options["calibration"])
    defaults = getattr(target, "generation_config", None)
    for name, wrong in (("cache_implementation", None), ("use_cache", False)):
        value = getattr(defaults, name, None)
        if value is not None and (wrong is None or value is wrong):
            raise ValueError(
                f"model.generation_config.{name} is {value!r}, must be None: with it, generate() takes no MixKVQCache"
            )
    attachment = Attachment(target, preset, options)
    layers = attachment.make(target.config).layers  # refuses what is wrong now, not in the middle of a run
    check_tensor_parallel(target, {layer.mixkvq_config.allocate for layer in layers if isinstance(layer, MixKVQLayer)})
    with _lock:
        _install()
        _keep(target, (*_attachments.get(target, ()), attachment))
    return attachment


def detach(model: Any) -> None:
    """End everything that `attach` did to this model."""
    target = _generating(model)
    with _lock:
        _keep(target, ())


def _keep(model: Any, attachments: tuple[Attachment, ...]) -> None:
    if attachments:
        _attachments[model] = attachments
    else:
        _attachments.pop(model, None)


def _generating(model: Any) -> Any:
    """The model whose `generate` runs: under `torch.compile`, or under PEFT, another one than what was given.

    Raises
    ------
    TypeError
        If there is none that makes a `DynamicCache` by itself.
    """
    found: Any = getattr(getattr(model, "generate", None), "__self__", None)
    if not isinstance(found, GenerationMixin) and hasattr(model, "get_base_model"):
        found = model.get_base_model()
    if not isinstance(found, GenerationMixin):
        raise TypeError(f"model is {_name(model)}, must be a model of transformers that has generate()")
    target: Any = found
    own = [kind for kind in type(target).__mro__ if _METHOD in vars(kind)]
    inherits = all("super" in vars(kind)[_METHOD].__code__.co_names for kind in own if kind is not GenerationMixin)
    if not (inherits and target._supports_default_dynamic_cache()):
        raise TypeError(f"model is a {type(target).__name__}, must be one whose generate() makes a DynamicCache")
    return target


def _name(model: Any) -> str:
    return repr(model) if isinstance(model, (str, bytes, int, float, type(None))) else f"a {type(model).__name__}"


def _install() -> None:
    """Wrap the method by which `generate` makes caches, once."""
    global _installed
    if _installed:
        return
    original = getattr(GenerationMixin, _METHOD)

    @functools.wraps(original)
    def prepare(self: Any, generation_config: Any, model_kwargs: dict[str, Any], *args: Any, **kwargs: Any) -> Any:
        (name,) = compat.cache_argument(None)
        given, asked = model_kwargs.get(name), generation_config.cache_implementation
        result = original(self, generation_config, model_kwargs, *args, **kwargs)
        attachments = _attachments.get(self)
        made = model_kwargs.get(name)
        if attachments and given is asked is None and made is not None:
            model_kwargs[name] = made = attachments[-1]._replace(self, made)
            if getattr(generation_config, "is_assistant", False):  # its drafts are rolled back
                made.activate_past_recording()
        return result

    setattr(GenerationMixin, _METHOD, prepare)
    _installed = True
