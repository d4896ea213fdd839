import json
from importlib import import_module

import pytest
import torch

from hooks.files import ConfigError, FolderError
from sae.kernels import BatchTopK, Nested, Weights, select
from sae.model import MatryoshkaSAE, SAEConfig
from sae.parallel import Alone, Objective
from sae.stream import FolderRows
from sae.train import train, train_all, training_curve
from sae.trainer import TrainConfig, Trainer, follow

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
    module = import_module("sae.train")
    real_append = module._append

    def append(path, line):
        real_append(path, line)
        if line.get("step") == stop_at:
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
    follow(threshold, 2.0, 0.9)
    assert float(threshold) == 2
    follow(threshold, 1.0, 0.9)
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
    weights = Weights(*(p.detach() for p in (sae.W_enc.T, sae.b_enc, sae.W_dec, sae.b_dec)))
    dead = torch.zeros(48, dtype=torch.bool)
    dead[12:] = True
    optimizer = torch.optim.Adam([sae.W_enc, sae.b_enc, sae.W_dec, sae.b_dec], lr=3e-3)
    goal = Objective(BatchTopK(3), Nested((48,), (1.0,)), aux_weight, 8)
    for step in range(200):
        present = torch.rand(256, 24, generator=generator) < 0.1
        x = (present * torch.rand(256, 24, generator=generator)) @ truth
        work = Alone(select("cpu")).work(weights, x, goal, dead, None, weights.zeros())
        grads = work.gradients
        sae.W_enc.grad, sae.b_enc.grad = grads.W_enc.T, grads.b_enc
        sae.W_dec.grad, sae.b_dec.grad = grads.W_dec, grads.b_dec
        optimizer.step()
        sae.normalize_decoder()
        dead = ~work.fired if step else dead
    return int(work.fired.sum())


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


@pytest.mark.parametrize(
    ("change", "text"),
    [
        ({"role_weights": {"reports": 1}}, "role_weights names 'reports' .did you mean 'report'"),
        ({"activation": "relu"}, "activation is 'relu'; choose one of"),
        ({"group_weights": (1,) * 5, "sampled_prefixes": 3}, "leave one of the two out"),
        ({"k_anneal_steps": -1}, "k_anneal_steps is -1"),
    ],
)
def test_more_config_checks(change, text):
    with pytest.raises(ConfigError, match=text):
        TrainConfig(site="", **change)


def quick(activations, out, **changes):
    return train(activations, TrainConfig(**{**BASE, **changes}), out)


def lines_of(out):
    return [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]


def test_topk_keeps_k_on_every_token(activations, tmp_path):
    quick(activations, tmp_path, activation="topk")
    assert all(line["batch_l0"] <= 4 for line in lines_of(tmp_path))
    assert lines_of(tmp_path)[-1]["batch_fvu"] < 0.5
    x = activations.rows(SITE, 0, 40).float()
    sae = MatryoshkaSAE.from_pretrained(tmp_path)
    assert int((sae.encode(x) > 0).sum(dim=1).max()) <= 4


def test_k_falls_to_its_end(activations, tmp_path):
    quick(activations, tmp_path, k_start=12, k_anneal_steps=40)
    l0 = [line["batch_l0"] for line in lines_of(tmp_path)]
    assert l0[0] == pytest.approx(12) and l0[20] == pytest.approx(8)
    assert all(one == pytest.approx(4) for one in l0[40:])


def test_prefixes_are_drawn_anew_and_small_ones_more_often(activations, tmp_path):
    config = TrainConfig(**{**BASE, "sampled_prefixes": 4})
    drawn = [config.nested_at(step, (8, 128)) for step in range(300)]
    assert len({nested.prefixes for nested in drawn}) > 200
    assert all(n.prefixes[-1] == 128 and len(set(n.prefixes)) == len(n.prefixes) for n in drawn)
    ends = [end for nested in drawn for end in nested.prefixes[:-1]]
    assert sum(end <= 11 for end in ends) == pytest.approx(len(ends) / 2, rel=0.15)
    quick(activations, tmp_path, sampled_prefixes=4)
    assert lines_of(tmp_path)[-1]["batch_fvu"] < 0.5


def test_groups_by_sizes(activations, tmp_path):
    sae = quick(activations, tmp_path, group_sizes=(10, 30, 60), steps=2)
    assert sae.config.group_sizes == (10, 30, 60) and sae.config.n_latents == 100


def test_role_weights_move_the_error_from_role_to_role(activations, tmp_path):
    fvu = {}
    for name, weights in {"clinical": {"report": 0.05}, "report": {"clinical": 0.05}}.items():
        quick(activations, tmp_path / name, role_weights=weights, steps=120)
        fvu[name] = lines_of(tmp_path / name)[-1]["heldout_roles"]
    for role, other in (("clinical", "report"), ("report", "clinical")):
        assert fvu[role][role]["fvu"] < fvu[other][role]["fvu"]


def test_sinks_are_left_out(activations, tmp_path):
    quick(activations, tmp_path / "all", steps=1)
    quick(activations, tmp_path / "some", steps=1, max_norm=1.0)
    assert lines_of(tmp_path / "all")[0]["left_out"] == 0
    assert 0 < lines_of(tmp_path / "some")[0]["left_out"] < 64
    with pytest.raises(ConfigError, match=r"max_norm 0\.001 leaves no row"):
        quick(activations, tmp_path / "none", steps=1, max_norm=0.001)


def test_calibration_sets_l0(activations, tmp_path):
    quick(activations, tmp_path, calibration_rows=10_000)
    record = json.loads((tmp_path / "metrics.json").read_text())
    assert record["calibration"]["n_tokens"] >= 10_000
    assert record["heldout"]["l0"] == pytest.approx(4, rel=0.25)
    assert set(record["calibration"]["by_role"]) == {"clinical", "report"}


def test_several_in_one_pass_equal_each_alone(activations, tmp_path):
    configs = {
        "small": TrainConfig(**{**BASE, "expansion": 2}),
        "large": TrainConfig(**{**BASE, "k": 6}),
    }
    together = train_all(activations, configs, tmp_path / "both")
    for name, config in configs.items():
        alone = train(activations, config, tmp_path / name)
        for key, value in alone.state_dict().items():
            assert torch.equal(value, together[name].state_dict()[key])
        assert (tmp_path / "both" / name / "manifest.json").is_file()
    assert train_all(activations, configs, tmp_path / "both").keys() == configs.keys()
    other = {**configs, "large": TrainConfig(**{**BASE, "steps": 61})}
    with pytest.raises(ConfigError, match="SAE 'large' has steps 61, the first one 60"):
        train_all(activations, other, tmp_path / "other")


def test_state_survives_a_round_trip(activations):
    rows = FolderRows(activations)
    make = lambda: Trainer(  # noqa: E731
        TrainConfig(**BASE), rows.moments(SITE), rows.policy, rows.model, "cpu"
    )
    batches = rows.batches([SITE], 64, 0, {})
    one, other = make(), make()
    for step in range(12):
        batch = next(batches)
        one.step(batch.x[SITE], batch.roles, step)
    other.restore({name: tensor.clone() for name, tensor in one.tensors().items()})
    for step in range(12, 24):
        batch = next(batches)
        assert one.step(batch.x[SITE], batch.roles, step) == other.step(
            batch.x[SITE], batch.roles, step
        )


def test_loggers_get_every_scalar(activations, tmp_path):
    pytest.importorskip("tensorboard")
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    train(activations, TrainConfig(**{**BASE, "steps": 3}), tmp_path, log_to=("tensorboard",))
    events = EventAccumulator(str(tmp_path / "tensorboard"))
    events.Reload()
    found = [event.value for event in events.Scalars("loss")]
    assert found == pytest.approx([line["loss"] for line in lines_of(tmp_path)])
    assert "group_mse/4" in events.Tags()["scalars"]


def test_an_unknown_logger(activations, tmp_path):
    with pytest.raises(ConfigError, match=r"unknown logger 'tensorbord' .did you mean"):
        train(activations, TrainConfig(**{**BASE, "steps": 1}), tmp_path, log_to=("tensorbord",))


def test_wandb_stays_on_this_machine(activations, tmp_path):
    pytest.importorskip("wandb")
    train(activations, TrainConfig(**{**BASE, "steps": 3}), tmp_path, log_to=("wandb",))
    assert list((tmp_path / "wandb").glob("offline-run-*/*.wandb"))
