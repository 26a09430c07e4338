"""What `qlib-ext riskmodel` does."""

from __future__ import annotations

import logging
from pathlib import Path

__all__ = ["riskmodel_text"]


def riskmodel_text(
    store: str | Path,
    out: str | Path,
    start: str,
    end: str,
    frequency: str = "week",
    extra: tuple[str, ...] = (),
    overwrite: bool = False,
) -> str:
    """Build a risk model and say how well its forecasts held.

    Parameters
    ----------
    store : path
        Qlib store.
    out : path
        Directory of the model.
    start, end : str
        Days wanted.
    frequency : {"week", "day"}
    extra : tuple of "name=path"
        Further risk factors.
    overwrite : bool
        Compute every day again; see `build_risk_model`.

    Raises
    ------
    ValueError
        On anything `build_risk_model` refuses.
    """
    import qlib

    from qlib_ext.portfolio.risk_model import bias_table, build_risk_model, signal_days

    named = {}
    for text in extra:
        name, equals, path = text.partition("=")
        if not equals or not name or not path:
            raise ValueError(f"`extra` must be NAME=FILE.parquet, got {text!r}.")
        named[name] = path
    qlib.init(provider_uri=str(store), region="cn", logging_level=logging.INFO)
    model = build_risk_model(
        out, start, end, frequency=frequency, extra=named, overwrite=overwrite
    )
    folders = sorted(p.name for p in Path(out).iterdir() if p.name.isdigit())
    lines = [f"{out}: {len(folders)} days, {folders[0]} to {folders[-1]}"]
    lines.append(f"factors: {', '.join(model.names)}")
    weeks = signal_days(model.inputs.days)
    weeks = weeks[weeks.strftime("%Y%m%d").isin(folders)]
    table = bias_table(model, weeks)
    lines += [
        "bias statistic of weekly returns (1: right, above: risk was underestimated):"
    ]
    lines += [
        f"  {kind:<8}{row['bias']:.2f}  (95 % band {row['low']:.2f} to "
        f"{row['high']:.2f}, {row['portfolios']:.0f} portfolios, "
        f"{row['periods']:.0f} weeks)"
        for kind, row in table.iterrows()
    ]
    return "\n".join(lines)
