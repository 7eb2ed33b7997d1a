"""How many examples the properties here are tried on, and values that are wrong nearly everywhere."""

from __future__ import annotations

import os
from collections.abc import Callable
from typing import Any

from hypothesis import HealthCheck, Phase, settings
from hypothesis import strategies as st

MORE = "PROXIMO_FUZZ_EXAMPLES"
"""Environment variable: each property is tried on this many examples, fresh ones each time, if that is more."""


def examples(count: int) -> Callable[[Any], Any]:
    """Try a property on `count` examples, the same ones each time, unless the environment asks for more."""
    asked = int(os.environ.get(MORE, "0"))
    return settings(
        max_examples=max(count, asked),
        derandomize=asked == 0,
        deadline=None,
        database=None,
        phases=(Phase.explicit, Phase.generate, Phase.shrink),
        suppress_health_check=[HealthCheck.too_slow, HealthCheck.filter_too_much, HealthCheck.function_scoped_fixture],
    )


numbers = (
    st.sampled_from([0, 1, -1, 2, 3, 2**31, 2**63 - 1, 2**63, 2**64, 10**30, -(10**30), 10**400, 10**4000])
    | st.sampled_from(
        [0.0, -0.0, 0.5, 1.0, -1.0, 1e-300, 5e-324, 1e30, 1e300, float("inf"), float("-inf"), float("nan")]
    )
    | st.integers(-4, 4)
    | st.floats(-3, 3)
)

odd_texts = [
    "",
    " ",
    "none",
    "true",
    "nan",
    "inf",
    "-1",
    "1e999",
    "9" * 5000,
    "\0",
    "a\0b",
    "x" * 5000,
    "\ud800",
    "é\n",
    "~nobody/x",
]
words = [".", "/", "cpu", "cuda", "cpu:99", "meta", "linear", "relu", "fused", "clip", "kl_penalty", "native", "warn"]
texts = st.sampled_from([*odd_texts, *words]) | st.text(st.characters(), max_size=4)

values = st.recursive(
    st.none() | st.booleans() | numbers | texts,
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(texts, inner, max_size=2),
    max_leaves=4,
)
"""Anything at all, and often what breaks programs."""
