"""Every mode against the difference of two decodings in float64; conflicts; baselines."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from hooks.files import ConfigError, FolderError
from sae import MatryoshkaSAE, SAEConfig, measure
from steering import (
    Edit,
    Push,
    References,
    apply_edits,
    matched_latent,
    mean_difference,
    measure_references,
    probe_direction,
    random_direction,
)
from steering.edits import Plan

SITE = "llm.1.resid_post"


def dictionary(activation="threshold", threshold=0.2, dtype=torch.float64):
    config = SAEConfig(16, 48, 4, (48,), site=SITE, activation=activation)
    sae = MatryoshkaSAE(config, seed=3, dtype=dtype)
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        sae.b_dec.copy_(torch.randn(16, generator=generator))
        sae.b_enc.copy_(0.1 * torch.randn(48, generator=generator))
    sae.threshold = torch.as_tensor(threshold, dtype=dtype)
    return sae.eval()


def changed(z, edit):
    """What each mode means, as the documentation says it."""
    now = z[..., edit.latent]
    want = {
        "add": lambda: (now + edit.strength * edit.reference).clamp_min(0),
        "scale": lambda: edit.strength * now,
        "clamp": lambda: torch.full_like(now, max(0.0, edit.strength * edit.reference)),
        "minimum": lambda: now.clamp_min(max(0.0, edit.strength * edit.reference)),
        "ablate": lambda: torch.zeros_like(now),
    }[edit.mode]()
    z = z.clone()
    z[..., edit.latent] = want
    return z


def edit_of(latent, mode, strength):
    if mode == "ablate":
        return Edit(latent, mode=mode)
    if mode == "scale":
        return Edit(latent, abs(strength), mode=mode)
    return Edit(latent, strength, 1.3, mode)


MODES = ("add", "scale", "clamp", "minimum", "ablate")
ONE = st.tuples(st.integers(0, 47), st.sampled_from(MODES), st.floats(-4, 4))


@torch.no_grad()
@settings(max_examples=60, deadline=None)
@given(
    st.lists(ONE, max_size=8, unique_by=lambda one: one[0]),
    st.sampled_from(["threshold", "topk"]),
    st.booleans(),
    st.integers(0, 1000),
)
def test_every_mode_is_the_difference_of_two_decodings(chosen, activation, own, seed):
    threshold = torch.linspace(-0.1, 0.6, 48) if own else 0.2
    sae = dictionary(activation, threshold)
    h = torch.randn(3, 5, 16, generator=torch.Generator().manual_seed(seed)).double()
    edits = [edit_of(*one) for one in chosen]
    z = sae.encode(h)
    after = z
    for edit in edits:
        after = changed(after, edit)
    want = h + sae.decode(after) - sae.decode(z)
    torch.testing.assert_close(apply_edits(sae, edits, h), want, atol=1e-10, rtol=1e-10)


@torch.no_grad()
def test_what_changes_no_latent_is_bitwise_nothing():
    sae, h = dictionary(dtype=torch.float32), torch.randn(4, 7, 16)
    nothing = [Edit(3, 1.0, mode="scale"), Edit(5, 0.0, 2.0), Edit(7, 0.0, 2.0, "minimum")]
    assert torch.equal(apply_edits(sae, nothing, h), h)
    value = sae.encode(h[0, 0])
    latent = int(value.argmax())
    same = apply_edits(sae, [Edit(latent, 1.0, float(value[latent]), "clamp")], h[0, 0])
    torch.testing.assert_close(same, h[0, 0], atol=1e-6, rtol=0)


@torch.no_grad()
def test_ablate_is_scale_0_and_clamp_0():
    sae, h = dictionary(), torch.randn(40, 16).double()
    latent = int((sae.encode(h) > 0).sum(0).argmax())
    off = apply_edits(sae, [Edit(latent, mode="ablate")], h)
    assert torch.equal(off, apply_edits(sae, [Edit(latent, 0.0, mode="scale")], h))
    assert torch.equal(off, apply_edits(sae, [Edit(latent, 0.0, 1.0, "clamp")], h))
    assert not torch.equal(off, h)


@torch.no_grad()
def test_each_row_has_its_own_edits_and_beams_take_those_of_their_row():
    sae = dictionary()
    rows = [[Edit(1, 2.0, 1.0)], [], [Edit(1, mode="ablate"), Edit(4, 3.0, 1.0, "minimum")]]
    h = torch.randn(6, 5, 16).double()
    got = Plan(sae, rows, "cpu").apply(h)
    for i in range(6):
        want = apply_edits(sae, rows[i // 2], h[i])
        torch.testing.assert_close(got[i], want, atol=1e-12, rtol=0)
    assert torch.equal(got[2:4], h[2:4])
    with pytest.raises(ConfigError, match="for 3 rows and the model runs 4"):
        Plan(sae, rows, "cpu").apply(h[:4])


@torch.no_grad()
def test_a_mask_leaves_other_tokens_as_they_are():
    sae, h = dictionary(), torch.randn(2, 5, 16).double()
    edits = [Edit(1, 2.0, 1.0), Push(torch.ones(16), 1.0, 3.0)]
    mask = torch.tensor([[1, 0, 0, 1, 0], [0, 0, 1, 0, 1]], dtype=torch.bool)
    got = Plan(sae, [edits], "cpu").apply(h, mask)
    assert torch.equal(got[~mask], h[~mask])
    torch.testing.assert_close(got[mask], apply_edits(sae, edits, h)[mask], atol=1e-12, rtol=0)


def test_half_precision_stays_and_the_sae_is_left_alone():
    sae = dictionary(dtype=torch.float32)
    before = {name: value.clone() for name, value in sae.state_dict().items()}
    assert apply_edits(sae, [Edit(1, 2.0, 1.0)], torch.randn(3, 16).bfloat16()).dtype == (
        torch.bfloat16
    )
    assert all(torch.equal(value, before[name]) for name, value in sae.state_dict().items())


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: Edit(1, 1.0, 1.0, "ablat"), "did you mean 'ablate'"),
        (lambda: Edit(1, 1.0, 1.0, "ablate"), "takes no strength"),
        (lambda: Edit(1, -1.0, mode="scale"), "never negative"),
        (lambda: Edit(1, 2.0), "no reference activation"),
        (lambda: Edit(1, None, 1.0), "give a number"),
        (lambda: Edit(1, float("nan"), 1.0), "give a number"),
        (lambda: Edit(1, 1.0, 0.0, "minimum"), "it never fires"),
        (lambda: Push(torch.zeros(16), 1.0, 1.0), "not 0"),
    ],
)
def test_what_is_no_edit(make, message):
    with pytest.raises(ConfigError, match=message):
        make()


def test_a_conflict_names_both_edits():
    both = [Edit(7, 2.0, 1.5), Edit(3, mode="ablate"), Edit(7, 0.5, mode="scale")]
    with pytest.raises(ConfigError, match=r"7 is edited twice, by 'add 2.0 × 1.5' and 'scale 0.5'"):
        apply_edits(dictionary(), both, torch.zeros(1, 16).double())
    with pytest.raises(ConfigError, match="has 3 numbers"):
        apply_edits(dictionary(), [Push(torch.ones(3), 1.0, 1.0)], torch.zeros(1, 16).double())


def planted(n=4000):
    """Rows in which a concept moves the mean by 2 along axis 0, while axis 1 varies widely."""
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(n, 16, generator=generator)
    x[:, 1] *= 5
    has = torch.rand(n, generator=generator) < 0.3
    x[has, 0] += 2
    x[has, 1] += 1
    return x, has


def test_mean_difference_moves_one_mean_to_the_other():
    x, has = planted()
    push = mean_difference(x, has)
    torch.testing.assert_close(push.vector, x[has].mean(0) - x[~has].mean(0), atol=1e-4, rtol=0)
    with pytest.raises(ConfigError, match="rows of both kinds"):
        mean_difference(x, has | True)


def test_a_probe_discounts_what_varies_without_telling():
    x, has = planted()
    probe, mean = probe_direction(x, has, l2=1e-6), mean_difference(x, has)
    # Fisher's direction: Σ⁻¹(μ₁ − μ₀) ∝ (2, 1/25)
    want = torch.zeros(16)
    want[0], want[1] = 2.0, 1 / 25
    assert torch.cosine_similarity(probe.vector, want, dim=0) > 0.99
    assert torch.cosine_similarity(mean.vector, want, dim=0) < 0.95
    apart = (x[has].mean(0) - x[~has].mean(0)) @ probe.direction
    torch.testing.assert_close(torch.tensor(probe.reference), apart, atol=1e-3, rtol=1e-3)


def test_a_random_direction_is_as_long_as_the_edit():
    sae = dictionary()
    with torch.no_grad():
        sae.W_dec[5] *= 3
    push = random_direction(sae, Edit(5, -2.0, 1.5))
    torch.testing.assert_close(push.vector.norm(), torch.tensor(9.0))
    assert not torch.equal(push.direction, random_direction(sae, push, seed=1).direction)
    torch.testing.assert_close(random_direction(sae, push, seed=1).vector.norm(), torch.tensor(9.0))
    with pytest.raises(ConfigError, match="no fixed length"):
        random_direction(sae, Edit(5, mode="ablate"))


def test_a_matched_latent_fires_as_often():
    rates = torch.tensor([0.0, 0.5, 0.011, 0.0099, 0.01, 0.0, 1e-6])
    drawn = {matched_latent(4, rates, seed, among=2) for seed in range(30)}
    assert drawn == {2, 3}
    with pytest.raises(ConfigError, match="never fires"):
        matched_latent(0, rates)
    with pytest.raises(ConfigError, match="nothing to compare"):
        matched_latent(0, torch.tensor([0.5, 0.0]))


@torch.no_grad()
def test_references_by_role(activations, tmp_path):
    sae = MatryoshkaSAE(SAEConfig(32, 64, 4, (64,), site=SITE, policy="published"), seed=3).eval()
    rates = measure(sae, activations, SITE, activations.heldout(0.2) | True).firing_rates
    latent = int(rates.argmax())
    found = measure_references(sae, activations, [latent, 2])
    z = sae.encode(activations.rows(SITE, 0, activations.n_tokens).float())[:, latent]
    report = torch.from_numpy(activations.column("role") == "report")
    for role, own in (("report", z[report]), ("clinical", z[~report]), ("all", z)):
        want = own[own > 0].double().quantile(0.99)
        assert found.of(latent, role) == pytest.approx(float(want), rel=1e-5)
    found.save(tmp_path / "references.json")
    again = References.load(tmp_path / "references.json")
    assert again == found
    edit = again.edit(latent, 2.0, "minimum", "report")
    assert edit.target == pytest.approx(2 * found.of(latent, "report"))
    with pytest.raises(ConfigError, match="did you mean 'report'"):
        found.of(latent, "reprt")
    with pytest.raises(ConfigError, match="latent 5 has no reference"):
        found.of(5)
    (tmp_path / "references.json").write_text('{"site": "a"}')
    with pytest.raises(FolderError, match="lacks"):
        References.load(tmp_path / "references.json")
