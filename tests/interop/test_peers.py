"""Other libraries' own classes and loaders, in their own environment, against ours.

`make interop` builds `.venv-peers` and runs these; without it they skip.
"""

import json
import os
import subprocess
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from autointerp import delphi_results
from autointerp.scores import Said, Verdict
from sae import MatryoshkaSAE, SAEConfig, convert

ROOT = Path(__file__).parents[2]
PYTHON = Path(os.environ.get("PEERS_PYTHON", ROOT / ".venv-peers/bin/python"))
pytestmark = pytest.mark.skipif(  # where an interpreter is named, a missing one is a failure
    not PYTHON.is_file() and "PEERS_PYTHON" not in os.environ,
    reason=f"no peers' environment at {PYTHON}; `make interop` builds it",
)
D, F, K, GROUPS, SCALE = 12, 40, 5, (8, 12, 20), 0.37
UNKNOWN_K = {"k": 0, "groups": (F,)}

# What each file of a peer says about itself, as our configuration has it.
WRITTEN = {
    "dictionary_learning.matryoshka": {},
    "dictionary_learning.matryoshka_unset": {},
    "dictionary_learning.matryoshka_scaled": {},
    "dictionary_learning.batch_top_k": {"groups": (F,)},
    "dictionary_learning.top_k": {"groups": (F,), "activation": "topk"},
    "dictionary_learning.standard": UNKNOWN_K,
    "dictionary_learning.jumprelu": UNKNOWN_K,
    "sae_lens.standard": UNKNOWN_K,
    "sae_lens.standard_scaled": UNKNOWN_K,
    "sae_lens.jumprelu": UNKNOWN_K,
    "sae_lens.jumprelu_unsubtracted": UNKNOWN_K,
    "sae_lens.jumprelu_scaled": UNKNOWN_K,
    "sae_lens.topk": {"groups": (F,), "activation": "topk"},
    "sae_lens.topk_rescaled": {"groups": (F,), "activation": "topk"},
    "sae_lens.topk_rescaled_scaled": {"groups": (F,), "activation": "topk"},
    "sae_lens.batchtopk": {"groups": (F,)},
    "sae_lens.matryoshka": {},
    "sae_lens.matryoshka_checkpoint": {},
    "sparsify.top_k": {"groups": (F,), "activation": "topk"},
    "gemma_scope.params": UNKNOWN_K | {"site": ""},
}


def peers(command, folder):
    done = subprocess.run(
        [PYTHON, "-W", "ignore", Path(__file__).with_name("peers.py"), command, folder],
        capture_output=True,
        text=True,
        timeout=600,
        env={**os.environ, "HF_HUB_OFFLINE": "1"},
    )
    assert done.returncode == 0, done.stderr
    return folder


@pytest.fixture(scope="module")
def written(tmp_path_factory):
    return peers("write", tmp_path_factory.mktemp("peers") / "out")


def close(got, want):
    torch.testing.assert_close(got, want, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("case", WRITTEN)
def test_we_read_what_they_write(written, case):
    given = {"norm_scale": SCALE} if case.endswith("_scaled") else {}
    sae = MatryoshkaSAE.from_pretrained(written / case, **given)
    want = load_file(written / f"{case}.safetensors")
    active = (want["latents"] > 0).float().mean()
    assert 0.05 < active < 0.95  # the case can tell a wrong reading from a right one
    z = sae.encode(want["x"])
    close(z, want["latents"])
    close(sae.decode(z), want["reconstruction"])
    close(sae.encode_some(want["x"], [3, 17, 3]), want["latents"][:, [3, 17, 3]])
    says = {"k": K, "groups": GROUPS, "activation": "threshold", "site": "llm.3.resid_post"}
    says |= WRITTEN[case]
    config = sae.config
    assert (config.k, config.group_sizes) == (says["k"], says["groups"])
    assert (config.activation, config.site) == (says["activation"], says["site"])
    assert config.norm_scale == given.get("norm_scale", 1.0)
    assert config.origin["format"] == case.split(".")[0]


def test_every_case_is_read(written):
    assert {path.name for path in written.iterdir() if path.is_dir()} == set(WRITTEN)


def random_sae(activation, per_latent, seed):
    config = SAEConfig(D, F, K, GROUPS, site="llm.3.resid_post", activation=activation)
    sae = MatryoshkaSAE(config, seed=seed)
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in sae.parameters():
            parameter.copy_(0.4 * torch.randn(parameter.shape, generator=generator))
    size = (F,) if per_latent else ()
    sae.threshold = 0.5 + torch.rand(size, generator=generator)
    return sae


READ = {
    "dictionary_learning.scalar": ("threshold", False, "MatryoshkaBatchTopKSAE"),
    "dictionary_learning.per_latent": ("threshold", True, "JumpReluAutoEncoder"),
    "dictionary_learning.topk": ("topk", False, "AutoEncoderTopK"),
    "sae_lens.scalar": ("threshold", False, "jumprelu"),
    "sae_lens.per_latent": ("threshold", True, "jumprelu"),
    "sae_lens.topk": ("topk", False, "topk"),
    "sparsify.topk": ("topk", False, None),
}


@pytest.fixture(scope="module")
def answered(tmp_path_factory):
    out = tmp_path_factory.mktemp("ours")
    x = 3 * torch.randn(64, D, generator=torch.Generator().manual_seed(9)) + 1
    expected = {}
    for seed, (case, (activation, per_latent, _)) in enumerate(READ.items()):
        sae = random_sae(activation, per_latent, seed)
        convert(sae, out / case / "sae", to=case.split(".")[0])
        save_file({"x": x}, out / case / "x.safetensors")
        expected[case] = (sae.encode(x).detach(), sae(x).detach())
    return peers("read", out), expected


@pytest.mark.parametrize("case", READ)
def test_they_read_what_we_write(answered, case):
    out, expected = answered
    answer = load_file(out / case / "answer.safetensors")
    latents, reconstruction = expected[case]
    assert 0.05 < (latents > 0).float().mean() < 0.95
    close(answer["latents"], latents)
    close(answer["reconstruction"], reconstruction)
    kind = READ[case][2]
    if kind is not None:
        names = ("config.json", "cfg.json")
        (path,) = [
            out / case / "sae" / name for name in names if (out / case / "sae" / name).exists()
        ]
        config = json.loads(path.read_text())
        assert kind in (config.get("architecture"), config.get("trainer", {}).get("dict_class"))


def test_delphi_loads_our_results_and_we_load_its(tmp_path):
    verdicts = [Verdict("a", True, True, 0.9), Verdict("b", False, False, 0.2)]
    verdicts += [Verdict("c", True, False, 0.4), Verdict("d", False, None)]
    said = [Said(3, name, "report", tuple(verdicts)) for name in ("detection", "fuzzing")]
    delphi_results.write_scores(said, tmp_path / "ours/scores", "layers.1", {})
    delphi_results.write_explanations({3: "a tube"}, tmp_path / "ours/explanations", "layers.1")
    answer = json.loads((peers("delphi", tmp_path) / "answer.json").read_text())
    if answer is None:
        pytest.skip("no delphi in the peers' environment; `make interop` builds it anew")
    assert answer == {"explanation": "a tube", "accuracy": {"detection": 0.75, "fuzz": 0.75}}
    theirs = tmp_path / "theirs"
    found = delphi_results.read_explanations(theirs / "explanations", "layers.1")
    assert found.texts == {3: "left effusion"}
    (score,) = delphi_results.read_scores(theirs / "scores", "layers.1")
    assert (score.value, score.auroc, score.n, score.coverage) == (0.75, 1.0, 3, 0.75)
