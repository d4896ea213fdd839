"""The language of the reports: every sentence there is, and what each one says.

Writer and reader both go by these tables, so that they cannot drift apart. Sentences are lower
case, one word a token, and end in ` .`.
"""

from collections.abc import Iterable, Mapping
from functools import lru_cache
from types import MappingProxyType

from hooks.grounding import BINS
from phantom.factors import DEVICES, LABELS, PARTS, PhantomError, labels_of
from phantom.findings import ABSENT, State, states_of

SECTIONS = ("indication", "technique", "comparison", "findings", "impression")
DEFAULT_BINS = BINS
"""Steps of a box coordinate; MAIRA-2's."""
SPECIAL = ("<pad>", "<s>", "</s>", "<unk>", "<image>", "<obj>", "</obj>", "<box>", "</box>")
"""Tokens that are no words; MAIRA-2's where it has them."""

TECHNIQUES: Mapping[bool, tuple[str, ...]] = MappingProxyType(
    {
        False: ("frontal view of the chest .", "single frontal view ."),
        True: ("frontal and lateral views of the chest .", "frontal and lateral views ."),
    }
)
"""What the technique says, by whether there is a lateral film."""
COMPARISONS: Mapping[bool, tuple[str, ...]] = MappingProxyType(
    {
        False: ("none .", "no prior film ."),
        True: ("prior frontal film .", "frontal film from before ."),
    }
)
"""What the comparison says, by whether there is a prior film."""
INDICATIONS: tuple[str, ...] = (
    "chest pain .",
    "follow up .",
    "trauma .",
    "before surgery .",
    "shortness of breath .",
    "fever and cough .",
    "weight loss .",
    "after tube placement .",
    "pacemaker check .",
)
"""Why a film was asked for. Chosen apart from the findings: nothing but the films tells what they
show."""

_NOUNS: Mapping[tuple[str, str], tuple[str, ...]] = MappingProxyType(
    {
        ("effusion", "small"): (
            "small {side} pleural effusion",
            "small pleural effusion on the {side}",
        ),
        ("effusion", "large"): (
            "large {side} pleural effusion",
            "large pleural effusion on the {side}",
        ),
        ("cardiomegaly", ""): ("cardiomegaly", "enlargement of the heart"),
        ("pacemaker", ""): (
            "left chest pacemaker",
            "pacemaker with its lead in the right ventricle",
        ),
        ("endotracheal_tube", ""): (
            "endotracheal tube",
            "endotracheal tube with its tip above the carina",
        ),
        ("nasogastric_tube", "stomach"): (
            "nasogastric tube with its tip in the stomach",
            "nasogastric tube ending below the diaphragm",
        ),
        ("nasogastric_tube", "high"): (
            "nasogastric tube with its tip above the diaphragm",
            "nasogastric tube ending too high",
        ),
        ("nodule", ""): ("{side} {zone} lung nodule", "nodule in the {side} {zone} lung"),
        ("pneumothorax", ""): ("{side} pneumothorax", "pneumothorax on the {side}"),
        ("consolidation", ""): ("{side} lung consolidation", "consolidation in the {side} lung"),
    }
)
_PLAIN: Mapping[str, str] = MappingProxyType(
    {
        "effusion": "{side} pleural effusion",
        "cardiomegaly": "cardiomegaly",
        "pacemaker": "pacemaker",
        "endotracheal_tube": "endotracheal tube",
        "nasogastric_tube": "nasogastric tube",
        "nodule": "{side} {zone} lung nodule",
        "pneumothorax": "{side} pneumothorax",
        "consolidation": "{side} lung consolidation",
    }
)
_UNCOUNTED = ("cardiomegaly", "consolidation")  # these take no article

# The first frame of each is the brief one, which impressions use.
_FRAMES: Mapping[tuple[str, str], tuple[str, ...]] = MappingProxyType(
    {
        ("present", ""): ("{it}", "there is a {it}", "{it} is seen"),
        ("present", "new"): ("new {it}", "there is a new {it}", "{it} , new since the prior film"),
        ("present", "unchanged"): (
            "unchanged {it}",
            "stable {it}",
            "{it} , unchanged since the prior film",
        ),
        ("present", "larger"): (
            "{it} , increased",
            "{it} , larger than on the prior film",
            "{it} has increased since the prior film",
        ),
        ("present", "smaller"): (
            "{it} , decreased",
            "{it} , smaller than on the prior film",
            "{it} has decreased since the prior film",
        ),
        ("possible", ""): (
            "possible {it}",
            "{it} cannot be excluded",
            "there may be a {it}",
            "suspected {it}",
        ),
        ("possible", "new"): (
            "possible new {it}",
            "there may be a new {it}",
            "possible {it} , new since the prior film",
        ),
        ("possible", "unchanged"): (
            "possible {it} , unchanged",
            "suspected {it} , unchanged since the prior film",
        ),
        ("possible", "larger"): (
            "possible {it} , increased",
            "suspected {it} , larger than on the prior film",
        ),
        ("possible", "smaller"): (
            "possible {it} , decreased",
            "suspected {it} , smaller than on the prior film",
        ),
        ("absent", "resolved"): (
            "resolved {it}",
            "the {it} has resolved",
            "{it} is no longer seen",
            "the {it} has resolved since the prior film",
        ),
        ("absent", "removed"): (
            "{it} removed",
            "the {it} has been removed",
            "the {it} has been removed since the prior film",
        ),
    }
)
_HEART = {
    State("present"): ("the heart is enlarged", "the cardiac silhouette is enlarged"),
    State("absent", "", "resolved"): ("the heart is no longer enlarged",),
}

GROUPS: tuple[tuple[str, ...], ...] = (
    DEVICES,
    ("cardiomegaly",),
    ("consolidation", "nodule"),
    ("effusion", "pneumothorax"),
)
"""The kinds in the order in which a report takes them, grouped as one sentence may deny them."""
DENIALS: Mapping[tuple[str, ...], tuple[str, ...]] = MappingProxyType(
    {
        DEVICES: ("no tubes or devices .", "there are no tubes or devices ."),
        ("cardiomegaly",): (
            "the heart is normal in size .",
            "heart size is normal .",
            "normal cardiac silhouette .",
        ),
        ("consolidation",): ("no consolidation .", "there is no consolidation ."),
        ("nodule",): ("no lung nodule .", "no nodule is seen ."),
        ("consolidation", "nodule"): (
            "the lungs are clear .",
            "no consolidation or nodule .",
            "lungs clear .",
        ),
        ("effusion",): ("no pleural effusion .", "there is no pleural effusion ."),
        ("pneumothorax",): ("no pneumothorax .", "there is no pneumothorax ."),
        ("effusion", "pneumothorax"): (
            "no pleural effusion or pneumothorax .",
            "there is no pneumothorax or pleural effusion .",
        ),
        ("effusion", "pneumothorax", "consolidation", "nodule", "cardiomegaly"): (
            "no acute abnormality .",
            "no acute cardiopulmonary process .",
        ),
    }
)
"""Sentences that say that no label of some kinds is there."""
ALL_CLEAR = tuple(DENIALS)[-1]
"""The kinds that an impression without findings denies."""

Meaning = tuple[tuple[str, State], ...]


@lru_cache(maxsize=4096)
def phrasings(label: str, state: State, *, brief: bool = False) -> tuple[str, ...]:
    """Every sentence that says that a label is in a state.

    Args:
        label: one of `LABELS`.
        state: its state; plain absence has no sentence of its own (see `DENIALS`).
        brief: only the short ones, which impressions use.
    """
    kind, side, zone = PARTS[label]
    gone = state.status == "absent"
    nouns = (_PLAIN[kind],) if gone else _NOUNS[kind, state.grade]
    change = "removed" if gone and kind in DEVICES else state.change
    frames = _FRAMES[state.status, change]
    whole = [
        _articles(frame.format(it=noun.format(side=side, zone=zone)), kind not in _UNCOUNTED)
        for frame in (frames[:1] if brief else frames)
        for noun in nouns
    ]
    if kind == "cardiomegaly" and not brief:
        whole += _HEART.get(state, ())
    return tuple(f"{sentence} ." for sentence in whole)


def _articles(sentence: str, counted: bool) -> str:
    """The sentence with every `a` made `an` before a vowel, or dropped."""
    words = sentence.split()
    out = []
    for word, following in zip(words, [*words[1:], ""], strict=True):
        if word != "a":
            out.append(word)
        elif counted:
            out.append("an" if following[0] in "aeiou" else "a")
    return " ".join(out)


@lru_cache(maxsize=1)
def sentences() -> Mapping[str, Meaning]:
    """Every sentence of findings and impressions, with the states that it gives to labels.

    Raises:
        PhantomError: one sentence has two meanings; the tables above must be mended.
    """
    table: dict[str, Meaning] = {}
    for label in LABELS:
        for compared in (False, True):
            for state in states_of(label, compared=compared):
                for sentence in phrasings(label, state):
                    _enter(table, sentence, ((label, state),))
    for kinds, denials in DENIALS.items():
        meaning = tuple((label, ABSENT) for kind in kinds for label in labels_of(kind))
        for sentence in denials:
            _enter(table, sentence, meaning)
    return MappingProxyType(table)


def _enter(table: dict[str, Meaning], sentence: str, meaning: Meaning) -> None:
    if table.setdefault(sentence, meaning) != meaning:
        raise PhantomError(f"{sentence!r} says both {table[sentence]} and {meaning}; reword one")


def vocabulary(bins: int = DEFAULT_BINS, extra: Iterable[str] = ()) -> tuple[str, ...]:
    """Every token of the language: special tokens, coordinates, then words in order.

    Args:
        bins: steps of a box coordinate.
        extra: further words, such as those of a prompt.

    Returns:
        The tokens, none twice; the place of a token is its id.

    Raises:
        PhantomError: there are no bins.
    """
    if bins < 1:
        raise PhantomError(f"{bins} bins asked for; use at least 1")
    texts = [*sentences(), *INDICATIONS, *(f"{name} :" for name in SECTIONS), *extra]
    for table in (TECHNIQUES, COMPARISONS):
        texts += [text for choices in table.values() for text in choices]
    places = [f"<{axis}{n}>" for axis in "xy" for n in range(bins)]
    words = {word for text in texts for word in text.split()}
    return (*SPECIAL, *places, *sorted(words.difference(SPECIAL, places)))
