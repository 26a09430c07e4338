"""What the command `mine` does: from a store to a file of expressions."""

from __future__ import annotations

import shutil
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from data_handlers.arguments import parse_range
from data_handlers.fields import known_fields
from data_handlers.files import write_text
from qlib_ext.mining.evolve import MineConfig, Miner
from qlib_ext.mining.panel import mining_panel
from qlib_ext.mining.result import build_result, page_of, text_of, write_result

__all__ = ["FIELDS", "GROUP", "default_fields", "mine", "work_folder"]

#: Fields taken by default, where the store has them.
FIELDS = ("open", "high", "low", "close", "vwap", "volume", "amount", "turnover")

#: Field of a stock's industry, a number.
GROUP = "industry"


def default_fields(universe: Any, start: Any, end: Any) -> tuple[str, ...]:
    """Those of `FIELDS` that the store has values of."""
    known = set(known_fields(list(FIELDS), universe, start, end))
    return tuple(f for f in FIELDS if f in known)


def work_folder(out: Path) -> Path:
    """Folder of the finished generations of a search, beside its result."""
    return out.with_name(out.stem + ".mining")


def mine(
    store: str | Path,
    out: Path,
    train: str,
    holdout: str | None,
    budget: int,
    *,
    minutes: float | None = None,
    universe: str = "all",
    fields: Sequence[str] = (),
    horizon: int = 10,
    price: str = "close",
    cross: bool = False,
    fresh: bool = False,
    page: Path | None = None,
    cache_mib: float = 512.0,
    progress: bool = True,
    init: bool = True,
    **search: Any,
) -> str:
    """Search on `train`, test on `holdout`, write `out`; return the terminal report.

    Parameters
    ----------
    store : str or Path
        Qlib day store.
    out : Path
        YAML file. Finished generations are kept beside it, in ``<name>.mining``.
    train, holdout : str
        Ranges, see `arguments.parse_range`; the holdout lies after the training years.
    budget : int
        Expressions evaluated.
    minutes : float, optional
        Stop earlier; a later call goes on.
    universe : str
        Market whose members count, day by day.
    fields : sequence of str
        Default: those of `FIELDS` that the store has.
    horizon, price : int, str
        Label.
    cross : bool, default False
        Compare the members of a day too, also within `GROUP` if the store has it.
    fresh : bool
        Forget finished generations.
    page : Path, optional
        HTML report; default beside `out`.
    cache_mib, progress : float, bool
    init : bool
        Initialise Qlib on `store`; False where the caller has done so.
    **search
        Further fields of `MineConfig`.

    Raises
    ------
    ValueError
        See `parse_range`, `mining_panel`, `MineConfig`, `Grammar` and `Miner`; or if
        the holdout begins before the training years end, or there is no store.
    """
    import qlib
    from tqdm import tqdm

    first, last = parse_range(train, "train")
    test = None if holdout is None else parse_range(holdout, "holdout")
    if test is not None and test[0] <= last:
        raise ValueError(
            f"`holdout` must begin after the training years, got {holdout!r} after "
            f"{train!r}."
        )
    if not (Path(store) / "calendars").is_dir():
        raise ValueError(f"`store`: {store} is no Qlib store, it has no calendars/.")
    if init:
        qlib.init(provider_uri=str(store), region="cn", kernels=1, logging_level=40)
    names = tuple(f.removeprefix("$") for f in fields)
    names = names or default_fields(universe, first, last)
    group = None
    if cross and known_fields([GROUP], universe, first, last):
        group = GROUP
    read = [*names, *([group] if group else [])]
    config = MineConfig(fields=names, cross=cross, group=group, **search)
    label: dict[str, Any] = {"horizon": horizon, "price": price, "cross": cross}
    panel = mining_panel(
        read, universe, first, last, look_back=config.max_look_back, **label
    )
    held = None
    if test is not None:
        # Before the search: a holdout that does not exist should not cost hours.
        held = mining_panel(
            read, universe, *test, look_back=config.max_look_back, **label
        )
    work = work_folder(out)
    if fresh and (work / "search.json").is_file():
        shutil.rmtree(work)
    miner = Miner(panel, config, work, cache_mib)
    with tqdm(total=budget, unit="expr", disable=None if progress else True) as bar:

        def advance(tries: int, pool: int) -> None:
            bar.update(min(tries, budget) - bar.n)
            bar.set_postfix(mined=pool)

        mined = miner.run(budget, minutes, advance)
    provenance = {
        "store": str(store),
        "universe": universe,
        "stocks": len(panel.instruments),
        "train": f"{first.date()}:{last.date()}",
        "holdout": None if test is None else f"{test[0].date()}:{test[1].date()}",
        "label": f"{horizon}-day return from the {price} of t+1",
        "dates": len(panel.dates),
        "data": panel.checksum,
        **{
            k: list(v) if isinstance(v, tuple) else v for k, v in asdict(config).items()
        },
    }
    result = build_result(mined, provenance, held, config.block)
    write_result(result, out)
    page = out.with_suffix(".html") if page is None else page
    write_text(page, page_of(result).render("Research, not advice."))
    return "\n".join(
        [
            text_of(result),
            "",
            f"Expressions: {out.resolve()}",
            f"Report: {page.resolve()}",
        ]
    )
