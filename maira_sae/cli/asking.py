"""The options of every command that asks a language model, stated once."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import wraps
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, get_type_hints

import typer

from hooks.files import MairaSaeError
from maira_sae.cli.options import LANGUAGE_MODEL, AllowRemote, Endpoint, Llm, endpoint_of

if TYPE_CHECKING:
    from autointerp import BatchConfig, EndpointConfig
    from autointerp.labellers import Llm as LlmLabeller
    from autointerp.labellers import Words


def _option(help: str, *names: str) -> Any:
    return typer.Option(*names, help=help, rich_help_panel=LANGUAGE_MODEL)


@dataclass(frozen=True)
class Asking:
    """Who is asked, how fast, and for how much."""

    endpoint: Endpoint = None
    llm: Llm = None
    allow_remote: AllowRemote = None
    allow_remote_images: Annotated[
        str | None, _option("Host that films may be sent to; leave for text is none for films.")
    ] = None
    redact: Annotated[bool, _option("Take identifiers out of text for a remote host.")] = True
    concurrency: Annotated[int, _option("Requests under way at once.")] = 16
    requests_per_minute: Annotated[
        float | None, _option("Most requests a minute, retries included.")
    ] = None
    tokens_per_minute: Annotated[
        float | None, _option("Most tokens a minute, by the estimate.")
    ] = None
    tokens_per_image: Annotated[int, _option("What a picture counts in estimates.")] = 1500
    price_in: Annotated[float | None, _option("Price of 1M tokens in.")] = None
    price_out: Annotated[float | None, _option("Price of 1M tokens out.")] = None
    max_cost: Annotated[
        float | None, _option("Stop before all runs with this ledger cost more; exit 3.")
    ] = None
    max_requests: Annotated[
        int | None, _option("Stop after so many requests of this run; exit 3.")
    ] = None
    batch: Annotated[
        bool, _option("Ask through the provider's Batch API, at half the price.", "--batch")
    ] = False
    wait: Annotated[
        bool, _option("Wait for batches; otherwise exit 3, and run again to collect them.")
    ] = True
    poll: Annotated[float, _option("Seconds before the first look at a batch.")] = 10.0

    def endpoint_config(self) -> EndpointConfig | None:
        """Where requests go with their limits, or ``None`` where nobody is asked."""
        from autointerp import Limits

        where = endpoint_of(self.endpoint, self.llm, self.allow_remote)
        names = [name for name in Limits.__dataclass_fields__]
        given = {name: getattr(self, name) for name in names}
        if where is None:
            plain = Asking()
            asked = [*names, "allow_remote", "allow_remote_images", "batch"]
            changed = [name for name in asked if getattr(self, name) != getattr(plain, name)]
            if changed:
                raise MairaSaeError(
                    f"--{changed[0].replace('_', '-')} is for --endpoint; give one, or leave it out"
                )
            return None
        return replace(
            where,
            allow_remote_images=self.allow_remote_images,
            redact=self.redact,
            limits=Limits(**given),
        )

    def batch_config(self) -> BatchConfig | None:
        """How batches are made, or ``None`` where requests go one by one."""
        from autointerp import BatchConfig

        if not self.batch:
            return None
        return BatchConfig(poll=self.poll, longest_poll=max(self.poll, BatchConfig.longest_poll))

    def labeller(self, tokenizer: Any, ledger: Path) -> LlmLabeller | Words:
        """Who answers; what is about to be sent is said first."""
        from autointerp import labeller_of

        return labeller_of(
            *(self.endpoint_config(), tokenizer, ledger),
            *(lambda left: typer.echo(f"to do: {left}"), self.batch_config(), self.wait),
        )


def asks(command: Callable[..., None]) -> Callable[..., None]:
    """Give a command the options of :class:`Asking`, in place of its parameter ``asking``."""
    shared = inspect.signature(Asking).parameters
    hints = {**get_type_hints(command, include_extras=True)}
    hints |= get_type_hints(Asking, include_extras=True)
    own = [p for p in inspect.signature(command).parameters.values() if p.name != "asking"]

    @wraps(command)
    def run(**given: Any) -> None:
        asking = Asking(**{name: given.pop(name) for name in shared})
        command(asking=asking, **given)

    # The JSON option comes last in every command.
    parameters = [*own[:-1], *shared.values(), *own[-1:]]
    parameters = [
        p.replace(annotation=hints[p.name], kind=inspect.Parameter.KEYWORD_ONLY) for p in parameters
    ]
    vars(run)["__signature__"] = inspect.Signature(parameters)
    run.__annotations__ = {p.name: p.annotation for p in parameters}
    return run
