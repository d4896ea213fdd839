"""Towers alone: rows equal a plain forward pass, in the folder format of every harvest."""

import json

import pytest
import torch
from transformers import Dinov2Backbone, Dinov2Config, Dinov2Model, LlamaConfig, LlamaForCausalLM

from hooks.files import CheckpointError, ConfigError, SiteError, StudyError
from hooks.harvest import HarvestConfig
from hooks.images import pixel_values, read_image
from hooks.plain import (
    FilmScale,
    Text,
    films_job,
    harvest_films,
    harvest_texts,
    reports_of,
    texts_job,
)
from hooks.sites import capture, resolve_sites
from hooks.studies import Skipped
from hooks.study_list import Mapped, StudyList

REPORTS = (
    "The heart is enlarged. There is a small left pleural effusion.",
    "Lungs are clear. No pneumothorax.",
    "Heart size is normal.",
    "An endotracheal tube is in place. Lungs are clear.",
)
SCALE = FilmScale(image_size=42)
TEXTS = [Text(f"t{i}", f"{report} Number {i}.", f"p{i // 2}") for i, report in enumerate(REPORTS)]


def encoder(cls=Dinov2Model):
    torch.manual_seed(0)
    config = Dinov2Config(
        hidden_size=24, num_hidden_layers=2, num_attention_heads=2, image_size=42, patch_size=14
    )
    return cls(config).eval()


@pytest.fixture(scope="module")
def llama(tokenizer):
    torch.manual_seed(0)
    config = LlamaConfig(
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=2,
        num_attention_heads=4,
        vocab_size=len(tokenizer),
    )
    return LlamaForCausalLM(config).eval()


@torch.no_grad()
@pytest.mark.parametrize("cls", [Dinov2Model, Dinov2Backbone])
def test_films_through_an_encoder_alone(cls, studies, tmp_path):
    model, sites = encoder(cls), ("vision.0.resid_mid", "vision.1.resid_post")
    config = HarvestConfig(sites, "patches", "float32", studies_per_part=5)
    folder = harvest_films(model, studies[:8], config, tmp_path / "acts", SCALE)
    study = studies[5]  # frontal and prior
    films = [read_image(film) for film in study.films()]
    pixels = torch.stack([pixel_values(film, 42, SCALE.mean, SCALE.std) for film in films])
    with capture(resolve_sites(model, sites), stop=False) as run:
        want = run(model, pixel_values=pixels)
    mine = torch.from_numpy(folder.column("study") == study.id)
    for site in sites:
        got = folder.rows(site, 0, folder.n_tokens)[mine]
        torch.testing.assert_close(got, want[site][:, 1:].reshape(18, -1))
    assert folder.column("view")[mine.numpy()].tolist() == ["frontal"] * 9 + ["prior"] * 9
    assert folder.column("patch_column")[mine.numpy()].tolist() == [0, 1, 2] * 6
    again = harvest_films(model, studies[:8], config, tmp_path / "acts", SCALE)
    assert again.n_tokens == folder.n_tokens


@torch.no_grad()
def test_texts_through_a_language_model_alone(llama, tokenizer, tmp_path):
    sites = ("llm.0.attn_out", "llm.1.resid_post")
    config = HarvestConfig(sites, "all", "float32", studies_per_part=3, batch_tokens=60)
    folder = harvest_texts(llama, tokenizer, TEXTS, config, tmp_path / "acts")
    for text in TEXTS:
        ids = tokenizer(text.text, return_tensors="pt")["input_ids"]
        with capture(resolve_sites(llama, sites), stop=False) as run:
            want = run(llama, input_ids=ids)
        mine = folder.column("study") == text.id
        assert folder.column("token_id")[mine].tolist() == ids[0].tolist()
        assert folder.column("role")[mine].tolist() == ["boilerplate"] + ["report"] * (
            ids.shape[1] - 1
        )
        for site in sites:
            got = folder.rows(site, 0, folder.n_tokens)[torch.from_numpy(mine)]
            torch.testing.assert_close(got, want[site][0], atol=1e-5, rtol=1e-5)
    assert set(folder.column("sentence")[folder.column("study") == "t0"][1:]) == {0, 1, 2}
    assert set(folder.column("patient")) == {"p0", "p1"}


def test_a_text_too_long_is_skipped_and_named(llama, tokenizer, tmp_path):
    config = HarvestConfig(("llm.0.resid_post",))
    texts = [*TEXTS, Text("long", "Lungs are clear. " * 50)]
    folder = harvest_texts(llama, tokenizer, texts, config, tmp_path / "acts", max_tokens=60)
    assert folder.manifest["n_skipped"] == 1 and "long" not in set(folder.column("study"))
    with pytest.raises(StudyError, match="'long': length: "):
        harvest_texts(llama, tokenizer, texts, config, tmp_path / "b", max_tokens=60, strict=True)


def test_both_are_estimated_before_they_start(llama, tokenizer, studies, tmp_path):
    films = HarvestConfig(("vision.0.resid_post",), "patches", studies_per_part=5)
    texts = HarvestConfig(("llm.0.resid_post",), studies_per_part=2)
    for job in (
        films_job(encoder(), studies[:8], films, tmp_path / "films", SCALE),
        texts_job(llama, tokenizer, TEXTS, texts, tmp_path / "texts"),
    ):
        left, folder = job.estimate(), job.run()
        assert folder is not None and left.tokens == folder.n_tokens and left.seconds > 0
        assert left.bytes > sum(p.stat().st_size for p in folder.folder.glob("part-*.safetensors"))


def test_reports_of_studies_are_texts_and_the_others_are_named(studies):
    given = StudyList([studies[0], Skipped("x", "y"), *studies[1:3]])
    silent = Mapped(given, lambda one: one.model_copy(update={"report": None}))
    texts, skipped = reports_of(given)
    assert list(texts) == [Text(s.id, s.report, s.patient) for s in studies[:3]]
    assert list(skipped) == [Skipped("x", "y")]
    assert [one.reason.split(":")[0] for one in reports_of(silent)[1]] == ["no report"] * 3
    with pytest.raises(StudyError, match="'s0' has no report"):
        reports_of(silent, strict=True)


def test_scale_is_read_from_a_checkpoint(tmp_path, checkpoint):
    assert FilmScale.from_pretrained(checkpoint) == FilmScale(42)
    with pytest.raises(CheckpointError, match=r"has no preprocessor_config\.json"):
        FilmScale.from_pretrained(tmp_path)
    (tmp_path / "preprocessor_config.json").write_text(json.dumps({"size": {"shortest_edge": 9}}))
    with pytest.raises(CheckpointError, match="names no crop size"):
        FilmScale.from_pretrained(tmp_path)


def test_what_does_not_fit_is_refused(llama, tokenizer, studies, model, tmp_path):
    patches = HarvestConfig(("vision.0.resid_post",), "patches")
    with pytest.raises(ConfigError, match="do not divide into patches of 14"):
        harvest_films(encoder(), studies, patches, tmp_path / "a", FilmScale(50))
    with pytest.raises(ConfigError, match="use policy 'patches'"):
        harvest_films(encoder(), studies, HarvestConfig(("vision.0.resid_post",)), tmp_path / "a")
    with pytest.raises(SiteError, match="has only vision layers"):
        harvest_films(encoder(), studies, HarvestConfig(("llm.0.resid_post",)), tmp_path / "a")
    with pytest.raises(StudyError, match="nothing to harvest"):
        harvest_films(encoder(), [], patches, tmp_path / "a")
    with pytest.raises(StudyError, match="two texts have the id 't0'"):
        config = HarvestConfig(("llm.0.resid_post",))
        harvest_texts(llama, tokenizer, [TEXTS[0], TEXTS[0]], config, tmp_path / "a")
    with pytest.raises(ConfigError, match="is a vision site, and this model sees texts"):
        harvest_texts(model, tokenizer, TEXTS, patches, tmp_path / "a")
    assert not (tmp_path / "a").exists()
