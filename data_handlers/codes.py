"""Instrument codes: every vendor's spelling of an A-share code, written as Qlib does.

A code that names its exchange is taken at its word (``sh.600000``, ``600000.XSHG``,
``SZSE.000001``). Six bare digits are told by the ranges that the exchanges assign:

========  ======================================================================
Shanghai  60 and 68 shares, 900 B shares, 5 funds, 110 111 113 118 convertibles
Shenzhen  000-004 and 30 shares, 200 201 B shares, 15 16 18 funds, 123 127 128
          convertibles
Beijing   43, 82, 83, 87, 88 and 92
========  ======================================================================

Anything else can't be told and stays untold: an index, whose digits are those of a
stock too, needs its exchange or a source of kind ``index``. Fewer than six digits have
lost their zeros (``1`` is 000001) unless they begin with one: ``00700`` is Hong Kong's.

Codes of futures are read only where a mapping says that its codes are futures: a bare
T is a share on another exchange. They become exchange and product, CFFEX.T, whatever
the delivery month: a store holds the continuous series.

Sources: the code tables of the three exchanges; 920 is Beijing's since 2024.
"""

from __future__ import annotations

import re
from functools import lru_cache
from pathlib import PurePath
from typing import Any

import numpy as np
import pandas as pd

__all__ = [
    "CODE",
    "a_share_code",
    "check_spelling",
    "code_of_file",
    "futures_code",
    "is_index",
    "kind_of",
    "normalise_codes",
    "spelt",
    "unreadable",
    "was_renamed",
]

#: What a code of the three exchanges looks like once it is normalised.
CODE = re.compile(r"(SH|SZ|BJ)[0-9]{6}")

_EXCHANGE = {
    **dict.fromkeys(("SH", "SS", "SSE", "SHSE", "XSHG", "CSI"), "SH"),
    **dict.fromkeys(("SZ", "SZSE", "XSHE"), "SZ"),
    **dict.fromkeys(("BJ", "BJSE", "XBSE"), "BJ"),
}
_NAMES = "|".join(sorted(_EXCHANGE, key=len, reverse=True))
_MARKED = (
    re.compile(rf"(?P<ex>{_NAMES})[.\-_:#]?(?P<num>[0-9]{{6}})"),
    re.compile(rf"(?P<num>[0-9]{{6}})[.\-_:]?(?P<ex>{_NAMES})"),
)
_BARE = re.compile(r"([1-9][0-9]{0,4}|[0-9]{6})(\.0)?")
_RANGES = {
    "SH": re.compile(r"6[08]|900|5|11[0138]"),
    "SZ": re.compile(r"00[0-4]|30|20[01]|1[568]|12[378]"),
    "BJ": re.compile(r"43|8[2378]|92"),
}
_INDICES = {
    "SH": re.compile(r"000|93|95"),
    "SZ": re.compile(r"399|98"),
    "BJ": re.compile(r"899"),
}
_KINDS = re.compile(
    r"(?P<B_share>SH900|SZ20[01])|(?P<fund>SH5|SZ1[568])|(?P<bond>SH1|SZ1[0-4])"
)
# What pandas, and so Qlib's own reader of instruments/*.txt, takes for a blank.
_BLANKS = frozenset(
    "#N/A|#N/A N/A|#NA|-1.#IND|-1.#QNAN|-NaN|-nan|1.#IND|1.#QNAN|<NA>|N/A|NA|NULL|NaN|"
    "None|n/a|nan|null".split("|")
)
# Not behind letters, and not with the mark of another market behind it.
_HELD = re.compile(
    rf"(?<![A-Z0-9])(?:(?:{_NAMES})[.\-_:#]?)?[0-9]{{6}}(?![0-9])(?!\.[A-Z]{{1,3}}$)"
)
_FUTURES = {
    **dict.fromkeys(("CFFEX", "CFE", "CCFX", "CFX"), "CFFEX"),
    **dict.fromkeys(("SHFE", "SHF", "XSGE"), "SHFE"),
    **dict.fromkeys(("DCE", "XDCE"), "DCE"),
    **dict.fromkeys(("CZCE", "CZC", "ZCE", "XZCE"), "CZCE"),
    **dict.fromkeys(("INE", "XINE"), "INE"),
    **dict.fromkeys(("GFEX", "GFE"), "GFEX"),
}
# Products that are told without their exchange.
_CFFEX = {"IC", "IF", "IH", "IM", "T", "TF", "TL", "TS"}
_MARKET = "|".join(sorted(_FUTURES, key=len, reverse=True))
_CONTRACT = r"(?P<product>[A-Z]{1,2})(?:[0-9]{3,4})?"
_FUTURE = (
    re.compile(rf"(?P<ex>{_MARKET})[.]{_CONTRACT}"),
    re.compile(rf"{_CONTRACT}[.](?P<ex>{_MARKET})"),
    re.compile(_CONTRACT),
)
_SUFFIX = re.compile(r"\.(csv|txt|parquet)(\.gz)?$", re.IGNORECASE)
_PERIOD = r"(?:19|20)\d\d(?:[-_.]?[01]\d(?:[-_.]?[0-3]\d)?)?"
_BEHIND = re.compile(rf"(?:[-_. ]+{_PERIOD})+$")
_BEFORE = re.compile(rf"^(?:{_PERIOD}[-_. ]+)+")


@lru_cache(maxsize=100_000)
def a_share_code(code: str, index: bool = False) -> str | None:
    """Write one A-share code as Qlib does.

    Parameters
    ----------
    code : str
        In any spelling.
    index : bool, default False
        Bare digits are an index: 000, 93, 95 in Shanghai, 399, 98 in Shenzhen, 899 in
        Beijing.

    Returns
    -------
    str or None
        Such as SH600000; None where it can't be told.

    Examples
    --------
    >>> [a_share_code(c) for c in ("600000.XSHG", "sz.000001", "920002", "1", "00700")]
    ['SH600000', 'SZ000001', 'BJ920002', 'SZ000001', None]
    >>> a_share_code("000300"), a_share_code("000300", index=True)
    ('SZ000300', 'SH000300')
    """
    text = code.strip().upper()
    for pattern in _MARKED:
        if match := pattern.fullmatch(text):
            number = match["num"]
            if match["ex"] == "CSI" and number.startswith("399"):
                return "SZ" + number
            return _EXCHANGE[match["ex"]] + number
    bare = _BARE.fullmatch(text)
    if not bare:
        return None
    number = bare[1].zfill(6)
    ranges = _INDICES if index else _RANGES
    return next((ex + number for ex, r in ranges.items() if r.match(number)), None)


@lru_cache(maxsize=100_000)
def futures_code(code: str) -> str | None:
    """Write the product of a futures code, without its delivery month.

    Parameters
    ----------
    code : str
        Exchange and product or contract, in either order, or one of the eight
        financial products alone.

    Returns
    -------
    str or None
        Such as CFFEX.T; None where it can't be told.

    Examples
    --------
    >>> [futures_code(c) for c in ("CFFEX.T", "T2403.CFE", "KQ.m@CFFEX.TL", "ts2406")]
    ['CFFEX.T', 'CFFEX.T', 'CFFEX.TL', 'CFFEX.TS']
    >>> futures_code("SHFE.ag2406"), futures_code("ag2406")
    ('SHFE.AG', None)
    """
    text = code.strip().upper().rpartition("@")[2]
    for pattern in _FUTURE:
        if match := pattern.fullmatch(text):
            named = match.groupdict()
            if "ex" in named:
                return f"{_FUTURES[named['ex']]}.{named['product']}"
            return f"CFFEX.{named['product']}" if named["product"] in _CFFEX else None
    return None


def spelt(code: str) -> str:
    """Write a code of the three exchanges in upper case; leave any other alone.

    Examples
    --------
    >>> [spelt(c) for c in ("sh600000", "SH600000", "aapl")]
    ['SH600000', 'SH600000', 'aapl']
    """
    upper = code.upper()
    return upper if CODE.fullmatch(upper) else code


def check_spelling(code: str, at: str) -> None:
    """Refuse a text that holds an A-share code beside something else.

    Kept as it is, it would be an instrument of its own that joins no store.

    Parameters
    ----------
    code : str
        Of no known style.
    at : str
        Where it is from, for the message.

    Raises
    ------
    ValueError
        Naming the text and the code in it.

    Examples
    --------
    >>> check_spelling("00700", "x"), check_spelling("BRK.B", "x")
    (None, None)
    """
    held = [a_share_code(text) for text in _HELD.findall(code.upper())]
    if found := next((name for name in held if name), None):
        raise ValueError(
            f"{at} has the code {code!r}, which is none but holds that of {found}: "
            f"write {found} alone (a file that is named by its code: {found}.csv), or "
            "`codes: asis` in the mapping to keep it as it is."
        )


def is_index(code: str) -> bool:
    """Whether a Qlib code is that of an index of the three exchanges, by its digits.

    Examples
    --------
    >>> [is_index(c) for c in ("SH000300", "SZ000300", "SZ399006", "SH600000", "AAPL")]
    [True, False, True, False, False]
    """
    upper = code.upper()
    return bool(CODE.fullmatch(upper) and _INDICES[upper[:2]].match(upper[2:]))


def kind_of(code: str) -> str:
    """Tell what a Qlib code of the three exchanges stands for, by its digits.

    Returns
    -------
    str
        "share" (also of other exchanges), "index", "B share", "fund" or "bond".

    Examples
    --------
    >>> [kind_of(c) for c in ("SH600000", "SH900901", "SZ159915", "SH113050", "AAPL")]
    ['share', 'B share', 'fund', 'bond', 'share']
    """
    if is_index(code):
        return "index"
    kind = _KINDS.match(code.upper())
    return (kind.lastgroup or "").replace("_", " ") if kind else "share"


def code_of_file(path: str | PurePath) -> str:
    """Return the code in a file's name, in the name's own spelling.

    Endings and a day, month or year before or behind the code are left out.

    Examples
    --------
    >>> [code_of_file(f) for f in ("SH600519_2024-03.csv", "a/600020.TXT")]
    ['SH600519', '600020']
    """
    stem = _SUFFIX.sub("", PurePath(path).name)
    if re.fullmatch(_PERIOD, stem):
        return stem
    return _BEFORE.sub("", _BEHIND.sub("", stem)) or stem


def unreadable(code: str) -> bool:
    """Whether Qlib reads this code as a blank, like the ticker NA."""
    return code in _BLANKS


def was_renamed(code: str) -> bool:
    """Whether `normalise_codes` made this code of one that Qlib can't read."""
    return code.endswith("_") and unreadable(code[:-1])


def normalise_codes(
    values: pd.Series,
    at: str,
    *,
    style: str = "cn",
    index: bool = False,
    keep_unknown: bool = False,
) -> pd.Series:
    """Turn sh.600000, 600000.SH, 600000.XSHG, 600000 or 1 (=000001) into SH600000.

    Parameters
    ----------
    values : Series
        Codes.
    at : str
        Where they are from, for messages.
    style : str
        ``cn``; ``futures`` for the product of a contract; or ``asis`` to keep them
        (upper case; with ``_`` behind the few that Qlib would read as a blank, such as
        NA).
    index : bool
        Bare numbers are indices: 000xxx in Shanghai, 399xxx in Shenzhen.
    keep_unknown : bool
        Keep codes of no known style as they are instead of raising.

    Raises
    ------
    ValueError
        If a code is missing or of no known style.
    """
    codes, uniques = pd.factorize(values)
    if (codes < 0).any():
        row = int(np.argmax(codes < 0))
        raise ValueError(f"{at} has a missing code in data row {row + 1}.")
    if style == "asis":
        names = [_text(u).strip().upper() for u in uniques]
    else:
        futures = style == "futures"
        parsed = [
            futures_code(_text(u)) if futures else a_share_code(_text(u), index)
            for u in uniques
        ]
        bad = [i for i, p in enumerate(parsed) if p is None]
        if bad and not keep_unknown:
            row = int(np.argmax(codes == bad[0]))
            first = _text(uniques[bad[0]])
            if not futures and not index:
                check_spelling(first, f"{at}, data row {row + 1},")
            rows = np.flatnonzero(np.isin(codes, bad))
            fix = f"use {'CFFEX.T' if futures else 'SH600000'}"
            if 0 < rows[0] == len(codes) - len(rows):  # such as totals
                fix = f"no rows? Then `footer: {len(rows)}` in the mapping; else {fix}"
            elif re.fullmatch(r"\d(\.\d+)?[eE]\+?0*5", first):
                fix = "a spreadsheet cut its digits: fetch it again with codes as text"
            raise ValueError(
                f"{at} has {len(bad)} code(s) of no known "
                f"{'futures' if futures else 'A-share'} style, first "
                f"{uniques[bad[0]]!r} in data row {row + 1}; {fix}, or `codes: asis` "
                "in the mapping."
            )
        names = [p or _text(u) for u, p in zip(uniques, parsed, strict=True)]
    # the ticker NA exists; under its own name no store that holds it could be read
    names = [f"{name}_" if unreadable(name) else name for name in names]
    return pd.Series(np.array(names, dtype=object)[codes], index=values.index)


def _text(value: Any) -> str:
    """Text of a code; a number that was read as one keeps no decimals."""
    if isinstance(value, float) and value.is_integer():
        return str(int(value))
    return str(value)
