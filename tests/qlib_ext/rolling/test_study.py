"""Studies: every combination once, a table and curves from what the tasks left."""

import runpy
from pathlib import Path

import pytest
import yaml
from click.testing import CliRunner

from qlib_ext.cli import main
from qlib_ext.rolling.study import load_study, set_key

ROOT = Path(__file__).resolve().parents[3]
HERE = runpy.run_path(str(Path(__file__).with_name("test_rolling.py")))


@pytest.mark.parametrize(
    ("name", "key", "values"),
    [
        ("lr", "lr", [0.001, 0.0001]),
        ("dropout", "dropout", [0.0, 0.5, 0.9]),
        ("lambda", "lamb", [0.1, 1.0, 10.0, 100.0]),
        ("factors", "n_factors", [16, 64, 256]),
    ],
)
def test_study_files_vary_what_the_report_varies(name, key, values):
    study = load_study(ROOT / "workflows" / "studies" / f"{name}.yaml")
    variants = study.variants()
    assert list(variants) == [f"{key} {value}" for value in values]
    for value, config in zip(values, variants.values(), strict=True):
        assert config["task"]["model"]["kwargs"][key] == value
        # Nothing else differs from the first variant.
        first = next(iter(variants.values()))
        set_key(config, f"task.model.kwargs.{key}", values[0])
        assert config == first


def test_study_prints_a_table_and_writes_one_page(
    market, tmp_path, fresh_database, monkeypatch
):
    fresh_database(tmp_path)
    monkeypatch.chdir(tmp_path)
    config = HERE["workflow"](market)
    (tmp_path / "w.yaml").write_text(yaml.safe_dump(config))
    study = {
        "workflow": "w.yaml",
        "vary": {"task.model.kwargs.lr": [0.001, 0.01]},
        "seeds": 1,
    }
    (tmp_path / "s.yaml").write_text(yaml.safe_dump(study))
    command = ["study", "s.yaml", "--threads", "1", "--quiet"]
    command += ["--set", "task.model.kwargs.n_factors=1"]
    done = CliRunner().invoke(main, command)
    assert done.exit_code == 0, done.output
    assert "lr 0.001" in done.output and "lr 0.01" in done.output
    assert "best validation RankIC" in done.output
    page = (tmp_path / "reports" / "study-s.html").read_text()
    assert "Learning curves" in page


def test_bad_studies_name_the_key(tmp_path):
    (tmp_path / "w.yaml").write_text(yaml.safe_dump(HERE["WORKFLOW"]))
    for text, words in (
        ({"workflow": "w.yaml"}, "`vary` is missing"),
        ({"workflow": "w.yaml", "vary": {"a": 1}}, "must be a list"),
        ({"workflow": "w.yaml", "vary": {"a": [1]}, "seed": 1}, "unknown key 'seed'"),
        ({"workflow": "w.yaml", "vary": {"a": [1]}, "seeds": "x"}, "`seeds` must be"),
    ):
        (tmp_path / "s.yaml").write_text(yaml.safe_dump(text))
        with pytest.raises(ValueError, match=words):
            load_study(tmp_path / "s.yaml")
    study = {"workflow": "w.yaml", "vary": {"task.modle.kwargs.lr": [1]}}
    (tmp_path / "s.yaml").write_text(yaml.safe_dump(study))
    with pytest.raises(ValueError, match=r"no `task\.modle`"):
        load_study(tmp_path / "s.yaml").variants()


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("vary: {task.model.kwargs.lr: [1, 1]}", "has a value twice"),
        ("vary: {task.model.kwargs.lr: [1, '1']}", "has a value twice"),
        ("vary: [lr]", "`vary` must be a mapping"),
        ("vary: {task.model.kwargs.lr: [1]}\nset: [a]", "`set` must be a mapping"),
        ("vary: {task.model.kwargs.lr: [1]}\nroll: 2018", "`roll` must be a mapping"),
        ("vary: {task.model.kwargs.lr: [1]}\nroll: {tests: 1}", "unknown `roll.tests`"),
        ("vary: {task.model.kwargs.lr: [1]}\nroll: {step: year}", "`roll.test` is"),
    ],
)
def test_bad_study_files_are_named(text, message, tmp_path):
    (tmp_path / "w.yaml").write_text("task: {model: {class: A, kwargs: {lr: 1}}}\n")
    (tmp_path / "s.yaml").write_text(f"workflow: w.yaml\n{text}\n")
    with pytest.raises(ValueError, match=message):
        load_study(tmp_path / "s.yaml")
