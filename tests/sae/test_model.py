import json

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from hooks.files import ConfigError, FolderError
from sae.model import (
    MatryoshkaSAE,
    SAEConfig,
    geometric_median,
    group_sizes_of,
)


def make(d=6, f=20, k=3, groups=(4, 6, 10), seed=0, dtype=torch.float64):
    sae = MatryoshkaSAE(SAEConfig(d, f, k, groups), seed=seed, dtype=dtype)
    generator = torch.Generator().manual_seed(seed + 1)
    with torch.no_grad():
        sae.b_enc.copy_(0.1 * torch.randn(f, generator=generator))
        sae.b_dec.copy_(torch.randn(d, generator=generator))
    return sae


def test_inference_threshold_is_strict():
    sae = make()
    x = torch.randn(5, 6, dtype=torch.float64)
    pre = sae.pre_activations(x).detach()
    sae.threshold.fill_(float(pre.flatten().sort().values[-4]))
    z = sae.encode(x)
    assert (z > 0).sum() == 3
    assert torch.equal(z[z > 0], pre[pre > sae.threshold])


def test_encoder_and_decoder_are_the_definition():
    sae = make()
    x = torch.randn(4, 6, dtype=torch.float64)
    z = torch.clamp((x - sae.b_dec) @ sae.W_enc + sae.b_enc, min=0)
    torch.testing.assert_close(sae.encode(x), z)
    prefixes = list(sae.decode_prefixes(z))
    for end, got in zip((4, 10, 20), prefixes, strict=True):
        torch.testing.assert_close(got, z[:, :end] @ sae.W_dec[:end] + sae.b_dec)
    torch.testing.assert_close(sae.decode(z), prefixes[-1])
    torch.testing.assert_close(sae.encode_some(x, [3, 17]), z[:, [3, 17]])
    torch.testing.assert_close(sae(x), sae.decode(sae.encode(x)))


def test_starts_with_unit_decoder_rows_and_their_transpose():
    sae = make()
    torch.testing.assert_close(sae.W_dec.norm(dim=1), torch.ones(20, dtype=torch.float64))
    assert torch.equal(sae.W_enc, sae.W_dec.T)


def test_encoder_and_decoder_never_share_storage():
    sae = MatryoshkaSAE(SAEConfig(1, 1, 1, (1,)), dtype=torch.float64)
    assert sae.W_enc.data_ptr() != sae.W_dec.data_ptr()


@pytest.mark.parametrize("activation", ["threshold", "topk"])
def test_selection_at_inference(activation):
    """One threshold a latent, or the k largest of each token; a few latents as all of them."""
    config = SAEConfig(6, 20, 3, (20,), activation=activation)
    sae = MatryoshkaSAE(config, seed=0, dtype=torch.float64)
    sae.threshold = torch.rand(20, generator=torch.Generator().manual_seed(3), dtype=torch.float64)
    x = 2 * torch.randn(2, 9, 6, generator=torch.Generator().manual_seed(4), dtype=torch.float64)
    pre, want = sae.pre_activations(x), torch.zeros(2, 9, 20, dtype=torch.float64)
    for i in range(2):
        for j in range(9):
            order = sorted(range(20), key=lambda f: -float(pre[i, j, f].detach()))
            for f in range(20):
                limit = sae.threshold[f]
                kept = f in order[:3] if activation == "topk" else bool(pre[i, j, f] > limit)
                want[i, j, f] = pre[i, j, f] if kept else 0
    assert torch.equal(sae.encode(x), want)
    torch.testing.assert_close(sae.encode_some(x, [19, 0, 7]), want[..., [19, 0, 7]])
    raw = sae.folded(4.0)
    torch.testing.assert_close(raw.encode(x / 4), want / 4)


def test_normalisation():
    sae = make()
    with torch.no_grad():
        sae.W_dec.mul_(3)
    sae.normalize_decoder()
    torch.testing.assert_close(sae.W_dec.norm(dim=1), torch.ones(20, dtype=torch.float64))


@given(st.floats(0.01, 100))
def test_folding_the_scale_keeps_the_function(scale):
    sae = make()
    sae.threshold.fill_(0.3)
    x = torch.randn(8, 6, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    raw = sae.folded(scale)
    torch.testing.assert_close(raw(x), sae(x * scale) / scale)
    torch.testing.assert_close(raw.encode(x), sae.encode(x * scale) / scale)
    assert torch.equal(raw.W_dec, sae.W_dec) and raw.config.norm_scale == scale


def test_geometric_median_known_answers():
    line = torch.tensor([[0.0], [1.0], [10.0]], dtype=torch.float64)
    assert float(geometric_median(line, 2000)) == pytest.approx(1, abs=1e-2)
    square = torch.tensor([[0, 0], [2, 0], [0, 2], [2, 2.0]], dtype=torch.float64)
    torch.testing.assert_close(geometric_median(square), torch.ones(2, dtype=torch.float64))
    outlier = torch.cat([torch.zeros(9, 3), torch.full((1, 3), 1e6)])
    assert geometric_median(outlier).abs().max() < 1  # the mean is at 1e5


def test_save_and_load(tmp_path):
    sae = make(dtype=torch.float32)
    sae.save(tmp_path / "sae", {"fvu": 0.1})
    again = MatryoshkaSAE.from_pretrained(tmp_path / "sae")
    assert again.config == sae.config
    for name, value in sae.state_dict().items():
        assert torch.equal(value, again.state_dict()[name])


def test_load_refuses_tensors_of_another_run(tmp_path):
    make(dtype=torch.float32).save(tmp_path / "a", {})
    make(f=40, groups=(20, 20), dtype=torch.float32).save(tmp_path / "b", {})
    weights, manifest = "sae.safetensors", tmp_path / "a" / "manifest.json"
    (tmp_path / "a" / weights).write_bytes((tmp_path / "b" / weights).read_bytes())
    with pytest.raises(FolderError, match=r"sae\.safetensors has \d+ bytes"):
        MatryoshkaSAE.from_pretrained(tmp_path / "a")
    record = json.loads(manifest.read_text())
    record["files"][weights]["bytes"] = (tmp_path / "a" / weights).stat().st_size
    manifest.write_text(json.dumps(record))
    with pytest.raises(FolderError, match="the two files are not from one run"):
        MatryoshkaSAE.from_pretrained(tmp_path / "a")


def test_config_checks():
    with pytest.raises(ConfigError, match="did you mean 'topk'"):
        SAEConfig(6, 20, 3, activation="top_k")
    with pytest.raises(ConfigError, match="k is 0; it must lie in 1"):
        SAEConfig(6, 20, 0, activation="topk")
    with pytest.raises(ConfigError, match="sum to 19; they must"):
        SAEConfig(6, 20, 3, (9, 10))
    with pytest.raises(ConfigError, match="k is 21"):
        SAEConfig(6, 20, 21)
    with pytest.raises(ConfigError, match="did you mean 'n_latents'"):
        SAEConfig.from_dict({"n_latent": 3})
    assert group_sizes_of(7, (0.5, 0.5)) == (3, 4)
    with pytest.raises(ConfigError, match="sum to 0"):
        group_sizes_of(7, (0.5, 0.3))
