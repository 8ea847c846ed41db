"""Each mistake ends with one line on standard error that names it, and loses nothing; for each script."""

import os
import shutil
import sys

import pytest
import torch
from conftest import checkpoint, make_folder

NUMBERS = {
    "batch_size": ["0", "1", "1.5", "many"],
    "n_epochs": ["0", "-1", "nan"],
    "lr": ["0", "-1", "nan", "inf"],
    "b1": ["1", "-0.1"],
    "ema": ["1", "-0.1"],
    "img_size": ["0", "-32"],
    "sample_interval": ["0"],
    "n_cpu": ["0"],
    "seed": ["-1", "x"],
    "generate": ["0"],
}


def test_bad_numbers(script, refused, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for name, values in NUMBERS.items():
        for value in values:
            refused(script, f"--{name}={value}", says=[f"argument --{name}: "])
    assert not list(tmp_path.iterdir())


def test_unknown_options_and_choices(script, refused, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    refused(script, "--generat", says=["--generat"])
    refused(script, "--nosuch", "3", says=["unrecognized arguments: --nosuch 3"])
    if hasattr(script.parse_args([]), "arch"):
        refused(script, "--arch", "nosuch", says=["argument --arch", "'nosuch'"])
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("device", ["cuda:99", "meta", "gpu"])
def test_bad_device(cgan, refused, tmp_path, monkeypatch, device):
    monkeypatch.chdir(tmp_path)
    refused(
        cgan,
        "--dataset",
        "digits",
        "--device",
        device,
        says=[f"--device {device} does not work here", "use cpu"],
    )
    assert not list(tmp_path.iterdir())


@pytest.fixture
def no_run(script, refused, small, tmp_path):
    """A small training that must be refused, and leave no run's folder."""

    def check(*arguments, says):
        refused(script, *small, "--n_epochs", 1, *arguments, says=says)
        assert not (tmp_path / "runs").exists()

    return check


def test_data_set_asked_for_and_not_there(no_run):
    no_run("--dataset", "mnist", says=["mnist is not in", "cannot be downloaded"])


def test_folder_that_is_not_there(no_run):
    no_run("--dataset", "nosuch", says=['"nosuch" is not a folder', "digits, mnist"])


def test_damaged_images(no_run, tmp_path):
    """All are named, whichever of them are for the test."""
    folder = make_folder(tmp_path / "f", per_class=16)
    damaged = [folder / "blue" / "0.png", folder / "green" / "5.png", folder / "red" / "7.png"]
    for file in damaged:
        file.write_bytes(file.read_bytes()[:40])
    no_run("--dataset", folder, says=damaged)


def test_batch_larger_than_the_data(no_run):
    no_run("--batch_size", 55, says=["--batch_size 55", "images"])


def test_batch_that_processes_cannot_share(cgan, refused, small, monkeypatch, tmp_path):
    monkeypatch.setattr(cgan, "WORLD", 3)
    monkeypatch.setattr(cgan.dist, "is_initialized", lambda: True)
    refused(cgan, *small, "--batch_size", 8, says=["--batch_size 8", "3 processes"])
    assert not (tmp_path / "runs").exists()


def test_out_dir_is_a_file(cgan, refused, small, tmp_path):
    (tmp_path / "file").write_text("mine")
    for out_dir in ("file", "file/below"):
        refused(cgan, *small, "--out_dir", out_dir, says=[out_dir])
    assert (tmp_path / "file").read_text() == "mine"


@pytest.mark.skipif(not os.access("/proc/version", os.R_OK), reason="needs a folder that nobody can write")
def test_out_dir_cannot_be_written(cgan, refused, small):
    refused(cgan, *small, "--out_dir", "/proc/run", says=["/proc/run"])


# ---------------------------------------------------------------- runs


def resume_fails(script, refused, path, says):
    refused(script, "--resume", path, says=says)
    refused(script, "--resume", path, "--generate", 3, says=says)
    with pytest.raises(OSError, match=says[0]):
        script.load(path)


def test_no_run_there(script, refused, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    resume_fails(script, refused, tmp_path / "nosuch", ["nosuch", "is not the folder of a run"])
    resume_fails(script, refused, tmp_path, ["it has no checkpoint.pt"])
    unset = ""  # a variable of the shell
    resume_fails(script, refused, unset, ["is not the folder of a run"])


@pytest.mark.parametrize("size", [0, 100, 5000])
def test_checkpoint_truncated(cgan, refused, run, size):
    os.truncate(run / "checkpoint.pt", size)
    resume_fails(cgan, refused, run, ["checkpoint.pt", "cannot be read"])


@pytest.fixture
def run(cgan, small):
    """A run of cgan.py."""
    return cgan.train(cgan.parse_args([*small, "--n_epochs", "1"]))


def test_not_a_checkpoint(cgan, refused, tmp_path):
    for content in ({"weights": torch.ones(3)}, [1, 2]):
        torch.save(content, tmp_path / "checkpoint.pt")
        resume_fails(cgan, refused, tmp_path, ["checkpoint.pt", "cannot be read"])
    (tmp_path / "checkpoint.pt").write_text("hello")
    resume_fails(cgan, refused, tmp_path, ["checkpoint.pt", "cannot be read"])


def test_checkpoint_of_another_script(script, refused, trained):
    state = checkpoint(trained)
    torch.save(state | {"script": "another"}, trained / "checkpoint.pt")
    resume_fails(script, refused, trained, ["is a run of another.py", "use that"])


def test_resume_against_the_saved_option(script, refused, trained):
    options = checkpoint(trained)["options"]
    before = (trained / "checkpoint.pt").read_bytes()
    for name, value in (("lr", "0.5"), ("seed", "5"), ("batch_size", "4")):
        says = [f"--{name} {value}", f"this run has {options[name]}"]
        refused(script, "--resume", trained, f"--{name}", value, says=says)
    assert (trained / "checkpoint.pt").read_bytes() == before


def test_the_saved_option_again_is_no_contradiction(cgan, command, run):
    lr = checkpoint(run)["options"]["lr"]
    assert command(cgan, "--resume", run, "--lr", lr) == (0, [])


def test_resume_with_other_images(script, refused, images, trained, tmp_path):
    """Other labels, or epochs of another length, would go unnoticed."""
    folder = shutil.copytree(images, tmp_path / "f")
    before = (trained / "checkpoint.pt").read_bytes()
    resume = ["--resume", trained, "--n_epochs", 2, "--dataset", folder]
    new = [folder / "red/new.png", folder / "red/new2.png"]
    for file in new:
        shutil.copy(folder / "red/0.png", file)
    refused(script, *resume, says=["images of blue, green, red", "was started with"])
    for file in new:
        file.unlink()
    (folder / "blue").rename(folder / "yellow")
    refused(script, *resume, says=["green, red, yellow"])
    assert (trained / "checkpoint.pt").read_bytes() == before


def test_uses_need_a_run(script, refused, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for name in script.USES:
        refused(script, f"--{name}", 5, says=[f"--{name} needs --resume"])


# ---------------------------------------------------------------- disks and numbers that give out


def test_a_full_disk(cgan, refused, run):
    """Whatever file is the first that cannot be written is named, and the old one stays."""
    import resource

    before = {file: file.read_bytes() for file in run.rglob("*") if file.is_file()}
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    for limit, file in ((10_000, "checkpoint.pt"), (100, "checkpoint.pt")):
        resource.setrlimit(resource.RLIMIT_FSIZE, (limit, limits[1]))
        try:
            refused(
                cgan, "--resume", run, "--n_epochs", 2, says=[file, "cannot be written", "File too large"]
            )
        finally:
            resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert {file: file.read_bytes() for file in run.rglob("*") if file.is_file()} == before


if sys.platform == "win32":
    test_a_full_disk = pytest.mark.skip(reason="needs limits on the size of files")(test_a_full_disk)


def test_the_first_error_is_told(cgan, refused, run, monkeypatch):
    """A picture that cannot be written is named, not the checkpoint; and the good ones stay."""
    before = sorted(run.glob("images/*"))

    def full(images, file, **options):
        file.write_bytes(b"PNG")
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(cgan, "save_image", full)
    refused(cgan, "--resume", run, "--n_epochs", 2, says=["images/sample_", "No space left"])
    assert sorted(run.glob("images/*")) == before
    assert not list(run.glob(".*"))


def test_a_loss_that_is_not_finite(cgan, refused, small, tmp_path, monkeypatch):
    monkeypatch.setattr(cgan, "CHECKPOINT_SECONDS", 0)
    refused(cgan, *small, "--n_epochs", 50, "--lr", 9e17, says=["is not finite", "lower --lr"])
    state = checkpoint(tmp_path / "runs/cgan")
    weights = [t for part in state.values() if isinstance(part, dict) for t in part.values()]
    weights = [t for t in weights if isinstance(t, torch.Tensor) and t.is_floating_point()]
    assert weights and all(t.isfinite().all() for t in weights)


def test_a_programmers_mistake_keeps_its_traceback(cgan, small, command, monkeypatch):
    def broken(*_):
        raise ValueError("a mistake of the loss")

    monkeypatch.setattr(cgan, "average_gradients", broken)
    with pytest.raises(ValueError, match="a mistake of the loss"):
        command(cgan, *small)


def test_float_images_of_ones_own(cgan, small, monkeypatch):
    """Images in [0, 1] would train on next to nothing: it is told what is wanted."""
    load_data = cgan.load_data

    def load_floats(opt):
        images, labels, classes = load_data(opt)
        return images / 255, labels, classes

    monkeypatch.setattr(cgan, "load_data", load_floats)
    with pytest.raises(TypeError, match="whole numbers"):
        cgan.train(cgan.parse_args(small))
