"""Python in machine code by numba, and a tanh that is vectorized there."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import numpy as np
from numba import njit, types
from numba.extending import overload


def jit(function: Callable[..., Any], fastmath: set[str] | bool | None = None) -> Any:
    """Machine code that needs no lock of Python's, kept on disk.

    No `nnan` or `ninf`: a NaN must get through to where it is refused. Division by zero is infinity, as in NumPy: with
    Python's exception for it no loop that divides would be vectorized.
    """
    loose = {"contract", "reassoc", "nsz", "arcp"} if fastmath is None else fastmath
    return njit(fastmath=loose, error_model="numpy", nogil=True, cache=True)(function)


def tanh(x):
    """Hyperbolic tangent."""
    return math.tanh(x)


@overload(tanh, inline="always")
def _tanh_by_kind(x):
    """In single precision a ratio of polynomials, which is vectorized; its error is below 4e-7."""
    if x is not types.float32:
        return lambda x: math.tanh(x)

    f = np.float32
    limit = f(7.90531110763549805)
    p13, p11, p9 = f(-2.76076847742355e-16), f(2.00018790482477e-13), f(-8.60467152213735e-11)
    p7, p5, p3, p1 = f(5.12229709037114e-08), f(1.48572235717979e-05), f(6.37261928875436e-04), f(4.89352455891786e-03)
    q6, q4, q2, q0 = f(1.19825839466702e-06), f(1.18534705686654e-04), f(2.26843463243900e-03), f(4.89352518554385e-03)

    def rational(x):
        x = limit if x > limit else x  # a NaN stays one
        x = -limit if x < -limit else x
        s = x * x
        above = x * (p1 + s * (p3 + s * (p5 + s * (p7 + s * (p9 + s * (p11 + s * p13))))))
        return above / (q0 + s * (q2 + s * (q4 + s * q6)))

    return rational
