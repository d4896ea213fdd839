"""Index, search, history, review and draft, where the answer is known."""

import pytest
import torch

from hooks.files import ConfigError, FolderError
from hooks.harvest import HarvestConfig, harvest
from sae import MatryoshkaSAE, SAEConfig
from steering import Edit, compare
from steering.draft import NOTICE, draft
from steering.evidence import ReportReader
from steering.history import Pairs, agreement, film_pairs, fit_progression, labelled
from steering.review import ReviewConfig, review
from steering.search import build_index, similarity
from steering.weights import film_weights

VISION = "vision.1.resid_post"


@pytest.fixture(scope="module")
def sae():
    return MatryoshkaSAE(SAEConfig(24, 40, 8, site=VISION, policy="patches"), seed=3).eval()


@pytest.fixture(scope="module")
def patches(tmp_path_factory, model, processor, studies):
    out = tmp_path_factory.mktemp("patches") / "acts"
    return harvest(model, processor, studies, HarvestConfig((VISION,), "patches"), out)


@pytest.fixture(scope="module")
def index(tmp_path_factory, sae, patches):
    return build_index(sae, patches, tmp_path_factory.mktemp("index") / "index")


def test_an_index_holds_the_largest_activation_of_each_study_and_film(index, sae, patches):
    names, values = index.take("frontal")
    z = sae.encode(patches.rows(VISION, 0, patches.n_tokens).float()).detach()
    own = (patches.column("study") == names[5][0]) & (patches.column("view") == "frontal")
    want = z[torch.from_numpy(own)].amax(0)
    assert torch.allclose(values[5], want, rtol=1e-3, atol=1e-4)
    with pytest.raises(ConfigError, match="frontl"):
        index.take("frontl")


def test_the_index_of_other_activations_is_refused(index, sae, activations):
    other = MatryoshkaSAE(SAEConfig(32, 40, 8, site="llm.1.resid_post", policy="published"))
    with pytest.raises(FolderError, match="other activations"):
        build_index(other, activations, index.folder)


def test_search_finds_the_same_film_and_never_the_same_patient(index):
    names, values = index.take("frontal")
    hits = index.like("s0", k=24)
    patients = dict(names)
    assert patients["s0"] not in {hit.patient for hit in hits}
    assert {hit.study for hit in hits[:7]} == {f"s{i}" for i in range(3, 24, 3)}  # film 0 again
    latent = int(values[0].argmax())
    ranked = index.by_latents([latent], k=24)
    at = {name: i for i, (name, _) in enumerate(names)}
    found = [float(values[at[hit.study], latent]) for hit in ranked]
    assert found == sorted(found, reverse=True) and len(found) == int((values[:, latent] > 0).sum())


def test_likeness_by_hand():
    values = torch.tensor([[2.0, 0.0], [2.0, 4.0], [0.0, 4.0]])
    found = similarity(values, torch.tensor([2.0, 0.0]))
    assert torch.allclose(found, torch.tensor([1.0, 0.5**0.5, 0.0]))


def test_a_latent_that_is_high_on_some_films_outweighs_one_that_spreads_evenly():
    """Films 0 and 1 share the finding of latent 0; films 0 and 2 agree in anatomy, latent 1."""
    even = torch.linspace(1.0, 2.0, 20)
    values = torch.stack([torch.zeros(20), even, torch.zeros(20)], 1)
    values[[0, 1, 4], 0] = 1.0
    values[3, 2] = 5.0  # fires on one film only: left out
    weight = film_weights(values)
    skewness = (0.15 * 0.85**3 - 0.85 * 0.15**3) / (0.15 * 0.85) ** 1.5
    assert weight[0] == pytest.approx(min(1.5, skewness), rel=1e-4)
    assert weight[1] == pytest.approx(0.1 / 2, rel=1e-4) and weight[2] == 0
    values[0, 1] = values[2, 1]
    likeness = similarity(values, values[0])
    assert likeness[1] > 0.99 > likeness[2]


def test_highlights_by_hand():
    before, now = torch.tensor([[0.0, 3.0, 2.0, 1.0]]), torch.tensor([[4.0, 0.0, 1.0, 1.0]])
    pairs = Pairs(["a"], ["p"], before, now, torch.tensor([4.0, 4.0, 4.0, 4.0]))
    found = [(h.latent, h.kind, h.share) for h in pairs.highlights("a")]
    assert found == [(0, "appears", 1.0), (1, "vanishes", -0.75), (2, "shrinks", -0.25)]
    with pytest.raises(ConfigError, match="no pair"):
        pairs.highlights("b")


def test_a_film_that_is_its_own_prior_has_no_highlights(index, studies):
    pairs = film_pairs(index)
    assert pairs.studies == [study.id for study in studies if study.prior]
    same = next(study for study in studies if study.prior == study.frontal)
    assert pairs.highlights(same.id) == []


def test_attribution_is_the_derivative_of_the_drop(model, processor, sae, studies):
    """Against a finite difference: scaling a latent by 1 - e costs e times its attribution."""
    from steering.evidence import IMAGE
    from steering.generate import steered

    reader = ReportReader(model, processor, sae, studies[4])
    reading = reader.read()
    latent = int(reading.films.latents[reading.attributions[0].abs().argmax()])
    column = reading.films.latents.tolist().index(latent)
    step = 0.05
    drops = []
    for factor in (1 - step, 1 + step):
        edit = Edit(latent, factor, mode="scale")
        with torch.no_grad(), steered(model, sae, [edit], IMAGE, tokens=reader.tokens):
            drops.append(reader.log_probs(1)[0])
    slope = (drops[1] - drops[0]) / (2 * step)
    assert torch.allclose(slope, reading.attributions[:, column], rtol=0.05, atol=1e-3)
    total = reader.patch_attribution(reading, 0, latent).sum()
    assert torch.allclose(total, reading.attributions[0, column], atol=1e-4)


def test_review_measures_what_ablation_does(model, processor, sae, studies):
    study = studies[4]
    found = review(model, processor, study, sae, config=ReviewConfig(candidates=40, shown=40))
    reader = ReportReader(model, processor, sae, study)
    assert found[0].text == "The heart is enlarged."
    top = found[0].image[0]
    base, without = reader.read().log_probs, reader.without([[top.latent]])[0]
    assert top.drop == pytest.approx(float(base[0] - without[0]), abs=1e-4)
    scores = [one.score for one in found[0].image]
    assert scores == sorted(scores, reverse=True)
    assert min(one.drop for one in found[0].image) > 0
    assert set(top.patches) == {"frontal", "lateral"} and len(top.patches["frontal"]) == 3
    with pytest.raises(ConfigError, match="no report"):
        review(model, processor, study.model_copy(update={"report": None}), sae)


def test_a_draft_lists_every_edit(model, processor, sae, studies):
    edits = [Edit(3, 5.0, 4.0, "clamp"), Edit(7, mode="ablate")]
    made = draft(
        model, processor, studies[0], sae, edits, names={3: "left effusion"}, max_new_tokens=8
    )
    want = compare(model, processor, studies[0], sae, edits, max_new_tokens=8)
    assert (made.plain, made.text) == (want.before, want.after)
    shown = str(made)
    assert NOTICE in shown and "latent 3 (left effusion): clamp 5.0 × 4.0" in shown
    assert "latent 7: ablate" in shown and [e["latent"] for e in made.edits] == [3, 7]
    nothing = draft(model, processor, studies[0], sae, [], max_new_tokens=8)
    assert nothing.text == nothing.plain and not any(new for _, new in nothing.sentences)


def test_the_latent_that_follows_a_change_is_found_and_not_the_one_that_knows_presence():
    """Latent 0 falls when the finding grows, as one for small effusions does; latent 1 follows."""
    labels = ["worsening", "worsening", "improving", "improving", "stable", "stable"]
    follows = torch.tensor([0.6, 0.4, -0.5, -0.3, 0.02, -0.01])
    shares = torch.stack([-follows, follows], 1)
    fitted = fit_progression(shares, labels)
    assert fitted.latent == 1
    assert 0.02 < fitted.worsening_above <= 0.4 and -0.3 <= fitted.improving_below < -0.01
    assert agreement(fitted, shares, labels).macro_accuracy == 1
    turned = agreement(fitted, -shares, labels)
    assert turned.macro_accuracy == pytest.approx(1 / 3)  # stable pairs alone stay right
    assert turned.counts["worsening"] == {"improving": 2, "stable": 0, "worsening": 0}


def test_directions_that_cannot_be_fitted_are_refused():
    shares = torch.zeros(2, 3)
    with pytest.raises(ConfigError, match="0 of 2 pairs are improving"):
        fit_progression(shares, ["worsening", "stable"])
    with pytest.raises(ConfigError, match="'worse'"):
        fit_progression(shares, ["worse", "stable"])
    with pytest.raises(ConfigError, match="1 labels for 2 pairs"):
        fit_progression(shares, ["worsening"])


def test_labels_of_progression_come_from_the_studies(index, studies):
    from hooks.studies import Change

    pairs = film_pairs(index)
    changed = [Change(finding="effusion", direction="improving")]
    given = [
        study.model_copy(update={"changes": tuple(changed)})
        if study.id == pairs.studies[1]
        else study
        for study in studies
    ]
    assert labelled(pairs, given, "effusion") == ([1], ["improving"])
    assert labelled(pairs, given, "edema") == ([], [])


def test_a_film_by_itself_is_summarised_as_the_index_has_it(index, model, processor, sae, studies):
    from steering.evidence import film_summary

    names, values = index.take("frontal")
    place = next(i for i, (name, _) in enumerate(names) if name == studies[0].id)
    found = film_summary(model, processor, sae, studies[0].frontal)
    assert torch.allclose(found, values[place], rtol=2e-2, atol=2e-2)
