"""The same seed gives the same bits, whatever else the machine is doing."""

from __future__ import annotations

import pytest
import torch

from proximo.training import control
from tests.environments import Noisy
from tests.training.aligning import everything_of, trained
from tests.training.running import config_with as control_config
from tests.training.running import differing, tensors_of, train


@pytest.fixture(params=[1, 2])
def n_threads(request):
    before = torch.get_num_threads()
    torch.set_num_threads(request.param)
    yield request.param
    torch.set_num_threads(before)


@pytest.mark.parametrize("path", ["eager", "fused"])
def test_a_control_run_twice(tmp_path, n_threads, path):
    config = control_config(
        threads=n_threads, update_path=path, normalize_observations=True, normalize_rewards=True, hidden_sizes=[256]
    )
    one, two = (train(config, Noisy, tmp_path / name) for name in ("one", "two"))
    assert differing(tensors_of(one.state), tensors_of(two.state)) == []
    for a, b in zip(one.rows, two.rows, strict=True):
        assert {k: v for k, v in a.items() if k not in control.CLOCK_METRICS} == {
            k: v for k, v in b.items() if k not in control.CLOCK_METRICS
        }
    other = train(
        control_config(seed=1, threads=n_threads, update_path=path, hidden_sizes=[256]), Noisy, tmp_path / "3"
    )
    assert differing(tensors_of(one.state), tensors_of(other.state)) != []


@pytest.mark.parametrize("sharing", ["separate", "lora"])
def test_a_language_run_twice(tmp_path, n_threads, config_with, sharing):
    config = config_with(threads=n_threads, sharing=sharing, n_iterations=2)
    (one, rows), (two, others) = (trained(config, tmp_path / name) for name in ("one", "two"))
    ours, theirs = everything_of(one), everything_of(two)
    assert all(torch.equal(ours[name], theirs[name]) for name in theirs)
    assert [row["reward_mean"] for row in rows] == [row["reward_mean"] for row in others]
