"""What lands on disk is what a plain forward pass gives, whichever way it was computed."""

import numpy as np
import pytest
import torch

from hooks.files import ConfigError, FolderError, SiteError, StudyError
from hooks.harvest import HarvestConfig, harvest
from hooks.images import read_image
from hooks.prompts import PromptRunner, shared_prefix
from hooks.roles import Role
from hooks.sites import capture, resolve_sites
from hooks.store import ActivationFolder

SITES = ("llm.0.resid_post", "llm.1.mlp_out", "llm.1.resid_post")


@torch.no_grad()
def direct(model, processor, study, sites):
    """One study, no batch, no cache, no early stop."""
    films = {
        name: read_image(path)
        for name in ("frontal", "lateral", "prior")
        if (path := getattr(study, name)) is not None
    }
    encoding = processor.encode_reporting(
        **films,
        indication=study.indication,
        prior_report=study.prior_report,
        assistant_text=study.report,
    )
    with capture(resolve_sites(model, sites), stop=False) as run:
        return encoding.tokens, run(model, **processor.model_inputs(encoding))


def rows_of(folder, site, study):
    return folder.rows(site, 0, folder.n_tokens)[torch.from_numpy(folder.column("study") == study)]


def test_rows_equal_a_plain_forward_pass(model, processor, studies, tmp_path):
    config = HarvestConfig(SITES, "all", "float32", studies_per_part=9, batch_tokens=200)
    folder = harvest(model, processor, studies, config, tmp_path / "acts")
    assert folder.sites == list(SITES)
    for study in studies[:6]:
        tokens, want = direct(model, processor, study, SITES)
        for site in SITES:
            got = rows_of(folder, site, study.id)
            torch.testing.assert_close(got, want[site][0], atol=1e-4, rtol=1e-4)
        mine = folder.column("study") == study.id
        assert folder.column("token_id")[mine].tolist() == tokens.ids.tolist()
        roles = [Role[name.upper()].value for name in folder.column("role")[mine]]
        assert roles == tokens.role.tolist()
        assert folder.column("position")[mine].tolist() == list(range(len(tokens)))


def test_shared_prefix_gives_the_same_rows(model, processor, studies, tmp_path):
    """Studies of one film begin alike; that beginning is computed once."""
    alike = [s.model_copy(update={"lateral": None, "prior": None}) for s in studies[::3]]
    prompts = [PromptRunner(model, processor, 100).prompt(i, s) for i, s in enumerate(alike)]
    assert shared_prefix([prompt.tokens for prompt in prompts]) > 9
    config = HarvestConfig(SITES, "all", "float32")
    folder = harvest(model, processor, alike, config, tmp_path / "acts")
    for study in alike:
        _, want = direct(model, processor, study, SITES)
        for site in SITES:
            got = rows_of(folder, site, study.id)
            torch.testing.assert_close(got, want[site][0], atol=1e-4, rtol=1e-4)


def test_no_shared_prefix_when_prompts_part_before_the_films_end(processor):
    one = processor.tokenize_reporting(assistant_text="A.")
    two = processor.tokenize_reporting(has_lateral=True, assistant_text="A.")
    assert shared_prefix([one, two]) == 0
    assert shared_prefix([one]) == 0
    assert shared_prefix([one, one]) == len(one) - 1


@torch.no_grad()
def test_vision_rows_are_patches_of_each_film(model, processor, studies, tmp_path):
    sites = ("vision.1.resid_post", "projector")
    config = HarvestConfig(sites, "patches", "float32", studies_per_part=5)
    folder = harvest(model, processor, studies[:8], config, tmp_path / "acts")
    study = studies[5]  # frontal and prior
    assert len(study.films()) == 2
    pixels = torch.cat([processor.pixel_values([read_image(film)]) for film in study.films()])
    with capture(resolve_sites(model, sites), stop=False) as run:
        want = run(model.model.get_image_features, pixel_values=pixels)
    got = rows_of(folder, "vision.1.resid_post", study.id)
    torch.testing.assert_close(got, want["vision.1.resid_post"][:, 1:].reshape(18, -1))
    torch.testing.assert_close(
        rows_of(folder, "projector", study.id), want["projector"].reshape(18, -1)
    )
    mine = folder.column("study") == study.id
    assert folder.column("view")[mine].tolist() == ["frontal"] * 9 + ["prior"] * 9
    assert folder.column("patch_row")[mine].tolist() == [0, 0, 0, 1, 1, 1, 2, 2, 2] * 2


def test_policy_keeps_its_roles(activations, processor, studies):
    assert set(activations.column("role")) == {"clinical", "report"}
    first = activations.column("study") == "s0"
    report = first & (activations.column("role") == "report")
    text = processor.tokenizer.decode(activations.column("token_id")[report].tolist())
    assert text.strip() == studies[0].report


def test_same_harvest_again_is_not_recomputed(model, processor, studies, activations):
    config = HarvestConfig(("llm.1.resid_post",), studies_per_part=7)
    manifest = activations.folder / "manifest.json"
    before = manifest.stat().st_mtime_ns
    again = harvest(model, processor, studies, config, activations.folder)
    assert again.n_tokens == activations.n_tokens
    assert manifest.stat().st_mtime_ns == before


def test_another_harvest_is_refused_and_changes_nothing(model, processor, studies, activations):
    files = {p: p.read_bytes() for p in activations.folder.iterdir()}
    config = HarvestConfig(("llm.0.resid_post",), studies_per_part=7)
    with pytest.raises(FolderError, match="holds another harvest"):
        harvest(model, processor, studies, config, activations.folder)
    with pytest.raises(SiteError, match="unknown site"):
        harvest(model, processor, studies, HarvestConfig(("llm.x",)), activations.folder)
    assert {p: p.read_bytes() for p in activations.folder.iterdir()} == files


def test_a_folder_with_something_else_is_refused(model, processor, studies, tmp_path):
    (tmp_path / "thesis.tex").write_text("x")
    with pytest.raises(FolderError, match="is no harvest"):
        harvest(model, processor, studies, HarvestConfig(("llm.0.resid_post",)), tmp_path)


def test_bad_arguments(model, processor, studies, tmp_path):
    with pytest.raises(StudyError, match="no studies"):
        harvest(model, processor, [], HarvestConfig(("llm.0.resid_post",)), tmp_path / "a")
    with pytest.raises(ConfigError, match="did you mean 'published'"):
        HarvestConfig(("projector",), "publishd")
    with pytest.raises(ConfigError, match="unknown dtype 'int8'"):
        HarvestConfig(("projector",), dtype="int8")
    with pytest.raises(ConfigError, match="use policy 'patches'"):
        harvest(model, processor, studies, HarvestConfig(("projector",)), tmp_path / "b")
    assert not (tmp_path / "a").exists() and not (tmp_path / "b").exists()


def test_moments_are_those_of_the_rows(activations):
    site = "llm.1.resid_post"
    rows = activations.rows(site, 0, activations.n_tokens).double()
    moments = activations.moments(site)
    assert moments.count == len(rows)
    torch.testing.assert_close(moments.mean, rows.mean(0))
    assert moments.mean_squared_norm == pytest.approx(float(rows.square().sum(1).mean()))
    role = torch.from_numpy(activations.column("role") == "clinical")
    torch.testing.assert_close(activations.moments(site, Role.CLINICAL).mean, rows[role].mean(0))


def test_row_ranges_across_parts(activations):
    site = "llm.1.resid_post"
    whole = activations.rows(site, 0, activations.n_tokens)
    assert len(activations.manifest["part_rows"]) == 4
    edge = activations.manifest["part_rows"][0]
    assert torch.equal(activations.rows(site, edge - 3, edge + 5), whole[edge - 3 : edge + 5])
    assert len(activations.rows(site, 5, 5)) == 0
    with pytest.raises(FolderError, match="outside"):
        activations.rows(site, 0, activations.n_tokens + 1)
    with pytest.raises(FolderError, match="did you mean"):
        activations.rows("llm.1.resid_pot", 0, 1)


def test_heldout_never_splits_a_patient(activations):
    heldout = activations.heldout(0.4)
    patients = activations.column("patient")
    assert not set(patients[heldout]) & set(patients[~heldout])
    assert 0 < heldout.mean() < 1


def test_reader_opens_by_path(activations):
    folder = ActivationFolder(str(activations.folder))
    assert "tokens" in repr(folder) and folder.width("llm.1.resid_post") == 32
    assert np.array_equal(folder.column("position"), activations.column("position"))


def test_the_package_gives_the_function_though_a_module_has_its_name():
    import hooks

    assert hooks.harvest is harvest
    from hooks import harvest as again

    assert again is harvest and hooks.HarvestConfig is HarvestConfig
