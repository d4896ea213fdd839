"""Whether a parent's latent falls silent where a child's latent takes over its direction."""

from collections.abc import Sequence
from typing import NamedTuple

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor
from torch.nn import functional as F

from phantom.factors import PhantomError
from sae.latent_scores import Sides, auroc, aurocs, split
from sae.latents import Latents, sparse


class Absorption(NamedTuple):
    """How a dictionary treats one parent and one child."""

    rate: float
    """Share of held-out rows with the child on which the parent is absorbed."""
    n: int
    """Held-out rows with the child."""
    silent: float
    """Share of those on which the parent's latents are silent, absorbed or not."""
    silent_elsewhere: float
    """Share of held-out rows with the parent but not the child on which the parent's latents are
    silent: how often they are so for other reasons. 0 if `n_elsewhere` is."""
    n_elsewhere: int
    silent_with_sibling: float | None
    """Share of held-out rows with the child and a sibling on which the parent's latents are
    silent; None if no siblings were given or no row has both."""
    parent_latents: tuple[int, ...]
    child_latent: int
    parent_auroc: float
    """Of the parent's first latent on held-out rows without the child: near ½ there is no parent's
    latent, and the rate means nothing. ½ if one class is missing there."""
    child_auroc: float
    """Of the child's latent, for the child among held-out rows with the parent. ½ if one class is
    missing there."""
    cosine: float | None
    """Between the child latent's direction and the parent's probe; None without directions."""


def absorption(
    latents: Tensor | Latents,
    parent: Bool[Tensor, " n"],
    child: Bool[Tensor, " n"],
    heldout: Bool[Tensor, " n"],
    *,
    n_parent: int = 1,
    silent: float = 0.0,
    siblings: Bool[Tensor, " n"] | None = None,
    directions: Float[Tensor, "F d"] | None = None,
    probe: Float[Tensor, " d"] | None = None,
    least_cosine: float | None = None,
) -> Absorption:
    """How often the latent of a factor's child stands in for that of the factor.

    1. The child's latent has the highest AUROC for the child among training rows with the parent,
       so that it is specific to the child.
    2. The parent's latents are, of all others, those of highest AUROC for the parent on all
       training rows.
    3. A held-out row with the child is absorbed if all the parent's latents are silent (at most
       `silent`), the child's is active, and, where directions are given, the child latent's
       direction has a cosine of at least `least_cosine` with the parent's probe.

    This is full absorption after Chanin et al. 2024 (arXiv 2409.14507) and SAEBench
    (arXiv 2503.09532), with known factors in place of a probe's verdict, the one known child in
    place of a search for the absorbing latent, and without ablations. The child's latent comes
    first because, where most of the parent's rows are the child's, the child's latent would else
    pass for the parent's.

    A dictionary that merely splits the parent into one latent a child looks the same on rows that
    carry one child alone: the parent's rows without the child are then its sibling's. On rows with
    both, an absorbed parent's latent is silent and a sibling's is not: see `silent_with_sibling`.
    Where a sibling's latent is a better sign of the parent than what absorption leaves of the
    parent's own, it is chosen as the parent's: the rate is then too low, and only this share tells.

    Args:
        latents: activations [n, F]; zero or less is silence unless `silent` says otherwise.
        parent: which rows carry the parent.
        child: which rows carry the child; each carries the parent.
        heldout: which rows are held out; no patient on both sides.
        n_parent: how many latents the parent has (see `sae.probing.splitting`).
        silent: largest activation that counts as silence.
        siblings: which rows carry another child of the parent.
        directions: decoder directions of all latents.
        probe: the parent's direction in the same space, such as the difference of the means of
            rows with and without it.
        least_cosine: None is 2 / √d, two standard deviations of random directions (Chanin et al.
            use 0.025 in 2304 dimensions, which is 1.2).

    Raises:
        PhantomError: a child without the parent, no rows to judge by, too few latents, or one of
            directions and probe without the other.
    """
    latents = sparse(latents)
    if bool((child & ~parent).any()):
        row = int((child & ~parent).nonzero()[0])
        raise PhantomError(f"row {row} carries the child but not the parent; mend the truth")
    if (directions is None) != (probe is None):
        raise PhantomError("directions and probe go together; give both or neither")
    if not 1 <= n_parent < latents.n_latents:
        raise PhantomError(
            f"{n_parent} latents of the parent and one of the child asked of {latents.n_latents}; "
            "give more latents"
        )
    sides = split(latents, torch.stack([parent, child], 1), heldout)
    (child_latent,) = _specific(sides)
    parents = _general(sides, [child_latent], n_parent)
    beside = siblings[heldout] if siblings is not None else None
    return _judge(sides, 1, child_latent, parents, silent, beside, directions, probe, least_cosine)


class HierarchyAbsorption(NamedTuple):
    """How a dictionary treats all parents and their children."""

    rate: float
    """Share, of all held-out rows with a child, on which its parent is absorbed."""
    n: int
    """Those rows, one for each child that is on."""
    silent: float
    """Share of those on which the parent's latent is silent, absorbed or not: what is silent
    without being absorbed has lost its parent in another way."""
    silent_alone: float
    """Share of held-out rows with a parent but none of its children on which its latent is silent:
    how often it is so for other reasons. 0 if `n_alone` is."""
    n_alone: int
    pairs: dict[tuple[int, int], Absorption]
    """By the columns of parent and child."""


def hierarchy_absorption(
    latents: Tensor | Latents,
    truth: Bool[Tensor, "n L"],
    parents: Int[Tensor, " L"],
    heldout: Bool[Tensor, " n"],
    *,
    directions: Float[Tensor, "F d"] | None = None,
    probes: Float[Tensor, "L d"] | None = None,
    least_cosine: float | None = None,
) -> HierarchyAbsorption:
    """`absorption` of every parent by each of its children, where all children are known.

    It differs in one thing: no child's latent passes for the parent's, so that a sibling's cannot
    be chosen where it is a better sign of the parent than what absorption leaves of its own.

    Args:
        latents: activations [n, F].
        truth: which rows carry which factor.
        parents: the column of every factor's parent, -1 where it has none.
        heldout: which rows are held out; no patient on both sides.
        directions: decoder directions of all latents.
        probes: the directions of the factors in the same space.
        least_cosine: see `absorption`.

    Raises:
        PhantomError: as `absorption`, or there is no hierarchy.
    """
    latents = sparse(latents)
    pairs: dict[tuple[int, int], Absorption] = {}
    n_alone = n_silent = 0
    for parent in sorted({one for one in parents.tolist() if one >= 0}):
        children = (parents == parent).nonzero().flatten().tolist()
        stray = (truth[:, children].any(1) & ~truth[:, parent]).nonzero()
        if len(stray):
            raise PhantomError(
                f"row {int(stray[0])} carries a child of factor {parent} but not the factor; mend "
                "the truth"
            )
        sides = split(latents, truth[:, [parent, *children]], heldout)
        specific = _specific(sides)
        general = _general(sides, specific, 1)
        alone = sides.test_truth[:, 0] & ~sides.test_truth[:, 1:].any(1)
        n_alone += int(alone.sum())
        n_silent += int((sides.test.dense(general)[alone] <= 0).sum())
        for column, (child, latent) in enumerate(zip(children, specific, strict=True), start=1):
            others = [i for i in range(1, len(children) + 1) if i != column]
            beside = sides.test_truth[:, others].any(1)
            probe = probes[parent] if probes is not None else None
            pairs[parent, child] = _judge(
                sides, column, latent, general, 0.0, beside, directions, probe, least_cosine
            )
    if not pairs:
        raise PhantomError("no factor has a parent, so nothing can be absorbed; give a hierarchy")
    found = list(pairs.values())
    n = sum(one.n for one in found)
    return HierarchyAbsorption(
        rate=sum(one.rate * one.n for one in found) / n,
        n=n,
        silent=sum(one.silent * one.n for one in found) / n,
        silent_alone=n_silent / n_alone if n_alone else 0.0,
        n_alone=n_alone,
        pairs=pairs,
    )


def _specific(sides: Sides) -> list[int]:
    """For each child (columns 1, 2, …) its best latent among training rows with the parent."""
    inside = sides.train_truth[:, 0]
    areas = aurocs(sides.train.take(inside), sides.train_truth[inside, 1:])
    if areas.isnan().any():
        raise PhantomError("every training row with the parent has the child; give other children")
    return areas.argmax(0).tolist()


def _general(sides: Sides, children: Sequence[int], n_parent: int) -> list[int]:
    """The best latents for the parent (column 0) that are no child's."""
    areas = aurocs(sides.train, sides.train_truth[:, :1])[:, 0]
    areas[children] = -1
    return areas.topk(n_parent).indices.tolist()


def _judge(
    sides: Sides,
    column: int,
    child_latent: int,
    parents: Sequence[int],
    silent: float,
    siblings: Tensor | None,
    directions: Tensor | None,
    probe: Tensor | None,
    least_cosine: float | None,
) -> Absorption:
    is_parent, is_child = sides.test_truth[:, 0], sides.test_truth[:, column]
    values = sides.test.dense([child_latent, *parents])
    quiet = (values[:, 1:] <= silent).all(1)
    absorbed = quiet & (values[:, 0] > silent)
    cosine = None
    if directions is not None and probe is not None:
        direction = directions[child_latent].detach().cpu().float()
        cosine = float(F.cosine_similarity(direction, probe.detach().cpu().float(), dim=0))
        least = 2 / len(direction) ** 0.5 if least_cosine is None else least_cosine
        absorbed &= cosine >= least
    elsewhere = is_parent & ~is_child
    both = is_child & siblings if siblings is not None else torch.zeros_like(is_child)
    return Absorption(
        rate=_share(absorbed, is_child),
        n=int(is_child.sum()),
        silent=_share(quiet, is_child),
        silent_elsewhere=_share(quiet, elsewhere),
        n_elsewhere=int(elsewhere.sum()),
        silent_with_sibling=_share(quiet, both) if both.any() else None,
        parent_latents=tuple(parents),
        child_latent=child_latent,
        parent_auroc=_area(values[~is_child, 1], is_parent[~is_child]),
        child_auroc=_area(values[is_parent, 0], is_child[is_parent]),
        cosine=cosine,
    )


def _share(event: Tensor, among: Tensor) -> float:
    n = int(among.sum())
    return int((event & among).sum()) / n if n else 0.0


def _area(values: Tensor, truth: Tensor) -> float:
    return float(auroc(values[:, None], truth).nan_to_num(0.5)[0])
