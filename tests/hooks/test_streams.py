"""Threads that share parts, and batches of like length."""

import threading
import weakref
from types import SimpleNamespace

import numpy as np
import pytest
import torch

import hooks.rows as rows_module
from hooks.batches import PASS_TOKENS, length_batches
from hooks.generation import Decoding, generation_job
from hooks.harvest import Harvest, HarvestConfig
from hooks.processor import CHAT_TEMPLATE, render_own, reporting_pieces
from hooks.roles import Piece, Role
from hooks.sites import capture, resolve_sites
from hooks.streams import default_streams, in_threads, shared_cores


def cost(lengths, batches):
    return sum(len(b) * max(lengths[i] for i in b) + PASS_TOKENS for b in batches)


def greedy(lengths, most):
    """Fill each batch until the next would be too much."""
    batches = [[]]
    for i in sorted(range(len(lengths)), key=lengths.__getitem__):
        if batches[-1] and (len(batches[-1]) + 1) * lengths[i] > most:
            batches.append([])
        batches[-1].append(i)
    return batches


def every_cut(lengths, most):
    """The least cost of all ways to cut the sorted lengths."""
    order = sorted(range(len(lengths)), key=lengths.__getitem__)
    best = float("inf")
    for cuts in range(1 << (len(order) - 1)):
        batches = [[order[0]]]
        for place, i in enumerate(order[1:]):
            if cuts >> place & 1:
                batches.append([])
            batches[-1].append(i)
        if all(len(b) == 1 or len(b) * max(lengths[i] for i in b) <= most for b in batches):
            best = min(best, cost(lengths, batches))
    return best


@pytest.mark.parametrize("seed", range(5))
def test_batches_cost_least(seed):
    rng = np.random.default_rng(seed)
    lengths = rng.integers(1, 900, 9).tolist()
    assert cost(lengths, length_batches(lengths, 1500)) == every_cut(lengths, 1500)
    many = rng.integers(1, 3000, 300).tolist()
    batches = length_batches(many, 2048)
    assert sorted(i for batch in batches for i in batch) == list(range(300))
    assert all(len(b) == 1 or len(b) * max(many[i] for i in b) <= 2048 for b in batches)
    assert cost(many, batches) <= cost(many, greedy(many, 2048))


def test_no_sequences_no_batches():
    assert length_batches([], 100) == []


def test_threads_do_every_item_once_at_a_time():
    meeting, seen = threading.Barrier(2, timeout=10), []

    def work(item):
        if item < 2:
            meeting.wait()  # only together
        seen.append(item)

    assert sorted(in_threads(range(7), work, 2)) == sorted(seen) == list(range(7))


def test_an_error_in_a_thread_is_raised_after_the_others_have_finished():
    begun, finished = threading.Event(), []

    def work(item):
        if item == 0:
            begun.wait(10)
            raise ZeroDivisionError
        begun.set()
        threading.Event().wait(0.05)
        finished.append(item)

    with pytest.raises(ZeroDivisionError):
        list(in_threads(range(20), work, 2))
    assert finished and len(finished) < 19
    assert not [t for t in threading.enumerate() if t.name.startswith("stream-")]


def test_cores_are_shared_and_given_back():
    before = torch.get_num_threads()
    with pytest.raises(ZeroDivisionError), shared_cores(2):
        assert torch.get_num_threads() == max(1, before // 2)
        raise ZeroDivisionError
    assert torch.get_num_threads() == before


def test_streams_where_a_pass_changes_nothing():
    def model(device="cpu", **config):
        text = SimpleNamespace(rope_parameters=config)
        return SimpleNamespace(
            device=torch.device(device), config=SimpleNamespace(text_config=text)
        )

    assert default_streams(model(rope_type="linear")) == min(torch.get_num_threads(), 4)
    assert default_streams(model(rope_type="dynamic")) == 1
    assert default_streams(model("cuda")) == 1
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert default_streams(model()) == 1


def test_threads_capture_of_one_model_at_the_same_time(model):
    """Each gets the values of its own passes, and a pass of nobody is left alone."""
    sites = resolve_sites(model, ["llm.0.resid_post", "llm.1.resid_post"])
    prompts = [torch.full((1, 40 + i), 7 + i) for i in range(6)]
    core = model.model.language_model

    def captured(ids):
        with torch.no_grad(), capture(sites) as run:
            return run(core, input_ids=ids)

    want = [captured(ids) for ids in prompts]
    found = {}
    with capture(sites):  # of a thread that runs nothing
        for _ in range(3):
            for _ in in_threads(range(6), lambda i: found.__setitem__(i, captured(prompts[i])), 3):
                pass
            for i, values in enumerate(want):
                assert all(torch.equal(found[i][name], value) for name, value in values.items())
        with torch.no_grad():
            assert core(input_ids=prompts[0]).last_hidden_state.shape[1] == 40


@pytest.mark.parametrize("report", [None, "Lungs are clear.\n "])
def test_the_own_template_is_rendered_as_the_engine_does(tokenizer, report):
    pieces = reporting_pieces(
        has_lateral=True,
        has_prior=True,
        indication=" Cough & {{ fever }}. ",
        technique=None,
        comparison="None",
        prior_report="Clear.\n",
        grounded=True,
    )
    turns = [pieces] if report is None else [pieces, [Piece(report, Role.REPORT)]]
    messages = [
        {
            "role": name,
            "content": [
                {"type": "image" if piece.view is not None else "text", "text": piece.text}
                for piece in turn
            ],
        }
        for name, turn in zip(("user", "assistant"), turns, strict=False)
    ]
    want = tokenizer.apply_chat_template(
        messages,
        chat_template=CHAT_TEMPLATE,
        add_generation_prompt=report is None,
        tokenize=False,
    )
    assert render_own(turns, tokenizer.eos_token) == want


@pytest.mark.parametrize("leaks", [False, True])
def test_memory_does_not_grow_with_the_studies(
    model, processor, studies, tmp_path, monkeypatch, leaks
):
    """Rows alive at a time are those of four parts; a harvest that keeps them is noticed."""
    real_rows, refs, kept, most = rows_module.part_rows, [], [], [0]

    def rows(*args):
        found = real_rows(*args)
        refs.extend(weakref.ref(x) for one in found for x in one.activations.values())
        most[0] = max(most[0], sum(ref() is not None for ref in refs))
        if leaks:
            kept.extend(found)
        return found

    monkeypatch.setattr(rows_module, "part_rows", rows)
    many = [s.model_copy(update={"id": f"{s.id}-{k}"}) for k in range(10) for s in studies]
    config = HarvestConfig(("llm.1.resid_post",), studies_per_part=4)
    job = Harvest(model, processor, many, config, tmp_path / "acts")
    job.streams = 2
    job.run()
    assert len(refs) == len(many) == 240
    assert most[0] == 240 if leaks else 0 < most[0] <= (2 + 2) * 4
    assert leaks or not any(ref() is not None for ref in refs)


def test_streams_write_reports_as_one_does(model, processor, studies, tmp_path):
    config = HarvestConfig(("llm.1.resid_post",), studies_per_part=2)
    folders = []
    for streams in (1, 3):
        out = tmp_path / str(streams)
        job = generation_job(model, processor, studies[:8], config, out, Decoding(4))
        job.streams = streams
        folders.append({p.name: p.read_bytes() for p in job.run().folder.iterdir()})
    assert folders[0] == folders[1]
