"""`benchmarks/speed_gpu.py` runs: what it measures on a CPU, at a tiny size, says nothing about speed."""

from __future__ import annotations

import importlib.util
import subprocess
import sys
from pathlib import Path
from types import ModuleType

import pytest
import torch

SCRIPT = Path(__file__).parent.parent / "benchmarks" / "speed_gpu.py"


@pytest.fixture(scope="module")
def benchmark() -> ModuleType:
    spec = importlib.util.spec_from_file_location("speed_gpu", SCRIPT)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.mark.skipif(torch.cuda.is_available(), reason="this machine has a CUDA device")
def test_without_a_gpu_it_says_so() -> None:
    ended = subprocess.run([sys.executable, str(SCRIPT)], capture_output=True, text=True, check=True)
    assert ended.stdout == "no GPU here: skipped\n"


def test_cart_pole(benchmark) -> None:
    row = benchmark.measure_cartpole(torch.device("cpu"), **benchmark.TINY["cartpole"])
    assert row["share_collecting"] + row["share_updating"] == pytest.approx(1.0)
    assert row["steps_per_second"] < row["steps_per_second_collecting"]


def test_ataris_update_is_the_plain_one(benchmark) -> None:
    # One minibatch an epoch: the order in it changes nothing, so both must end at the same weights.
    ours, plain = benchmark.NatureCNN(), benchmark.NatureCNN()
    plain.load_state_dict(ours.state_dict())
    batch = benchmark.pictures(ours, torch.device("cpu"), 2, 3)
    algorithm = benchmark.PPO(n_epochs=2, batch_size=6, learning_rate=2.5e-4, entropy_coef=0.01, update_path="graphed")
    flat = benchmark.FlatAdam(ours, learning_rate=0.0)
    adam = torch.optim.Adam(plain.parameters(), lr=2.5e-4, eps=1e-5)
    algorithm.update(ours, flat, batch, torch.Generator().manual_seed(0))
    before = batch.log_probs.clone()
    benchmark.plain_update(plain, adam, batch, algorithm)
    assert torch.equal(batch.log_probs, before)
    one, other = (torch.cat([p.detach().flatten() for p in policy.parameters()]) for policy in (ours, plain))
    torch.testing.assert_close(one, other, rtol=0, atol=2e-5)
