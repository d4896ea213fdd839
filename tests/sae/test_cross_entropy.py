"""Cross-entropy recovered against models whose answer is known."""

import pytest
import torch
from torch.nn import functional as F

from hooks.files import ConfigError
from hooks.harvest import POLICIES
from hooks.images import read_image
from hooks.prompts import PromptRunner
from hooks.roles import Role
from hooks.sites import resolve_site, rewrite
from sae.cross_entropy import cross_entropy
from sae.maxima import study_maxima
from sae.model import MatryoshkaSAE, SAEConfig

SITE = "llm.1.resid_post"


def dictionary(signs=1.0):
    """An exact dictionary: ±each coordinate is a latent, so decode(encode(x)) = x."""
    sae = MatryoshkaSAE(SAEConfig(32, 64, 32, (64,), site=SITE, policy="published"))
    with torch.no_grad():
        sae.W_dec.copy_(torch.cat([torch.eye(32), -torch.eye(32)]))
        sae.W_enc.copy_(sae.W_dec.T * signs)
    return sae


@pytest.fixture
def runner(model, processor):
    return PromptRunner(model, processor, 500)


@torch.no_grad()
def literal_loss(model, processor, study, change=None):
    films = {n: read_image(p) for n in ("frontal", "lateral", "prior") if (p := getattr(study, n))}
    encoding = processor.encode_reporting(
        **films,
        indication=study.indication,
        prior_report=study.prior_report,
        assistant_text=study.report,
    )
    tokens = encoding.tokens
    kept = torch.from_numpy(tokens.of_role(*POLICIES["published"]))

    def replace(value):
        if change is None:
            return value
        value = value.clone()
        value[0, kept] = change
        return value

    with rewrite(resolve_site(model, SITE), replace):
        logits = model(**processor.model_inputs(encoding)).logits[0]
    targets = torch.from_numpy(tokens.of_role(Role.REPORT)).nonzero()[:, 0]
    ids = torch.from_numpy(tokens.ids)[targets]
    return float(F.cross_entropy(logits[targets - 1], ids, reduction="sum")), len(targets)


def test_against_one_study_at_a_time(model, processor, runner, studies, activations):
    mean = activations.moments(SITE).mean
    got = cross_entropy(model, runner, studies[:7], dictionary(), mean)
    conditions = {
        "clean": None,
        "zero_ablated": torch.zeros(32),
        "mean_ablated": mean.float(),
    }
    for name, change in conditions.items():
        pairs = [literal_loss(model, processor, study, change) for study in studies[:7]]
        total, count = (sum(column) for column in zip(*pairs, strict=True))
        assert getattr(got, name) == pytest.approx(total / count, rel=1e-5)
        assert got.n_tokens == count


def test_an_exact_dictionary_recovers_everything(model, runner, studies, activations):
    mean = activations.moments(SITE).mean
    exact = cross_entropy(model, runner, studies[:5], dictionary(), mean)
    assert exact.reconstructed == pytest.approx(exact.clean, abs=1e-5)
    assert exact.recovered_zero == pytest.approx(1, abs=1e-3)
    silent = dictionary()
    silent.threshold.fill_(1e9)
    nothing = cross_entropy(model, runner, studies[:5], silent, mean)
    assert nothing.recovered_zero == pytest.approx(0, abs=1e-3)


def test_without_reports_there_is_no_loss(model, runner, studies):
    bare = [study.model_copy(update={"report": None}) for study in studies[:2]]
    with pytest.raises(ConfigError, match="no study has a report"):
        cross_entropy(model, runner, bare, dictionary(), torch.zeros(32))


def test_study_maxima_are_maxima_over_report_tokens(activations):
    sae = dictionary()
    got = study_maxima(sae, activations, batch=37)
    assert got.studies == list(dict.fromkeys(activations.column("study")))
    z = sae.encode(activations.rows(SITE, 0, activations.n_tokens).float())
    report = activations.column("role") == "report"
    for i, study in enumerate(got.studies):
        mine = torch.from_numpy(report & (activations.column("study") == study))
        torch.testing.assert_close(got.values[i], z[mine].amax(0))
