import click
import pytest
from click.testing import CliRunner

from qlib_ext.cli import main


def commands(group, path=()):
    for name, command in group.commands.items():
        if isinstance(command, click.Group):
            yield from commands(command, (*path, name))
        else:
            yield (*path, name)


@pytest.mark.parametrize("path", list(commands(main)), ids=" ".join)
def test_help_explains_every_option_and_is_instant(path):
    import subprocess
    import sys

    shown = CliRunner().invoke(main, [*path, "--help"])
    assert shown.exit_code == 0
    assert "\\b" not in shown.output
    code = (
        "import sys, qlib_ext.cli\n"
        f"try: qlib_ext.cli.main({[*path, '--help']!r})\n"
        "except SystemExit: pass\n"
        "assert not {'torch', 'qlib', 'pandas'} & set(sys.modules)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    command = main
    for name in path:
        command = command.commands[name]
    for option in command.params:
        if isinstance(option, click.Option):
            assert option.help, f"{' '.join(path)} {option.opts[0]} has no help"


def test_version_and_unknown_command():
    runner = CliRunner()
    assert "version" in runner.invoke(main, ["--version"]).output
    unknown = runner.invoke(main, ["trian"])
    assert unknown.exit_code == 2 and "trian" in unknown.output
