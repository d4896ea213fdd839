import numpy as np
import pytest
import torch

from hooks.files import ConfigError
from sae import stream
from sae.stream import ShuffledRows

SITE = "llm.1.resid_post"


@pytest.fixture(autouse=True)
def small_chunks(monkeypatch):
    monkeypatch.setattr(stream, "CHUNK_ROWS", 16)


def take(rows, n):
    batches = iter(rows)
    return [next(batches) for _ in range(n)]


def key(row):
    return tuple(row.tolist())


def test_an_epoch_is_every_chosen_row_once(activations):
    chosen = ~activations.heldout(0.3)
    want = activations.rows(SITE, 0, activations.n_tokens)[torch.from_numpy(chosen)].float()
    rows = ShuffledRows(activations, SITE, 1, 0, chosen, buffer_rows=64)
    got = torch.cat(take(rows, len(want)))
    assert sorted(map(key, got)) == sorted(map(key, want))
    assert not torch.equal(got, want)


def test_epochs_and_seeds_differ(activations):
    chosen = np.ones(activations.n_tokens, dtype=bool)
    n = activations.n_tokens
    first = torch.cat(take(ShuffledRows(activations, SITE, 1, 0, chosen, 64), 2 * n))
    other = torch.cat(take(ShuffledRows(activations, SITE, 1, 1, chosen, 64), n))
    assert not torch.equal(first[:n], first[n:])
    assert not torch.equal(first[:n], other)
    assert sorted(map(key, first[:n])) == sorted(map(key, first[n:]))


@pytest.mark.parametrize("position", [1, 4, 9, 23, 40])
def test_position_continues_exactly(activations, position):
    """Across buffers and epochs, with batches that span both."""
    chosen = ~activations.heldout(0.3)
    make = lambda at: ShuffledRows(activations, SITE, 13, 7, chosen, 48, position=at)  # noqa: E731
    straight = take(make(0), position + 5)
    resumed = make(position)
    assert all(
        torch.equal(a, b) for a, b in zip(straight[position:], take(resumed, 5), strict=True)
    )
    assert resumed.position == position + 5


def test_too_few_rows(activations):
    chosen = np.zeros(activations.n_tokens, dtype=bool)
    with pytest.raises(ConfigError, match="offers 0 rows, a batch needs 8"):
        ShuffledRows(activations, SITE, 8, 0, chosen)
