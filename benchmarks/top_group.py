"""Where the top group's return comes from: the scores that real_day.py kept.

python benchmarks/top_group.py [--universe NAME] [--models A B ...] [--seeds N]
                               [--store DIR] [--runs DIR] [--quick] [--json FILE]

For every run whose scores are in --runs, the best of 20 groups (10 where there are
fewer than 300 stocks) at each week's end, orders filled at the next close, t+1:

unfillable     share of its stocks at the upper limit, or suspended, at the fill
day 1, 2-5,    return of its fillable stocks minus that of all fillable stocks, basis
6-10           points, over that many days after the fill, mean over weeks. A weekly
               group earns days 1 to 5; the 10-day label weighs all days alike
t of day 1     its mean over its standard error, weeks taken as independent
ret_5, ret_20, rank correlation of the score with the return of the last 5 and 20 days
vol_20         and the standard deviation of the last 20 daily returns, mean over weeks
day 1 less     day 1 again after regressing the score's rank, each day, on the ranks of
styles         the returns of 1, 5, 20 and 60 days and of vol_20

Test period and universe as real_day.py says; no costs; mean ± std over seeds. With
--quick the first seed only.
"""

from __future__ import annotations

from pathlib import Path

import pandas as pd
import torch
from harness import environment, mean_and_spread, parser, show
from real_day import NAMES, UNIVERSES, file_name, open_store

from data_handlers.cross_section import neutralize
from qlib_ext.metrics import assign_layers, cs_rank, forward_fill, rank_ic, week_ends
from qlib_ext.report.market_data import load_bars, price_limits
from qlib_ext.report.tables import panel_of

SPANS = {"day 1": (0, 1), "days 2-5": (1, 5), "days 6-10": (5, 10)}
RETURNS = (1, 5, 20, 60)


def look(score: pd.Series) -> dict[str, float]:
    """See the module's docstring."""
    bars = load_bars(score)
    limits = price_limits(bars)
    assert limits is not None
    weeks = week_ends(bars.days)
    weeks = weeks[weeks + 11 < len(bars.days)]
    fill, row = weeks + 1, weeks + bars.scored.start
    x = panel_of(score, bars.days, bars.instruments).double()[weeks]
    pool = torch.isfinite(x)
    close = bars.fields["close"].double()
    held = forward_fill(close)
    daily = torch.full_like(close, torch.nan)
    daily[1:] = close[1:] / held[:-1] - 1
    fillable = limits[0][fill] & torch.isfinite(close[bars.scored][fill])

    def rank(value: torch.Tensor) -> torch.Tensor:
        ranked = cs_rank(torch.where(pool, value, torch.nan)).double()
        return ranked / pool.sum(1, keepdim=True) - 0.5

    styles = {f"ret_{k}": close[row] / held[row - k] - 1 for k in RETURNS}
    # A suspended day is a day without movement.
    windows = [daily[r - 19 : r + 1].nan_to_num(0.0).std(0) for r in row.tolist()]
    styles["vol_20"] = torch.stack(windows)
    ranks = torch.stack([rank(v) for v in styles.values()], dim=-1)

    def top_of(values: torch.Tensor) -> torch.Tensor:
        groups = 20 if x.shape[1] >= 300 else 10
        return assign_layers(values, groups) == groups - 1

    def excess(values: torch.Tensor, span: tuple[int, int]) -> torch.Tensor:
        price = held[bars.scored]
        forward = price[fill + span[1]] / price[fill + span[0]] - 1
        everyone = torch.where(pool & fillable, forward, torch.nan).nanmean(1)
        ours = torch.where(top_of(values) & fillable, forward, torch.nan)
        return ours.nanmean(1) - everyone

    residual = neutralize(rank(x).unsqueeze(-1).numpy(), styles=ranks.numpy())
    first = excess(x, SPANS["day 1"])
    out = {"unfillable %": 100 * float((~fillable)[top_of(x)].double().mean())}
    for name, span in SPANS.items():
        out[f"{name} bp"] = 1e4 * float(excess(x, span).nanmean())
    weeks_known = torch.isfinite(first).sum().sqrt()
    spread = first[torch.isfinite(first)].std()
    out["t of day 1"] = float(first.nanmean() / spread * weeks_known)
    for name in ("ret_5", "ret_20", "vol_20"):
        out[name] = float(rank_ic(x, styles[name]).nanmean())
    less = excess(torch.from_numpy(residual[..., 0]), SPANS["day 1"])
    out["day 1 less styles bp"] = 1e4 * float(less.nanmean())
    return out


def main() -> None:
    p = parser(__doc__)
    p.add_argument("--universe", default="cn_1000", choices=list(UNIVERSES))
    p.add_argument("--models", nargs="*", choices=NAMES, default=NAMES)
    p.add_argument("--seeds", type=int, default=3)
    p.add_argument("--store", help="a Qlib store; built from $QLIB_EXT_DATA if absent")
    p.add_argument("--runs", help="where real_day.py kept the scores")
    args = p.parse_args()
    env = environment(args.threads)
    open_store(args.universe, args.store or f"data/{args.universe}")
    runs = Path(args.runs or f"runs/{args.universe}")
    rows: list[dict] = []
    for name in args.models:
        found = []
        for seed in range(1 if args.quick else args.seeds):
            file = runs / file_name(name, seed, ".parquet")
            if file.exists():
                frame = pd.read_parquet(file).set_index(["datetime", "instrument"])
                found.append(look(frame["score"]))
        if not found:
            continue
        row: dict = {"model": name, "seeds": len(found)}
        for key, values in pd.DataFrame(found).items():
            row[str(key)] = mean_and_spread(values)
        rows.append(row)
    if not rows:
        raise SystemExit(f"{runs} holds no scores; run benchmarks/real_day.py first.")
    test = " to ".join(UNIVERSES[args.universe][3])
    show(f"{args.universe}: top group, {test}", rows, env, args.json)


if __name__ == "__main__":
    main()
