import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from hooks.files import ConfigError
from hooks.roles import Role
from sae import calibrate
from sae.calibrate import threshold_for, threshold_of
from sae.model import MatryoshkaSAE, SAEConfig
from sae.stream import Batch


def l0(sae, x, threshold):
    return float((sae.pre_activations(x) > threshold).sum()) / len(x)


@settings(max_examples=30, deadline=None)
@given(
    seed=st.integers(0, 1000),
    n=st.integers(1, 70),
    target=st.floats(0.5, 6),
    chunk=st.sampled_from([1, 7, 1024]),
)
def test_the_threshold_hits_the_target(seed, n, target, chunk):
    sae = MatryoshkaSAE(SAEConfig(8, 24, 2, (24,)), seed=seed, dtype=torch.float64)
    x = torch.randn(n, 8, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))
    before, calibrate.CHUNK = calibrate.CHUNK, chunk
    try:
        threshold = threshold_of(sae, x, target)
    finally:
        calibrate.CHUNK = before
    positive = float((sae.pre_activations(x) > 0).sum()) / n
    wanted = min(max(1, round(n * target)) / n, positive)
    assert l0(sae, x, threshold) == pytest.approx(wanted, abs=1.01 / n)  # chunks round otherwise


def test_roles_have_thresholds_of_their_own():
    sae = MatryoshkaSAE(SAEConfig(8, 24, 2, (24,), site="s"))
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(400, 8, generator=generator)
    roles = torch.tensor([int(Role.REPORT), int(Role.IMAGE)] * 200, dtype=torch.int8)
    x[roles == int(Role.IMAGE)] *= 3
    batches = [Batch({"s": x[:300]}, roles[:300], {}), Batch({"s": x[300:]}, roles[300:], {})]
    found = threshold_for(sae, batches, 1000, 2.0)
    assert found.n_rows == 400 and set(found.by_role) == {"report", "image"}
    assert l0(sae, x, found.threshold) == pytest.approx(2, abs=0.01)
    for role, threshold in found.by_role.items():
        own = x[roles == int(Role[role.upper()])]
        assert l0(sae, own, threshold) == pytest.approx(2, abs=0.01)
    assert found.by_role["image"] > found.threshold > found.by_role["report"]
    assert threshold_for(sae, batches, 50, 2.0).n_rows == 50


def test_nothing_to_calibrate_on():
    sae = MatryoshkaSAE(SAEConfig(8, 24, 2, (24,), site="s"))
    with pytest.raises(ConfigError, match="no rows to calibrate on"):
        threshold_for(sae, [], 10, 2.0)
