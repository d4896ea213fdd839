"""Formats of other libraries: known answers, round trips, damage, and hostile files.

Files of the libraries themselves are in tests/interop.
"""

import json
import pickle
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file

from hooks.files import ConfigError, FolderError, FormatError, MairaSaeError, verify
from sae import MatryoshkaSAE, SAEConfig, convert
from sae.formats import WRITERS
from sae.formats.read import candidates

# One dictionary, worked by hand. x − b_dec = (2, 2), pre = (2.5, 3, 1); 2.5 is not above 2.5.
X = torch.tensor([[3.0, 1.0]])
W_ENC = torch.tensor([[1.0, 0.0, -1.0], [0.0, 2.0, 1.0]])  # [d, F]
B_ENC = torch.tensor([0.5, -1.0, 1.0])
B_ENC_UNSUBTRACTED = torch.tensor([-0.5, 1.0, 3.0])  # the same function of x instead of x − b_dec
W_DEC = torch.tensor([[1.0, 0.0], [0.6, 0.8], [0.0, 1.0]])  # [F, d]
B_DEC = torch.tensor([1.0, -1.0])
LATENTS = torch.tensor([[0.0, 3.0, 0.0]])
RECONSTRUCTION = torch.tensor([[2.8, 1.4]])

MATRICES = {"W_enc": W_ENC, "W_dec": W_DEC, "b_dec": B_DEC}
LINEAR = {
    "encoder.weight": W_ENC.T,
    "encoder.bias": B_ENC,
    "decoder.weight": W_DEC.T,
    "b_dec": B_DEC,
}
MATRYOSHKA = MATRICES | {
    "b_enc": B_ENC,
    "threshold": torch.tensor(2.5),
    "k": torch.tensor(1, dtype=torch.int),
    "group_sizes": torch.tensor([1, 2]),
}
JUMPRELU = MATRICES | {"b_enc": B_ENC, "threshold": torch.tensor([2.5, 2.0, 1.0])}


def write_pt(folder, state, config=None, name="ae.pt"):
    folder.mkdir(parents=True, exist_ok=True)
    torch.save(
        {n: t.clone() if isinstance(t, torch.Tensor) else t for n, t in state.items()},
        folder / name,
    )
    if config is not None:
        (folder / "config.json").write_text(json.dumps(config))
    return folder


def write_safetensors(folder, name, state, config):
    folder.mkdir(parents=True, exist_ok=True)
    save_file({n: t.contiguous().clone() for n, t in state.items()}, folder / name)
    (folder / "cfg.json").write_text(json.dumps(config))
    return folder


def trainer(dict_class, **more):
    return {"trainer": {"dict_class": dict_class, "k": 1, **more}}


def lens(**config):
    metadata = {"sae_lens_version": "6.54.12", "hook_name": "blocks.15.hook_resid_post"}
    return {"d_in": 2, "d_sae": 3, "dtype": "float32", "metadata": metadata} | config


def without(state, *names):
    return {name: value for name, value in state.items() if name not in names}


def write_npz(folder, **arrays):
    folder.mkdir(parents=True, exist_ok=True)
    np.savez(folder / "params.npz", **arrays)
    return folder


GEMMA = {n: t.numpy() for n, t in (JUMPRELU | {"b_enc": B_ENC_UNSUBTRACTED}).items()}
TOPK = {"architecture": "topk", "k": 1}
SPARSIFY = {"k": 1, "d_in": 2, "num_latents": 3}
SPARSIFY_STATE = without(LINEAR, "decoder.weight") | {"W_dec": W_DEC}
OLD_LENS = {"d_in": 2, "d_sae": 3, "hook_name": "blocks.15.hook_resid_post"}
OLD_TOPK = {"activation_fn_str": "topk", "activation_fn_kwargs": {"k": 1}}
WEIGHTS = "sae_weights.safetensors"

# name: (writer, k, group sizes, activation)
KNOWN = {
    "dl matryoshka": (
        lambda p: write_pt(p, MATRYOSHKA, trainer("MatryoshkaBatchTopKSAE")),
        (1, (1, 2), "threshold"),
    ),
    "dl batch topk": (
        lambda p: write_pt(
            p,
            LINEAR | {"k": torch.tensor(1), "threshold": torch.tensor(2.5)},
            trainer("BatchTopKSAE"),
        ),
        (1, (3,), "threshold"),
    ),
    "dl topk": (
        lambda p: write_pt(p, LINEAR, trainer("AutoEncoderTopK")),
        (1, (3,), "topk"),
    ),
    "dl jumprelu": (
        lambda p: write_pt(
            p,
            JUMPRELU | {"b_enc": B_ENC_UNSUBTRACTED},
            {"trainer": {"dict_class": "JumpReluAutoEncoder"}},
        ),
        (0, (3,), "threshold"),
    ),
    "lens jumprelu": (
        lambda p: write_safetensors(p, WEIGHTS, JUMPRELU, lens(architecture="jumprelu")),
        (0, (3,), "threshold"),
    ),
    "lens jumprelu without input bias": (
        lambda p: write_safetensors(
            p,
            WEIGHTS,
            JUMPRELU | {"b_enc": B_ENC_UNSUBTRACTED},
            lens(architecture="jumprelu", apply_b_dec_to_input=False),
        ),
        (0, (3,), "threshold"),
    ),
    "lens topk": (
        lambda p: write_safetensors(p, WEIGHTS, without(JUMPRELU, "threshold"), lens(**TOPK)),
        (1, (3,), "topk"),
    ),
    "lens topk before 6.0": (
        lambda p: write_safetensors(
            p, WEIGHTS, without(JUMPRELU, "threshold"), OLD_LENS | OLD_TOPK
        ),
        (1, (3,), "topk"),
    ),
    "lens topk rescaled": (  # the decoder twice as long, the encoder half as strong
        lambda p: write_safetensors(
            p,
            WEIGHTS,
            {"W_enc": W_ENC / 2, "b_enc": B_ENC / 2, "W_dec": W_DEC * 2, "b_dec": B_DEC},
            lens(**TOPK, rescale_acts_by_decoder_norm=True),
        ),
        (1, (3,), "topk"),
    ),
    "lens checkpoint": (
        lambda p: write_safetensors(
            p,
            WEIGHTS,
            without(JUMPRELU, "threshold") | {"topk_threshold": torch.tensor(2.5).double()},
            lens(architecture="matryoshka_batchtopk", k=1.0, matryoshka_widths=[1, 3]),
        ),
        (1, (1, 2), "threshold"),
    ),
    "sparsify": (
        lambda p: write_safetensors(p, "sae.safetensors", SPARSIFY_STATE, SPARSIFY),
        (1, (3,), "topk"),
    ),
    "gemma scope": (lambda p: write_npz(p, **GEMMA), (0, (3,), "threshold")),
    "unknown, wrapped": (
        lambda p: write_pt(
            p, {"state_dict": {f"module.{n}": t for n, t in MATRYOSHKA.items()}}, name="x.pth"
        ),
        (1, (1, 2), "threshold"),
    ),
    "unknown, with a configuration": (
        lambda p: write_pt(
            p, LINEAR, {"sae": {"architecture": "topk", "k": 1, "lm_name": "m"}}, "weights.bin"
        ),
        (1, (3,), "topk"),
    ),
    "unknown, no b_dec at the input": (
        lambda p: write_pt(
            p, JUMPRELU | {"b_enc": B_ENC_UNSUBTRACTED}, {"apply_b_dec_to_input": False}, "a.pt"
        ),
        (0, (3,), "threshold"),
    ),
}


@pytest.mark.parametrize("case", KNOWN)
def test_known_answers(case, tmp_path):
    write, (k, groups, activation) = KNOWN[case]
    sae = MatryoshkaSAE.from_pretrained(write(tmp_path / "sae"))
    torch.testing.assert_close(sae.encode(X), LATENTS)
    torch.testing.assert_close(sae(X), RECONSTRUCTION)
    torch.testing.assert_close(sae.encode_some(X, [1, 0]), LATENTS[:, [1, 0]])
    assert (sae.config.k, sae.config.group_sizes, sae.config.activation) == (k, groups, activation)
    assert "lens" not in case or sae.config.site == "llm.15.resid_post"
    assert sae.config.origin["file"] and sae.config.origin["folded"]
    assert [p.requires_grad for p in sae.parameters()] == [True] * 4
    sae.save(tmp_path / "ours", {})  # and what was read can be kept
    again = MatryoshkaSAE.from_pretrained(tmp_path / "ours")
    assert again.config == sae.config
    assert torch.equal(again.encode(X), sae.encode(X))


def test_a_file_names_its_folder(tmp_path):
    """The path of a weight file reads as its folder does; dictionary_learning's steps as well."""
    for case, name in (
        ("dl topk", "ae.pt"),
        ("sparsify", "sae.safetensors"),
        ("gemma scope", "params.npz"),
    ):
        folder = KNOWN[case][0](tmp_path / case)
        assert torch.equal(MatryoshkaSAE.from_pretrained(folder / name).encode(X), LATENTS)
    folder = KNOWN["dl topk"][0](tmp_path / "steps")
    write_pt(folder / "checkpoints", LINEAR, name="ae_100.pt")
    assert MatryoshkaSAE.from_pretrained(folder / "checkpoints/ae_100.pt").config.k == 1
    assert MatryoshkaSAE.from_pretrained(folder).config.k == 1


@pytest.mark.parametrize(
    ("case", "latent_scale"),
    [
        ("dl matryoshka", 0.5),
        ("dl topk", 0.5),
        ("sparsify", 0.5),
        ("lens topk", 1),
        ("gemma scope", 0.5),
    ],
)
def test_norm_scale_is_folded_as_the_library_does(case, latent_scale, tmp_path):
    """With weights for x · 2: raw units in dictionary_learning's way, scaled ones in SAELens'."""
    sae = MatryoshkaSAE.from_pretrained(KNOWN[case][0](tmp_path / "sae"), norm_scale=2)
    torch.testing.assert_close(sae.encode(X / 2), LATENTS * latent_scale)
    torch.testing.assert_close(sae(X / 2), RECONSTRUCTION / 2)
    assert sae.config.norm_scale == 2
    assert sae.config.origin["folded"] == ("matrices" if "lens" in case else "biases")


def test_saelens_scale_that_is_not_in_the_files(tmp_path):
    config = lens(architecture="jumprelu", normalize_activations="expected_average_only_in")
    folder = write_safetensors(tmp_path / "a", WEIGHTS, JUMPRELU, config)
    with pytest.raises(FormatError, match=r"not the scale; give norm_scale \(sqrt"):
        MatryoshkaSAE.from_pretrained(folder)
    sae = MatryoshkaSAE.from_pretrained(folder, norm_scale=2)
    torch.testing.assert_close(sae.encode(X / 2), LATENTS)
    torch.testing.assert_close(sae(X / 2), RECONSTRUCTION / 2)
    config["normalize_activations"] = "layer_norm"
    folder = write_safetensors(tmp_path / "b", WEIGHTS, JUMPRELU, config)
    with pytest.raises(FormatError, match="'layer_norm', which differs from token to token"):
        MatryoshkaSAE.from_pretrained(folder, norm_scale=2)


def test_backup_of_dictionary_learning_is_unscaled(tmp_path):
    """It holds {step, ae, optimizer, config, norm_factor}; x / norm_factor went into training."""
    backup = {"step": 7, "ae": MATRYOSHKA, "optimizer": {"state": {}}, "norm_factor": 0.5}
    config = trainer("MatryoshkaBatchTopKSAE")
    sae = MatryoshkaSAE.from_pretrained(write_pt(tmp_path / "a", backup, config))
    torch.testing.assert_close(sae.encode(X / 2), LATENTS / 2)
    torch.testing.assert_close(sae(X / 2), RECONSTRUCTION / 2)
    assert sae.config.norm_scale == 2
    with pytest.raises(FormatError, match="says norm_scale itself"):
        MatryoshkaSAE.from_pretrained(tmp_path / "a", norm_scale=2)
    folder = write_pt(tmp_path / "b", without(backup, "norm_factor"), config)
    with pytest.raises(FormatError, match="without a norm_factor; give norm_scale"):
        MatryoshkaSAE.from_pretrained(folder)
    sae = MatryoshkaSAE.from_pretrained(folder, norm_scale=2)
    torch.testing.assert_close(sae(X / 2), RECONSTRUCTION / 2)


def test_unset_threshold_of_dictionary_learning(tmp_path):
    state = MATRYOSHKA | {"threshold": torch.tensor(-1.0)}
    folder = write_pt(tmp_path / "sae", state, trainer("MatryoshkaBatchTopKSAE"))
    sae = MatryoshkaSAE.from_pretrained(folder)
    torch.testing.assert_close(sae.encode(X), torch.tensor([[2.5, 3.0, 1.0]]))
    assert "never set" in sae.config.origin["folded"] and sae.threshold == 0
    sae = MatryoshkaSAE.from_pretrained(folder, threshold=2.5)
    torch.testing.assert_close(sae.encode(X), LATENTS)


def random_sae(d, f, k, groups, activation, per_latent, seed=0, dtype=torch.float32):
    config = SAEConfig(
        *(d, f, k, groups),
        site="llm.15.resid_post",
        policy="published",
        norm_scale=0.25,
        model={"id": "a-model", "revision": "abc"},
        activation=activation,
    )
    sae = MatryoshkaSAE(config, seed=seed, dtype=dtype)
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in sae.parameters():
            parameter.copy_(torch.randn(parameter.shape, generator=generator, dtype=dtype))
    sae.threshold = torch.rand((f,) if per_latent else (), generator=generator, dtype=dtype)
    return sae


WRITABLE = [
    (to, activation, per_latent)
    for to in WRITERS
    for activation, per_latent in (("threshold", False), ("threshold", True), ("topk", False))
    if (to, activation) != ("sparsify", "threshold")
]


@pytest.mark.parametrize(("to", "activation", "per_latent"), WRITABLE)
def test_round_trip(to, activation, per_latent, tmp_path):
    sae = random_sae(7, 20, 3, (4, 6, 10), activation, per_latent)
    written = convert(sae, tmp_path / to, to=to)
    assert written is sae
    again = MatryoshkaSAE.from_pretrained(tmp_path / to)
    x = torch.randn(50, 7, generator=torch.Generator().manual_seed(1))
    assert 0.05 < (sae.encode(x) > 0).float().mean() < 0.95
    torch.testing.assert_close(again.encode(x), sae.encode(x), atol=1e-6, rtol=1e-6)
    torch.testing.assert_close(again(x), sae(x), atol=1e-6, rtol=1e-6)
    assert again.config == sae.config
    if to == "maira_sae":
        assert verify(tmp_path / to) == 3


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64])
@pytest.mark.parametrize(("to", "activation", "per_latent"), WRITABLE)
def test_dtype_is_kept(to, activation, per_latent, dtype, tmp_path):
    sae = random_sae(7, 20, 3, (4, 6, 10), activation, per_latent, dtype=dtype)
    convert(sae, tmp_path / "sae", to=to)
    again = MatryoshkaSAE.from_pretrained(tmp_path / "sae").state_dict()
    for name, value in sae.state_dict().items():
        assert again[name].dtype == dtype
        if activation == "threshold" or name != "threshold":  # unused by top-k, not always kept
            torch.testing.assert_close(again[name], value, rtol=0, atol=1e-14)


@settings(
    max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture]
)
@given(data=st.data(), way=st.sampled_from(WRITABLE))
def test_round_trip_of_any_shape(tmp_path_factory, data, way):
    to, activation, per_latent = way
    d, f = data.draw(st.integers(1, 9)), data.draw(st.integers(1, 20))
    cuts = sorted(data.draw(st.sets(st.integers(1, f - 1), max_size=3)) if f > 1 else ())
    groups = tuple(b - a for a, b in zip([0, *cuts], [*cuts, f], strict=True))
    k = data.draw(st.integers(1, f))
    dtype = torch.float64  # no pre-activation comes to lie on the threshold's other side
    sae = random_sae(d, f, k, groups, activation, per_latent, dtype=dtype)
    folder = tmp_path_factory.mktemp("any") / "sae"
    convert(sae, folder, to=to)
    again = MatryoshkaSAE.from_pretrained(folder)
    x = torch.randn(20, d, generator=torch.Generator().manual_seed(1), dtype=dtype)
    torch.testing.assert_close(again.encode(x), sae.encode(x), atol=1e-6, rtol=1e-6)
    torch.testing.assert_close(again(x), sae(x), atol=1e-6, rtol=1e-6)
    assert again.config == sae.config


@settings(max_examples=40, deadline=None)
@given(st.integers(1, 8), st.integers(1, 8), st.booleans(), st.booleans(), st.integers(0, 99))
def test_unknown_layouts_of_any_orientation(tmp_path_factory, d, f, turn_enc, turn_dec, seed):
    """Biases say which side of a matrix is which, unless both are equally long."""
    sae = random_sae(d, f, 1, (f,), "threshold", False, seed, torch.float64)
    folder = tmp_path_factory.mktemp("any") / "sae"
    convert(sae, folder / "dl", to="dictionary_learning")
    state = torch.load(folder / "dl/ae.pt", weights_only=True)
    square = d == f
    state["W_enc"] = state["W_enc"].T if turn_enc and not square else state["W_enc"]
    state["W_dec"] = state["W_dec"].T if turn_dec and not square else state["W_dec"]
    again = MatryoshkaSAE.from_pretrained(write_pt(folder / "x", state, name="x.pt"))
    x = torch.randn(20, d, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    torch.testing.assert_close(again.encode(x), sae.encode(x))


def test_square_linear_layers_are_read_by_their_names(tmp_path):
    sae = random_sae(5, 5, 2, (5,), "topk", False)
    convert(sae, tmp_path / "dl", to="dictionary_learning")
    state = torch.load(tmp_path / "dl/ae.pt", weights_only=True)
    folder = write_pt(tmp_path / "x", without(state, "threshold"), name="x.pt")
    again = MatryoshkaSAE.from_pretrained(folder, activation="topk")
    x = torch.randn(20, 5, generator=torch.Generator().manual_seed(1))
    torch.testing.assert_close(again(x), sae(x))


def test_what_we_pickle_is_plain(tmp_path):
    convert(random_sae(3, 8, 2, (8,), "threshold", False), tmp_path / "a", to="dictionary_learning")
    state = torch.load(tmp_path / "a/ae.pt", weights_only=True)
    assert {type(value) for value in state.values()} == {torch.Tensor}
    assert state["k"].dtype == torch.int and state["W_enc"].shape == (3, 8)
    size = sum(value.numel() * value.element_size() for value in state.values())
    assert (tmp_path / "a/ae.pt").stat().st_size < size + 10_000  # no view dragged a storage along


def test_convert_again_and_onto_something_else(tmp_path):
    sae = random_sae(3, 8, 2, (8,), "threshold", False)
    for to in ("dictionary_learning", "sae_lens", "maira_sae"):
        convert(sae, tmp_path / to, to=to)
        before = {p: p.read_bytes() for p in (tmp_path / to).iterdir()}
        convert(sae, tmp_path / to, to=to)
        assert {p: p.read_bytes() for p in (tmp_path / to).iterdir()} == before
        with pytest.raises(FolderError, match="exists and holds something else"):
            convert(random_sae(3, 8, 2, (8,), "threshold", False, seed=5), tmp_path / to, to=to)
    with pytest.raises(FormatError, match=r"sparsify selects the k largest.*activation='topk'"):
        convert(sae, tmp_path / "sparsify", to="sparsify")
    with pytest.raises(FormatError, match=r"no format 'saelens' .did you mean 'sae_lens'"):
        convert(sae, tmp_path / "x", to="saelens")
    assert sorted(p.name for p in tmp_path.iterdir()) == [
        "dictionary_learning",
        "maira_sae",
        "sae_lens",
    ]


def test_selecting_otherwise_is_said_aloud(tmp_path):
    sae = random_sae(6, 20, 4, (20,), "threshold", False)
    convert(sae, tmp_path / "s", to="sparsify", activation="topk")
    again = MatryoshkaSAE.from_pretrained(tmp_path / "s")
    x = torch.randn(50, 6, generator=torch.Generator().manual_seed(1))
    assert again.config.activation == "topk" and (again.encode(x) > 0).sum(dim=1).max() == 4
    convert(tmp_path / "s", tmp_path / "t", to="sae_lens", activation="threshold", threshold=0.5)
    back = MatryoshkaSAE.from_pretrained(tmp_path / "t")
    sae.threshold.fill_(0.5)
    torch.testing.assert_close(back(x), sae(x))


def test_given_facts(tmp_path):
    folder = KNOWN["gemma scope"][0](tmp_path / "sae")
    sae = MatryoshkaSAE.from_pretrained(
        folder, k=2, group_sizes=(1, 2), site="llm.3.resid_post", policy="report"
    )
    config = sae.config
    assert (config.k, config.group_sizes, config.site) == (2, (1, 2), "llm.3.resid_post")
    with pytest.raises(FormatError, match="threshold itself; leave threshold out"):
        MatryoshkaSAE.from_pretrained(folder, threshold=0.5)
    with pytest.raises(FormatError, match=r"group sizes \(1, 1\) sum to 2"):
        MatryoshkaSAE.from_pretrained(folder, group_sizes=(1, 1))
    with pytest.raises(FormatError, match="says k 1, asked was 2"):
        MatryoshkaSAE.from_pretrained(KNOWN["dl topk"][0](tmp_path / "b"), k=2)
    with pytest.raises(ConfigError, match="did you mean 'norm_scale'"):
        MatryoshkaSAE.from_pretrained(folder, norm_scal=2)
    with pytest.raises(FormatError, match="must be positive"):
        MatryoshkaSAE.from_pretrained(folder, norm_scale=0)
    convert(folder, tmp_path / "own", to="maira_sae")
    own = MatryoshkaSAE.from_pretrained(tmp_path / "own", site="llm.9.resid_post")
    assert own.config.site == "llm.9.resid_post"
    with pytest.raises(FormatError, match="says k itself"):
        MatryoshkaSAE.from_pretrained(tmp_path / "own", k=2)
    forced = MatryoshkaSAE.from_pretrained(KNOWN["dl topk"][0](tmp_path / "c"), format="inspected")
    assert forced.config.origin["format"] == "inspected"


BAD = {
    "nothing": (lambda p: p.mkdir(), "found nothing; looked for manifest.json"),
    "only a readme": (lambda p: (p.mkdir(), (p / "README.md").touch()), "found README.md"),
    "no weights": (
        lambda p: (p.mkdir(), (p / "cfg.json").write_text("{}")),
        "found cfg.json; looked for",
    ),
    "two of them": (
        lambda p: [KNOWN["dl topk"][0](p / name) for name in "ab"],
        "holds 2 dictionaries: a/ae.pt, b/ae.pt; give the subfolder",
    ),
    "a missing tensor": (
        lambda p: write_pt(p, without(MATRYOSHKA, "W_dec"), trainer("MatryoshkaBatchTopKSAE")),
        r"lacks W_dec; it holds W_enc float32 \[2, 3\]; b_dec float32 \[2\]; b_enc",
    ),
    "the wrong class": (
        lambda p: write_pt(p, LINEAR, trainer("MatryoshkaBatchTopKSAE")),
        "lacks W_enc, b_enc, W_dec, threshold, group_sizes; it holds encoder.weight",
    ),
    "a class nobody reads": (
        lambda p: write_pt(p, LINEAR, trainer("GatedAutoEncoder")),
        "'GatedAutoEncoder'.*this library reads Matryoshka",
    ),
    "no class": (lambda p: write_pt(p, LINEAR, {"trainer": {}}), "dict_class None"),
    "two values of k": (
        lambda p: write_pt(p, MATRYOSHKA, trainer("MatryoshkaBatchTopKSAE", k=2)),
        "holds k 1, .*says 2; not from one run",
    ),
    "groups that do not fit": (
        lambda p: write_pt(
            p, MATRYOSHKA | {"group_sizes": torch.tensor([1, 1])}, trainer("MatryoshkaBatchTopKSAE")
        ),
        r"group sizes \(1, 1\) sum to 2",
    ),
    "shapes that do not fit": (
        lambda p: write_pt(p, MATRYOSHKA | {"b_enc": B_DEC}, trainer("MatryoshkaBatchTopKSAE")),
        "shapes do not fit one dictionary",
    ),
    "not a number": (
        lambda p: write_pt(
            p, MATRYOSHKA | {"b_dec": B_DEC / 0 * 0}, trainer("MatryoshkaBatchTopKSAE")
        ),
        "b_dec holds NaN",
    ),
    "whole-number weights": (
        lambda p: write_pt(
            p, MATRYOSHKA | {"W_dec": W_DEC.int()}, trainer("MatryoshkaBatchTopKSAE")
        ),
        "decoder is torch.int32",
    ),
    "a list instead of a state dict": (
        lambda p: (p.mkdir(), torch.save([W_DEC], p / "ae.pt")),
        "holds a list, not a state dict",
    ),
    "gated SAELens": (
        lambda p: write_safetensors(p, WEIGHTS, JUMPRELU, lens(architecture="gated")),
        "'gated'.*this library reads standard",
    ),
    "SAELens with attention heads": (
        lambda p: write_safetensors(
            p, WEIGHTS, JUMPRELU, lens(architecture="jumprelu", reshape_activations="hook_z")
        ),
        "reshapes attention heads",
    ),
    "SAELens with tanh": (
        lambda p: write_safetensors(
            p, WEIGHTS, JUMPRELU, OLD_LENS | {"activation_fn_str": "tanh-relu"}
        ),
        "activation function 'tanh-relu'",
    ),
    "SAELens fine-tuned": (
        lambda p: write_safetensors(
            p, WEIGHTS, JUMPRELU | {"scaling_factor": B_ENC}, lens(architecture="jumprelu")
        ),
        "fine-tuned scaling factor",
    ),
    "a transcoder": (
        lambda p: write_safetensors(
            p, "sae.safetensors", SPARSIFY_STATE, SPARSIFY | {"transcode": True}
        ),
        "says transcode",
    ),
    "sparsify's groupmax": (
        lambda p: write_safetensors(
            p, "sae.safetensors", SPARSIFY_STATE, SPARSIFY | {"activation": "groupmax"}
        ),
        "'groupmax'; this library reads topk",
    ),
    "sparsify without k": (
        lambda p: write_safetensors(p, "sae.safetensors", SPARSIFY_STATE, {"d_in": 2}),
        "lacks k; give k",
    ),
    "k above the dictionary": (
        lambda p: write_safetensors(p, "sae.safetensors", SPARSIFY_STATE, SPARSIFY | {"k": 4}),
        "k is 4; it must lie in 1–3",
    ),
    "another width": (
        lambda p: write_safetensors(p, "sae.safetensors", SPARSIFY_STATE, SPARSIFY | {"d_in": 5}),
        "says d_in 5",
    ),
    "gemma without threshold": (
        lambda p: write_npz(p, **without(GEMMA, "threshold")),
        "lacks threshold; it holds W_enc",
    ),
    "unknown names": (
        lambda p: write_pt(p, {"foo": W_ENC, "bar.b_enc": B_ENC}, name="x.pt"),
        r"no tensor for encoder, decoder, b_dec \(known names: .*foo float32 \[2, 3\]",
    ),
    "two encoders": (
        lambda p: write_pt(p, JUMPRELU | {"second.W_enc": W_ENC}, name="x.pt"),
        "2 tensors could be the encoder: W_enc, second.W_enc",
    ),
    "no way of selecting": (
        lambda p: write_pt(p, LINEAR, name="x.pt"),
        "give activation .threshold or topk.; it holds encoder.weight",
    ),
    "unknown without threshold": (
        lambda p: write_pt(p, LINEAR, {"architecture": "batchtopk"}, name="x.pt"),
        "no threshold; give threshold",
    ),
    "unknown and normalised": (
        lambda p: write_pt(p, JUMPRELU, {"normalize_activations": True}, name="x.pt"),
        "normalize_activations True; give norm_scale",
    ),
    "normalised token by token": (
        lambda p: write_pt(p, JUMPRELU, {"input_unit_norm": True}, name="x.pt"),
        "normalised token by token",
    ),
    "an unknown backup": (
        lambda p: write_pt(p, {"ae": MATRYOSHKA, "norm_factor": 4.0}, name="x.pt"),
        "norm_factor is 4.0; give norm_scale",
    ),
    "a configuration that contradicts itself": (
        lambda p: write_pt(p, LINEAR, {"a": {"k": 1}, "b": {"k": 2}}, name="x.pt"),
        r"says k \[1, 2\]",
    ),
}


@pytest.mark.parametrize("case", BAD)
def test_refusals_say_what_was_found(case, tmp_path):
    write, message = BAD[case]
    write(tmp_path / "sae")
    with pytest.raises(FormatError, match=message) as caught:
        MatryoshkaSAE.from_pretrained(tmp_path / "sae")
    assert "\n" not in str(caught.value)


class Hostile:
    """Unpickling it makes a folder."""

    def __init__(self, target):
        self.target = target

    def __reduce__(self):
        return (Path.mkdir, (self.target,))


@pytest.mark.parametrize("name", ["ae.pt", "model.bin", "raw.pth", "params.npz"])
def test_a_hostile_pickle_does_not_run(name, tmp_path):
    target, folder = tmp_path / "taken", tmp_path / "sae"
    folder.mkdir()
    (folder / "config.json").write_text(json.dumps(trainer("MatryoshkaBatchTopKSAE")))
    if name == "params.npz":
        np.savez(folder / name, W_enc=np.array([Hostile(target)], dtype=object))
    elif name == "raw.pth":
        (folder / name).write_bytes(pickle.dumps(Hostile(target)))
    else:
        torch.save(MATRYOSHKA | {"extra": Hostile(target)}, folder / name)
    with pytest.raises(FormatError, match=r"is refused|not a plain npz"):
        MatryoshkaSAE.from_pretrained(folder)
    assert not target.exists()
    if name == "raw.pth":  # the same bytes do run when they are trusted: the test can fail
        pickle.loads((folder / name).read_bytes())
        assert target.is_dir()


FUZZED = ["dl matryoshka", "lens topk rescaled", "lens checkpoint", "sparsify", "gemma scope"]


@settings(max_examples=150, deadline=None)
@given(st.sampled_from(FUZZED), st.data())
def test_damaged_bytes_never_raise_anything_else(tmp_path_factory, case, data):
    folder = KNOWN[case][0](tmp_path_factory.mktemp("fuzz") / "sae")
    files = sorted(folder.iterdir())
    path = data.draw(st.sampled_from(files))
    content = bytearray(path.read_bytes())
    if data.draw(st.booleans()):
        content = content[: data.draw(st.integers(0, len(content) - 1))]
    else:
        content[data.draw(st.integers(0, len(content) - 1))] ^= data.draw(st.integers(1, 255))
    path.write_bytes(content)
    try:
        sae = MatryoshkaSAE.from_pretrained(folder)
    except FormatError as error:
        assert "\n" not in str(error)
    else:
        assert torch.isfinite(sae(X)).all() or sae(X).shape == X.shape


VALUES = st.one_of(
    st.none(),
    st.booleans(),
    st.integers(-3, 9),
    st.floats(allow_nan=False),
    st.text(max_size=3),
    st.lists(st.integers(-1, 3), max_size=3),
    st.dictionaries(st.text(max_size=2), st.integers(), max_size=2),
)


@settings(max_examples=150, deadline=None)
@given(st.sampled_from(["dictionary_learning", "sae_lens", "sparsify"]), st.data())
def test_odd_configurations_never_raise_anything_else(tmp_path_factory, to, data):
    folder = tmp_path_factory.mktemp("fuzz") / "sae"
    convert(random_sae(3, 8, 2, (3, 5), "topk", False), folder, to=to)
    path = folder / ("config.json" if to == "dictionary_learning" else "cfg.json")
    config = json.loads(path.read_text())
    place = config
    while True:
        key = data.draw(st.sampled_from(sorted(place)))
        if not isinstance(place[key], dict) or not place[key] or data.draw(st.booleans()):
            break
        place = place[key]
    place[key] = data.draw(VALUES)
    path.write_text(json.dumps(config))
    try:
        MatryoshkaSAE.from_pretrained(folder)
    except FormatError as error:
        assert "\n" not in str(error)


def test_unfinished_folder_of_ours(tmp_path):
    sae = random_sae(3, 8, 2, (8,), "threshold", False)
    sae.save(tmp_path / "a", {})
    (tmp_path / "a/manifest.json").unlink()
    (tmp_path / "a/train.json").write_text("{}")
    with pytest.raises(FolderError, match=r"no manifest\.json, so it is unfinished"):
        MatryoshkaSAE.from_pretrained(tmp_path / "a")
    sae.save(tmp_path / "b", {})
    (tmp_path / "b/sae.safetensors").unlink()
    with pytest.raises(FolderError, match=r"sae\.safetensors is missing"):
        MatryoshkaSAE.from_pretrained(tmp_path / "b")
    with pytest.raises(FolderError, match="no folder"):
        MatryoshkaSAE.from_pretrained(tmp_path / "none")


def test_names_tell_the_format():
    def formats(*names):
        return [(one.format, str(one.weights)) for one in candidates(names)]

    assert formats("a/ae.pt", "a/config.json", "a/checkpoints/ae_1.pt") == [
        ("dictionary_learning", "a/ae.pt")
    ]
    assert formats("cfg.json", "sae_weights.safetensors", "sparsity.safetensors") == [
        ("sae_lens", "sae_weights.safetensors")
    ]
    many = [f"layer_{i}/width_16k/average_l0_{j}/params.npz" for i in (1, 2) for j in (3, 4)]
    assert len(formats(*many, "README.md")) == 4
    assert formats("manifest.json", "sae.safetensors")[0][0] == "maira_sae"


def test_from_the_hub(tmp_path, monkeypatch):
    """Only the chosen dictionary is downloaded, at the revision that was asked for."""
    import huggingface_hub

    repo = tmp_path / "repo"
    for factor in ("ef2", "ef4"):
        KNOWN["dl matryoshka"][0](repo / factor)
    (repo / "README.md").touch()
    calls = []

    def list_repo_files(self, name, revision=None):
        assert (name, revision) == ("someone/saes", "v1")
        return [str(p.relative_to(repo)) for p in repo.rglob("*") if p.is_file()]

    def snapshot_download(name, revision=None, allow_patterns=None):
        calls.append((name, revision, allow_patterns))
        for pattern in allow_patterns:
            target = tmp_path / "cache" / pattern
            target.parent.mkdir(parents=True, exist_ok=True)
            shutil.copy(repo / pattern, target)
        return str(tmp_path / "cache")

    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(huggingface_hub.HfApi, "list_repo_files", list_repo_files)
    monkeypatch.setattr(huggingface_hub, "snapshot_download", snapshot_download)
    with pytest.raises(FormatError, match=r"someone/saes holds 2 dictionaries: ef2/ae\.pt, ef4"):
        MatryoshkaSAE.from_pretrained("someone/saes", revision="v1")
    sae = MatryoshkaSAE.from_pretrained("someone/saes", revision="v1", subfolder="ef4")
    torch.testing.assert_close(sae.encode(X), LATENTS)
    assert calls == [("someone/saes", "v1", ["ef4/ae.pt", "ef4/config.json"])]


def test_a_hub_that_does_not_answer(monkeypatch):
    import huggingface_hub

    def list_repo_files(self, name, revision=None):
        raise huggingface_hub.errors.OfflineModeIsEnabled("offline\nand so on")

    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(huggingface_hub.HfApi, "list_repo_files", list_repo_files)
    with pytest.raises(FolderError, match=r"no/such is no folder here.*\(offline\)") as caught:
        MatryoshkaSAE.from_pretrained("no/such")
    assert isinstance(caught.value, MairaSaeError)


def test_own_weights_stay_safetensors(tmp_path):
    """A folder of ours written from a pickle holds none."""
    convert(KNOWN["dl matryoshka"][0](tmp_path / "a"), tmp_path / "b", to="maira_sae")
    assert sorted(p.suffix for p in (tmp_path / "b").iterdir()) == [".json"] * 3 + [".safetensors"]
    assert load_file(tmp_path / "b/sae.safetensors")["threshold"] == 2.5
