"""The check that tests leave nothing running finds what is left, also where its parent has died."""

import os
import subprocess
import sys
import time

import psutil
import pytest

from tests import processes

SLEEP = [sys.executable, "-c", "import time; time.sleep(60)"]


def test_a_child_that_runs_on_is_named_and_ended():
    before = processes.descendants(os.getpid())
    assert processes.left_running(before) == []
    child = subprocess.Popen(SLEEP)
    (line,) = processes.left_running(before, grace=0.1)
    assert line.startswith(f"{child.pid}: ") and "time.sleep(60)" in line
    assert child.wait(5) == -9


def test_a_child_that_ends_by_itself_is_waited_for():
    before = processes.descendants(os.getpid())
    child = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(0.3)"])
    assert processes.left_running(before) == []
    child.wait()


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="orphans go to init")
def test_an_orphan_is_found():
    before = processes.descendants(os.getpid())
    start = f"import subprocess as s; print(s.Popen({SLEEP!r}, stdout=s.DEVNULL, start_new_session=True).pid)"
    orphan = int(subprocess.check_output([sys.executable, "-c", start], encoding="utf-8"))
    assert orphan in processes.descendants(os.getpid()), "its parent is gone, and it is ours"
    (line,) = processes.left_running(before, grace=0.1)
    assert line.startswith(f"{orphan}: ")
    for _ in range(100):
        if not psutil.pid_exists(orphan) or psutil.Process(orphan).status() == psutil.STATUS_ZOMBIE:
            return
        time.sleep(0.05)
    pytest.fail("it was not ended")
