"""FlatAdam against torch.optim.Adam, and by hand."""

from __future__ import annotations

import copy
import math

import pytest
import torch
from torch import nn

from proximo.algorithms.adam import FlatAdam, NonFiniteUpdateError


class Scattered(nn.Module):
    """Parameters of many shapes, a frozen one among them."""

    def __init__(self, dtype: torch.dtype = torch.float64, seed: int = 0) -> None:
        super().__init__()
        generator = torch.Generator().manual_seed(seed)
        shapes = [(), (3,), (2, 3), (1, 4), (2, 1, 2)]
        self.parts = nn.ParameterList(torch.randn(shape, generator=generator, dtype=dtype) for shape in shapes)
        self.parts[1].requires_grad_(False)

    def loss(self, step: int) -> torch.Tensor:
        """Another, badly scaled, curved loss at each step; now short, now long gradients."""
        scale = 10.0 ** ((step * 7) % 5 - 4)
        return scale * sum(((k + 1) * part - math.sin(step + k)).pow(4).sum() for k, part in enumerate(self.parts))


def scalar(*numbers: float) -> nn.Module:
    module = nn.Module()
    module.weight = nn.Parameter(torch.tensor(numbers, dtype=torch.float64))
    return module


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float64, 1e-12), (torch.float32, 2e-4)])
@pytest.mark.parametrize("max_grad_norm", [0.5, 1e9])
def test_fifty_steps_are_those_of_torch(dtype, tolerance, max_grad_norm):
    ours = Scattered(dtype)
    theirs = copy.deepcopy(ours)
    flat = FlatAdam(ours, learning_rate=0.0)
    learned = [part for part in theirs.parameters() if part.requires_grad]
    adam = torch.optim.Adam(learned, eps=1e-5)
    n_clipped = 0
    for step in range(50):
        rate = 0.02 * (1 - step / 50)
        flat.learning_rate = adam.param_groups[0]["lr"] = rate
        flat.zero_grad()
        ours.loss(step).backward()
        adam.zero_grad()
        theirs.loss(step).backward()
        norm = float(nn.utils.clip_grad_norm_(learned, max_grad_norm))
        n_clipped += norm > max_grad_norm
        adam.step()
        assert flat.clipped_step(max_grad_norm) == pytest.approx(norm, rel=max(tolerance, 1e-9))
        for a, b in zip(ours.parameters(), theirs.parameters(), strict=True):
            torch.testing.assert_close(a, b, rtol=tolerance, atol=tolerance)
    assert n_clipped in ((0,) if max_grad_norm > 1e6 else range(5, 50))  # both ways are trodden


def test_the_first_step_by_hand():
    module = scalar(1.0, 2.0)
    optimizer = FlatAdam(module, learning_rate=0.1)
    (module.weight * torch.tensor([3.0, -4.0])).sum().backward()
    assert optimizer.clipped_step(100.0) == 5.0
    # Both moments are corrected to g and g^2: a step of lr * g / (|g| + 1e-5), nearly lr itself.
    expected = [1.0 - 0.1 * 3 / (3 + 1e-5), 2.0 + 0.1 * 4 / (4 + 1e-5)]
    assert module.weight.tolist() == pytest.approx(expected, abs=1e-15)


def test_clipping_scales_the_gradient_to_the_norm_and_returns_the_norm_before():
    module = scalar(0.0, 0.0)
    optimizer = FlatAdam(module, learning_rate=0.1, eps=1.0)
    (module.weight * torch.tensor([3.0, -4.0])).sum().backward()
    assert optimizer.clipped_step(0.5) == 5.0
    # g = (0.3, -0.4) after clipping; a large eps shows it: lr * g / (|g| + 1)
    assert module.weight.tolist() == pytest.approx([-0.1 * 0.3 / 1.3, 0.1 * 0.4 / 1.4], rel=1e-6)


def test_a_short_gradient_is_not_made_longer():
    module = scalar(0.0, 0.0)
    optimizer = FlatAdam(module, learning_rate=0.1, eps=1.0)
    (module.weight * torch.tensor([0.03, -0.04], dtype=torch.float64)).sum().backward()
    optimizer.clipped_step(0.5)
    assert module.weight.tolist() == pytest.approx([-0.1 * 0.03 / 1.03, 0.1 * 0.04 / 1.04], rel=1e-12)


def test_frozen_parameters_are_left_alone():
    module = Scattered()
    frozen = module.parts[1].clone()
    optimizer = FlatAdam(module, learning_rate=0.1)
    module.loss(3).backward()
    optimizer.clipped_step(1.0)
    assert torch.equal(module.parts[1], frozen)
    assert optimizer.weights.numel() == sum(part.numel() for part in module.parts if part.requires_grad)


def test_zero_grad_forgets_and_backward_adds_up():
    module = scalar(0.0)
    optimizer = FlatAdam(module, learning_rate=0.1)
    for _ in range(2):
        (3.0 * module.weight).sum().backward()
    assert optimizer.gradient.tolist() == [6.0]
    optimizer.zero_grad()
    assert module.weight.grad.tolist() == [0.0]


def test_loading_weights_into_the_module_keeps_them_under_the_optimizer():
    module = Scattered()
    optimizer = FlatAdam(module, learning_rate=0.1)
    module.load_state_dict(Scattered(seed=9).state_dict())
    expected = [part.flatten() for part in Scattered(seed=9).parts if part.requires_grad]
    assert torch.equal(optimizer.weights, torch.cat(expected))
    optimizer.zero_grad()
    module.loss(1).backward()
    before = module.parts[2].clone()
    optimizer.clipped_step(1.0)
    assert not torch.equal(module.parts[2], before)


def test_going_on_from_a_saved_state_is_bit_identical():
    def steps(module: Scattered, optimizer: FlatAdam, which: range) -> None:
        for step in which:
            optimizer.zero_grad()
            module.loss(step).backward()
            optimizer.clipped_step(0.5)

    module = Scattered()
    optimizer = FlatAdam(module, learning_rate=0.01)
    steps(module, optimizer, range(5))
    weights, state = copy.deepcopy(module.state_dict()), copy.deepcopy(optimizer.state_dict())
    steps(module, optimizer, range(5, 12))

    resumed = Scattered(seed=4)
    other = FlatAdam(resumed, learning_rate=0.01)
    resumed.load_state_dict(weights)
    other.load_state_dict(state)
    steps(resumed, other, range(5, 12))
    assert torch.equal(optimizer.weights, other.weights)
    for name, tensor in optimizer.state_dict().items():
        assert torch.equal(tensor, other.state_dict()[name])


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
def test_a_gradient_that_is_not_finite_is_refused_and_changes_nothing(bad):
    module = Scattered()
    optimizer = FlatAdam(module, learning_rate=0.1)
    module.loss(0).backward()
    optimizer.clipped_step(1.0)
    weights = optimizer.weights.clone()
    state = copy.deepcopy(optimizer.state_dict())
    optimizer.zero_grad()
    (module.loss(1) + bad * module.parts[0]).backward()
    with pytest.raises(NonFiniteUpdateError, match=r"nan|inf"):
        optimizer.clipped_step(1.0)
    assert torch.equal(weights, optimizer.weights)
    for name, tensor in optimizer.state_dict().items():
        assert torch.equal(tensor, state[name])


def test_gradients_that_were_replaced_are_noticed():
    module = torch.nn.Linear(2, 1)
    optimizer = FlatAdam(module, learning_rate=0.1)
    module.zero_grad()  # sets them to None
    with pytest.raises(RuntimeError, match="zero_grad"):
        optimizer.clipped_step(1.0)


def test_after_a_restart_weights_that_begin_to_learn_take_steps_of_the_learning_rate():
    """The first of two weights learns alone for long; then both do. Adam's first step is the learning rate long."""
    ways = {}
    for restarts in (True, False):
        module = scalar(0.0, 0.0)
        adam = FlatAdam(module, learning_rate=1.0, eps=1e-8)
        for _ in range(200):
            adam.gradient.copy_(torch.tensor([1.0, 0.0]))
            adam.clipped_step(1e9)
        if restarts:
            adam.restart()
        before = module.weight.detach().clone()
        lengths = []
        for _ in range(20):
            adam.gradient.copy_(torch.tensor([1.0, 1.0]))
            adam.clipped_step(1e9)
            lengths.append(float((before - module.weight)[1]))
            before = module.weight.detach().clone()
        ways[restarts] = lengths
    assert ways[True] == pytest.approx([1.0] * 20, rel=1e-6)
    assert max(ways[False]) > 2.0  # what it is for


def test_steps_in_pieces_are_the_same_bit_for_bit(monkeypatch):
    found = []
    for at_once in (2**26, 3):
        monkeypatch.setattr("proximo.algorithms.adam.AT_ONCE", at_once)
        module = Scattered()
        adam = FlatAdam(module, learning_rate=0.01)
        for step in range(5):
            adam.zero_grad()
            module.loss(step).backward()
            adam.clipped_step(0.5)
        found.append(adam.weights.clone())
    assert torch.equal(*found)
