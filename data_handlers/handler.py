"""FeatureHandler: what the handlers of this package share.

A handler loads three column groups: `feature`, what the model sees; `label`, forward
returns; `risk`, industry, size and style exposures for neutralisation and for models
that penalise risk. Features are clipped and standardised with statistics of the fit
window; labels are neutralised and standardised over the day, for learning only: the
raw return stays in the raw frame, where Qlib's records look for it.
"""

from __future__ import annotations

from typing import Any, Literal

from qlib.contrib.data.handler import check_transform_proc
from qlib.data.dataset.handler import DataHandlerLP
from qlib.log import get_module_logger

from data_handlers.arguments import Day, NamedArguments, Names, Text, Universe
from data_handlers.fields import check_store, known_fields, require_fields
from data_handlers.labels import given_labels, holding_days, label_config, label_reach
from data_handlers.risk import RISK_FIELDS, risk_config
from data_handlers.sharing import SharedLoading
from data_handlers.universe import universe

__all__ = ["FeatureHandler", "fitted", "on_traded_days", "own_processor"]

logger = get_module_logger("data_handlers")


class FeatureHandler(NamedArguments, SharedLoading):
    """`DataHandlerLP` with feature, label and risk groups and the reports' processors.

    Subclasses set the features; see `DayHandler` for an example.

    Parameters
    ----------
    features : dict
        Source of the `feature` group as `ParquetDataLoader` takes it:
        ``{"expressions": [...], "names": [...]}`` or ``{"path": ...}``, or a list of
        such.
    categories : list of str, optional
        Features that are codes of states, 0 unknown: they are not standardised. Give
        their names to the model too.
    attributes : dict, optional
        Source of a group `attribute`, as `features`: values of the day that a model
        reads beside the series. They are standardised over the day.
    style_features : bool, default False
        Whether the style exposures are features too, as ``style_<name>``; see
        `data_handlers.risk.StyleFeatures`.
    market : dict, optional
        Arguments of `data_handlers.market_state.MarketState`, ``{}`` for its own: adds
        the group `market`, the state of the whole market.
    instruments : str, list or dict, default "all"
    start_time, end_time : str
        Rows kept, both included. Start earlier than the first segment by the model's
        look-back.
    fit_start_time, fit_end_time : str
        Window of the feature statistics; it must not reach beyond the training segment.
    freq : str, default "day"
    horizon : int or list of int, default 10
        Label horizons in trading days; see `data_handlers.labels`.
    price : {"close", "open", "vwap"} or list of these, default "close"
        At both ends of a label; as a list, one for each horizon: ``horizon: 1`` with
        ``price: [close, open]`` has the columns RET1 and RET1_open.
    label : str or list, optional
        Labels as Qlib expressions, in place of `horizon` and `price`; see
        `data_handlers.labels.given_labels`. `qlib.contrib.rolling` sets it.
    carry_label : bool, default True
        Whether a stock that does not trade on the day of exit, suspended or delisted,
        keeps a label at its last traded price. False leaves it out.
    styles : "auto" or list of str, default "auto"
        Style exposures of the `risk` group; "auto" is all that the store allows.
    neutralize : list of str, "styles" or None, default None
        Risk columns that the label is neutralised on beside the industry; None takes
        `log_mcap` if the store has a market cap, "styles" all style exposures. An empty
        list is industry only.
    neutralize_weights : {None, "sqrt_mcap", "mcap"}, default None
    missing_risk : {"drop", "unknown"}, default "drop"
        What becomes of a label whose industry or style is unknown: NaN, or a group of
        its own.
    infer_processors, learn_processors, shared_processors : list, optional
        Replace the defaults: `DropSuspended` and `CSStyleExposure` (shared),
        `RobustClipZScore` (infer), `CSNeutralize` and `CSZScore` on the label (learn).
    process_type, drop_raw, filter_pipe, inst_processors
        As in Qlib.

    Raises
    ------
    ValueError
        On a missing fit window, an unknown choice, or a universe without data.
    """

    _kept_back = frozenset({"features", "categories", "attributes"})

    def __init__(
        self,
        features: Any,
        instruments: Universe = "all",
        start_time: Day | None = None,
        end_time: Day | None = None,
        fit_start_time: Day | None = None,
        fit_end_time: Day | None = None,
        freq: Text = "day",
        horizon: Any = 10,
        price: Any = "close",
        styles: Names | None = "auto",
        neutralize: Names | None = None,
        neutralize_weights: Literal["sqrt_mcap", "mcap"] | None = None,
        missing_risk: Literal["drop", "unknown"] = "drop",
        infer_processors: list | None = None,
        learn_processors: list | None = None,
        shared_processors: list | None = None,
        process_type: Literal["append", "independent"] = DataHandlerLP.PTYPE_A,
        drop_raw: bool = False,
        filter_pipe: list | None = None,
        inst_processors: Any = None,
        categories: list | None = None,
        label: Any = None,
        carry_label: bool = True,
        attributes: Any = None,
        style_features: bool = False,
        market: dict | None = None,
    ) -> None:
        if label is None:
            labels = label_config(horizon, price, carry_label)
            many = isinstance(horizon, (list, tuple))
            self.horizons: list[int] = list(horizon) if many else [horizon]
            if len(self.horizons) == 1:
                self.horizons *= len(labels[0])
            self.label_reach = label_reach(max(self.horizons))
        else:
            expressions, names, self.label_reach = given_labels(label)
            self.horizons = [holding_days(x) for x in expressions]
            labels = expressions, names
        prices = list(price) if isinstance(price, (list, tuple)) else [price]
        check_store(freq)
        instruments = universe(instruments, freq, filter_pipe)
        known = known_fields(
            [*dict.fromkeys([*prices, *RISK_FIELDS])],
            instruments,
            start_time,
            end_time,
            freq,
        )
        for name in prices if label is None else ():
            if name not in known:
                raise ValueError(
                    f"`price` is {price!r}, but the store has no values of `${name}` "
                    f"for `instruments` {instruments!r} between {start_time} and "
                    f"{end_time}: choose another price, or add the field to the store."
                )
        risk = risk_config(styles or [], known)
        if learn_processors is None:
            learn_processors = self._label_processors(
                risk[1], neutralize, neutralize_weights, missing_risk
            )
        if shared_processors is None:
            shared_processors = [own_processor("DropSuspended")]
            if styles and set(risk[1]) - {"industry"}:
                shared_processors.append(
                    own_processor(
                        "CSStyleExposure", module="risk", styles=styles, freq=freq
                    )
                )
        if infer_processors is None:
            if fit_start_time is None or fit_end_time is None:
                raise ValueError(
                    "`fit_start_time` and `fit_end_time` must be given: the features' "
                    "clip and standardisation statistics are learned on that window. "
                    "Use the training segment's dates."
                )
            codes: dict[str, Any] = {}
            if categories:
                codes["exclude"] = list(categories)
            infer_processors = [own_processor("RobustClipZScore", **codes)]
            if attributes:
                infer_processors.append(
                    own_processor("CSZScore", fields_group="attribute")
                )
            if style_features:
                infer_processors.append(own_processor("StyleFeatures", module="risk"))
            if market is not None:
                infer_processors.append(
                    own_processor("MarketState", module="market_state", **market)
                )
        groups = {
            "feature": features,
            "label": {"expressions": labels[0], "names": labels[1]},
        }
        if attributes:
            groups["attribute"] = attributes
        require_fields(_expressions(groups), instruments, start_time, end_time, freq)
        if risk[0]:
            groups["risk"] = {"expressions": risk[0], "names": risk[1]}
        super().__init__(
            instruments=instruments,
            start_time=start_time,
            end_time=end_time,
            data_loader=self._loader(groups, freq, filter_pipe, inst_processors),
            infer_processors=fitted(infer_processors, fit_start_time, fit_end_time),
            learn_processors=fitted(learn_processors, fit_start_time, fit_end_time),
            shared_processors=fitted(shared_processors, fit_start_time, fit_end_time),
            process_type=process_type,
            drop_raw=drop_raw,
        )
        if self._infer.empty:
            raise ValueError(
                f"no data for `instruments` {instruments!r} between {start_time} and "
                f"{end_time}: check the universe, the dates and `provider_uri`."
            )
        self._report()

    @staticmethod
    def known(names: list[str], instruments: Any, kwargs: dict[str, Any]) -> list[str]:
        """Fields that the store has for the universe and dates of a handler."""
        return known_fields(
            names,
            instruments,
            kwargs.get("start_time"),
            kwargs.get("end_time"),
            kwargs.get("freq", "day"),
        )

    @staticmethod
    def _loader(groups, freq, filter_pipe, inst_processors) -> dict:
        if all("expressions" in source for source in groups.values()):
            config = {g: (s["expressions"], s["names"]) for g, s in groups.items()}
            return {
                "class": "ExpressionLoader",
                "module_path": "data_handlers.expression.loading",
                "kwargs": {
                    "config": config,
                    "freq": freq,
                    "filter_pipe": filter_pipe,
                    "inst_processors": inst_processors,
                },
            }
        if inst_processors is not None:
            raise ValueError(
                "`inst_processors` need features that are Qlib expressions; these come "
                "from Parquet files."
            )
        return {
            "class": "ParquetDataLoader",
            "module_path": "data_handlers.loaders",
            "kwargs": {"config": groups, "freq": freq, "filter_pipe": filter_pipe},
        }

    @staticmethod
    def _label_processors(names, neutralize, weights, missing) -> list[dict]:
        """CSNeutralize on what the store allows, then CSZScore."""
        every = neutralize == "styles"
        if every and not set(names) - {"industry", "log_mcap"}:
            raise ValueError(
                f"`neutralize` is 'styles', but the risk group {names} has none: set "
                "`styles`, or add their fields to the store."
            )
        if isinstance(neutralize, str):
            neutralize = [] if every else [neutralize]
        wanted = ["log_mcap"] if neutralize is None else list(neutralize)
        absent = [name for name in wanted if name not in names]
        if neutralize is not None and absent:
            raise ValueError(
                f"`neutralize` names {absent[0]!r}, which the risk group {names} does "
                "not have: the store lacks its fields."
            )
        industry = "industry" if "industry" in names else None
        if absent:
            logger.warning(
                "the store has no `$market_cap`: labels are not neutralised on size"
            )
        if industry is None:
            logger.warning(
                "the store has no `$industry`: labels are not neutralised on industry"
            )
        kwargs = {
            "industry": industry,
            "styles": "all" if every else [name for name in wanted if name in names],
            "weights": weights,
            "missing": missing,
        }
        processors = [own_processor("CSZScore", fields_group="label")]
        if industry is not None or kwargs["styles"]:
            processors.insert(
                0, own_processor("CSNeutralize", fields_group="label", **kwargs)
            )
        return processors

    def _report(self) -> None:
        """Log how much of the risk group is known."""
        if "risk" not in self._infer.columns.get_level_values(0):
            return
        coverage = self._infer["risk"].notna().mean()
        logger.info(
            f"{type(self).__name__}: {len(self._infer)} rows; risk coverage "
            + ", ".join(f"{name} {share:.1%}" for name, share in coverage.items())
        )


def _expressions(groups: dict[str, Any]) -> dict[str, str]:
    """Qlib expressions of all groups, by what they make."""
    return {
        f"{group} `{name}`": expression
        for group, sources in groups.items()
        for source in ([sources] if isinstance(sources, dict) else sources)
        for name, expression in zip(
            source.get("names") or (), source.get("expressions", ()), strict=False
        )
    }


def on_traded_days(expression: str) -> str:
    """Qlib expression with the same values, NaN on days without a trade.

    Rolling operators have a value through a suspension; a feature row there would make
    the stock look traded.
    """
    return f"({expression}) + 0 * Traded($close)"


def own_processor(name: str, module: str = "processors", **kwargs) -> dict:
    """Describe a processor of this package, as Qlib's handlers take it."""
    return {"class": name, "module_path": f"data_handlers.{module}", "kwargs": kwargs}


def fitted(processors: list, start: Any, end: Any) -> list:
    """Hand the fit window to learned processors.

    Qlib's helper asserts that the window is known even where no processor learns.
    """
    if start is None and end is None:
        return processors
    return check_transform_proc(processors, start, end)
