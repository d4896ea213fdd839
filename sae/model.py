"""The Matryoshka BatchTopK sparse autoencoder.

For activations ``x`` of width ``d`` (Bussmann et al., arXiv 2503.17547 and 2412.06410):

    pre   = relu((x − b_dec) @ W_enc + b_enc)
    z     = the batch·k largest entries of pre            (training: BatchTopK)
    z     = pre · (pre > threshold)                       (inference; one threshold, or F)
    z     = the k largest entries of each token's pre     (inference of "topk" dictionaries)
    x̂_g   = b_dec + z[:, :m_g] @ W_dec[:m_g]              (prefix g of the dictionary)

Latents are ordered; prefix ``g`` ends at ``m_g``, the sum of the first ``g`` group sizes.
"""

from __future__ import annotations

import tempfile
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field, fields
from itertools import accumulate
from pathlib import Path
from typing import Any

import torch
from jaxtyping import Float
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from hooks.files import (
    ConfigError,
    FolderError,
    atomic_path,
    file_record,
    nearest,
    open_sealed,
    read_json,
    reject_unknown_keys,
    seal,
    write_json,
)
from hooks.html import facts

KIND = "sae"
FORMAT_VERSION = 1
ACTIVATIONS = ("threshold", "topk")
FRACTIONS = (1 / 16, 1 / 16, 1 / 8, 1 / 4, 1 / 2)
"""Default share of the dictionary in each group, innermost first."""


def group_sizes_of(n_latents: int, fractions: Sequence[float] = FRACTIONS) -> tuple[int, ...]:
    """Group sizes from fractions; what rounding leaves over goes to the last group.

    >>> group_sizes_of(100, (0.5, 0.25, 0.25))
    (50, 25, 25)
    """
    if abs(sum(fractions) - 1) > 1e-6:
        raise ConfigError(f"group fractions sum to {sum(fractions):.4f}; they must sum to 1")
    sizes = [int(fraction * n_latents) for fraction in fractions]
    sizes[-1] += n_latents - sum(sizes)
    return tuple(sizes)


@dataclass(frozen=True)
class SAEConfig:
    """Shape of a dictionary, and where its activations came from."""

    d_model: int
    """Width of the activations."""
    n_latents: int
    """Size of the dictionary, F."""
    k: int
    """Mean active latents per token while training; 0 if nobody said (JumpReLU)."""
    group_sizes: tuple[int, ...] = ()
    """Latents in each nested group, innermost first; empty means :data:`FRACTIONS` of F."""
    site: str = ""
    """Named place in the model, see :mod:`hooks.sites`."""
    policy: str = ""
    """Token policy of the harvest it was trained on."""
    norm_scale: float = 1.0
    """Training saw ``x · norm_scale``; saved weights take raw activations (it is folded in)."""
    model: Mapping[str, Any] = field(default_factory=dict)
    """Identity of the model, from the activation folder."""
    activation: str = "threshold"
    """Selection at inference: ``threshold``, or ``topk`` (the ``k`` largest of each token)."""
    origin: Mapping[str, Any] = field(default_factory=dict)
    """Of a dictionary that another library wrote: format, class, files, how it was folded."""

    def __post_init__(self) -> None:
        sizes = tuple(self.group_sizes) or group_sizes_of(self.n_latents)
        object.__setattr__(self, "group_sizes", sizes)
        if self.activation not in ACTIVATIONS:
            near = nearest(self.activation, ACTIVATIONS)
            raise ConfigError(
                f"activation is {self.activation!r}{near}; it is one of {ACTIVATIONS}"
            )
        least = 1 if self.activation == "topk" else 0
        if not least <= self.k <= self.n_latents:
            raise ConfigError(f"k is {self.k}; it must lie in {least}–{self.n_latents} (n_latents)")
        if min(sizes) < 1 or sum(sizes) != self.n_latents:
            raise ConfigError(
                f"group sizes {sizes} sum to {sum(sizes)}; they must be positive and sum to "
                f"n_latents = {self.n_latents}"
            )

    @property
    def prefixes(self) -> tuple[int, ...]:
        """Where each prefix of the dictionary ends, ``m_1 … m_G = F``."""
        return tuple(accumulate(self.group_sizes))

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> SAEConfig:
        """The inverse of :func:`dataclasses.asdict`; unknown keys are an error."""
        reject_unknown_keys(values, [f.name for f in fields(cls)], "an SAE's config.json")
        return cls(**{**values, "group_sizes": tuple(values["group_sizes"])})


class MatryoshkaSAE(nn.Module):
    """A dictionary with nested prefixes; see the module docstring for the mathematics.

    Parameters
    ----------
    config
        Shape and provenance.
    seed
        Decoder rows are random unit vectors, the encoder starts as the decoder's transpose.

    >>> sae = MatryoshkaSAE(SAEConfig(d_model=4, n_latents=8, k=2, group_sizes=(4, 4)))
    >>> sae.encode(torch.ones(3, 4)).shape, sae(torch.ones(3, 4)).shape
    (torch.Size([3, 8]), torch.Size([3, 4]))
    """

    def __init__(
        self, config: SAEConfig, seed: int = 0, dtype: torch.dtype = torch.float32
    ) -> None:
        super().__init__()
        self.config = config
        d, f = config.d_model, config.n_latents
        generator = torch.Generator().manual_seed(seed)
        directions = torch.randn(f, d, generator=generator, dtype=torch.float64)
        directions /= directions.norm(dim=1, keepdim=True)
        self.W_dec = nn.Parameter(directions.to(dtype))
        # A view of [F, d] memory: kernels want what belongs to one latent in one contiguous row.
        self.W_enc = nn.Parameter(directions.clone().to(dtype).T)
        self.b_enc = nn.Parameter(torch.zeros(f, dtype=dtype))
        self.b_dec = nn.Parameter(torch.zeros(d, dtype=dtype))
        self.threshold: Tensor
        self.register_buffer("threshold", torch.zeros((), dtype=dtype))

    def __repr__(self) -> str:
        c = self.config
        return (
            f"MatryoshkaSAE(site={c.site!r}, d_model={c.d_model}, n_latents={c.n_latents}, "
            f"k={c.k}, groups={c.group_sizes})"
        )

    def _repr_html_(self) -> str:
        c = self.config
        shown = {
            "site": c.site,
            "tokens": c.policy,
            "d_model": c.d_model,
            "latents": c.n_latents,
            "groups": c.group_sizes,
            "active a token (k)": c.k,
            "activation": c.activation,
            "threshold": float(self.threshold),
            "from": c.origin.get("format"),
        }
        return facts("Sparse autoencoder", shown)

    def pre_activations(self, x: Float[Tensor, "*batch d"]) -> Float[Tensor, "*batch F"]:
        """Rectified encoder output before any selection."""
        return torch.relu((x - self.b_dec) @ self.W_enc + self.b_enc)

    def encode(self, x: Float[Tensor, "*batch d"]) -> Float[Tensor, "*batch F"]:
        """Latents at inference: pre-activations strictly above the threshold, or the k largest."""
        pre = self.pre_activations(x)
        if self.config.activation == "topk":
            kept = pre.topk(self.config.k, dim=-1)
            return torch.zeros_like(pre).scatter(-1, kept.indices, kept.values)
        return pre * (pre > self.threshold)

    def encode_some(
        self, x: Float[Tensor, "*batch d"], latents: Sequence[int] | Tensor
    ) -> Float[Tensor, "*batch n"]:
        """:meth:`encode` for a few latents only."""
        chosen = torch.as_tensor(latents, device=x.device)
        if self.config.activation == "topk":  # whether a latent is kept depends on all others
            return self.encode(x)[..., chosen]
        threshold = self.threshold[chosen] if self.threshold.ndim else self.threshold
        pre = torch.relu((x - self.b_dec) @ self.W_enc[:, chosen] + self.b_enc[chosen])
        return pre * (pre > threshold)

    def decode(self, z: Float[Tensor, "*batch F"]) -> Float[Tensor, "*batch d"]:
        """Reconstruction from the whole dictionary."""
        return z @ self.W_dec + self.b_dec

    def decode_prefixes(self, z: Float[Tensor, "batch F"]) -> Iterator[Float[Tensor, "batch d"]]:
        """Reconstruction from each prefix, innermost first; each adds its group to the last."""
        sizes = self.config.group_sizes
        reconstruction = self.b_dec
        for latents, rows in zip(z.split(sizes, dim=1), self.W_dec.split(sizes), strict=True):
            reconstruction = torch.addmm(reconstruction, latents, rows)
            yield reconstruction

    def forward(self, x: Float[Tensor, "*batch d"]) -> Float[Tensor, "*batch d"]:
        """Reconstruction at inference."""
        return self.decode(self.encode(x))

    @torch.no_grad()
    def normalize_decoder(self) -> None:
        """Scale every decoder row to unit length."""
        self.W_dec.div_(self.W_dec.norm(dim=1, keepdim=True).clamp_min(1e-12))

    @torch.no_grad()
    def folded(self, scale: float) -> MatryoshkaSAE:
        """The same function for raw activations, of a dictionary trained on ``x · scale``.

        Biases and threshold are divided by ``scale``; weights stay, so decoder rows keep unit
        length and latents are in raw units: ``folded(x) = self(x · scale) / scale``.
        """
        values = asdict(self.config) | {"norm_scale": scale}
        raw = MatryoshkaSAE(SAEConfig.from_dict(values), dtype=self.W_dec.dtype)
        raw.threshold = torch.empty_like(self.threshold)
        raw.to(self.W_dec.device).load_state_dict(self.state_dict())
        for tensor in (raw.b_enc, raw.b_dec, raw.threshold):
            tensor.div_(scale)
        return raw

    def save(self, folder: Path, metrics: Mapping[str, Any]) -> None:
        """Write ``config.json``, ``sae.safetensors``, ``metrics.json``, and the manifest last."""
        write_json(folder / "config.json", asdict(self.config))
        with atomic_path(folder / "sae.safetensors") as temporary:
            save_file({n: v.detach().contiguous() for n, v in self.state_dict().items()}, temporary)
        write_json(folder / "metrics.json", dict(metrics))
        names = ("config.json", "sae.safetensors", "metrics.json")
        seal(folder, KIND, FORMAT_VERSION, {name: file_record(folder / name) for name in names})

    def push_to_hub(
        self,
        repo: str,
        *,
        data: str,
        license: str,
        base_model: str = "",
        metrics: Mapping[str, Any] | None = None,
        private: bool = True,
        revision: str | None = None,
    ) -> str:
        """Publish the dictionary alone as ``owner/name``, for SAELens' users too.

        :func:`sae.hub.publish` adds labels, an evaluation and a page.

        Parameters
        ----------
        data, license
            For the model card: what it was trained on and under which terms.
        base_model
            Hub id of the model; needed where the configuration holds a local path.

        Returns
        -------
        str
            Address of the repository.
        """
        from sae.hub import Publication, publish

        with tempfile.TemporaryDirectory(prefix="maira-sae-push-") as folder:
            self.save(Path(folder), metrics or {})
            publication = Publication(Path(folder), data, license, base_model)
            return publish(publication, repo, private=private, revision=revision)

    @classmethod
    def from_pretrained(
        cls,
        source: Path | str,
        device: str | None = None,
        *,
        revision: str | None = None,
        subfolder: str | None = None,
        format: str | None = None,
        **given: Any,
    ) -> MatryoshkaSAE:
        """Read a folder, a file or a Hub repository, of this library or another; see `sae.formats`.

        Parameters
        ----------
        source
            Folder that :meth:`save` wrote; or a folder, weight file or Hub id in a format of
            dictionary_learning, SAELens, sparsify or Gemma Scope; or unknown weights whose
            names and shapes tell what they are.
        revision, subfolder
            Of a Hub repository; a subfolder also of a local folder that holds several.
        format
            One of ``sae.formats.FORMATS`` instead of what file names tell; ``inspected`` goes
            by the names and shapes of tensors.
        given
            What the files do not say, by the names of :class:`sae.formats.Given`: ``site``,
            ``policy``, ``k``, ``group_sizes``, ``activation``, ``threshold``, ``norm_scale``.

        Raises
        ------
        FolderError
            If a folder of this library is missing, unfinished, damaged, or its tensors do not
            fit its config.
        FormatError
            If another library's files are incomplete, damaged or ambiguous.
        """
        from sae.formats import Given, read

        reject_unknown_keys(given, [f.name for f in fields(Given)], "from_pretrained")
        sae = read(source, Given(**given), revision=revision, subfolder=subfolder, format=format)
        return sae.to(device or "cpu").eval()

    @classmethod
    def load(cls, folder: Path) -> MatryoshkaSAE:
        """Read a folder that :meth:`save` wrote, and no other."""
        open_sealed(folder, KIND, FORMAT_VERSION, "run `maira-sae train` to make it")
        config = SAEConfig.from_dict(read_json(folder / "config.json"))
        tensors = load_file(folder / "sae.safetensors")
        with torch.device("meta"):  # its initial weights are never computed
            sae = cls(config, dtype=tensors["W_dec"].dtype)
        if tensors["threshold"].shape == sae.b_enc.shape:
            sae.threshold = torch.empty_like(tensors["threshold"])
        expected = {name: tuple(value.shape) for name, value in sae.state_dict().items()}
        found = {name: tuple(value.shape) for name, value in tensors.items()}
        if found != expected:
            raise FolderError(
                f"{folder}/sae.safetensors holds {found}, its config needs {expected}; "
                "the two files are not from one run"
            )
        sae.load_state_dict(tensors, assign=True)
        return sae.eval()


def geometric_median(
    points: Float[Tensor, "n d"], iterations: int = 100, tolerance: float = 1e-6
) -> Float[Tensor, " d"]:
    """The point with the least summed distance to ``points`` (Weiszfeld's algorithm)."""
    median = points.mean(dim=0)
    for _ in range(iterations):
        weights = 1 / (points - median).norm(dim=1).clamp_min(1e-8)
        moved = (points * weights[:, None]).sum(dim=0) / weights.sum()
        done = bool((moved - median).norm() <= tolerance * median.norm())
        median = moved
        if done:
            break
    return median
