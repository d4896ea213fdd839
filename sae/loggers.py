"""Training metrics for TensorBoard and Weights & Biases, beside ``metrics.jsonl``."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from importlib import import_module
from pathlib import Path
from typing import Any, Protocol

from hooks.files import ConfigError, nearest


class Logger(Protocol):
    """Takes the lines of ``metrics.jsonl`` as they are written."""

    def write(self, name: str, line: Mapping[str, Any]) -> None:
        """Log a line of the dictionary ``name`` (empty if there is only one)."""
        ...

    def close(self) -> None:
        """Write out what is left."""
        ...


def scalars(name: str, line: Mapping[str, Any]) -> dict[str, float]:
    """The numbers of a line under flat names.

    >>> scalars("x8", {"step": 3, "loss": 0.5, "group_mse": [0.7, 0.3]})
    {'x8/loss': 0.5, 'x8/group_mse/0': 0.7, 'x8/group_mse/1': 0.3}
    """
    flat: dict[str, float] = {}

    def add(key: str, value: Any) -> None:
        if isinstance(value, Mapping):
            for inner, one in value.items():
                add(f"{key}/{inner}", one)
        elif isinstance(value, list):
            for inner, one in enumerate(value):
                add(f"{key}/{inner}", one)
        else:
            flat[key] = value

    for key, value in line.items():
        if key != "step":
            add(f"{name}/{key}" if name else key, value)
    return flat


class TensorBoard:
    """Event files in ``out/tensorboard``."""

    def __init__(self, out: Path) -> None:
        writer = _needed("torch.utils.tensorboard", "tensorboard").SummaryWriter
        self._writer = writer(str(out / "tensorboard"))

    def write(self, name: str, line: Mapping[str, Any]) -> None:
        for key, value in scalars(name, line).items():
            self._writer.add_scalar(key, value, line["step"])

    def close(self) -> None:
        self._writer.close()


class WandB:
    """A run of Weights & Biases in ``out``, kept on this machine.

    ``wandb sync`` sends it, if you decide so.
    """

    def __init__(self, out: Path) -> None:
        wandb = _needed("wandb", "wandb")
        out.mkdir(parents=True, exist_ok=True)
        self._run = wandb.init(project="maira-sae", name=out.name, dir=str(out), mode="offline")

    def write(self, name: str, line: Mapping[str, Any]) -> None:
        self._run.log(scalars(name, line), step=line["step"])

    def close(self) -> None:
        self._run.finish()


LOGGERS = {"tensorboard": TensorBoard, "wandb": WandB}


@contextmanager
def open_loggers(names: Sequence[str], out: Path) -> Iterator[list[Logger]]:
    """Loggers by name; an unknown name, or a package that is missing, is a ConfigError."""
    for name in names:
        if name not in LOGGERS:
            raise ConfigError(
                f"unknown logger {name!r}{nearest(name, LOGGERS)}; choose from {list(LOGGERS)}"
            )
    loggers: list[Logger] = [LOGGERS[name](out) for name in names]
    try:
        yield loggers
    finally:
        for logger in loggers:
            logger.close()


def _needed(module: str, extra: str) -> Any:
    try:
        return import_module(module)
    except ImportError as error:
        raise ConfigError(
            f"logging to {extra} needs a package that is missing ({error}); "
            f"pip install 'maira-sae[{extra}]'"
        ) from None
