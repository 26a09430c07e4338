"""The only training loop: day batches, early stop on RankIC, seeds, resume.

Glossary: t days of the panel, n instruments of the batch, f features, l look-back days,
c scored days of a batch, d hidden width, q labels, r risk columns.

Two modes share every line. In `windows` a batch is one day: the network reads the `l`
days up to it from a zero state. In `stream` a batch is `c` consecutive days:
the network reads `l - 1` warm-up days and then the scored days in one pass, so that a
sample costs (l + c - 1) / c steps instead of l; when predicting, the state is carried
from the first day of the panel on.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from typing import Annotated, Any, Literal

import numpy as np
import pandas as pd
import torch
from annotated_types import Ge
from qlib.data.dataset import DatasetH
from qlib.log import get_module_logger
from qlib.model.base import Model
from torch import nn
from torch.optim.swa_utils import AveragedModel
from torch.utils.checkpoint import checkpoint
from tqdm.auto import tqdm

from data_handlers.arguments import (
    Count,
    NamedArguments,
    Names,
    NonNegative,
    Positive,
    Share,
    Text,
    Whole,
)
from data_handlers.segments import check_segments, check_spans
from qlib_ext.dataset import (
    Panel,
    PanelDataset,
    handler_label_reach,
    segment_dates,
    step_len_of,
)
from qlib_ext.metrics import rank_ic
from qlib_ext.models.batches import (
    WATCHERS,
    Batch,
    Draw,
    Epoch,
    Network,
    Progress,
    Stream,
    cpu_state,
    descend,
    few_threads,
    for_all,
    memory_kept,
    watch_epochs,
)
from qlib_ext.models.checkpoints import Checkpoints
from qlib_ext.models.description import described
from qlib_ext.models.tilt import StyleTilt
from qlib_ext.nn.cross_section import standardize
from qlib_ext.recorders import active_recorder, metric_name

__all__ = [
    "Batch",
    "Draw",
    "Epoch",
    "Network",
    "Progress",
    "TorchModel",
    "cpu_state",
    "descend",
    "watch_epochs",
]

logger = get_module_logger("qlib_ext.models")

# Share of a device's free memory that a panel may take; activations need the rest.
_RESIDENT = 0.5
# Batches between two looks at the losses of a GPU.
_LOOK = 50
_PART = 300  # stocks of a batch that `stock_parts` 0 leaves
# Stock-days encoded at a time when predicting in a stream: bounds the activations.
_STREAM_ROWS = 32_768


class TorchModel(NamedArguments, Model):
    """Qlib model around a `Network`: fit, predict, seeds, early stop, resume.

    Subclasses define `build_network(d_feat)`, and `loss` if it is not the mean squared
    error; their constructors hand what is named here on through ``**training``.

    Parameters
    ----------
    d_feat : int, optional
        Features a day; by default what the data has. With a flat `DatasetH` such as
        Alpha360, whose columns are whole windows, it must be given: 6.
    step_len : int, default 60
        Look-back `l` in trading days; a `TSDatasetH` overrides it by its own.
    mode : {"stream", "windows"}, optional
        "windows" is the reports' protocol; "stream" is several times faster and the
        default, unless the encoder needs the whole window (attention over it, both
        directions): then it is "windows", and the log says so.
    chunk : int, default 20
        Consecutive days `c` of a batch in `stream` mode.
    day_stride : int, default 1
        In `windows` mode an epoch takes every `day_stride`-th training day, from a
        random one on: labels of neighbouring days overlap and add little. 1 in
        `stream` mode.
    stock_parts : int, default 1
        The stocks are split at random, anew each epoch, into so many batches a chunk:
        ``chunk: 80`` with ``stock_parts: 4`` makes as many steps as ``chunk: 20``, but
        a sample costs (l + 79)/80 passes instead of (l + 19)/20. 0 takes four, and in
        larger markets as many as leave each some 300 stocks, for which fewer epochs are
        enough. For models that look at a stock by itself.
    n_epochs, early_stop : int, default 200, 20
        Most epochs, and epochs without a better validation RankIC before training ends.
    stop_on : {"raw", "residual"}, default "raw"
        Validation RankIC that decides on the best epoch: of the score, or of what is
        left of it net of industries and styles.
    ema : float, default 0.0
        Decay, step by step, of the moving average of the weights that is validated,
        kept and predicts; 0 takes the weights as they are. Averaging removes the jumps
        from epoch to epoch (docs/results.md).
    best_epochs : int, default 1
        How many of the best epochs on validation give the weights, by their mean.
        Several make seeds a little more alike than the best alone (docs/results.md).
    tilt : float, optional
        Makes the styles in the score a decision: its part along industries and styles
        is replaced by `tilt` times the style part that the training years paid; 0
        leaves the residual. See `qlib_ext.models.tilt`. Needs a `risk` group.
    tilt_styles : list of str, optional
        Styles that may be in that part; all by default.
    lr : float, default 0.001
        Adam's learning rate.
    clip_value : float, default 3.0
        Every gradient entry is clipped to this size; 0 is off.
    n_seeds, seed : int, default 1, 0
        Networks trained, with seeds `seed`, `seed` + 1, …; scores are averaged after
        standardising each over the day (as they are where `compares` is "time").
    label : str, optional
        Label column to learn; by default the first.
    GPU : int, default 0
        CUDA device if there is one; -1 is the CPU.
    amp : bool, default True
        On CUDA bfloat16 autocast, and the features of a panel that is kept there in
        bfloat16; without effect on the CPU.
    block_size : int, default 0
        Stocks encoded at a time in training; 0 is all. Each block's activations are
        recomputed in the backward pass, which bounds memory at a third more time.
    checkpoint_dir : str, optional
        Where each epoch is saved, so that a killed `fit` with equal arguments and data
        goes on where it was. Emptied when training ends.

    Raises
    ------
    ValueError
        On any argument out of range, naming it.
    """

    def __init__(
        self,
        *,
        d_feat: Count | None = None,
        step_len: Count = 60,
        mode: Literal["stream", "windows"] | None = None,
        chunk: Count = 20,
        day_stride: Count = 1,
        stock_parts: Whole = 1,
        n_epochs: Count = 200,
        early_stop: Count = 20,
        stop_on: Literal["raw", "residual"] = "raw",
        ema: Share = 0.0,
        best_epochs: Count = 1,
        tilt: NonNegative | None = None,
        tilt_styles: Names | None = None,
        lr: Positive = 0.001,
        clip_value: NonNegative = 3.0,
        n_seeds: Count = 1,
        seed: Whole = 0,
        label: Text | None = None,
        GPU: Annotated[int, Ge(-1)] = 0,
        amp: bool = True,
        block_size: Whole = 0,
        checkpoint_dir: Text | None = None,
    ) -> None:
        # CPU kernels slow down twentyfold on the subnormal floats that back-propagation
        # through 60 steps makes. Worker threads inherit the flag only if they start
        # after it is set, hence here and not in `fit`.
        torch.set_flush_denormal(True)
        if mode == "stream" and not self.streams:
            raise ValueError(
                "`mode` is 'stream', but this encoder reads a whole window for each "
                "day: set it to 'windows', or leave it out."
            )
        if mode is None:
            self.mode = mode = "stream" if self.streams else "windows"
            if not self.streams:
                logger.info(
                    f"{type(self).__name__}: the encoder reads a whole window for each "
                    "day, so `mode` is 'windows'"
                )
        if mode == "stream" and day_stride != 1:
            raise ValueError(
                f"`day_stride` must be 1 with `mode: stream`, whose batches are runs "
                f"of days, got {day_stride}."
            )
        if tilt_styles is not None and tilt is None:
            raise ValueError(
                f"`tilt_styles` is {tilt_styles!r}, but there is no `tilt`: give the "
                "weight of the style part, such as 1."
            )
        if ema == 1:
            raise ValueError("`ema` must be less than 1, which would never move.")
        # Learnt, on the CPU: one state per seed, and the width they were built for.
        self.states_: list[dict[str, torch.Tensor]] = []
        self.d_feat_ = 0
        self.step_len_ = 0
        self.history_: list[list[dict[str, float]]] = []
        self.style_weights_: dict[str, float] = {}

    # ---- for subclasses ------------------------------------------------------------

    # Of the data it was fitted on, in the order of the network's inputs.
    feature_names_: tuple[str, ...] = ()

    # What a score compares with: the other instruments' of its day, or, for timing, the
    # same instrument's on other days. Then nothing is standardised over the day, and
    # validation measures each instrument's correlation over time.
    compares: Literal["day", "time"] = "day"

    # A panel, where and how it is kept, and its copy there.
    _resident: tuple[Panel, tuple[torch.device, bool], Panel] | None = None

    # Begins the names of logged metrics: tells the sub-models of an ensemble apart.
    _log_prefix = ""

    def build_network(self, d_feat: int) -> Network:
        """Make an untrained network for `d_feat` features a day."""
        raise NotImplementedError

    def loss(
        self, out: dict[str, torch.Tensor], batch: Batch
    ) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
        """Scalar to minimise, and named parts of it to log (detached)."""
        raise NotImplementedError

    def forget(self) -> None:
        """Drop what an earlier `fit` has learnt, beside the networks."""

    def on_panel(self, panel: Panel) -> None:
        """Look at the data before training or prediction; build graphs, say."""

    @property
    def streams(self) -> bool:
        """Whether the encoder can go on from a state, as `mode: stream` needs."""
        return True

    def day_inputs(self, panel: Panel, days: slice) -> torch.Tensor | None:
        """Columns [l, n, k] of all instruments that follow the features into `encoder`.

        A model whose encoder looks across the stocks of a day says here what it needs
        to know of them, of that day or earlier ones. A batch then holds all stocks that
        are present on any of its days, not on the scored ones alone.
        """
        return None

    def training_days(self, panel: Panel, days: np.ndarray) -> np.ndarray:
        """Choose among the days [c] of segment `train`; cross-validation leaves out."""
        return days

    def rebuild_network(self, state: dict[str, torch.Tensor]) -> Network:
        """Make the trained network of one of `states_`, on the CPU, for prediction."""
        network = self.build_network(self.d_feat_)
        network.load_state_dict(state)
        return network.eval()

    def optimiser(self, network: nn.Module) -> torch.optim.Optimizer:
        """Make the optimiser that trains a network."""
        return torch.optim.Adam(network.parameters(), lr=self.lr)

    def _streams(self) -> list[Stream]:
        """Make what `infer` goes on from, one a seed; it leaves the end there."""
        return [Stream() for _ in self.states_]

    # ---- Qlib's interface ----------------------------------------------------------

    @described
    def fit(
        self,
        dataset: DatasetH,
        evals_result: dict | None = None,
        reweighter: Any = None,
    ) -> None:
        """Train on segment `train`, stop early on `valid`.

        Parameters
        ----------
        dataset : PanelDataset, TSDatasetH or DatasetH
        evals_result : dict, optional
            Filled with the history: one list of {metric: value} per seed.
        reweighter : None
            Not supported.

        Raises
        ------
        ValueError
            On a missing segment or label, a fit window over `valid` or `test`, or a
            loss that is not finite.
        """
        check_fit(dataset, reweighter)
        self.forget()
        panel = Panel.from_dataset(dataset)
        _check_segments(dataset, panel)
        self.step_len_ = step_len_of(dataset) or self.step_len
        self.d_feat_ = self._width(panel)
        self.feature_names_ = tuple(panel.feature_names)
        label = panel.label_index(self.label)
        train = self.training_days(panel, panel.days(dataset.segments["train"]))
        valid = panel.days(dataset.segments["valid"])
        for name, days, values in (
            ("train", train, panel.labels),
            ("valid", valid, panel.raw_labels),
        ):
            if not torch.isfinite(values[days][..., label]).any():
                raise ValueError(
                    f"segment `{name}` {dataset.segments[name]} has no label "
                    f"{panel.label_names[label]!r}: it is empty, or the horizon "
                    "reaches beyond the data. End the segment earlier."
                )
        self.on_panel(panel)
        styles = self._styles(panel)
        if styles is not None and self.tilt is not None:
            self.style_weights_ = styles.learn(train, panel.raw_labels[..., label])
        device = self.device
        self.states_, self.history_ = [], []
        few = few_threads(self.build_network(self.d_feat_), device)
        with few, memory_kept(), Checkpoints(self, panel, dataset.segments) as store:
            logger.info(
                f"{type(self).__name__}: {len(train)} training and {len(valid)} "
                f"validation days, {self.n_seeds} seed(s), mode {self.mode}, device "
                f"{device}, {torch.get_num_threads()} thread(s)"
            )
            for seed in range(self.seed, self.seed + self.n_seeds):
                state, history = self._fit_seed(
                    seed, panel, train, valid, store, device
                )
                self.states_.append(state)
                self.history_.append(history)
        if evals_result is not None:
            evals_result["seeds"] = self.history_

    def predict(
        self, dataset: DatasetH, segment: str | slice | tuple = "test"
    ) -> pd.Series:
        """Score of every instrument present on every day of a segment.

        Parameters
        ----------
        dataset : PanelDataset, TSDatasetH or DatasetH
        segment : str or slice or (start, end)

        Returns
        -------
        Series
            `score` by (datetime, instrument): the average over seeds of scores
            standardised over the day. Labels play no part, so the last day of the store
            is scored like any other.
        """
        out, panel, days = self.infer(dataset, segment, ("score",))
        score = self._mean_score(out, panel, days)
        if self.tilt is not None:
            score = self._parts(score, panel, days)["score"]
        score = panel.series(score, days, ["score"])["score"]
        if len(panel.instruments) > 1 and not score.any():
            logger.warning(
                f"{type(self).__name__}: constant scores on {len(days)} of {len(days)} "
                "days: there is no ranking in them."
            )
        return score

    def predict_parts(
        self, dataset: DatasetH, segment: str | slice | tuple = "test"
    ) -> pd.DataFrame:
        """Score of a segment and what it is made of; needs `tilt`.

        Returns
        -------
        DataFrame
            Rows (datetime, instrument), columns `score` as `predict` gives it,
            `learnt` as the network gives it, `residual` of it net of industries and
            styles, and `style`, the part that `tilt` weighs; each standardised over the
            day.
        """
        if self.tilt is None:
            raise ValueError("`tilt` is not set: the score is in one part.")
        return self._part_frame(*self.infer(dataset, segment, ("score",)))

    def _part_frame(self, out, panel, days) -> pd.DataFrame:
        parts = self._parts(self._mean_score(out, panel, days), panel, days)
        return panel.series(torch.cat(list(parts.values()), -1), days, list(parts))

    def _styles(self, panel: Panel) -> StyleTilt | None:
        """Styles of the panel, if an option needs them."""
        if self.tilt is None and self.stop_on == "raw":
            return None
        return StyleTilt.of(panel, self.tilt_styles)

    def _parts(self, score, panel, days) -> dict[str, torch.Tensor]:
        """Parts [c, n, 1] of a score [c, n, 1]."""
        styles = self._styles(panel)
        assert styles is not None and self.tilt is not None
        residual = styles.residual(score, days)
        style = styles.paid(self.style_weights_, days)
        mixed = standardize(residual + self.tilt * style, panel.present[days])
        return {"score": mixed, "learnt": score, "residual": residual, "style": style}

    @property
    def reads_features_only(self) -> bool:
        """Whether a score needs nothing but the features of its own stock and day's.

        Then `advance` may be given days one by one; a model with graphs or exposures
        needs their history as well.
        """
        return False

    def advance(
        self, panel: Panel, carried: list[Any] | None = None
    ) -> tuple[pd.Series, list[Any]]:
        """Score a panel's last day, going on from the day before its first.

        Parameters
        ----------
        panel : Panel
            In `stream` mode the days since the state was taken, for the same
            instruments in the same order; in `windows` mode the look-back.
        carried : list, optional
            State of the encoder after the day before, one a seed (`stream` only).
            None begins a stream.

        Returns
        -------
        Series
            `score`, as `predict` gives it.
        list
            State after the panel's last day, one a seed; None in `windows` mode.

        Raises
        ------
        ValueError
            If the model is not fitted or reads more than features.
        """
        if not self.states_:
            raise ValueError("the model is not fitted; call `fit` first.")
        if not self.reads_features_only:
            raise ValueError(
                f"{type(self).__name__} reads more than features; use `predict`."
            )
        panel = self._named(panel)
        self.on_panel(panel)
        device, days = self.device, np.array([len(panel.dates) - 1])
        outputs, after = [], []
        for i, weights in enumerate(self.states_):
            network = self.rebuild_network(weights).to(device)
            stream = Stream(None if carried is None else carried[i])
            parts = self._forward(network, panel, days, ("score",), device, stream)
            outputs.append({"score": torch.cat([part["score"] for part in parts])})
            after.append(stream.state)
        score = self._mean_score(outputs, panel, days)
        return panel.series(score, days, ["score"])["score"], after

    # ---- shared by subclasses ------------------------------------------------------

    def _mean_score(
        self, out: list[dict[str, torch.Tensor]], panel: Panel, days: np.ndarray
    ) -> torch.Tensor:
        """Average the seeds' scores [c, n, 1], each over the day if it compares.

        A standard deviation of the segment would tell a day's score what comes later.
        """
        scores = [o["score"].unsqueeze(-1) for o in out]
        if self.compares == "day":
            scores = [standardize(score, panel.present[days]) for score in scores]
        return torch.stack(scores).mean(0)

    @property
    def device(self) -> torch.device:
        """Device chosen by `GPU`."""
        if self.GPU < 0:
            return torch.device("cpu")
        if not torch.cuda.is_available():
            logger.info("no CUDA device: computing on the CPU")
            return torch.device("cpu")
        if self.GPU >= torch.cuda.device_count():
            raise ValueError(
                f"`GPU` is {self.GPU}, but there are {torch.cuda.device_count()} CUDA "
                "devices, numbered from 0; -1 is the CPU."
            )
        return torch.device("cuda", self.GPU)

    # ---- training ------------------------------------------------------------------

    def _fit_seed(self, seed, panel, train, valid, store, device):
        def begin():
            torch.manual_seed(seed)
            network = self.build_network(self.d_feat_).to(device)
            optimiser = self.optimiser(network)
            average = AveragedModel(network, avg_fn=self._average) if self.ema else None
            return network, optimiser, average

        measure = "valid_rank_ic"
        if self.stop_on == "residual":
            measure += "_residual"
        network, optimiser, average = begin()
        progress = Progress(measure, keep=self.best_epochs)

        def take(saved):
            network.load_state_dict(saved["network"])
            optimiser.load_state_dict(saved["optimiser"])
            if average is not None:
                average.load_state_dict(saved["average"])
            progress.kept, progress.history = saved["kept"], saved["history"]

        if store.load(f"seed{seed}", take):
            self._log_history(seed, progress.history)
            logger.info(f"seed {seed}: going on after epoch {len(progress.history)}")
        else:
            # A foreign state may have been half read.
            network, optimiser, average = begin()
            progress = Progress(measure, keep=self.best_epochs)
        bar = tqdm(
            progress.epochs(self.n_epochs, self.early_stop),
            desc=f"seed {seed}",
            initial=len(progress.history),
            total=self.n_epochs,
            unit="epoch",
            disable=None,
        )
        for number in bar:
            # One stream of random numbers an epoch: a resumed run repeats it exactly.
            torch.manual_seed(_epoch_seed(seed, number))
            epoch = self._epoch(network, panel, train, device, seed, number)
            for watch in WATCHERS:
                watch(epoch)
            row = self._train_epoch(epoch, optimiser, average)
            kept = network if average is None else average.module
            row |= self._valid(kept, panel, valid, device)
            progress.add(row, kept)
            store.save(
                f"seed{seed}",
                {
                    "network": cpu_state(network),
                    "optimiser": optimiser.state_dict(),
                    "average": None if average is None else cpu_state(average),
                    "kept": progress.kept,
                    "history": progress.history,
                },
            )
            self._log_history(seed, [row], number)
            bar.set_postfix({k: f"{v:.4f}" for k, v in row.items()})
            logger.info(
                f"seed {seed} epoch {number}: "
                + ", ".join(f"{k} {v:.4f}" for k, v in row.items())
            )
        bar.close()
        logger.info(
            f"seed {seed}: best epoch {progress.best_epoch}, validation RankIC "
            f"{progress.best_value:.4f}"
        )
        if len(progress.kept) > 1:
            network.load_state_dict(progress.best)
            row = self._valid(network, panel, valid, device)
            self._log_history(seed, [row], prefix="mean_of_best_")
            logger.info(
                f"seed {seed}: mean of epochs {', '.join(map(str, progress.kept))}: "
                + ", ".join(f"{k} {v:.4f}" for k, v in row.items())
            )
        return progress.best, progress.history

    def _log_history(
        self, seed: int, rows: list[dict], first: int = 0, prefix: str = ""
    ) -> None:
        """Log epochs to the active recorder, if `qrun` or the user started one."""
        recorder = active_recorder()
        if recorder is None:
            return
        for epoch, row in enumerate(rows, first):
            named = {
                metric_name(f"{self._log_prefix}{prefix}seed{seed}_{k}"): v
                for k, v in row.items()
            }
            recorder.log_metrics(step=epoch, **named)

    def _epoch(self, network, panel, train, device, seed, number) -> Epoch:
        generator = np.random.default_rng([seed, number])
        batches = self._batches(train, generator, len(panel.instruments))
        return Epoch(self, network, panel, number, batches, device)

    def _average(self, mean, new, steps):
        # The first steps weigh alike, so that the average does not start from chance.
        return mean + (1 - min(self.ema, (1 + steps) / (10 + steps))) * (new - mean)

    def _train_epoch(self, epoch: Epoch, optimiser, average=None) -> dict[str, float]:
        epoch.network.train()
        seen = 0
        sums: dict[str, Any] = {"loss": 0.0}
        waiting: list[tuple[np.ndarray, torch.Tensor]] = []
        # A look at a loss waits for the GPU.
        together = 1 if epoch.device.type == "cpu" else _LOOK
        for draw in tqdm(
            epoch.batches,
            desc=f"epoch {epoch.number}",
            unit="batch",
            leave=False,
            disable=None,
        ):
            batch = epoch.batch(draw)
            with self._autocast(epoch.device):
                h = epoch.hidden(batch)
                loss, parts = self.loss(epoch.network.head(h, batch), batch)
            waiting.append((draw.days, loss.detach()))
            if len(waiting) == together:
                self._check_losses(epoch, waiting)
                waiting.clear()
            descend(loss, optimiser, self.clip_value)
            if average is not None:
                average.update_parameters(epoch.network)
            for name, value in {"loss": loss.detach(), **parts}.items():
                value = torch.as_tensor(value).detach().double() * len(draw.days)
                sums[name] = sums.get(name, 0.0) + value
            seen += len(draw.days)
        self._check_losses(epoch, waiting)
        return {f"train_{k}": float(v) / seen for k, v in sums.items()}

    def _check_losses(self, epoch: Epoch, losses: list) -> None:
        """Raise for the first of some batches' (days, loss) that is not finite."""
        for days, loss in losses:
            if not torch.isfinite(loss):
                first, last = epoch.panel.dates[days[[0, -1]]]
                raise ValueError(
                    f"the loss is {loss.item()} at epoch {epoch.number}, days "
                    f"{first:%Y-%m-%d} to {last:%Y-%m-%d}: lower `lr` ({self.lr}), or "
                    "look for extreme features there."
                )

    def _batches(self, days: np.ndarray, generator, stocks: int = 0) -> list[Draw]:
        """Shuffle an epoch's batches; chunk borders move from epoch to epoch."""
        if self.mode == "windows":
            chosen = days[int(generator.integers(self.day_stride)) :: self.day_stride]
            runs = np.split(chosen, len(chosen))
        else:
            offset = int(generator.integers(self.chunk))
            borders = np.arange(offset, len(days), self.chunk)
            gaps = np.flatnonzero(np.diff(days) > 1) + 1  # a batch is consecutive days
            runs = [p for p in np.split(days, np.union1d(borders, gaps)) if len(p)]
        draws = [Draw(run) for run in runs]
        parts = self.stock_parts or max(4, stocks // _PART)
        if parts > 1:
            draws = [
                Draw(run, np.sort(part))
                for run in runs
                for part in np.array_split(generator.permutation(stocks), parts)
            ]
        return [draws[i] for i in generator.permutation(len(draws))]

    def _batch(self, panel: Panel, days: np.ndarray, device, among=None) -> Batch:
        read = slice(max(0, days[0] - self.step_len_ + 1), days[-1] + 1)
        more = self.day_inputs(panel, read)
        there = panel.present[days if more is None else read].any(0)
        if among is not None:
            chosen = torch.zeros_like(there)
            chosen[among] = True
            there &= chosen
        stocks = torch.nonzero(there).squeeze(-1)
        if len(stocks) == 0:
            stocks = torch.zeros(1, dtype=torch.long)  # a masked row keeps shapes alive
        near = self._near(panel, device)
        at = stocks.to(near.features.device)
        if self._flat(panel):
            x = _unflatten(near.features[days[0], at].float(), self.d_feat_)
        else:
            x = near.features[read].index_select(1, at).float()
        if more is not None:
            x = torch.cat([x, more.index_select(1, stocks).to(x.device)], dim=-1)

        def of_days(values):
            return values[days].index_select(1, at).to(device)

        return Batch(
            days=days,
            stocks=stocks.numpy(),
            x=x.to(device),
            mask=of_days(near.present),
            label=of_days(near.labels),
            raw_label=of_days(near.raw_labels),
            risk=None if near.risk is None else of_days(near.risk),
            panel=panel,
        )

    def _near(self, panel: Panel, device: torch.device) -> Panel:
        """Panel in the device's memory if it fits: no batch is copied from the host."""
        if device.type == "cpu":
            return panel
        kept, how = self._resident, (device, self.amp)
        if kept is None or kept[0] is not panel or kept[1] != how:
            kept = self._resident = None  # frees the former one
            free = torch.cuda.mem_get_info(device)[0]
            near, words = panel.near(device, free * _RESIDENT, half=self.amp)
            logger.info(f"{device} has {free / 2**30:.2f} GiB free: {words}")
            kept = self._resident = panel, how, near
        return kept[2]

    def _encode(self, network: Network, x: torch.Tensor, last: int) -> torch.Tensor:
        """Hidden states of the `last` days, encoding stocks block by block."""

        def encode(block):
            # Sliced in here, so that warm-up days of all blocks never pile up.
            return network.encoder(block)[0][-last:]

        if not self.block_size or x.shape[1] <= self.block_size:
            return encode(x)
        blocks = x.split(self.block_size, dim=1)
        return torch.cat(
            [checkpoint(encode, block, use_reentrant=False) for block in blocks], dim=1
        )

    def _valid(self, network, panel, days, device) -> dict[str, float]:
        """Measure an epoch: RankIC of its score, and of the residual if wanted.

        A stream begins a look-back before the segment, as in training: walking from
        the panel's first day would cost each epoch a pass over the training years.
        """
        label = panel.label_index(self.label)
        first = max(0, int(days[0]) - self.step_len_ + 1)
        score = torch.cat(
            [
                out["score"]
                for out in self._forward(
                    network, panel, days, ("score",), device, first=first
                )
            ]
        )
        truth = panel.raw_labels[days][..., label]
        styles = self._styles(panel)
        row = {}
        if styles is not None:
            residual = styles.residual(score.unsqueeze(-1), days).squeeze(-1)
            residual = torch.where(panel.present[days], residual, float("nan"))
            row["valid_rank_ic_residual"] = float(rank_ic(residual, truth).nanmean())
        score = torch.where(panel.present[days], score, float("nan"))
        if self.compares == "time":
            score, truth = score.T, truth.T
        value = float(rank_ic(score, truth).nanmean())
        if np.isnan(value) and self.compares == "time":
            raise ValueError(
                "validation RankIC is not defined for any instrument: its scores or "
                "labels over the days of `valid` are fewer than two, or all equal. "
                f"Lengthen the segment, and lower `lr` ({self.lr})."
            )
        if np.isnan(value):
            labelled = torch.isfinite(score) & torch.isfinite(truth)
            enough = int((labelled.sum(1) >= 2).sum())
            raise ValueError(
                "validation RankIC is not defined on any day: "
                + (
                    f"the scores of a day, or its labels, are all equal on {enough} of "
                    f"{enough} days. Look for features that do not vary over the "
                    f"day's stocks, and lower `lr` ({self.lr})."
                    if enough
                    else "every day has fewer than two labelled stocks. Check the "
                    "universe."
                )
            )
        return {"valid_rank_ic": value, **row}

    # ---- prediction ----------------------------------------------------------------

    def infer(
        self, dataset: DatasetH, segment: str | slice | tuple, keys: tuple[str, ...]
    ) -> tuple[list[dict[str, torch.Tensor]], Panel, np.ndarray]:
        """Compute outputs `keys` of every seed's network on a segment.

        Returns
        -------
        list of {key: Tensor [c, n, ...]}
            On the CPU; n are all instruments of the panel, 0 where absent.
        Panel
        int array [c]
            Positions of the segment's days.
        """
        if not self.states_:
            raise ValueError("the model is not fitted; call `fit` first.")
        span = segment_dates(dataset, segment)
        panel = Panel.from_dataset(dataset)
        if self._width(panel) != self.d_feat_:
            raise ValueError(
                f"the model was fitted with {self.d_feat_} features a day, the "
                f"data has {self._width(panel)}: {panel.feature_names}."
            )
        panel = self._named(panel)
        days = panel.days(span)
        if len(days) == 0:
            raise ValueError(
                f"`segment` {segment} holds no trading day of the data, which spans "
                f"{panel.dates[0]:%Y-%m-%d} to {panel.dates[-1]:%Y-%m-%d}."
            )
        self.on_panel(panel)
        device = self.device
        outputs = []
        for state, stream in zip(self.states_, self._streams(), strict=True):
            network = self.rebuild_network(state).to(device)
            # Filled in place: 64 units of a whole market are gigabytes, twice too many.
            made: dict[str, torch.Tensor] = {}
            at = 0
            for part in self._forward(network, panel, days, keys, device, stream):
                for key in keys:
                    if key not in made:
                        made[key] = part[key].new_empty(
                            (len(days), *part[key].shape[1:])
                        )
                    made[key][at : at + len(part[key])] = part[key]
                at += len(part[keys[0]])
            outputs.append(made)
        return outputs, panel, days

    @torch.no_grad()
    def _forward(
        self,
        network,
        panel,
        days,
        keys,
        device,
        stream: Stream | None = None,
        first: int = 0,
    ) -> Iterator[dict[str, torch.Tensor]]:
        """Yield outputs of consecutive days for all instruments, 0 where absent."""
        network.eval()
        if self.mode == "windows":
            walk = self._window_walk(network, panel, days, device)
        else:
            stream = stream or Stream()
            walk = self._stream_walk(network, panel, days, device, stream, first)
        for batch, h in walk:
            # In float32 whatever `amp` made of h: the head is cheap, ranks are not.
            yield for_all(network.head(h, batch), batch, keys)

    def _window_walk(self, network, panel, days, device):
        for day in days:
            batch = self._batch(panel, np.array([day]), device)
            with self._autocast(device):
                h = network.encoder(batch.x)[0][-1:]
            yield batch, h.float()

    def _stream_walk(self, network, panel, days, device, stream: Stream, begin):
        """Carry the state from day `begin` on.

        From the panel's first the score of a day does not depend on the segment that
        was asked for.
        """
        near = self._near(panel, device)
        stocks = np.arange(len(panel.instruments))
        step = max(1, min(self.chunk, _STREAM_ROWS // len(stocks)))
        for first in range(begin, days[-1] + 1, step):
            last = min(first + step, days[-1] + 1)
            x = near.features[first:last].float()
            if (more := self.day_inputs(panel, slice(first, last))) is not None:
                x = torch.cat([x, more.to(x.device)], dim=-1)
            with self._autocast(device):
                h, stream.state = network.encoder(x.to(device), stream.state)
            scored = np.arange(max(first, days[0]), last)
            if len(scored) == 0:
                continue
            batch = Batch(
                days=scored,
                stocks=stocks,
                x=None,
                mask=near.present[scored].to(device),
                label=near.labels[scored].to(device),
                raw_label=near.raw_labels[scored].to(device),
                risk=None if near.risk is None else near.risk[scored].to(device),
                panel=panel,
            )
            yield batch, h[scored[0] - first :].float()

    # ---- small parts ---------------------------------------------------------------

    def _autocast(self, device):
        return torch.autocast(
            device.type,
            dtype=torch.bfloat16,
            enabled=self.amp and device.type == "cuda",
        )

    def _flat(self, panel: Panel) -> bool:
        return self.d_feat is not None and len(panel.feature_names) != self.d_feat

    def _named(self, panel: Panel) -> Panel:
        """Panel with the features that the model was fitted on, in their order."""
        names, found = list(self.feature_names_), panel.feature_names
        if not names or names == found:
            return panel
        if sorted(names) != sorted(found) or len(set(names)) < len(names):
            raise ValueError(
                f"the model was fitted on the features {names}, the data has {found}: "
                "predict on the features of its training."
            )
        order = [found.index(name) for name in names]
        features = panel.features[..., order]
        return replace(panel, feature_names=names, features=features)

    def _width(self, panel: Panel) -> int:
        """Features a day; checks that rows which are whole windows can be read."""
        width = len(panel.feature_names)
        if self.d_feat is None or width == self.d_feat:
            return width
        if width % self.d_feat:
            raise ValueError(
                f"`d_feat` is {self.d_feat}, but the data has {width} feature columns, "
                "which is no multiple of it. Leave `d_feat` out to use them all as the "
                "features of one day."
            )
        if self.mode == "stream":
            raise ValueError(
                f"the data has {width} columns for `d_feat` = {self.d_feat}, so each "
                "row is a whole window, which `mode: stream` cannot share between "
                "days; set `mode: windows`, or `d_feat` to the number of columns."
            )
        return self.d_feat


def check_fit(dataset: DatasetH, reweighter: Any) -> None:
    """Raise ValueError unless `fit` can work with what Qlib hands it."""
    if reweighter is not None:
        raise ValueError("`reweighter` is not supported; leave it out.")
    for name in ("train", "valid"):
        if name not in dataset.segments:
            raise ValueError(
                f"`segments` must have `{name}`, got {sorted(dataset.segments)}."
            )


def _unflatten(rows: torch.Tensor, d_feat: int) -> torch.Tensor:
    """[n, d_feat * l], feature by feature and oldest first, to [l, n, d_feat]."""
    n, width = rows.shape
    return rows.reshape(n, d_feat, width // d_feat).permute(2, 0, 1)


def _epoch_seed(seed: int, epoch: int) -> int:
    return int(np.random.SeedSequence([seed, epoch]).generate_state(1)[0])


def _check_segments(dataset: DatasetH, panel: Panel) -> None:
    if isinstance(dataset, PanelDataset):
        return  # it has checked already
    check_spans(dataset.segments, panel.dates)
    handler = dataset.handler
    reach = handler_label_reach(handler)
    check_segments(handler, dataset.segments, panel.dates, reach)
