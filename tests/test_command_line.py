"""The scripts as users run them, in processes of their own; and the commands of the README.

The processes are those of the fixture `children`, which begin with the first test of all.
"""

import importlib
import re
import shlex
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from conftest import PIPES, ROOT, SCRIPTS, checkpoint
from PIL import Image


def test_importing_does_nothing(children):
    folder, child = children["imports"]
    assert (*child.communicate(timeout=120), child.returncode) == ("", "", 0)
    assert not list(folder.iterdir())


def test_a_script_alone_in_an_empty_folder(script, children):
    """Without the rest of the collection; and with no network and no data, on the built-in digits, which
    it says.
    """
    folder, child = children[script.__name__]
    out, err = child.communicate(timeout=240)
    assert child.returncode == 0, err
    assert "\r" not in out
    grids = (4, 6)
    if script.__name__ == "cgan":
        grids = (10, 20)
        assert out.startswith("warning: mnist is not in") and "refused" in out.splitlines()[0]
        assert "digits: 10000 images (0: 1000, 1: 1000" in out
    run = folder / "runs" / "mine"
    files = {str(file.relative_to(run)) for file in run.rglob("*")}
    assert {f"images/sample_{step:08}.png" for step in grids} | {
        "sample.gif",
        "log.csv",
        "checkpoint.pt",
    } <= files
    assert Image.open(run / "sample.gif").n_frames == 2
    assert not [file for file in folder.glob("data/**/*") if file.is_file()]


@pytest.mark.skipif(sys.platform == "win32", reason="sends signals")
def test_stopped_at_any_moment_after_it_began(cgan, images, tmp_path):
    """There is a run to resume once it is printed how to; Ctrl-C is no error with a traceback."""
    command = [
        sys.executable,
        cgan.__file__,
        "--dataset",
        str(images),
        "--batch_size",
        "8",
        "--n_epochs",
        "100000",
    ]

    def start(*arguments):
        child = subprocess.Popen([*command, *arguments], cwd=tmp_path, **PIPES)
        while not child.stdout.readline().startswith("to continue after a stop: --resume"):
            assert child.poll() is None
        return child

    signal.signal(
        signal.SIGINT, signal.default_int_handler
    )  # or children of a background job would ignore it
    child = start()
    child.kill()
    assert child.communicate(timeout=60)[1] == ""
    assert checkpoint(tmp_path / "runs/cgan")["step"] == 0
    child = start("--resume", "runs/cgan")
    time.sleep(1)
    child.send_signal(signal.SIGINT)
    out, err = child.communicate(timeout=60)
    assert child.returncode == 130 and err == ""
    assert "a run that has begun continues with --resume RUN" in out


# ---------------------------------------------------------------- the README

README = (ROOT / "README.md").read_text()
COMMAND = re.compile(rf"(?:python )?\b({'|'.join(SCRIPTS)})\.py((?: (?:-{{1,2}}\w+|[\w./…-]+))*)")


def test_every_command_of_the_readme_can_be_typed(tmp_path, monkeypatch):
    """Options in full and values that they take; of commands that resume a run, what can be told without
    it.
    """
    monkeypatch.chdir(tmp_path)
    commands = [(name, shlex.split(arguments)) for name, arguments in COMMAND.findall(README)]
    assert len(commands) > 10
    for name, arguments in commands:
        script = importlib.import_module(name)
        options = vars(script.parse_args([]))
        arguments = [argument for argument in arguments if argument != "…"]
        for argument in arguments:
            if argument.startswith("--"):
                assert argument.removeprefix("--").removeprefix("no-") in options, (name, argument)
        if "--resume" not in arguments:
            script.parse_args(arguments)


def test_the_list_of_options_is_up_to_date():
    """If not: python docs/write_options.py"""
    sys.path.insert(0, str(ROOT / "docs"))
    write_options = importlib.import_module("write_options")
    assert (ROOT / "docs/options.md").read_text() == write_options.options_as_markdown()


def test_readme_links_lead_somewhere():
    for link in re.findall(r"\]\(([^)#]+)", README):
        assert link.startswith("https://") or Path(ROOT, link).exists(), link
