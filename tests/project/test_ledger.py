"""Each measured number of the README has a row in the ledger, and each row a file to show."""

import datetime
import json
import re
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
RESULTS = ROOT / "experiments" / "results"
FIRST = datetime.date(2024, 2, 8)  # the paper
MEASURED = ("", "How fast", "The paper's experiments")  # sections of the README; "" is the first
NUMBER = re.compile(r"(?<![\w.])\d+\.\d+(?![\w.]*\d)|(?<![\w.])\d+ (?:%|MB|GB|min|s)(?!\w)")


def measured_numbers() -> set[str]:
    text = (ROOT / "README.md").read_text()
    sections = dict(
        (part.partition("\n")[0].strip() if i else "", part)
        for i, part in enumerate(re.split(r"^## ", text, flags=re.MULTILINE))
    )
    assert set(MEASURED) <= set(sections)
    found = set()
    for name in MEASURED:
        prose = re.sub(
            r"```.*?```|`[^`]*`|\]\([^)]*\)|arXiv[ \d.]*", " ", sections[name], flags=re.S
        )
        prose = re.sub(r"(Python|PyTorch|torch) *(≥|from)? *[\d.]+", " ", prose)
        found |= set(NUMBER.findall(prose))
    return found


def rows() -> list[list[str]]:
    lines = (RESULTS / "README.md").read_text().splitlines()
    table = [line.strip("|").split("|") for line in lines if line.startswith("| ")]
    return [[cell.strip() for cell in row] for row in table[1:]]


def test_every_number_of_the_readme_has_its_row():
    listed = set()
    for row in rows():
        listed |= set(NUMBER.findall(row[0]))
    numbers = measured_numbers()
    assert len(numbers) > 20
    assert not numbers - listed, f"not in the ledger: {sorted(numbers - listed)}"
    assert not listed - numbers, f"no longer in the README: {sorted(listed - numbers)}"


@pytest.mark.parametrize("row", rows(), ids=lambda row: row[1][:40])
def test_a_row_is_complete(row):
    numbers, what, command, seed, commit, hardware, date, evidence = row
    assert numbers and what and seed and hardware
    assert re.fullmatch(r"`[^`]+`", command)
    assert re.fullmatch(r"[0-9a-f]{7}", commit)
    assert datetime.date.fromisoformat(date) > FIRST
    for name in re.findall(r"\]\(([^)]+)\)", evidence):
        assert (RESULTS / name).is_file(), name


def test_results_say_where_they_come_from():
    for path in RESULTS.glob("*.json"):
        report = json.loads(path.read_text())
        assert {"command", "date", "commit", "device", "versions"} <= report.keys(), path.name
