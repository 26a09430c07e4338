import subprocess
import sys
import zipfile
from pathlib import Path

import pytest
from click.testing import CliRunner

from qlib_ext.cli import main

ROOT = Path(__file__).resolve().parents[1]


def test_init_writes_the_workflows_as_they_are_and_says_what_is_next(tmp_path):
    out = tmp_path / "w"
    result = CliRunner().invoke(main, ["init", str(out)])
    assert result.exit_code == 0, result.output
    assert f"qlib-ext run {out / 'rnn_day_multi.yaml'}" in result.output
    written = {p.relative_to(out): p.read_bytes() for p in out.rglob("*.yaml")}
    source = ROOT / "workflows"
    assert written == {
        p.relative_to(source): p.read_bytes() for p in source.rglob("*.yaml")
    }
    again = CliRunner().invoke(main, ["init", str(out)])
    assert again.exit_code == 0
    (out / "gru.yaml").write_text("mine")
    refused = CliRunner().invoke(main, ["init", str(out)])
    assert refused.exit_code == 1 and "gru.yaml" in refused.output
    assert (out / "gru.yaml").read_text() == "mine"
    assert CliRunner().invoke(main, ["init", str(out), "--overwrite"]).exit_code == 0


def test_init_lists_every_workflow_with_what_it_is():
    result = CliRunner().invoke(main, ["init", "--list"])
    assert result.exit_code == 0
    lines = result.output.splitlines()
    assert len(lines) == len(list((ROOT / "workflows").rglob("*.yaml")))
    assert any(x.startswith("rnn_day_multi.yaml") and "64" in x for x in lines)


def test_a_reader_that_goes_is_no_error():
    command = [sys.executable, "-u", "-m", "qlib_ext.cli", "init", "--list"]
    pipe = subprocess.PIPE
    with subprocess.Popen(command, cwd=ROOT, stdout=pipe, stderr=pipe) as process:
        process.stdout.close()
        assert process.stderr.read() == b""
    assert process.returncode == 1


@pytest.mark.slow
def test_wheel_holds_workflows_and_types_and_starts_by_itself(tmp_path):
    pip = [sys.executable, "-m", "pip", "--disable-pip-version-check"]
    source = tmp_path / "source"
    subprocess.run(["git", "clone", "-q", str(ROOT), str(source)], check=True)
    subprocess.run(
        [*pip, "wheel", "-q", "--no-deps", "--no-build-isolation", "-w", tmp_path, "."],
        cwd=source,
        check=True,
    )
    (wheel,) = tmp_path.glob("*.whl")
    names = set(zipfile.ZipFile(wheel).namelist())
    wanted = {
        f"qlib_ext/{p.relative_to(source)}" for p in source.glob("workflows/**/*.yaml")
    }
    assert wanted and wanted | {"qlib_ext/py.typed", "data_handlers/py.typed"} <= names
    zipfile.ZipFile(wheel).extractall(tmp_path / "site")
    done = subprocess.run(
        [sys.executable, "-m", "qlib_ext.cli", "init", "w"],
        cwd=tmp_path / "site",
        capture_output=True,
        text=True,
    )
    told = f"{len(wanted)} workflows"
    assert done.returncode == 0 and told in done.stdout, done.stderr


@pytest.mark.parametrize("name", ["data_handlers.py", "data_handlers/__init__.py"])
def test_a_folder_that_hides_data_handlers_is_named(tmp_path, name):
    (tmp_path / name).parent.mkdir(exist_ok=True)
    (tmp_path / name).write_text("")
    code = f"import sys; sys.path[:0] = [{str(tmp_path)!r}, {str(ROOT)!r}]\n"
    done = subprocess.run(
        [sys.executable, "-c", code + "import qlib_ext"],
        cwd=tmp_path,
        capture_output=True,
        text=True,
    )
    assert done.returncode == 1
    assert str(tmp_path / "data_handlers") in done.stderr and "hides" in done.stderr
