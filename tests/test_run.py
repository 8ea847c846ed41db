"""What a run leaves and how it goes on: grids, log, checkpoint, resuming, generating; for each script."""

import csv
import shutil
import threading
from pathlib import Path

import pytest
import torch
from conftest import checkpoint
from PIL import Image
from torch import nn


def train(script, *arguments):
    return script.train(script.parse_args([str(argument) for argument in arguments]))


def log_rows(run):
    with open(run / "log.csv", newline="") as file:
        return list(csv.DictReader(file))


# ---------------------------------------------------------------- what a run leaves


def test_files_of_a_run(script, trained):
    assert {"images", "log.csv", "checkpoint.pt"} <= {file.name for file in trained.iterdir()}
    grids = sorted(file.name for file in trained.glob("images/sample_*"))
    assert grids == ["sample_00000004.png", "sample_00000006.png"]
    assert not list(trained.rglob(".*"))  # no temporary file is left
    rows = log_rows(trained)
    assert [(row["step"], float(row["epoch"])) for row in rows] == [("4", 0.67), ("6", 1)]
    seconds = [float(row["seconds"]) for row in rows]
    assert seconds == sorted(seconds) and seconds[0] > 0


def test_a_second_run_overwrites_nothing(cgan, small):
    first = train(cgan, *small, "--n_epochs", 1)
    before = {file: file.read_bytes() for file in first.rglob("*") if file.is_file()}
    assert train(cgan, *small, "--n_epochs", 1) == Path("runs/cgan-2")
    assert {file: file.read_bytes() for file in first.rglob("*") if file.is_file()} == before


def test_the_log_has_the_means_since_the_last_row(cgan, small, monkeypatch):
    seen = []
    end_step = cgan.Run.end_step

    def recording_end_step(run, **metrics):
        seen.append({name: float(value.detach()) for name, value in metrics.items()})
        end_step(run, **metrics)

    monkeypatch.setattr(cgan.Run, "end_step", recording_end_step)
    run = train(cgan, *small, "--n_epochs", 1)
    assert len(seen) == 6
    for row, steps in zip(log_rows(run), (seen[:4], seen[4:]), strict=True):
        for name in seen[0]:
            mean = sum(step[name] for step in steps) / len(steps)
            assert float(row[name]) == pytest.approx(mean, rel=1e-5)


def test_what_is_said(cgan, small, capsys):
    cgan.train(cgan.parse_args([*small, "--n_epochs", "2"]))
    lines = capsys.readouterr().out.splitlines()
    assert lines[0].endswith("images: 54 images (blue: 18, green: 18, red: 18)")
    assert lines[1:3] == [
        "2 epochs of 6 steps, 0 steps done",
        'to continue after a stop: --resume "runs/cgan"',
    ]
    assert lines[3].startswith("step 4  epoch 0.67  seconds ") and lines[3].endswith("minutes left")
    assert lines[-1] == 'done; to train longer: --resume "runs/cgan" --n_epochs N'


def test_the_time_left(cgan, small, monkeypatch, capsys):
    """From the mean speed so far: of 12 steps, after the fourth twice the time that they took, and so on."""
    monkeypatch.setattr(cgan.time, "perf_counter", lambda: 0.0)
    end_step = cgan.Run.end_step

    def a_minute_per_step(run, **metrics):
        end_step(run, **metrics)
        monkeypatch.setattr(cgan.time, "perf_counter", lambda: 60.0 * run.step)

    monkeypatch.setattr(cgan.Run, "end_step", a_minute_per_step)
    cgan.train(cgan.parse_args([*small, "--n_epochs", "2"]))
    lines = [line for line in capsys.readouterr().out.splitlines() if " epoch " in line]
    assert [line.split("  ")[-1] for line in lines] == [f"{n}.0 minutes left" for n in (8, 4, 0)]


def test_a_sign_of_life_every_30_seconds(cgan, small, monkeypatch, capsys):
    """After each checkpoint, however far away the next row is."""
    seconds = iter(range(0, 10**6, 10))
    monkeypatch.setattr(cgan.time, "perf_counter", lambda: next(seconds))
    cgan.train(cgan.parse_args([*small, "--n_epochs", "2", "--sample_interval", "1000"]))
    steps = [line for line in capsys.readouterr().out.splitlines() if line.startswith("step")]
    assert len(steps) > 3
    assert int(steps[0].removeprefix("step ")) < 6


def test_same_seed_same_images(script, small, trained):
    again, other = (train(script, *small, "--n_epochs", 1, "--seed", seed) for seed in (0, 1))
    grid = "images/sample_00000006.png"
    assert (trained / grid).read_bytes() == (again / grid).read_bytes() != (other / grid).read_bytes()


def test_options_of_the_caller_stay(script, small):
    """train works on a copy; and a path may be a Path."""
    opt = script.parse_args([*small, "--n_epochs", "1"])
    opt.out_dir = Path("mine")
    before = dict(vars(opt))
    assert script.train(opt) == Path("mine")
    assert vars(opt) == before
    script.load("mine")


def test_the_checkpoint_is_plain_data(script, trained):
    state = checkpoint(trained)
    assert state["script"] == script.__name__
    assert state["options"]["classes"] == ["blue", "green", "red"]
    assert state["step"] == 6


def test_load_gives_the_averaged_model(script, small, trained):
    state = checkpoint(trained)
    (average,) = (state[name] for name in state.keys() & {"G_avg", "model_avg"})
    for folder in (trained, str(trained)):
        model = script.load(folder)
        assert not model.training
        assert model.options.img_size == script.parse_args(small).img_size
        assert not any(p.requires_grad for p in model.parameters())
        loaded = model.state_dict()
        assert average.keys() <= loaded.keys()
        assert all(torch.equal(loaded[name], value) for name, value in average.items())


@pytest.mark.parametrize("script", ["vae", "gan", "cgan", "vqvae"], indirect=True)
def test_pictures_are_of_the_averaged_model(script, small, monkeypatch):
    """With an average of zeros, all pictures are the same.

    Not so the PixelCNNs: their zeros are the same probability for all values.
    """

    def zero(average, model, decay, step):
        for p in average.parameters():
            p.zero_()

    def n_values():
        run = train(script, *small, "--n_epochs", 2, "--lr", 0.01)
        grid = Image.open(run / "images/sample_00000012.png").convert("L")
        return len(set(grid.crop((2, 2, 10, 10)).tobytes()))

    assert n_values() > 5
    monkeypatch.setattr(script, "update_average", zero)
    assert n_values() == 1


# ---------------------------------------------------------------- resuming


def same(a, b):
    if isinstance(a, torch.Tensor):
        return torch.equal(a, b)
    if isinstance(a, dict):
        return a.keys() == b.keys() and all(
            same(a[key], b[key]) for key in a if key not in ("seconds", "options")
        )
    if isinstance(a, list):
        return len(a) == len(b) and all(map(same, a, b))
    return a == b


OTHER = dict.fromkeys(["gan", "cgan"], ["--arch", "mlp", "--lr_hold", "3"])
OTHER["vae"] = ["--arch", "burgess", "--conditional"]
OTHER["vqvae"] = ["--codebook", "loss"]
OTHER["pixelcnn"] = ["--arch", "pixelcnn", "--conditional", "--binarize"]
OTHER["pixelcnnpp"] = ["--conditional", "--binarize"]


class Killed(BaseException):
    """What nothing catches."""


def train_and_die(script, monkeypatch, step, seconds, *arguments):
    """Train, with a checkpoint every so many seconds, until a step begins; then torch's random numbers
    change.
    """
    seed = script.seed

    def seed_or_die(*key):
        if key[1:3] == ("step", step):
            torch.manual_seed(99)
            raise Killed
        seed(*key)

    with monkeypatch.context() as patch, pytest.raises(Killed):
        patch.setattr(script, "seed", seed_or_die)
        patch.setattr(script, "CHECKPOINT_SECONDS", seconds)
        train(script, *arguments)


def test_resume_equals_the_run_never_stopped(script, small, monkeypatch):
    resumed_equals_whole(script, [*small, *OTHER[script.__name__]], monkeypatch, 7, -1, 7)


def test_resume_between_two_epochs(cgan, small, monkeypatch):
    resumed_equals_whole(cgan, small, monkeypatch, 6, -1, 6)


def test_resume_from_the_first_checkpoint(cgan, small, monkeypatch):
    resumed_equals_whole(cgan, small, monkeypatch, 11, 1000, 0)


def resumed_equals_whole(script, options, monkeypatch, step, seconds, saved):
    """Weights, averages, optimisers, log and pictures are the same, bit for bit."""
    arguments = [*options, "--n_epochs", 2]
    whole = train(script, *arguments)
    train_and_die(script, monkeypatch, step, seconds, *arguments, "--out_dir", "killed")
    assert checkpoint("killed")["step"] == saved
    killed = Path("killed")
    Path("killed/log.csv").unlink(missing_ok=True)  # a run needs its checkpoint and nothing else
    shutil.rmtree("killed/images", ignore_errors=True)
    assert train(script, "--resume", killed) == killed
    assert same(checkpoint(whole), checkpoint(killed))
    for grid in killed.glob("images/*"):
        assert grid.read_bytes() == (whole / "images" / grid.name).read_bytes(), grid
    logs = [[{**row, "seconds": 0} for row in log_rows(run)] for run in (whole, killed)]
    assert logs[0] == logs[1] and len(logs[0]) == 3


def test_resume_to_train_longer(cgan, small):
    run = train(cgan, *small, "--n_epochs", 1)
    train(cgan, "--resume", run, "--n_epochs", 2)
    longer = checkpoint(run)
    at_once = checkpoint(train(cgan, *small, "--n_epochs", 2))
    assert longer["step"] == at_once["step"] == 12
    for name in ("G", "D", "G_avg", "optimizer_G", "optimizer_D"):
        assert same(longer[name], at_once[name]), name


def test_resuming_a_finished_run_changes_nothing(script, trained):
    before = checkpoint(trained)
    train(script, "--resume", trained)
    assert same(before, checkpoint(trained))


def test_the_data_may_have_moved(cgan, small, images, tmp_path):
    shutil.copytree(images, tmp_path / "mine")
    run = train(cgan, *small, "--dataset", tmp_path / "mine", "--n_epochs", 1)
    (tmp_path / "mine").rename(tmp_path / "elsewhere")
    train(cgan, "--resume", run, "--n_epochs", 2, "--dataset", tmp_path / "elsewhere")
    assert checkpoint(run)["step"] == 12


def test_time_goes_on_counting(cgan, trained_cgan):
    state = checkpoint(trained_cgan)
    torch.save(state | {"seconds": 1000.0}, trained_cgan / "checkpoint.pt")
    train(cgan, "--resume", trained_cgan, "--n_epochs", 2)
    assert float(log_rows(trained_cgan)[-1]["seconds"]) > 1000


@pytest.fixture
def trained_cgan(cgan, small):
    return train(cgan, *small, "--n_epochs", 1)


def test_a_loader_of_ones_own(cgan, small, monkeypatch):
    """One that yields images of the CPU, in batches from worker-less PyTorch: and a resumed run is
    exact, too.
    """

    def make_loader(images, labels, batch_size):
        data = torch.utils.data.TensorDataset(images, labels)
        return torch.utils.data.DataLoader(data, batch_size, shuffle=True, drop_last=True)

    monkeypatch.setattr(cgan, "make_loader", make_loader)
    whole = train(cgan, *small, "--n_epochs", 2)
    train_and_die(cgan, monkeypatch, 8, -1, *small, "--n_epochs", 2)
    assert same(checkpoint(whole), checkpoint(train(cgan, "--resume", "runs/cgan-2")))


def test_training_in_a_thread(cgan, small):
    runs = []
    thread = threading.Thread(target=lambda: runs.append(train(cgan, *small, "--n_epochs", 1)))
    thread.start()
    thread.join()
    assert checkpoint(runs[0])["step"] == 6


# ---------------------------------------------------------------- generating


def pictures(folder):
    return [file.read_bytes() for file in sorted(folder.rglob("*.png"))]


def test_generating_again_draws_the_same_or_with_a_seed_others(script, trained, command):
    for seed in (0, 0, 5):
        assert command(script, "--resume", trained, "--generate", 3, "--seed", seed) == (0, [])
    one, same_seed, other = (pictures(trained / name) for name in ("generated", "generated-2", "generated-3"))
    assert len(one) == 3 and one == same_seed != other


def test_generating_needs_no_data(script, trained, command, refused):
    """A run's folder that was copied to another machine draws pictures there."""
    state = checkpoint(trained)
    state["options"]["dataset"] = "no/such/folder"
    torch.save(state, trained / "checkpoint.pt")
    shutil.move(trained, "elsewhere")
    assert command(script, "--resume", "elsewhere", "--generate", 3) == (0, [])
    refused(script, "--resume", "elsewhere", says=["no/such/folder"])


# ---------------------------------------------------------------- bfloat16


def test_amp(script, small, trained, monkeypatch):
    """Forward passes in training are in bfloat16; losses, weights and gradients stay float32."""
    kinds = (nn.Linear, nn.Conv2d)
    seen = set()
    forwards = {kind: kind.forward for kind in kinds}

    def recording_forward(layer, x):
        kind = next(kind for kind in kinds if isinstance(layer, kind))
        y = forwards[kind](layer, x)
        seen.add((layer.training, y.dtype))
        return y

    for kind in kinds:
        monkeypatch.setattr(kind, "forward", recording_forward)
    run = train(script, *small, "--n_epochs", 1, "--amp")
    assert seen == {(True, torch.bfloat16), (False, torch.float32)}  # averages draw and are tested in float32
    state = checkpoint(run)
    exact = checkpoint(trained)
    for name in state.keys() & {"G", "D", "model"}:
        # The codes of vqvae.py are outputs of its encoder, drawn at random: small differences grow.
        names = [key for key in state[name] if key not in ("codebook", "counts")]
        pairs = [(state[name][key], exact[name][key]) for key in names]
        pairs = [(a, b) for a, b in pairs if a.is_floating_point() and a.numel()]
        assert all(a.dtype == torch.float32 for a, _ in pairs)
        assert not all(torch.equal(a, b) for a, b in pairs)
        assert all((a - b).abs().max() < 0.05 * (1 + b.abs().max()) for a, b in pairs)
