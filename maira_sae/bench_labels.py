"""How near a labelling job comes to the rate that latency and concurrency allow."""

from __future__ import annotations

import json
import subprocess
import sys
import time
import urllib.request
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from autointerp import Client, EndpointConfig, Ledger, Limits, Request
from maira_sae.scripted_server import Script


@dataclass(frozen=True)
class LabelsBench:
    """A job against the scripted server, in a process of its own."""

    labels: int = 2000
    latency: float = 0.1
    """Seconds before each reply."""
    faults: float = 0.1
    """Share of requests that meet a fault and have to be sent again."""
    concurrency: int = 64


@contextmanager
def server_process(script: Script) -> Iterator[str]:
    """The base URL of a scripted server in another process, so that it takes no time of ours."""
    command = [sys.executable, "-m", "maira_sae.scripted_server", json.dumps(asdict(script))]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE) as process:
        assert process.stdout is not None and process.stdin is not None
        port = int(process.stdout.readline())
        try:
            yield f"http://127.0.0.1:{port}/v1"
        finally:
            process.stdin.close()


def counts(url: str) -> dict[str, Any]:
    """What the server behind a base URL was asked."""
    with urllib.request.urlopen(url.removesuffix("/v1") + "/counts") as reply:
        return json.load(reply)


def questions(n: int) -> list[Request]:
    """Different requests, of the size of a labelling prompt."""
    excerpt = "There is a small <<left>> pleural effusion with adjacent atelectasis. "
    return [
        Request([{"role": "user", "content": f"Latent {i}. {excerpt * 10}Concept:"}], 24)
        for i in range(n)
    ]


def run(config: LabelsBench, folder: Path) -> dict[str, Any]:
    """Label, and compare the time with that of requests without any work between them.

    The ideal rate counts answers: ``concurrency`` requests under way at all times, each taking
    the latency, and those that met a fault sent again.
    """
    script = Script(latency=config.latency, faults=config.faults)
    with server_process(script) as url:
        limits = Limits(concurrency=config.concurrency)
        endpoint = EndpointConfig(
            url, "scripted", timeout=10, max_retries=10, backoff=config.latency, limits=limits
        )
        client = Client(endpoint, Ledger(folder / "ledger.sqlite"))
        work = questions(config.labels)
        import openai  # noqa: F401  # loaded before the clock starts

        start, cpu = time.perf_counter(), time.process_time()
        replies = client.ask_all(work, "label")
        seconds, cpu = time.perf_counter() - start, time.process_time() - cpu
        told = counts(url)
    ideal = told["asked"] * config.latency / config.concurrency
    return {
        "config": asdict(config),
        "requests": told["asked"],
        "done": sum(bool(reply.text) for reply in replies),
        "repeated": told["repeated"],
        "rate": config.labels / seconds,
        "ideal_rate": config.labels / ideal,
        "rate_ratio": ideal / seconds,
        "cpu_seconds": cpu,
    }


def run_sdk(config: LabelsBench) -> dict[str, Any]:
    """The same requests by the SDK alone: one client, its own retries, nothing kept."""
    import asyncio

    from openai import APIError, AsyncOpenAI

    async def ask_all(url: str) -> int:
        slots = asyncio.Semaphore(config.concurrency)
        endpoint = AsyncOpenAI(base_url=url, api_key="none", timeout=10, max_retries=10)

        async def ask(request: Request) -> int:
            async with slots:
                try:
                    await endpoint.chat.completions.create(
                        model="scripted",
                        messages=request.messages,  # pyright: ignore
                        max_tokens=request.max_tokens,
                    )
                except (APIError, ValueError):
                    return 0
                return 1

        async with endpoint:
            return sum(await asyncio.gather(*map(ask, questions(config.labels))))

    with server_process(Script(latency=config.latency, faults=config.faults)) as url:
        start = time.perf_counter()
        done = asyncio.run(ask_all(url))
        seconds = time.perf_counter() - start
        ideal = counts(url)["asked"] * config.latency / config.concurrency
    return {"done": done, "rate": config.labels / seconds, "rate_ratio": ideal / seconds}


def table(result: Mapping[str, Any]) -> str:
    """The figures of :func:`run` as text."""
    lines = (
        f"{result['done']:,} labels from {result['requests']:,} requests, "
        f"{result['repeated']} answered twice\n"
        f"{result['rate']:,.0f} labels/s of {result['ideal_rate']:,.0f} possible: "
        f"{result['rate_ratio']:.3f}; {result['cpu_seconds']:.2f} s of processor time"
    )
    if sdk := result.get("sdk"):
        lines += f"\nthe SDK alone: {sdk['done']:,} done, {sdk['rate_ratio']:.3f} of its ideal rate"
    return lines
