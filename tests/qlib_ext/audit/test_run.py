"""Outcomes, exit codes, page and command of the audit."""

import json
import re
from pathlib import Path

import pandas as pd
import pytest
import yaml
from click.testing import CliRunner

from qlib_ext.audit import CHECKS, Audit, Settings, Subject, Verdict, audit
from qlib_ext.audit.run import chosen
from qlib_ext.cli import main
from qlib_ext.ingest.store import read_instruments
from qlib_ext.workflow import load_workflow

WORKFLOWS = Path(__file__).resolve().parents[3] / "workflows"
SMALL = Settings(data="embedded", stocks=20, years=2, refit=False, days=0)


def plain(loader=None, store="/nowhere", instruments="all", **task):
    """Ridge regression on two features, without any class of this package."""
    loader = loader or {
        "class": "QlibDataLoader",
        "kwargs": {
            "config": {
                "feature": ["$close/Ref($close, 1) - 1", "$turnover"],
                "label": (["Ref($close, -6)/Ref($close, -1) - 1"], ["LABEL0"]),
            }
        },
    }
    handler = {
        "class": "DataHandlerLP",
        "module_path": "qlib.data.dataset.handler",
        "kwargs": {
            "instruments": instruments,
            "start_time": "2012-01-01",
            "end_time": "2020-12-31",
            "data_loader": loader,
            "infer_processors": [{"class": "Fillna"}],
            "learn_processors": [{"class": "DropnaLabel"}],
        },
    }
    return {
        "qlib_init": {"provider_uri": str(store), "region": "cn"},
        "task": {
            "model": {
                "class": "LinearModel",
                "module_path": "qlib.contrib.model.linear",
            },
            "dataset": {
                "class": "DatasetH",
                "module_path": "qlib.data.dataset",
                "kwargs": {
                    "handler": handler,
                    "segments": {
                        "train": ["2012-01-01", "2016-12-14"],
                        "valid": ["2017-01-01", "2017-12-14"],
                        "test": ["2018-01-01", "2020-12-31"],
                    },
                },
            },
            **task,
        },
    }


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tmp_path_factory.mktemp("audit")


class TestOutcome:
    def test_exit_code_is_that_of_the_worst(self):
        passed, failed = Verdict.passed("ok"), Verdict.fail("leak")
        broken, absent = Verdict.error(KeyError("x")), Verdict.skip("none")
        for verdicts, code in (
            ([passed, absent], 0),
            ([passed, broken], 2),
            ([failed, broken], 1),
        ):
            found = Audit("w", verdicts=dict(zip(CHECKS, verdicts, strict=False)))
            assert found.exit_code == code
        assert broken.summary == "KeyError: 'x'"

    def test_checks_keep_their_order_and_unknown_ones_are_refused(self):
        assert chosen(["rows", "windows"]) == ["windows", "rows"]
        assert chosen(None) == list(CHECKS)
        with pytest.raises(ValueError, match="no check 'typo'"):
            chosen(["typo"])

    def test_page_and_text_say_what_was_found(self):
        table = pd.DataFrame({"n": [3]}, index=["<b>row</b>"])
        found = Audit(
            "flow",
            "a store",
            pd.Timestamp("2020-01-02"),
            {
                "purge": Verdict.fail("labels reach <far>", table),
                "graphs": Verdict.skip("no graph"),
                "rows": Verdict.error(ValueError("broken")),
            },
            dict.fromkeys(("purge", "graphs", "rows"), 1.0),
        )
        page = found.page().render()
        assert "labels reach &lt;far&gt;" in page and "<b>row" not in page
        assert "could not run, which is no pass" in page
        text = found.text()
        assert "1 FAILED, 1 could not run, 1 not applicable" in text
        assert json.loads(json.dumps(found.as_dict()))["exit_code"] == 1


class TestPlainWorkflow:
    def test_every_check_runs_on_qlibs_own_classes(self, qlib_market, folder):
        found = audit(plain(), settings=SMALL, folder=folder)
        wanted = dict.fromkeys(CHECKS, "pass")
        wanted.update(dict.fromkeys(("windows", "graphs", "batches"), "not applicable"))
        assert {k: v.status for k, v in found.verdicts.items()} == wanted
        assert found.exit_code == 0
        assert "equal bit for bit" in found.verdicts["truncation"].summary

    def test_data_from_elsewhere_are_no_pass(self, qlib_market, folder):
        days = pd.bdate_range("2018-01-01", "2020-12-31")
        index = pd.MultiIndex.from_product(
            [days, [f"S{i}" for i in range(5)]], names=["datetime", "instrument"]
        )
        frame = pd.DataFrame(
            0.0, index, pd.MultiIndex.from_tuples([("feature", "x"), ("label", "y")])
        )
        loader = {
            "class": "StaticDataLoader",
            "kwargs": {"config": frame},
        }
        subject = Subject(plain(instruments=None), folder, SMALL)
        subject.task["dataset"]["kwargs"]["handler"]["kwargs"]["data_loader"] = loader
        found = audit({}, checks=["perturbation"], subject=subject)
        assert found.exit_code == 2
        assert "somewhere else than the store" in found.verdicts["perturbation"].summary

    def test_a_workflow_that_cannot_be_built_could_not_run(self, qlib_market, folder):
        broken = plain(model={"class": "Absent", "module_path": "qlib_ext.models"})
        found = audit(broken, checks=["shuffle"], settings=SMALL, folder=folder)
        assert found.exit_code == 2
        for config in ({}, {"task": {"model": {}, "dataset": {}}}):
            found = audit(config, settings=SMALL)
            assert found.exit_code == 2 and len(found.verdicts) == len(CHECKS)


def on_own(config, train_end="2019-03-29"):
    """The same, on days of the session's markets."""
    config["task"]["dataset"]["kwargs"]["segments"] = {
        "train": ["2018-01-01", train_end],
        "valid": ["2019-05-06", "2019-08-30"],
        "test": ["2019-10-08", "2020-12-31"],
    }
    return config


class TestOwnStore:
    @pytest.fixture(scope="class")
    def today_for_ever(self, market, tmp_path_factory):
        """The market, with the members of its last day written down for all days."""
        import shutil

        out = tmp_path_factory.mktemp("own") / "store"
        shutil.copytree(market, out)
        spans = read_instruments(market, "csi500")
        now = spans[spans["end"] == spans["end"].max()]
        lines = [f"{c}\t2018-01-02\t2020-12-31\n" for c in sorted(now["instrument"])]
        (out / "instruments" / "csi500.txt").write_text("".join(lines))
        return out

    def test_members_of_one_day_for_all_days_are_a_leak(
        self, qlib_market, market, today_for_ever, tmp_path
    ):
        settings = Settings(data="own", stocks=20)
        for number, (store, status) in enumerate(
            ((today_for_ever, "fail"), (market, "pass"))
        ):
            config = on_own(plain(store=store, instruments="csi500"))
            found = audit(
                config,
                checks=["membership"],
                settings=settings,
                folder=tmp_path / str(number),
            )
            verdict = found.verdicts["membership"]
            assert verdict.status == status, verdict.summary
            assert str(store) in found.data

    def test_a_store_that_is_not_there_is_said(self):
        found = audit(plain(), checks=["purge"], settings=Settings(data="own"))
        assert found.exit_code == 2
        assert "no Qlib day store" in found.verdicts["purge"].summary


class TestCommand:
    def test_command_writes_page_and_json_and_exits_with_the_code(
        self, qlib_market, market_small, tmp_path
    ):
        hole = on_own(plain(store=market_small), train_end="2019-04-30")
        for name, config, code, data in (
            ("good", plain(), 0, "embedded"),
            ("hole", hole, 1, "own"),
        ):
            path = tmp_path / f"{name}.yaml"
            text = json.loads(json.dumps(config))  # tuples become lists
            path.write_text(yaml.safe_dump(text))
            out = tmp_path / name
            arguments = ["audit", str(path), "--quick", "--stocks", "20"]
            arguments += ["--checks", "purge", "--data", data]
            arguments += ["--out", str(out), "--json", str(out / "audit.json")]
            done = CliRunner().invoke(main, arguments)
            assert done.exit_code == code, done.output
            assert "purge and embargo" in done.output
            found = json.loads((out / "audit.json").read_text())
            assert found["exit_code"] == code and list(found["checks"]) == ["purge"]
            assert "<title>Audit" in (out / f"audit-{name}.html").read_text()

    def test_report_says_what_of_retraining_was_audited(
        self, qlib_market, market_small, tmp_path
    ):
        config = load_workflow(WORKFLOWS / "base_day.yaml")
        config["qlib_init"]["provider_uri"] = str(market_small)
        config["task"]["dataset"]["kwargs"]["handler"]["kwargs"]["styles"] = []
        path = tmp_path / "w.yaml"
        path.write_text(yaml.safe_dump(config))
        arguments = ["audit", str(path), "--checks", "purge", "--out", str(tmp_path)]
        arguments += ["--stocks", "20", "--quick", "--json", str(tmp_path / "a.json")]
        for extra, text in (
            ([], "nothing is vouched for what retrains it"),
            (["--roll", "2020:2020"], "window 2020 of `qlib-ext roll --test"),
        ):
            done = CliRunner().invoke(main, [*arguments, *extra])
            assert text in done.output, done.output
            found = json.loads((tmp_path / "a.json").read_text())
            assert text in " ".join(found["notes"])

    def test_wrong_arguments_exit_with_2(self, tmp_path):
        path = tmp_path / "w.yaml"
        path.write_text(yaml.safe_dump(json.loads(json.dumps(plain()))))
        for arguments, text in (
            ([str(tmp_path / "absent.yaml")], "no workflow file"),
            ([str(path), "--checks", "typo"], "no check 'typo'"),
            ([str(path), "--set", "hidden"], "NAME=VALUE"),
        ):
            done = CliRunner().invoke(main, ["audit", *arguments])
            assert done.exit_code == 2 and text in done.output


# What one data set of a workflow loaded serves the others that share it.
_LAST: list = []
NARROW = {"hidden_size": 16, "num_layers": 1, "d_model": 8, "d_state": 4}


def share_data(subject, other):
    """Let a subject use what another with the same data set has loaded, if it has."""
    data = [(s.task["dataset"], s.source) for s in (subject, other)]
    if data[0] != data[1]:
        return False
    subject.stores = other.stores
    for key, value in other._memory.items():
        what = key[0] if isinstance(key, tuple) else key
        shared = what in ("dataset", "frames", "label", "reach", "drawn rows")
        if shared and value[1] is None:
            subject._memory[key] = value
    return True


def by_data(path):
    """Files of one base and one data set lie side by side; nothing is parsed for it."""
    text = path.read_text(encoding="utf-8")
    base = re.search("^BASE_CONFIG_PATH: (.*)", text, re.MULTILINE)
    return base[1] if base else path.name, text.partition("  dataset:")[2], path.stem


@pytest.mark.slow
@pytest.mark.parametrize(
    "path",
    sorted([*WORKFLOWS.glob("*.yaml"), *WORKFLOWS.glob("real/*.yaml")], key=by_data),
    ids=lambda p: p.stem,
)
def test_every_shipped_workflow_passes(path, qlib_market, folder):
    settings = Settings(
        data="embedded", stocks=30, years=2, refit=False, overrides=NARROW
    )
    subject = Subject(load_workflow(path), folder, settings)
    if _LAST and not share_data(subject, _LAST[0]):
        _LAST.clear()
    found = audit({}, name=path.stem, subject=subject)
    _LAST[:] = [subject]
    assert found.exit_code == 0, found.text()
