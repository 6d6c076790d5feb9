"""Commands run in the process of a test."""

import pytest

from latentize import cli


def call(capsys, *arguments):
    """(exit code, stdout, stderr) of a command."""
    with pytest.raises(SystemExit) as stopped:
        cli.main([str(argument) for argument in arguments])
    output = capsys.readouterr()
    return stopped.value.code or 0, output.out, output.err
