"""Codes, dates, numbers, encodings and broken files."""

import gzip

import pandas as pd
import pytest

from data_handlers.vendor.mapping import load_mapping, parse_mapping, preset_names
from data_handlers.vendor.read import find_files, parse_dates, read_source
from data_handlers.vendor.text import read_text


@pytest.mark.parametrize(
    "given",
    ["2020-01-02", "20200102", 20200102, "2020/1/2", "2020-01-02 15:00:00",
     20200102.0],
)  # fmt: skip
def test_every_date_style_becomes_a_day(given):
    assert parse_dates(pd.Series([given]), "x").tolist() == [pd.Timestamp("2020-01-02")]


def test_a_month_is_its_last_day():
    assert parse_dates(pd.Series(["2024-02"]), "x")[0] == pd.Timestamp("2024-02-29")


@pytest.mark.parametrize("bad", ["2020-13-01", "soon", 12, "20200230"])
def test_a_bad_date_is_named(bad):
    with pytest.raises(ValueError, match="that are no dates"):
        parse_dates(pd.Series([bad]), "x")


@pytest.mark.parametrize("unit", ["text", "us"])
def test_the_year_9999_is_no_end(unit):
    given = pd.Series(["2020-01-02", "9999-12-31"])
    given = given if unit == "text" else pd.Series(given.to_numpy("datetime64[us]"))
    days = parse_dates(given, "x", empty_ok=True)
    assert days.tolist() == [pd.Timestamp("2020-01-02"), pd.NaT]
    with pytest.raises(ValueError, match="no dates"):
        parse_dates(given, "x")


def test_a_missing_date_is_named():
    with pytest.raises(ValueError, match="missing date"):
        parse_dates(pd.Series([pd.Timestamp("2020-01-02"), pd.NaT]), "x")


COLUMNS = {"instrument": "code", "date": "date", "open": "o", "high": "h", "low": "l",
           "close": "c", "volume": "v"}  # fmt: skip
HEADER = "code,date,o,h,l,c,v"


def source(**more):
    raw = {"kind": "bars", "files": "*", "columns": COLUMNS, **more}
    return parse_mapping(
        {"prices": "raw", "factor": "one", "sources": {"daily": raw}}, "toy"
    ).sources[0]


def read(tmp_path, content, name="a.csv", **more):
    file = tmp_path / name
    file.write_bytes(content if isinstance(content, bytes) else content.encode())
    return read_source(source(**more), [file])


def test_numbers_with_commas_dashes_and_blanks_are_read(tmp_path):
    frame = read(tmp_path, f'{HEADER}\n000001,20200102,"1,234.5",--,None,1,\n')
    assert frame["instrument"].tolist() == ["SZ000001"]
    assert frame["open"].tolist() == [1234.5]
    assert frame[["high", "low", "volume"]].isna().all(axis=None)


def test_units_turn_lots_into_shares(tmp_path):
    frame = read(
        tmp_path, f"{HEADER}\n1,20200102,1,1,1,1,7\n", units={"volume": "lots"}
    )
    assert frame["volume"].tolist() == [700]


def test_tabs_and_gzip_are_read(tmp_path):
    text = f"{HEADER}\n1,20200102,1,1,1,1,7\n".replace(",", "\t")
    frame = read(tmp_path, gzip.compress(text.encode()), "a.csv.gz")
    assert frame["volume"].tolist() == [7]


LINE = "000001,20200102,1,1,1,1,7"
BAD_FILES = {
    "zero bytes": ("a.csv", b"", "0 bytes"),
    "header only": ("a.csv", HEADER, "no rows"),
    "corrupt parquet": ("a.parquet", b"PAR1 nonsense", "no readable Parquet"),
    "truncated gzip": ("a.csv.gz", b"\x1f\x8b\x08\x00", "no readable gzip"),
    "missing column": (
        "a.csv",
        "code,date,o,h,l\n1,20200102,1,1,1",
        "lacks column 'c'",
    ),
    "text in a number": ("a.csv", f"{HEADER}\n{LINE.replace('7', 'many')}", "'many'"),
    "no date": ("a.csv", f"{HEADER}\n1,,1,1,1,1,7", "missing date"),
    "too many fields": ("a.csv", f"{HEADER}\n{LINE}\n{LINE},9,9", "no readable CSV"),
    "broken off": ("a.csv", f"{HEADER}\n{LINE}\n000002,2020", "broke off"),
    "every line too long": ("a.csv", f"{HEADER}\n{LINE},9", "more fields than its"),
    "two columns of a name": (
        "a.csv",
        f"{HEADER},c\n{LINE},2",
        "2 columns 'c', and which is meant",
    ),
    "milliseconds since 1970": (
        "a.csv",
        f"{HEADER}\n{LINE.replace('20200102', '1577894400000')}",
        r"'1577894400000'.*milliseconds since 1970\?",
    ),
    "a short line inside": (
        "a.csv",
        f"{HEADER}\n{LINE}\n000002,2020\n{LINE}",
        r"line 3, has 2 fields where the header has 7: '000002,2020' \(1 such",
    ),
    "zero bytes inside": (
        "a.csv",
        f"{HEADER}\n{LINE}\n".encode() + bytes(9) + LINE.encode(),
        "zero bytes, first in line 3",
    ),
    "mixed encodings": (
        "a.csv",
        f"{HEADER},名称\n{LINE},浦发\n".encode() + f"{LINE},万科\n".encode("gb18030"),
        "line 1 is UTF-8 and line 3 is not",
    ),
    "a Parquet file": ("a.csv", b"PAR1\x15\x04\x15", "a Parquet file; name it"),
    "a packed file": ("a.csv", gzip.compress(b"x"), "packed by gzip; name it .csv.gz"),
    "a workbook": ("a.csv", b"PK\x03\x04\0\0", "a workbook or a zip archive"),
    "a web page": ("a.csv", "<!DOCTYPE html><p>404", "a web page or XML"),
    "JSON": ("a.csv", '[{"i": "000001"}]', "no CSV file but JSON"),
    "no header": ("a.csv", f"{LINE}\n{LINE}", "no header: put names above it"),
    "totals": ("a.csv", f"{HEADER}\n{LINE}\n合计,,,,,,7", "no rows.*`footer: 1`"),
    "cut digits": (
        "a.csv",
        f"{HEADER}\n{LINE.replace('000001', '6.00E+05')}",
        "'6.00E.05' in data row 1; a spreadsheet cut",
    ),
    "a code in quotes": (
        "a.csv",
        f"{HEADER}\n{LINE.replace('000001', '=600000=')}",
        "data row 1, has the code '=600000='.*write SH600000",
    ),
    "day first": (
        "a.csv",
        f"{HEADER}\n{LINE}\n{LINE.replace('20200102', '02/01/2020')}",
        "first '02/01/2020' in data row 2; use",
    ),
    "the year 9999": (
        "a.csv",
        f"{HEADER}\n{LINE.replace('20200102', '9999-12-31')}",
        "no dates, first '9999-12-31' in data row 1",
    ),
    "no text at all": ("a.csv", b"\xff\xff\x01\x81\x82\xff\xff", "neither UTF-8"),
}


@pytest.mark.parametrize("case", BAD_FILES)
def test_a_bad_file_is_named_with_its_fault(tmp_path, case):
    name, content, message = BAD_FILES[case]
    with pytest.raises(ValueError, match=message) as caught:
        read(tmp_path, content, name)
    assert "daily" in str(caught.value)


def test_a_header_again_utf_16_and_old_line_ends_are_read(tmp_path):
    again = f"{HEADER}\n{LINE}\n{HEADER}\n{LINE.replace('0102', '0103')}\n"
    for name, content in {
        "again": again.encode(),
        "utf-16": again.replace(HEADER + "\n", "").encode(),
        "old": again.replace("\n", "\r").encode(),
    }.items():
        if name == "utf-16":
            content = f"{HEADER}\n{content.decode()}".encode("utf-16")
        frame = read(tmp_path, content)
        assert frame["date"].dt.day.tolist() == [2, 3], name
    titles = []
    read_source(source(), [tmp_path / "a.csv"], titles=titles)
    assert [line for _, line in titles] == ["the header again, 1 x"]


def test_a_name_in_gb18030_that_is_utf_8_by_chance_mixes_nothing(tmp_path):
    name = "\u67d0\u67d0".encode("gb18030")
    assert name.decode("utf-8")  # two Latin letters
    path = tmp_path / "a.csv"
    path.write_bytes(
        "代码,名称\n600000,".encode("gb18030") + name
        + "\n000002,万科\n".encode("gb18030")
    )  # fmt: skip
    text = read_text(path, "a")
    assert text.data.decode().split() == ["代码,名称", "600000,某某", "000002,万科"]


def test_files_are_found_by_glob_directory_and_name(tmp_path):
    for name in ("x/a.csv", "x/b.parquet", "x/readme.md", "c.csv"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text("x")
    one = source(files=["x", "*.csv"])
    for name in ("x/d.xlsx", "x/._a.csv"):
        (tmp_path / name).write_text("x")
    unread = []
    names = [p.name for p in find_files(one, tmp_path, unread=unread)]
    assert names == ["a.csv", "b.parquet", "c.csv"]
    assert unread == [str(tmp_path / "x/d.xlsx")]
    names = [p.name for p in find_files(source(files=["x/*"]), tmp_path, unread=unread)]
    assert "d.xlsx" not in names and unread[1:] == unread[:1]
    with pytest.raises(ValueError, match="has no file"):
        find_files(source(files="nothing/*"), tmp_path)
    with pytest.raises(ValueError, match="no such file"):
        find_files(one, tmp_path, [str(tmp_path / "zzz")])


def test_every_shipped_preset_is_valid_and_described():
    assert {"tushare", "akshare", "baostock"} <= set(preset_names())
    for name in preset_names():
        mapping = load_mapping(name)
        assert mapping.description and mapping.vendor


GOOD = {
    "prices": "raw",
    "factor": "one",
    "sources": {"daily": {"kind": "bars", "files": "*", "columns": COLUMNS}},
}


def changed(path, value):
    """Copy of a good mapping with one key set (or removed, for None)."""
    out = {**GOOD, "sources": {"daily": dict(GOOD["sources"]["daily"])}}
    *parents, key = path.split("/")
    node = out
    for parent in parents:
        node[parent] = dict(node[parent])
        node = node[parent]
    if value is None:
        del node[key]
    else:
        node[key] = value
    return out


BAD_MAPPINGS = {
    "unknown top key": ("price", "raw", r"unknown key\(s\) \['price'\]"),
    "missing choice": ("prices", None, "lacks `prices`"),
    "bad choice": ("factor", "magic", "`factor`='magic' is not one of"),
    "unknown kind": ("sources/daily/kind", "ticks", "`kind`='ticks'"),
    "unknown source key": ("sources/daily/path", "x", r"unknown key\(s\) \['path'\]"),
    "unknown role": ("sources/daily/columns/vol", "v", "unknown role 'vol'"),
    "missing role": ("sources/daily/columns/close", None, r"lacks \['close'\]"),
    "bad unit": ("sources/daily/units", {"volume": "hands"}, "'hands' is not one of"),
    "unit of no column": ("sources/daily/units", {"amount": "cny"}, "names 'amount'"),
    "number as column": ("sources/daily/columns/close", 3, "must be text"),
    "number as encoding": ("sources/daily/encoding", 65001, "must be text, got 65001"),
    "list as unit": ("sources/daily/units", {"volume": ["lots"]}, "is not one of"),
    "list of expected": (
        "sources/daily/expect",
        ["code"],
        "`expect` must be a mapping",
    ),
    "no sources": ("sources", None, "`sources` must be a mapping"),
    "other option": ("sources/daily/sizes", {}, r"unknown key\(s\) \['sizes'\]"),
    "optional as text": ("sources/daily/optional", "yes", "true or false"),
}


@pytest.mark.parametrize("case", BAD_MAPPINGS)
def test_a_bad_mapping_is_named_with_the_known_choices(case):
    path, value, message = BAD_MAPPINGS[case]
    with pytest.raises(ValueError, match=message):
        parse_mapping(changed(path, value), "toy")


def test_mapping_files_are_safe_and_strict(tmp_path):
    file = tmp_path / "m.yaml"
    file.write_text("prices: !!python/object/apply:os.system ['true']\n")
    with pytest.raises(ValueError, match="not valid YAML"):
        load_mapping(file)
    file.write_text("prices: raw\nprices: adjusted\n")
    with pytest.raises(ValueError, match="given twice"):
        load_mapping(file)
    file.write_text("? [1, 2]\n: x\n")
    with pytest.raises(ValueError, match="a key must be text"):
        load_mapping(file)
    with pytest.raises(ValueError, match="neither a preset nor a file"):
        load_mapping("tushar")
