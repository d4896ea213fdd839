"""Activations along the model's own report are those of teacher-forcing it."""

import json

import numpy as np
import pytest
import torch

from hooks.files import ConfigError, FolderError
from hooks.generation import (
    Decoding,
    generation_job,
    harvest_generated,
    read_generations,
    report_tokens,
)
from hooks.harvest import HarvestConfig, harvest
from hooks.roles import Role
from hooks.sites import capture, resolve_sites
from hooks.store import ActivationFolder
from steering.generate import prompt_inputs

SITES = ("llm.0.resid_post", "llm.1.resid_mid", "llm.2.mlp_out")
LIMIT = 7


@pytest.fixture(scope="module")
def ended(model, processor, studies):
    """A token that the model writes, made to end reports: some end, some reach the limit."""
    inputs = prompt_inputs(model, processor, studies[1])
    ids = model.generate(**inputs, max_new_tokens=4, do_sample=False)
    before = model.generation_config.eos_token_id
    model.generation_config.eos_token_id = [2, int(ids[0, -1])]
    yield
    model.generation_config.eos_token_id = before


@pytest.fixture(scope="module")
def generated(model, processor, studies, ended, tmp_path_factory):
    config = HarvestConfig(SITES, "all", "float32", studies_per_part=4)
    out = tmp_path_factory.mktemp("generated") / "acts"
    return harvest_generated(model, processor, studies[:9], config, out, Decoding(LIMIT, batch=3))


@torch.no_grad()
def test_each_token_once_as_if_teacher_forced(model, processor, studies, generated):
    worst = 0.0
    written = {one.study: one for one in read_generations(generated)}
    assert list(written) == [study.id for study in studies[:9]]
    assert len({one.finished for one in written.values()}) == 2
    for study in studies[:9]:
        inputs = prompt_inputs(model, processor, study)
        alone = model.generate(**inputs, max_new_tokens=LIMIT, do_sample=False)
        n = inputs["input_ids"].shape[1]
        one = written[study.id]
        own = alone[0, n:].tolist()
        assert one.token_ids == (own[:-1] if one.finished and len(own) <= LIMIT else own)
        ids = torch.cat([inputs["input_ids"][0], torch.tensor(one.token_ids)])[None]
        with capture(resolve_sites(model, SITES), stop=False) as run:
            want = run(model, input_ids=ids, pixel_values=inputs["pixel_values"])
        rows = np.flatnonzero(generated.column("study") == study.id)
        assert generated.column("position")[rows].tolist() == list(range(ids.shape[1]))
        assert generated.column("token_id")[rows].tolist() == ids[0].tolist()
        for site in SITES:
            got = generated.rows(site, int(rows[0]), int(rows[-1]) + 1)
            worst = max(worst, float((got - want[site][0]).abs().max()))
        logits = model(input_ids=ids, pixel_values=inputs["pixel_values"]).logits[0]
        scores = logits.log_softmax(-1)[n - 1 : -1].gather(1, ids[0, n:, None])[:, 0]
        np.testing.assert_allclose(one.logprobs, scores, atol=1e-4)
        loss = generated.column("loss")[rows]
        np.testing.assert_allclose(-loss[n:], scores, atol=1e-4)
        assert np.isnan(loss[:n]).all()
        roles = generated.column("role")[rows]
        assert set(roles[n:]) <= {"report", "grounding"}
        assert "report" not in roles[:n]
    assert worst < 1e-4


@torch.no_grad()
def test_the_same_text_teacher_forced_by_a_harvest(tmp_path):
    """On the phantom model, whose tokenizer gives back the tokens of what it wrote."""
    from phantom import write_studies
    from phantom.model import load

    model, processor = load()
    studies = write_studies(tmp_path / "studies", [3, 4, 5])
    config = HarvestConfig(("llm.3.resid_post",), "report", "float32")
    own = harvest_generated(model, processor, studies, config, tmp_path / "own", Decoding(120))
    written = list(read_generations(own))
    assert all(one.finished and len(one.token_ids) > 10 for one in written)
    given = [
        study.model_copy(update={"report": one.text})
        for study, one in zip(studies, written, strict=True)
    ]
    forced = harvest(model, processor, given, config, tmp_path / "forced")
    assert own.n_tokens == forced.n_tokens
    for name in ("token_id", "position", "role", "sentence"):
        assert own.column(name).tolist() == forced.column(name).tolist(), name
    torch.testing.assert_close(
        own.rows("llm.3.resid_post", 0, own.n_tokens),
        forced.rows("llm.3.resid_post", 0, own.n_tokens),
        atol=1e-4,
        rtol=1e-4,
    )


def test_an_estimate_counts_the_longest_reports(model, processor, studies, ended, tmp_path):
    config = HarvestConfig(SITES[:1], "report", "float32")
    decoding = Decoding(LIMIT)
    job = generation_job(model, processor, studies[:9], config, tmp_path / "a", decoding)
    left, folder = job.estimate(), job.run()
    assert folder is not None and left.tokens == 9 * LIMIT >= folder.n_tokens


def test_run_again_is_not_computed(model, processor, studies, generated, monkeypatch):
    monkeypatch.setattr(model, "generate", None)
    config = HarvestConfig(SITES, "all", "float32", studies_per_part=4)
    decoding = Decoding(LIMIT, batch=3)
    again = harvest_generated(model, processor, studies[:9], config, generated.folder, decoding)
    assert again.n_tokens == generated.n_tokens
    with pytest.raises(FolderError, match="holds another harvest: decoding"):
        harvest_generated(model, processor, studies[:9], config, generated.folder, Decoding(8))


def test_generations_are_in_the_manifest_with_their_text(generated, processor):
    names = [name for name in generated.manifest["files"] if name.startswith("generations")]
    assert names == [f"generations-0000{i}.jsonl" for i in range(3)]
    line = json.loads((generated.folder / names[0]).read_text().splitlines()[0])
    assert line["text"] == processor.tokenizer.decode(line["token_ids"]).strip()


def test_roles_and_sentences_of_generated_tokens(processor):
    text = "Lungs are clear.<obj>A nodule.<box><x1><y2><x3><y4></box></obj>"
    ids = processor.tokenizer(text, add_special_tokens=False)["input_ids"]
    tokens, decoded = report_tokens(processor, ids)
    assert decoded == text
    names = processor.tokenizer.convert_ids_to_tokens(ids)
    special = [name.startswith("<") for name in names]
    assert (tokens.role == Role.GROUNDING).tolist() == special
    assert tokens.sentence[0] == 0 and tokens.sentence.max() == 2
    assert len(report_tokens(processor, [])[0]) == 0


def test_what_cannot_be_generated_is_refused(model, processor, studies, activations, tmp_path):
    with pytest.raises(ConfigError, match="which no report changes"):
        config = HarvestConfig(("vision.0.mlp_out",), "patches")
        harvest_generated(model, processor, studies, config, tmp_path / "a")
    with pytest.raises(ConfigError, match="at least 1"):
        Decoding(max_new_tokens=0)
    with pytest.raises(FolderError, match="no generated reports"):
        next(read_generations(ActivationFolder(activations.folder)))
