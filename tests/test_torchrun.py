"""torchrun: several processes do, up to rounding, what one does."""

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch

EXTRA = {"cgan": ["--arch", "mlp"], "gan": ["--arch", "conv"], "vae": ["--hidden_dims", "8", "16"]}


def torchrun(script, *arguments):
    """The script in two processes, started and not waited for."""
    launcher = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2", script.__file__]
    pipes = dict(stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    return subprocess.Popen([*launcher, *arguments], env=os.environ | {"OMP_NUM_THREADS": "1"}, **pipes)


def gradients(run):
    """Adam's decaying mean of each gradient, and the variances that batch norm has seen."""
    state = torch.load(Path(run, "checkpoint.pt"), weights_only=True)
    for name in {"optimizer", "opt_G", "opt_D"} & state.keys():
        for i, adam in state[name]["state"].items():
            yield f"{name} {i}", adam["exp_avg"]
    for name in {"model", "G", "G_avg"} & state.keys():
        yield from ((key, value) for key, value in state[name].items() if key.endswith("running_var"))


def test_two_processes_train_like_one(script, small):
    """The first step has the same gradients, batch norm and dropout included; one process goes on where two stopped.

    Later steps drift apart: Adam makes whole steps of rounding errors where a gradient is 0.
    """
    arguments = [*small, "--batch_size", "48", "--n_epochs", "1", "--device", "cpu", *EXTRA[script.__name__]]
    one = script.train(script.parse_args(arguments))
    child = torchrun(script, *arguments, "--out_dir", "two")
    out, err = child.communicate()
    assert child.returncode == 0, err
    assert out.count("writing to two") == 1 and not Path("two-2").exists()
    assert len(Path("two/log.csv").read_text().splitlines()) == 2
    pairs = list(zip(gradients(one), gradients("two"), strict=True))
    rounding = 1e-4 * max(a.abs().max().item() for (_, a), _ in pairs)
    for (name, a), (_, b) in pairs:
        torch.testing.assert_close(a, b, rtol=0, atol=rounding, msg=lambda m, name=name: f"{name}: {m}")
    script.train(script.parse_args(["--resume", "two", "--n_epochs", "2"]))
    assert len(Path("two/log.csv").read_text().splitlines()) == 3


@pytest.mark.skipif(sys.platform != "linux", reason="kills a process by its name in /proc")
def test_a_worker_that_dies(cgan, small):
    child = torchrun(cgan, *small, "--n_epochs", "100000", "--device", "cpu", "--out_dir", "two")
    while not Path("two/log.csv").exists():
        assert child.poll() is None, child.communicate()
        time.sleep(0.1)
    children = Path(f"/proc/{child.pid}/task/{child.pid}/children").read_text().split()
    workers = [int(pid) for pid in children if b"cgan.py" in Path(f"/proc/{pid}/cmdline").read_bytes()]
    os.kill(workers[-1], signal.SIGKILL)
    _, err = child.communicate()
    assert child.returncode != 0 and ("--resume" in err or "SIGKILL" in err or "Signal 9" in err), err
    cgan.load("two")
