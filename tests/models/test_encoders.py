"""The Nature CNN inside `ActorCritic`: which observations it is for, what it computes, and that both heads share it."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from gymnasium import spaces

from proximo.algorithms.adam import FlatAdam
from proximo.algorithms.ppo import PPO
from proximo.core.batch import Batch
from proximo.errors import UserError
from proximo.models.control import ActorCritic, NetworkConfig
from proximo.models.encoders import _blocks, _filters_of_blocks, chosen_encoder

SCREENS = spaces.Box(0, 255, (4, 84, 84), np.uint8)


def policy(space: spaces.Box = SCREENS, **settings: Any) -> ActorCritic:
    return ActorCritic(space, spaces.Discrete(6), NetworkConfig(**settings), torch.Generator().manual_seed(0))


def images(n: int, shape: tuple[int, ...] = (4, 84, 84), seed: int = 0) -> torch.Tensor:
    return torch.randint(0, 256, (n, *shape), dtype=torch.uint8, generator=torch.Generator().manual_seed(seed))


def rollout_of(model: ActorCritic, n_envs: int, length: int) -> Batch:
    """Acted upon step by step, as while collecting."""
    generator = torch.Generator().manual_seed(1)
    observations = images(n_envs * length).unflatten(0, (n_envs, length))
    acted = [model.act(observations[:, t], generator) for t in range(length)]
    none = torch.zeros(n_envs, length, dtype=torch.bool)
    values = torch.stack([step.values for step in acted], 1)
    return Batch(
        observations=observations,
        actions=torch.stack([step.actions for step in acted], 1),
        mask=~none,
        rewards=torch.linspace(-1, 1, none.numel()).reshape(none.shape),
        log_probs=torch.stack([step.log_probs for step in acted], 1),
        values=values,
        next_values=values,
        terminated=none,
        done=none,
    )


class TestChoice:
    @pytest.mark.parametrize(
        ("space", "encoder"),
        [
            (SCREENS, "nature_cnn"),
            (spaces.Box(0, 255, (210, 160, 3), np.uint8), "nature_cnn"),
            (spaces.Box(0, 255, (3, 36, 36), np.uint8), "nature_cnn"),
            (spaces.Box(0, 255, (3, 35, 36), np.uint8), "mlp"),
            (spaces.Box(0, 255, (64, 64), np.uint8), "mlp"),
            (spaces.Box(0.0, 1.0, (4, 84, 84), np.float32), "mlp"),
            (spaces.Box(-1.0, 1.0, (3,), np.float32), "mlp"),
        ],
    )
    def test_images_of_bytes_that_are_large_enough_are_seen_by_the_cnn(self, space: spaces.Box, encoder: str):
        assert chosen_encoder("auto", space) == encoder
        assert (policy(space).encoder is not None) == (encoder == "nature_cnn")

    def test_what_was_asked_for_is_done(self):
        assert policy(encoder="mlp").encoder is None
        floats = spaces.Box(0.0, 255.0, (4, 84, 84), np.float32)
        assert policy(floats, encoder="nature_cnn").encoder is not None

    @pytest.mark.parametrize(
        ("space", "settings", "words"),
        [
            (spaces.Box(0, 255, (3, 35, 36), np.uint8), {}, "images of 35 by 36 pixels; it needs 36 by 36 at least"),
            (spaces.Box(0, 255, (84, 84), np.uint8), {}, "an image has three dimensions"),
            (spaces.Box(-1.0, 1.0, (4, 84, 84), np.float32), {}, "pixels of an image are from 0 to 255"),
            (SCREENS, {"normalize_observations": True}, "Set normalize_observations to false"),
        ],
    )
    def test_what_it_cannot_see_is_refused(self, space: spaces.Box, settings: dict[str, Any], words: str):
        with pytest.raises(UserError, match=words):
            policy(space, encoder="nature_cnn", **settings)

    def test_perceptrons_have_no_precision(self):
        with pytest.raises(UserError, match="precision is 'bfloat16', which is for images alone"):
            policy(spaces.Box(-1.0, 1.0, (3,), np.float32), precision="bfloat16")


class TestFeatures:
    def test_they_are_those_of_the_paper(self):
        """Against the same network in float64, on pixels divided by 255, channels first in memory."""
        model = policy()
        weights = {name: tensor.double() for name, tensor in model.state_dict().items()}
        x = images(3).double() / 255.0
        for name, stride in (("first", 4), ("second", 2), ("third", 1)):
            x = F.conv2d(x, weights[f"encoder.{name}.weight"], weights[f"encoder.{name}.bias"], stride).relu()
        assert x.shape == (3, 64, 7, 7)
        flat = torch.stack([x[:, :, row, column] for row in range(7) for column in range(7)], 1).flatten(1)
        features = (flat @ weights["encoder.features.weight"].T + weights["encoder.features.bias"]).relu()
        values = features @ weights["critic.0.weight"].T + weights["critic.0.bias"]
        assert torch.allclose(model.value(images(3)).double(), values[:, 0], atol=1e-5)
        logits = features @ weights["actor.0.weight"].T + weights["actor.0.bias"]
        log_probs = logits.log_softmax(-1)
        assert torch.allclose(
            model.log_prob(images(3), torch.tensor([0, 3, 5])).double(), log_probs[[0, 1, 2], [0, 3, 5]]
        )

    def test_channels_may_come_last(self):
        first, last = policy(), policy(spaces.Box(0, 255, (84, 84, 4), np.uint8))
        seen = images(2)
        assert torch.equal(first.value(seen), last.value(seen.movedim(1, -1)))

    @pytest.mark.parametrize("shape", [(4, 84, 84), (3, 40, 64), (1, 36, 44)])
    def test_the_first_layer_over_blocks_is_the_same_sum(self, shape: tuple[int, int, int]):
        generator = torch.Generator().manual_seed(0)
        weight = torch.randn(5, shape[0], 8, 8, dtype=torch.float64, generator=generator)
        seen = images(2, shape)
        blocks = F.conv2d(_blocks(seen).double(), _filters_of_blocks(weight))
        assert torch.allclose(blocks, F.conv2d(seen.double(), weight, stride=4), rtol=1e-12)

    @pytest.mark.parametrize("shape", [(4, 84, 84), (3, 36, 44), (3, 38, 44), (3, 36, 46), (84, 84, 4)])
    def test_bfloat16_is_float32_to_its_rounding(self, shape: tuple[int, ...]):
        space, found = spaces.Box(0, 255, shape, np.uint8), {}
        for precision in ("float32", "bfloat16"):
            model = policy(space, precision=precision)
            assert model.encoder is not None
            features = model._features(images(6, shape))
            (features * torch.linspace(-1, 1, 512)).sum().backward()
            found[precision] = [features.detach(), *(p.grad for p in model.encoder.parameters())]
        for index, (exact, rounded) in enumerate(zip(found["float32"], found["bfloat16"], strict=True)):
            assert (rounded - exact).norm() < (0.1 if index else 0.01) * exact.norm()  # gradients are sums that cancel

    def test_weights_are_orthogonal_with_gain_sqrt_2(self):
        encoder = policy().encoder
        assert encoder is not None
        for layer in (encoder.first, encoder.second, encoder.third, encoder.features):
            rows = layer.weight.detach().flatten(1)
            assert torch.allclose(rows @ rows.T, 2.0 * torch.eye(len(rows)), atol=1e-4)
            assert not layer.bias.any()

    def test_the_generator_alone_draws_them(self):
        torch.manual_seed(1)
        one = policy(orthogonal_init=False)
        torch.manual_seed(2)
        before = torch.get_rng_state()
        other = policy(orthogonal_init=False)
        assert all(torch.equal(a, b) for a, b in zip(one.parameters(), other.parameters(), strict=True))
        assert torch.equal(before, torch.get_rng_state())

    def test_one_image_is_as_a_batch_of_one_and_numpy_as_torch(self):
        model, seen = policy(), images(2)
        assert model(seen[0].numpy()) == model(seen.numpy())[0]
        assert float(model.value(seen[1])) == pytest.approx(float(model.value(seen.numpy())[1]), abs=1e-6)


class TestLearning:
    @pytest.mark.parametrize(("precision", "error"), [("float32", 1e-5), ("bfloat16", 0.02)])
    def test_before_the_first_step_every_ratio_is_1(self, precision: str, error: float):
        model = policy(precision=precision)
        batch = rollout_of(model, 2, 3).as_steps()
        with torch.no_grad():
            new = model.evaluate(batch)
        assert new.log_probs.dtype == torch.float32
        assert (new.log_probs - batch.log_probs).exp().sub(1.0).abs().max() < error
        assert new.values is not None
        assert torch.allclose(new.values, batch.values, atol=error)

    def test_actor_and_critic_both_teach_the_encoder(self):
        model = policy()
        assert model.encoder is not None
        batch = rollout_of(model, 2, 2)
        for quantity in ("log_probs", "values"):
            model.zero_grad()
            getattr(model.evaluate(batch), quantity).sum().backward()
            assert model.encoder.first.weight.grad.abs().sum() > 0, quantity

    def test_an_update_follows_the_advantages(self):
        """The path that is derived by autograd: there is nothing plain to lay open."""
        model = policy()
        batch = rollout_of(model, 4, 8)
        assert model.plain(batch.as_steps()) is None
        ppo = PPO(batch_size=16, n_epochs=2, learning_rate=2.5e-4)
        with torch.no_grad():
            before = model.evaluate(batch)
        metrics = ppo.update(model, FlatAdam(model, learning_rate=1e-3), batch, torch.Generator().manual_seed(0))
        with torch.no_grad():
            after = model.evaluate(batch)
        better = batch.rewards > 0.5
        change = after.log_probs - before.log_probs
        assert change[better].mean() > change[batch.rewards < -0.5].mean()
        assert metrics["n_updates"] == 4

    def test_steps_may_be_picked_in_any_order(self):
        model = policy()
        steps = rollout_of(model, 2, 4).as_steps()
        order = torch.tensor([5, 0, 7, 0])
        with torch.no_grad():
            some, every = model.evaluate(steps[order]), model.evaluate(steps)
        assert torch.allclose(some.log_probs, every.log_probs[order], atol=1e-6)
