"""What is written is what delphi's loader takes apart again, read here as its loader reads it."""

import json

import numpy as np
import pytest
import torch
from safetensors.numpy import load_file

from autointerp.delphi import DelphiConfig, write_delphi_cache
from hooks.files import ConfigError, FolderError
from sae.model import MatryoshkaSAE, SAEConfig

SITE = "llm.1.resid_post"
CONTEXT = 16
CONFIG = DelphiConfig(CONTEXT, n_splits=3, tokenizer="tok")


@pytest.fixture(scope="module")
def sae():
    sae = MatryoshkaSAE(SAEConfig(32, 64, 4, (64,), site=SITE, policy="published"), seed=3)
    sae.threshold.fill_(0.5)
    return sae.eval()


@pytest.fixture(scope="module")
def cache(sae, activations, tmp_path_factory):
    out = tmp_path_factory.mktemp("delphi") / "latents"
    return write_delphi_cache(sae, activations, out, CONFIG, include_text=True, batch=100)


def read(module):
    """Splits in order, latents counted from 0 again; the tokens, which every split has."""
    found, tokens = [], None
    files = sorted(module.glob("*.safetensors"), key=lambda path: int(path.stem.split("_")[0]))
    after = 0
    for path in files:
        first, last = map(int, path.stem.split("_"))
        assert first == after
        after = last + 1
        split = load_file(path)
        assert split["locations"].dtype == np.uint16
        assert split["activations"].dtype == np.float16 and split["tokens"].dtype == np.int64
        where = split["locations"].astype(np.int64)
        assert (where[:, 2] <= last - first).all()
        where[:, 2] += first
        found.append((where, split["activations"]))
        assert tokens is None or np.array_equal(tokens, split["tokens"])
        tokens = split["tokens"]
    assert after == 64
    return np.concatenate([w for w, _ in found]), np.concatenate([a for _, a in found]), tokens


@torch.no_grad()
def test_every_activation_is_at_its_token(cache, sae, activations):
    where, values, tokens = read(cache / "layers.1")
    rows = [json.loads(line) for line in (cache / "layers.1/rows.jsonl").read_text().splitlines()]
    assert len(rows) == len(tokens) and tokens.shape[1] == CONTEXT
    z = sae.encode(activations.rows(SITE, 0, activations.n_tokens).float()).numpy()
    ids, studies = activations.column("token_id"), activations.column("study")
    dense = np.zeros((len(tokens), CONTEXT, 64), dtype=np.float16)
    dense[tuple(where.T)] = values
    assert len(values) == (z > 1e-5).sum() > 0
    covered = 0
    for i, one in enumerate(rows):
        after = rows[i + 1]["folder_row"] if i + 1 < len(rows) else activations.n_tokens
        own = slice(one["folder_row"], after)
        n = after - one["folder_row"]
        assert set(studies[own]) == {one["study"]}
        assert tokens[i, :n].tolist() == ids[own].tolist() and not tokens[i, n:].any()
        np.testing.assert_array_equal(dense[i, :n], z[own].astype(np.float16))
        assert not dense[i, n:].any()
        covered += n
    assert covered == activations.n_tokens
    assert len(rows) > activations.manifest["n_studies"]  # some studies take several rows


def test_settings_are_those_delphi_reads(cache):
    settings = json.loads((cache / "layers.1/config.json").read_text())
    assert settings["model_name"] == "tok" and settings["cache_ctx_len"] == CONTEXT
    assert [path.name for path in cache.iterdir()] == ["layers.1"]  # delphi takes all for modules


def test_the_same_again_is_kept_and_another_refused(cache, sae, activations):
    before = (cache / "layers.1/config.json").stat().st_mtime_ns
    write_delphi_cache(sae, activations, cache, CONFIG, include_text=True, batch=100)
    assert (cache / "layers.1/config.json").stat().st_mtime_ns == before
    with pytest.raises(FolderError, match="holds something else"):
        write_delphi_cache(sae, activations, cache, DelphiConfig(32), include_text=True)


def test_what_cannot_be_written_is_refused(sae, activations, tmp_path):
    with pytest.raises(ConfigError, match="include_text=True"):
        write_delphi_cache(sae, activations, tmp_path / "a", CONFIG)
    with pytest.raises(ConfigError, match="cannot be split over 65"):
        config = DelphiConfig(n_splits=65)
        write_delphi_cache(sae, activations, tmp_path / "a", config, include_text=True)
    loud = MatryoshkaSAE(sae.config, seed=3)
    with torch.no_grad():
        loud.b_enc.add_(1e6)
    with pytest.raises(ConfigError, match="float16"):
        write_delphi_cache(loud, activations, tmp_path / "a", CONFIG, include_text=True)
    assert not list(tmp_path.iterdir())


@torch.no_grad()
def test_a_silent_dictionary_makes_an_empty_cache(sae, activations, tmp_path):
    silent = MatryoshkaSAE(sae.config, seed=3)
    silent.threshold.fill_(1e9)
    write_delphi_cache(silent, activations, tmp_path / "a", CONFIG, include_text=True)
    where, values, _ = read(tmp_path / "a/layers.1")
    assert where.shape == (0, 3) and len(values) == 0
