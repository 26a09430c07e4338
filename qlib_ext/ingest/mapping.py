"""What a vendor's columns mean: a strict YAML file, or one of the shipped presets.

A mapping names the vendor's files and columns, their units, and how its prices are
adjusted. Nothing is guessed from values: a wrong unit is caught by the checks, never
repaired in silence. An unknown key, role or unit is an error that lists the known ones.
"""

from __future__ import annotations

import os
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from importlib import resources
from pathlib import Path
from typing import Any

import yaml

from data_handlers.aggregate.schema import FLOW_FIELDS

__all__ = [
    "FIELD_ROLES",
    "MONEY",
    "STATEMENT_ITEMS",
    "Source",
    "VendorMapping",
    "load_mapping",
    "preset_names",
    "unit_scale",
]

FILENAME = "@filename"

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
_PRICE = {"cny": 1.0}

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

_KEYS = ("instrument", "date")
# kind -> (required roles, optional roles)
KINDS: dict[str, tuple[tuple[str, ...], tuple[str, ...]]] = {
    "bars": (
        (*_KEYS, "open", "high", "low", "close"),
        tuple(r for r in FIELD_ROLES if r not in ("open", "high", "low", "close")),
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
}
_KIND_OPTIONS: dict[str, tuple[str, ...]] = {
    "bars": ("expect",),
    "fields": ("expect",),
    "factor": (),
    "index": (),
    "members": ("names", "sizes"),
    "industry": ("digits", "names"),
    "statements": ("items", "item_unit", "expect"),
}
_SOURCE_KEYS = ("kind", "files", "columns", "units", "optional", "encoding")
_TOP_KEYS = (
    "vendor",
    "description",
    "prices",
    "factor",
    "factor_history",
    "pct_change_of",
    "codes",
    "sources",
    "notes",
)
_CHOICES: dict[str, tuple[str, ...]] = {
    "prices": ("raw", "adjusted"),
    "factor": ("column", "preclose", "one"),
    "factor_history": ("fixed", "rebased"),
    "pct_change_of": ("adjusted", "raw"),
    "codes": ("cn", "asis"),
}


@dataclass(frozen=True)
class Source:
    """One kind of vendor file.

    Attributes
    ----------
    name : str
        Name in the mapping, for messages and for ``--file NAME=PATH``.
    kind : str
        ``bars``, ``fields`` (joined to the bars by stock and day), ``factor`` (holds
        from its date on), ``index``, ``members``, ``industry`` or ``statements``.
    files : tuple of str
        Paths, globs or directories, relative to the data directory.
    columns : mapping of str to tuple of str
        Role to the vendor's column names, of which the first present one is used;
        ``@filename`` takes the code from the file's name.
    units : mapping of str to str
        Role to unit; roles left out are in the store's unit.
    optional : bool
        Whether the source may be absent.
    encoding : str or None
        Encoding of CSV files; None tries UTF-8, then GB18030.
    options : mapping
        What only this kind knows (`expect`, `names`, `sizes`, `digits`, …).
    """

    name: str
    kind: str
    files: tuple[str, ...]
    columns: Mapping[str, tuple[str, ...]]
    units: Mapping[str, str]
    optional: bool = False
    encoding: str | None = None
    options: Mapping[str, Any] = field(default_factory=dict)


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
        ``cn`` turns every A-share code style into SH600000; ``asis`` keeps codes.
    sources : tuple of Source
        In the order of the file.
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
    vendor: str = ""
    description: str = ""
    notes: tuple[str, ...] = ()

    def of_kind(self, kind: str) -> tuple[Source, ...]:
        """Return the sources of one kind."""
        return tuple(s for s in self.sources if s.kind == kind)


def preset_names() -> list[str]:
    """Names that `load_mapping` takes without a file."""
    folder = resources.files("qlib_ext.ingest") / "presets"
    names = (Path(f.name) for f in folder.iterdir())
    return sorted(path.stem for path in names if path.suffix == ".yaml")


def load_mapping(preset_or_file: str | os.PathLike[str]) -> VendorMapping:
    """Read a preset by name, or a mapping file by path.

    Raises
    ------
    ValueError
        If there is no such preset or file, the YAML is broken, or a key, role, unit or
        choice is unknown; the message names it and lists what is known.
    """
    text = str(preset_or_file)
    if text in preset_names():
        file = resources.files("qlib_ext.ingest") / "presets" / f"{text}.yaml"
        return parse_mapping(_load_yaml(file.read_text(encoding="utf-8"), text), text)
    path = Path(text)
    if not path.is_file():
        raise ValueError(
            f"`mapping`={text!r} is neither a preset nor a file; "
            f"presets are {preset_names()}."
        )
    try:
        content = path.read_text(encoding="utf-8")
    except UnicodeDecodeError as error:
        raise ValueError(f"`mapping` {path} is not UTF-8: {error}.") from error
    return parse_mapping(_load_yaml(content, text), path.stem)


def unit_scale(role: str, unit: str) -> float:
    """Factor that turns a vendor's unit into the store's."""
    return UNITS[role][unit]


class _UniqueKeyLoader(yaml.SafeLoader):
    """A safe loader that refuses a key given twice; plain YAML lets the last win."""


def _unique_mapping(loader: yaml.SafeLoader, node: yaml.MappingNode) -> dict[Any, Any]:
    seen = set()
    for key_node, _ in node.value:
        key = loader.construct_object(key_node, deep=True)
        if key in seen:
            raise yaml.constructor.ConstructorError(
                None, None, f"key {key!r} is given twice", key_node.start_mark
            )
        seen.add(key)
    return loader.construct_mapping(node, deep=True)


_UniqueKeyLoader.add_constructor(
    yaml.resolver.BaseResolver.DEFAULT_MAPPING_TAG, _unique_mapping
)


def _load_yaml(text: str, name: str) -> Any:
    try:
        return yaml.load(text, Loader=_UniqueKeyLoader)  # a SafeLoader
    except yaml.YAMLError as error:
        raise ValueError(f"`mapping` {name} is not valid YAML: {error}") from error


def parse_mapping(raw: Any, name: str) -> VendorMapping:
    """Check a mapping read from YAML and make it a `VendorMapping`.

    Raises
    ------
    ValueError
        As `load_mapping`.
    """
    where = f"`mapping` {name}"
    _only_keys(raw, _TOP_KEYS, where)
    choices = {}
    defaults = {"factor_history": "fixed", "pct_change_of": "adjusted", "codes": "cn"}
    for key, known in _CHOICES.items():
        value = raw.get(key, defaults.get(key))
        if value is None:
            raise ValueError(f"{where} lacks `{key}`; choose one of {list(known)}.")
        if value not in known:
            raise ValueError(f"{where}: `{key}`={value!r} is not one of {list(known)}.")
        choices[key] = value
    if choices["prices"] == "adjusted" and choices["factor"] == "preclose":
        raise ValueError(
            f"{where}: `factor`: preclose needs raw prices, but `prices` is adjusted."
        )
    sources_raw = raw.get("sources")
    _only_keys(sources_raw, None, f"{where}: `sources`")
    sources = tuple(
        _parse_source(str(key), value, where) for key, value in sources_raw.items()
    )
    mapping = VendorMapping(
        name=name,
        sources=sources,
        vendor=str(raw.get("vendor", "")),
        description=str(raw.get("description", "")).strip(),
        notes=tuple(str(note) for note in raw.get("notes") or ()),
        **choices,
    )
    if len(mapping.of_kind("bars")) != 1:
        raise ValueError(f"{where} needs exactly one source of kind bars.")
    return mapping


def _parse_source(name: str, raw: Any, where: str) -> Source:
    here = f"{where}: source `{name}`"
    _only_keys(raw, None, here)
    kind = raw.get("kind")
    if kind not in KINDS:
        raise ValueError(f"{here}: `kind`={kind!r} is not one of {list(KINDS)}.")
    _only_keys(raw, _SOURCE_KEYS + _KIND_OPTIONS[kind], here)
    columns_raw = raw.get("columns")
    _only_keys(columns_raw, None, f"{here}: `columns`")
    required, optional = KINDS[kind]
    columns = {}
    for role, value in columns_raw.items():
        if role not in required + optional:
            raise ValueError(
                f"{here}: `columns` has unknown role {role!r}; known for kind {kind}: "
                f"{list(required + optional)}."
            )
        columns[role] = _texts(value, f"{here}: `columns.{role}`")
    missing = [role for role in required if role not in columns]
    if missing:
        raise ValueError(f"{here}: `columns` lacks {missing}.")
    units = raw.get("units") or {}
    if units:
        _only_keys(units, None, f"{here}: `units`")
    for role, unit in units.items():
        if role not in columns or role not in UNITS:
            raise ValueError(
                f"{here}: `units` names {role!r}, which is not a number in `columns`."
            )
        if unit not in UNITS[role]:
            raise ValueError(
                f"{here}: `units.{role}`={unit!r} is not one of {list(UNITS[role])}."
            )
    if kind == "statements":
        _check_items(raw, columns, here)
    if not isinstance(raw.get("optional", False), bool):
        raise ValueError(f"{here}: `optional` must be true or false.")
    files = raw.get("files", ())
    return Source(
        name=name,
        kind=kind,
        files=_texts(files, f"{here}: `files`") if files else (),
        columns=columns,
        units=dict(units),
        optional=raw.get("optional", False),
        encoding=raw.get("encoding"),
        options={k: raw[k] for k in _KIND_OPTIONS[kind] if k in raw},
    )


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
    unknown = sorted({str(v) for v in items.values()} - set(STATEMENT_ITEMS))
    if unknown:
        raise ValueError(
            f"{here}: `items` has unknown {unknown}; known: {list(STATEMENT_ITEMS)}."
        )
    unit = raw.get("item_unit", "cny")
    if unit not in MONEY:
        raise ValueError(f"{here}: `item_unit`={unit!r} is not one of {list(MONEY)}.")


def _texts(value: Any, where: str) -> tuple[str, ...]:
    items = value if isinstance(value, list) else [value]
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
        raise ValueError(f"{where} has unknown key(s) {unknown}; known: {list(known)}.")
