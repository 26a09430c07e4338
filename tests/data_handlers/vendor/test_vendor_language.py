"""One language for vendor files: what it refuses, what it reads, with right values."""

import logging

import numpy as np
import pandas as pd
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import yaml

from data_handlers.aggregate import reading
from data_handlers.aggregate.schema import FLOW_FIELDS
from data_handlers.vendor.intraday import (
    choose,
    first_and_last,
    translate,
    vendor_columns,
)
from data_handlers.vendor.mapping import (
    describe_presets,
    load_mapping,
    parse_mapping,
    preset_names,
)
from data_handlers.vendor.read import parse_dates, read_source
from data_handlers.vendor.text import numbers, read_text

BARS = {c: c for c in ("open", "high", "low", "close", "volume", "amount")}
MINUTE = {"instrument": "@filename", "datetime": "t", **BARS}
DAY = {"instrument": "@filename", "date": "date", **BARS}


def minute(**more):
    raw = {"kind": "minute", "columns": MINUTE, **more}
    return load_mapping({"sources": {"bars": raw}}).tables["bars"]


def day(**more):
    raw = {"kind": "bars", "columns": DAY, "files": "*", **more}
    top = {"prices": "raw", "factor": "one", "sources": {"daily": raw}}
    return parse_mapping(top, "toy").sources[0]


def bars_of(tmp_path, times, sources, name="600519.csv", text=None, encoding="utf-8"):
    """Bars of 10.5 and 300 at some times, as a CSV file read through the language."""
    line = ",10.5,10.5,10.5,10.5,300,3150\n"
    head = "t,open,high,low,close,volume,amount\n"
    body = head + "".join(t + line for t in times)
    file = tmp_path / name
    file.write_bytes((text or body).encode(encoding))
    layout = choose(sources, "bars", str(file))
    raw = reading.read_file(file, vendor_columns(layout), layout)
    return translate(raw, layout, str(file), "Asia/Shanghai")[0].to_pandas()


class TestMapping:
    def test_an_old_mapping_is_read_as_its_new_spelling(self, caplog, monkeypatch):
        monkeypatch.setattr(logging.getLogger("qlib"), "propagate", True)
        old = {
            "stamp": "end",
            "bars": {
                "path": "*.csv",
                "volume_unit": 100,
                "columns": {**MINUTE, "instrument": "{file}"},
            },
        }
        with caplog.at_level("WARNING"):
            (source,) = load_mapping(old).sources
        new = yaml.safe_load(caplog.messages[0].split("\n\n", 1)[1])
        assert load_mapping(new).sources == (source,)
        assert (source.kind, source.files) == ("minute", ("*.csv",))
        assert source.units == {"volume": "lots"}
        assert source.columns["instrument"] == ("@filename",)
        assert load_mapping(old).shared == {"stamp": "end"}
        with pytest.raises(ValueError, match=r"unknown key\(s\) \['stampp'\]"):
            load_mapping({**old, "stampp": "end"})

    @pytest.mark.parametrize(
        ("change", "match"),
        [
            ({"path": "x"}, r"\['path'\] \(path is now files\)"),
            ({"volume_unit": 100}, "is now units: {volume: lots}"),
            (
                {"columns": {**MINUTE, "instrument": "{file}"}},
                "now written '@filename'",
            ),
            ({"columns": {**MINUTE, "price": "p"}}, "unknown role 'price'"),
            ({"columns": {"instrument": "a"}}, r"lacks \['datetime'"),
            ({"units": {"price": "dime"}}, "'dime' is not one of"),
            ({"stamp": 3}, "`stamp` must be text"),
            ({"encoding": "utf-9"}, "use utf-8 or gb18030"),
            ({"decimal": ";"}, "`decimal` must be"),
            ({"skip": -1}, "`skip` must be a number of lines"),
        ],
    )
    def test_a_bad_source_names_the_key(self, change, match):
        with pytest.raises(ValueError, match=match):
            minute(**change)

    def test_quotes_need_levels_and_sessions_are_known(self):
        quotes = {"kind": "quotes", "columns": {"instrument": "a", "time": "t"}}
        with pytest.raises(ValueError, match="`levels` needs exactly"):
            load_mapping({"sources": {"q": quotes}})
        with pytest.raises(ValueError, match="`session` must be one of"):
            load_mapping({"session": "mars", "sources": {"m": {"kind": "minute"}}})
        with pytest.raises(ValueError, match=r"unknown key\(s\) \['treads'\]"):
            load_mapping({"treads": {}})

    @pytest.mark.parametrize(
        ("text", "match"),
        [
            ("? [1, 2]\n: x\n", "a key must be text"),
            ("a: " + "[" * 700, "nested too deeply|not valid YAML"),
            ("x: &x [*x]\n", "aliases stand for more"),
            ("x" * 1_000_001, "characters"),
        ],
    )
    def test_hostile_yaml_is_an_error_of_one_line(self, tmp_path, text, match):
        (tmp_path / "m.yaml").write_text(text)
        with pytest.raises(ValueError, match=match):
            load_mapping(tmp_path / "m.yaml")

    def test_a_yaml_bomb_is_refused_before_it_is_written_out(self, tmp_path):
        lines = ["a: &a0 [x, x, x, x, x, x, x, x, x]"]
        for k in range(9):
            lines.append(f"b{k}: &a{k + 1} [{', '.join([f'*a{k}'] * 9)}]")
        (tmp_path / "m.yaml").write_text("\n".join([*lines, "notes: *a9"]))
        with pytest.raises(ValueError, match="aliases stand for more than 100,000"):
            load_mapping(tmp_path / "m.yaml")

    def test_presets_are_listed_by_what_they_are_for(self):
        assert {"akshare_minute", "baostock_minute"} <= set(preset_names())
        within, days = describe_presets(intraday=True), describe_presets()
        assert "shanghai_ticks" in within and "tushare" not in within
        assert "tushare" in days and "shanghai_ticks" not in days
        assert not any(name.startswith("daily_cn") for name in preset_names())
        with pytest.raises(ValueError, match="presets are"):
            describe_presets("nobody")

    def test_a_flow_source_is_joined_by_stock_and_day(self):
        columns = {"instrument": "c", "date": "d", FLOW_FIELDS[0]: "f"}
        raw = {"kind": "flow", "files": "*", "columns": columns}
        daily = {"kind": "bars", "columns": DAY, "files": "*"}
        top = {"prices": "raw", "factor": "one", "sources": {"d": daily, "f": raw}}
        assert parse_mapping(top, "toy").of_kind("flow")[0].name == "f"


class TestText:
    def test_title_and_footer_are_left_out(self, tmp_path):
        text = "600020 样例 日线 不复权\ndate,open\n2020-01-02,1\n#数据来源:某终端\n"
        (tmp_path / "a.csv").write_bytes(text.encode("gb18030"))
        got = read_text(tmp_path / "a.csv", "a", known={"date", "open"})
        assert got.data == b"date,open\n2020-01-02,1\n" and got.names == [
            "date",
            "open",
        ]
        (tmp_path / "a.csv").write_text("one\ntwo\ndate,open\n2020-01-02,1\nend\n")
        assert read_text(tmp_path / "a.csv", "a", skip=2, footer=1).data == got.data
        with pytest.raises(ValueError, match="fewer fields than its header, 'end'"):
            read_text(tmp_path / "a.csv", "a", skip=2)

    def test_a_comma_that_may_be_a_decimal_one_is_refused(self):
        def of(*texts, **more):
            return numbers(pd.Series(texts), "here", **more).tolist()

        assert of("1,234,567", "12,000", "7") == [1_234_567, 12_000, 7]
        assert of("1,234.50", "9.75", price=True) == [1234.5, 9.75]
        assert of("10,50", "1.234,5", decimal=",") == [10.5, 1234.5]
        assert of("10,500", decimal=".", price=True) == [10_500]
        assert of("885962.0", "7", decimal=",") == [885_962, 7]  # of another program
        with pytest.raises(ValueError, match=r"'885962.0' in data row 1, whose point"):
            of("885962.0", "7,5", decimal=",")
        for texts, price in ((("10,50",), False), (("10,500", "9,750"), True)):
            with pytest.raises(ValueError, match=r"here has .* row 1: a decimal"):
                of(*texts, price=price)


class TestDays:
    @pytest.mark.parametrize(
        ("given", "tz", "want"),
        [
            ("2020-01-01 16:00:00+00:00", "Asia/Shanghai", "2020-01-02"),
            ("2020-01-02 00:00:00+08:00", "Asia/Shanghai", "2020-01-02"),
            ("2020-01-02 00:00:00+00:00", "Asia/Shanghai", "2020-01-02"),
            ("2020-01-02 05:00:00+00:00", "America/New_York", "2020-01-02"),
            ("2020-01-02 00:00:00-05:00", None, "2020-01-02"),
        ],
    )
    def test_a_stamp_with_a_zone_is_the_exchanges_day(self, given, tz, want):
        for values in (pd.Series([given]), pd.Series([pd.Timestamp(given)])):
            assert parse_dates(values, "x", tz=tz).tolist() == [pd.Timestamp(want)]

    def test_an_unclear_day_is_refused(self):
        for given, tz in (
            ("2020-01-02 00:00:00+00:00", "America/New_York"),
            ("2020-01-01 16:00:00+00:00", None),
        ):
            with pytest.raises(ValueError, match=r"x has the stamp .* is unclear"):
                parse_dates(pd.Series([pd.Timestamp(given)]), "x", tz=tz)

    def test_an_alias_carries_its_own_unit(self, tmp_path):
        source = load_mapping("akshare").of_kind("bars")[0]
        (tmp_path / "sh600030.csv").write_text(
            "date,open,high,low,close,volume,amount,outstanding_share,turnover\n"
            "2020-01-02,10,10,10,10,4360000,43600000,400000000,0.0109\n"
        )
        (tmp_path / "600031.csv").write_text(
            "日期,开盘,最高,最低,收盘,成交量,成交额,换手率\n"
            "2020-01-02,10,10,10,10,43600,43600000,1.09\n"
        )
        got = read_source(source, sorted(tmp_path.glob("*.csv")))
        assert set(got["instrument"]) == {"SH600030", "SH600031"}
        assert got["volume"].tolist() == [4_360_000] * 2
        np.testing.assert_allclose(got["turnover"], 0.0109, rtol=1e-12)
        assert got["float_shares"].dropna().tolist() == [4e8]

    def test_names_of_files_and_empty_downloads(self, tmp_path):
        line = "2020-01-02,1,1,1,1,1,1\n"
        head = "date,open,high,low,close,volume,amount\n"
        for name in ("600020.txt", "600021.CSV", "600022_2024-03.csv"):
            (tmp_path / name).write_text(head + line)
        (tmp_path / "600023.csv").write_text('""\n')
        (tmp_path / "600024.csv").write_text("")
        empty = []
        files = sorted(tmp_path.iterdir())
        got = read_source(day(), files, empty=empty)
        assert sorted(got["instrument"]) == ["SH600020", "SH600021", "SH600022"]
        assert [p.name for p in empty] == ["600023.csv", "600024.csv"]
        with pytest.raises(ValueError, match="no rows"):
            read_source(day(), [tmp_path / "600023.csv"])

    def test_tickers_stay_text(self, tmp_path):
        source = day(columns={**DAY, "instrument": "code"})
        tickers = ["NA", "TRUE", "INF", "00700", "1E5"]
        (tmp_path / "a.csv").write_text(
            "code,date,open,high,low,close,volume,amount\n"
            + "".join(f"{c},2020-01-02,1,1,1,1,1,1\n" for c in tickers)
        )
        got = read_source(source, [tmp_path / "a.csv"], codes="asis")
        assert got["instrument"].tolist() == ["NA_", *tickers[1:]]


class TestIntraday:
    @pytest.mark.parametrize(
        "text",
        [
            "2024-03-04 09:31:00",
            "2024/3/4 9:31",
            "2024/03/04 09:31:00",
            "20240304093100",
            "202403040931",
            "20240304093100000",
            "2024-03-04T01:31:00Z",
            "2024-03-04 09:31:00+08:00",
        ],
    )
    def test_every_form_of_a_moment_is_read(self, tmp_path, text):
        got = bars_of(tmp_path, [text], minute())
        assert got["datetime"].tolist() == [pd.Timestamp("2024-03-04 09:31")]
        assert got["instrument"].tolist() == ["SH600519"]

    @pytest.mark.parametrize(
        ("text", "match"),
        [
            ("soon", r"600519\.csv, column 't' has the value 'soon' in data row 2"),
            (
                "2024-13-04 09:31:00",
                r"'2024-13-04 09:31:00' in data row 2",
            ),
        ],
    )
    def test_a_bad_time_names_file_column_row_and_value(self, tmp_path, text, match):
        with pytest.raises(ValueError, match=match):
            bars_of(tmp_path, ["2024/3/4 9:31", text], minute())

    def test_seconds_since_1970_are_refused_by_name(self, tmp_path):
        with pytest.raises(ValueError, match=r"1709515860 in data row 1, of 10 digits"):
            bars_of(tmp_path, ["1709515860"], minute())

    @pytest.mark.parametrize(
        ("date", "clock"),
        [
            (20240304, 93100000),
            (20240304, 93100),
            (20240304, 931),
            ("2024-03-04", "09:31:00"),
            ("2024/03/04", "09:31"),
        ],
    )
    def test_days_and_clocks_in_two_columns(self, tmp_path, date, clock):
        frame = pd.DataFrame(
            {"d": [date] * 2, "c": [clock] * 2, **dict.fromkeys(BARS, 1)}
        )
        file = str(tmp_path / "SH600519_2024-03.csv")
        frame.to_csv(file, index=False)
        columns = {**MINUTE, "datetime": {"date": "d", "time": "c"}}
        layout = choose(minute(columns=columns), "bars", file)
        first, last, days = first_and_last(file, layout, "datetime", "Asia/Shanghai")
        assert first == last == np.datetime64("2024-03-04T09:31")
        assert [str(d) for d in days] == ["2024-03-04"]

    def test_units_titles_and_gb18030(self, tmp_path):
        text = "某终端 一分钟\n时间,开盘,最高,最低,收盘,成交量,成交额\n"
        text += "2024-03-04 09:31:00,1050,1050,1050,1050,3,3150\n"
        names = ["时间", "开盘", "最高", "最低", "收盘", "成交量", "成交额"]
        columns = {"instrument": "@filename"}
        columns |= dict(zip(("datetime", *BARS), names, strict=True))
        sources = minute(columns=columns, units={"price": "fen", "volume": "lots"})
        got = bars_of(tmp_path, [], sources, text=text, encoding="gb18030").iloc[0]
        assert (got["open"], got["volume"], got["amount"]) == (10.5, 300, 3150)

    def test_prices_in_e4_come_out_exactly(self, tmp_path):
        raw = pa.table(
            {
                "s": ["600519"],
                "t": pa.array([pd.Timestamp("2024-03-04 09:31")], pa.timestamp("us")),
                "p": [123_400],
                "v": [100],
            }
        )
        pq.write_table(raw, tmp_path / "x.parquet")
        columns = {"instrument": "s", "time": "t", "price": "p", "volume": "v"}
        trades = {"kind": "trades", "columns": columns, "units": {"price": "e4"}}
        plan = load_mapping({"sources": {"x": trades}})
        layout = choose(plan.tables["trades"], "trades", str(tmp_path / "x.parquet"))
        got = translate(raw, layout, "f", "Asia/Shanghai")[0]
        assert got.column("price").to_pylist() == [12.34]

    @pytest.mark.parametrize("ticker", ["TRUE", "INF", "NA", "00700"])
    def test_tickers_stay_text_in_csv(self, tmp_path, ticker):
        sources = minute(columns={**MINUTE, "instrument": "c"})
        text = "c,t,open,high,low,close,volume,amount\n"
        text += f"{ticker},2024-03-04 09:31:00,1,1,1,1,1,1\n"
        got = bars_of(tmp_path, [], sources, text=text)
        assert got["instrument"].tolist() == [ticker]

    def test_presets_of_minute_bars(self, tmp_path):
        given = {
            "akshare_minute": "时间,开盘,收盘,最高,最低,成交量,成交额\n"
            "2024-03-04 09:31:00,1,2,3,0.5,3,600\n",
            "baostock_minute": "date,time,code,open,high,low,close,volume,amount,"
            "adjustflag\n2024-03-04,20240304093100000,sh.600519,1,3,0.5,2,300,600,3\n",
        }
        for preset, text in given.items():
            plan = load_mapping(preset)
            assert plan.shared["stamp"] == "end"
            got = bars_of(tmp_path, [], plan.tables["bars"], text=text).iloc[0]
            assert got["datetime"] == pd.Timestamp("2024-03-04 09:31")
            assert got[list(BARS)].tolist() == [1, 3, 0.5, 2, 300, 600]
            assert got["instrument"] == "SH600519"
        sina = "day,open,high,low,close,volume\n2024-03-04 09:31:00,1,3,0.5,2,300\n"
        plan = load_mapping("akshare_minute")
        got = bars_of(tmp_path, [], plan.tables["bars"], text=sina).iloc[0]
        assert got["volume"] == 300
        bad = given["baostock_minute"].replace(",3\n", ",2\n")
        with pytest.raises(ValueError, match=r"'adjustflag' must be \['3'\], got '2'"):
            bars_of(tmp_path, [], load_mapping("baostock_minute").tables["bars"],
                    text=bad)  # fmt: skip

    def test_columns_of_a_preset_are_hinted_at(self, tmp_path):
        text = (
            "时间,开盘,收盘,最高,最低,成交量,成交额\n2024-03-04 09:31:00,1,2,3,1,3,6\n"
        )
        with pytest.raises(ValueError, match="--preset akshare_minute"):
            bars_of(tmp_path, [], (), text=text)
