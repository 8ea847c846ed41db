"""What is the same in every script: options, data, run folder, checkpoint, resume, bad input."""

import csv
import os
import re
import shutil
import signal
import subprocess
import sys
import threading
from pathlib import Path

import pytest
import torch
import torchvision
from conftest import ROOT, SCRIPTS, make_folder, run_script
from PIL import Image

# ---------------------------------------------------------------- the copies

BLOCK = re.compile(r"^# --- block: (\w+)\n(.*?)^# --- end of block$", re.MULTILINE | re.DOTALL)


def test_the_blocks_are_the_same_in_every_script():
    blocks = [dict(BLOCK.findall((ROOT / f"{script}.py").read_text())) for script in SCRIPTS]
    assert set(blocks[0]) == {"processes", "options", "data", "run"}
    for other in blocks[1:]:
        assert other == blocks[0]


# ---------------------------------------------------------------- options

COMMON = dict(n_epochs=200, batch_size=64, channels=None, n_classes=None, sample_interval=400, n_cpu=8, dataset="mnist")
COMMON |= dict(data_dir="data", seed=0, device="auto", compile=False, resume=None, generate=None)
GAN = dict(lr=2e-4, b1=0.5, b2=0.999, latent_dim=100, arch="mlp", ema=0.999)
CGAN = dict(conditioning="projection", mismatch=0.1, noise=0.0)
VAE = dict(lr=1e-3, b1=0.9, b2=0.999, latent_dim=128, arch="vanilla", hidden_dims=[32, 64, 128, 256, 512], ema=0.999)
VAE |= dict(
    likelihood="gaussian", sigma="auto", beta=1.0, conditional=False, binarize=False, iw_samples=0, reconstruct=None
)
DEFAULTS = {
    "vae": COMMON | VAE | dict(img_size=32, out_dir="runs/vae", labels=None),
    "gan": COMMON | GAN | dict(img_size=28, out_dir="runs/gan", noise=0.2),
    "cgan": COMMON | GAN | CGAN | dict(img_size=32, out_dir="runs/cgan", labels=None),
}


FOUND_LATER = (("gan", "img_size"), ("cgan", "noise"), ("vae", "hidden_dims"))  # by --arch


def test_options_and_defaults(script):
    options = vars(script.parse_args([]))
    del options["dataset_given"]
    assert options == DEFAULTS[script.__name__]


def test_help_says_every_default(script, capsys):
    with pytest.raises(SystemExit):
        script.parse_args(["--help"])
    text = " ".join(capsys.readouterr().out.split())
    for name, value in DEFAULTS[script.__name__].items():
        assert f"--{name}" in text
        if value is not None and (script.__name__, name) not in FOUND_LATER:
            assert f"(default: {value})" in text


# ---------------------------------------------------------------- a script as users run it


def test_importing_does_nothing(script, tmp_path):
    code = f"""
import sys, signal, torch
state = lambda: (torch.get_rng_state().tolist(), torch.get_num_threads(), signal.getsignal(signal.SIGINT))
before = state()
sys.argv = ["x", "--nonsense"]
sys.path.insert(0, {str(ROOT)!r})
import {script.__name__}
assert state() == before
"""
    done = subprocess.run([sys.executable, "-B", "-c", code], cwd=tmp_path, capture_output=True, text=True)
    assert (done.returncode, done.stdout, done.stderr) == (0, "", "")
    assert not list(tmp_path.iterdir())


def test_the_script_alone_in_an_empty_folder(script, tmp_path):
    """Copied there without the rest, with no network and no data, it trains on the built-in digits, and says so."""
    shutil.copy(ROOT / f"{script.__name__}.py", tmp_path / "mine.py")
    arch = ["--arch", "mlp"] if script.__name__ == "vae" else []  # vae.py's default takes longer
    done = run_script(tmp_path / "mine.py", "--n_epochs", "1", "--sample_interval", "100", *arch, cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert (
        done.stderr.count("\n") == 1 and done.stderr.startswith("warning: MNIST") and "--dataset digits" in done.stderr
    )
    assert "\r" not in done.stdout and "10,000 images of 1x" in done.stdout
    run = tmp_path / "runs" / script.__name__
    assert {f"images/sample_{n:06}.png" for n in (0, 100, 156)} | {"training.gif", "log.csv", "checkpoint.pt"} <= {
        str(f.relative_to(run)) for f in run.rglob("*")
    }
    assert Image.open(run / "training.gif").n_frames == 3
    assert sorted(f.name for f in tmp_path.iterdir() if f.name != "__pycache__") == ["mine.py", "runs"]

    made = run_script(tmp_path / "mine.py", "--resume", f"runs/{script.__name__}", "--generate", "12", cwd=tmp_path)
    assert made.returncode == 0, made.stderr
    pictures = list((run / "generated").rglob("*.png"))
    assert len(pictures) == 12 and Image.open(pictures[0]).mode in ("L", "RGB")


# ---------------------------------------------------------------- what a run leaves


def test_log_and_second_run(script, small):
    run = script.train(script.parse_args([*small, "--n_epochs", "2"]))
    assert run == Path("runs", script.__name__)
    rows = list(csv.DictReader(open(run / "log.csv")))
    assert [(row["epoch"], row["batches_done"]) for row in rows] == [("1", "6"), ("2", "12")]
    names = list(rows[0])
    assert {file.name for file in run.iterdir() if file.suffix != ".gif" and file.suffix != ".png"} == {
        "images",
        "log.csv",
        "checkpoint.pt",
    }
    assert names[:2] == ["epoch", "batches_done"] and names[-2:] == ["seconds", "images_per_second"] and len(names) > 4
    before = {file: file.read_bytes() for file in run.rglob("*") if file.is_file()}
    again = script.train(script.parse_args([*small, "--n_epochs", "1"]))
    assert again == Path("runs", f"{script.__name__}-2")
    assert all(file.read_bytes() == content for file, content in before.items())
    assert {file for file in run.rglob("*") if file.is_file()} == set(before)


def test_an_empty_folder_is_used_as_it_is(script, small, tmp_path):
    (tmp_path / "empty").mkdir()
    assert script.train(script.parse_args([*small, "--n_epochs", "0", "--out_dir", "empty"])) == Path("empty")


def test_no_epochs_only_sets_the_run_up(script, small):
    run = script.train(script.parse_args([*small, "--n_epochs", "0"]))
    assert [f.name for f in (run / "images").glob("sample*")] == ["sample_000000.png"]
    script.load(run)


def test_same_seed_same_images(script, small):
    runs = [script.train(script.parse_args([*small, "--n_epochs", "1", "--seed", seed])) for seed in "334"]
    one, same, other = ((run / "images/sample_000006.png").read_bytes() for run in runs)
    assert one == same != other


def test_the_checkpoint_is_plain_data(script, small):
    run = script.train(script.parse_args([*small, "--n_epochs", "1"]))
    state = torch.load(run / "checkpoint.pt", weights_only=True)
    assert state["script"] == script.__name__ and state["options"]["n_classes"] == 3


def test_load_leaves_nothing_to_set_up(script, small):
    run = script.train(script.parse_args([*small, "--n_epochs", "1"]))
    for path in (run, run / "checkpoint.pt", str(run)):
        model = script.load(path)
        assert not model.training and model.options["img_size"] == 16
        assert not any(p.requires_grad for p in model.parameters())


def test_generating_needs_no_data(script, small, images, command, tmp_path):
    """A run folder that was copied to another machine draws pictures there."""
    shutil.copytree(images, tmp_path / "mine")
    run = script.train(script.parse_args([*small[2:], "--dataset", str(tmp_path / "mine"), "--n_epochs", "0"]))
    shutil.rmtree(tmp_path / "mine")
    shutil.move(run, tmp_path / "elsewhere")
    assert command(script, "--resume", "elsewhere", "--generate", 3) == (0, [])
    status, lines = command(script, "--resume", "elsewhere")
    assert status == 2 and len(lines) == 1 and "--dataset" in lines[0]


def test_the_animation_has_at_most_100_frames(script, small):
    run = script.train(script.parse_args([*small, "--n_epochs", "17", "--sample_interval", "1"]))
    assert len(list((run / "images").glob("sample*"))) == 103
    assert Image.open(run / "training.gif").n_frames <= 100


# ---------------------------------------------------------------- resume


def same(a, b):
    if isinstance(a, torch.Tensor):
        return torch.equal(a, b)
    if isinstance(a, dict):
        return a.keys() == b.keys() and all(same(a[key], b[key]) for key in a if key not in ("seconds", "options"))
    if isinstance(a, (list, tuple)):
        return len(a) == len(b) and all(map(same, a, b))
    return a == b


def stop_at(script, monkeypatch, batch, number=signal.SIGTERM):
    """Send a signal to this process in the middle of that batch."""
    record = script.Run.record

    def record_and_stop(run, **losses):
        record(run, **losses)
        if run.batches_done == batch:
            signal.raise_signal(number)

    monkeypatch.setattr(script.Run, "record", record_and_stop)


@pytest.mark.parametrize("batch", [1, 6, 8])
def test_resume_equals_the_run_never_stopped(script, small, monkeypatch, batch):
    arguments = [*small, "--n_epochs", "3"]
    whole = script.train(script.parse_args(arguments))
    with monkeypatch.context() as patch:
        stop_at(script, patch, batch)
        with pytest.raises(SystemExit) as stopped:
            script.train(script.parse_args(arguments))
    assert stopped.value.code == 128 + signal.SIGTERM
    part = Path("runs", f"{script.__name__}-2")
    assert torch.load(part / "checkpoint.pt", weights_only=True)["position"]["batches_done"] == batch
    torch.manual_seed(99)  # a new process would not have this one's random state
    assert script.train(script.parse_args(["--resume", str(part)])) == part
    one, two = (torch.load(run / "checkpoint.pt", weights_only=True) for run in (whole, part))
    assert same(one, two)
    names = sorted(file.relative_to(whole) for file in whole.rglob("*.png"))
    assert names == sorted(file.relative_to(part) for file in part.rglob("*.png"))
    assert all((whole / name).read_bytes() == (part / name).read_bytes() for name in names)
    logs = [[list(row.values())[:-2] for row in csv.DictReader(open(run / "log.csv"))] for run in (whole, part)]
    assert logs[0] == logs[1]


def test_a_data_loader_takes_the_place_of_our_batches(script, small, monkeypatch):
    """And even then a resumed run is the run never stopped."""

    def loader(images, labels, batch_size):
        data = torch.utils.data.TensorDataset(images / 255, labels)
        return torch.utils.data.DataLoader(data, batch_size, shuffle=True, drop_last=True)

    monkeypatch.setattr(script, "Batches", loader)
    whole = script.train(script.parse_args([*small, "--n_epochs", "2"]))
    with monkeypatch.context() as patch:
        stop_at(script, patch, 8)
        with pytest.raises(SystemExit):
            script.train(script.parse_args([*small, "--n_epochs", "2"]))
    part = script.train(script.parse_args(["--resume", f"runs/{script.__name__}-2"]))
    assert same(*(torch.load(run / "checkpoint.pt", weights_only=True) for run in (whole, part)))


def test_resume_may_train_longer(script, small):
    run = script.train(script.parse_args([*small, "--n_epochs", "1"]))
    script.train(script.parse_args(["--resume", str(run), "--n_epochs", "2"]))
    assert len((run / "log.csv").read_text().splitlines()) == 3
    whole = script.train(script.parse_args([*small, "--n_epochs", "2"]))
    assert same(*(torch.load(folder / "checkpoint.pt", weights_only=True) for folder in (run, whole)))


def test_signal_handlers_are_given_back(script, small):
    before = signal.getsignal(signal.SIGINT), signal.getsignal(signal.SIGTERM)
    script.train(script.parse_args([*small, "--n_epochs", "1"]))
    assert (signal.getsignal(signal.SIGINT), signal.getsignal(signal.SIGTERM)) == before


def test_training_in_a_thread(script, small):
    """Signals can only be taken in the main thread; elsewhere the rest must work all the same."""
    runs = []
    thread = threading.Thread(target=lambda: runs.append(script.train(script.parse_args([*small, "--n_epochs", "1"]))))
    thread.start()
    thread.join()
    assert runs and (runs[0] / "checkpoint.pt").exists()


# ---------------------------------------------------------------- data


def test_digits_fill_the_picture(script):
    images, labels = script.draw_digits(2000, seed=0)
    assert images.shape == (2000, 1, 28, 28) and images.dtype == torch.uint8
    assert labels.bincount().tolist() == [200] * 10
    assert images.amax((1, 2, 3)).min() > 200 and (images[:, :, [0, -1]] > 0).float().mean() < 0.01
    again, other = script.draw_digits(2000, seed=0)[0], script.draw_digits(2000, seed=1)[0]
    assert torch.equal(images, again) and not torch.equal(images, other)
    # Nearest class mean, learnt on one split, judges the other.
    means = torch.stack([images[labels == k].float().mean(0) for k in range(10)]).flatten(1)
    assert (torch.cdist(other.float().flatten(1), means).argmin(1) == labels).float().mean() > 0.85


def decode(script, folder, *arguments):
    opt = script.parse_args(["--dataset", str(folder), "--img_size", "16", *arguments])
    opt.img_size = 8
    return script.decode_files(script.open_folder(folder).samples, opt)


def test_a_folder_of_images(script, tmp_path):
    folder = make_folder(tmp_path / "f", per_class=4, size=(30, 20))
    Image.new("L", (5, 5), 77).save(folder / "red" / "grey.png")
    Image.new("RGBA", (5, 5), (1, 2, 3, 0)).save(folder / "red" / "clear.png")
    (folder / "red" / "notes.txt").write_text("not an image")
    images, labels = decode(script, folder)
    assert images.shape == (14, 3, 8, 8) and images.dtype == torch.uint8
    assert labels.tolist() == [0] * 4 + [1] * 4 + [2] * 6
    assert (images[-1] == 77).all() and images[-2][:, 0, 0].tolist() == [1, 2, 3]


def test_grey_folders_stay_grey_until_a_coloured_image(script, tmp_path):
    folder = make_folder(tmp_path / "f", per_class=40, mode="L")
    grey, _ = decode(script, folder)
    assert grey.shape == (120, 1, 8, 8)
    Image.new("RGB", (8, 8), (9, 8, 7)).save(folder / "red" / "z.png")
    mixed, _ = decode(script, folder)
    assert mixed.shape == (121, 3, 8, 8)
    assert torch.equal(mixed[:120], grey.expand(-1, 3, -1, -1)) and mixed[120, :, 0, 0].tolist() == [9, 8, 7]


def test_images_are_cut_about_the_centre(script, tmp_path):
    (tmp_path / "f" / "a").mkdir(parents=True)
    image = Image.new("RGB", (40, 20), (255, 0, 0))
    image.paste((0, 255, 0), (10, 0, 30, 20))  # the middle square is green
    for i in range(2):
        image.save(tmp_path / "f" / "a" / f"{i}.png")
    images, _ = decode(script, tmp_path / "f")
    assert (images[:, 1] > 200).all() and (images[:, 0] < 50).all()


def test_processes_and_none_decode_the_same(script, tmp_path, monkeypatch):
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: {0, 1}, raising=False)
    folder = make_folder(tmp_path / "f", per_class=700)
    assert torch.equal(decode(script, folder, "--n_cpu", "0")[0], decode(script, folder, "--n_cpu", "2")[0])


def test_one_class_is_enough(script, small, tmp_path):
    folder = make_folder(tmp_path / "f", classes=["only"])
    run = script.train(script.parse_args([*small[2:], "--dataset", str(folder), "--n_epochs", "1"]))
    assert len(list((run / "images").glob("sample*"))) == 2


def test_batches(script):
    images, labels = torch.arange(10, dtype=torch.uint8).view(10, 1, 1, 1), torch.arange(10)
    batches = script.Batches(images, labels, 4)
    torch.manual_seed(0)
    epochs = [list(batches) for _ in range(2)]
    assert [len(epoch) for epoch in epochs] == [2, 2] == [len(batches)] * 2
    for epoch in epochs:
        x, y = map(torch.cat, zip(*epoch))
        assert len(set(y.tolist())) == 8 and torch.equal(x.flatten() * 255, y.float())
    assert not torch.equal(epochs[0][0][1], epochs[1][0][1])


real_mnist = pytest.mark.skipif(not os.environ.get("DATA_DIR"), reason="DATA_DIR names no folder with MNIST")


@real_mnist
def test_real_mnist(script):
    opt = script.parse_args(["--data_dir", os.environ["DATA_DIR"], "--img_size", "28"])
    images, labels = script.read_named(opt, train=False)
    raw = torchvision.datasets.MNIST(os.environ["DATA_DIR"], train=False)
    assert torch.equal(images[:, 0], raw.data) and torch.equal(labels, raw.targets)


@real_mnist
def test_truncated_mnist(script, command, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    shutil.copytree(Path(os.environ["DATA_DIR"], "MNIST", "raw"), tmp_path / "data" / "MNIST" / "raw")
    file = tmp_path / "data/MNIST/raw/train-images-idx3-ubyte"
    file.chmod(0o644)
    os.truncate(file, 10_000_000)
    status, lines = command(script, "--n_epochs", 1)
    assert status == 1 and len(lines) == 1 and "data/MNIST/raw" in lines[0] and "damaged" in lines[0]
    assert not (tmp_path / "runs").exists()


def test_a_half_finished_download_leaves_nothing(script, tmp_path, monkeypatch):
    """The child that downloads has written one file and dies."""
    dies = "import pathlib, sys; d = pathlib.Path(sys.argv[2], 'MNIST/raw'); d.mkdir(parents=True); "
    dies += "(d / 't10k-labels-idx1-ubyte').write_text('x'); sys.exit(1)"
    popen = subprocess.Popen
    monkeypatch.setattr(subprocess, "Popen", lambda args, **k: popen([args[0], "-c", dies, *args[3:]], **k))
    assert not script.download("mnist", tmp_path / "data")
    assert not list(tmp_path.iterdir())


def test_a_silent_network_is_given_up(script, tmp_path, monkeypatch):
    """The child that downloads hangs for ever; the clock of the script runs fast."""
    popen, monotonic = subprocess.Popen, script.time.monotonic
    children = []

    def hang(args, **k):
        children.append(popen([args[0], "-c", "import time; time.sleep(1000)"], **k))
        return children[0]

    monkeypatch.setattr(subprocess, "Popen", hang)
    monkeypatch.setattr(script.time, "monotonic", lambda: monotonic() * 100)
    assert not script.download("mnist", tmp_path / "data")
    assert children[0].poll() is not None
