"""Known answers of mixing, and batches that are the rows they claim to be."""

import math

import numpy as np
import pytest
import torch

from hooks.files import ConfigError
from maira_sae.bench_store import StoreBench, make_folder
from sae.mixing import _entropy, mixing
from sae.stream import FolderRows, gather_floats


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    config = StoreBench(rows=6000, d_model=8, rows_per_study=50)
    return make_folder(tmp_path_factory.mktemp("bench") / "acts", config)


def test_entropy_has_known_answers():
    assert _entropy(np.array([[1, 1, 1, 1]])) == 0
    assert _entropy(np.array([[1, 2, 3, 4], [1, 1, 2, 2]])) == pytest.approx(1.5 * math.log(2))


def test_a_full_shuffle_is_ideal_and_single_chunks_are_not(folder):
    whole = mixing(FolderRows(folder, 0, buffer_rows=8192, chunk_rows=64), 256)
    assert whole.ratio == pytest.approx(1, abs=0.01)
    alone = mixing(FolderRows(folder, 0, buffer_rows=64, chunk_rows=64), 64)
    assert alone.ratio < 0.4
    assert whole.coverage == pytest.approx(6000 // 256 * 256 / 6000)
    with pytest.raises(ConfigError, match="a batch 7000"):
        mixing(FolderRows(folder, 0), 7000)


def test_row_numbers_are_those_of_the_batches(folder):
    (site,) = folder.sites
    rows = FolderRows(folder, 0.3, buffer_rows=1024, chunk_rows=128)
    order = np.concatenate(list(rows.row_numbers(seed=5, epoch=0)))
    assert sorted(order) == np.flatnonzero(~folder.heldout(0.3)).tolist()
    every = folder.rows(site, 0, folder.n_tokens).float()
    stream = rows.batches([site], 100, 5, {})
    for number in range(len(order) // 100):
        want = every[torch.from_numpy(order[number * 100 : number * 100 + 100])]
        assert torch.equal(next(stream).x[site], want)
    stream.close()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
def test_gathered_rows_are_exact(dtype):
    rows = torch.randn(700, 33).to(dtype)
    rows[3, :4] = torch.tensor([float("inf"), -0.0, 1e-30, -3.4e38]).to(dtype)
    index = np.random.default_rng(0).permutation(700)[:650]
    got = gather_floats(rows, index)
    want = rows[torch.from_numpy(index)].float()
    assert got.dtype == torch.float32 and torch.equal(got, want)
