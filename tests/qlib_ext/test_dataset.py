import itertools

import numpy as np
import pandas as pd
import pytest
import torch
from qlib.data.dataset.handler import DataHandlerLP
from qlib.data.dataset.loader import StaticDataLoader

from data_handlers.labels import label_config
from qlib_ext.dataset import Panel, PanelDataset, check_purge, handler_label_reach

DATES = pd.bdate_range("2020-01-01", periods=4)


def frame(rows, columns, group):
    index = pd.MultiIndex.from_tuples(
        [(DATES[d], i) for d, i, *_ in rows], names=["datetime", "instrument"]
    )
    return pd.DataFrame(
        [row[2:] for row in rows],
        index=index,
        columns=pd.MultiIndex.from_product([[group], columns]),
        dtype=np.float32,
    )


def a_panel():
    feature = frame(
        [(0, "B", 1, 2), (0, "A", 3, np.nan), (2, "B", np.nan, np.nan), (3, "A", 7, 8)],
        ["x", "y"],
        "feature",
    )
    label = frame([(0, "A", 0.5), (1, "A", 9.0), (3, "Z", 1.0)], ["RET10"], "label")
    return Panel.from_frames(feature, label)


class TestPanel:
    def test_cells_hold_what_the_frame_says(self):
        p = a_panel()
        assert list(p.dates) == [DATES[0], DATES[2], DATES[3]]
        assert list(p.instruments) == ["A", "B"]
        assert p.features[0].tolist() == [[3.0, 0.0], [1.0, 2.0]]
        assert p.features[2].tolist() == [[7.0, 8.0], [0.0, 0.0]]

    def test_an_all_nan_row_is_absent(self):
        assert a_panel().present.tolist() == [[1, 1], [0, 0], [1, 0]]

    def test_labels_outside_the_features_are_ignored_and_absent_ones_are_nan(self):
        labels = a_panel().labels[..., 0]
        assert labels[0, 0] == 0.5
        assert torch.isnan(labels).sum() == 5

    def test_row_order_does_not_matter(self):
        rng = np.random.default_rng(0)
        rows = [(d, i, rng.normal(), rng.normal()) for d in range(4) for i in "ABCD"]
        one = Panel.from_frames(frame(rows, ["x", "y"], "feature"))
        rng.shuffle(rows)
        two = Panel.from_frames(frame(rows, ["x", "y"], "feature"))
        assert torch.equal(one.features, two.features)

    def test_series_gives_the_frame_back(self):
        p = a_panel()
        days = np.array([0, 2])
        back = p.series(p.features[days], days, p.feature_names)
        assert list(back.index) == [(DATES[0], "A"), (DATES[0], "B"), (DATES[3], "A")]
        assert back["x"].tolist() == [3.0, 1.0, 7.0]

    def test_days_of_a_segment_are_inclusive(self):
        p = a_panel()
        assert p.days((DATES[0], DATES[2])).tolist() == [0, 1]
        assert p.days((None, None)).tolist() == [0, 1, 2]

    @pytest.mark.parametrize(
        ("change", "message"),
        [
            (lambda f: f.iloc[:0], "`feature` frame is empty"),
            (lambda f: pd.concat([f, f.iloc[:1]]), "two rows for B on 2020-01-01"),
            (lambda f: f.reset_index(drop=True), "must be indexed by"),
            (lambda f: f.astype(object), "must be numeric, got dtype object"),
        ],
    )
    def test_refuses(self, change, message):
        good = frame([(0, "B", 1), (1, "A", 3)], ["x"], "feature")
        with pytest.raises(ValueError, match=message):
            Panel.from_frames(change(good))

    @pytest.mark.parametrize(
        "name", ["features", "present", "labels", "raw_labels", "risk"]
    )
    def test_fingerprint_changes_with_any_value(self, name):
        one, other = a_panel(), a_panel()
        for panel in (one, other):
            panel.raw_labels = panel.labels.clone()
            panel.risk = torch.ones(3, 2, 1)
        assert one.fingerprint() == other.fingerprint()
        array = getattr(other, name)
        array[2, 0] = ~array[2, 0] if name == "present" else 5.0
        assert one.fingerprint() != other.fingerprint()

    def test_label_index_names_the_choices(self):
        assert a_panel().label_index("RET10") == 0
        with pytest.raises(ValueError, match=r"one of \['RET10'\], got 'RET5'"):
            a_panel().label_index("RET5")


def test_a_panel_moves_to_a_device_if_it_fits_in_half_precision_if_asked():
    panel = a_panel()
    device = torch.device("cpu")
    near, words = panel.near(device, panel.nbytes)
    torch.testing.assert_close(near.features, panel.features, rtol=0, atol=0)
    assert "is kept there" in words
    half, words = panel.near(device, panel.nbytes - 1, half=True)
    assert half.features.dtype == torch.bfloat16 and "bfloat16" in words
    torch.testing.assert_close(
        half.features.float(), panel.features, rtol=2**-8, atol=0
    )
    assert half.labels.dtype == torch.float32
    same, words = panel.near(device, panel.nbytes / 2)
    assert same is panel and "50% fit" in words and "one by one" in words


def test_check_purge_against_hand_counted_days():
    dates = pd.bdate_range("2020-01-01", periods=100)
    segments = {
        "valid": (dates[60], dates[70]),
        "train": (dates[0], dates[49]),
        "test": (dates[82], None),
    }
    # train -> valid: days 50..59 lie between, 10; valid -> test: 71..81, 11.
    assert check_purge(segments, dates, 10) == []
    assert check_purge(segments, dates, 11) == [("train", "valid", 10, dates[48])]


def test_the_purge_of_two_labels_is_that_of_the_longer(handler, qlib_market):
    del handler.label_reach
    handler.data_loader.fields = {"label": label_config([1, 10], ["open", "close"])}
    assert handler_label_reach(handler) == 11
    with pytest.raises(ValueError, match="so 11 are needed"):
        PanelDataset(handler, segments(handler, 10))
    PanelDataset(handler, segments(handler, 11))
    # The shorter one alone needs two days.
    handler.data_loader.fields = {"label": label_config(1, "open")}
    PanelDataset(handler, segments(handler, 2))


@pytest.fixture
def handler():
    return make_handler()


def make_handler():
    rng = np.random.default_rng(0)
    dates = pd.bdate_range("2020-01-01", periods=60)
    index = pd.MultiIndex.from_product(
        [dates, list("ABC")], names=["datetime", "instrument"]
    )
    columns = pd.MultiIndex.from_tuples(
        [("feature", "x"), ("feature", "y"), ("label", "RET10")]
    )
    values = rng.normal(size=(len(index), 3))
    values[0, 0] = np.nan
    data = pd.DataFrame(values, index=index, columns=columns)
    data.loc[data.index[5], ("label", "RET10")] = np.nan
    made = DataHandlerLP(
        data_loader=StaticDataLoader(data), learn_processors=[{"class": "DropnaLabel"}]
    )
    made.label_reach = 11
    return made


def segments(handler, gap):
    dates = handler.fetch().index.unique("datetime")
    return {"train": (dates[0], dates[29]), "valid": (dates[30 + gap], dates[-1])}


class TestPanelDataset:
    def test_rows_dropped_by_a_label_processor_stay_as_features(self, handler):
        panel = PanelDataset(handler, segments(handler, 11)).panel
        assert panel.present.all()
        assert torch.isnan(panel.labels[1, 2, 0])
        assert torch.isfinite(panel.labels).sum() == panel.labels.numel() - 1

    def test_segments_too_close_raise_with_dates_and_gap(self, handler):
        with pytest.raises(ValueError, match=r"(?s)10 trading days.*so 11 are needed"):
            PanelDataset(handler, segments(handler, 10))

    def test_purge_trim_ends_the_earlier_segment_earlier(self, handler):
        dates = handler.fetch().index.unique("datetime")
        made = PanelDataset(handler, segments(handler, 0), purge="trim")
        assert made.segments["train"] == (dates[0], dates[18])
        assert check_purge(made.segments, dates, 11) == []

    @pytest.mark.parametrize("purge", ["error", "trim"])
    def test_no_day_early_enough_is_said(self, handler, purge):
        handler.label_reach = 50
        with pytest.raises(ValueError, match="No day of the data is early enough for"):
            PanelDataset(handler, segments(handler, 0), purge=purge)

    def test_segments_may_be_slices(self, handler):
        given = {k: slice(*v) for k, v in segments(handler, 0).items()}
        made = PanelDataset(handler, given, purge="trim")
        assert check_purge(made.segments, made.panel.dates, 11) == []

    def test_purge_off_accepts_the_overlap(self, handler):
        given = segments(handler, 0)
        assert PanelDataset(handler, given, purge="off").segments == given

    def test_prepare_without_frames_equals_prepare_with_frames(self, handler):
        kept = PanelDataset(make_handler(), segments(handler, 11))
        freed = PanelDataset(handler, segments(handler, 11), keep_frames=False)
        assert freed.panel is not None
        assert not isinstance(freed.handler._infer, pd.DataFrame)
        for key in ("infer", "raw"):
            for group in ("feature", "label"):
                want = kept.prepare("valid", col_set=group, data_key=key)
                got = freed.prepare("valid", col_set=group, data_key=key)
                np.testing.assert_allclose(got, want, rtol=1e-6)
                assert got.index.equals(want.index)
        pd.testing.assert_index_equal(
            freed.prepare("valid").columns, kept.prepare("valid").columns
        )
        both = freed.prepare("valid", col_set=["feature", "label"])
        assert list(both.columns) == [
            ("feature", "x"),
            ("feature", "y"),
            ("label", "RET10"),
        ]
        # The handler itself answers as before.
        for col_set in ("__all", "__raw"):
            assert freed.handler.get_cols(col_set) == kept.handler.get_cols(col_set)
        day = kept.panel.dates[7]
        for by in ({"selector": day}, {"selector": "B", "level": "instrument"}):
            want = kept.handler.fetch(**by, col_set="feature")
            got = freed.handler.fetch(**by, col_set="feature")
            np.testing.assert_allclose(got, want, rtol=1e-6)

    def test_freed_frames_are_rebuilt_and_the_raw_frame_stays(self, handler):
        kept = PanelDataset(make_handler(), segments(handler, 11))
        freed = PanelDataset(handler, segments(handler, 11))
        freed.free_frames()
        assert not isinstance(freed.handler._infer, pd.DataFrame)
        assert not isinstance(freed.handler._learn, pd.DataFrame)
        assert isinstance(freed.handler._data, pd.DataFrame)
        for key, group in itertools.product(("infer", "raw"), ("feature", "label")):
            want = kept.prepare("valid", col_set=group, data_key=key)
            got = freed.prepare("valid", col_set=group, data_key=key)
            pd.testing.assert_frame_equal(
                got, want, check_dtype=key == "raw", check_names=key == "raw", rtol=1e-6
            )

    @pytest.mark.parametrize(
        ("kwargs", "message"),
        [
            ({"purge": "no"}, "`purge` must be one of 'error', 'trim', 'off'"),
            ({"segments": {}}, "`segments` must map names"),
            (
                {"segments": {"train": ("2020-02-01", "2020-01-01")}},
                "`segments.train` starts at 2020-02-01, after its end",
            ),
            (
                {"segments": {"train": ("2030-01-01", "2030-02-01")}},
                "holds no trading day of the data, which spans",
            ),
        ],
    )
    def test_refuses(self, handler, kwargs, message):
        given = {"segments": segments(handler, 11), **kwargs}
        with pytest.raises(ValueError, match=message):
            PanelDataset(handler, **given)

    def test_unreadable_reach_is_none(self, handler):
        del handler.label_reach
        assert handler_label_reach(handler) is None
