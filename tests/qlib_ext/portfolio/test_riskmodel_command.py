"""The command `qlib-ext riskmodel`, as a user types it."""

from click.testing import CliRunner

from qlib_ext.cli import main


def test_riskmodel_builds_and_judges(market, tmp_path, qlib_market):
    base = ["riskmodel", "--store", str(market), "--out", str(tmp_path / "model")]
    span = ["--start", "2020-10-09", "--end", "2020-12-11"]
    done = CliRunner().invoke(main, [*base, *span])
    assert done.exit_code == 0, done.output
    assert "10 days, 20201009 to 20201211" in done.output
    assert "bias statistic" in done.output and "active" in done.output
    wrong = CliRunner().invoke(main, [*base, *span, "--extra", "learnt"])
    assert wrong.exit_code == 1 and "NAME=FILE" in wrong.output
