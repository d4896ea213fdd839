"""Whatever uses a dictionary refuses tokens of roles that it was not trained on."""

import pytest

from autointerp.activations import latent_activations
from autointerp.collect import CollectConfig, collect
from autointerp.delphi import write_delphi_cache
from hooks.files import ConfigError
from sae.evaluate import evaluate
from sae.metrics import measure
from sae.model import MatryoshkaSAE, SAEConfig
from steering.evidence import ReportReader
from steering.references import measure_references
from steering.search import build_index
from tests.e2e.test_cli import SITE

USES = {
    "measure": lambda sae, acts, out: measure(sae, acts, SITE, acts.heldout(0.2)),
    "evaluate": lambda sae, acts, out: evaluate(sae, acts),
    "latent_activations": lambda sae, acts, out: latent_activations(sae, acts, [0]),
    "collect": lambda sae, acts, out: collect(sae, acts, CollectConfig(), out),
    "delphi": lambda sae, acts, out: write_delphi_cache(sae, acts, out, include_text=True),
    "references": lambda sae, acts, out: measure_references(sae, acts, [0]),
    "index": lambda sae, acts, out: build_index(sae, acts, out),
}


def dictionary(policy):
    return MatryoshkaSAE(SAEConfig(32, 40, 4, (40,), site=SITE, policy=policy))


@pytest.mark.parametrize("use", USES)
def test_a_dictionary_of_patches_does_not_read_words(use, activations, tmp_path):
    with pytest.raises(ConfigError, match=r"trained on image tokens .*only clinical, report"):
        USES[use](dictionary("patches"), activations, tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_a_dictionary_of_words_does_not_read_films(model, processor, studies):
    with pytest.raises(ConfigError, match="what is read of films has only image"):
        ReportReader(model, processor, dictionary("published"), studies[0])
