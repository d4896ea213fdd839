"""Labelling jobs against the scripted server: faults, limits, kills, and what left the machine."""

import asyncio
import json
import os
import signal
import sqlite3
import subprocess
import sys
import textwrap
import threading
import time
from contextlib import closing
from email.utils import formatdate

import pytest
from pydantic import BaseModel

from autointerp import Client, EndpointConfig, Ledger, Limits
from autointerp.limits import Budget
from hooks.files import ConfigError, EndpointError, FolderError
from maira_sae.bench_labels import LabelsBench, counts, questions, run, server_process
from maira_sae.scripted_server import FAULTS, Script, serving


class Verdict(BaseModel):
    label: str
    sure: bool


def client_of(server, folder, limits=None, **kwargs):
    kwargs = {"timeout": 5, "backoff": 0.02, **kwargs}
    config = EndpointConfig(server.url, "tiny", limits=limits or Limits(), **kwargs)
    return Client(config, Ledger(folder / "ledger.sqlite"))


def sent_lines(folder):
    return [json.loads(line) for line in (folder / "requests.jsonl").read_text().splitlines()]


def test_replies_keep_their_order_and_only_what_is_missing_is_sent(tmp_path):
    with serving(Script(latency=0.02)) as server:
        work = questions(20)
        some = client_of(server, tmp_path).ask_all(work[::2])
        everything = client_of(server, tmp_path).ask_all([*work, work[3]])
        assert everything[0:20:2] == some and everything[20] == everything[3]
        assert len({reply.text for reply in everything}) == 20
        assert server.asked.total() == 20 and set(server.asked.values()) == {1}
        assert server.most_open == 10


@pytest.mark.parametrize("fault", FAULTS)
def test_every_fault_is_retried_until_an_answer_comes(fault, tmp_path):
    with serving(Script(first=(fault, fault))) as server:
        replies = client_of(server, tmp_path).ask_all(questions(3))
        assert all(reply.text.startswith("answer") for reply in replies)
        assert server.asked.total() == 5 and server.counts["repeated"] == 0


def test_retries_end_and_the_rest_is_kept(tmp_path):
    script = Script(first=("ok", "server_error", "server_error"))
    with serving(script) as server:
        client = client_of(server, tmp_path, Limits(concurrency=1), max_retries=0)
        with pytest.raises(EndpointError, match=r"failed 2 of 3 requests.* 500.*1 finished") as e:
            client.ask_all(questions(3))
        assert e.value.resumable and "\n" not in str(e.value)
        assert len(client.ask_all(questions(3))) == 3
        assert server.counts["repeated"] == 0 and server.asked.total() == 5


def test_a_dead_endpoint_does_not_hold_the_job_through_every_request(tmp_path):
    with serving(Script(faults=1.0, kinds=("server_error",))) as server:
        client = client_of(server, tmp_path, Limits(concurrency=4), max_retries=1)
        with pytest.raises(EndpointError, match="keeps failing"):
            client.ask_all(questions(200))
        assert server.asked.total() < 60


@pytest.mark.parametrize("fault", ["server_error", "malformed", "truncated", "drop"])
def test_what_says_nothing_about_load_is_sent_again_at_once_while_others_are_answered(
    fault, tmp_path
):
    """Three faults of one request, with answers between: pauses would be 30 s and more."""
    script = Script(first=(fault, "ok", fault, "ok", fault))
    with serving(script) as server:
        client = client_of(server, tmp_path, Limits(concurrency=1), backoff=30.0)
        start = time.monotonic()
        assert len(client.ask_all(questions(4))) == 4
        assert time.monotonic() - start < 5 and server.asked.total() == 7


def test_an_endpoint_that_answers_nobody_is_given_pauses(tmp_path):
    """All meet a fault at the same moment: all but a few wait."""
    script = Script(first=("server_error",) * 16)
    with serving(script) as server:
        client = client_of(server, tmp_path, Limits(concurrency=16), backoff=1.0)
        start = time.monotonic()
        assert len(client.ask_all(questions(16))) == 16
        assert time.monotonic() - start > 0.5  # the least of a pause of 1 s


def test_a_wrong_key_stops_the_job_at_once(tmp_path):
    with serving(Script(faults=1.0, kinds=("unauthorized",))) as server:
        with pytest.raises(EndpointError, match="401"):
            client_of(server, tmp_path, Limits(concurrency=2)).ask_all(questions(50))
        assert server.asked.total() <= 2


@pytest.mark.parametrize(
    ("script", "least"),
    [
        (Script(first=("rate_limit",), retry_after_ms=300), 0.3),
        (Script(first=("rate_limit",), retry_after_ms=None, retry_after="1"), 1.0),
        (Script(first=("rate_limit",), retry_after_ms=None, retry_after="date"), 1.0),
    ],
)
def test_a_server_that_names_a_pause_gets_it(script, least, tmp_path):
    if script.retry_after == "date":
        script = Script(
            first=script.first, retry_after_ms=None, retry_after=formatdate(time.time() + 2)
        )
    with serving(script) as server:
        start = time.monotonic()
        client_of(server, tmp_path, backoff=0.0).ask_all(questions(1))
        assert least * 0.99 <= time.monotonic() - start < least + 2


def test_a_pause_of_one_request_does_not_hold_another(tmp_path):
    script = Script(first=("rate_limit",), retry_after_ms=600)
    with serving(script) as server:
        client_of(server, tmp_path, Limits(concurrency=1)).ask_all(questions(3))
        assert [b["messages"][0]["content"][:9] for b in server.bodies] == [
            "Latent 0.",
            "Latent 1.",
            "Latent 2.",
            "Latent 0.",
        ]


def test_requests_and_tokens_are_paced(tmp_path):
    with serving() as server:
        start = time.monotonic()
        client_of(server, tmp_path, Limits(requests_per_minute=600)).ask_all(questions(18))
        assert time.monotonic() - start > 0.7  # 10 at once, then 8 at 10/s
        tokens = client_of(server, tmp_path).estimate(questions(30)[18:])
        per_second = (tokens.tokens_in + tokens.tokens_out) / 2
        start = time.monotonic()
        limits = Limits(tokens_per_minute=60 * per_second)
        client_of(server, tmp_path, limits).ask_all(questions(30)[18:])
        assert 0.8 < time.monotonic() - start < 4


def test_estimate_counts_what_is_missing_and_bounds_the_cost(tmp_path):
    limits = Limits(price_in=2.0, price_out=8.0)
    with serving() as server:
        client = client_of(server, tmp_path, limits)
        client.ask_all(questions(4))
        left = client.estimate(questions(10))
        assert left.requests == 6 and left.kept == 4 and left.tokens_out == 6 * 24
        text = questions(5)[4].messages[0]["content"]
        assert left.tokens_in == 6 * (4 + -(-len(text) // 4))
        assert left.cost == pytest.approx((left.tokens_in * 2 + left.tokens_out * 8) / 1e6)
        spent = client.budget.spent
        client.ask_all(questions(10))
        assert client.budget.spent - spent <= left.cost
        assert client_of(server, tmp_path, limits).budget.spent == pytest.approx(
            client.budget.spent
        )
        counted = Client(client.config, Ledger(tmp_path / "other.sqlite"), count=lambda text: 7)
        assert counted.estimate(questions(2)).tokens_in == 2 * (4 + 7)


def test_budget_stops_cleanly_and_a_higher_one_goes_on(tmp_path):
    prices = {"price_in": 1.0, "price_out": 1.0, "concurrency": 4}
    with serving(Script(latency=0.01)) as server:
        client = client_of(server, tmp_path, Limits(**prices))
        whole = client.estimate(questions(40)).cost
        limits = Limits(max_cost=whole / 2, **prices)
        with pytest.raises(
            EndpointError, match=r"max_cost .* finished requests are kept"
        ) as caught:
            client_of(server, tmp_path, limits).ask_all(questions(40))
        assert caught.value.resumable
        kept = len(Ledger(tmp_path / "ledger.sqlite"))
        assert 10 < kept < 40
        spent = client_of(server, tmp_path, Limits(**prices)).budget.spent
        assert 0.4 * whole < spent <= whole / 2
        again = client_of(server, tmp_path, limits)
        with pytest.raises(EndpointError, match="max_cost"):
            again.ask_all(questions(40))
        client_of(server, tmp_path, Limits(max_cost=whole, **prices)).ask_all(questions(40))
        assert server.counts["repeated"] == 0 and server.answered.total() == 40


def test_max_requests_counts_retries(tmp_path):
    with serving(Script(first=("server_error",) * 3)) as server:
        client = client_of(server, tmp_path, Limits(max_requests=5, concurrency=2))
        with pytest.raises(EndpointError, match="max_requests") as caught:
            client.ask_all(questions(9))
        assert server.asked.total() == 5 and caught.value.resumable


def test_limits_that_make_no_sense():
    with pytest.raises(ConfigError, match="needs prices"):
        Limits(max_cost=1.0)
    with pytest.raises(ConfigError, match="only one price"):
        Limits(price_in=1.0)
    with pytest.raises(ConfigError, match="concurrency is 0"):
        Limits(concurrency=0)
    with pytest.raises(ConfigError, match="positive rate"):
        Limits(requests_per_minute=0)


def test_a_failure_that_cost_nothing_gives_its_share_back():
    budget = Budget(Limits(price_in=1.0, price_out=1.0, max_cost=15e-6), (0, 0))
    assert budget.refusal(5, 5) is None
    assert "max_cost" in budget.refusal(5, 5)
    budget.settle((5, 5), (0, 0))
    assert budget.refusal(5, 5) is None


def test_refusals_are_kept_and_not_asked_again(tmp_path):
    with serving(Script(first=("refusal",))) as server:
        client = client_of(server, tmp_path)
        for _ in range(2):
            [reply] = client.ask_all(questions(1))
            assert reply.refused and reply.text == ""
        assert server.asked.total() == 1


def test_a_reply_is_read_by_its_schema(tmp_path):
    with serving(reply=lambda body: '{"label": "effusion", "sure": true}') as server:
        request = questions(1)[0]._replace(schema=Verdict)
        [reply] = client_of(server, tmp_path).ask_all([request])
        assert reply.value == Verdict(label="effusion", sure=True)
        asked = server.bodies[0]["response_format"]["json_schema"]
        assert asked["strict"] and asked["schema"]["additionalProperties"] is False
        assert asked["schema"]["required"] == ["label", "sure"]


def test_an_unreadable_reply_is_repaired_once_and_paid_once(tmp_path):
    def reply(body):
        repairing = len(body["messages"]) > 1
        good = "effusion" if "Latent 0." in body["messages"][0]["content"] else 3
        return json.dumps({"label": good, "sure": False}) if repairing else "Effusion, I think."

    with serving(reply=reply) as server:
        work = [request._replace(schema=Verdict) for request in questions(2)]
        for _ in range(2):  # the second time from the ledger alone
            good, bad = client_of(server, tmp_path).ask_all(work)
            assert good.value == Verdict(label="effusion", sure=False) and bad.value is None
            assert server.asked.total() == 4
        assert "Answer with the JSON object only" in server.bodies[-1]["messages"][-1]["content"]


def test_endpoints_without_schemas_are_told_in_words(tmp_path):
    def reply(body):
        assert "response_format" not in body and "additionalProperties" in str(body["messages"])
        return '```json\n{"label": "effusion", "sure": true}\n```'

    with serving(Script(schemas=False), reply) as server:
        work = [request._replace(schema=Verdict) for request in questions(3)]
        for _ in range(2):
            client = client_of(server, tmp_path, Limits(concurrency=1))
            replies = client.ask_all(work)
            assert [reply.value.label for reply in replies] == ["effusion"] * 3
            assert client.no_schema
        # One request a run was turned down, free of charge; each answer was paid once.
        assert server.answered.total() == 3 and server.counts["repeated"] == 0


def test_works_inside_a_running_loop_and_from_threads(tmp_path):
    with serving(Script(latency=0.01)) as server:
        client = client_of(server, tmp_path)

        async def cell():
            return client.ask(questions(1)[0].messages, 24)

        text = asyncio.run(cell())
        replies = []
        threads = [
            threading.Thread(target=lambda: replies.extend(client.ask_all(questions(4))))
            for _ in range(3)
        ]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        assert len(replies) == 12 and replies[0].text == text
        assert server.asked.total() == 4


def test_two_jobs_do_not_share_a_ledger(tmp_path):
    ledger = Ledger(tmp_path / "ledger.sqlite")
    with serving() as server, ledger.claimed():
        with pytest.raises(FolderError, match="another job is sending"):
            client_of(server, tmp_path).ask_all(questions(1))
        assert server.asked.total() == 0


def test_the_log_lists_every_byte_that_left(tmp_path):
    with serving(Script(first=("server_error", "rate_limit"), retry_after_ms=10)) as server:
        client_of(server, tmp_path).ask_all(questions(5))
        lines = sent_lines(tmp_path)
        assert len(lines) == 7 == server.asked.total()
        assert sum(line["bytes"] for line in lines) == server.n_bytes
        assert {line["host"] for line in lines} == {"127.0.0.1"}
        assert {line["request"] for line in lines} == set(server.asked)


def test_neither_a_redirect_nor_a_proxy_carries_text_elsewhere(tmp_path, monkeypatch):
    monkeypatch.setenv("HTTP_PROXY", "http://127.0.0.1:9")  # nobody listens; never asked
    with serving(Script(first=("ok", "redirect"))) as server:
        client = client_of(server, tmp_path)
        assert client.ask(questions(1)[0].messages, 24)
        with pytest.raises(EndpointError, match="307"):
            client.ask(questions(2)[1].messages, 24)
        assert server.asked.total() == 2


def test_text_for_another_machine_loses_its_identifiers(tmp_path):
    ask = [{"role": "user", "content": "Seen by Dr. Roe on 3/14/2019, MRN 1234567. Effusion."}]
    url, ledger = "https://api.example.org/v1", Ledger(tmp_path / "ledger.sqlite")
    remote = EndpointConfig(url, "m", allow_remote="api.example.org")
    sent = Client(remote, ledger).body(ask, 4)["messages"][0]["content"]
    assert sent == "Seen by [NAME] on [DATE], [ID]. Effusion."
    kept = EndpointConfig(url, "m", allow_remote="api.example.org", redact=False)
    assert Client(kept, ledger).body(ask, 4)["messages"] == ask
    local = EndpointConfig("http://127.0.0.1:1/v1", "m")
    assert Client(local, ledger).body(ask, 4)["messages"] == ask


KILLED = """
    import signal, sys
    from pathlib import Path
    signal.signal(signal.SIGINT, signal.default_int_handler)  # a shell's background jobs ignore it
    from autointerp import Client, EndpointConfig, Ledger, Limits
    from maira_sae.bench_labels import questions

    limits = Limits(concurrency=16)
    config = EndpointConfig(sys.argv[1], "scripted", max_retries=10, backoff=0.05, limits=limits)
    replies = Client(config, Ledger(Path(sys.argv[2]))).ask_all(questions(int(sys.argv[3])))
    print(sum(bool(reply.text) for reply in replies))
"""


def committed_in(path):
    """Requests whose answers a ledger holds; none while it is being made."""
    if not path.is_file():
        return set()
    with closing(sqlite3.connect(path)) as db:
        if not db.execute("SELECT 1 FROM sqlite_master WHERE name = 'answers'").fetchall():
            return set()
        return {key for (key,) in db.execute("SELECT request FROM answers")}


def test_killed_five_times_no_kept_answer_is_asked_for_again(tmp_path):
    n, path = 300, tmp_path / "ledger.sqlite"
    script = Script(latency=0.1, faults=0.1)
    with server_process(script) as url:
        command = [sys.executable, "-c", textwrap.dedent(KILLED), url, str(path), str(n)]
        kept, in_doubt = [], 0
        for kill in range(5):
            with subprocess.Popen(command, stdout=subprocess.PIPE) as process:
                while len(committed_in(path)) < 20 * (kill + 1):
                    assert process.poll() is None
                    time.sleep(0.02)
                os.kill(process.pid, signal.SIGKILL)
            told, committed = counts(url)["keys"], committed_in(path)
            assert committed <= set(told)
            kept.append((committed, {key: told[key] for key in committed}))
            in_doubt += len(set(told) - committed)
        done = subprocess.run(command, capture_output=True, text=True, check=True).stdout
        final = counts(url)
    assert int(done) == n and len(final["keys"]) == n
    # What was committed at a kill was never answered again: exact, at every kill.
    for committed, answers in kept:
        assert {key: final["keys"][key] for key in committed} == answers
    # Only an answer that was on the wire at a kill can come twice, under the same key.
    assert final["repeated"] <= in_doubt <= 5 * 16


def test_an_interrupt_keeps_what_came(tmp_path):
    script = Script(latency=0.1)
    with server_process(script) as url:
        command = [sys.executable, "-c", textwrap.dedent(KILLED), url]
        command += [str(tmp_path / "ledger.sqlite"), "300"]
        with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE) as process:
            while counts(url)["answered"] < 40:
                time.sleep(0.01)
            process.send_signal(signal.SIGINT)
            assert b"KeyboardInterrupt" in process.communicate(timeout=20)[1]
        assert len(Ledger(tmp_path / "ledger.sqlite")) >= 30


def test_the_benchmark_counts(tmp_path):
    result = run(LabelsBench(labels=200, latency=0.02, concurrency=8), tmp_path)
    assert result["done"] == 200 and result["repeated"] == 0
    assert 200 < result["requests"] < 300
    assert 0.05 < result["rate_ratio"] <= 1.0
