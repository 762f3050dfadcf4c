"""One printer of tables, for terminals and as Markdown."""

import pytest

from dis_ssm.system.tables import format_table

ROWS = [("name", "n", "note"), ("a", 10, ""), ("long name", 5, "x")]


def test_columns_are_as_wide_as_their_widest_cell():
    assert format_table(ROWS) == "name       n   note\na          10\nlong name  5   x"


def test_numbers_stand_under_one_another():
    assert format_table(ROWS, right=True) == (
        "name        n  note\na          10\nlong name   5     x"
    )


def test_markdown():
    assert (
        format_table(ROWS[:2], markdown=True) == "| name | n | note |\n|---|---|---|\n| a | 10 |  |"
    )
    assert format_table(ROWS[:1], right=True, markdown=True).endswith("|---|---:|---:|")


@pytest.mark.parametrize("rows", [[], [(1, 2), (1,)]])
def test_rows_must_be_equally_long(rows):
    with pytest.raises(ValueError, match="as many in each"):
        format_table(rows)
