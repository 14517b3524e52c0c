"""The command line: what it prints, and what it returns when something is wrong."""

import importlib
import subprocess
import sys

import pytest

from packlib import __main__
from packlib.__main__ import COMMANDS, main
from packlib.lab import reproduce
from packlib.lab.strategies import STRATEGIES


def test_strategies_are_listed(capsys):
    assert main(["strategies"]) == 0
    said = capsys.readouterr()
    assert all(name in said.out for name in STRATEGIES) and said.err == ""


@pytest.mark.parametrize("name", COMMANDS)
def test_every_command_is_there_and_explains_itself(name, capsys):
    module = importlib.import_module(COMMANDS[name][0])
    assert callable(module.add_arguments) and callable(module.command)
    with pytest.raises(SystemExit) as stop:
        main([name, "--help"])
    assert stop.value.code == 0 and COMMANDS[name][1].split(",")[0] in " ".join(capsys.readouterr().out.split())


def test_an_unknown_command_is_refused_with_the_known_ones(capsys):
    with pytest.raises(SystemExit) as stop:
        main(["reproduc"])
    said = capsys.readouterr().err
    assert stop.value.code == 2 and all(name in said for name in COMMANDS)
    with pytest.raises(SystemExit):
        main([])


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["reproduce", "smok"], "ValueError: unknown preset 'smok' (did you mean 'smoke'?); known: "),
        (["reproduce", "smoke", "--only", "77"], "ValueError: unknown notebook '77'; known: 00_start_here"),
        (["advise", "no-such.jsonl"], "no-such.jsonl"),
    ],
)
def test_an_error_is_a_sentence_and_an_exit_code(arguments, message, capsys):
    assert main(arguments) == 1
    said = capsys.readouterr()
    assert message in said.err and "Traceback" not in said.err and said.out == ""


@pytest.mark.parametrize(
    ("error", "code", "message"),
    [
        (KeyboardInterrupt(), 130, "interrupted; every finished run has its record, call again to go on"),
        (reproduce.NotebookFailed("06.ipynb, cell 3"), 1, "NotebookFailed: 06.ipynb, cell 3"),
        (FileNotFoundError("no.jsonl"), 1, "FileNotFoundError: no.jsonl"),
    ],
)
def test_what_stops_a_command_is_said(error, code, message, capsys, monkeypatch):
    def command(arguments):
        raise error

    monkeypatch.setattr(reproduce, "command", command)
    assert main(["reproduce"]) == code
    assert capsys.readouterr().err.strip().splitlines()[-1] == message


def test_a_defect_is_not_hidden(monkeypatch):
    monkeypatch.setattr(reproduce, "command", lambda arguments: {}["missing"])
    with pytest.raises(KeyError):
        main(["reproduce"])


def test_the_module_runs_and_what_it_prints_can_be_piped():
    done = subprocess.run([sys.executable, "-m", "packlib", "strategies"], capture_output=True, text=True, check=True)
    assert done.stdout.splitlines()[1].split() == ["padding", "padded", "segment"], "nothing but the answer is on standard output"


def test_imports_of_other_commands_are_not_paid_for(monkeypatch):
    asked = []
    monkeypatch.setattr(__main__.importlib, "import_module", lambda name: asked.append(name) or reproduce)
    monkeypatch.setattr(reproduce, "command", lambda arguments: "")
    assert main(["reproduce"]) == 0 and asked == ["packlib.lab.reproduce"]
