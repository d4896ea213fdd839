"""The Batch API against the scripted server: partial, expired and failed batches, and kills."""

import json
import os
import signal
import subprocess
import sys
import textwrap
from dataclasses import replace

import pytest
from pydantic import BaseModel

from autointerp import BatchConfig, Client, EndpointConfig, Ledger, Limits
from autointerp.batch import cut, line_of
from autointerp.job import Job
from hooks.files import ConfigError, EndpointError
from maira_sae.bench_labels import counts, questions, server_process
from maira_sae.scripted_server import Script, serving

FAST = BatchConfig(poll=0.01, longest_poll=0.05)


class Verdict(BaseModel):
    label: str


def client_of(server, folder, limits=None):
    url = server if isinstance(server, str) else server.url
    config = EndpointConfig(url, "tiny", timeout=5, backoff=0.02, limits=limits or Limits())
    return Client(config, Ledger(folder / "ledger.sqlite"))


def test_batch_and_requests_share_answers(tmp_path):
    with serving(Script(batch_seconds=0.05)) as server:
        work = questions(12)
        some = client_of(server, tmp_path).ask_all(work[::2])
        replies = client_of(server, tmp_path).ask_all([*work, work[3]], batch=FAST)
        assert replies[0:12:2] == some and replies[12] == replies[3]
        assert len({reply.text for reply in replies}) == 12
        assert server.counts["batches"] == 1 and server.asked.total() == 12
        assert client_of(server, tmp_path).ask_all(work) == replies[:12]
        assert server.asked.total() == 12


def test_files_are_cut_by_count_and_by_bytes(tmp_path):
    with serving() as server:
        items = Job(client_of(server, tmp_path), questions(10)).items
        assert [len(group) for group in cut(items, 4, 10**6)] == [4, 4, 2]
        size = max(len(line_of(item)) for item in items)
        groups = list(cut(items, 100, 3 * size))
        assert [item for group in groups for item in group] == items
        assert all(sum(len(line_of(i)) for i in g) <= 3 * size for g in groups)
        with pytest.raises(ConfigError, match="smaller or fewer images"):
            list(cut(items, 4, 100))
        client_of(server, tmp_path).ask_all(questions(10), batch=replace(FAST, max_requests=4))
        assert server.counts["uploads"] == server.counts["batches"] == 3


@pytest.mark.parametrize("end", ["expired", "enqueued"])
def test_only_what_is_unfinished_is_submitted_again(end, tmp_path):
    with serving(Script(batch_ends=(end,))) as server:
        replies = client_of(server, tmp_path).ask_all(questions(9), batch=FAST)
        assert all(reply.text for reply in replies)
        assert server.answered.total() == 9 and server.counts["repeated"] == 0
        files = [c for i, c in server.batches.contents.items() if i in {
            b["input_file_id"] for b in server.batches.batches.values()}]  # fmt: skip
        sizes = [len(content.splitlines()) for content in files]
        assert sizes == ([9, 5] if end == "expired" else [9, 4, 4, 1])


def test_a_file_that_is_turned_down_stops_with_the_reason(tmp_path):
    with serving(Script(batch_ends=("failed",))) as server:
        with pytest.raises(EndpointError, match="invalid_json_line"):
            client_of(server, tmp_path).ask_all(questions(3), batch=FAST)
        assert server.answered.total() == 0


def test_a_cancelled_batch_keeps_what_was_paid(tmp_path):
    with serving(Script(batch_ends=("cancelled",))) as server:
        with pytest.raises(EndpointError, match=r"cancelled batch-0.*4 finished") as caught:
            client_of(server, tmp_path).ask_all(questions(8), batch=FAST)
        assert caught.value.resumable
        client_of(server, tmp_path).ask_all(questions(8), batch=FAST)
        assert server.answered.total() == 8 and server.counts["repeated"] == 0


def test_lines_with_errors_are_submitted_again_until_the_rounds_end(tmp_path):
    with serving(Script(faults=0.3, kinds=("server_error",))) as server:
        client_of(server, tmp_path).ask_all(questions(20), batch=replace(FAST, max_rounds=20))
        assert server.answered.total() == 20 and server.counts["repeated"] == 0
        assert server.counts["batches"] > 1
    with serving(Script(faults=1.0, kinds=("server_error",))) as server:
        with pytest.raises(EndpointError, match=r"failed 3 of 3 .* 500"):
            client_of(server, tmp_path / "b").ask_all(questions(3), batch=FAST)
        assert server.counts["batches"] == FAST.max_rounds


def test_submitted_and_collected_in_two_runs(tmp_path):
    with serving(Script(batch_seconds=0.3)) as server:
        with pytest.raises(EndpointError, match="run again to collect") as caught:
            client_of(server, tmp_path).ask_all(questions(5), batch=FAST, wait=False)
        assert caught.value.resumable
        replies = client_of(server, tmp_path).ask_all(questions(5), batch=FAST)
        assert all(reply.text for reply in replies) and server.counts["batches"] == 1


def test_repairs_are_a_second_round(tmp_path):
    def reply(body):
        return '{"label": "effusion"}' if len(body["messages"]) > 1 else "Effusion."

    with serving(reply=reply) as server:
        work = [request._replace(schema=Verdict) for request in questions(3)]
        for _ in range(2):
            replies = client_of(server, tmp_path).ask_all(work, batch=FAST)
            assert [one.value for one in replies] == [Verdict(label="effusion")] * 3
        assert server.counts["batches"] == 2 and server.answered.total() == 6


def test_endpoints_without_schemas_are_told_in_words(tmp_path):
    with serving(Script(schemas=False), lambda body: '{"label": "x"}') as server:
        work = [request._replace(schema=Verdict) for request in questions(3)]
        replies = client_of(server, tmp_path).ask_all(work, batch=FAST)
        assert [one.value.label for one in replies] == ["x"] * 3 and server.answered.total() == 3


def test_a_ledger_that_was_lost_finds_its_batches_again(tmp_path):
    with serving() as server:
        first = client_of(server, tmp_path / "a").ask_all(questions(4), batch=FAST)
        assert client_of(server, tmp_path / "b").ask_all(questions(4), batch=FAST) == first
        assert server.counts["batches"] == 1 and server.answered.total() == 4


def test_half_the_price_and_a_budget(tmp_path):
    prices = {"price_in": 2.0, "price_out": 8.0}
    with serving() as server:
        client = client_of(server, tmp_path, Limits(**prices))
        full, half = client.estimate(questions(6)), client.estimate(questions(6), FAST)
        assert half.cost == pytest.approx(full.cost / 2) and half.requests == 6
        tight = client_of(server, tmp_path, Limits(max_cost=half.cost * 0.9, **prices))
        with pytest.raises(EndpointError, match="max_cost") as caught:
            tight.ask_all(questions(6), batch=FAST)
        assert caught.value.resumable and server.counts["uploads"] == 0
        enough = client_of(server, tmp_path, Limits(max_cost=half.cost, **prices))
        enough.ask_all(questions(6), batch=FAST)
        tokens = enough.ledger.tokens()
        assert tokens == enough.ledger.tokens(batched=True)
        assert enough.spent() == pytest.approx(Limits(**prices).cost(*tokens) / 2)


def test_the_log_lists_every_byte_that_left(tmp_path):
    with serving() as server:
        client_of(server, tmp_path).ask_all(questions(5), batch=FAST)
        lines = [json.loads(x) for x in (tmp_path / "requests.jsonl").read_text().splitlines()]
        assert len(lines) == 2 and sum(line["bytes"] for line in lines) == server.n_bytes


KILLED = """
    import os, signal, sys
    from pathlib import Path
    from autointerp import BatchConfig, Client, EndpointConfig, Ledger
    from autointerp.ledger import Ledger as L
    from maira_sae.bench_labels import questions
    import autointerp.batch, openai.resources.batches as b, openai.resources.files as f

    def die(*args, **kwargs):
        os.kill(os.getpid(), signal.SIGKILL)

    def after(owner, name):
        real = getattr(owner, name)
        def then(*args, **kwargs):
            real(*args, **kwargs)
            die()
        setattr(owner, name, then)

    where = sys.argv[3]
    if where == "upload and create": b.Batches.create = die
    if where == "create and record": L.submitted = die
    if where == "plan and upload": f.Files.create = die
    if where == "polling": after(b.Batches, "retrieve")
    if where == "collecting": L.commit = die
    if where == "commit and close": L.ended = die
    config = EndpointConfig(sys.argv[1], "tiny", backoff=0.05)
    batch = BatchConfig(poll=0.05, max_requests=8)
    client = Client(config, Ledger(Path(sys.argv[2])))
    print(sum(bool(x.text) for x in client.ask_all(questions(20), batch=batch)))
"""


@pytest.mark.parametrize(
    "where",
    [
        "plan and upload",
        "upload and create",
        "create and record",
        "polling",
        "collecting",
        "commit and close",
    ],
)
def test_killed_and_resumed_nothing_is_billed_twice(where, tmp_path):
    with server_process(Script(batch_seconds=0.05)) as url:
        command = [sys.executable, "-c", textwrap.dedent(KILLED), url]
        command += [str(tmp_path / "ledger.sqlite")]
        environment = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)}
        killed = subprocess.run([*command, where], capture_output=True, env=environment)
        assert killed.returncode == -signal.SIGKILL
        before = counts(url)
        done = subprocess.run(
            [*command, "nowhere"], capture_output=True, text=True, check=True, env=environment
        )
        told = counts(url)
    assert int(done.stdout) == 20
    assert told["batches"] == told["uploads"] == 3
    assert told["answered"] == len(told["keys"]) == 20 and told["repeated"] == 0
    assert before["batches"] == {"plan and upload": 0, "upload and create": 0}.get(
        where, 1 if where == "create and record" else 3
    )
