"""Bad command lines end with one message and their exit code, and leave nothing behind."""

import re

import bad_commands
import pytest

from bad_input import deadline, is_one_message, name_of, tree
from lplr_jax import cli

pytestmark = pytest.mark.usefixtures("as_a_user")


@pytest.mark.parametrize("command", bad_commands.cases(), ids=name_of)
def test_a_bad_command_line_is_refused_in_one_message(command, folder, monkeypatch, capsys):
    (folder / "cwd").mkdir()
    monkeypatch.chdir(folder / "cwd")
    arguments = command.arguments(folder)
    before = tree(folder)
    with deadline():
        code = cli.main(arguments)
    shown, said = capsys.readouterr()
    assert code == command.code
    assert re.search(command.message, " ".join(re.sub(r"[│╭╮╰╯─]", " ", said).split()))
    assert "Traceback" not in shown + said
    assert is_one_message(said)
    assert tree(folder) == before
