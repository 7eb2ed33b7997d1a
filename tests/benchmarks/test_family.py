from typing import Any

import family
import pytest
import torch

from proximo.algorithms.ppo import PPO
from proximo.core.losses import clipped_surrogate


@pytest.mark.parametrize("task", family.TASKS)
def test_without_the_clip_everything_else_is_the_same(task: str) -> None:
    clipped, unclipped = (family.settings_for(task, kind) for kind in ("ppo", "ppo-unclipped"))
    assert unclipped.pop("clip_epsilon_high") == 1e9
    assert (clipped.pop("clip_epsilon"), unclipped.pop("clip_epsilon")) == (0.2, 0.999999)
    assert clipped == unclipped
    assert {"total_steps", "n_epochs", "batch_size", "learning_rate", "rollout_length", "n_envs"} <= clipped.keys()


def test_the_widest_band_holds_no_ratio_back() -> None:
    """Its gradient is that of ratio * advantage, wherever the ratio is, but for ratios that are as good as 0."""
    new = torch.tensor([[-9.0, -1.0, 0.0, 2.0, 12.0]], requires_grad=True)
    old, advantages = torch.zeros(1, 5), torch.tensor([[1.0, -2.0, 3.0, -4.0, 5.0]])
    mask = torch.ones(1, 5, dtype=torch.bool)
    loss = clipped_surrogate(new, old, advantages, mask, **family.UNCLIPPED).loss
    (gradient,) = torch.autograd.grad(loss, new)
    torch.testing.assert_close(gradient, -new.detach().exp() * advantages / 5)
    PPO(**family.UNCLIPPED)  # and it may be set


def test_every_variant_has_settings_of_its_own() -> None:
    for task in family.TASKS:
        found = [family.settings_for(task, variant) for variant in family.variants_of(task)]
        assert all(found.count(settings) == 1 for settings in found)
    assert family.settings_for("CartPole-v1", "ppo-unclipped-epochs-5")["n_epochs"] == 5
    assert family.settings_for("CartPole-v1", "ppo-lr-0.003")["learning_rate"] == 3e-3


def test_the_kl_that_is_drawn_is_the_largest_since_the_point_before() -> None:
    kls = [0.1, 0.9, 0.2, 0.3, 0.05]
    rows: list[dict[str, Any]] = [
        {"env_steps": 10 * i, "return_mean": None if i == 1 else i, "kl_of_update": kl, "entropy_after": 1.0}
        for i, kl in enumerate(kls, 1)
    ]
    assert family.curve_of(rows, 3) == [[10, None, 0.1, 1.0], [30, 3, 0.9, 1.0], [50, 5, 0.3, 1.0]]
