"""Record and page of group scores and of the weekly rotation between groups."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Annotated, Any

import numpy as np
import pandas as pd
import torch
from annotated_types import Ge, Lt
from qlib.config import C
from qlib.data import D
from qlib.workflow.record_temp import SignalRecord

from data_handlers.arguments import Share, check_whole
from data_handlers.fields import require_fields
from data_handlers.holdings import HOLDINGS, read_holdings
from data_handlers.index_weights import load_index_weights
from data_handlers.panel import scatter
from qlib_ext.report import groups as calculation
from qlib_ext.report import market_data, plots, tables
from qlib_ext.report.factor import PERIOD_STYLES
from qlib_ext.report.page import Page, caption
from qlib_ext.report.record import FileRecord, first_column, flat, footer, logger
from qlib_ext.report.studies import BUY_COST, SELL_COST, centred_ranks

__all__ = ["GroupRecord"]

_Cost = Annotated[float, Ge(0), Lt(1)]
_KEYS = {
    "industry": {"of", "k", "weight"},
    "themes": {"of", "k", "weight", "funds"},
    "market": {"of", "k", "groups"},
    "holdings": {"of", "k", "groups", "path", "gaps"},
}
_RULES = ("level", "change")


class GroupRecord(FileRecord):
    """Average stock scores to industries, indices or ETFs, and rotate between them.

    The value of a group is the weighted mean of its stocks' values, each weight known
    at the close of the day; its change is that over five trading days. Each week the
    `k` groups with the highest level, and with the largest change, are bought at the
    close of the next day and set against all groups at equal weight.

    Writes under ``groups/``, for each set: ``<set>_levels.parquet``,
    ``<set>_changes.parquet`` [t, g], ``<set>_returns.parquet`` and
    ``<set>_held.parquet`` (groups wanted at each fill) of both rules; and
    ``summary.json``, ``report.html``. Figures are logged as ``rotation <set> <rule>``.

    Parameters
    ----------
    recorder : Recorder
        Given by Qlib.
    sets : mapping of str to mapping
        Name to what the groups are. ``of: industry``: stocks by the store's
        `$industry`; ``weight`` may name a field (``market_cap``), default equal.
        ``of: themes``: ETFs whose baskets are not known, ``funds`` mapping each to the
        name or code (or several) of its theme's industry, whose stocks stand for it;
        the page says so.
        ``of: market``: members of the markets in ``groups``, by the store's weights.
        ``of: holdings``: the funds in ``groups`` (ETFs; default: all that have bars in
        the store) by a table of holdings at ``path``, by default that of `qlib-ext
        ingest`, whose `announced` dates count; ``gaps: name`` leaves out funds without
        a basket, or before their first, and says so, where they are errors otherwise.
        Funds, also of themes, are priced by their own closes in the store, the others
        by their members.
        ``k`` (default 3): groups held.
    field : str, optional
        Qlib expression to average instead of the score, ``$turnover`` for attention,
        on the days of ``pred.pkl``.
    ranked : bool, default True
        Average the day's ranks, -0.5 to 0.5, and take changes as differences. False:
        average the values themselves, which must be positive, and take rates of change.
    min_cover : float, default 0.5
        Least share of a group's weight with a value for it to have a level.
    buy_cost, sell_cost : float
        Fractions of the amount traded.
    skip_existing : bool, default False
        Leave finished files as they are.

    Raises
    ------
    ValueError
        If an argument is out of range, a set is unknown, a fund has no basket or no
        bars, or no group has a level.
    """

    artifact_path = "groups"
    leaves = ("report.html", "summary.json")
    depend_cls = SignalRecord

    def __init__(
        self,
        recorder: Any,
        sets: Mapping[str, Mapping[str, Any]] | None = None,
        field: str | None = None,
        ranked: bool = True,
        min_cover: Share = 0.5,
        buy_cost: _Cost = BUY_COST,
        sell_cost: _Cost = SELL_COST,
        skip_existing: bool = False,
        model: Any = None,
        dataset: Any = None,
    ) -> None:
        super().__init__(recorder=recorder, skip_existing=skip_existing)
        if not isinstance(sets, Mapping) or not sets:
            raise ValueError(
                "`sets` must name groups: {industry: {of: industry}}, got " + repr(sets)
            )
        for name, entry in sets.items():
            _check_set(str(name), entry)
        self.sets = {str(k): dict(v) for k, v in sets.items()}

    def _generate(self, **kwargs: Any) -> dict[str, object]:
        score = first_column(self.load("pred.pkl"), "pred.pkl")
        bars = market_data.load_bars(score)
        values = self._values(score, bars)
        page = Page(
            "Group scores and rotation",
            f"{self.field or 'Model scores'}, {bars.days[0]:%Y-%m-%d} to "
            f"{bars.days[-1]:%Y-%m-%d}, averaged to groups; "
            + (
                "each stock counts by its rank of the day, -0.5 to 0.5."
                if self.ranked
                else "values as they are, changes as rates."
            ),
        )
        objects: dict[str, object] = {}
        figures: dict[str, float] = {}
        notes: dict[str, list[str]] = {}
        for name, entry in self.sets.items():
            found = self._groups(name, entry, values, bars)
            changes = calculation.weekly_change(found.levels, not self.ranked)
            signals = dict(zip(_RULES, (found.levels, changes), strict=True))
            made = {
                rule: calculation.rotate(
                    signal,
                    found.closes,
                    entry.get("k", 3),
                    self.buy_cost,
                    self.sell_cost,
                )
                for rule, signal in signals.items()
            }
            for text in found.notes:
                logger.warning(text)
                page.warn(f"{name}: {text}")
            notes[name] = found.notes
            table, part = _performance(made)
            part["groups"] = float(found.levels.notna().sum(axis=1).mean())
            figures |= {f"rotation {name} {k}": v for k, v in part.items()}
            joined = {rule: x.returns for rule, x in made.items()}
            _section(page, name, found, changes, made, table, entry)
            objects |= {
                f"{name}_levels.parquet": found.levels,
                f"{name}_changes.parquet": changes,
                f"{name}_returns.parquet": flat(pd.concat(joined, axis=1)),
                f"{name}_held.parquet": flat(
                    pd.concat({r: x.held for r, x in made.items()}, axis=1)
                ),
            }
        figures = self.log(figures)
        objects["summary.json"] = {"figures": figures, "notes": notes}
        objects["report.html"] = page.render(footer(self.recorder))
        return objects

    def _values(self, score: pd.Series, bars: market_data.Bars) -> np.ndarray:
        """Values of the stocks [t, n] on the scored days."""
        if self.field is not None:
            require_fields({"`field`": self.field}, list(bars.instruments))
            frame = D.features(
                list(bars.instruments), [self.field], bars.days[0], bars.days[-1]
            )
            score = frame.iloc[:, 0].rename("field")
        panel = tables.panel_of(score, bars.days, bars.instruments).double()
        panel = torch.where(torch.isfinite(panel), panel, torch.nan)
        return (centred_ranks(panel) if self.ranked else panel).numpy()

    def _groups(
        self,
        name: str,
        entry: Mapping[str, Any],
        values: np.ndarray,
        bars: market_data.Bars,
    ) -> calculation.Groups:
        days, close = bars.days, bars.during("close").double().numpy()
        notes: list[str] = []
        levels, covers, closes = {}, {}, {}
        of_funds = entry["of"] in ("holdings", "themes")
        for group, weight in self._weights(entry, bars, notes):
            # A basket's own sum is 1; of the others all members are in the panel.
            whole = entry["of"] == "holdings"
            total = (weight.sum(1) > 0).astype(float) if whole else None
            level, cover = calculation.group_levels(values, weight, total)
            levels[group] = np.where(cover >= self.min_cover, level, np.nan)
            covers[group] = cover
            if not of_funds:
                closes[group] = calculation.member_closes(close, weight)
        if of_funds and levels:
            closes = _own_closes(list(levels), days)
        frames = [pd.DataFrame(x, days) for x in (levels, covers, closes)]
        frames = [x.rename_axis("datetime") for x in frames]
        empty = [g for g in frames[0] if not frames[0][g].notna().any()]
        if len(empty) == len(levels):
            raise ValueError(
                f"`sets.{name}`: none of {len(levels)} groups has a level: less than "
                f"`min_cover` {self.min_cover:g} of their weights have a score. Score "
                "more stocks, or lower it."
            )
        notes += [
            f"{g} never has {self.min_cover:.0%} of its weight scored." for g in empty
        ]
        kept = [g for g in frames[0] if g not in empty]
        levels_, covers_, closes_ = (x[kept] for x in frames)
        return calculation.Groups(levels_, covers_, closes_, notes)

    def _weights(
        self, entry: Mapping[str, Any], bars: market_data.Bars, notes: list[str]
    ) -> Iterable[tuple[str, np.ndarray]]:
        days, names = bars.days, bars.instruments
        if entry["of"] == "holdings":
            table = read_holdings(str(entry.get("path", HOLDINGS)))
            table = table.assign(fund=table["fund"].astype(str))
            wanted = [str(x) for x in entry.get("groups") or _with_bars(table["fund"])]
            yield from calculation.basket_weights(
                table,
                wanted,
                days,
                names,
                skip=entry.get("gaps") == "name",
                notes=notes,
            )
            return
        if entry["of"] == "market":
            for market in entry["groups"]:
                weights = load_index_weights(market, days[0], days[-1])
                if "equally" in weights.source:
                    notes.append(f"{market}: {weights.source}.")
                frame = weights.weights.reindex(days).ffill().fillna(0.0)
                outside = frame.columns.difference(names)
                if len(outside):
                    notes.append(
                        f"{market}: {len(outside)} of {frame.shape[1]} members are "
                        "never scored."
                    )
                yield market, frame.reindex(columns=names, fill_value=0.0).to_numpy()
            return
        fields = ["industry", *([entry["weight"]] if entry.get("weight") else [])]
        require_fields({f"`of: industry`, {x}": f"${x}" for x in fields}, list(names))
        frame = D.features(list(names), [f"${x}" for x in fields], days[0], days[-1])
        codes, *sizes = (
            tables.panel_of(frame[f"${x}"], days, names).double().numpy()
            for x in fields
        )
        size = np.nan_to_num(sizes[0]) if sizes else np.ones_like(codes)
        known = market_data.industry_names()
        found = np.unique(codes[np.isfinite(codes)])
        called = {c: known.get(f"{c:g}", f"industry {c:g}") for c in found}
        if entry["of"] == "industry":
            yield from calculation.code_weights(codes, size, called)
            return
        notes.append(
            "Baskets are all scored stocks of the theme's industry, not the funds' own."
        )
        for fund, theme in entry["funds"].items():
            asked = {str(x) for x in (theme if isinstance(theme, list) else [theme])}
            chosen = [c for c, n in called.items() if asked & {n, f"{c:g}"}]
            if not chosen:
                raise ValueError(
                    f"`funds` gives {fund} the industry {theme!r}, which no scored "
                    f"stock has; there are {sorted(called.values())}."
                )
            yield str(fund), np.where(np.isin(codes, chosen), size, 0.0)


def _check_set(name: str, entry: Any) -> None:
    if (
        not name
        or not name.replace("-", "").replace("_", "").replace(" ", "").isalnum()
    ):
        raise ValueError(
            f"`sets`: {name!r} becomes part of file names; use letters, digits, '_' "
            "and '-'."
        )
    of = entry.get("of") if isinstance(entry, Mapping) else None
    if of not in _KEYS:
        raise ValueError(
            f"`sets.{name}` must have `of`: one of {sorted(_KEYS)}, got {entry!r}."
        )
    unknown = sorted(set(entry) - _KEYS[of])
    if unknown:
        raise ValueError(
            f"`sets.{name}` of {of} takes {sorted(_KEYS[of])}, not {unknown}."
        )
    check_whole(f"sets.{name}.k", entry.get("k", 3), 1)
    funds = entry.get("funds")
    if of == "themes" and not (isinstance(funds, Mapping) and funds):
        raise ValueError(
            f"`sets.{name}.funds` must map ETFs to industries, {{SH512800: bank}}, got "
            f"{funds!r}."
        )
    if of == "market" and not entry.get("groups"):
        raise ValueError(f"`sets.{name}.groups` must list markets: [csi300, csi500].")
    groups = entry.get("groups") or []
    if isinstance(groups, str) or len(set(groups)) < len(groups):
        raise ValueError(
            f"`sets.{name}.groups` must be a list of names, each once, got {groups!r}."
        )
    if not isinstance(entry.get("weight") or "", str):
        raise ValueError(
            f"`sets.{name}.weight` must name a field, got {entry['weight']!r}."
        )
    if entry.get("gaps", "raise") not in ("raise", "name"):
        raise ValueError(
            f"`sets.{name}.gaps` must be 'raise' or 'name', got {entry['gaps']!r}."
        )


def _listed(fund: str) -> str:
    """Code of a fund's bars: a bare 5… is Shanghai's, a bare 1… Shenzhen's."""
    bare = len(fund) == 6 and fund.isdigit()
    return f"{'SH' if fund[0] == '5' else 'SZ'}{fund}" if bare else fund


def _with_bars(funds: pd.Series) -> list[str]:
    """Funds whose bars the store holds."""
    folder = Path(C.dpm.get_data_uri("day")) / "features"
    known = {p.name.lower() for p in folder.iterdir()}
    found = [x for x in sorted(funds.unique()) if _listed(x).lower() in known]
    if not found:
        raise ValueError(
            f"`groups`: the store has no bars of any of {funds.nunique()} funds; "
            "ingest the funds' bars as a source of kind index."
        )
    return found


def _own_closes(funds: list[str], days: pd.DatetimeIndex) -> dict[str, np.ndarray]:
    """Read adjusted closes of funds from the store."""
    codes = {x: _listed(x) for x in funds}
    frame = D.features(list(codes.values()), ["$close"], days[0], days[-1])
    closes = scatter(frame.iloc[:, 0], days, list(codes.values()), what="$close")
    lacking = [
        x for x, none in zip(codes, np.isnan(closes).all(0), strict=True) if none
    ]
    if lacking:
        raise ValueError(
            f"`groups`: the store has no bars of {len(lacking)} fund(s), "
            f"{', '.join(lacking[:8])}; ingest them, or leave them out."
        )
    return dict(zip(codes, closes.T, strict=True))


def _performance(
    made: Mapping[str, calculation.Rotation],
) -> tuple[pd.DataFrame, dict[str, float]]:
    rows: dict[str, Any] = {}
    figures: dict[str, float] = {}
    for rule, rotation in made.items():
        table = tables.performance_table(rotation.returns)
        for portfolio, row in table.to_dict("index").items():
            if portfolio != "all" or rule == _RULES[0]:
                label = portfolio if portfolio == "all" else f"{portfolio}, by {rule}"
                rows[label] = row
        rows[f"best, by {rule}"]["turnover"] = rotation.turnover
        excess: Any = table.loc["excess"]
        free = rotation.returns["best before costs"] - rotation.returns["all"]
        before = tables.performance_table(free.to_frame("x"))
        figures |= {
            f"{rule} excess annual return before costs": float(
                before["annual_return"].iloc[0]
            ),
            f"{rule} excess annual return": float(excess["annual_return"]),
            f"{rule} excess Sharpe": float(excess["sharpe"]),
            f"{rule} weekly turnover": rotation.turnover,
        }
    return pd.DataFrame.from_dict(rows, orient="index").rename_axis(
        "portfolio"
    ), figures


def _section(
    page: Page,
    name: str,
    found: calculation.Groups,
    changes: pd.DataFrame,
    made: Mapping[str, calculation.Rotation],
    table: pd.DataFrame,
    entry: Mapping[str, Any],
) -> None:
    k = entry.get("k", 3)
    priced = (
        "own closes"
        if entry["of"] == "holdings"
        else "members' returns, held by the weights of the day before"
    )
    page.section(name, f"{found.levels.shape[1]} groups; priced by their {priced}.")
    day = found.levels.index[-1]
    now = pd.DataFrame(
        {
            "level": found.levels.iloc[-1],
            "change": changes.iloc[-1],
            "cover": found.covers.iloc[-1],
        }
    ).rename_axis("group")
    now = now.sort_values("level", ascending=False)
    styles = {
        "level": ("level", "n3"),
        "change": ("change in 5 days", "n3"),
        "cover": ("weight with a value", "p0"),
        "best": ("best", "p2"),
        "best before costs": ("best before costs", "p2"),
        "all": ("all", "p2"),
        "excess": ("excess", "p2"),
        **PERIOD_STYLES,
    }
    page.table(f"On {day:%Y-%m-%d}", now.head(40), styles=styles)
    weeks = pd.DatetimeIndex(found.levels.index).to_period("W")
    weekly = found.levels.groupby(weeks).last()
    weekly.index = pd.PeriodIndex(weekly.index).end_time.normalize()
    ends = [*now.index[: min(k, 4)], *now.index[-min(k, 4) :]]
    page.plot(
        "Weekly level of the last day's highest and lowest",
        plots.lines(weekly[list(dict.fromkeys(ends))], "level"),
    )
    values = pd.DataFrame(
        {
            "all": made["level"].returns["all"],
            **{f"best {k} by {rule}": x.returns["best"] for rule, x in made.items()},
        }
    )
    curves = tables.net_values(values)
    page.plot("Net value after costs", plots.lines(curves, "net value"), wide=True)
    note = caption(
        f"best {k} of the week's last day, filled at the next close, equal weight",
        "best after costs, all at equal weight without",
        "annual returns geometric, Sharpe from daily means",
    )
    page.table("Rotation", table, note, wide=True)
    for rule, rotation in made.items():
        page.table(
            f"By {rule}: week, month and year to the last day, and every year",
            tables.period_returns(rotation.returns),
            "Compounded within the period.",
            styles=styles,
        )
    last = pd.DataFrame(
        {rule: [", ".join(x.held.iloc[-1])] for rule, x in made.items()},
        index=pd.Index([f"{made['level'].held.index[-1]:%Y-%m-%d}"], name="bought"),
    ).rename(columns={rule: f"by {rule}" for rule in made})
    page.table(
        "Held last",
        last,
        wide=True,
        styles={f"by {rule}": (f"by {rule}", "s") for rule in made},
    )
