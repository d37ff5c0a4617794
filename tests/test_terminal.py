"""A terminal gets a bar below the lines; a pipe gets the lines and nothing else."""

import io
import os
import pty
import re
import subprocess
import sys
from pathlib import Path

import pytest

from memtrain.terminal import progress


RECIPE = Path(__file__).parent / "helpers" / "tiny_recipe.py"


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


def test_a_pipe_gets_plain_lines():
    stream = io.StringIO()
    with progress(stream) as (say, on_step):
        say("step 1/2 [data=1]")
        assert on_step is None
    assert stream.getvalue() == "step 1/2 [data=1]\n"


def test_a_terminal_gets_lines_as_they_are_above_a_bar():
    stream = Terminal()
    with progress(stream) as (say, on_step):
        assert on_step is not None
        on_step(30, 60)
        line = "step 30/60 [bold]not markup[/bold] " + "x" * 300
        say(line)
        on_step(31, 60)
        on_step(1, 60)  # the next seed
    shown = stream.getvalue()
    assert line in shown, "lines are neither styled nor wrapped"
    assert "31/60" in shown or "30/60" in shown
    assert "1/60" in shown


@pytest.mark.full
def test_train_on_a_real_terminal(tmp_path):
    ours, theirs = pty.openpty()
    command = [sys.executable, "-m", "memtrain", "train", str(RECIPE), "--run-dir", str(tmp_path)]
    with subprocess.Popen(
        [*command, "--set", "train.num_steps=10"],
        stdout=theirs,
        stderr=subprocess.PIPE,
        env=os.environ | {"TERM": "xterm-256color", "COLUMNS": "100"},
    ) as child:
        os.close(theirs)
        shown = b""
        while True:
            try:
                part = os.read(ours, 65536)
            except OSError:  # Linux says so when the other end is closed.
                break
            if not part:
                break
            shown += part
        assert child.stderr is not None
        assert child.wait() == 0, child.stderr.read().decode()
    os.close(ours)
    text = shown.decode()
    assert re.search(r"step +10/10 \| loss", text)
    assert "training" in text and "\x1b[" in text
