"""What a vendor's files mean: a strict YAML file, or one of the shipped presets.

One language describes day files (for `qlib-ext ingest`) and bars and ticks within the
day (for `qlib-ext build`)::

    prices: raw                   # or adjusted; with a source of kind bars
    factor: column                # or preclose, one
    codes: cn                     # or futures, asis
    renames: {BJ430059: BJ920059}  # old code: new code, one stock
    session: a_share              # or us_regular, cffex_bonds
    sources:
      daily:
        kind: bars
        files: ["daily/*"]        # below --data
        columns: {instrument: ["代码", "@filename"], date: "日期", open: "开盘", …}
        units: {volume: lots, turnover: {"换手率": percent, turnover: fraction}}
      funds:
        kind: holdings
        columns: {fund: code, name: name, instrument: stock, period: report_date,
                  weight: weight}  # announced: …, else the last day the law allows
        units: {weight: percent}
        scope: top_ten            # or full
      bars:
        kind: minute
        files: ["minute/*"]       # below --source
        columns: {instrument: "@filename", datetime: "时间", open: "开盘", …}
        units: {volume: lots, price: fen}
        stamp: end                # a bar's time is its end
      ticks:
        kind: trades
        columns: {instrument: sym, time: {date: day, time: hhmmssmmm}, price: px,
                  volume: qty, buy_id: bid_no, sell_id: ask_no, side: flag}
        values: {side: {B: 1, S: -1, N: 0}}
        units: {price: e4}        # prices x 10,000
        tz: UTC                   # zone of naive times, if not the exchange's own
        sequence: seq             # sorts rows of one stock, instead of file order
        side_from_ids: true       # no flag: the later order was the aggressor
        cancels: {column: exec, values: ["4"]}  # rows that are cancellations
      placed:
        kind: orders
        columns: {…, order_id: no, action: type}     # action "@new": all rows are new
        values: {side: {1: 1, 2: -1}, action: {A: 1, D: -1}}
      book:
        kind: quotes
        columns: {instrument: sym, time: t}
        levels: {bid_price: "BidPx{}", bid_volume: "BidVol{}", ask_price: "AskPx{}",
                 ask_volume: "AskVol{}", first: 1, count: 10}

Futures need ``codes: futures``, ``factor: preclose`` and a source of kind futures::

      daily:
        kind: futures             # one row a product and day, or one a contract
        columns: {instrument: symbol, date: date, open: open, …, contract: month}
        products: [CFFEX.T]       # of those in the file; default all
        multiplier: {CFFEX.T: 10000}   # amount = price x volume (lots) x multiplier
        rolls: {rise: 0.2, months: [2, 3], apart: 40}  # where no contract is named

Nothing is guessed from values: a wrong unit is caught by the checks, never repaired in
silence. An unknown key, role or unit is an error that lists the known ones. A source of
bars or ticks without `columns` is one of a layout known by its columns.
"""

from __future__ import annotations

import codecs
import os
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from importlib import resources
from pathlib import Path
from typing import Any

import yaml
from qlib.log import get_module_logger

from data_handlers.aggregate.schema import (
    FLOW_FIELDS,
    FUTURES_BARS,
    ORDERS,
    SESSIONS,
    TRADES,
    TableSchema,
)
from data_handlers.codes import a_share_code, futures_code

__all__ = [
    "BOND_FIELDS",
    "BOND_TERMS",
    "FIELD_ROLES",
    "FILENAME",
    "INTRADAY",
    "KINDS",
    "MONEY",
    "NEW_ORDER",
    "SCOPES",
    "STATEMENT_ITEMS",
    "TABLES",
    "UNITS",
    "Source",
    "VendorMapping",
    "describe_presets",
    "load_mapping",
    "load_yaml",
    "nodes_of",
    "parse_mapping",
    "preset_names",
    "settings_text",
]

logger = get_module_logger("data_handlers.vendor")

#: What a column may be instead of one of the vendor's.
FILENAME, NEW_ORDER = "@filename", "@new"

MONEY = {
    "cny": 1.0,
    "thousand_cny": 1e3,
    "ten_thousand_cny": 1e4,
    "million_cny": 1e6,
    "hundred_million_cny": 1e8,
}
_COUNT = {
    "shares": 1.0,
    "lots": 100.0,
    "ten_thousand_shares": 1e4,
    "million_shares": 1e6,
}
_SHARE = {"fraction": 1.0, "percent": 0.01}
_PLAIN = {"number": 1.0}
_PRICE = {"cny": 1.0, "fen": 1e-2, "li": 1e-3, "e4": 1e-4}

# role -> units it may have; the first is the store's own
UNITS: dict[str, dict[str, float]] = {
    "open": _PRICE,
    "high": _PRICE,
    "low": _PRICE,
    "close": _PRICE,
    "preclose": _PRICE,
    "vwap": _PRICE,
    "limit_up": _PRICE,
    "limit_down": _PRICE,
    "volume": _COUNT,
    "float_shares": _COUNT,
    "amount": MONEY,
    "market_cap": MONEY,
    "turnover": _SHARE,
    "pct_change": _SHARE,
    "factor": _PLAIN,
    "trading": _PLAIN,
    "is_st": _PLAIN,
    "pb": _PLAIN,
    "pe_ttm": _PLAIN,
    "ps_ttm": _PLAIN,
    "pcf_ttm": _PLAIN,
    "open_interest": _PLAIN,
    **dict.fromkeys(FLOW_FIELDS, MONEY),
    "weight": _SHARE,
}
FIELD_ROLES = tuple(role for role in UNITS if role != "weight")
STATEMENT_ITEMS = (
    "revenue",
    "net_profit",
    "operating_cash_flow",
    "total_assets",
    "total_liabilities",
    "equity",
    "current_assets",
    "current_liabilities",
    "long_term_debt",
)
UNITS.update({item: MONEY for item in STATEMENT_ITEMS})
#: Positions that a fund's table lists: the largest ten (every quarter), or all of them
#: (half-years and years).
SCOPES = ("top_ten", "full")
#: What a convertible bond has on a day besides its bar; CNY per 100 of face value.
BOND_FIELDS = (
    *("stock", "stock_close", "stock_factor", "conv_price", "conv_value"),
    *("bond_floor", "remain_size", "years_to_maturity", "rating", "ytm"),
)
#: What the terms of a bond say, for good: they were published before its listing.
BOND_TERMS = (
    *("stock", "listed", "delisted", "conversion_ends", "matures", "coupons"),
    *("redemption", "issue_size", "issue_rating"),
)
UNITS.update(
    {
        **dict.fromkeys(("stock_close", "conv_price"), _PRICE),
        **dict.fromkeys(("stock_factor", "conv_value", "bond_floor"), _PLAIN),
        **dict.fromkeys(("remain_size", "issue_size"), MONEY),
        **dict.fromkeys(("years_to_maturity", "redemption"), _PLAIN),
        "ytm": _SHARE,
    }
)
# bonds are counted one by one, 100 CNY of face value each
UNITS["volume"] = {**_COUNT, "bonds": 1.0, "bond_lots": 10.0}
_LATEST = {
    "conv_price": "kind bond_conversion, bonds or bond_fields",
    "conv_value": "kind bonds or bond_fields",
    "remain_size": "kind bonds or bond_fields",
    "rating": "kind bonds or bond_fields",
}
BOND_EVENTS = ("call", "no_call", "revision", "put")
#: `units: {price: …}` stands for all prices of a source.
UNITS["price"] = _PRICE

#: Kinds within the day, and the table that each becomes.
INTRADAY = {
    "minute": "bars",
    "trades": "trades",
    "orders": "orders",
    "quotes": "quotes",
}
#: The normalised tables; quotes have levels instead of columns.
TABLES: dict[str, TableSchema] = {
    "bars": FUTURES_BARS,
    "trades": TRADES,
    "orders": ORDERS,
}

_KEYS = ("instrument", "date")
# kind -> (required roles, optional roles)
KINDS: dict[str, tuple[tuple[str, ...], tuple[str, ...]]] = {
    "bars": (
        (*_KEYS, "open", "high", "low", "close"),
        tuple(r for r in FIELD_ROLES if r not in ("open", "high", "low", "close")),
    ),
    "futures": (
        (*_KEYS, "open", "high", "low", "close"),
        ("volume", "amount", "open_interest", "contract"),
    ),
    "fields": (_KEYS, FIELD_ROLES),
    "factor": ((*_KEYS, "factor"), ()),
    "index": ((*_KEYS, "close"), ("open", "high", "low", "volume", "amount")),
    "members": (("index", "date", "instrument"), ("weight",)),
    "industry": (("instrument", "start", "code"), ("end", "name")),
    "statements": (
        ("instrument", "period"),
        ("announced", "item", "value", *STATEMENT_ITEMS),
    ),
    "holdings": (
        ("fund", "instrument", "period", "weight"),
        ("announced", "name"),
    ),
    "flow": (_KEYS, FLOW_FIELDS),
    "bonds": (
        (*_KEYS, "close"),
        (*("open", "high", "low", "volume", "amount"), *BOND_FIELDS),
    ),
    "bond_fields": (_KEYS, BOND_FIELDS),
    "bond_conversion": ((*_KEYS, "conv_price"), ()),
    "bond_terms": (("instrument",), BOND_TERMS),
    "bond_events": (("instrument", "announced", "event"), ()),
    "shares": ((*_KEYS, "close"), ("factor",)),
    **{
        kind: (
            tuple(TABLES[table].required)
            if table in TABLES
            else ("instrument", "time"),
            tuple(c.name for c in TABLES[table].columns if not c.required)
            if table in TABLES
            else (),
        )
        for kind, table in INTRADAY.items()
        if table in TABLES
    },
    "quotes": (("instrument", "time"), ()),
}
_TICK_OPTIONS = ("tz", "sequence", "values", "expect")
_KIND_OPTIONS: dict[str, tuple[str, ...]] = {
    "bars": ("expect",),
    "futures": ("expect", "products", "multiplier", "rolls"),
    "fields": ("expect",),
    "factor": (),
    "index": (),
    "members": ("names", "sizes"),
    "industry": ("digits", "names"),
    "statements": ("items", "item_unit", "expect"),
    "holdings": ("scope", "expect"),
    "flow": ("expect",),
    **dict.fromkeys(("bonds", "bond_conversion", "shares"), ("expect",)),
    "bond_fields": ("expect", "max_age"),
    "bond_terms": ("expect",),
    "bond_events": ("expect", "events"),
    "minute": (
        *("tz", "expect", "stamp", "bar_minutes", "amount", "early_close"),
        "multiplier",
    ),
    "trades": (*_TICK_OPTIONS, "side_from_ids", "cancels", "publishes_all"),
    "orders": _TICK_OPTIONS,
    "quotes": ("tz", "sequence", "expect", "levels"),
}
#: Options of sources that the whole build shares.
_SHARED = ("stamp", "bar_minutes", "amount", "early_close", "publishes_all")
_LEVELS = ("bid_price", "bid_volume", "ask_price", "ask_volume", "first", "count")
# option -> its type, where no check below says more
_TYPES: dict[str, type] = {
    **dict.fromkeys(("expect", "names", "sizes", "early_close", "values"), dict),
    **dict.fromkeys(("levels", "cancels", "events", "multiplier", "rolls"), dict),
    "products": list,
    **dict.fromkeys(("tz", "sequence", "stamp", "amount", "item_unit", "scope"), str),
    **dict.fromkeys(("digits", "bar_minutes", "max_age"), int),
    "side_from_ids": bool,
}
_SOURCE_KEYS = (
    *("kind", "files", "columns", "units", "optional"),
    *("encoding", "decimal", "skip", "footer"),
)
_TOP_KEYS = (
    "vendor",
    "description",
    "prices",
    "factor",
    "factor_history",
    "pct_change_of",
    "codes",
    "renames",
    "session",
    "sources",
    "notes",
)
_CHOICES: dict[str, tuple[str, ...]] = {
    "prices": ("raw", "adjusted"),
    "factor": ("column", "preclose", "one"),
    "factor_history": ("fixed", "rebased"),
    "pct_change_of": ("adjusted", "raw"),
    "codes": ("cn", "futures", "asis"),
}


@dataclass(frozen=True)
class Source:
    """One kind of vendor file.

    Attributes
    ----------
    name : str
        Name in the mapping, for messages and for ``--file NAME=PATH``.
    kind : str
        ``bonds`` (in place of bars: a store of convertible bonds) with
        ``bond_fields`` (of the day, or of the last `max_age` days), ``bond_terms``,
        ``bond_conversion`` (a conversion price holds from its date on), ``bond_events``
        and ``shares``; or ``bars`` or ``futures``, ``fields`` and ``flow`` (joined by
        stock and day),
        ``factor`` (holds from its date on), ``index``, ``members``, ``industry``,
        ``statements``, ``holdings`` (of funds); within the day ``minute``, ``trades``,
        ``orders``, ``quotes``.
    files : tuple of str
        Paths, globs or directories, relative to the data directory.
    columns : mapping of str to tuple of str
        Role to the vendor's column names, of which the first present one is used;
        ``@filename`` takes the code from the file's name. A time within the day may be
        ``{date: column, time: column}``.
    units : mapping of str to (str or mapping of str to str)
        Role to unit, or to a unit for each of its column names; roles left out are in
        the store's unit.
    optional : bool
        Whether the source may be absent.
    encoding : str or None
        Encoding of CSV files; None tries UTF-8, then GB18030.
    decimal : str or None
        Decimal mark of CSV files; None is a point, and refuses what may be a comma.
    skip, footer : int or None
        Lines above the header and behind the last row of CSV files; None recognises
        titles and footers.
    options : mapping
        What only this kind knows (`expect`, `names`, `sizes`, `digits`, …).
    """

    name: str
    kind: str
    files: tuple[str, ...]
    columns: Mapping[str, Any]
    units: Mapping[str, Any] = field(default_factory=dict)
    optional: bool = False
    encoding: str | None = None
    decimal: str | None = None
    skip: int | None = None
    footer: int | None = None
    options: Mapping[str, Any] = field(default_factory=dict)

    def scale(self, role: str, column: str) -> float:
        """Factor that turns a column's unit into the store's."""
        if role not in UNITS:
            return 1.0
        unit = self.units.get(role)
        if unit is None and UNITS[role] is _PRICE:
            unit = self.units.get("price")
        if isinstance(unit, Mapping):
            unit = unit[column]
        return 1.0 if unit is None else UNITS[role][unit]

    def names(self) -> set[str]:
        """Vendor's names of all columns of the source."""
        out: set[str] = set()
        for value in self.columns.values():
            several = value.values() if isinstance(value, Mapping) else value
            out.update([value] if isinstance(value, str) else several)
        return out - {FILENAME, NEW_ORDER}


@dataclass(frozen=True)
class VendorMapping:
    """A vendor's files and conventions.

    Attributes
    ----------
    name : str
        Preset name or file stem.
    prices : str
        ``raw`` (as traded) or ``adjusted`` (by the vendor, factor unknown).
    factor : str
        ``column`` (role `factor` of bars, fields or a factor source), ``preclose``
        (product of previous close over the ex-right previous close) or ``one``.
    factor_history : str
        ``fixed``: a day's published factor never changes (anchored at listing);
        ``rebased``: every delivery is anchored at its own last day, so an update needs
        at least one day of overlap per stock.
    pct_change_of : str
        Whether the vendor's percent change is of ``adjusted`` or ``raw`` closes; only
        used to check.
    codes : str
        ``cn`` turns every A-share code style into SH600000, ``futures`` every style of
        a contract into CFFEX.T; ``asis`` keeps codes.
    sources : tuple of Source
        In the order of the file.
    renames : mapping of str to str
        Old code to new code of renamed stocks, whose history goes on under the new one.
    session : str or None
        Exchange, whose time zone stamps with a zone are brought to.
    vendor, description : str
        For people.
    notes : tuple of str
        Sentences for meta.json: what is and is not adjusted.
    """

    name: str
    prices: str
    factor: str
    factor_history: str
    pct_change_of: str
    codes: str
    sources: tuple[Source, ...]
    session: str | None = None
    renames: Mapping[str, str] = field(default_factory=dict)
    vendor: str = ""
    description: str = ""
    notes: tuple[str, ...] = ()

    def of_kind(self, kind: str) -> tuple[Source, ...]:
        """Return the sources of one kind."""
        return tuple(s for s in self.sources if s.kind == kind)

    @property
    def main(self) -> Source:
        """The source of day bars.

        Raises
        ------
        ValueError
            If there is none: a mapping of bars and ticks within the day.
        """
        for source in self.sources:
            if source.kind in ("bars", "futures"):
                return source
        raise ValueError(
            f"`mapping` {self.name} has no source of kind bars, so it makes no day "
            "store; `qlib-ext build` reads its minute bars and ticks."
        )

    @property
    def tz(self) -> str | None:
        """Time zone of the exchange; None where the mapping does not say."""
        if self.session is None:
            return SESSIONS["a_share"].tz if self.codes == "cn" else None
        return SESSIONS[self.session].tz

    @property
    def tables(self) -> dict[str, tuple[Source, ...]]:
        """Sources within the day, by the table that they become."""
        found = {table: self.of_kind(kind) for kind, table in INTRADAY.items()}
        return {table: sources for table, sources in found.items() if sources}

    @property
    def shared(self) -> dict[str, Any]:
        """What the whole build shares: session, stamp, bar_minutes and so on."""
        out: dict[str, Any] = {} if self.session is None else {"session": self.session}
        for source in self.sources:
            for key in _SHARED:
                value = source.options.get(key) if source.kind in INTRADAY else None
                if value is None:
                    continue
                if out.setdefault(key, value) != value:
                    raise ValueError(
                        f"`mapping` {self.name}: `{key}` is {out[key]!r} in one source "
                        f"and {value!r} in {source.name!r}; use a mapping for each."
                    )
        return out


def _presets() -> Any:
    return resources.files("data_handlers.vendor") / "presets"


def preset_names() -> list[str]:
    """Names that `load_mapping` takes without a file."""
    names = (Path(f.name) for f in _presets().iterdir())
    return sorted(path.stem for path in names if path.suffix == ".yaml")


def describe_presets(name: str | None = None, intraday: bool = False) -> str:
    """Return the YAML of a preset, or a list of those for day files or within the day.

    Raises
    ------
    ValueError
        If there is no such preset.
    """
    if name is not None:
        if name not in preset_names():
            raise ValueError(f"--show-preset {name!r}: presets are {preset_names()}.")
        return (_presets() / f"{name}.yaml").read_text(encoding="utf-8")
    lines = []
    for preset in preset_names():
        plan = load_mapping(preset)
        if bool(plan.tables) != intraday:
            continue
        lines.append(f"{preset}\n    {plan.description}")
        for source in plan.sources:
            need = "optional" if source.optional else "required"
            files = ", ".join(source.files) or "all of --source"
            lines.append(f"    {source.name:14}{source.kind:10}{need:10}{files}")
    return "\n".join(lines) + "\n"


def load_mapping(source: str | os.PathLike[str] | Mapping) -> VendorMapping:
    """Read a preset by name, a mapping file by path, or a mapping given as a dict.

    Raises
    ------
    ValueError
        If there is no such preset or file, the YAML is broken, or a key, role, unit or
        choice is unknown; the message names it and lists what is known.
    """
    if isinstance(source, Mapping):
        return parse_mapping(dict(source), "given")
    text = str(source)
    if text in preset_names():
        content = (_presets() / f"{text}.yaml").read_text(encoding="utf-8")
        return parse_mapping(load_yaml(content, f"`mapping` {text}"), text)
    path = Path(text)
    if not path.is_file():
        raise ValueError(
            f"`mapping`={text!r} is neither a preset nor a file; "
            f"presets are {preset_names()}."
        )
    content = settings_text(path, f"`mapping` {text}")
    return parse_mapping(load_yaml(content, f"`mapping` {text}"), path.stem)


class _UniqueKeyLoader(yaml.SafeLoader):
    """A safe loader that refuses a key given twice; plain YAML lets the last win."""


def _unique_mapping(loader: yaml.SafeLoader, node: yaml.MappingNode) -> dict[Any, Any]:
    seen = set()
    for key_node, _ in node.value:
        key = loader.construct_object(key_node, deep=True)
        if not isinstance(key, str | int | float):
            raise yaml.constructor.ConstructorError(
                None, None, f"a key must be text, got {key!r}", key_node.start_mark
            )
        if key in seen:
            raise yaml.constructor.ConstructorError(
                None, None, f"key {key!r} is given twice", key_node.start_mark
            )
        seen.add(key)
    return loader.construct_mapping(node, deep=True)


_UniqueKeyLoader.add_constructor(
    yaml.resolver.BaseResolver.DEFAULT_MAPPING_TAG, _unique_mapping
)


#: A mapping is at most so long, and with its aliases written out at most so large.
_MOST_TEXT, _MOST_NODES = 300_000, 100_000


def settings_text(path: Path, where: str) -> str:
    """Read a file of settings, of bounded size; `where` names it in errors.

    Raises
    ------
    ValueError
        If it is longer than any such file, or not UTF-8.
    """
    try:
        with path.open(encoding="utf-8-sig") as file:
            text = file.read(_MOST_TEXT + 1)
    except UnicodeDecodeError as error:
        raise ValueError(
            f"{where} is not UTF-8 ({error}): save it in that encoding."
        ) from error
    if len(text) > _MOST_TEXT:
        raise ValueError(
            f"{where} has more than {_MOST_TEXT:,} characters: is it another file?"
        )
    return text


def load_yaml(text: str, where: str) -> Any:
    """Read YAML of plain values, of bounded size; `where` names it in errors.

    Raises
    ------
    ValueError
        If it is no YAML, gives a key twice, or is large with its aliases written out.
    """
    try:
        loader = _UniqueKeyLoader(text)  # a SafeLoader
        try:
            node = loader.get_single_node()
            if node is None:
                return None
            if nodes_of(node) > _MOST_NODES:
                raise ValueError(
                    f"its aliases stand for more than {_MOST_NODES:,} values; write "
                    "it without them."
                )
            return loader.construct_document(node)
        finally:
            loader.dispose()
    except (yaml.YAMLError, ValueError) as error:  # a date, or a number of any length
        raise ValueError(f"{where} is not valid YAML: {error}") from error
    except RecursionError:
        raise ValueError(f"{where} is nested too deeply.") from None


def nodes_of(node: Any, known: dict[int, float] | None = None) -> float:
    """Values of a composed YAML document (PyYAML's or ruamel's), aliases written out.

    Infinite for one that holds itself.
    """
    known = {} if known is None else known
    if not isinstance(value := getattr(node, "value", None), list):
        return 1
    if id(node) not in known:
        known[id(node)] = float("inf")  # met again before it is counted: a circle
        inside = [
            x for pair in value for x in (pair if type(pair) is tuple else [pair])
        ]
        known[id(node)] = 1 + sum(nodes_of(x, known) for x in inside)
    return known[id(node)]


def parse_mapping(raw: Any, name: str) -> VendorMapping:
    """Check a mapping read from YAML and make it a `VendorMapping`.

    Raises
    ------
    ValueError
        As `load_mapping`.
    """
    where = f"`mapping` {name}"
    raw = _renew(raw, where)
    _only_keys(raw, _TOP_KEYS, where)
    sources_raw = raw.get("sources")
    _only_keys(sources_raw, None, f"{where}: `sources`")
    sources = tuple(
        _parse_source(str(key), value, where) for key, value in sources_raw.items()
    )
    kinds = [s.kind for s in sources]
    futures = "futures" in kinds
    has_bars = sum(kind in ("bars", "bonds", "futures") for kind in kinds)
    if has_bars > 1 or not (has_bars or any(kind in INTRADAY for kind in kinds)):
        raise ValueError(
            f"{where} needs exactly one source of kind bars (or futures; or bonds, for "
            "a store of convertible bonds)."
        )
    has_bars = has_bars and "bonds" not in kinds
    choices = {}
    defaults = {"factor_history": "fixed", "pct_change_of": "adjusted", "codes": "cn"}
    if not has_bars:
        defaults |= {"prices": "raw", "factor": "one"}
    for key, known in _CHOICES.items():
        value = raw.get(key, defaults.get(key))
        if value is None:
            raise ValueError(f"{where} lacks `{key}`; choose one of {list(known)}.")
        if value not in known:
            raise ValueError(f"{where}: `{key}`={value!r} is not one of {list(known)}.")
        choices[key] = value
    given = (choices["prices"], choices["factor"], choices["codes"])
    if futures and given != ("raw", "preclose", "futures"):
        raise ValueError(
            f"{where}: a source of kind futures needs `prices: raw`, `factor: preclose`"
            " and `codes: futures`: a roll is adjusted as an ex-date is, by the "
            f"previous close of the same contract. Got {', '.join(given)}."
        )
    if choices["prices"] == "adjusted" and choices["factor"] == "preclose":
        raise ValueError(
            f"{where}: `factor`: preclose needs raw prices, but `prices` is adjusted."
        )
    session = raw.get("session")
    if session is not None and (
        not isinstance(session, str) or session not in SESSIONS
    ):
        raise ValueError(
            f"{where}: `session` must be one of {sorted(SESSIONS)}, got {session!r}."
        )
    notes = raw.get("notes") or ()
    return VendorMapping(
        name=name,
        sources=sources,
        session=session,
        renames=_parse_renames(raw.get("renames"), choices["codes"], where),
        vendor=_text(raw.get("vendor", ""), f"{where}: `vendor`"),
        description=_text(raw.get("description", ""), f"{where}: `description`"),
        notes=_texts(notes, f"{where}: `notes`") if notes else (),
        **choices,
    )


def _parse_renames(raw: Any, codes: str, where: str) -> dict[str, str]:
    if raw is None:
        return {}
    here = f"{where}: `renames`"
    _only_keys(raw, None, here)
    out = {}
    for old, new in raw.items():
        pair = []
        for code in (_text(old, here), _text(new, here)):
            name = a_share_code(code) if codes == "cn" else code.upper()
            if name is None:
                raise ValueError(f"{here}: {code!r} is no A-share code.")
            pair.append(name)
        out[pair[0]] = pair[1]
    chained = sorted(set(out) & set(out.values()))
    if chained:
        raise ValueError(
            f"{here}: {chained[0]} is both an old and a new code; name the last one."
        )
    return out


def _parse_source(name: str, raw: Any, where: str) -> Source:
    here = f"{where}: source `{name}`"
    _only_keys(raw, None, here)
    kind = raw.get("kind")
    if not isinstance(kind, str) or kind not in KINDS:
        raise ValueError(f"{here}: `kind`={kind!r} is not one of {list(KINDS)}.")
    _only_keys(raw, _SOURCE_KEYS + _KIND_OPTIONS[kind], here)
    columns = _parse_columns(raw, kind, here)
    options = {k: raw[k] for k in _KIND_OPTIONS[kind] if raw.get(k) is not None}
    for key, value in options.items():
        want = _TYPES.get(key)
        right = want is None or (
            isinstance(value, want) and not (want is int and isinstance(value, bool))
        )
        if not right:
            words: dict[Any, str] = {
                dict: "a mapping of keys to values",
                str: "text",
                int: "a number",
            }
            words[bool] = "true or false"
            raise ValueError(f"{here}: `{key}` must be {words[want]}, got {value!r}.")
    if kind == "statements":
        _check_items(raw, columns, here)
    if kind == "holdings" and options.get("scope") not in SCOPES:
        raise ValueError(
            f"{here}: `scope` must say which positions the tables list, one of "
            f"{list(SCOPES)}, got {options.get('scope')!r}."
        )
    if kind == "bond_events":
        _check_events(options.get("events"), here)
    if kind in INTRADAY:
        _check_intraday(options, kind, columns, here)
    for product in options.get("products") or ():
        if futures_code(str(product)) != product:
            raise ValueError(
                f"{here}: `products` must be a list such as [CFFEX.T], got {product!r}."
            )
    for product, value in (options.get("multiplier") or {}).items():
        number = isinstance(value, int | float) and not isinstance(value, bool)
        if futures_code(str(product)) != product or not number or not value > 0:
            raise ValueError(
                f"{here}: `multiplier` must map products such as CFFEX.T to a number "
                f"above 0, got {product!r}: {value!r}."
            )
    if not isinstance(raw.get("optional", False), bool):
        raise ValueError(f"{here}: `optional` must be true or false.")
    files = raw.get("files", ())
    return Source(
        name=name,
        kind=kind,
        files=_texts(files, f"{here}: `files`") if files else (),
        columns=columns,
        units=_parse_units(raw.get("units"), columns, kind, here),
        optional=raw.get("optional", False),
        options=options,
        **_text_options(raw, here),
    )


def _parse_columns(raw: Any, kind: str, here: str) -> dict[str, Any]:
    value = raw.get("columns")
    if value is None and kind in INTRADAY:
        return {}
    _only_keys(value, None, f"{here}: `columns`")
    required, optional = KINDS[kind]
    columns: dict[str, Any] = {}
    for role, names in value.items():
        if kind == "bond_terms" and role in _LATEST:
            raise ValueError(
                f"{here}: `columns.{role}` of a table without dates is the latest "
                "value: taken for the past it would look ahead. Give dated rows, "
                f"by a source of {_LATEST[role]}."
            )
        if role not in required + optional:
            raise ValueError(
                f"{here}: `columns` has unknown role {role!r}; known for kind {kind}: "
                f"{list(required + optional)}."
            )
        at = f"{here}: `columns.{role}`"
        if isinstance(names, dict) and role in ("time", "datetime"):
            if sorted(map(str, names)) != ["date", "time"]:
                raise ValueError(
                    f"{at} must be a column or {{date: column, time: column}}, got "
                    f"{names!r}."
                )
            columns[role] = {k: _text(names[k], f"{at}.{k}") for k in ("date", "time")}
        else:
            columns[role] = _texts(names, at)
    missing = [role for role in required if role not in columns]
    if missing:
        raise ValueError(f"{here}: `columns` lacks {missing}.")
    return columns


def _parse_units(
    raw: Any, columns: Mapping[str, Any], kind: str, here: str
) -> dict[str, Any]:
    if not raw:
        return {}
    _only_keys(raw, None, f"{here}: `units`")
    free = ("price", "volume") if kind == "quotes" or not columns else ("price",)
    for role, unit in raw.items():
        if role not in UNITS or role not in (*columns, *free):
            raise ValueError(
                f"{here}: `units` names {role!r}, which is not a number in `columns`."
            )
        if isinstance(unit, dict):
            given = set(columns.get(role, ()))
            if set(unit) != given:
                raise ValueError(
                    f"{here}: `units.{role}` must give a unit for each of "
                    f"{sorted(given)}, got {sorted(map(str, unit))}."
                )
        for one in unit.values() if isinstance(unit, dict) else (unit,):
            if not isinstance(one, str) or one not in UNITS[role]:
                raise ValueError(
                    f"{here}: `units.{role}`={one!r} is not one of {list(UNITS[role])}."
                )
    return dict(raw)


def _text_options(raw: Any, here: str) -> dict[str, Any]:
    """How the CSV files are written: encoding, decimal mark, lines to leave out."""
    out = {k: raw.get(k) for k in ("encoding", "decimal", "skip", "footer")}
    if out["encoding"] is not None:
        try:
            codecs.lookup(_text(out["encoding"], f"{here}: `encoding`"))
        except LookupError:
            raise ValueError(
                f"{here}: `encoding`={out['encoding']!r} is unknown; use utf-8 or "
                "gb18030."
            ) from None
    if out["decimal"] not in (None, ".", ","):
        raise ValueError(
            f'{here}: `decimal` must be "." or ",", got {out["decimal"]!r}.'
        )
    for key in ("skip", "footer"):
        value = out[key]
        if value is not None and (
            isinstance(value, bool) or not isinstance(value, int) or value < 0
        ):
            raise ValueError(
                f"{here}: `{key}` must be a number of lines, 0 or more, got {value!r}."
            )
    return out


def _check_intraday(
    options: Mapping[str, Any], kind: str, columns: Mapping[str, Any], here: str
) -> None:
    if kind == "quotes" and columns:
        levels = options.get("levels") or {}
        if set(levels) != set(_LEVELS):
            raise ValueError(
                f"{here}: `levels` needs exactly {sorted(_LEVELS)}, got "
                f"{sorted(map(str, levels))}."
            )
        for key in _LEVELS[:4]:
            if "{}" not in _text(levels[key], f"{here}: `levels.{key}`"):
                raise ValueError(
                    f"{here}: `levels.{key}` needs {{}} where the level's number "
                    f"stands, got {levels[key]!r}."
                )
        if not all(isinstance(levels[k], int) for k in ("first", "count")):
            raise ValueError(f"{here}: `levels` first and count must be numbers.")
    for role, codes in (options.get("values") or {}).items():
        if role not in ("side", "action") or not isinstance(codes, dict):
            raise ValueError(
                f"{here}: `values` takes side and action, each with the vendor's value "
                f"and ours (1, -1 or 0), got {role!r}: {codes!r}."
            )
        if not all(ours in (1, -1, 0) for ours in codes.values()):
            raise ValueError(f"{here}: `values.{role}` must give 1, -1 or 0.")
    cancels = options.get("cancels")
    if cancels is not None and (
        set(cancels) != {"column", "values"} or not isinstance(cancels["values"], list)
    ):
        raise ValueError(
            f"{here}: `cancels` must be {{column: name, values: [...]}}, got "
            f"{cancels!r}."
        )


# -- mappings of bars and ticks as they were written before

_OLD_TABLES = {table: kind for kind, table in INTRADAY.items()}
_OLD_KEYS = {"path": "files", "volume_unit": "units: {volume: lots}", "codes": "values"}


def _renew(raw: Any, where: str) -> Any:
    """Write a mapping of the former language of bars and ticks anew, and say so."""
    old = {*_OLD_TABLES, *_SHARED}
    if not isinstance(raw, dict) or "sources" in raw or not set(raw) & old:
        return raw
    sources: dict[str, Any] = {}
    for table, kind in _OLD_TABLES.items():
        block = raw.get(table)
        if isinstance(block, dict):
            sources[table] = _renewed(kind, block)
    for key in _SHARED:
        if key in raw:
            kind = "trades" if key == "publishes_all" else "minute"
            home = sources.setdefault(INTRADAY[kind], {"kind": kind})
            home[key] = raw[key]
    new = {k: v for k, v in raw.items() if k not in old} | {"sources": sources}
    text = yaml.safe_dump(new, allow_unicode=True, sort_keys=False)
    logger.warning(
        f"{where} is written in the former language of bars and ticks; read as what "
        f"is now:\n\n{text}"
    )
    return new


def _renewed(kind: str, block: Mapping[str, Any]) -> dict[str, Any]:
    out: dict[str, Any] = {"kind": kind}
    words = {"{file}": FILENAME, "{new}": NEW_ORDER}
    for key, value in block.items():
        if key == "columns" and isinstance(value, dict):
            out[key] = {
                k: words.get(v, v) if isinstance(v, str) else v
                for k, v in value.items()
            }
        elif key == "volume_unit":
            counts = {scale: unit for unit, scale in _COUNT.items()}
            out["units"] = {"volume": counts.get(value, f"{value} shares")}
        else:
            out[_OLD_KEYS.get(str(key), str(key))] = value
    return out


def _check_items(raw: Any, columns: Mapping[str, Any], here: str) -> None:
    """Long statements need `items`, wide ones at least one item column."""
    if ("item" in columns) != ("value" in columns):
        raise ValueError(f"{here}: `columns` item and value come together.")
    items = raw.get("items")
    if "item" not in columns:
        if items is not None or not set(columns) & set(STATEMENT_ITEMS):
            raise ValueError(
                f"{here}: give one column per item ({list(STATEMENT_ITEMS)}), or "
                "`columns` item and value with `items`."
            )
        return
    _only_keys(items, None, f"{here}: `items`")
    items = {k: str(v) for k, v in items.items()}
    unknown = sorted({str(v) for v in items.values()} - set(STATEMENT_ITEMS))
    if unknown:
        raise ValueError(
            f"{here}: `items` has unknown {unknown}; known: {list(STATEMENT_ITEMS)}."
        )
    unit = raw.get("item_unit", "cny")
    if unit not in MONEY:
        raise ValueError(f"{here}: `item_unit`={unit!r} is not one of {list(MONEY)}.")


def _check_events(events: Any, here: str) -> None:
    unknown = sorted({str(v) for v in (events or {}).values()} - set(BOND_EVENTS))
    if not events or unknown:
        raise ValueError(
            f"{here}: `events` must map the vendor's words to {list(BOND_EVENTS)}, got "
            f"{events!r}."
        )


def _text(value: Any, where: str) -> str:
    if not isinstance(value, str):
        raise ValueError(f"{where} must be text, got {value!r}.")
    return value.strip()


def _texts(value: Any, where: str) -> tuple[str, ...]:
    if value in ("{file}", "{new}"):
        new = {"{file}": FILENAME, "{new}": NEW_ORDER}[value]
        raise ValueError(f"{where}: {value!r} is now written {new!r}.")
    items = value if isinstance(value, list | tuple) else [value]
    if not items or not all(isinstance(item, str) and item for item in items):
        raise ValueError(f"{where} must be text or a list of texts, got {value!r}.")
    return tuple(items)


def _only_keys(raw: Any, known: Iterable[str] | None, where: str) -> None:
    if not isinstance(raw, dict) or not raw:
        raise ValueError(f"{where} must be a mapping of keys to values, got {raw!r}.")
    if known is None:
        return
    unknown = [key for key in raw if key not in tuple(known)]
    if unknown:
        new = [f"{k} is now {_OLD_KEYS[k]}" for k in unknown if k in _OLD_KEYS]
        hint = f" ({', '.join(new)})" if new else ""
        raise ValueError(
            f"{where} has unknown key(s) {unknown}{hint}; known: {list(known)}."
        )
