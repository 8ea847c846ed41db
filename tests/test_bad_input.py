"""Each mistake ends with one line on standard error that names it, and loses nothing."""

import os
from pathlib import Path

import pytest
import torch
from conftest import make_folder, run_script
from PIL import Image

NUMBERS = {
    "batch_size": ["0", "1", "-5", "1.5", "nan", "inf", "many"],
    "n_epochs": ["-1", "nan"],
    "lr": ["0", "-1", "nan", "inf", "x"],
    "b1": ["1", "-0.1", "nan", "inf"],
    "b2": ["1", "-0.1", "nan"],
    "latent_dim": ["0", "-1"],
    "img_size": ["0", "-32", "nan"],
    "channels": ["0", "2", "-1"],
    "n_classes": ["0", "-1"],
    "sample_interval": ["0", "-1"],
    "n_cpu": ["-1"],
    "seed": ["-1", "x"],
    "generate": ["0", "-1"],
    "device": ["cuda:99", "meta", "gpu"],
    "dataset": ["nosuch"],
    "arch": ["nosuch"],
}


@pytest.mark.parametrize("name, value", [(name, value) for name, values in NUMBERS.items() for value in values])
def test_bad_option(script, command, tmp_path, monkeypatch, name, value):
    monkeypatch.chdir(tmp_path)
    status, lines = command(script, f"--{name}={value}")
    assert status == 2 and len(lines) == 1 and f"--{name}" in lines[0], lines
    assert not list(tmp_path.iterdir())


def test_no_traceback_in_a_process(cgan, tmp_path):
    done = run_script(Path(cgan.__file__), "--lr", "nan", cwd=tmp_path)
    assert done.returncode == 2 and done.stderr.startswith("cgan.py: error: argument --lr: nan")
    assert done.stderr.count("\n") == 1 and done.stdout == ""


@pytest.fixture
def refused(script, command, small, tmp_path):
    """Run a small training that must be refused: one line that says all of `says`, status 1, no run folder left."""

    def check(*arguments, says):
        status, lines = command(script, *small, "--n_epochs", 1, *arguments)
        assert status == 1 and len(lines) == 1, lines
        assert all(word in lines[0] for word in says), lines
        assert not (tmp_path / "runs").exists()

    return check


def test_data_set_asked_for_and_not_there(cgan, command, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    status, lines = command(cgan, "--dataset", "mnist")
    assert status == 1 and len(lines) == 1
    names = ["train-images-idx3-ubyte", "train-labels-idx1-ubyte", "t10k-images-idx3-ubyte", "t10k-labels-idx1-ubyte"]
    assert all(word in lines[0] for word in [*names, str(Path("data/MNIST/raw")), "--dataset digits"])


def test_folder_without_images(refused, tmp_path):
    (tmp_path / "f" / "a").mkdir(parents=True)
    refused("--dataset", tmp_path / "f", says=[str(tmp_path / "f"), "Found no valid file"])


def test_folder_without_sub_folders(refused, tmp_path):
    (tmp_path / "f").mkdir()
    Image.new("L", (4, 4)).save(tmp_path / "f" / "x.png")
    refused("--dataset", tmp_path / "f", says=[str(tmp_path / "f"), "sub-folder"])


@pytest.mark.parametrize("processes", [0, 2])
def test_broken_image(refused, tmp_path, monkeypatch, processes):
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: {0, 1}, raising=False)
    folder = make_folder(tmp_path / "f", per_class=700 if processes else 16)
    (folder / "green" / "5.png").write_bytes((folder / "green" / "5.png").read_bytes()[:40])
    refused("--dataset", folder, "--n_cpu", processes, says=[str(folder / "green" / "5.png")])


def test_channels_and_classes_against_the_data(refused):
    refused("--channels", 1, says=["--channels 1", "3"])
    refused("--n_classes", 4, says=["--n_classes 4", "3"])


def test_batch_larger_than_the_data(refused):
    refused("--batch_size", 55, says=["--batch_size 55", "images to train on"])


def test_batch_that_processes_cannot_share(script, refused, monkeypatch):
    monkeypatch.setattr(script, "WORLD", 3)
    monkeypatch.setattr(script, "join_processes", lambda: None)
    refused("--batch_size", 8, says=["--batch_size 8", "3 processes"])


def test_out_dir_is_a_file(script, command, small, tmp_path):
    (tmp_path / "file").write_text("mine")
    for out_dir in ("file", "file/below"):
        status, lines = command(script, *small, "--out_dir", out_dir)
        assert status == 1 and len(lines) == 1 and f"--out_dir {out_dir}" in lines[0]
    assert (tmp_path / "file").read_text() == "mine"


@pytest.mark.skipif(not os.access("/proc/version", os.R_OK), reason="needs a folder that nobody can write")
def test_out_dir_cannot_be_written(script, command, small):
    status, lines = command(script, *small, "--out_dir", "/proc/run")
    assert status == 1 and len(lines) == 1 and "--out_dir /proc/run" in lines[0]


@pytest.fixture
def run(script, small):
    return script.train(script.parse_args([*small, "--n_epochs", "1"]))


def resume_fails(script, command, path, says):
    for load in (lambda: command(script, "--resume", path), lambda: command(script, "--resume", path, "--generate", 3)):
        status, lines = load()
        assert status == 1 and len(lines) == 1 and all(word in lines[0] for word in says), lines
    with pytest.raises(script.UserError, match=says[0]):
        script.load(path)


def test_checkpoint_missing(script, command, tmp_path):
    resume_fails(script, command, tmp_path / "nosuch", ["nosuch"])
    resume_fails(script, command, tmp_path, ["checkpoint.pt"])


@pytest.mark.parametrize("size", [0, 100, 5000])
def test_checkpoint_truncated(script, command, run, size):
    os.truncate(run / "checkpoint.pt", size)
    resume_fails(script, command, run, ["checkpoint.pt"])


def test_not_a_checkpoint(script, command, tmp_path):
    (tmp_path / "a.pt").write_text("hello")
    torch.save({"weights": torch.ones(3)}, tmp_path / "b.pt")
    torch.save([1, 2], tmp_path / "c.pt")
    for name in ("a.pt", "b.pt", "c.pt"):
        resume_fails(script, command, tmp_path / name, [name])


def test_checkpoint_of_another_script(script, command, run):
    state = torch.load(run / "checkpoint.pt", weights_only=True)
    torch.save(state | {"script": "another"}, run / "checkpoint.pt")
    resume_fails(script, command, run, ["checkpoint.pt", "another.py"])


@pytest.mark.parametrize(
    "name, value", [("lr", "0.5"), ("latent_dim", "9"), ("seed", "5"), ("batch_size", "4"), ("dataset", "digits")]
)
def test_resume_against_the_saved_option(script, command, run, name, value):
    saved = torch.load(run / "checkpoint.pt", weights_only=True)["options"][name]
    before = (run / "checkpoint.pt").read_bytes()
    status, lines = command(script, "--resume", run, f"--{name}", value)
    assert status == 2 and len(lines) == 1 and f"--{name} {value}" in lines[0] and str(saved) in lines[0]
    assert command(script, "--resume", run, f"--{name}", saved) == (0, [])  # the same again is no contradiction
    assert (run / "checkpoint.pt").stat().st_size > 0 and before


def test_generate_without_resume(script, command, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    status, lines = command(script, "--generate", 5)
    assert status == 2 and len(lines) == 1 and "--generate" in lines[0] and "--resume" in lines[0]


def test_disk_full_while_a_checkpoint_is_written(script, command, run, monkeypatch):
    before = (run / "checkpoint.pt").read_bytes()

    def full(state, file):
        file.write(b"half of it")
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(torch, "save", full)
    status, lines = command(script, "--resume", run, "--n_epochs", 2)
    assert status == 1 and len(lines) == 1 and "checkpoint.pt" in lines[0] and "No space left" in lines[0]
    assert (run / "checkpoint.pt").read_bytes() == before
    assert not (run / "checkpoint.tmp").exists()


def test_a_loss_that_is_not_finite(script, command, small, tmp_path):
    status, lines = command(script, *small, "--n_epochs", 50, "--lr", 1e9)
    assert status == 1 and len(lines) == 1 and "finite" in lines[0] and "epoch" in lines[0] and "batch" in lines[0], (
        lines
    )
    state = torch.load(tmp_path / "runs" / script.__name__ / "checkpoint.pt", weights_only=True)
    weights = [
        t for part in state.values() if isinstance(part, dict) for t in part.values() if isinstance(t, torch.Tensor)
    ]
    assert weights and all(t.isfinite().all() for t in weights if t.is_floating_point())


def test_a_weight_that_is_not_finite_is_not_saved(script, command, small, tmp_path, monkeypatch):
    """The last step of an epoch can spoil the weights when its loss was still finite."""
    record = script.Run.record

    def record_and_spoil(run, **losses):
        record(run, **losses)
        if run.batches_done == 6:
            next(next(iter(run.models.values())).parameters()).data.fill_(float("nan"))

    monkeypatch.setattr(script.Run, "record", record_and_spoil)
    monkeypatch.setattr(script, "test", lambda *_: {}, raising=False)  # vae.py would find it in its test
    status, lines = command(script, *small, "--n_epochs", 1)
    assert status == 1 and len(lines) == 1 and "a weight is not finite" in lines[0]
    state = torch.load(tmp_path / "runs" / script.__name__ / "checkpoint.pt", weights_only=True)
    assert state["position"]["batches_done"] == 0
