import pytest
from hypothesis import given
from hypothesis import strategies as st

from hooks.readers import parse_report, read_openi, split_report


def sections(text):
    return {section.name: section.text for section in parse_report(text)}


ORDINARY = (
    "                                 FINAL REPORT\n EXAMINATION:  CHEST (PA AND LAT)\n \n"
    " INDICATION:  ___F with cough.  // pneumonia?\n \n TECHNIQUE:  Chest PA and lateral\n \n"
    " COMPARISON:  ___\n \n FINDINGS: \n \n The lungs are clear.\n No effusion.\n \n"
    " IMPRESSION: \n \n No acute process.\n"
)


def test_an_ordinary_report():
    assert sections(ORDINARY) == {
        "examination": "CHEST (PA AND LAT)",
        "indication": "___F with cough. // pneumonia?",
        "technique": "Chest PA and lateral",
        "comparison": "___",
        "findings": "The lungs are clear. No effusion.",
        "impression": "No acute process.",
    }


def test_windows_line_ends_change_nothing():
    assert sections(ORDINARY.replace("\n", "\r\n")) == sections(ORDINARY)


@pytest.mark.parametrize(
    ("heading", "name"),
    [
        ("FINDINGS AND IMPRESSION:", "findings"),
        ("IMPRESSION AND FINDINGS:", "findings"),
        ("FINDINGS/IMPRESSION:", "findings"),
        ("FINDNGS:", "findings"),
        ("IMPRESSIONS:", "impression"),
        ("IMPRESSON:", "impression"),
        ("CONCLUSION:", "impression"),
        ("CHEST, PA AND LATERAL:", "findings"),
        ("PA AND LATERAL CHEST X-RAY:", "findings"),
        ("PORTABLE UPRIGHT CHEST RADIOGRAPH:", "findings"),
        ("PORTABLE CHEST RADIOGRAPH, ___ AT 10:30:", "findings"),
        ("AP CHEST COMPARED TO ___:", "findings"),
        ("REASON FOR EXAMINATION:", "indication"),
        ("CLINICAL INFORMATION:", "indication"),
        ("CLINICAL HISTORY:", "history"),
        ("HISTORY:", "history"),
        ("COMPARISONS:", "comparison"),
        ("COMPARISON STUDY:", "comparison"),
        ("TECHNIQUE:", "technique"),
        ("EXAM:", "examination"),
        ("WET READ:", "wet read"),
        ("RECOMMENDATION(S):", "recommendation"),
        ("NOTIFICATION:", "notification"),
        ("ADDENDUM:", "addendum"),
        ("Findings:", "findings"),
        ("Impression:", "impression"),
        ("IMPRESSION.", "impression"),
    ],
)
def test_headings_in_use(heading, name):
    assert sections(f" {heading}  Some words.\n") == {name: "Some words."}


def test_a_heading_alone_on_its_line_needs_no_colon():
    assert sections("FINDINGS\nClear.\r\nIMPRESSION\r\nFine.") == {
        "findings": "Clear.",
        "impression": "Fine.",
    }


@pytest.mark.parametrize(
    "line",
    [
        "LUNGS: well aerated.",
        "NG TUBE: in the stomach.",
        "Dr. X was paged at 3:15 PM.",
        "FINDINGS were discussed by phone.",
        "Findings discussed with the team: yes.",
        "AP.",
        "COPD.",
    ],
)
def test_what_is_no_heading_stays_in_its_section(line):
    assert sections(f"FINDINGS: Clear.\n {line}\n") == {"findings": f"Clear. {line}"}


@pytest.mark.parametrize("end", ["\n", "\r\n"])
def test_findings_without_a_heading_are_not_the_comparison(end):
    text = " COMPARISON: \n \n ___.\n None older.\n \n Heart is big.\n \n No effusion.\n"
    assert sections(text.replace("\n", end)) == {
        "comparison": "___. None older.",
        "body": "Heart is big. No effusion.",
    }
    assert sections("FINDINGS: A.\n\nB.\n") == {"findings": "A. B."}


def test_a_wet_read_is_not_the_report():
    text = "WET READ: ___ 8:42 AM\n Maybe effusion.\n ____\n FINAL REPORT\n IMPRESSION: None.\n"
    assert sections(text)["impression"] == "None."
    assert "Maybe effusion" in sections(text)["wet read"]


def test_two_reports_in_one_are_joined():
    text = "FINDINGS: At 3.\nIMPRESSION: One.\nFINDINGS: At 5.\nIMPRESSION: Two.\n"
    assert sections(text) == {"findings": "At 3. At 5.", "impression": "One. Two."}


def test_no_heading_at_all_and_nothing_at_all():
    assert sections("PORTABLE CHEST, no change.\n") == {"preamble": "PORTABLE CHEST, no change."}
    assert sections("") == {} and sections("FINDINGS:\n\n") == {}


WORDS = st.sampled_from(
    ("FINDINGS:", "IMPRESSION", "Impression:", "CHEST, PA:", "FINAL REPORT", "LUNGS:", "clear.")
) | st.sampled_from(
    (
        "3:15",
        "\n\n",
        "COMPARISON:",
        "\n",
        "\r\n",
        " \n ",
        "\t",
        " ",
        ":",
        "—",
        "\x0b",
        "\u2028",
        "WET READ: ___",
    )
)


@given(st.one_of(st.text(), st.lists(WORDS).map("".join)))
def test_no_text_is_lost(text):
    parts = split_report(text)
    assert "".join(part.heading + part.text for part in parts) == text
    words = [w for part in parts for w in part.text.split()]
    assert sorted(words) == sorted(w for s in parse_report(text) for w in s.text.split())


def test_the_real_openi_reports_survive_being_written_under_headings():
    from maira_sae.real_model import film, openi_archive

    studies = read_openi(openi_archive(), film())
    assert len(studies) == 3425
    for study in studies:
        text = "".join(f" {s.name.upper()}:  {s.text}\r\n \r\n" for s in study.sections)
        assert parse_report(text) == study.sections, study.id
