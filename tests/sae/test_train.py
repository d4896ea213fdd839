import json

import pytest
import torch

from hooks.files import ConfigError, FolderError
from sae.loss import objective
from sae.model import MatryoshkaSAE, SAEConfig
from sae.train import TrainConfig, _follow, train, training_curve

SITE = "llm.1.resid_post"
BASE = {
    "site": SITE,
    "expansion": 4,
    "k": 4,
    "steps": 60,
    "batch": 64,
    "lr": 3e-3,
    "warmup_steps": 5,
    "threshold_start": 20,
    "threshold_beta": 0.9,
    "dead_after_tokens": 1000,
    "checkpoint_every": 25,
    "measure_every": 20,
}


@pytest.fixture(scope="module")
def finished(activations, tmp_path_factory):
    out = tmp_path_factory.mktemp("train") / "sae"
    return train(activations, TrainConfig(**BASE), out), out


def test_it_learns_and_records(finished):
    sae, out = finished
    curve = training_curve(out)
    assert [point["tokens"] for point in curve] == [1280, 2560, 3840]
    assert curve[-1]["fvu"] < 0.6 * curve[0]["fvu"]
    assert curve[-1]["fvu"] < 0.5 and curve[-1]["l0"] < 8
    assert (sae.W_dec.norm(dim=1) - 1).abs().max() < 1e-5
    assert float(sae.threshold) > 0
    metrics = json.loads((out / "metrics.json").read_text())
    assert metrics["heldout"]["fvu"] == pytest.approx(curve[-1]["fvu"], rel=0.2)


def test_saved_weights_take_raw_activations(finished, activations):
    sae, out = finished
    again = MatryoshkaSAE.from_pretrained(out)
    x = activations.rows(SITE, 0, 50).float()
    assert torch.equal(again(x), sae(x))
    assert again.config.norm_scale != 1 and again.config.policy == "published"
    spread = (x - x.mean(0)).square().sum()
    assert (x - again(x)).square().sum() / spread < 0.6


def test_finished_run_is_returned_and_another_is_refused(finished, activations):
    sae, out = finished
    again = train(activations, TrainConfig(**BASE), out)
    assert torch.equal(again.W_enc, sae.W_enc)
    with pytest.raises(FolderError, match="holds another run: k is 4, asked was 5"):
        train(activations, TrainConfig(**{**BASE, "k": 5}), out)


class _Stop(Exception):
    pass


@pytest.mark.parametrize("stop_at", [10, 30, 55])
def test_resumed_equals_uninterrupted_bit_for_bit(
    finished, activations, tmp_path, monkeypatch, stop_at
):
    sae, out = finished
    module = __import__("sae.train", fromlist=["train"])
    real_append = module._append

    def append(path, line):
        real_append(path, line)
        if line["step"] == stop_at:
            raise _Stop

    with monkeypatch.context() as patch:
        patch.setattr(module, "_append", append)
        with pytest.raises(_Stop):
            train(activations, TrainConfig(**BASE), tmp_path / "sae")
    resumed = train(activations, TrainConfig(**BASE), tmp_path / "sae")
    for name, value in sae.state_dict().items():
        assert torch.equal(value, resumed.state_dict()[name]), name

    def lines(folder):
        rows = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
        return [{k: v for k, v in row.items() if k != "seconds"} for row in rows]

    assert lines(tmp_path / "sae") == lines(out)


def test_threshold_average_starts_at_its_first_observation():
    threshold = torch.zeros(())
    _follow(threshold, torch.tensor(2.0), 0.9)
    assert float(threshold) == 2
    _follow(threshold, torch.tensor(1.0), 0.9)
    assert float(threshold) == pytest.approx(1.9)


def test_learning_rate_schedule():
    config = TrainConfig(site="", steps=100, lr=1.0, warmup_steps=10, decay_fraction=0.2)
    assert config.lr_at(0, 1) == pytest.approx(0.1)
    assert config.lr_at(9, 1) == config.lr_at(50, 1) == config.lr_at(80, 1) == 1
    assert config.lr_at(90, 1) == pytest.approx(0.5)
    assert config.lr_at(99, 1) == pytest.approx(0.05)
    default = TrainConfig(site="", warmup_steps=0)
    assert default.lr_at(0, 2**14) == pytest.approx(2e-4)
    assert default.lr_at(0, 2**16) == pytest.approx(1e-4)


def alive_after_training(aux_weight):
    """Latents in use after training a dictionary most of which starts too weak to be chosen."""
    generator = torch.Generator().manual_seed(0)
    truth = torch.nn.functional.normalize(torch.randn(24, 16, generator=generator), dim=1)
    sae = MatryoshkaSAE(SAEConfig(16, 48, 3, (48,)))
    with torch.no_grad():
        sae.W_enc[:, 12:] *= 0.02
    dead = torch.zeros(48, dtype=torch.bool)
    dead[12:] = True
    optimizer = torch.optim.Adam(sae.parameters(), lr=3e-3)
    for step in range(200):
        present = torch.rand(256, 24, generator=generator) < 0.1
        x = (present * torch.rand(256, 24, generator=generator)) @ truth
        result = objective(sae, x, dead, (1.0,), aux_weight, 8)
        optimizer.zero_grad()
        result.total.backward()
        optimizer.step()
        sae.normalize_decoder()
        fired = (result.latents > 0).any(dim=0)
        dead = ~fired if step else dead
    return int(fired.sum())


def test_auxiliary_loss_revives_dead_latents():
    without, with_it = alive_after_training(0.0), alive_after_training(1 / 32)
    assert without < 16
    assert with_it > 24


def test_config_checks():
    assert TrainConfig(site="", group_weights=(1, 1, 2, 0, 0)).weights == (0.25, 0.25, 0.5, 0, 0)
    assert TrainConfig(site="").weights == (0.2,) * 5
    with pytest.raises(ConfigError, match="2 group_weights for 5 groups"):
        TrainConfig(site="", group_weights=(1, 2))
    with pytest.raises(ConfigError, match="steps is 0"):
        TrainConfig(site="", steps=0)
    with pytest.raises(ConfigError, match="heldout is 1"):
        TrainConfig(site="", heldout=1)
