"""Known answers: true directions score 1, random ones chance; planted absorption is found."""

import itertools

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays

from hooks.files import ConfigError
from phantom import PhantomError, Truth
from phantom.absorption import absorption
from sae import auroc
from sae.latent_scores import (
    assign,
    aurocs,
    best_latents,
    best_threshold,
    f1,
    match_latents,
    scorable,
)
from sae.latents import gather, heldout_rows, pool
from sae.localisation import localise
from sae.probing import sparse_probes, splitting

WIDTH, N_FACTORS = 32, 6
few = settings(max_examples=40, deadline=None)
small_numbers = arrays(np.float32, (14, 3), elements=st.sampled_from([-1.0, 0.0, 0.0, 0.5, 2.0]))


@pytest.fixture(scope="module")
def world():
    """Rows that are sums of known directions, the directions, the truth, and the split."""
    generator = torch.Generator().manual_seed(0)
    n = 2400
    truth = torch.rand(n, N_FACTORS, generator=generator) < torch.linspace(0.1, 0.5, N_FACTORS)
    directions = torch.linalg.qr(torch.randn(WIDTH, WIDTH, generator=generator))[0][:N_FACTORS]
    x = truth.float() @ directions + 0.03 * torch.randn(n, WIDTH, generator=generator)
    heldout = heldout_rows([f"patient {i // 4}" for i in range(n)], 0.3)
    return x, directions, truth, heldout


def random_latents(n, width, seed=1):
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(n, width, generator=generator).relu()


def test_true_directions_score_one(world):
    x, directions, truth, heldout = world
    noise = random_latents(len(x), 20)
    latents = torch.cat([noise, (x @ directions.T - 0.2).relu()], 1)
    for score in best_latents(latents, truth, heldout):
        assert score.auroc > 0.999 and score.f1 > 0.995 and score.auroc_chosen_on > 0.999
        assert score.n == int(heldout.sum()) > score.n_positive > 0
    best = [score.latent for score in best_latents(latents, truth, heldout)]
    assert best == list(range(20, 20 + N_FACTORS))
    matching = match_latents(latents, truth, heldout)
    assert [score.latent for score in matching.scores] == best
    assert matching.auroc > 0.999 and matching.f1 > 0.995
    for factor, probes in enumerate(sparse_probes(latents, truth, heldout)):
        assert tuple(probes) == (1, 2, 5)
        assert probes[1].latents == (20 + factor,) and len(probes[5].latents) == 5
        assert all(probe.auroc > 0.999 and probe.f1 > 0.995 for probe in probes.values())
        assert splitting(latents, truth[:, factor], heldout).n_latents == 1


def test_a_random_dictionary_is_at_chance(world):
    _, _, truth, heldout = world
    latents = random_latents(len(truth), 200)
    rate = truth[heldout].float().mean(0)
    always = 2 * rate / (1 + rate)  # F1 of saying yes to everything
    for factor, score in enumerate(best_latents(latents, truth, heldout)):
        assert score.auroc_chosen_on > 0.52  # the best of 200, on the rows it was chosen on
        assert abs(score.auroc - 0.5) < 0.12
        assert score.f1 < float(always[factor]) + 0.05
    assert abs(match_latents(latents, truth, heldout).auroc - 0.5) < 0.05
    probes = [probe[5].auroc for probe in sparse_probes(latents, truth, heldout, ks=(5,))]
    assert abs(float(np.mean(probes)) - 0.5) < 0.05


def test_one_latent_cannot_be_matched_twice(world):
    _, _, truth, heldout = world
    twice = truth[:, [0, 0]]
    latents = torch.cat([truth[:, :1].float(), random_latents(len(truth), 5)], 1)
    assert [score.latent for score in best_latents(latents, twice, heldout)] == [0, 0]
    assert 0.7 < match_latents(latents, twice, heldout).auroc < 0.8


def test_two_halves_of_a_factor_are_put_together(world):
    """A factor split over two latents, the first of which has a copy."""
    _, _, truth, heldout = world
    half = torch.rand(len(truth), generator=torch.Generator().manual_seed(4)) < 0.6
    first, second = truth[:, 0] & half, truth[:, 0] & ~half
    latents = torch.stack([first, first, second], 1).float()
    (probes,) = sparse_probes(latents, truth[:, :1], heldout, ks=(1, 2))
    assert probes[1].f1 < 0.85 and probes[2].f1 == 1.0
    assert 2 in probes[2].latents and len(probes[2].latents) == 2
    found = splitting(latents, truth[:, 0], heldout)
    assert found.n_latents == 2 and found.f1s[1] == 1.0


def test_probe_has_the_least_regularised_loss(world):
    """Against plain gradient descent on the same objective."""
    _, _, truth, heldout = world
    mixed = truth[:, :2].float() + random_latents(len(truth), 2)
    ((probe,),) = [p.values() for p in sparse_probes(mixed, truth[:, :1], heldout, ks=(2,))]
    train = mixed[~heldout][:, list(probe.latents)].double()
    z = (train - train.mean(0)) / train.std(0, correction=0)
    y = truth[~heldout, 0].double()
    w, b = torch.zeros(2, dtype=torch.float64), torch.zeros((), dtype=torch.float64)
    for _ in range(4000):
        residual = torch.sigmoid(z @ w + b) - y
        w -= 1.0 * (z.T @ residual / len(z) + 1e-3 * w)
        b -= 1.0 * residual.mean()
    want = w / train.std(0, correction=0)
    assert probe.weights == pytest.approx(want.tolist(), rel=1e-4)
    assert probe.bias == pytest.approx(float(b - want @ train.mean(0)), rel=1e-4)


@given(small_numbers, st.lists(st.booleans(), min_size=14, max_size=14))
@few
def test_aurocs_are_those_of_sae(values, flags):
    x, truth = torch.from_numpy(values), torch.tensor(flags)
    found = aurocs(x, truth[:, None])[:, 0]
    torch.testing.assert_close(found, auroc(x, truth), equal_nan=True)


@given(small_numbers)
@few
def test_aurocs_depend_on_order_alone(values):
    truth = torch.arange(14)[:, None] % 3 == 0
    x = torch.from_numpy(values)
    for change in (torch.exp, lambda v: v**3, lambda v: 5 * v - 1):
        torch.testing.assert_close(aurocs(change(x), truth), aurocs(x, truth))
    torch.testing.assert_close(aurocs(-x, truth), 1 - aurocs(x, truth))


def test_aurocs_are_the_same_in_blocks(world, monkeypatch):
    _, _, truth, _ = world
    latents = random_latents(len(truth), 9)
    whole = aurocs(latents, truth)
    monkeypatch.setattr("sae.latent_scores._BLOCK", 3000)
    torch.testing.assert_close(aurocs(latents, truth), whole)


@given(st.integers(1, 4), st.integers(0, 3), st.integers(0, 2**32 - 1))
@few
def test_assignment_is_the_best_of_all(columns, more, seed):
    rng = np.random.default_rng(seed)
    scores = rng.random((columns + more, columns))
    found = assign(scores)
    assert len(set(found.tolist())) == columns
    every = itertools.permutations(range(columns + more), columns)
    best = max(sum(scores[row, column] for column, row in enumerate(way)) for way in every)
    assert scores[found, range(columns)].sum() == pytest.approx(best)
    order = rng.permutation(columns + more)
    assert order[assign(scores[order])].tolist() == found.tolist()


@given(arrays(np.float32, 12, elements=st.sampled_from([0.0, 0.0, 1.0, 2.0, 3.5])))
@few
def test_threshold_has_the_best_f1(values):
    x, truth = torch.from_numpy(values), torch.arange(12) % 3 == 0
    every = [f1(x >= cut, truth) for cut in x.unique()]
    assert f1(x >= best_threshold(x, truth), truth) == pytest.approx(max(every))


@given(small_numbers, st.lists(st.sampled_from("abc"), min_size=14, max_size=14))
@few
def test_pooling_takes_maxima(values, groups):
    x = torch.from_numpy(values)
    truth = x > 1
    pooled = pool(x, truth, groups)
    assert pooled.groups == list(dict.fromkeys(groups))
    for place, group in enumerate(pooled.groups):
        own = torch.tensor([name == group for name in groups])
        assert torch.equal(pooled.latents.dense(range(3))[place], x[own].amax(0))
        assert torch.equal(pooled.truth[place], truth[own].any(0))


@given(small_numbers, st.lists(st.booleans(), min_size=14, max_size=14))
@few
def test_latents_hold_every_row(values, flags):
    x, chosen = torch.from_numpy(values), torch.tensor(flags)
    latents = gather(x.split(5))
    assert latents.n_rows == 14 and latents.n_latents == 3
    assert torch.equal(latents.dense(range(3)), x)
    assert torch.equal(latents.take(chosen).dense([2, 0]), x[chosen][:, [2, 0]])


def planted(seed=0, n=3000):
    """Truth of a child, of a sibling, of their parent (which a third makes true too), and split."""
    generator = torch.Generator().manual_seed(seed)
    child, sibling, other = (torch.rand(3, n, generator=generator) < 0.25).unbind()
    return child, sibling, child | sibling | other, torch.arange(n) % 3 == 0


def test_planted_absorption_is_found():
    child, sibling, parent, heldout = planted()
    noise = random_latents(len(child), 10) * (random_latents(len(child), 10, 2) > 1)
    own = torch.eye(12)
    parent_direction = own[0]
    directions = torch.cat([torch.stack([own[0], own[0] + own[1], own[2]]), torch.eye(12)[2:]])
    given_ = {"siblings": sibling, "directions": directions, "probe": parent_direction}
    absorbed = torch.stack([parent & ~child, child, sibling], 1).float()
    found = absorption(torch.cat([absorbed, noise], 1), parent, child, heldout, **given_)
    assert found.child_latent == 1 and found.parent_latents == (0,)
    assert found.rate == 1 and found.silent_elsewhere == 0 and found.silent_with_sibling == 1
    assert found.n == int((child & heldout).sum())
    assert found.cosine == pytest.approx(0.5**0.5)
    assert found.parent_auroc == found.child_auroc == 1

    clean = torch.stack([parent, child, sibling], 1).float()
    found = absorption(torch.cat([clean, noise], 1), parent, child, heldout, **given_)
    assert found.child_latent == 1 and found.parent_latents == (0,)
    assert found.rate == 0 and found.silent_elsewhere == 0

    partly = torch.stack([parent & ~(child & (torch.arange(3000) % 2 == 0)), child], 1).float()
    found = absorption(torch.cat([partly, noise], 1), parent, child, heldout)
    assert found.rate == pytest.approx(0.5, abs=0.12)

    elsewhere = given_ | {"directions": torch.eye(12)[[0, 1, 2, *range(2, 12)]]}
    found = absorption(torch.cat([absorbed, noise], 1), parent, child, heldout, **elsewhere)
    assert found.rate == 0 and found.cosine == 0


def test_splitting_is_told_from_absorption_by_rows_with_both():
    child, sibling, _, heldout = planted()
    parent = child | sibling
    split = torch.stack([child, sibling], 1).float()
    found = absorption(split, parent, child, heldout, siblings=sibling)
    assert found.rate > 0.5 and found.silent_with_sibling == 0
    assert splitting(split, parent, heldout).n_latents == 2


def test_mostly_absorbed_parents_are_found_too():
    """Where the child makes up most of the parent's rows, its latent is the parent's best."""
    child, sibling, _, heldout = planted()
    sibling &= torch.arange(len(child)) % 5 == 0
    parent = child | sibling
    latents = torch.stack([parent & ~child, child], 1).float()
    assert best_latents(latents, parent[:, None], heldout)[0].latent == 1
    found = absorption(latents, parent, child, heldout)
    assert found.parent_latents == (0,) and found.rate == 1


def test_coverage_localises_and_a_constant_does_not():
    truth = Truth(sampler="independent", rate={"consolidation_left": 0.7})
    films = [truth.draw(seed).frontal for seed in range(30)]
    empty = np.zeros((112, 112), bool)
    masks = np.stack([film.masks.get("consolidation_left", empty) for film in films])
    coverage = np.stack([film.coverage()[-2] for film in films])
    names, heldout = [f"p{i}" for i in range(30)], np.arange(30) < 20
    found = localise(coverage, masks, names, heldout)
    assert found.n + found.n_left_out == 20 and 0 < found.n_left_out < 20
    assert found.pixel_auroc.value > 0.97 and found.pixel_auroc.standard_error < 0.01
    assert found.pointing.value == 1 and found.iou.value > 0.5
    constant = localise(np.ones_like(coverage), masks, names, heldout)
    assert constant.pixel_auroc.value == 0.5
    inverse = localise(1 - coverage, masks, names, heldout)
    assert inverse.pixel_auroc.value < 0.03 and inverse.pointing.value == 0


def test_what_cannot_be_scored_is_refused(world):
    _, _, truth, heldout = world
    latents = random_latents(len(truth), 4)
    rare = truth.clone()
    rare[:, 2] = False
    assert scorable(rare, heldout).tolist() == [True, True, False, True, True, True]
    with pytest.raises(ConfigError, match="factor 2 is carried by 0 of"):
        best_latents(latents, rare, heldout)
    with pytest.raises(ConfigError, match="rows of latents"):
        best_latents(latents[1:], truth, heldout)
    with pytest.raises(ConfigError, match="held-out"):
        best_latents(latents, truth, torch.zeros_like(heldout))
    with pytest.raises(ConfigError, match="4 latents for 6 factors"):
        match_latents(latents, truth, heldout)
    with pytest.raises(ConfigError, match="at least 1"):
        sparse_probes(latents, truth, heldout, ks=(0,))
    with pytest.raises(ConfigError, match="at least 1"):
        splitting(latents, truth[:, 0], heldout, most=0)
    with pytest.raises(ConfigError, match="NaN"):
        gather(latents * torch.nan)
    for empty in ([], latents[:0]):
        with pytest.raises(ConfigError, match="no rows"):
            gather(empty)
    with pytest.raises(ConfigError, match="one width"):
        gather([latents, latents[:, 1:]])
    with pytest.raises(ConfigError, match="groups"):
        pool(latents, truth, ["a"])
    child, _, parent, heldout = planted()
    latents = random_latents(len(child), 3)
    with pytest.raises(PhantomError, match="not the parent"):
        absorption(latents, child, parent, heldout)
    with pytest.raises(PhantomError, match="go together"):
        absorption(latents, parent, child, heldout, probe=torch.ones(2))
    with pytest.raises(PhantomError, match="more latents"):
        absorption(latents, parent, child, heldout, n_parent=3)
    with pytest.raises(PhantomError, match="every training row"):
        absorption(latents, child, child, heldout)
