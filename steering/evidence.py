"""What image latents do to the sentences of a given report, measured by running it again.

The report is teacher-forced. An image latent stands behind a sentence if the sentence becomes less
less likely without it: the drop of its log-probability when the latent is ablated on all image
patches. One backward pass a sentence predicts the drops of all latents at once (gradient times
activation, the first-order term of the same difference: Syed et al., arXiv 2310.10348), which
decides the ones that are worth ablating.

Letters: N passes of one batch, S sentences, T report tokens, P patches of all films, n latents that
fire on them.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from jaxtyping import Float, Int
from torch import Tensor

from hooks.files import ConfigError
from hooks.policies import check_roles
from hooks.processor import Maira2Processor
from hooks.prompts import encode_study
from hooks.roles import Role, View
from hooks.sites import observe, resolve_site, rewrite
from hooks.studies import Study
from sae.model import MatryoshkaSAE
from steering.edits import Edit
from steering.generate import steered
from steering.positions import Positions

IMAGE = Positions(roles=(Role.IMAGE,))
_CHUNK = 2**22  # attributions computed at a time


class FilmLatents(NamedTuple):
    """The latents that fire on a study's films."""

    latents: Int[Tensor, " n"]
    """Ascending."""
    values: Float[Tensor, "P n"]
    """Patches as the prompt has them: film after film, row by row."""

    def of(self, latent: int) -> Float[Tensor, " P"]:
        """Activation of one latent on every patch; zeros where it does not fire."""
        at = (self.latents == latent).nonzero().flatten()
        return self.values[:, int(at[0])] if len(at) else torch.zeros(len(self.values))


class Reading(NamedTuple):
    """One pass over a report with nothing edited."""

    log_probs: Float[Tensor, " S"]
    """Of each sentence, given the films, the prompt and the sentences before it; nats."""
    films: FilmLatents
    attributions: Float[Tensor, "S n"]
    """Predicted drop of each sentence's log-probability without each latent that fires."""
    gradients: Float[Tensor, "S P d"]
    """Of each sentence's log-probability by the activations of the patches."""


class ReportReader:
    """A study's prompt and report, run under one edit after another.

    Parameters
    ----------
    sae
        At a site that holds image patches: of the vision tower, or of the language model.

    Raises
    ------
    ConfigError
        If the study has no report, or the dictionary was trained without image patches.
    """

    def __init__(
        self, model: Any, processor: Maira2Processor, sae: MatryoshkaSAE, study: Study
    ) -> None:
        check_roles(sae.config.policy, "patches", "what is read of films")
        encoding = encode_study(processor, study)
        self.model, self.sae, self.tokens = model, sae, encoding.tokens
        self.targets = np.flatnonzero(self.tokens.of_role(Role.REPORT, Role.GROUNDING))
        if not len(self.targets):
            raise ConfigError(
                f"study {study.id!r} has no report to read; give one, or have it generated first"
            )
        self.patches = self.tokens.take(self.tokens.of_role(Role.IMAGE))
        numbers = self.tokens.sentence[self.targets]
        self.sentences: list[int] = sorted({int(number) for number in numbers})
        """Numbers of the sentences, as `hooks.roles` counts them."""
        owner = np.searchsorted(self.sentences, numbers)
        self._owner = torch.from_numpy(owner).to(model.device)
        self.site = resolve_site(model, sae.config.site)
        self._over_films = self.site.stream == "vision"
        inputs = processor.model_inputs(encoding)
        self._ids: Tensor = inputs["input_ids"].to(model.device)
        self._pixels: Tensor = inputs["pixel_values"].to(model.device, model.dtype)
        self.spans = [self.targets[numbers == number] for number in self.sentences]
        """Positions of each sentence's tokens in the prompt."""

    def text(self, processor: Maira2Processor, sentence: int) -> str:
        """The words of the sentence in place ``sentence``."""
        ids = self.tokens.ids[self.spans[sentence]].tolist()
        return processor.tokenizer.decode(ids).strip()

    def log_probs(self, n: int) -> Float[Tensor, "N S"]:
        """Of every sentence, in a batch of ``n`` copies of the prompt."""
        ids = self._ids.expand(n, -1)
        hidden = self.model.model(
            input_ids=ids,
            attention_mask=torch.ones_like(ids),
            pixel_values=self._pixels.repeat(n, 1, 1, 1),
            use_cache=False,
        ).last_hidden_state
        before = torch.from_numpy(self.targets - 1).to(hidden.device)
        logits = self.model.lm_head(hidden[:, before]).float()
        said = ids[:, before + 1].to(logits.device)
        token = logits.log_softmax(-1).gather(-1, said[..., None])[..., 0]
        out = token.new_zeros(n, len(self.sentences))
        return out.index_add(1, self._owner.to(token.device), token)

    def read(self) -> Reading:
        """Log-probabilities, latents on the films, and predicted drops of all of them."""
        leaf: Tensor | None = None

        def hold(value: Tensor) -> Tensor:
            nonlocal leaf
            leaf = value.detach().requires_grad_()
            return leaf

        with torch.enable_grad(), rewrite(self.site, hold):
            log_probs = self.log_probs(1)[0]
        assert leaf is not None
        gradients = [
            torch.autograd.grad(one, leaf, retain_graph=i + 1 < len(log_probs))[0]
            for i, one in enumerate(log_probs)
        ]
        with torch.no_grad():
            x = self.of_patches(leaf)
            g = torch.stack([self.of_patches(gradient) for gradient in gradients])
            films = film_latents(self.sae, x)
            attributions = self._attribute(films, g)
        return Reading(log_probs.detach().cpu(), films, attributions, g.cpu())

    def of_patches(self, value: Tensor) -> Float[Tensor, "P d"]:
        """Rows of image patches of what flows through the site in one pass."""
        if not self._over_films:
            image = torch.from_numpy(self.tokens.of_role(Role.IMAGE)).to(value.device)
            return value[0, image]
        per_film = len(self.patches) // len(value)
        return value[:, value.shape[1] - per_film :].reshape(-1, value.shape[-1])

    def _attribute(self, films: FilmLatents, g: Float[Tensor, "S P d"]) -> Float[Tensor, "S n"]:
        pieces = []
        step = max(1, _CHUNK // max(1, len(films.values) * len(g)))
        for latents, values in zip(
            films.latents.split(step), films.values.split(step, dim=1), strict=True
        ):
            push = g.to(self.sae.W_dec) @ self.sae.W_dec[latents].T
            pieces.append((push * values.to(push)).sum(1).cpu().float())
        return torch.cat(pieces, 1) if pieces else torch.zeros(len(g), 0)

    def patch_attribution(
        self, reading: Reading, sentence: int, latent: int
    ) -> Float[Tensor, " P"]:
        """Predicted drop without the latent on each patch alone."""
        direction = self.sae.W_dec[latent].detach().cpu().float()
        return reading.films.of(latent) * (reading.gradients[sentence].float() @ direction)

    def by_film(self, values: np.ndarray) -> dict[str, np.ndarray]:
        """Numbers of all patches as one grid ``[rows, columns]`` for each film, by its view."""
        out = {}
        for view in View:
            own = values[self.patches.view == int(view)]
            if len(own):
                side = round(len(own) ** 0.5)
                out[view.name.lower()] = own.reshape(side, side)
        return out

    @torch.no_grad()
    def without(
        self, groups: Sequence[Sequence[int]], batch: int = 16
    ) -> Float[Tensor, "groups S"]:
        """Log-probability of each sentence with a group of latents ablated on all patches."""
        rows = []
        for start in range(0, len(groups), batch):
            chosen = groups[start : start + batch]
            edits = [[Edit(latent, mode="ablate") for latent in group] for group in chosen]
            with steered(self.model, self.sae, edits, IMAGE, tokens=self.tokens):
                rows.append(self.log_probs(len(chosen)).cpu())
        return torch.cat(rows) if rows else torch.zeros(0, len(self.sentences))

    @torch.no_grad()
    def text_latents(self, sae: MatryoshkaSAE) -> list[Float[Tensor, "T F"]]:
        """Latents of another dictionary, of the language model, on each sentence's tokens."""
        site = resolve_site(self.model, sae.config.site)
        if site.stream == "vision":
            raise ConfigError(f"{site.name!r} sees films, not words; give an SAE of the text")
        seen: list[Tensor] = []
        with observe(site, seen.append):
            self.log_probs(1)
        return [sae.encode(seen[0][0, span].to(sae.W_dec)).cpu() for span in self.spans]


@torch.no_grad()
def film_latents(sae: MatryoshkaSAE, x: Float[Tensor, "P d"]) -> FilmLatents:
    """The latents that fire on any of some patches."""
    z = sae.encode(x.to(sae.W_dec))
    latents = (z > 0).any(0).nonzero().flatten()
    return FilmLatents(latents.cpu(), z[:, latents].cpu().float())


@torch.no_grad()
def film_summary(
    model: Any, processor: Maira2Processor, sae: MatryoshkaSAE, path: Path
) -> Float[Tensor, " F"]:
    """Largest activation of each latent on a film by itself, for a search by example."""
    reader = ReportReader(model, processor, sae, Study(id="film", frontal=path, report="."))
    seen: list[Tensor] = []
    with observe(reader.site, seen.append):
        reader.log_probs(1)
    films = film_latents(sae, reader.of_patches(seen[0]))
    out = torch.zeros(sae.config.n_latents)
    out[films.latents] = films.values.amax(0)
    return out
