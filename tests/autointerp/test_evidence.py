"""Patches land where they came from; text is marked; studies and tokens are ranked."""

import numpy as np
import pytest
import torch
from PIL import Image

from autointerp.evidence import (
    Crop,
    by_study,
    film_evidence,
    marked_text,
    model_output_tokens,
    on_film,
    output_tokens,
    overlay,
    side_by_side,
)
from autointerp.features import Example
from hooks.files import ConfigError, StudyError
from hooks.grounding import Box
from hooks.images import pixel_plane
from hooks.studies import Sentence, Study


def example(values, view=None, **changes):
    base = {
        "latent": 0, "modality": view or "report", "kind": "top", "set": "explain",
        "study": "s", "patient": "p", "sequence": 0, "view": view, "sentence": 0,
        "token_ids": [], "values": list(values), "peak": max(values), "peak_row": 0,
        "rows": (0, len(values) - 1), "patch_shape": None,
    }  # fmt: skip
    return Example(**base | changes)


@pytest.mark.parametrize("size", [(400, 300), (300, 400), (257, 311), (500, 500)])
def test_a_bright_box_of_a_film_comes_back_where_it_was(size):
    width, height = size
    side, grid = 56, 8
    crop = Crop.of(width, height, side)
    x0, y0, x1, y1 = (round(v) for v in crop.patch(3, 5, (grid, grid)))
    pixels = np.zeros((height, width), dtype=np.uint8)
    pixels[y0:y1, x0:x1] = 255
    plane = pixel_plane(Image.fromarray(pixels), side, 0.0, 1.0)  # what the model sees
    patches = plane.reshape(grid, side // grid, grid, side // grid).mean((1, 3))
    assert np.unravel_index(patches.argmax(), patches.shape) == (3, 5)
    back = on_film(patches, width, height, side)
    bright = back > patches.max() / 2
    truth = pixels > 0
    assert (bright & truth).sum() / (bright | truth).sum() > 0.9
    assert np.isnan(back).sum() == pytest.approx(width * height - min(size) ** 2, rel=0.03, abs=1)


def test_magnitude_is_kept_and_silence_leaves_the_film_alone():
    film = Image.fromarray(np.full((4, 4), 90, dtype=np.uint8))
    values = np.zeros((4, 4))
    values[0, 0], values[0, 1], values[3, 3] = 10.0, 5.0, np.nan
    out = np.asarray(overlay(film, values, 10.0)).astype(int)
    assert (out[1] == 90).all() and (out[3, 3] == 90).all()
    moved = np.abs(out - 90).sum(2)
    assert moved[0, 0] > moved[0, 1] > 0
    with pytest.raises(ConfigError, match="on_film"):
        overlay(film, values[:2], 1.0)


def test_films_of_a_study_lie_side_by_side_with_their_boxes(tmp_path):
    for name, shape in (("f", (60, 80)), ("l", (60, 40))):
        Image.fromarray(np.arange(np.prod(shape)).reshape(shape).astype(np.uint8)).save(
            tmp_path / f"{name}.png"
        )
    box = Box(0.25, 0.25, 0.75, 0.75)
    study = Study(
        id="s",
        frontal=tmp_path / "f.png",
        lateral=tmp_path / "l.png",
        sentences=(Sentence(text="x", boxes=(box,)),),
    )
    shape = {"patch_shape": (2, 2)}
    films = [
        film_evidence(example([0.0, 0, 0, 1], view, **shape), study, 28)
        for view in ("lateral", "frontal")
    ]
    assert films[1].boxes == (box,) and films[0].boxes == ()
    assert films[1].heat.getpixel((20, 30)) == (255, 255, 255)
    assert films[1].film.mode == "L" and films[1].film.size == (80, 60)
    assert side_by_side(films, 30).size == (40 + 20, 60)
    with pytest.raises(StudyError, match="own study"):
        film_evidence(example([0.0, 0, 0, 1], "prior", **shape), study, 28)


def test_strong_tokens_are_marked_together(tokenizer):
    ids = tokenizer("The heart is enlarged.", add_special_tokens=False)["input_ids"]
    values = [0.0] * len(ids)
    values[1] = values[2] = 1.0
    text = marked_text(example(values, token_ids=ids), tokenizer)
    assert text.replace("<<", "").replace(">>", "") == "The heart is enlarged."
    assert text.count("<<") == text.count(">>") == 1
    silent = example([0.0] * len(ids), token_ids=ids)
    assert marked_text(silent, tokenizer) == "The heart is enlarged."


def test_studies_are_ranked_by_their_peak_over_modalities():
    films = Study(id="a", frontal="a.png", report="Effusion.", labels=("Effusion",))
    found = by_study(
        [
            example([2.0], study="a"),
            example([5.0], "frontal", study="a"),
            example([3.0], study="b"),
        ],
        {"a": films},
    )
    assert [(one.study, one.peak) for one in found] == [("a", 5.0), ("b", 3.0)]
    assert found[0].modalities == ("frontal", "report") and found[0].report == "Effusion."
    assert found[1].report is None and found[1].labels == ()


def test_the_token_whose_head_row_is_the_direction_is_promoted(model, tokenizer):
    head, norm = torch.eye(4), torch.tensor([1.0, 2.0, 1.0, 1.0])
    found = output_tokens(torch.tensor([1.0, 1.0, 0, -3.0]), norm, head, lambda ids: str(ids[0]), 2)
    assert [t for t, _ in found.promoted] == ["1", "0"]
    assert found.promoted[0][1] == pytest.approx(2.0) and found.suppressed[0] == ("3", -3.0)
    own = model_output_tokens(model, "llm.1.resid_post", torch.ones(32), tokenizer, 3)
    assert len(own.promoted) == 3 and own.promoted[0][1] > 0 > own.suppressed[0][1]
    assert model_output_tokens(model, "vision.1.resid_post", torch.ones(24), tokenizer) is None
