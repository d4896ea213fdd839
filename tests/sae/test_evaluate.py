"""Figures of dictionaries whose answer is known, and their intervals."""

import json
import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from hooks.files import ConfigError
from sae import MatryoshkaSAE, SAEConfig, auroc, measure
from sae.baselines import fit_pca
from sae.codes import EvaluationConfig, codes
from sae.cross_entropy import StudyLosses
from sae.evaluate import evaluate, recovered
from sae.intervals import auroc_interval, mean_interval, patient_draws, ratio
from sae.report import write_report
from sae.tally import density, tally

SITE = "llm.1.resid_post"
CONFIG = EvaluationConfig(heldout=0.4, draws=200, ks=(1, 2), least=1, batch=57)


def exact(k=32):
    """±each coordinate is a latent, so decode(encode(x)) = x."""
    sae = MatryoshkaSAE(SAEConfig(32, 64, k, (64,), site=SITE, policy="published"))
    with torch.no_grad():
        sae.W_dec.copy_(torch.cat([torch.eye(32), -torch.eye(32)]))
        sae.W_enc.copy_(sae.W_dec.T)
    return sae


def random_sae(seed=0):
    sae = MatryoshkaSAE(SAEConfig(32, 96, 8, site=SITE, policy="published"), seed=seed)
    sae.threshold.fill_(0.4)
    return sae


def test_an_exact_dictionary(activations):
    record = evaluate(exact(), activations, CONFIG)
    sae = record["dictionaries"]["sae"]
    for group in (sae, *sae["roles"].values()):
        assert group["fvu"]["value"] == pytest.approx(0, abs=1e-10)
        assert group["cosine"]["value"] == pytest.approx(1)
        assert group["l0"]["value"] == pytest.approx(32)
        assert group["fvu"]["high"] == pytest.approx(0, abs=1e-10)
    # 32 components are all of them, and PCA is then exact too.
    assert record["dictionaries"]["pca"]["fvu"]["value"] == pytest.approx(0, abs=1e-6)
    roles = {name: one["l0"]["n"] for name, one in sae["roles"].items()}
    assert sum(roles.values()) == record["n_tokens"] == sae["fvu"]["n"]


def test_figures_are_those_of_measure_and_of_one_pass_by_hand(activations):
    sae = random_sae()
    heldout = activations.heldout(0.4)
    record = evaluate(sae, activations, CONFIG)["dictionaries"]["sae"]
    quality = measure(sae, activations, SITE, heldout)
    assert record["fvu"]["value"] == pytest.approx(quality.fvu, rel=1e-6)
    assert record["l0"]["value"] == pytest.approx(quality.l0)
    assert record["dead_fraction"]["value"] == pytest.approx(quality.dead_fraction)
    chosen = heldout & (activations.column("role") == "report")
    alone = measure(sae, activations, SITE, chosen)
    report = record["roles"]["report"]
    assert report["fvu"]["value"] == pytest.approx(alone.fvu, rel=1e-6)
    assert report["dead_fraction"]["value"] == pytest.approx(alone.dead_fraction)
    x = activations.rows(SITE, 0, activations.n_tokens).float()[torch.from_numpy(heldout)]
    with torch.no_grad():
        cosine = torch.cosine_similarity(x, sae(x), dim=1).mean()
    assert record["cosine"]["value"] == pytest.approx(float(cosine), rel=1e-5)
    assert record["cosine"]["low"] <= record["cosine"]["value"] <= record["cosine"]["high"]


def test_a_silent_latent_is_dead_and_never_fires():
    got = density(torch.tensor([0.0, 0.0, 1e-3, 0.5, 1.0]))
    assert got["never"] == 2
    assert sum(got["counts"]) == 3
    filled = [i for i, count in enumerate(got["counts"]) if count]
    edges = got["log10_edges"]
    assert all(
        edges[i] <= math.log10(rate) <= edges[i + 1]
        for i, rate in zip(filled, (1e-3, 0.5, 1.0), strict=False)
    )


def test_everything_stands_at_one_l0(activations):
    sae, other = random_sae(), random_sae(seed=4)
    other.threshold.fill_(0.0)
    record = evaluate(sae, activations, CONFIG, {"other": other})
    l0 = {name: one["l0"]["value"] for name, one in record["dictionaries"].items()}
    n = record["n_tokens"]
    assert l0["other"] == pytest.approx(l0["sae"], abs=2 / n)
    assert l0["random"] == pytest.approx(l0["sae"], rel=0.05)
    assert l0["pca"] == round(l0["sae"])
    assert record["calibration"]["overall"]["l0"] == pytest.approx(8, abs=1 / n)
    assert record["stability"]["other"]["mean_cosine"]["value"] < 0.8
    same = evaluate(sae, activations, CONFIG, {"twin": random_sae()})["stability"]["twin"]
    assert same["mean_cosine"]["value"] == pytest.approx(1)
    assert same["shared"]["value"] == 1


def test_pca_is_the_best_of_its_rank(activations):
    mask = ~activations.heldout(0.4)
    x = activations.rows(SITE, 0, activations.n_tokens).double()[torch.from_numpy(mask)]
    pca = fit_pca(activations, SITE, mask, 5, batch=31)
    centred = x - x.mean(0)
    left = (x - pca.decode(pca.encode(x.float())).double()).square().sum()
    values = torch.linalg.svdvals(centred).square()
    assert float(left) == pytest.approx(float(values[5:].sum()), rel=1e-4)
    identity = pca.components @ pca.components.T
    torch.testing.assert_close(identity, torch.eye(5), atol=1e-5, rtol=0)
    with pytest.raises(ConfigError, match="rank"):
        fit_pca(activations, SITE, mask, 33)


def test_probes_find_the_label_that_a_latent_is(activations):
    """The label is whether coordinate 3 of any token is large: latent 3 knows, others do not."""
    sae = exact()
    studies = activations.column("study")
    x = activations.rows(SITE, 0, activations.n_tokens)[:, 3].float().numpy()
    largest = {study: x[studies == study].max() for study in set(studies)}
    middle = float(np.median(list(largest.values())))
    labels = {s: ["large"] * int(v > middle) + ["everyone"] for s, v in largest.items()}
    record = evaluate(sae, activations, CONFIG, labels=labels)["probing"]
    assert record["left_out"] == ["everyone"]
    probe = record["labels"]["large"]["sae"]["1"]
    assert probe["latents"] == [3]
    assert probe["auroc"]["value"] == 1
    assert set(record["labels"]["large"]) == {"sae", "pca", "random"}
    assert set(record["labels"]["large"]["pca"]) == {"1", "2"}
    unknown = next(iter(labels))
    fewer = {study: names for study, names in labels.items() if study != unknown}
    record = evaluate(sae, activations, CONFIG, labels=fewer)["probing"]
    assert (record["n_studies"], record["n_studies_unknown"]) == (23, 1)
    assert record["labels"]["large"]["sae"]["1"]["latents"] == [3]
    with pytest.raises(ConfigError, match="none of the 24 studies"):
        evaluate(sae, activations, CONFIG, labels={"another": ["large"]})


def test_what_cannot_be_compared_is_refused(activations):
    elsewhere = MatryoshkaSAE(SAEConfig(32, 64, 4, site="llm.2.resid_post"))
    with pytest.raises(ConfigError, match=r"site 'llm\.2"):
        evaluate(random_sae(), activations, CONFIG, {"x": elsewhere})
    with pytest.raises(ConfigError, match="is taken"):
        evaluate(random_sae(), activations, CONFIG, {"pca": random_sae()})
    silent = random_sae()
    silent.threshold.fill_(1e9)
    with pytest.raises(ConfigError, match="no latent"):
        evaluate(silent, activations, CONFIG)
    with pytest.raises(ConfigError, match="held-out"):
        evaluate(random_sae(), activations, EvaluationConfig(heldout=0.0))


def test_recovered_is_a_ratio_of_sums():
    losses = {
        "clean": torch.tensor([1.0, 2, 3]),
        "half": torch.tensor([2.0, 3, 4]),
        "zero_ablated": torch.tensor([3.0, 4, 5]),
        "mean_ablated": torch.tensor([2.0, 3, 4]),
    }
    found = StudyLosses(torch.tensor([10.0, 10, 10]), {n: v.double() for n, v in losses.items()})
    got = recovered(found, ["a", "b", "b"], CONFIG)
    assert set(got) == {"half"}
    assert got["half"]["recovered_zero"] == {"value": 0.5, "low": 0.5, "high": 0.5, "n": 30}
    assert got["half"]["recovered_mean"]["value"] == 0


def test_the_page_needs_no_network(activations, tmp_path):
    labels = {s: ["a"] * (i % 2) for i, s in enumerate(dict.fromkeys(activations.column("study")))}
    record = evaluate(random_sae(), activations, CONFIG, {"<other>": random_sae(2)}, labels)
    json.dumps(record, allow_nan=False)
    write_report(record, tmp_path / "page.html", "Evaluation of <one>")
    page = (tmp_path / "page.html").read_text()
    assert "&lt;one&gt;" in page and "<one>" not in page
    assert "<td>&lt;other&gt;</td>" in page
    assert 'src="http' not in page


@given(st.lists(st.tuples(st.integers(0, 3), st.booleans()), min_size=2, max_size=30))
@settings(deadline=None, max_examples=40)
def test_the_area_of_an_interval_is_the_auroc(rows):
    scores = torch.tensor([float(score) for score, _ in rows])
    labels = torch.tensor([label for _, label in rows])
    draws = patient_draws(len(rows), 20)
    got = auroc_interval(scores, labels, torch.arange(len(rows)), draws)
    whole = float(auroc(scores[:, None], labels)[0])
    assert got.value == pytest.approx(whole, nan_ok=True)
    # Every draw, literally: rows repeated as often as they are drawn.
    areas = []
    for counts in draws.long():
        chosen = torch.repeat_interleave(torch.arange(len(rows)), counts)
        one = float(auroc(scores[chosen][:, None], labels[chosen])[0])
        if not math.isnan(one):
            areas.append(one)
    if areas:
        assert got.low == pytest.approx(np.quantile(areas, 0.025), abs=1e-6)
        assert got.high == pytest.approx(np.quantile(areas, 0.975), abs=1e-6)


def test_intervals_cover_as_often_as_they_say():
    """Of 200 samples of 40 patients with 5 alike rows each, about 95 % cover the mean."""
    generator = torch.Generator().manual_seed(0)
    covered = 0
    for seed in range(200):
        means = torch.randn(40, generator=generator, dtype=torch.float64)
        got = ratio(means * 5, torch.full((40,), 5.0), 200, patient_draws(40, 400, seed))
        covered += got.low <= 0 <= got.high
    assert 0.88 <= covered / 200 <= 0.99


def test_one_patient_gives_no_interval():
    got = ratio(torch.tensor([3.0]), torch.tensor([4.0]), 4, patient_draws(1))
    assert got.value == 0.75
    assert math.isnan(got.low) and math.isnan(got.high)
    assert got.record() == {"value": 0.75, "low": None, "high": None, "n": 4}
    assert mean_interval(torch.tensor([2.0, 2.0]))[:3] == (2, 2, 2)


def test_codes_leave_the_dictionary_as_it_is(activations):
    sae = random_sae()
    before = {name: value.clone() for name, value in sae.state_dict().items()}
    beside = codes(sae, activations, CONFIG, {})
    tally(beside, activations, SITE, activations.heldout(0.4), CONFIG)
    assert all(torch.equal(before[name], value) for name, value in sae.state_dict().items())
