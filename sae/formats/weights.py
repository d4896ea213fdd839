"""Weights between libraries: one orientation, exact changes of convention, checked shapes.

Legend: d width of the activations, F latents.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from hooks.files import ConfigError, FormatError
from sae.formats.given import Given
from sae.model import MatryoshkaSAE, SAEConfig

DTYPES = (torch.float16, torch.bfloat16, torch.float32, torch.float64)


def turned(encoder: Tensor) -> Tensor:
    """``[F, d]`` of this module to the orientation of ``MatryoshkaSAE.W_enc``, and back."""
    return encoder.mT


@dataclass(frozen=True)
class Weights:
    """``z = relu((x − b_dec) @ encoder.T + b_enc)``, selected; ``x̂ = z @ decoder + b_dec``."""

    encoder: Float[Tensor, "F d"]
    b_enc: Float[Tensor, " F"]
    decoder: Float[Tensor, "F d"]
    b_dec: Float[Tensor, " d"]
    threshold: Float[Tensor, "*F"]
    """Scalar or ``[F]``; negative ones are taken as 0, which selects the same latents."""

    def checked(self, where: Path) -> Weights:
        """Self, if shapes fit and every number is finite; the threshold is simplified."""
        for name, value in vars(self).items():
            if value.dtype not in DTYPES or value.layout != torch.strided:
                raise FormatError(
                    f"{where}: {name} is {value.dtype}, {value.layout}; this library reads dense "
                    f"{', '.join(str(dtype) for dtype in DTYPES)}"
                )
        shapes = {name: tuple(value.shape) for name, value in vars(self).items()}
        f, d = shapes["encoder"] if len(shapes["encoder"]) == 2 else (0, 0)
        wanted = {"encoder": (f, d), "b_enc": (f,), "decoder": (f, d), "b_dec": (d,)}
        fits = all(shapes[name] == shape for name, shape in wanted.items())
        if not (fits and f and d and shapes["threshold"] in ((), (f,))):
            raise FormatError(
                f"{where}: shapes do not fit one dictionary: {shapes} (as [F, d], [F], [F, d], "
                "[d] and [] or [F]); check that the file is complete and of this format"
            )
        for name, value in vars(self).items():
            if not torch.isfinite(value).all():
                raise FormatError(f"{where}: {name} holds NaN or infinity; get the file again")
        threshold = self.threshold.clamp(min=0)
        if threshold.ndim and bool((threshold == threshold[0]).all()):
            threshold = threshold[0]
        return replace(self, threshold=threshold)

    def with_input_bias(self) -> Weights:
        """From a library that does not subtract ``b_dec`` before encoding; exact algebra."""
        return self._with_shifted_bias(1)

    def without_input_bias(self) -> Weights:
        """The inverse of :meth:`with_input_bias`."""
        return self._with_shifted_bias(-1)

    def _with_shifted_bias(self, sign: int) -> Weights:
        shifted = self.b_enc.double() + sign * (self.encoder.double() @ self.b_dec.double())
        # Not in half precision, where going there and back would change the bias.
        return replace(self, b_enc=shifted.to(torch.promote_types(self.b_enc.dtype, torch.float32)))

    def biases_folded(self, scale: float) -> Weights:
        """Take ``x`` instead of ``x · scale``; latents shrink to raw units, matrices stay."""
        return replace(
            self,
            b_enc=self.b_enc / scale,
            b_dec=self.b_dec / scale,
            threshold=self.threshold / scale,
        )

    def matrices_folded(self, scale: float) -> Weights:
        """Take ``x`` instead of ``x · scale``; latents stay in scaled units."""
        return replace(
            self,
            encoder=self.encoder * scale,
            decoder=self.decoder / scale,
            b_dec=self.b_dec / scale,
        )

    def unit_decoder(self, scale_threshold: bool) -> Weights:
        """Decoder rows of length 1, latents larger by their former length."""
        norms = self.decoder.norm(dim=1).clamp_min(1e-8)
        return replace(
            self,
            encoder=self.encoder * norms[:, None],
            b_enc=self.b_enc * norms,
            decoder=self.decoder / norms[:, None],
            threshold=self.threshold * norms if scale_threshold else self.threshold,
        )

    @classmethod
    def of(cls, sae: MatryoshkaSAE) -> Weights:
        """Weights of ``sae``, on the CPU."""
        return cls(
            turned(sae.W_enc.detach().cpu()),
            sae.b_enc.detach().cpu(),
            sae.W_dec.detach().cpu(),
            sae.b_dec.detach().cpu(),
            sae.threshold.detach().cpu(),
        )

    def per_latent_threshold(self) -> Float[Tensor, " F"]:
        """The threshold of every latent."""
        return self.threshold.expand(len(self.b_enc))


def assemble(
    where: Path,
    weights: Weights,
    given: Given,
    facts: Mapping[str, Any],
    origin: Mapping[str, Any],
    fold: Callable[[Weights, float], Weights] = Weights.biases_folded,
    threshold_unset: bool = False,
) -> MatryoshkaSAE:
    """The dictionary of what a file holds, its configuration says, and the caller gives.

    Parameters
    ----------
    facts
        Fields of :class:`SAEConfig` that the files say; ours, where we wrote them.
    origin
        Recorded as ``config.origin``, unless ``facts`` bring their own.
    fold
        How this library folds the scale of its inputs, applied with ``given.norm_scale``.
    threshold_unset
        Whether ``given.threshold`` may replace what the file holds.
    """
    values = {"origin": dict(origin)} | dict(facts)
    for name in ("k", "group_sizes"):
        found = values.get(name)
        agreed = given.agreed(name, tuple(found) if isinstance(found, list) else found, where)
        if agreed is not None:
            values[name] = agreed
    if given.threshold is not None:
        if not threshold_unset:
            raise FormatError(f"{where} holds a threshold itself; leave threshold out")
        weights = replace(weights, threshold=torch.tensor(given.threshold))
    if given.norm_scale is not None:
        weights = fold(weights, given.norm_scale)
        values["norm_scale"] = given.norm_scale
        kind = "matrices" if fold is Weights.matrices_folded else "biases"
        values["origin"] = {**values["origin"], "folded": kind}
    weights = weights.checked(where)
    f, d = weights.encoder.shape
    values = {"d_model": d, "n_latents": f, "k": 0, "group_sizes": (f,)} | values
    for name in ("site", "policy", "activation"):
        if getattr(given, name) is not None:
            values[name] = getattr(given, name)
    try:
        config = SAEConfig.from_dict(values)
    except ConfigError as error:
        raise FormatError(f"{where}: {error}") from None
    with torch.device("meta"):  # its initial weights are never computed
        sae = MatryoshkaSAE(config, dtype=weights.decoder.dtype)
    sae.threshold = torch.empty_like(weights.threshold, dtype=weights.decoder.dtype)
    tensors = {
        "W_enc": turned(weights.encoder),
        "b_enc": weights.b_enc,
        "W_dec": weights.decoder,
        "b_dec": weights.b_dec,
        "threshold": weights.threshold,
    }
    dtype = weights.decoder.dtype
    own = {name: tensor.to(dtype).contiguous().clone() for name, tensor in tensors.items()}
    sae.load_state_dict(own, assign=True)
    return sae.eval()
