"""One spelling of instrument codes: every board, every style, nothing guessed."""

import numpy as np
import pandas as pd
import pytest

from data_handlers.codes import (
    CODE,
    a_share_code,
    check_spelling,
    code_of_file,
    normalise_codes,
    unreadable,
    was_renamed,
)

# Six digits of every board, and the exchange that assigns them.
BOARDS = {
    "SH": "600000 601398 603259 605499 688981 689009 900901 "
    "501018 510300 512880 513100 518880 561500 588000 508000 "
    "110059 111009 113052 118031",
    "SZ": "000001 001979 002594 003816 300750 301269 302132 200012 201872 "
    "150019 159915 159995 160105 161725 180101 184801 "
    "123107 127045 128136",
    "BJ": "430047 831010 832175 835185 870299 872925 873223 889999 "
    "920001 920002 920819",
}
TABLE = [(code, ex + code) for ex, codes in BOARDS.items() for code in codes.split()]
# No exchange's range, or those of several: indices, open-end funds, other markets.
UNTOLD = (
    "399300 801010 931865 899050 005827 112233 122000 204001 131810 019547 700123 "
    "400001 00700 09988 00001 0 000 60000000 AAPL TRUE INF NA 700.HK SH60000 SH600 "
    "600000.HK 600000.US SHSZ600000 2024-03 ６０００００"
).split()


def codes(values, **more):
    return normalise_codes(pd.Series(values), "here", **more).tolist()


@pytest.mark.parametrize("digits, want", TABLE)
def test_six_digits_are_told_by_the_ranges_of_the_exchanges(digits, want):
    assert a_share_code(digits) == want == a_share_code(f" {digits} ")
    assert CODE.fullmatch(want)


@pytest.mark.parametrize(
    "style, exchange",
    [
        *((f"{{}}.{name}", "SH") for name in ("SH", "SS", "XSHG", "SSE", "sh", "SHSE")),
        *((f"{{}}.{name}", "SZ") for name in ("SZ", "XSHE", "SZSE", "sz")),
        *((f"{{}}.{name}", "BJ") for name in ("BJ", "XBSE", "bj")),
        *((style, "SH") for style in ("SH{}", "sh{}", "sh.{}", "SHSE.{}", "sh_{}")),
        *((style, "SZ") for style in ("SZ{}", "sz{}", "sz.{}", "SZSE.{}", "SZ-{}")),
        *((style, "BJ") for style in ("BJ{}", "bj{}", "bj.{}")),
    ],
)
@pytest.mark.parametrize("digits", ["000001", "600000", "920001", "430047", "399300"])
def test_a_code_that_names_its_exchange_is_taken_at_its_word(style, exchange, digits):
    assert a_share_code(style.format(digits)) == exchange + digits


def test_normal_codes_stay():
    for _, code in TABLE:
        assert a_share_code(code) == code


@pytest.mark.parametrize("text", UNTOLD)
def test_what_cannot_be_told_is_not_guessed(text):
    assert a_share_code(text) is None
    with pytest.raises(ValueError, match=r"here has 1 code.* no known A-share style"):
        codes([text])


def test_digits_that_lost_their_zeros_get_them_back():
    assert codes([1, 2594, 300750]) == ["SZ000001", "SZ002594", "SZ300750"]
    assert codes([1.0, 600000.0]) == ["SZ000001", "SH600000"]
    assert codes(["1", "2594", "1.0"]) == ["SZ000001", "SZ002594", "SZ000001"]


def test_bare_digits_of_an_index_source_are_indices():
    given = ["000300", "399006", "899050", 905, "000300.CSI", "399300.CSI", "931865"]
    assert codes(given, index=True) == [
        *("SH000300", "SZ399006", "BJ899050", "SH000905", "SH000300"),
        *("SZ399300", "SH931865"),
    ]
    with pytest.raises(ValueError, match="no known A-share style"):
        codes(["600000"], index=True)


def test_the_first_bad_code_is_named_with_its_row():
    with pytest.raises(ValueError, match=r"here has 2 code.*'AAPL' in data row 2"):
        codes(["600000", "AAPL", "AAPL", "MSFT"])
    with pytest.raises(ValueError, match="missing code in data row 2"):
        codes(["600000", None])
    assert codes(["600000", "AAPL"], keep_unknown=True) == ["SH600000", "AAPL"]


def test_codes_may_stay_as_they_are():
    given = ["aapl", "TRUE", "00700", "INF", "1e5"]
    assert codes(given, style="asis") == ["AAPL", "TRUE", "00700", "INF", "1E5"]


@pytest.mark.parametrize("code", ["NA", "na", "NULL"])
def test_a_code_that_qlib_reads_as_a_blank_is_renamed(code, tmp_path):
    def as_qlib_reads_it(name):
        (tmp_path / "all.txt").write_text(f"{name}\t2020-01-02\t2020-03-01\n")
        lines = pd.read_csv(tmp_path / "all.txt", sep="\t", header=None, dtype={0: str})
        return lines.iloc[0, 0]

    assert pd.isna(as_qlib_reads_it(code.upper())) and unreadable(code.upper())
    _, name = codes(["AAPL", code], style="asis")
    assert name == code.upper() + "_" == as_qlib_reads_it(name)
    assert was_renamed(name) and not was_renamed("AAPL_") and not was_renamed("NA")


@pytest.mark.parametrize(
    "file, want",
    [
        ("600020.csv", "600020"),
        ("600020.CSV", "600020"),
        ("600020.txt", "600020"),
        ("d/600020.csv.gz", "600020"),
        ("600000.SH.parquet", "600000.SH"),
        ("SH600519_2024-03.csv", "SH600519"),
        ("600519_202403.csv", "600519"),
        ("600519-2024.csv", "600519"),
        ("sh.600519_2024-03-04.csv", "sh.600519"),
        ("20240304_600519.csv", "600519"),
        ("2024-03_SZ000001.csv", "SZ000001"),
        ("200012.csv", "200012"),  # a B share, not December 2000
        ("200012_2024-03.csv", "200012"),
        ("BRK.B.csv", "BRK.B"),
        ("NA.csv", "NA"),
        ("SH#600519.txt", "SH#600519"),  # the terminal's own export
        ("2024-03.csv", "2024-03"),
    ],
)
def test_a_file_name_holds_the_code(file, want):
    assert code_of_file(file) == want


def test_codes_agree_between_numbers_texts_and_categories():
    number = pd.Series([1, 600000], dtype="int64")
    text = pd.Series(["000001", "600000"], dtype="category")
    a, b = normalise_codes(number, "x"), normalise_codes(text, "x")
    assert np.array_equal(a, b)


@pytest.mark.parametrize(
    "text, code",
    [
        ("600519_daily", "SH600519"),
        ("SH600519(1)", "SH600519"),
        ("000001.XSHE qfq", "SZ000001"),
        ("sz300750 宁德时代", "SZ300750"),
    ],
)
def test_a_text_beside_the_code_is_refused_with_the_code(text, code):
    with pytest.raises(ValueError, match=rf"holds that of {code}: write {code} alone"):
        check_spelling(text, "x")
    with pytest.raises(ValueError, match=f"holds that of {code}"):
        normalise_codes(pd.Series([text]), "x")
    assert normalise_codes(pd.Series([text]), "x", style="asis")[0] == text.upper()


@pytest.mark.parametrize("text", ["00700", "AAPL", "BRK.B", "TRUE", "204001", "IF2403"])
def test_other_markets_codes_hold_none(text):
    check_spelling(text, "x")
