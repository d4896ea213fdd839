"""What may not leave, and what must not be lost."""

import pytest

from autointerp.redact import redact


@pytest.mark.parametrize(
    ("text", "redacted"),
    [
        ("Comparison 3/14/2019.", "Comparison [DATE]."),
        ("Comparison 03-14-19 film", "Comparison [DATE] film"),
        ("Since 2019-03-14 stable", "Since [DATE] stable"),
        ("vom 14.03.2019", "vom [DATE]"),
        ("from 5/12 unchanged", "from [DATE] unchanged"),
        ("on March 3, 2019 and", "on [DATE] and"),
        ("of 3 Mar 2019", "of [DATE]"),
        ("the 3rd of march", "the [DATE]"),
        ("since January 2018", "since [DATE]"),
        ("MRN: 48213", "[ID]"),
        ("medical record number 0048213", "[ID]"),
        ("Accession No. CX-55512", "[ID]"),
        ("patient 10046166 film s50051329", "patient [ID] film [ID]"),
        ("SSN 123-45-6789", "SSN [ID]"),
        ("called (617) 555-0123", "called [PHONE]"),
        ("called 617.555.0123 at once", "called [PHONE] at once"),
        ("+49 30 1234 5678", "[PHONE]"),
        ("pager 31245", "[PHONE]"),
        ("Dr. Smith was told", "[NAME] was told"),
        ("DR SMITH", "[NAME]"),
        ("told Dr. J. van der Berg by telephone", "told [NAME] by telephone"),
        ("Mrs. O'Brien-Jones has", "[NAME] has"),
        ("dr. smith was told", "[NAME] was told"),
        ("Mr. <<Roe>> has <<effusion>>", "[NAME] has <<effusion>>"),
    ],
)
def test_identifiers_are_replaced(text, redacted):
    assert redact(text) == redacted


@pytest.mark.parametrize(
    "text",
    [
        "A 1.2 x 3.4 cm nodule, 12-15 mm before.",
        "MR Brain is advised.",
        "T2-3 level, 10/12 ribs, grade 3/6.",
        "Heart size may be enlarged; PICC tip in the SVC.",
        "The drain was removed; 500 cc of fluid, 7.5 mm.",
        "Name the one concept, in at most eight words.",
        "1. Small <<left>> pleural effusion.\n2. None.",
        "Marching band; the septal lines; 3 decades",
    ],
)
def test_findings_stay(text):
    assert redact(text) == text


def test_redacting_twice_changes_nothing():
    once = redact("Dr. Roe, 3/14/2019, MRN 1234567, 617-555-0123")
    assert redact(once) == once
