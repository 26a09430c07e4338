import re

import pandas as pd
import pytest

from qlib_ext.report import plots
from qlib_ext.report.page import Page, format_value, text_table, title_of

EVIL = "<script>alert(1)</script>"


@pytest.fixture(scope="module")
def page_html():
    page = Page(f"Title {EVIL}", f"lead {EVIL}")
    page.warn(f"warning {EVIL}")
    page.tile(f"tile {EVIL}", 0.1234)
    page.section(f"Section {EVIL}", EVIL)
    frame = pd.DataFrame({EVIL: [1.0], "text": [EVIL]}, index=[EVIL])
    page.table(f"Table {EVIL}", frame, EVIL, styles={"text": (EVIL, "s")})
    page.plot(EVIL, plots.bars(frame[[EVIL]], EVIL), EVIL)
    page.plot("curves", plots.lines(frame[[EVIL]], "y"), "note")
    return page.render(EVIL)


def test_page_escapes_every_value(page_html):
    assert "alert(1)" in page_html
    assert EVIL not in page_html
    # Three script elements of our own: plotly, the figures' JSON, the code.
    assert len(re.findall(r"<script", page_html)) == 3 + page_html.count('"<script')


def test_page_holds_plotly_once_and_fetches_nothing(page_html):
    assert page_html.count("plotly.js v") == 1
    assert "default-src 'none'" in page_html
    shell = re.sub(r"<script>.*?</script>", "", page_html, flags=re.S)
    assert not re.search(r'(src|href)="(?!#)', shell)
    assert "prefers-color-scheme:dark" in shell and "width=device-width" in shell


def test_page_needs_a_section_before_a_table():
    with pytest.raises(ValueError, match="`section` must be called before"):
        Page("t").table("x", pd.DataFrame())


@pytest.mark.parametrize(
    ("value", "style", "shown"),
    [
        (0.12345, "p2", "12.35 %"),
        (-0.00001, "p2", "0.00 %"),
        (1234.5, "i", "1,234"),
        (float("nan"), "n2", "–"),
        (None, "n2", "–"),
        ("abc", "n2", "abc"),
        (-1.005, "n1", "-1.0"),
    ],
)
def test_values_are_printed_in_their_style(value, style, shown):
    assert format_value(value, style) == shown


def test_row_names_of_portfolios_are_words_and_others_stay():
    assert title_of("layer_03") == "layer 3"
    assert title_of("hedged_top") == "hedged top"
    assert title_of("rnn_day_multi") == "rnn_day_multi"


def test_terminal_table_lines_up():
    text = text_table([["a", "1"], ["long name", "22"]], ["name", "n"])
    assert text.splitlines() == [
        "name        n",
        "---------  --",
        "a           1",
        "long name  22",
    ]
