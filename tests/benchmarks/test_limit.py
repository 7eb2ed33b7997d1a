"""The limit's arithmetic, against figures worked out by hand."""

import pytest
from limit import (
    actor_and_critic,
    count_parameters,
    count_weights,
    environment_seconds,
    nature_flops,
    nature_parameters,
    nature_products,
    perceptron_flops,
    perceptron_products,
    products_flops,
    seconds_per_step,
)


@pytest.mark.parametrize(
    ("n_inputs", "n_actions", "weights", "flops_of_10_epochs"),
    [
        # 4*64 + 64*64 + 64*2 and 4*64 + 64*64 + 64; (2 + 6*10) times that
        (4, 2, 8_896, 551_552),
        # 17*64 + 64*64 + 64*6 and 17*64 + 64*64 + 64
        (17, 6, 10_816, 670_592),
    ],
)
def test_weights_and_flops(n_inputs: int, n_actions: int, weights: int, flops_of_10_epochs: int) -> None:
    layers = actor_and_critic(n_inputs, n_actions)
    assert count_weights(layers) == weights
    assert perceptron_flops(weights, 10) == flops_of_10_epochs


def test_parameters_of_cartpole_have_the_biases() -> None:
    assert count_parameters(actor_and_critic(4, 2)) == 8_896 + (64 + 64 + 2) + (64 + 64 + 1)


def test_the_products_of_a_minibatch_do_the_flops_that_the_formula_counts() -> None:
    # 6 W per step of the minibatch: forward, gradient of weights, gradient of inputs.
    products = perceptron_products(actor_and_critic(17, 6), 64)
    assert products_flops(products) == 64 * 6 * 10_816
    assert perceptron_products([(3, 2)], 5) == [(5, 3, 2), (3, 5, 2), (5, 2, 3)]


def test_nature_network() -> None:
    # Multiplications forward: 400*256*32 + 81*512*64 + 49*576*64 + 3136*512 + 512*(actions + 1), 6 actions.
    forward = 3_276_800 + 2_654_208 + 1_806_336 + 1_605_632 + 3_584
    assert forward == 9_346_560  # 18.7 MFLOP
    # Acting, then 4 epochs of 3 passes, of which one has no gradient of the pixels.
    assert nature_flops(6, 4) == 2 * forward + 4 * 2 * (3 * forward - 3_276_800) == 216_796_160
    weights = 4 * 8 * 8 * 32 + 32 * 4 * 4 * 64 + 64 * 3 * 3 * 64 + 3136 * 512 + 512 * 7
    assert nature_parameters(6) == weights + 32 + 64 + 64 + 512 + 7


def test_the_pixels_get_no_gradient() -> None:
    pixels = (2 * 400, 32, 256)
    assert pixels not in nature_products(6, 2)
    assert len(nature_products(6, 2)) == 3 * 5 - 1


def test_seconds_per_step_by_hand() -> None:
    parts = seconds_per_step(
        environment=10e-6,
        flops=600_000,
        flops_per_second=100e9,
        n_parameters=10_000,
        bytes_per_second=28e9,
        n_epochs=10,
        batch_size=50,
        n_tanh=256,
        tanh_seconds=1e-9,
    )
    assert parts == pytest.approx(
        {
            "environment": 10e-6,
            "products": 6e-6,  # 600 kFLOP at 100 GFLOP/s
            "tanh": 11 * 256e-9,
            "adam": 2e-6,  # 280 kB at 28 GB/s take 10 us; 10 / 50 updates per step
        }
    )


@pytest.mark.parametrize(
    ("serial", "native", "n_envs", "expected"),
    [
        (10e-6, None, 8, 10e-6),  # too quick to be worth splitting
        (60e-6, None, 8, 30e-6),  # over two cores
        (60e-6, None, 1, 60e-6),  # one environment cannot be split
        (60e-6, 20e-6, 8, 20e-6),  # its own vector version is quicker still
        (10e-6, 20e-6, 8, 10e-6),
        (None, 300e-6, 8, 300e-6),
    ],
)
def test_environment_seconds(serial: float | None, native: float | None, n_envs: int, expected: float) -> None:
    assert environment_seconds(serial, native, n_envs=n_envs, cores=2) == pytest.approx(expected)
