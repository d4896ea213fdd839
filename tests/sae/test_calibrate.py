"""A calibrated threshold gives the L0 asked for, to the last latent."""

import numpy as np
import pytest
import torch

from hooks.files import ConfigError
from sae import (
    FolderRows,
    MatryoshkaSAE,
    SAEConfig,
    calibrate_by_role,
    calibrate_threshold,
    measure,
)
from sae.calibrate import calibrate_batches

SITE = "llm.1.resid_post"


@pytest.fixture
def sae(activations):
    sae = MatryoshkaSAE(SAEConfig(32, 96, 8, site=SITE), seed=3)
    with torch.no_grad():
        sae.b_dec.copy_(activations.moments(SITE).mean)
    return sae


@torch.no_grad()
def pre_activations(sae, folder, mask):
    return sae.pre_activations(
        folder.rows(SITE, 0, folder.n_tokens)[torch.from_numpy(mask)].float()
    )


@pytest.mark.parametrize("target", [0.5, 3.0, 8.25, 40.0])
def test_the_threshold_is_the_order_statistic(sae, activations, target):
    mask = activations.heldout(0.4)
    got = calibrate_threshold(sae, activations, mask, target, batch=4096)
    pre = pre_activations(sae, activations, mask)
    count = round(len(pre) * target)
    assert got.threshold == pytest.approx(float(pre.flatten().sort(descending=True).values[count]))
    assert got.l0 == count / len(pre)
    assert got.n_tokens == len(pre)
    before = float(sae.threshold)
    assert before == 0, "the dictionary is left as it is"
    sae.threshold.fill_(got.threshold)
    assert measure(sae, activations, SITE, mask).l0 == pytest.approx(got.l0, abs=1.5 / len(pre))


def test_batches_do_not_matter(sae, activations):
    mask = np.ones(activations.n_tokens, dtype=bool)
    whole = calibrate_threshold(sae, activations, mask, 4)
    pieces = calibrate_threshold(sae, activations, mask, 4, batch=29)
    assert pieces.threshold == pytest.approx(whole.threshold, rel=1e-5)


def test_each_role_by_itself(sae, activations):
    mask = activations.heldout(0.4)
    got = calibrate_by_role(sae, activations, mask, 5)
    roles = activations.column("role")
    assert set(got) == set(roles[mask])
    for name, one in got.items():
        alone = calibrate_threshold(sae, activations, mask & (roles == name), 5)
        assert one.l0 == alone.l0
        assert one.threshold == pytest.approx(alone.threshold, rel=1e-5)


def test_ties_stay_out_together(sae, activations):
    """Every latent the same: a row has all 96 or none, and L0 stays below the target."""
    with torch.no_grad():
        sae.W_enc.zero_()
        sae.b_enc.fill_(0.5)
    mask = np.ones(activations.n_tokens, dtype=bool)
    got = calibrate_threshold(sae, activations, mask, 10)
    assert (got.threshold, got.l0) == (0.5, 0.0)


def test_all_that_is_positive_needs_no_threshold(sae, activations):
    mask = np.ones(activations.n_tokens, dtype=bool)
    with torch.no_grad():
        sae.W_enc.zero_()
        sae.b_enc.fill_(-1)
        sae.b_enc[:3] = torch.tensor([1.0, 2.0, 3.0])
    assert calibrate_threshold(sae, activations, mask, 3)[:2] == (0.0, 3.0)
    assert calibrate_threshold(sae, activations, mask, 2)[:2] == (1.0, 2.0)
    with pytest.raises(ConfigError, match="ask for at most 3"):
        calibrate_threshold(sae, activations, mask, 4)
    with pytest.raises(ConfigError, match="fewer than all"):
        calibrate_threshold(sae, activations, mask, 96)
    with pytest.raises(ConfigError, match="no rows"):
        calibrate_threshold(sae, activations, ~mask, 2)


def test_rows_in_memory_are_rows_of_the_folder(sae, activations):
    mask = activations.heldout(0.4)
    overall, roles = calibrate_batches(sae, list(FolderRows(activations, 0.4).heldout([SITE])), 5)
    assert overall == calibrate_threshold(sae, activations, mask, 5)
    assert roles == calibrate_by_role(sae, activations, mask, 5)
