"""The scripts as users run them, in processes of their own.

The processes are those of the fixture `children`, which begin with the first test of all.
"""

import signal
import subprocess
import sys
import time

import pytest
from conftest import PIPES, checkpoint


def test_importing_does_nothing(children):
    folders, processes = children
    process = processes["imports"]
    assert (*process.communicate(timeout=240), process.returncode) == ("", "", 0)
    assert not list(folders["imports"].iterdir())


@pytest.fixture(scope="module")
def output(children):
    """What cgan, and the others one after another, have printed."""
    _, processes = children
    printed = {}
    for name in ("cgan", "others"):
        printed[name], errors = processes[name].communicate(timeout=240)
        assert processes[name].returncode == 0, errors
    return printed


def test_a_script_alone_in_an_empty_folder(script, children, output):
    folders, _ = children
    folder = folders[script.__name__]
    steps = (10, 20) if script.__name__ == "cgan" else (4, 6)
    run = folder / "runs" / "mine"
    files = {str(file.relative_to(run)) for file in run.rglob("*")}
    wanted = {"log.csv", "checkpoint.pt"}
    assert wanted | {f"images/sample_{step:08}.png" for step in steps} <= files
    assert not [file for file in folder.glob("data/**/*") if file.is_file()]


def test_without_network_and_data(output):
    """It trains on the built-in digits, and says so."""
    lines = output["cgan"].splitlines()
    assert lines[0].startswith("warning: mnist is not in") and "refused" in lines[0]
    assert lines[1].startswith("digits: 10000 images (0: 1000, 1: 1000")
    assert "\r" not in output["cgan"]


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
    assert "a training that has begun continues with --resume RUN" in out
