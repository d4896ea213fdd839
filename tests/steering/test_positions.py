"""Positions mean the same in prefill, cache, padding, batches and beams; nothing is left behind."""

import copy
from contextlib import ExitStack

import numpy as np
import pytest
import torch

from hooks.files import ConfigError
from hooks.generation import report_tokens
from hooks.grounding import Box
from hooks.maira2 import load_model
from hooks.prompts import PromptRunner
from hooks.roles import Role, View
from hooks.sites import observe, resolve_site
from phantom.corpus import grey, normalised
from phantom.model import load
from phantom.study import sample_study
from sae import MatryoshkaSAE, SAEConfig
from steering import Edit, Positions, Push, compare, steered
from steering.positions import Row, section_of, sentence_of_last

SITE = "llm.1.resid_post"
EDIT = [Edit(4, 20.0, 1.0)]
SHORTEST = 147
"""Tokens of the shortest prompt."""


def dictionary(site, width=32, seed=3):
    sae = MatryoshkaSAE(SAEConfig(width, 64, 4, (64,), site=site), seed=seed)
    sae.threshold.fill_(0.2)
    return sae.eval()


@pytest.fixture(scope="module")
def sae():
    return dictionary(SITE)


@pytest.fixture(scope="module")
def prompts(model, processor, studies):
    """Three studies whose prompts differ in length: films 1, 3 and 1."""
    chosen = [studies[0], studies[1], studies[2].model_copy(update={"indication": "Cough."})]
    runner = PromptRunner(model, processor, 10_000)
    bare = [study.model_copy(update={"report": None}) for study in chosen]
    return [runner.prompt(i, study) for i, study in enumerate(bare)]


def batch_of(model, processor, prompts, side):
    longest = max(len(prompt.tokens) for prompt in prompts)
    ids = torch.zeros(len(prompts), longest, dtype=torch.long)
    mask = torch.zeros_like(ids)
    for i, prompt in enumerate(prompts):
        n = len(prompt.tokens)
        own = slice(longest - n, None) if side == "left" else slice(n)
        ids[i, own] = torch.from_numpy(prompt.tokens.ids)
        mask[i, own] = 1
    runner = PromptRunner(model, processor, 10_000)
    pixels = runner.films([film for prompt in prompts for film in prompt.study.films()])
    return {"input_ids": ids, "attention_mask": mask, "pixel_values": pixels}


def at(prompts, processor):
    return {"tokens": [p.tokens for p in prompts], "tokenizer": processor.tokenizer}


def changed_at(model, site, inputs, **settings):
    """Which tokens of the site an edit changes in one forward pass, and that others stay."""
    seen = []
    with observe(resolve_site(model, site), seen.append):
        model(**inputs)
        with steered(model, **settings):
            pass
        with ExitStack() as stack:
            # The observer was registered first, and a rewrite goes before it.
            stack.enter_context(steered(model, **settings))
            model(**inputs)
    return (seen[0] != seen[1]).any(-1)


WHERE = [
    Positions(roles=(Role.IMAGE,)),
    Positions(view=View.FRONTAL, box=Box(0.0, 0.0, 0.5, 0.4)),
    Positions(sections=("indication",)),
    Positions(roles=(Role.BOILERPLATE, Role.CLINICAL), window=(3, 60)),
    Positions(window=(2, 5)),
    "prompt",
]


@torch.no_grad()
@pytest.mark.parametrize("where", WHERE, ids=str)
@pytest.mark.parametrize("side", ["left", "right"])
def test_exactly_the_chosen_tokens_change(model, processor, sae, prompts, where, side):
    inputs = batch_of(model, processor, prompts, side)
    edits = [Push(torch.ones(32), 1.0, 5.0)]  # seen wherever it acts
    got = changed_at(
        model, SITE, inputs, sae=sae, edits=edits, where=where, **at(prompts, processor)
    )
    for i, prompt in enumerate(prompts):
        tokens, n = prompt.tokens, len(prompt.tokens)
        want = np.ones(n, dtype=bool)
        if where != "prompt":
            place = np.arange(n)
            if where.roles:
                want &= np.isin(tokens.role, where.roles)
            if where.view is not None:
                want &= (tokens.view == 0) & (tokens.row <= 1) & (tokens.column <= 1)
            if where.sections:
                text = processor.tokenizer.decode(tokens.ids[tokens.role == Role.CLINICAL])
                assert text.strip().startswith((prompt.study.indication, "Clear."))
                want &= section_of(tokens, processor.tokenizer) == "indication"
                said = processor.tokenizer.decode(tokens.ids[want]).strip()
                assert said == prompt.study.indication
            if where.window:
                want &= (place >= where.window[0]) & (place < where.window[1])
        assert want.sum() > 0
        real = inputs["attention_mask"][i].bool()
        assert got[i][real].numpy().tolist() == want.tolist()


@torch.no_grad()
@pytest.mark.parametrize("where", [*WHERE, "all"], ids=str)
def test_left_right_and_no_padding_are_equal(model, processor, sae, prompts, where):
    rows = [[Edit(4, 20.0, 1.0)], [Edit(9, 3.0, 1.0, "minimum"), Edit(5, mode="ablate")], []]
    logits = {}
    for side in ("left", "right"):
        inputs = batch_of(model, processor, prompts, side)
        with steered(model, sae, rows, where, **at(prompts, processor)):
            out = model(**inputs).logits
        logits[side] = [
            own[mask.bool()] for own, mask in zip(out, inputs["attention_mask"], strict=True)
        ]
    for i, prompt in enumerate(prompts):
        inputs = batch_of(model, processor, [prompt], "left")
        with steered(model, sae, rows[i], where, **at([prompt], processor)):
            alone = model(**inputs).logits[0]
        for side in ("left", "right"):
            torch.testing.assert_close(logits[side][i], alone, atol=1e-5, rtol=1e-5)


LATER = [
    *("all", "generated", "prompt"),
    Positions(sentences=(0,)),
    Positions(sentences=(1,), generated=True),
    Positions(roles=(Role.REPORT,)),
    Positions(generated=True, window=(0, SHORTEST + 3)),
]


def written(model, inputs, **settings):
    out = model.generate(
        **inputs,
        **{"max_new_tokens": 7, "do_sample": False, "eos_token_id": None, "pad_token_id": 0}
        | settings,
        output_logits=True,
        return_dict_in_generate=True,
    )
    return out.sequences, torch.stack(out.logits, 1)


@torch.no_grad()
@pytest.mark.parametrize("where", LATER, ids=str)
def test_cache_off_batches_and_single_rows_are_equal(model, processor, sae, prompts, where):
    assert min(len(prompt.tokens) for prompt in prompts) == SHORTEST
    rows = [[Edit(4, 20.0, 1.0)], [Edit(9, 30.0, 1.0, "clamp")], [Edit(2, 9.0, 1.0)]]
    inputs = batch_of(model, processor, prompts, "left")
    length = inputs["input_ids"].shape[1]
    with steered(model, sae, rows, where, length, **at(prompts, processor)):
        ids, logits = written(model, inputs)
        plain_ids, plain_logits = written(model, inputs, use_cache=False)
    assert torch.equal(ids, plain_ids)
    torch.testing.assert_close(logits, plain_logits, atol=1e-5, rtol=1e-5)
    unsteered = written(model, inputs)[1]
    if where != Positions(sentences=(1,), generated=True):  # a random model ends no sentence
        assert not torch.allclose(unsteered, logits, atol=1e-2)
    for i, prompt in enumerate(prompts):
        own = batch_of(model, processor, [prompt], "left")
        with steered(model, sae, rows[i], where, **at([prompt], processor)):
            alone, alone_logits = written(model, own)
        assert torch.equal(alone[0, len(prompt.tokens) :], ids[i, length:])
        torch.testing.assert_close(alone_logits[0], logits[i], atol=1e-5, rtol=1e-5)


@torch.no_grad()
@pytest.mark.parametrize("where", ["all", Positions(sentences=(0,), generated=True)], ids=str)
@pytest.mark.parametrize("how", ["beam", "sample"])
def test_beams_and_samples_take_their_rows_edits(model, processor, sae, prompts, where, how):
    alike = [prompts[0], prompts[2]]  # one film each: transformers mixes the films of beams
    rows = [[Edit(4, 20.0, 1.0)], [Edit(9, 30.0, 1.0, "clamp")]]
    inputs = batch_of(model, processor, alike, "left")
    settings = {
        "beam": {"num_beams": 3},
        "sample": {"do_sample": True, "num_return_sequences": 3, "top_k": 0},
    }[how]

    def run(**more):
        torch.manual_seed(0)
        return written(model, inputs, **settings, **more)[0]

    with steered(model, sae, rows, where, inputs["input_ids"].shape[1], **at(alike, processor)):
        cached, whole = run(), run(use_cache=False)
    assert torch.equal(cached, whole)
    assert not torch.equal(cached, run())
    if how == "beam":
        for i, prompt in enumerate(alike):
            own = batch_of(model, processor, [prompt], "left")
            with steered(model, sae, rows[i], where, **at([prompt], processor)):
                alone = written(model, own, num_beams=3)[0]
            assert torch.equal(alone[0, len(prompt.tokens) :], cached[i, -7:])


@torch.no_grad()
@pytest.mark.parametrize("site", ["vision.0.resid_post", "projector"])
def test_patches_at_a_site_of_films(model, processor, prompts, site):
    sae = dictionary(site, 24 if site.startswith("vision") else 32)
    inputs = batch_of(model, processor, prompts, "left")
    where = Positions(view=View.FRONTAL, box=Box(0.4, 0.0, 0.6, 0.3))
    rows = [[Push(torch.ones(sae.config.d_model), 1.0, 5.0)], [], [Edit(1, 9.0, 1.0)]]
    got = changed_at(
        model, site, inputs, sae=sae, edits=rows, where=where, **at(prompts, processor)
    )
    films = [view for p in prompts for view in range(len(p.study.films()))]
    cls = got.shape[1] - 9
    want = torch.zeros_like(got)
    want[0, cls + 1] = want[len(films) - 1, cls + 1] = True  # row 0, column 1 of 3
    assert torch.equal(got, want)
    everywhere = changed_at(model, site, inputs, sae=sae, edits=rows[0])
    assert everywhere.all()
    with (
        pytest.raises(ConfigError, match="sees films only"),
        steered(model, sae, rows[0], "generated", 3),
    ):
        pass
    with pytest.raises(ConfigError, match="give `tokens`"), steered(model, sae, rows):
        pass


def test_sentences_of_generated_tokens_are_those_of_the_roles(processor):
    text = "The heart is enlarged. No pneumothorax! Is 3.5 cm. <obj> A nodule.<box>"
    ids = processor.tokenizer(text, add_special_tokens=False)["input_ids"]
    tokens, _ = report_tokens(processor, ids)
    found = [sentence_of_last(processor.tokenizer, ids[: i + 1]) for i in range(len(ids))]
    assert found == tokens.sentence.tolist() and max(found) == 4


@torch.no_grad()
def test_given_and_generated_sentences_are_one_report(model, processor, studies, sae):
    """Tokens that are taught, and the same tokens as if they were generated."""
    study = studies[0]
    whole = processor.tokenize_reporting(indication=study.indication, assistant_text=study.report)
    cut = int(np.flatnonzero(whole.role == Role.REPORT)[0])
    for where in (Positions(sentences=(1,)), Positions(roles=(Role.REPORT,), sentences=(0, 2))):
        taught = Row(where, whole, None, processor.tokenizer)
        row = Row(where, whole.take(slice(cut)), None, processor.tokenizer)
        written = whole.role == Role.REPORT
        want = taught.mask(0, len(whole), 0, None)
        got = row.mask(0, len(whole), 0, whole.ids.tolist())
        assert want.any() and got[written].tolist() == want[written].tolist()


@torch.no_grad()
def test_the_second_sentence_of_a_model_that_ends_its_sentences():
    """The phantom's model, in float64: the first sentence stays bitwise, the second is steered."""
    mini, words = load()
    mini = copy.deepcopy(mini).double()
    study = sample_study(3, lateral=False, prior=False)
    tokens = words.tokenize_reporting(indication="trauma .", technique="", comparison="none .")
    ids = torch.from_numpy(tokens.ids)[None]
    inputs = {
        "input_ids": ids,
        "attention_mask": torch.ones_like(ids),
        "pixel_values": normalised(np.stack([grey(study.frontal)]), words).double(),
    }
    width = mini.config.text_config.hidden_size
    sae = MatryoshkaSAE(SAEConfig(width, 8, 1, (8,), site="llm.3.resid_post"), seed=0)
    push = [Push(torch.ones(width), 1.0, 40.0)]
    where = Positions(sentences=(1,), generated=True)
    known = {"tokens": tokens, "tokenizer": words.tokenizer}
    plain_ids, plain = written(mini, inputs, max_new_tokens=16)
    with steered(mini, sae, push, where, **known):
        ids_on, on = written(mini, inputs, max_new_tokens=16)
        ids_off, off = written(mini, inputs, max_new_tokens=16, use_cache=False)
    stop = words.tokenizer.convert_tokens_to_ids(".")
    first = int((plain_ids[0, len(tokens) :] == stop).nonzero()[0])
    # The full stop belongs to the first sentence; the token after it is the first that is edited,
    # so the logits after that one are the first to change.
    assert torch.equal(on[:, : first + 2], plain[:, : first + 2])
    assert (on[:, first + 2] - plain[:, first + 2]).abs().max() > 1e-2
    assert torch.equal(ids_on, ids_off)
    torch.testing.assert_close(on, off, atol=1e-9, rtol=0)


@torch.no_grad()
@pytest.mark.parametrize("where", [*LATER, WHERE[0]], ids=str)
def test_nothing_is_bitwise_nothing_and_nothing_is_left(model, processor, sae, prompts, where):
    inputs = batch_of(model, processor, prompts, "left")
    length = inputs["input_ids"].shape[1]
    plain = written(model, inputs)
    for nothing in ([], [[], [], []], [Edit(4, 1.0, mode="scale")]):
        with steered(model, sae, nothing, where, length, **at(prompts, processor)):
            empty = written(model, inputs)
        assert torch.equal(plain[0], empty[0]) and torch.equal(plain[1], empty[1])
    attributes = set(vars(model))
    hooks = hooks_of(model)

    def fail(*_):
        raise KeyError

    with (
        pytest.raises(KeyError),
        steered(model, sae, EDIT, where, length, **at(prompts, processor)),
    ):
        model.generate(**inputs, max_new_tokens=9, stopping_criteria=[fail])
    assert hooks_of(model) == hooks and set(vars(model)) == attributes
    assert torch.equal(written(model, inputs)[1], plain[1])


def hooks_of(model):
    return sum(len(m._forward_hooks) + len(m._forward_pre_hooks) for m in model.modules())


@torch.no_grad()
def test_several_models_at_once_do_not_interfere(model, checkpoint, processor, sae, prompts):
    other = load_model(checkpoint)
    inputs = batch_of(model, processor, prompts, "left")
    length = inputs["input_ids"].shape[1]
    where = Positions(sentences=(0,), generated=True)
    ways = [(model, EDIT, where), (other, [Edit(9, 30.0, 1.0, "clamp")], "generated")]
    alone = []
    for one, edits, place in ways:
        with steered(one, sae, edits, place, length, **at(prompts, processor)):
            alone.append(written(one, inputs))
    with ExitStack() as stack:
        for one, edits, place in ways:
            stack.enter_context(steered(one, sae, edits, place, length, **at(prompts, processor)))
        for i in (1, 0):
            both = written(ways[i][0], inputs)
            assert torch.equal(both[1], alone[i][1])
    assert not torch.equal(alone[0][1], alone[1][1])


@torch.no_grad()
def test_nested_contexts_add_up(model, processor, sae, prompts):
    inputs = batch_of(model, processor, prompts, "left")
    length = inputs["input_ids"].shape[1]
    a, b = Push(torch.randn(32), 1.0, 4.0), Push(torch.randn(32), 1.0, 4.0)
    known = at(prompts, processor)
    first, second = Positions(sentences=(0,), generated=True), Positions(roles=(Role.IMAGE,))

    def one(push, where):
        return steered(model, sae, [push], where, length, **known)

    with one(a, first), one(b, second):
        nested = written(model, inputs)[1]
    with one(b, second), one(a, first):
        torch.testing.assert_close(written(model, inputs)[1], nested, atol=1e-5, rtol=1e-5)
    with one(a, first):
        assert not torch.allclose(written(model, inputs)[1], nested, atol=1e-3)


def test_compare_takes_positions(model, processor, studies, sae):
    study, strong = studies[0], [Edit(4, 200.0, 1.0)]
    settings = {"opening": "The heart", "max_new_tokens": 6}
    box = Positions(view=View.FRONTAL, box=Box(0, 0, 1, 1))
    texts = compare(model, processor, study, sae, strong, where=box, **settings)
    assert texts.before != texts.after
    settings["opening"] = "Lungs are clear. No"
    second = Positions(generated=True, sentences=(1,))
    texts = compare(model, processor, study, sae, strong, where=second, **settings)
    assert texts.before != texts.after
    late = Positions(generated=True, sentences=(0, 40))
    texts = compare(model, processor, study, sae, strong, where=late, **settings)
    assert texts.before == texts.after


@torch.no_grad()
def test_refusals(model, processor, studies, sae, prompts):
    known = at(prompts, processor)
    inputs = batch_of(model, processor, prompts, "left")

    def refused(message, *args, run=False, **settings):
        with pytest.raises(ConfigError, match=message), steered(model, sae, *args, **settings):
            assert run
            model(**inputs)

    refused("needs to know the prompt", EDIT, Positions(view=View.FRONTAL))
    refused("where the prompt ends", EDIT, "generated")
    refused("give `tokenizer`", EDIT, Positions(sentences=(1,)), 5)
    refused("has no technique; it has", EDIT, Positions(sections=("technique",)), **known)
    refused("chooses nothing", EDIT, Positions(view=View.LATERAL), tokens=prompts[0].tokens)
    refused("positions are given for 2 rows, others for 3", EDIT, ["all"] * 2, **known)
    refused("did you mean 'prompt'", EDIT, "promt")
    refused("are mixed", [*EDIT, EDIT])
    refused("edits are given for 2 rows and the model runs 3", [EDIT, []], run=True)
    wrong = {**known, "tokens": known["tokens"][::-1]}
    refused(
        "row 0 of the batch has other tokens", EDIT, Positions(window=(0, 4)), run=True, **wrong
    )
    with pytest.raises(ConfigError, match="is no box"):
        Positions(box=Box(0.5, 0.0, 0.5, 1.0))
    with pytest.raises(ConfigError, match="holds no position"):
        Positions(window=(4, 4))
    with pytest.raises(ConfigError, match="did you mean 'indication'"):
        Positions(sections=("indicaton",))
    with pytest.raises(ConfigError, match="counted from 0"):
        Positions(sentences=(-1,))
