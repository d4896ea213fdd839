"""Index, search, history, review and draft, where the answer is known."""

import pytest
import torch

from hooks.files import ConfigError, FolderError
from hooks.harvest import HarvestConfig, harvest
from sae import MatryoshkaSAE, SAEConfig
from steering import Edit, compare
from steering.draft import NOTICE, draft
from steering.evidence import ReportReader
from steering.history import Pairs, film_pairs
from steering.review import ReviewConfig, review
from steering.search import build_index, similarity

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
            drops.append(reader._log_probs(1)[0])
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
    drops = [one.drop for one in found[0].image]
    assert drops == sorted(drops, reverse=True) and min(drops) > 0
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
