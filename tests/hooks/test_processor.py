"""Prompts byte for byte, and the role of every token, on one, two and three films."""

import logging

import numpy as np
import pytest
import torch
from PIL import Image
from transformers.models.bit.image_processing_pil_bit import BitImageProcessorPil

from hooks.files import CheckpointError, StudyError
from hooks.grounding import GroundedPhrase
from hooks.processor import GROUNDING_TASK, MISSING, Maira2Processor, load_processor
from hooks.roles import NONE, Role, View

FILM = Image.fromarray(np.arange(48 * 60, dtype=np.uint32).reshape(48, 60).astype(np.uint8))
HEAD = (
    "You are an expert radiology assistant tasked with interpreting a chest X-ray study.  USER:  "
)
TASK = (
    " Provide a structured description of the findings in the radiology study in comparison to the "
    "prior frontal image."
)


def decoded(processor, tokens, mask):
    return processor.tokenizer.decode(tokens.ids[mask].tolist())


def prompt(processor, **kwargs):
    tokens = processor.tokenize_reporting(**kwargs)
    text = processor.tokenizer.decode(tokens.ids.tolist())
    return text.removeprefix("<s>").replace("<image>" * 9, "<image>")


@pytest.mark.parametrize(
    ("has_lateral", "has_prior", "films"),
    [
        (False, False, "Given the current frontal image only<image>"),
        (
            True,
            False,
            "Given the current frontal image<image> and the current lateral image<image>",
        ),
        (
            False,
            True,
            "Given the current frontal image<image> and the prior frontal image<image>"
            " PRIOR_REPORT: Old.",
        ),
        (
            True,
            True,
            "Given the current frontal image<image> the current lateral image<image>"
            " and the prior frontal image<image> PRIOR_REPORT: Old.",
        ),
    ],
)
def test_reporting_prompt_byte_for_byte(processor, has_lateral, has_prior, films):
    text = prompt(
        processor,
        has_lateral=has_lateral,
        has_prior=has_prior,
        indication="Pain.",
        prior_report="Old." if has_prior else None,
    )
    end = " INDICATION: Pain. TECHNIQUE: N/A COMPARISON: N/A  ASSISTANT: "
    assert text == HEAD + films + TASK + end


def test_grounded_prompt_and_teacher_forcing(processor):
    text = prompt(processor, grounded=True, assistant_text="Clear.")
    end = " INDICATION: N/A TECHNIQUE: N/A COMPARISON: N/A  ASSISTANT: Clear.</s>"
    assert (
        text == HEAD + "Given the current frontal image only<image>" + TASK + GROUNDING_TASK + end
    )


def test_phrase_grounding_forwards_the_assistant_text(processor):
    tokens = processor.encode_phrase(FILM, "Left effusion.", "<obj>Left effusion.</obj>").tokens
    assert decoded(processor, tokens, tokens.of_role(Role.CLINICAL)).strip() == "Left effusion."
    assert decoded(processor, tokens, tokens.of_role(Role.GROUNDING)) == "<obj></obj>"
    assert decoded(processor, tokens, tokens.of_role(Role.REPORT)).strip() == "Left effusion."


@pytest.mark.parametrize(("has_lateral", "has_prior"), [(0, 0), (1, 0), (0, 1), (1, 1)])
def test_roles_are_exact(processor, has_lateral, has_prior):
    report = "Heart normal. <obj>Small effusion.<box><x10><y20><x30><y40></box></obj> No more."
    tokens = processor.tokenize_reporting(
        has_lateral=bool(has_lateral),
        has_prior=bool(has_prior),
        indication="Chest pain, fever",
        technique="PA view",
        comparison="None",
        prior_report="Old report text." if has_prior else None,
        assistant_text=report,
    )
    clinical = decoded(processor, tokens, tokens.of_role(Role.CLINICAL))
    prior = "Old report text." if has_prior else ""
    assert clinical.replace(" ", "") == (prior + "Chest pain, feverPA viewNone").replace(" ", "")
    said = decoded(processor, tokens, tokens.of_role(Role.REPORT, Role.GROUNDING))
    assert said.replace(" ", "") == report.replace(" ", "")
    grounding = decoded(processor, tokens, tokens.of_role(Role.GROUNDING))
    assert grounding == "<obj><box><x10><y20><x30><y40></box></obj>"
    fixed = decoded(processor, tokens, tokens.of_role(Role.BOILERPLATE))
    assert "INDICATION:" in fixed and "pain" not in fixed and "Heart" not in fixed

    image = tokens.of_role(Role.IMAGE)
    views = [View.FRONTAL] + [View.LATERAL] * has_lateral + [View.PRIOR] * has_prior
    assert (tokens.ids[image] == processor.image_token_id).all()
    assert tokens.view[image].tolist() == [int(v) for v in views for _ in range(9)]
    assert tokens.row[image].tolist() == [0, 0, 0, 1, 1, 1, 2, 2, 2] * len(views)
    assert tokens.column[image].tolist() == [0, 1, 2] * 3 * len(views)
    for column in (tokens.view, tokens.row, tokens.column):
        assert (column[~image] == NONE).all()


def test_sentences_are_numbered_in_the_report_only(processor):
    tokens = processor.tokenize_reporting(indication="A. B.", assistant_text="One. Two! Three?")
    report = tokens.of_role(Role.REPORT)
    assert sorted(set(tokens.sentence[report].tolist())) == [0, 1, 2]
    assert (np.diff(tokens.sentence[report]) >= 0).all()
    assert (tokens.sentence[~report] == NONE).all()
    second = decoded(processor, tokens, tokens.sentence == 1)
    assert second.strip() == "Two!"


def test_missing_sections_are_boilerplate(processor):
    tokens = processor.tokenize_reporting()
    assert not tokens.of_role(Role.CLINICAL).any()
    assert MISSING in decoded(processor, tokens, tokens.of_role(Role.BOILERPLATE))


def test_prior_report_without_a_prior_film_warns(processor, caplog):
    with caplog.at_level(logging.WARNING):
        text = prompt(processor, prior_report="Old.")
    assert "PRIOR_REPORT" not in text and "prior_report is not used" in caplog.text


def test_text_may_not_hold_the_image_token(processor):
    with pytest.raises(StudyError, match="stands for a film"):
        processor.tokenize_reporting(indication="see <image>")


def test_pixels_match_the_image_processor_of_transformers(processor):
    theirs = BitImageProcessorPil(
        size={"shortest_edge": 42},
        crop_size={"height": 42, "width": 42},
        image_mean=[processor.image_mean] * 3,
        image_std=[processor.image_std] * 3,
        resample=3,
        do_convert_rgb=True,
    )
    rng = np.random.default_rng(0)
    for shape in ((48, 60), (90, 61), (42, 42), (43, 200)):
        film = Image.fromarray(rng.integers(0, 255, shape, dtype=np.uint8))
        want = theirs(images=[film], return_tensors="pt")["pixel_values"]
        torch.testing.assert_close(processor.pixel_values([film]), want, atol=1e-6, rtol=0)


def test_model_inputs_generate(model, processor):
    inputs = processor.format_and_preprocess_reporting_input(FILM, FILM, FILM, prior_report="Old.")
    assert inputs["pixel_values"].shape == (3, 3, 42, 42)
    ids = model.generate(**inputs, max_new_tokens=3, do_sample=False)
    assert ids.shape[1] == inputs["input_ids"].shape[1] + 3


def test_output_conversion_is_the_hubs_name(processor):
    assert processor.convert_output_to_plaintext_or_grounded_sequence("<obj>A.</obj>") == [
        GroundedPhrase("A.", None)
    ]
    box = processor.adjust_box_for_original_image_size((0, 0, 1, 1), 100, 100)
    assert box == (0, 0, 1, 1)


def test_tokenizer_template_is_used_when_there_is_one(tokenizer):
    template = (
        "{% for m in messages %}[{{ m['role'] }}]{% for p in m['content'] %}"
        "{{ '<image>' if p['type'] == 'image' else p['text'] }}{% endfor %}{% endfor %}"
    )
    processor = Maira2Processor(tokenizer, 42, 14)
    processor.tokenizer = type(tokenizer)(
        tokenizer_object=tokenizer.backend_tokenizer,
        bos_token="<s>",
        eos_token="</s>",
        pad_token="<pad>",
        chat_template=template,
    )
    text = prompt(processor, assistant_text="Clear.")
    assert text.startswith("[user]Given the current frontal image only<image> Provide")
    assert text.endswith("COMPARISON: N/A[assistant]Clear.")


REMOTE = '''
from transformers import BatchFeature


class Own:
    """Stands for the Hub's remote processor: same prompts, or deliberately other ones."""

    def __init__(self, ours, wrong):
        self.ours, self.wrong = ours, wrong

    def format_and_preprocess_reporting_input(self, **kwargs):
        kwargs.pop("return_tensors")
        if self.wrong:
            kwargs["indication"] = "something else"
        return self.ours.format_and_preprocess_reporting_input(**kwargs)
'''


@pytest.mark.parametrize("wrong", [False, True])
def test_prompts_are_compared_with_the_checkpoints_own_processor(checkpoint, wrong):
    scope: dict = {}
    exec(REMOTE, scope)  # a class of the shape the Hub's remote code has
    processor = load_processor(checkpoint)
    processor.hub_processor = scope["Own"](load_processor(checkpoint), wrong)
    if wrong:
        with pytest.raises(CheckpointError, match="different prompts from token"):
            processor.encode_reporting(FILM, indication="Pain.")
    else:
        assert len(processor.encode_reporting(FILM, indication="Pain.").films) == 1


def test_own_processor_that_does_not_load_is_logged(checkpoint, caplog):
    with caplog.at_level(logging.WARNING):
        processor = load_processor(checkpoint, trust_remote_code=True)
    assert processor.hub_processor is None
    assert "using ours" in caplog.text


def test_checkpoint_without_a_tokenizer(checkpoint, tmp_path):
    (tmp_path / "config.json").write_text((checkpoint / "config.json").read_text())
    with pytest.raises(CheckpointError, match="no tokenizer that loads"):
        load_processor(tmp_path)
