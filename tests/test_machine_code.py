"""What numba keeps on the disk must not outlive the code that was made part of it."""

from __future__ import annotations

import hashlib
from pathlib import Path

import pytest

import proximo

SOURCE = Path(proximo.__file__).parent


@pytest.mark.parametrize("kernels", ["algorithms/kernels.py", "models/recurrence_kernels.py"])
def test_kernels_change_with_what_they_inline(kernels: str):
    """numba looks at a kernel's own file alone; so that has the digest of the other one, and changes with it."""
    digest = hashlib.sha256((SOURCE / "machine_code.py").read_bytes()).hexdigest()[:16]
    assert f'MACHINE_CODE = "{digest}"' in (SOURCE / kernels).read_text()
