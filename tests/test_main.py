"""The command line: what it prints, what it returns when something is wrong, and that asking for help costs nothing."""

import argparse
import json
import re
import subprocess
import sys
import time

import pytest
from PIL import Image

from packlib import __main__
from packlib.__main__ import main
from packlib.lab.pages import report, reproduce
from packlib.lab.presets import presets
from packlib.lab.small_models import small_model
from packlib.lab.strategies import STRATEGIES


def commands():
    """Name -> its parser."""
    (found,) = (a for a in __main__.parser()._actions if isinstance(a, argparse._SubParsersAction))
    return found.choices


def test_records_that_are_not_there_are_no_calibration(tmp_path, capsys):
    data = tmp_path / "x.jsonl"
    data.write_text('{"text": "one two three"}\n' * 40, encoding="utf-8")
    assert main(["advise", str(data), "--tokenizer", "bpe:300", "--records", "h2000"]) == 1
    said, known = capsys.readouterr().err.split(" is no run folder; known: ")
    assert said.endswith("--records = 'h2000'") and {"h100", "h200"} <= set(known.strip().split(", "))


HEAVY = {"numpy", "torch", "transformers", "pandas", "matplotlib", "datasets", "pyarrow", "trl", "papermill"}


def test_the_commands_are_those_of_the_design():
    expected = ["reproduce", "presets", "corpora", "advise", "isolation", "book", "matrix", "strategies", "tables"]
    assert list(commands()) == expected


def test_strategies_are_listed(capsys):
    assert main(["strategies"]) == 0
    said = capsys.readouterr()
    assert [line.split()[0] for line in said.out.splitlines()[1:]] == list(STRATEGIES) and said.err == ""


@pytest.mark.parametrize("name", commands())
def test_every_command_explains_itself(name, capsys):
    with pytest.raises(SystemExit) as stop:
        main([name, "--help"])
    said = capsys.readouterr().out
    assert stop.value.code == 0 and commands()[name].description in " ".join(said.split())
    for action in commands()[name]._actions:
        assert action.help, f"{name} {action.dest} has no help"


def imports_and_seconds(*arguments):
    """What heavy packages `python -m packlib …` imports before it ends, and its CPU time in seconds."""
    code = f"""
import sys, time
from packlib.__main__ import main
try:
    main(sys.argv[1:])
except SystemExit:
    pass
print(time.process_time(), *sorted({HEAVY} & sys.modules.keys()))
"""
    done = subprocess.run([sys.executable, "-c", code, *arguments], capture_output=True, encoding="utf-8", check=True)
    seconds, *heavy = done.stdout.splitlines()[-1].split()
    return set(heavy), float(seconds)


@pytest.mark.parametrize("name", [None, *commands()])
def test_help_answers_at_once(name):
    """CPU time, so that a busy machine fails nothing: a second for the whole, two for a command."""
    heavy, seconds = imports_and_seconds(*filter(None, [name]), "--help")
    assert heavy == set() and seconds < (2 if name else 1)


def test_a_command_pays_for_its_own_imports_alone():
    heavy, _ = imports_and_seconds("strategies")
    assert "numpy" in heavy, "the negative control: a command that runs does import"
    assert "papermill" not in heavy and "matplotlib" not in heavy


def test_presets_are_listed_without_what_runs_them():
    """A second of CPU time, where torch, transformers and papermill take six."""
    heavy, seconds = imports_and_seconds("presets")
    assert heavy == set() and seconds < 1


def test_an_unknown_command_is_refused_with_the_known_ones(capsys):
    with pytest.raises(SystemExit) as stop:
        main(["reproduc"])
    said = capsys.readouterr().err
    assert stop.value.code == 2 and all(name in said for name in commands())
    with pytest.raises(SystemExit):
        main([])


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["reproduce", "smok"], "ValueError: unknown preset 'smok' (did you mean 'smoke'?); known: "),
        (["reproduce", "smoke", "--only", "77"], "ValueError: unknown notebook '77'; known: 00_start_here"),
        (["advise", "no-such.jsonl"], "no-such.jsonl"),
        (["isolation", "./no/such/folder"], "OSError: model './no/such/folder' is no file or folder here"),
        (["isolation", "lama"], "ValueError: unknown model 'lama' (did you mean 'llama'?); known: "),
        (["advise", "x.jsonl", "--out", "x.pdf"], "ValueError: --out = 'x.pdf'; expected a file that ends in .png"),
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
    def stopped(*args, **options):
        raise error

    monkeypatch.setattr(reproduce, "reproduce", stopped)
    assert main(["reproduce"]) == code
    assert capsys.readouterr().err.strip().splitlines()[-1] == message


def test_a_defect_is_not_hidden(monkeypatch):
    monkeypatch.setattr(reproduce, "reproduce", lambda *args, **options: {}["missing"])
    with pytest.raises(KeyError):
        main(["reproduce"])


def test_the_options_of_reproduce_are_handed_over(monkeypatch, capsys, tmp_path):
    asked = {}

    def stand_in(preset, **options):
        asked.update(options, preset=preset)
        return tmp_path

    monkeypatch.setattr(reproduce, "reproduce", stand_in)
    monkeypatch.setattr(report, "headline", lambda folder: "the table")
    assert main(["reproduce", "smoke", "--output", "mine", "--only", "06", "07", "--minutes", "2"]) == 0
    assert asked == {"preset": "smoke", "output": "mine", "only": ["06", "07"], "minutes": 2.0}
    said = capsys.readouterr().out
    assert said.startswith("the table") and str(tmp_path / "report.md") in said


def test_the_module_runs_and_what_it_prints_can_be_piped():
    command = [sys.executable, "-m", "packlib", "strategies"]
    done = subprocess.run(command, capture_output=True, encoding="utf-8", check=True)
    assert done.stdout.splitlines()[1].split() == ["padding", "padded", "segment"], "nothing but the answer is there"


def test_reproduce_says_something_before_it_imports_anything():
    """Within three seconds, on a busy machine in CPU time."""
    code = f"""
import sys, time
from packlib.__main__ import main
class Said(Exception): pass
class First:
    def write(self, text):
        sys.__stdout__.write(f"{{time.process_time()}} {{sorted({HEAVY} & sys.modules.keys())}} {{text}}")
        raise Said
    def flush(self): pass
sys.stderr = First()
try:
    main(["reproduce", "smoke"])
except Said:
    pass
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, encoding="utf-8", check=True)
    seconds, heavy, text = done.stdout.strip().split(maxsplit=2)
    assert float(seconds) < 3 and heavy == "[]" and text == "reproduce smoke: reading the notebooks"


def test_presets_are_listed(capsys):
    assert main(["presets"]) == 0
    text = capsys.readouterr().out
    for name in presets():
        assert re.search(rf"^{name} +\S.*; (about \d+ minutes|not timed yet); notebooks \d\d", text, re.MULTILINE), name
    assert max(map(len, text.splitlines())) <= 100


@pytest.mark.parametrize("model", ["mistral-7c", "some/where", "./no-such-folder"])
def test_an_unknown_model_fails_at_once_without_the_hub(model, tmp_path, capsys):
    """Without a network a client of the Hub asks six times, for half a minute a file."""
    begun = time.monotonic()
    assert main(["advise", str(jsonl(tmp_path)), "--model", model]) == 1
    said = capsys.readouterr().err
    assert model in said and "Retrying" not in said and time.monotonic() - begun < 10


def jsonl(folder, examples=64):
    path = folder / "mine.jsonl"
    lines = [json.dumps({"text": "packing " * (1 + i % 9) + str(i)}) for i in range(examples)]
    path.write_text("\n".join(lines) + "\n\n", encoding="utf-8")
    return path


def test_advice_says_why_it_reads_fewer_and_draws(tmp_path, capsys):
    path, picture = jsonl(tmp_path), tmp_path / "advice.png"
    assert main(["advise", str(path), "--tokenizer", "bpe:300", "--out", str(picture)]) == 0
    text = capsys.readouterr().out
    read = int(re.search(r"\((\d+) of the file's 64 examples read: one in 16,", text)[1])
    assert 48 < read < 64 and f"\n{read} examples, " in text
    prose = text.split("DynaPipe, padded")[1].splitlines()[1:]
    assert max(map(len, prose)) <= 100
    with Image.open(picture) as image:
        assert image.info["Description"].startswith("Predicted")
    assert main(["advise", str(path), "--tokenizer", "bpe:300", "--limit", "20"]) == 0
    assert "20 of the file's 64 examples read: a random subset, as asked" in " ".join(capsys.readouterr().out.split())


def test_isolation_judges_models_by_folder_and_by_type(tmp_path, capsys):
    def judged(*arguments):
        code = main(["isolation", *arguments])
        said = capsys.readouterr()
        return code, said.out + said.err

    small_model("llama").save_pretrained(tmp_path)
    code, text = judged(str(tmp_path), "--device", "cpu")
    assert code == 0 and "llama with sdpa in float32 on cpu" in text and "EXACT" in text
    assert "EXACT" in judged("llama", "--kernel", "sdpa")[1]
    code, text = judged("opt", "--json")
    assert code == 0 and json.loads(text)["verdict"] == "leak"
    assert "EXACT" in judged("falcon", "--attention", "flash_attention_2")[1]
    code, text = judged("falcon", "--strict")
    assert code == 1 and text.startswith("ContaminationError: falcon with sdpa")
