import errno
import logging
import re
import subprocess
import sys

import click
import pandas as pd
import pytest
from click.testing import CliRunner
from mlflow.exceptions import MlflowException

from qlib_ext.cli import main
from qlib_ext.cli.console import quiet_others, watched
from qlib_ext.ingest.store import write_store


def commands(group, path=()):
    for name, command in group.commands.items():
        if isinstance(command, click.Group):
            yield from commands(command, (*path, name))
        else:
            yield (*path, name)


@pytest.mark.parametrize("path", list(commands(main)), ids=" ".join)
def test_help_explains_every_option(path):
    shown = CliRunner().invoke(main, [*path, "--help"])
    assert shown.exit_code == 0
    assert "\\b" not in shown.output
    command = main
    for name in path:
        command = command.commands[name]
    for option in command.params:
        if isinstance(option, click.Option):
            assert option.help, f"{' '.join(path)} {option.opts[0]} has no help"


def test_help_is_instant():
    code = (
        "import sys, qlib_ext.cli\n"
        f"for path in {list(commands(main))!r}:\n"
        "    try: qlib_ext.cli.main([*path, '--help'])\n"
        "    except SystemExit: pass\n"
        "    assert not {'torch', 'qlib', 'pandas'} & set(sys.modules), path"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


def test_version_and_unknown_command():
    runner = CliRunner()
    assert "version" in runner.invoke(main, ["--version"]).output
    unknown = runner.invoke(main, ["trian"])
    assert unknown.exit_code == 2 and "trian" in unknown.output


def test_a_full_disk_or_a_folder_that_may_not_be_written_is_one_line(
    monkeypatch, tmp_path
):
    def build_store(*args, **kwargs):
        raise OSError(errno.EROFS, "Read-only file system", "/disk/o")

    def too_long(*args, **kwargs):
        raise OSError(errno.EFBIG, "File too large", "o")

    def copied(*args, **kwargs):
        raise OSError(errno.ENOSPC, "No space left", "/tmp/x", None, "/disk/o")

    def wrapped(words):
        def raises(*args, **kwargs):
            try:
                raise RuntimeError(f"(sqlite3.OperationalError) {words} [SQL: INSERT]")
            except RuntimeError:
                raise KeyError("run") from None  # as MLflow's, in another's handler

        return raises

    def memory(*args, **kwargs):
        raise RuntimeError("x") from MemoryError("Unable to allocate 9 GiB")

    def imported(*args, **kwargs):
        raise ImportError("libtorch_cpu.so: failed to map segment from shared object")

    args = ["build", "ms", "--source", str(tmp_path), "--out", str(tmp_path)]
    for build, told in (
        (imported, "no memory left (libtorch_cpu.so: failed to map segment"),
        (build_store, "/disk/o: Read-only file system; see to the disk or the folder"),
        (copied, "Error: /disk/o: No space left"),
        (too_long, "o: File too large (ulimit -f); see to the disk or the folder"),
        (wrapped("database or disk is full"), "the disk is full, or the file longer"),
        (wrapped("disk I/O error"), "limit on file sizes (ulimit -f); see to that"),
        (wrapped("attempt to write a readonly database"), "the rights of its file"),
        (wrapped("database disk image is malformed"), "runs is damaged: move its file"),
        (memory, "no memory left (Unable to allocate 9 GiB): raise the limit (ulimit"),
    ):
        monkeypatch.setattr("qlib_ext.aggregates.build_store", build)
        result = CliRunner().invoke(main, args)
        assert result.exit_code == 1 and result.output.count("\n") == 1
        assert result.output.startswith("Error: ") and told in result.output


def test_a_server_that_is_down_is_one_line_without_its_password(monkeypatch, tmp_path):
    def build_store(*args, **kwargs):
        raise MlflowException("API request to http://me:S3cr3t@host failed")

    monkeypatch.setattr("qlib_ext.aggregates.build_store", build_store)
    args = ["build", "ms", "--source", str(tmp_path), "--out", str(tmp_path)]
    result = CliRunner().invoke(main, args)
    assert result.exit_code == 1 and result.output.count("\n") == 1
    assert "S3cr3t" not in result.output and "is it running" in result.output


@pytest.mark.parametrize(
    "args",
    [
        ["roll", "w.yaml", "--test", "2020", "--start", "soon"],
        ["score", "3f2a91", "--date", "yesterday"],
        ["build", "ms", "--source", ".", "--out", ".", "--end", "2020-13-01"],
        ["riskmodel", "--store", ".", "--out", "x", "--start", "now?", "--end", "2020"],
    ],
)
def test_what_is_no_date_is_named_by_its_option(args, tmp_path, monkeypatch):
    (tmp_path / "data/market").mkdir(parents=True)
    (tmp_path / "w.yaml").write_text("")
    monkeypatch.chdir(tmp_path)
    done = CliRunner().invoke(main, args)
    assert done.exit_code == 2
    assert re.search(r"'--(start|end|date)': .* is no date such as", done.output)


def test_what_others_log_in_every_run_is_not_shown(caplog, tmp_path):
    quiet_others()
    (tmp_path / "1/run").mkdir(parents=True)
    (tmp_path / "2/run").mkdir(parents=True)
    (tmp_path / "2/run/meta.yaml").touch()
    told = "Malformed experiment '{0}'. Detailed error Yaml file '{1}' does not exist."
    try:
        raise MlflowException("(sqlite3.OperationalError) database is locked")
    except MlflowException:
        database = logging.getLogger("mlflow.store.db.utils")
        database.exception("SQLAlchemy database error. The following exception")
        for number in "12":
            file = tmp_path / number / "meta.yaml"
            # as MLflow's file store does, on the root logger
            logging.warning(told.format(number, file), exc_info=True)
    logging.getLogger("qlib.utils").warning("The parameter `x` with value `1` is ig")
    # what is not usual stays, without MLflow's traceback
    assert [r.getMessage()[:22] for r in caplog.records] == [
        "Malformed experiment '",
        "The parameter `x` with",
    ]
    assert "Traceback" not in caplog.text and "'2'" in caplog.text


def test_a_store_that_is_written_under_a_reader_is_told(tmp_path, capsys):
    def write(root, end):
        bars = pd.DataFrame(
            {
                "datetime": pd.bdate_range("2020-01-01", end),
                "instrument": "SH600000",
                "close": 1.0,
            }
        )
        write_store(root, bars)

    write(tmp_path / "a", "2020-02-01")
    write(tmp_path / "b", "2020-02-01")
    with watched(str(tmp_path / "a")), watched({"day": "x"}), watched(None):
        write(tmp_path / "b", "2020-03-01")
    assert capsys.readouterr().err == ""
    with pytest.raises(KeyError), watched(tmp_path / "a"):
        write(tmp_path / "a", "2020-03-01")
        raise KeyError
    told = capsys.readouterr().err
    assert told.count("\n") == 1 and f"{tmp_path / 'a'} was written while" in told
