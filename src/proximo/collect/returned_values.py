"""What an environment returns: whether it is what it must be, and if not, what is wrong with it in words."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import numpy as np
from gymnasium import spaces

from proximo.models.packing import PackedObservations

STEP_RETURNS = "step() must return (observation, reward, terminated, truncated, info)"
RESET_RETURNS = "reset() must return (observation, info)"


@dataclass(frozen=True)
class SpaceCheck:
    """Finds what is wrong with a batch of observations; a value may pass its bound by float rounding."""

    low: np.ndarray
    high: np.ndarray
    bounded: bool
    slack_low: np.ndarray
    slack_high: np.ndarray
    all_of: np.dtype | None = None
    """The kind of number of which every value is inside the bounds: bytes, for 0 to 255."""
    rows: PackedObservations | None = None
    """What the observations are rows of: their numbers are looked at, and called by their places in it."""

    @staticmethod
    def of(space: spaces.Space) -> SpaceCheck:
        """Prepare the bounds of a Box; other spaces have none here."""
        if not isinstance(space, spaces.Box):
            nothing = np.zeros(())
            return SpaceCheck(nothing, nothing, False, nothing, nothing)
        rows = space if isinstance(space, PackedObservations) else None
        low, high = (space.low, space.high) if rows is None else rows.number_bounds
        low, high = low.astype(np.float64), high.astype(np.float64)
        bounded = bool(np.isfinite(low).any() or np.isfinite(high).any())
        all_of, dtype = None, np.dtype(space.dtype if rows is None else np.float32)
        if dtype.kind in "iu":
            ends = np.iinfo(dtype)  # type: ignore[arg-type]
            all_of = dtype if (low == ends.min).all() and (high == ends.max).all() else None
        slack_low, slack_high = low - 1e-5 * (1 + np.abs(low)), high + 1e-5 * (1 + np.abs(high))
        if dtype.kind == "f":  # of the observations' kind, which need not be converted to be compared
            with np.errstate(over="ignore"):
                slack_low, slack_high = (slack.astype(np.float32) for slack in (slack_low, slack_high))
        return SpaceCheck(low, high, bounded, slack_low, slack_high, all_of, rows)

    def fits(self, observations: np.ndarray) -> bool:
        """Whether all of them are finite and inside the bounds."""
        if self.all_of is not None and observations.dtype == self.all_of:  # NumPy takes None for float64
            return True
        if self.rows is not None:
            observations = self.rows.numbers(observations)
        if observations.dtype.kind == "f":
            flat = observations.ravel()
            # One operation where all is well: a sum of squares is finite, or has a number in it that is not or is huge.
            with np.errstate(over="ignore"):
                is_sound = math.isfinite(np.dot(flat, flat))
            if not is_sound and not np.isfinite(flat).all():
                return False
        if not self.bounded:
            return True
        return not ((observations < self.slack_low) | (observations > self.slack_high)).any()

    def first_problem(self, observation: np.ndarray, given: np.ndarray | None = None) -> tuple[str, bool] | None:
        """What is wrong with one observation, in words, and whether it is a value out of bounds (not NaN).

        `given` is the same observation before it was converted: it may have been too large for float32.
        """
        if self.rows is not None:
            observation, given = self.rows.numbers(observation), None
        for place in np.argwhere(~np.isfinite(observation)):
            where = tuple(place)
            if given is not None and np.isfinite(given[where]):
                return f"{element(place)} is {given[where]:.6g}, too large for {observation.dtype}", False
            return f"{self._called(place)} is {observation[where]}", False
        if self.bounded:
            for place in np.argwhere((observation < self.slack_low) | (observation > self.slack_high)):
                where = tuple(place)
                return (
                    f"{self._called(place)} is {observation[where]:.9g}, outside its space's bounds "
                    f"[{self.low[where]:.6g}, {self.high[where]:.6g}]",
                    True,
                )
        return None

    def _called(self, place: np.ndarray) -> str:
        return element(place) if self.rows is None else self.rows.element(int(place[-1]))


def element(place: np.ndarray) -> str:
    """What a number of an observation is called, by its place in it."""
    return f"observation[{', '.join(map(str, place))}]" if len(place) else "observation"


def shown(value: Any) -> str:
    """A value, short enough for a sentence."""
    try:
        text = " ".join(repr(value).split())
    except Exception:  # the value is the user's own, and so are the mistakes in it
        return f"{type(value).__name__} that cannot be shown"
    return text if len(text) <= 120 else f"{text[:117]}..."


def reward_of(value: Any) -> float | None:
    """A reward as the float that is learned from; None if it is not one number."""
    try:
        if isinstance(value, int):  # NumPy takes only those of 64 bits for numbers
            return float(value)
        array = np.asarray(value)
        return float(array.reshape(())) if array.size == 1 and array.dtype.kind in "fiub" else None
    except OverflowError:
        return math.inf
    except Exception:  # what a value of any class raises while it is converted
        return None


def end_of(value: Any) -> bool | None:
    """`terminated` or `truncated` as a bool: one of Python or NumPy, or an integer 0 or 1; None if it is neither."""
    if isinstance(value, (bool, np.bool_, int, np.integer)) and value in (0, 1):
        return bool(value)
    return None


def amount_of(result: Any) -> str:
    """How much came in the place of what must be returned."""
    return f"{len(result)} values" if isinstance(result, (tuple, list)) else f"a {type(result).__name__}"
