"""torchrun: two processes train one model, as one process does; and one of them dies.

This file is also the program that torchrun starts: see `work`.
"""

import importlib
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from conftest import SCRIPTS, SMALL, SMALLER, checkpoint
from torch import nn

N_STEPS = 12  # of 2 epochs, as `images` has 54 of them
TWO_EPOCHS = ["--n_epochs", "2", "--sample_interval", "12"]
DIES_AT = 9  # the step in which the second process is killed
END = 300  # seconds after which a test gives up waiting

# Left out, for two processes to train as one: what is drawn at random, or looks at all images of a process.
AS_ONE = {
    "pixelcnn": ["--lr", "1e-4"],  # a loss summed over pixels: 0.1 would blow rounding up
    "pixelcnnpp": ["--lr", "1e-4", "--dropout", "0"],
    "vae": ["--likelihood", "gaussian"],
    "vqvae": ["--no-restart"],  # unused codes start again at images of the first process
}


def options(name: str, images: str, *more: str) -> list[str]:
    return ["--dataset", images, *SMALL, *SMALLER[name], *more]


# ---------------------------------------------------------------- what torchrun starts


def work(images: str) -> None:
    """Train each script, as it is and as `train_as_one`; then be killed in a third training of cgan.

    What a process has for itself is saved as NAME.RANK.pt.
    """
    for name in SCRIPTS:
        script = importlib.import_module(name)
        seen = train_and_look(script, options(name, images, *TWO_EPOCHS))
        train_as_one(script, options(name, images, "--out_dir", f"as_one/{name}"))
        torch.save(seen, f"{name}.{script.RANK}.pt")

    cgan = importlib.import_module("cgan")
    cgan.CHECKPOINT_SECONDS = 0
    end_step = cgan.Run.end_step

    def end_step_or_die(run, **metrics):
        if cgan.RANK == 1 and run.step + 1 == DIES_AT:
            os.kill(os.getpid(), signal.SIGKILL)
        end_step(run, **metrics)

    cgan.Run.end_step = end_step_or_die
    cgan.train(cgan.parse_args(options("cgan", images, "--n_epochs", "1000", "--out_dir", "killed")))


def train_and_look(script, arguments: list[str]) -> dict:
    """Train; return the folder, the files written, random numbers of each step, and the last weights."""
    seen = {"step": [], "epoch": [], "files": [], "weights": {}}
    seed = script.seed
    replacing = script.replacing
    finish = script.Run.finish

    def seed_and_look(*key):
        seed(*key)
        if len(key) > 1 and key[1] in seen:
            seen[key[1]].append(torch.rand(4))
            seed(*key)

    def look_and_replace(file):
        seen["files"].append(file.name)
        return replacing(file)

    def look_and_finish(run):
        for name, part in run.parts.items():
            if isinstance(part, nn.Module):
                seen["weights"] |= {f"{name}.{key}": weight for key, weight in part.named_parameters()}
        finish(run)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(script, "seed", seed_and_look)
        patch.setattr(script, "replacing", look_and_replace)
        patch.setattr(script.Run, "finish", look_and_finish)
        seen["folder"] = script.train(script.parse_args(arguments))
    return seen


def train_as_one(script, arguments: list[str]) -> Path:
    """Train for an epoch so that any number of processes must come to the same weights, up to rounding.

    Batch norm, whose statistics are those of a process, is left out, and so is vae's variance. All processes
    draw the noise of the whole batch, and each takes its rows. Adam, which makes much of rounding in small
    gradients, is SGD.
    """
    seed = script.seed
    randn = torch.randn

    def no_batch_norm(n_channels):
        return nn.Identity()

    def sgd(parameters, *args, **kwargs):
        return torch.optim.SGD(parameters)

    def seed_alike(*key):
        seed(*key[:3])  # without the rank
        torch.randn = rows_of_randn if "step" in key else randn

    def rows_of_randn(n, *size, **kwargs):
        return randn(n * script.WORLD, *size, **kwargs)[script.RANK :: script.WORLD]

    def no_spread(h, **kwargs):  # gan's D looks at how much the images of a process vary
        return 0 * h.sum(dim=0)

    def fixed_variance(x, logits):
        return torch.tensor(0.1)

    def rows_of_randn_like(x):
        return rows_of_randn(*x.shape)

    more = ["--n_epochs", "1", "--lr", "0.1", "--sample_interval", "1000", *AS_ONE.get(script.__name__, [])]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(nn, "BatchNorm1d", no_batch_norm)
        patch.setattr(nn, "BatchNorm2d", no_batch_norm)
        patch.setattr(torch.optim, "Adam", sgd)
        patch.setattr(script, "seed", seed_alike)
        patch.setattr(torch, "randn", randn)  # afterwards
        patch.setattr(torch, "randn_like", rows_of_randn_like)
        patch.setattr(torch.Tensor, "std", no_spread)
        patch.setattr(script, "best_variance", fixed_variance, raising=False)
        return script.train(script.parse_args([*arguments, *more]))


# ---------------------------------------------------------------- tests


@pytest.fixture(scope="module")
def two(two_processes):
    """The folder in which two processes have done the work above, and what they have printed."""
    folder, child = two_processes
    try:
        printed, _ = child.communicate(timeout=END)
    except subprocess.TimeoutExpired:
        child.terminate()
        pytest.fail(child.communicate(timeout=30)[0])
    return folder, printed, child.returncode


@pytest.fixture
def seen(two, script):
    """What the first and the second process had for themselves."""
    folder, printed, _ = two
    files = [folder / f"{script.__name__}.{rank}.pt" for rank in (0, 1)]
    assert all(file.exists() for file in files), printed
    return [torch.load(file, weights_only=False) for file in files]


def test_two_processes_train_as_one(two, seen, script, images, tmp_path, monkeypatch):
    """Each has its rows of every batch, and gradients are averaged."""
    monkeypatch.chdir(tmp_path)
    run = train_as_one(script, options(script.__name__, str(images)))
    one = checkpoint(run)
    both = checkpoint(two[0] / "as_one" / script.__name__)
    assert one["step"] == both["step"] == N_STEPS // 2
    compared = 0
    for name, part in one.items():
        weights = part if isinstance(part, dict) else {}
        for key, value in weights.items():
            if isinstance(value, torch.Tensor):
                what = f"{name} {key}"
                torch.testing.assert_close(both[name][key], value, rtol=1e-4, atol=1e-5, msg=what)
                compared += 1
    assert compared > 4


def test_both_have_the_same_weights_in_the_end(seen):
    """Buffers may differ: the statistics of batch norm are of the images that a process has seen."""
    first, second = (process["weights"] for process in seen)
    assert len(first) > 4 and first.keys() == second.keys()
    for name, weight in first.items():
        assert torch.equal(weight, second[name]), name


def test_each_has_its_own_noise_and_the_same_order(seen):
    first, second = (torch.stack(process["step"]) for process in seen)
    assert len(first) == N_STEPS
    assert len(torch.cat([first, second]).unique(dim=0)) == 2 * N_STEPS
    first, second = (torch.stack(process["epoch"]) for process in seen)
    assert torch.equal(first, second) and len(first.unique(dim=0)) == 2


def test_both_return_the_folder_that_the_first_made(two, seen, script):
    folder, printed, _ = two
    expected = Path(f"runs/{script.__name__}-2")
    assert [process["folder"] for process in seen] == [expected, expected]
    assert list((folder / "runs").glob(f"{script.__name__}-*")) == [folder / expected]
    assert printed.count(f'to continue after a stop: --resume "{expected}"') == 1


def test_only_the_first_writes(seen):
    first, second = (process["files"] for process in seen)
    assert {"checkpoint.pt", "log.csv", f"sample_{N_STEPS:08}.png"} <= set(first)
    assert second == []


def test_one_process_resumes_what_two_began(two, seen, script, monkeypatch):
    monkeypatch.chdir(two[0])
    run = f"runs/{script.__name__}-2"
    script.train(script.parse_args(["--resume", run, "--n_epochs", "3"]))
    assert [row["step"] for row in checkpoint(run)["log"]] == [N_STEPS, N_STEPS + 6]


def test_a_process_that_is_killed_ends_the_other(two, cgan, monkeypatch):
    """And leaves a checkpoint, at most one step old, to go on from."""
    folder, printed, status = two
    monkeypatch.chdir(folder)
    assert status != 0 and "SIGKILL" in printed
    step = checkpoint("killed")["step"]
    assert step in (DIES_AT - 1, DIES_AT)
    cgan.train(cgan.parse_args(["--resume", "killed", "--n_epochs", "2"]))
    assert checkpoint("killed")["step"] == N_STEPS


def test_generating_is_refused(script, refused, monkeypatch):
    """Each process would write everything."""
    monkeypatch.setattr(script, "WORLD", 2)
    refused(script, "--resume", "runs/any", "--generate", 1, says=["--generate", "torchrun"])


@pytest.mark.parametrize(
    "batch_size, processes, works", [(6, 3, True), (8, 3, False), (3, 3, False), (8, 2, True)]
)
def test_a_batch_is_shared_evenly(cgan, monkeypatch, batch_size, processes, works):
    """And each process has two images or more, as batch norm needs them."""
    monkeypatch.setattr(cgan, "WORLD", processes)
    images = torch.zeros(20, 1, 8, 8, dtype=torch.uint8)
    labels = torch.zeros(20, dtype=torch.long)
    if works:
        cgan.make_loader(images, labels, batch_size)
    else:
        with pytest.raises(cgan.InputError, match=f"--batch_size {batch_size}.* {processes} processes"):
            cgan.make_loader(images, labels, batch_size)


if __name__ == "__main__":
    work(sys.argv[1])
