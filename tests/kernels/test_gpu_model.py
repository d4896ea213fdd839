"""The modelled table against figures worked out by hand, each within a tenth."""

import pytest

from hooks.files import ConfigError
from sae.kernels.gpu_model import A100, H100, Shape, dense_step, main, sparse_step, table


def total(rows):
    return sum(row.ms for row in rows)


def mtokens(shape, step):
    return shape.batch / total(step(shape)) / 1e3


@pytest.mark.parametrize(
    ("shape", "ms"),
    [
        (Shape(adam="fused bf16", whole_rows=False), 8.6),
        (Shape(adam="separate"), 10.1),
        (Shape(adam="separate", gathers="memory"), 13.4),
    ],
)
def test_total_of_a_step(shape, ms):
    assert total(sparse_step(shape)) == pytest.approx(ms, rel=0.1)


def test_total_with_one_reading_of_the_pre_activations():
    shape = Shape(adam="fused bf16", whole_rows=False, filter_reads=1)
    assert total(sparse_step(shape)) == pytest.approx(8.6, rel=0.01)
    assert total(dense_step(shape)) == pytest.approx(22.9, rel=0.01)


@pytest.mark.parametrize(
    ("sizes", "sparse", "dense"),
    [
        ({"latents": 16_384}, 1.39, 0.71),
        ({"latents": 131_072}, 0.33, 0.09),
        ({"k": 256}, 0.46, 0.36),
        ({"k": 32, "batch": 16_384}, 1.33, 0.38),
    ],
)
def test_tokens_a_second_of_other_shapes(sizes, sparse, dense):
    shape = Shape(adam="fused bf16", whole_rows=False, filter_reads=1, **sizes)
    assert mtokens(shape, sparse_step) == pytest.approx(sparse, rel=0.1)
    assert mtokens(shape, dense_step) == pytest.approx(dense, rel=0.1)


def test_single_passes():
    rows = {row.name: row for row in sparse_step(Shape(adam="fused"))}
    product = rows["encoder product"]
    assert product.flops == 2 * 8192 * 4096 * 32_768
    assert product.ms == pytest.approx(3.27, rel=0.01)
    assert rows["decode: gather W_dec"].bytes == 8192 * 64 * 4096 * 2
    assert rows["decode: gather W_dec"].ms == pytest.approx(0.78, rel=0.01)
    assert rows["reverse walk: write S"].ms == pytest.approx(0.12, rel=0.05)
    assert rows["Adam, fused"].ms == pytest.approx(2.45, rel=0.01)
    assert rows["decoder gradient: gather S"].ms == pytest.approx(1.51, rel=0.01)
    assert rows["encoder gradient: gather x"].ms == pytest.approx(0.78, rel=0.01)
    from_memory = sparse_step(Shape(gathers="memory"))
    assert from_memory[2].ms == pytest.approx(1.51, rel=0.01)


def test_an_a100_is_slower_throughout():
    pairs = zip(sparse_step(Shape(), A100), sparse_step(Shape(), H100), strict=True)
    assert all(slow.ms > fast.ms and slow.bytes == fast.bytes for slow, fast in pairs)


def test_the_table_says_that_it_is_modelled(monkeypatch, capsys):
    monkeypatch.setattr("sys.argv", ["gpu_model", "--gpu", "a100", "--k", "32"])
    main()
    text = capsys.readouterr().out
    assert text.startswith("Modelled, not measured: A100")
    assert text == table(Shape(k=32), A100)


def test_unknown_choices_are_refused():
    with pytest.raises(ConfigError, match="fused"):
        Shape(adam="lazy")
    with pytest.raises(ConfigError, match="positive"):
        Shape(batch=0)
