import pytest
from click.testing import CliRunner

from qlib_ext.cli import main
from qlib_ext.foreign import check_classes, check_model

DATA = "qlib.data.dataset"


@pytest.mark.parametrize(
    ("task", "told"),
    [
        ({"model": ("LGBModle", "qlib.contrib.model.gbdt")}, "did you mean LGBModel?"),
        ({"model": ("M", "no_such_package.m")}, "no module 'no_such_package'"),
        ({"model": ("M", "qlib.contrib.model.none")}, "no module 'qlib.contrib.model"),
        ({"infer_processors": [("CSStyleExposure", None)]}, r"\[0\]`: .*module_path"),
        ({"m": ("CSStyleExposure", "data_handlers.processors")}, "data_handlers.risk`"),
        ({"m": ("TopRecord", "qlib_ext.record_temp")}, "module_path: qlib_ext.port"),
        ({"record": [("FactorRecord", None)]}, r"record\[0\]`: .* no class Factor"),
    ],
)
def test_a_class_that_is_not_there_is_named(task, told):
    def spec(value):
        if isinstance(value, list):
            return [spec(item) for item in value]
        named, module = value
        return {"class": named} | ({"module_path": module} if module else {})

    with pytest.raises(ValueError, match=told):
        check_classes({key: spec(value) for key, value in task.items()})


def test_a_package_that_a_module_needs_is_named(tmp_path, monkeypatch):
    (tmp_path / "needs_it.py").write_text("import a_package_that_is_not_there\n")
    monkeypatch.syspath_prepend(tmp_path)
    match = r"`task.model`: needs_it needs .*pip install a_package_that_is_not_there"
    with pytest.raises(ValueError, match=match):
        check_classes({"model": {"class": "M", "module_path": "needs_it"}})


def test_memory_that_an_import_lacks_is_no_matter_of_versions(tmp_path, monkeypatch):
    text = "x.so: failed to map segment from shared object"
    (tmp_path / "heavy.py").write_text(f"raise ImportError({text!r})\n")
    monkeypatch.syspath_prepend(tmp_path)
    with pytest.raises(ImportError, match="failed to map segment"):
        check_classes({"model": {"class": "M", "module_path": "heavy"}})


def test_classes_that_are_there_pass():
    check_classes(
        {
            "model": {"class": "LGBModel", "module_path": "qlib.contrib.model.gbdt"},
            "infer_processors": [{"class": "ZScoreNorm"}],
            "record": {"class": "SignalRecord", "kwargs": {"class": "no class"}},
            "file": {"class": "Own", "module_path": "own.py"},
        }
    )


@pytest.mark.parametrize(
    ("model", "module", "data", "told"),
    [
        ("LGBModel", "gbdt", "TSDatasetH", "reads a table"),
        ("LinearModel", "linear", "TSDatasetH", "reads a table"),
        ("GRU", "pytorch_gru", "TSDatasetH", "reads a table"),
        ("GRU", "pytorch_gru_ts", "DatasetH", "take TSDatasetH"),
        ("TRAModel", "pytorch_tra", "TSDatasetH", "reads MTSDatasetH"),
        ("LGBModel", "gbdt", "DatasetH", None),
        ("GRU", "pytorch_gru_ts", "TSDatasetH", None),
        ("GeneralPTNN", "pytorch_general_nn", "TSDatasetH", None),
    ],
)
def test_models_of_qlib_are_refused_data_that_they_do_not_read(
    model, module, data, told
):
    task = {
        "model": {"class": model, "module_path": f"qlib.contrib.model.{module}"},
        "dataset": {"class": data, "module_path": DATA},
    }
    if told is None:
        check_model(task)
        return
    with pytest.raises(ValueError, match=f"`task.dataset` is {data}, .*{told}"):
        check_model(task)


@pytest.mark.parametrize(("version", "refused"), [("2.13.0+cpu", True), ("3.0", False)])
def test_the_scheduler_that_newer_pytorch_lacks_is_named(monkeypatch, version, refused):
    monkeypatch.setattr("torch.__version__", version)
    model = {
        "class": "DNNModelPytorch",
        "module_path": "qlib.contrib.model.pytorch_nn",
        "kwargs": {},
    }
    task = {"model": model, "dataset": {"class": "DatasetH", "module_path": DATA}}
    if refused:
        with pytest.raises(ValueError, match=r"set `scheduler: null` in its kwargs"):
            check_model(task)
    else:
        check_model(task)
    model["kwargs"] = {"scheduler": None}
    check_model(task)


def test_what_qlibs_models_die_of_is_one_line(monkeypatch, tmp_path):
    from qlib.contrib.meta.data_selection.utils import ICLoss
    from qlib.contrib.model.pytorch_gru import GRUModel
    from torch import zeros

    def no_day(*args, **kwargs):
        days = [("2020-01-02", "A"), ("2020-01-02", "B")]
        ICLoss()(zeros(2), zeros(2), days)

    def shapes(*args, **kwargs):
        GRUModel(d_feat=5)(zeros(4, 6))

    args = ["build", "ms", "--source", str(tmp_path), "--out", str(tmp_path)]
    for dies, told in ((no_day, "none with 50 stocks"), (shapes, "(d_feat, or")):
        monkeypatch.setattr("qlib_ext.aggregates.build_store", dies)
        done = CliRunner().invoke(main, args)
        assert done.exit_code == 1 and done.output.count("\n") == 1
        assert done.output.startswith("Error: ") and told in done.output
