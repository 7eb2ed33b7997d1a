"""The one exception for mistakes a person can mend: it carries the whole message they should read."""

from __future__ import annotations

import difflib
import math
import sys
import traceback
from collections.abc import Iterable

from proximo.lines import fitted, width_of

HIGHEST_SEED = 2**63 - 1
"""Torch's generators take no larger numbers, and TOML holds none."""


class UserError(Exception):
    """Bad input: what is wrong, where, why, and how to mend it, in one readable message.

    The command line prints the message and exits with code 2; Python callers see an ordinary
    exception. Mistakes in Proximo itself are never raised as `UserError`.
    """


class DiskError(UserError):
    """The disk is full, or refuses: nothing that was there is harmed, and the same may be tried again later."""


def tell(text: str) -> None:
    """Print one line on standard error; that nobody may read it there is no reason to stop."""
    try:
        if sys.stderr is not None:  # closed from the beginning: print would take standard output instead
            print(fitted(text, width_of(sys.stderr)), file=sys.stderr, flush=True)
    except (OSError, ValueError):
        pass


def nearest(name: str, known: Iterable[str], *, count: int = 3) -> list[str]:
    """Return up to `count` of `known` that look most like `name`, best first, ignoring case."""
    by_lowercase: dict[str, str] = {}
    for candidate in known:
        by_lowercase.setdefault(candidate.lower(), candidate)
    matches = difflib.get_close_matches(name.lower(), list(by_lowercase), n=count, cutoff=0.5)
    return [by_lowercase[match] for match in matches]


def shown(value: object) -> str:
    """A value as it would be written in Python, for messages; what is too long for one is cut."""
    try:
        text = repr(value)
    except ValueError:  # an integer of thousands of digits, alone or somewhere inside
        return f"{type(value).__name__} of thousands of digits"
    return text if len(text) <= _LONGEST_SHOWN else f"{text[:_LONGEST_SHOWN]}..."


_LONGEST_SHOWN = 400


def in_words(error: BaseException) -> str:
    """The type and message of an exception that the user's own code may have raised; what is too long is cut."""
    try:
        said = str(error)
    except BaseException:  # the exception is the user's own, and so are the mistakes in it
        said = "(its message cannot be shown)"
    return _cut(f"{type(error).__name__}: {said}")


def with_traceback(error: BaseException) -> str:
    """The same, and below it where it came from: the last lines of its traceback."""
    lines = [_cut(line) for line in traceback.format_exception(error)[-4:]]
    return f"{in_words(error)}\n{''.join(lines).rstrip()}"


def _cut(text: str) -> str:
    return text if len(text) <= _LONGEST_SAID else f"{text[:_LONGEST_SAID]}..."


_LONGEST_SAID = 2000


def in_range(
    name: str,
    value: float | None,
    *,
    at_least: float | None = None,
    at_most: float | None = None,
    above: float | None = None,
    below: float | None = None,
    whole: bool = False,
    optional: bool = False,
    usual: str,
) -> None:
    """Check that a setting is a number (a whole one, if asked for) in its range, or, if optional, None.

    Raises:
        UserError: with the name, the value, what is possible and a usual value.
    """
    if value is None and optional:
        return
    bounds = [(at_least, ">="), (above, ">"), (at_most, "<="), (below, "<")]
    kind = "a whole number" if whole else "a number"
    wanted = " and ".join(f"{sign} {bound:g}" for bound, sign in bounds if bound is not None)
    is_whole = isinstance(value, int) and not isinstance(value, bool)
    is_number = (is_whole and (whole or _fits_a_float(value))) or (isinstance(value, float) and math.isfinite(value))
    number: float = value if is_number else math.nan  # type: ignore[assignment]
    fits = (
        is_number
        and not (whole and not is_whole)
        and not (
            (at_least is not None and number < at_least)
            or (above is not None and number <= above)
            or (at_most is not None and number > at_most)
            or (below is not None and number >= below)
        )
    )
    if not fits:
        raise UserError(
            f"{name} is {shown(value)}; it must be {' '.join(filter(None, (kind, wanted)))}. A usual value is {usual}."
        )


def one_of(name: str, value: object, known: Iterable[str]) -> None:
    """Check that a setting is one of the words it may be.

    Raises:
        UserError: with the name, the value and the words.
    """
    known = list(known)
    if value not in known:
        closest = nearest(str(value), known, count=1)
        hint = f" Did you mean {closest[0]!r}?" if closest else ""
        raise UserError(f"{name} is {shown(value)}; it must be one of {', '.join(map(repr, known))}.{hint}")


def _fits_a_float(value: float | None) -> bool:
    return value is not None and abs(value) <= sys.float_info.max
