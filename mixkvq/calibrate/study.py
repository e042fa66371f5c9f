"""Thresholds of `paper` by search: optuna's TPE, both in the published [0.1, 2.0], least KL and least true bits."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ..cache import MixKVQCache
from ..config import MixKVQConfig
from ..errors import UserError
from ..eval.stream import Emit
from .reading import Readings

LOW, HIGH = 0.1, 2.0


@dataclass(frozen=True)
class Trial:
    """One pair of thresholds."""

    thresholds: tuple[float, float]
    kl: float
    true_bits: float


def search(
    readings: Readings,
    config: MixKVQConfig,
    trials: int,
    seed: int,
    journal: Path,
    name: str,
    emit: Emit,
    highest: float = HIGH,
) -> list[Trial]:
    """All trials of a study, resumed from its journal until there are ``trials`` of them.

    Parameters
    ----------
    readings : Readings
    config : MixKVQConfig
        With ``allocate="threshold"``.
    trials : int
    seed : int
        Of the sampler.
    journal : Path
        File of the study.
    name : str
        Of the study in the file: what was measured on what.
    emit : callable
        Told of ("chunk", (done, trials)).
    highest : float
        Upper end of the range, above 0.1.
    """
    import optuna
    from optuna.storages import JournalStorage
    from optuna.storages.journal import JournalFileBackend

    optuna.logging.set_verbosity(optuna.logging.WARNING)
    storage = JournalStorage(JournalFileBackend(str(journal)))
    study = optuna.create_study(
        study_name=name, storage=storage, load_if_exists=True, directions=["minimize", "minimize"]
    )

    def finished() -> list[Any]:
        return [t for t in study.get_trials(deepcopy=False) if t.state.is_finished() and t.values is not None]

    emit("chunk", (len(finished()), trials))
    while (done := len(finished())) < trials:
        # a sampler of its own for every trial: a resumed study draws what one that never stopped would have drawn
        study.sampler = optuna.samplers.TPESampler(seed=(seed * 100003 + done) % 2**32)
        study.optimize(_objective(readings, config, highest), n_trials=1)
        emit("chunk", (len(finished()), trials))
    return [Trial(_pair(t.params), *t.values) for t in finished()]


def _pair(params: dict[str, float]) -> tuple[float, float]:
    """(high, low) of two thresholds that are sampled alike."""
    return max(params.values()), min(params.values())


def _objective(readings: Readings, config: MixKVQConfig, highest: float) -> Callable[[Any], tuple[float, float]]:
    def measure(trial: Any) -> tuple[float, float]:
        pair = _pair({name: trial.suggest_float(name, LOW, highest) for name in ("first", "second")})
        pairs = config.replace(thresholds=pair)
        found = readings.measure(lambda: MixKVQCache(pairs, config=readings.model.config))
        return found.kl, found.true_bits

    return measure


def pareto(trials: list[Trial]) -> list[Trial]:
    """Trials that no other beats in both, by rising bits."""
    front: list[Trial] = []
    for trial in sorted(trials, key=lambda t: (t.true_bits, t.kl)):
        if not front or trial.kl < front[-1].kl:
            front.append(trial)
    return front


def cut_off(chosen: Trial, highest: float) -> bool:
    """Whether a pair lies in the last tenth of the range, so that larger thresholds may be better."""
    return max(chosen.thresholds) > 0.9 * highest


def pick(front: list[Trial], max_bits: float | None) -> Trial:
    """The trial with the least KL within ``max_bits``; without a limit the one with the least KL times bits.

    Raises
    ------
    UserError
        If no trial is within the limit.
    """
    if max_bits is None:
        return min(front, key=lambda t: t.kl * t.true_bits)
    within = [t for t in front if t.true_bits <= max_bits]
    if not within:
        raise UserError(f"--max-bits is {max_bits}, the fewest true bits of any trial are {front[0].true_bits:.2f}")
    return min(within, key=lambda t: t.kl)
