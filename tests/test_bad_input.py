"""Each mistake ends with one line on standard error that names it, and loses nothing."""

import os
import shutil
import sys
from pathlib import Path

import pytest
import torch
from conftest import SMALL, make_folder
from PIL import Image
from torch.utils.data import DataLoader

NUMBERS = {
    "batch_size": ["0", "1", "-5", "1.5", "nan", "inf", "many"],
    "n_epochs": ["-1", "nan"],
    "lr": ["0", "-1", "nan", "inf", "x"],
    "b1": ["1", "-0.1", "nan", "inf"],
    "b2": ["1", "-0.1", "nan"],
    "ema": ["1", "-0.1"],
    "latent_dim": ["0", "-1"],
    "img_size": ["0", "-32", "nan"],
    "channels": ["0", "2", "-1"],
    "n_classes": ["0", "-1"],
    "sample_interval": ["0", "-1"],
    "n_cpu": ["-1"],
    "seed": ["-1", "x"],
    "generate": ["0", "-1"],
    "arch": ["nosuch"],
}


@pytest.mark.parametrize("name, value", [(name, value) for name, values in NUMBERS.items() for value in values])
def test_bad_option(script, refused, tmp_path, monkeypatch, name, value):
    monkeypatch.chdir(tmp_path)
    refused(script, f"--{name}={value}", says=[f"--{name}"])
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("device", ["cuda:99", "meta", "gpu"])
def test_bad_device(script, refused, tmp_path, monkeypatch, device):
    monkeypatch.chdir(tmp_path)
    refused(script, "--device", device, says=[f"--device {device}", "auto"])
    assert not list(tmp_path.iterdir())


@pytest.fixture
def no_run(script, refused, small, tmp_path):
    """A small training that must be refused, and leave no run folder."""

    def check(*arguments, says):
        refused(script, *small, "--n_epochs", 1, *arguments, says=says)
        assert not (tmp_path / "runs").exists()

    return check


def test_data_set_asked_for_and_not_there(script, refused, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    refused(script, "--dataset", "mnist", says=["mnist", "data", "--dataset digits"])
    assert not (tmp_path / "runs").exists()


def test_folder_that_is_not_there(no_run):
    no_run("--dataset", "nosuch", says=["--dataset nosuch", "digits"])


def test_folder_without_images(no_run, tmp_path):
    (tmp_path / "f" / "a").mkdir(parents=True)
    no_run("--dataset", tmp_path / "f", says=["Found no valid file", "a"])


def test_folder_without_sub_folders(no_run, tmp_path):
    (tmp_path / "f").mkdir()
    Image.new("L", (4, 4)).save(tmp_path / "f" / "x.png")
    no_run("--dataset", tmp_path / "f", says=[tmp_path / "f", "class folder"])


def test_a_run_is_no_data_set(script, no_run, images, tmp_path):
    """But for pixelcnn.py, if it is one of vqvae.py."""
    shutil.copytree(images, tmp_path / "f")
    (tmp_path / "f" / "checkpoint.pt").touch()
    says = "python vqvae.py --resume" if script.__name__ == "pixelcnn" else "nor a folder of images"
    no_run("--dataset", tmp_path / "f", says=[tmp_path / "f", says])


def spoil(file):
    file.write_bytes(file.read_bytes()[:40])
    return file


def test_broken_image(no_run, tmp_path):
    folder = make_folder(tmp_path / "f", per_class=16)
    no_run("--dataset", folder, says=[spoil(folder / "green" / "5.png")])


def test_broken_image_read_by_another_process(cgan, refused, tmp_path, monkeypatch):
    """Which sends its traceback: one line of it is printed."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(os, "cpu_count", lambda: 2)
    folder = make_folder(tmp_path / "f", per_class=700)
    broken, found = spoil(folder / "green" / "5.png"), []
    monkeypatch.setattr(cgan, "DataLoader", lambda *args, **k: found.append(k["num_workers"]) or DataLoader(*args, **k))
    refused(cgan, "--dataset", folder, says=[broken])
    assert found == [2] and not (tmp_path / "runs").exists()


def test_16_bit_images(no_run, images, tmp_path):
    shutil.copytree(images, tmp_path / "f")
    Image.new("I;16", (12, 12), 40_000).save(tmp_path / "f" / "red" / "deep.png")
    no_run("--dataset", tmp_path / "f", says=[tmp_path / "f" / "red" / "deep.png", "8 bits"])


def test_classes_against_the_data(no_run):
    no_run("--n_classes", 4, says=["--n_classes 4", "3"])


def test_batch_larger_than_the_data(no_run):
    no_run("--batch_size", 55, says=["--batch_size 55", "images"])


def test_batch_that_processes_cannot_share(script, no_run, monkeypatch):
    monkeypatch.setattr(script, "WORLD", 3)
    no_run("--batch_size", 8, says=["--batch_size 8", "3 processes"])


def test_amp_where_there_is_none(script, no_run, monkeypatch):
    def autocast(*_):
        raise RuntimeError("User specified an unsupported autocast device_type")

    monkeypatch.setattr(torch, "autocast", autocast)
    no_run("--amp", says=["--amp"])


def test_out_dir_is_a_file(script, refused, small, tmp_path):
    (tmp_path / "file").write_text("mine")
    for out_dir in ("file", "file/below"):
        refused(script, *small, "--out_dir", out_dir, says=[out_dir])
    assert (tmp_path / "file").read_text() == "mine"


@pytest.mark.skipif(not os.access("/proc/version", os.R_OK), reason="needs a folder that nobody can write")
def test_out_dir_cannot_be_written(script, refused, small):
    refused(script, *small, "--out_dir", "/proc/run", says=["/proc/run"])


@pytest.fixture
def run(script, small):
    return script.train(script.parse_args([*small, "--n_epochs", "0"]))


def resume_fails(script, refused, path, says):
    refused(script, "--resume", path, says=says)
    refused(script, "--resume", path, "--generate", 3, says=says)
    with pytest.raises(OSError, match=str(says[0])):
        script.load(path)


def test_checkpoint_missing(script, refused, tmp_path):
    resume_fails(script, refused, tmp_path / "nosuch", ["nosuch"])
    resume_fails(script, refused, tmp_path, ["checkpoint.pt"])


@pytest.mark.parametrize("size", [0, 100, 5000])
def test_checkpoint_truncated(script, refused, run, size):
    os.truncate(run / "checkpoint.pt", size)
    resume_fails(script, refused, run, ["checkpoint.pt"])


def test_not_a_checkpoint(script, refused, tmp_path):
    for content in ({"weights": torch.ones(3)}, [1, 2]):
        torch.save(content, tmp_path / "checkpoint.pt")
        resume_fails(script, refused, tmp_path, ["checkpoint.pt"])
    (tmp_path / "checkpoint.pt").write_text("hello")
    resume_fails(script, refused, tmp_path, ["checkpoint.pt"])


def test_checkpoint_of_another_script(script, refused, run):
    state = torch.load(run / "checkpoint.pt", weights_only=True)
    torch.save(state | {"script": "another"}, run / "checkpoint.pt")
    resume_fails(script, refused, run, ["checkpoint.pt", "another.py"])


@pytest.mark.parametrize(
    "name, value", [("lr", "0.5"), ("img_size", "24"), ("seed", "5"), ("batch_size", "4"), ("dataset", "digits")]
)
def test_resume_against_the_saved_option(script, command, refused, run, name, value):
    saved = torch.load(run / "checkpoint.pt", weights_only=True)["options"][name]
    before = (run / "checkpoint.pt").read_bytes()
    refused(script, "--resume", run, f"--{name}", value, says=[f"--{name} {value}", saved])
    assert (run / "checkpoint.pt").read_bytes() == before
    assert command(script, "--resume", run, f"--{name}", saved) == (0, [])  # the same again is no contradiction


def test_resume_with_other_classes(script, refused, images, small, tmp_path):
    """Renamed folders would be other labels, silently."""
    shutil.copytree(images, tmp_path / "f")
    run = script.train(script.parse_args([*small, "--dataset", str(tmp_path / "f"), "--n_epochs", "0"]))
    (tmp_path / "f" / "blue").rename(tmp_path / "f" / "yellow")
    refused(script, "--resume", run, says=["yellow"])


def test_generate_without_resume(script, refused, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    refused(script, "--generate", 5, says=["--generate", "--resume"])


def test_disk_full_while_a_checkpoint_is_written(script, refused, run, monkeypatch):
    before = (run / "checkpoint.pt").read_bytes()

    def full(state, file):
        Path(file).write_bytes(b"half of it")
        raise RuntimeError("PytorchStreamWriter failed writing file data/1: No space left on device")

    monkeypatch.setattr(torch, "save", full)
    refused(script, "--resume", run, "--n_epochs", 2, says=["checkpoint.pt", "No space left"])
    assert (run / "checkpoint.pt").read_bytes() == before
    assert not (run / "checkpoint.tmp").exists()


@pytest.mark.skipif(sys.platform == "win32", reason="needs limits on the size of files")
def test_files_that_may_not_grow(cgan, images, refused, tmp_path):
    """The same with what torch.save really does when it cannot write on."""
    options = ["--dataset", str(images), *SMALL, "--out_dir", str(tmp_path / "run")]
    run = cgan.train(cgan.parse_args([*options, "--n_epochs", "1"]))
    before = (run / "checkpoint.pt").read_bytes()
    import resource

    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, limits[1]))
    try:
        refused(cgan, "--resume", run, "--n_epochs", 2, says=["checkpoint.pt cannot be written"])
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert (run / "checkpoint.pt").read_bytes() == before and not (run / "checkpoint.tmp").exists()


def test_a_loss_that_is_not_finite(script, refused, small, tmp_path):
    refused(script, *small, "--n_epochs", 50, "--lr", 1e9, says=["finite", "batch", "anew"])
    state = torch.load(tmp_path / "runs" / script.__name__ / "checkpoint.pt", weights_only=True)
    parts = [part for part in state.values() if isinstance(part, dict)]
    weights = [t for part in parts for t in part.values() if isinstance(t, torch.Tensor)]
    assert weights and all(t.isfinite().all() for t in weights if t.is_floating_point())


@pytest.mark.parametrize("spoilt", ["a loss", "a weight"])
def test_what_is_not_finite_is_not_saved(script, refused, small, tmp_path, monkeypatch, spoilt):
    """The last step of an epoch can spoil the weights when its loss was still finite."""
    after_batch = script.after_batch

    def after_batch_and_spoil(run, opt, **losses):
        after_batch(run, opt, **losses)
        if run.done == 6 and spoilt == "a loss":
            run.totals = {name: total * float("nan") for name, total in run.totals.items()}
        elif run.done == 6:
            next(next(iter(run.parts.values())).parameters()).data.fill_(float("nan"))

    monkeypatch.setattr(script, "after_batch", after_batch_and_spoil)
    refused(script, *small, "--n_epochs", 1, says=["a loss or weight is not finite", "batch 6"])
    state = torch.load(tmp_path / "runs" / script.__name__ / "checkpoint.pt", weights_only=True)
    assert state["position"][0] == 0


def test_float_images_of_ones_own(script, small, monkeypatch):
    """A loader of images in [0, 1] would train on next to nothing: it is told what is wanted."""
    load_data = script.load_data
    monkeypatch.setattr(script, "load_data", lambda *a, **k: (lambda x, y: (x / 255, y))(*load_data(*a, **k)))
    with pytest.raises(TypeError, match="uint8"):
        script.train(script.parse_args([*small, "--n_epochs", "1"]))
