"""A process of the server is as one of its own: its environment and its output are those of who starts it."""

import os

from packlib.lab.runs import forked


def say(name):
    os.write(1, f"{os.environ.get(name)} ".encode())
    os.write(2, b"aloud ")


def test_environment_and_output_are_of_now_not_of_the_server(tmp_path, monkeypatch):
    path = tmp_path / "said.txt"
    with path.open("w", encoding="utf-8") as file:
        for value in ("first", "second"):
            monkeypatch.setenv("PACKLIB_TRIED", value)
            forked.start(say, "PACKLIB_TRIED", preload="packlib.lab.runs.preload", output=file.fileno()).join()
        monkeypatch.delenv("PACKLIB_TRIED")
        forked.start(say, "PACKLIB_TRIED", preload="packlib.lab.runs.preload", output=file.fileno()).join()
    assert path.read_text(encoding="utf-8") == "first aloud second aloud None aloud "
