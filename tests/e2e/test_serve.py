"""The client against `transformers serve` with a real language model, as a process of its own."""

import json
from importlib.util import find_spec

import pytest

from autointerp import Client, Ledger, Request
from autointerp.explainers import TEXT, Explanation, grouped
from autointerp.explaining import explain
from hooks.files import CheckpointError

ON = (
    ["There is a small left pleural <<effusion>>.", "Bilateral <<effusions>> are seen."],
    ["The heart is mildly <<enlarged>>.", "<<Cardiomegaly>> is stable."],
)
OFF = ["The lungs are clear.", "No pneumothorax."]
MAX_TOKENS = 12
"""Too few for a whole object, as a rule: then a reply and its repair end as missing, never as a
label."""


@pytest.fixture(scope="module")
def endpoint(tmp_path_factory):
    """SmolLM2-135M-Instruct on loopback."""
    from maira_sae.real_model import text_tower
    from maira_sae.server import serving

    missing = [name for name in ("gguf", "fastapi", "uvicorn") if find_spec(name) is None]
    if missing:
        pytest.skip(f"{', '.join(missing)} of maira-sae[demo] not installed")
    folder = tmp_path_factory.mktemp("smollm2")
    try:
        model, tokenizer = text_tower()
    except CheckpointError as error:
        pytest.skip(str(error))
    model.save_pretrained(folder / "model")
    tokenizer.save_pretrained(folder / "model")
    del model
    with serving(folder / "model", folder / "server.log") as found:
        yield found


def client_of(endpoint, folder):
    return Client(endpoint, Ledger(folder / "ledger.sqlite"))


def sent_keys(folder):
    lines = (folder / "requests.jsonl").read_text().splitlines()
    return [json.loads(line)["request"] for line in lines]


@pytest.mark.parametrize("structured", [False, True])
def test_two_latents_are_asked_about_once(endpoint, structured, tmp_path):
    """`transformers serve` takes no notice of ``response_format``, so both ways must do."""
    requests = {
        latent: Request(grouped(TEXT, on, OFF), MAX_TOKENS, Explanation)
        for latent, on in enumerate(ON)
    }
    client = client_of(endpoint, tmp_path)
    client.no_schema = not structured
    first = explain(client, requests)
    assert client.no_schema is not structured
    # Every latent has a label that could be read, or is missing; nothing else becomes of a reply.
    assert sorted([*first.found, *first.missing]) == [0, 1] and first.unasked == ()
    keys = sent_keys(tmp_path)
    answers = client.ledger.find(keys)
    # Each request went out once and has its answer; a repair is a request of its own.
    assert len(set(keys)) == len(keys) == len(answers) == len(client.ledger)
    assert 2 + len(first.missing) <= len(keys) <= 4
    assert all(one.text and not one.refused for one in answers.values())
    assert len({one.text for one in answers.values()}) > 1
    # Tokens are the server's own count, not the estimate.
    assert all(0 < one.tokens_out <= MAX_TOKENS and one.tokens_in > 40 for one in answers.values())

    again = client_of(endpoint, tmp_path)
    again.no_schema = not structured
    assert explain(again, requests) == first
    assert sent_keys(tmp_path) == keys
