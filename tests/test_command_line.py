"""The scripts as users run them, in processes of their own.

The processes are those of the fixture `children`, which begin with the first test of all.
"""

import signal
import subprocess
import sys
import time

import pytest
from conftest import PIPES, checkpoint
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
