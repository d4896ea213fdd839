"""The cost model's arithmetic."""

import pytest

from sae.kernels import cost

UNIT = cost.Machine(
    gemm=1e9, gemm_bf16=8e9, stream=1e9, gather_weights=1e9, gather_tokens=2e9, gather_dot=4e9
)


def test_a_step_on_a_machine_of_round_rates():
    """D 10, F 1000, B 100, k 5: 2 MFLOP, a matrix of 40 kB, 20 kB gathered a pass."""
    step = cost.step_seconds(UNIT, 10, 1000, 100, 5, screen=False)
    assert step.encoder == pytest.approx(2e-3)
    assert step.selection == pytest.approx(4e-4)
    assert step.decode == pytest.approx(2e-5)
    assert step.gradients == pytest.approx(5e-6 + 2 * (1e-5 + 4e-5))
    assert step.optimizer == pytest.approx(17 * 4e-5)
    parts = step.encoder + step.selection + step.decode + step.gradients + step.optimizer
    assert step.total == pytest.approx(parts)
    screened = cost.step_seconds(UNIT, 10, 1000, 100, 5, screen=True)
    assert screened.encoder == pytest.approx(2e-3 / 8 + 4e-5 + 1.5 * 5e-6)


def test_a_dense_step_is_six_products_and_streams():
    step = cost.dense_seconds(UNIT, 10, 1000, 100)
    assert step.total == pytest.approx(6 * 2e-3 + 10 * 4e-4 + 24 * 4e-5)


def test_measured_rates_are_positive():
    machine = cost.measure(16, 64, 32, 4)
    assert all(rate > 0 for rate in vars(machine).values())
