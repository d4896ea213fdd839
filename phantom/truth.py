"""Phantom studies as files, from which everything true of them can be drawn again."""

import re
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any, get_args

import numpy as np
from PIL import Image

from hooks.files import (
    atomic_path,
    file_record,
    fingerprint,
    is_sealed,
    open_sealed,
    read_json,
    reject_unknown_keys,
    seal,
    versions,
    write_json,
)
from hooks.studies import STUDIES_FILE, Study, read_folder
from phantom.draw import FILM_SIZE, Film
from phantom.factors import PhantomError, independent_factors
from phantom.study import PhantomStudy, Sampler, sample_study

KIND = "phantom-studies"
FORMAT_VERSION = 1
TRUTH_FILE = "truth.json"
REMEDY = "run phantom.truth.write_studies to make it"

_ID = re.compile(r"phantom-(\d{7,})")


@dataclass(frozen=True)
class Truth:
    """How the studies of one folder were drawn; with an id, everything about a study follows.

    Raises:
        PhantomError: the sampler does not exist, or a rate is outside 0 to 1.
    """

    sampler: Sampler = "clinical"
    """Clinical or independent, see `phantom.study.sample_study`."""
    rate: float | Mapping[str, float] = 0.25
    """How often each label occurs with the independent sampler."""
    lateral: bool | None = None
    """Whether there is a lateral film; None leaves it to chance."""
    prior: bool | None = None
    """Whether there is a prior film; None leaves it to chance."""
    grounded: bool = False
    """Whether the studies ask for, and hold, reports with boxes."""
    size: int = FILM_SIZE
    """Height and width of the films in pixels."""

    def __post_init__(self) -> None:
        if self.sampler not in get_args(Sampler):
            known = " or ".join(get_args(Sampler))
            raise PhantomError(f"there is no sampler {self.sampler!r}; use {known}")
        independent_factors(0, self.rate)

    def draw(self, seed: int) -> PhantomStudy:
        """The study of a seed."""
        return sample_study(
            seed,
            sampler=self.sampler,
            rate=self.rate,
            lateral=self.lateral,
            prior=self.prior,
            size=self.size,
        )

    def study(self, name: str) -> PhantomStudy:
        """The study of an id such as `phantom-0000012`, drawn again.

        Raises:
            PhantomError: the id is no phantom's.
        """
        return self.draw(seed_of(name))


def id_of(seed: int) -> str:
    """The id of a seed's study, such as `phantom-0000012`."""
    return f"phantom-{int(seed):07d}"


def seed_of(name: str) -> int:
    """The seed that an id names.

    Raises:
        PhantomError: the id is no phantom's.
    """
    match = _ID.fullmatch(name)
    if match is None or id_of(int(match[1])) != name:
        raise PhantomError(f"{name!r} is no phantom's id; give one such as {id_of(12)!r}")
    return int(match[1])


def write_studies(
    folder: Path,
    seeds: Sequence[int],
    *,
    sampler: Sampler = "clinical",
    rate: float | Mapping[str, float] = 0.25,
    lateral: bool | None = None,
    prior: bool | None = None,
    grounded: bool = False,
    size: int = FILM_SIZE,
) -> list[Study]:
    """Draw studies into a folder that `hooks.studies.read_folder` reads.

    `truth.json` comes first, then a PNG for each film, then `studies.jsonl`, and the manifest
    last. The same arguments give the same bytes; a run that was killed goes on where it stopped.

    Args:
        folder: where to; new, or begun with the same arguments.
        seeds: one for each study, whole numbers from 0.
        sampler: see `Truth`, as for all that follow.
        rate: of each label, with the independent sampler.
        lateral: whether there is a lateral film.
        prior: whether there is a prior film.
        grounded: write the grounded report and ask for it.
        size: height and width of the films in pixels.

    Returns:
        The studies. Each patient has one; its labels are what the current films show.

    Raises:
        PhantomError: no seeds, a seed twice, or a folder that holds something else.
    """
    rates = dict(rate) if isinstance(rate, Mapping) else rate
    truth = Truth(sampler, rates, lateral, prior, grounded, size)
    numbers = [int(seed) for seed in seeds]
    if not numbers or len(set(numbers)) < len(numbers):
        raise PhantomError(f"{len(numbers)} seeds given; give at least one, and none twice")
    _begin(folder, {**asdict(truth), "seeds_sha256": fingerprint(numbers)})
    if not is_sealed(folder):
        studies, files = [], [Path(TRUTH_FILE), Path(STUDIES_FILE)]
        for seed in numbers:
            studies.append(_write_films(folder, truth, truth.draw(seed)))
            files += studies[-1].films()
        with atomic_path(folder / STUDIES_FILE) as temporary:
            lines = (study.model_dump_json(exclude_none=True) for study in studies)
            temporary.write_text("".join(f"{line}\n" for line in lines))
        records = {path.as_posix(): file_record(folder / path) for path in files}
        seal(folder, KIND, FORMAT_VERSION, records, n_studies=len(studies))
    return read_folder(folder)


def _begin(folder: Path, record: dict[str, Any]) -> None:
    """Record what the folder will hold, or check that it is what the folder was begun with."""
    path = folder / TRUTH_FILE
    if path.is_file():
        found = read_json(path)
        for key in {**found, **record}:
            if found.get(key) != record.get(key):
                raise PhantomError(
                    f"{folder} was begun with {key} {found.get(key)!r}, asked was "
                    f"{record.get(key)!r}; give a new folder, or delete this one"
                )
    elif folder.is_dir() and any(folder.iterdir()):
        raise PhantomError(f"{folder} is not empty and holds no {TRUTH_FILE}; give a new folder")
    else:
        write_json(path, record)


def _write_films(folder: Path, truth: Truth, drawn: PhantomStudy) -> Study:
    """Write the films that are not there yet; the study has their paths within the folder."""
    name = id_of(drawn.seed)
    paths = {}
    for view in ("frontal", "lateral", "prior"):
        film: Film | None = getattr(drawn, view)
        if film is None:
            continue
        paths[view] = Path("films") / f"{name}-{view}.png"
        if not (folder / paths[view]).is_file():
            with atomic_path(folder / paths[view]) as temporary:
                Image.fromarray(film.pixels).save(temporary, format="PNG")
    report = drawn.report
    return Study(
        id=name,
        **paths,
        indication=report.indication,
        technique=report.technique,
        comparison=report.comparison,
        report=report.grounded if truth.grounded else report.findings,
        grounded=truth.grounded,
        patient=name,
        labels=drawn.factors.present,
    )


def read_truth(folder: Path) -> Truth:
    """How the studies of a folder were drawn.

    The first study is drawn again and compared, so that a folder which another version of the
    library drew differently is refused.

    Raises:
        FolderError: the folder is missing, unfinished or damaged.
        PhantomError: the first study is no longer drawn as the folder has it.
    """
    manifest = open_sealed(folder, KIND, FORMAT_VERSION, REMEDY)
    record = read_json(folder / TRUTH_FILE)
    record.pop("seeds_sha256", None)
    reject_unknown_keys(record, [field.name for field in fields(Truth)], str(folder / TRUTH_FILE))
    truth = Truth(**record)
    first = read_folder(folder)[0]
    drawn = truth.study(first.id)
    text = drawn.report.grounded if truth.grounded else drawn.report.findings
    films = [np.asarray(Image.open(path)) for path in first.films()]
    again = [film.pixels for film in drawn.films()]
    same = len(films) == len(again) and all(map(np.array_equal, films, again))
    if not same or text != first.report:
        raise PhantomError(
            f"{first.id} in {folder} differs from what this version draws; it was drawn by "
            f"{manifest['versions']['maira-sae']}, this is {versions()['maira-sae']}: write the "
            "studies again into a new folder"
        )
    return truth
