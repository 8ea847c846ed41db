"""What is the same in every script: options, data, run folder, checkpoint, resume.

What stands in the copied blocks alone, and in no loop or list of options, is tested in one script, `cgan`.
"""

import argparse
import csv
import functools
import importlib
import os
import pickle
import platform
import re
import shutil
import signal
import subprocess
import sys
import threading
import urllib.request
from pathlib import Path

import pytest
import torch
import torchvision
from conftest import ROOT, SCRIPTS, SMALL, SMALLER, make_folder
from PIL import Image

IMPORTS = f"""
import sys, signal, socket, torch
state = lambda: (torch.get_rng_state().tolist(), torch.get_num_threads(), signal.getsignal(signal.SIGINT))
before = state(), socket.getdefaulttimeout()
sys.argv = ["x", "--nonsense"]
sys.path.insert(0, {str(ROOT)!r})
import {", ".join(SCRIPTS)}
assert (state(), socket.getdefaulttimeout()) == before
"""

# Blocks of 32 MB in all, as a training step has them: how many pages are new when they come again?
MEMORY = f"""
import argparse, resource, sys, torch
sys.path.insert(0, {str(ROOT)!r})
import cgan
device = cgan.find_device(argparse.Namespace(device="cpu", amp=False))
pages = []
for _ in range(9):
    before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    blocks = [torch.ones(1_000_000, device=device) for _ in range(8)]
    del blocks
    pages.append(resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before)
print(min(pages))
"""


@pytest.fixture(scope="module", autouse=True)
def children(images, tmp_path_factory):
    """Processes that begin with the first test of this file and are waited for by the last ones: each script copied
    into an empty folder and trained there, one of them without data, one that imports them all, and MEMORY."""
    smaller = {"vae": ["--arch", "mlp"], "vqvae": ["--img_size", "16"], "pixelcnn": SMALLER["pixelcnn"]}
    few, started = ["--dataset", str(images), "--batch_size", "8", "--sample_interval", "4"], {}
    options = {name: ["--n_epochs", "1", *few, *smaller.get(name, [])] for name in SCRIPTS}
    options["cgan"] = ["--n_epochs", "1", "--batch_size", "500", "--sample_interval", "10"]
    env = {k: v for k, v in os.environ.items() if not k.startswith(("MALLOC_", "GLIBC_"))} | {"OMP_NUM_THREADS": "1"}
    pipes = dict(stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=env)
    for name in (*SCRIPTS, "imports", "memory"):
        folder = tmp_path_factory.mktemp(name)
        command = ["-B", "-c", MEMORY if name == "memory" else IMPORTS]
        if name in SCRIPTS:
            command = [shutil.copy(ROOT / f"{name}.py", folder / "mine.py"), *options[name]]
        started[name] = folder, subprocess.Popen([sys.executable, *command], cwd=folder, **pipes)
    yield started
    for _, child in started.values():
        child.kill()  # if it was not waited for
        child.communicate()


# ---------------------------------------------------------------- the copies

BLOCK = re.compile(r"^# --- block: (\w+)\n(.*?)(?=^# ---|^def main)", re.MULTILINE | re.DOTALL)


def test_the_blocks_are_the_same_in_every_script():
    plumbing, same = {"processes", "options", "data", "run"}, {}
    for script in SCRIPTS:
        blocks = dict(BLOCK.findall((ROOT / f"{script}.py").read_text()))
        assert plumbing <= set(blocks) <= plumbing | {"decoder"}
        for name, block in blocks.items():
            assert same.setdefault(name, block) == block, f"{script}.py: {name}"


def test_every_command_of_the_readme_can_be_typed(tmp_path, monkeypatch):
    """Those that resume a run are parsed without it."""
    monkeypatch.chdir(tmp_path)
    commands = re.findall(rf"\b({'|'.join(SCRIPTS)})\.py((?: --?[\w.-]+| [\w./-]+)*)", (ROOT / "README.md").read_text())
    assert len(commands) > 15
    for name, arguments in commands:
        if "--resume" not in arguments:
            importlib.import_module(name).parse_args([a for a in arguments.split() if a != "…"])
        else:
            help_text = importlib.import_module(name).__file__
            assert all(option in Path(help_text).read_text() for option in re.findall(r"--\w+", arguments))


# ---------------------------------------------------------------- options

COMMON = dict(n_epochs=200, batch_size=64, channels=None, n_classes=None, sample_interval=400, n_cpu=8, dataset=None)
COMMON |= dict(data_dir="data", seed=0, device="auto", compile=False, amp=False, resume=None, generate=None)
GAN = dict(lr=6e-4, lr_hold=8000, b1=0.5, b2=0.999, latent_dim=100, arch="mlp", ema=0.999)
VAE = dict(lr=1e-3, b1=0.9, b2=0.999, latent_dim=32, arch="burgess", hidden_dims=[32, 64, 256], ema=0.999)
VAE |= dict(likelihood=None, sigma=None, beta=1.0, warmup=0, prior="fitted", conditional=False, binarize=False)
VAE |= dict(iw_samples=0)
VQVAE = dict(lr=1e-3, b1=0.9, b2=0.999, ema=0.999, batch_size=128, codebook="ema", decay=0.99, commitment=0.25)
VQVAE |= dict(restart=True, hidden_dim=128, residual_dim=32, n_embeddings=512, latent_dim=64, downsample=4)
PIXELCNN = dict(lr=2e-3, b1=0.9, b2=0.999, ema=0.999, batch_size=16, arch="gated", likelihood=None, dropout=0.0)
PIXELCNN |= dict(binarize=False, conditional=False, hidden_dim=32, n_layers=8, sample_interval=4000)
DEFAULTS = {
    "vae": COMMON | VAE | dict(img_size=32, out_dir="runs/vae", labels=None, reconstruct=None),
    "gan": COMMON | GAN | dict(img_size=28, out_dir="runs/gan", noise=0.0, spread=True),
    "cgan": COMMON | GAN | dict(img_size=32, out_dir="runs/cgan", labels=None, conditioning="projection"),
    "vqvae": COMMON | VQVAE | dict(img_size=32, out_dir="runs/vqvae", encode=None, decode=None),
    "pixelcnn": COMMON | PIXELCNN | dict(img_size=28, out_dir="runs/pixelcnn", labels=None, temperature=1.0),
}
DEFAULTS["cgan"] |= dict(noise=0.1, mislabel=0.0, lr=4e-4, lr_hold=2000)
FOUND_LATER = [("gan", "img_size"), ("gan", "noise"), ("cgan", "noise"), ("cgan", "mislabel")]  # by --arch
FOUND_LATER += [("vae", "hidden_dims"), ("pixelcnn", "n_layers"), ("pixelcnn", "dropout")]


def test_options_and_defaults(script):
    assert vars(script.parse_args([])) == DEFAULTS[script.__name__]


def test_options_reach_the_optimisers_and_the_average(script, small, monkeypatch):
    adams, averages, adam, average = [], [], torch.optim.Adam, script.average
    monkeypatch.setattr(torch.optim, "Adam", lambda *args, **k: adams.append(adam(*args, **k)) or adams[-1])
    monkeypatch.setattr(script, "average", lambda *args: averages.append(args[2:]) or average(*args))
    script.train(
        script.parse_args([*small, "--n_epochs", "1", "--lr", "0.01", "--b1", "0.1", "--b2", "0.2", "--ema", "0.3"])
    )
    assert len(adams) == (2 if "gan" in script.__name__ else 1)
    assert averages == [(0.3, i) for i in range(len(averages))] and len(averages) > 1
    for optimizer in adams:
        assert optimizer.defaults["lr"] == 0.01 and optimizer.defaults["betas"] == (0.1, 0.2)


@pytest.mark.parametrize("name", ["gan", "cgan"])
def test_options_reach_the_discriminator(name, images, tmp_path, monkeypatch):
    script, made = importlib.import_module(name), []
    monkeypatch.chdir(tmp_path)

    class Seen(script.Discriminator):
        def __init__(self, *args):
            super().__init__(*args)
            made.append(self)

    monkeypatch.setattr(script, "Discriminator", Seen)
    more = ["--conditioning", "concat"] if name == "cgan" else ["--no-spread"]
    script.train(script.parse_args(["--dataset", str(images), *SMALL, "--n_epochs", "0", "--noise", "0.7", *more]))
    assert made[0].noise == 0.7 and (made[0].concat if name == "cgan" else not made[0].spread)


@pytest.mark.parametrize("name", ["gan", "cgan"])
def test_the_rate_falls(name, images, tmp_path, monkeypatch):
    """It is --lr for --lr_hold batches, then falls as 1 / sqrt(batches), in both optimisers."""
    script, rates, adams, adam = importlib.import_module(name), [], [], torch.optim.Adam
    average = script.average
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(torch.optim, "Adam", lambda *args, **k: adams.append(adam(*args, **k)) or adams[-1])
    monkeypatch.setattr(
        script, "average", lambda *args: (rates.append([a.param_groups[0]["lr"] for a in adams[-2:]]), average(*args))
    )
    for hold, epochs in (("4", "2"), ("0", "1")):
        options = ["--dataset", str(images), *SMALL, "--n_epochs", epochs, "--lr", "0.01", "--lr_hold", hold]
        script.train(script.parse_args(options))
    falls = [0.01] * 4 + [0.01 * (4 / n) ** 0.5 for n in range(5, 13)]
    assert [rate for rate, _ in rates] == [rate for _, rate in rates] == pytest.approx([*falls, *[0.01] * 6])


def test_what_is_drawn_is_of_the_average(script, small, monkeypatch):
    """With an average of zeros, every picture is of one grey, or black where no tanh or sigmoid is the last layer."""

    def zero(average, model, decay, step):
        for p in average.parameters():
            p.zero_()
        if script.__name__ == "pixelcnn":
            p[127] = 100  # the last bias: of this value's logit

    def picture():
        run = script.train(script.parse_args([*small, "--n_epochs", "2", "--lr", "0.01"]))
        return {*Image.open(run / "images/sample_000012.png").convert("L").crop((2, 2, 10, 10)).tobytes()}

    assert len(picture()) > 5
    monkeypatch.setattr(script, "average", zero)
    assert picture() <= ({0} if script.__name__ == "vqvae" else {127, 128})


def test_help_says_every_default(script, capsys):
    with pytest.raises(SystemExit):
        script.parse_args(["--help"])
    text = " ".join(capsys.readouterr().out.split())
    for name, value in DEFAULTS[script.__name__].items():
        assert f"--{name}" in text
        if value is not None and (script.__name__, name) not in FOUND_LATER:
            assert f"(default: {value})" in text


def test_readme_lists_the_options(script):
    """A cell of the table is empty where a script has no such option, and only there."""
    table = (ROOT / "README.md").read_text().partition("| option |")[2].partition("\n\n")[0]
    column = [name.strip() for name in table.splitlines()[0].split("|")].index(script.__name__) + 1
    listed = set()
    for row in table.splitlines()[2:]:
        cells = row.split("|")
        if cells[column + 1].strip():
            listed |= set(re.findall(r"--(\w+)", cells[1]))
    assert listed == set(DEFAULTS[script.__name__])


# ---------------------------------------------------------------- a script as users run it


@pytest.mark.skipif(sys.platform == "win32", reason="sends signals")
def test_stopped_at_any_moment_after_it_began(cgan, images, tmp_path):
    """Once "writing to" is printed there is a run to resume; Ctrl-C says how, and makes the GIF of what there is."""
    signal.signal(signal.SIGINT, signal.default_int_handler)  # or children of a shell's background job would ignore it

    def start(*arguments):
        command = [sys.executable, cgan.__file__, *arguments, "--n_epochs", "100000"]
        child = subprocess.Popen(command, cwd=tmp_path, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
        assert "writing to runs/cgan" in child.stdout.readline()
        return child

    child = start("--dataset", str(images), *SMALL)
    child.kill()
    assert child.communicate()[1] == "" and child.returncode == -signal.SIGKILL
    child = start("--resume", "runs/cgan")
    child.stdout.readline()  # a report: it is training
    child.send_signal(signal.SIGINT)
    out, err = child.communicate()
    assert child.returncode == 130 and err == ""
    assert out.splitlines()[-1].endswith("python cgan.py --resume runs/cgan")
    assert Image.open(tmp_path / "runs/cgan/training.gif").n_frames >= 1
    done = torch.load(tmp_path / "runs/cgan/checkpoint.pt", weights_only=True)["position"][0]
    cgan.train(cgan.parse_args(["--resume", str(tmp_path / "runs/cgan"), "--n_epochs", str(done // 6 + 1)]))


# ---------------------------------------------------------------- what a run leaves


def test_log_and_second_run(script, small):
    run = script.train(script.parse_args([*small, "--n_epochs", "2"]))
    assert run == Path("runs", script.__name__)
    rows = list(csv.DictReader(open(run / "log.csv")))
    assert [(row["epoch"], row["batches_done"]) for row in rows] == [("1", "6"), ("2", "12")]
    names = list(rows[0])
    assert {file.name for file in run.iterdir() if file.suffix not in (".gif", ".png", ".npz")} == {
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


def test_a_report_counts_in_whole_numbers(script, capsys):
    """However long a training is: not 1.874e+06 batches."""
    run = argparse.Namespace(done=1_874_000, per_epoch=937, began=0.0, totals={"loss": 0.25008 * 937})
    script.report(run, argparse.Namespace(batch_size=64))
    assert capsys.readouterr().out.startswith("epoch 2000 batches_done 1874000 loss 0.2501 seconds ")


def test_the_log_has_the_means_of_an_epoch(script, small, monkeypatch):
    seen, after_batch = [], script.after_batch
    monkeypatch.setattr(
        script, "after_batch", lambda run, opt, **losses: (seen.append(losses), after_batch(run, opt, **losses))
    )
    run = script.train(script.parse_args([*small, "--n_epochs", "2"]))
    for i, row in enumerate(csv.DictReader(open(run / "log.csv"))):
        for name in seen[0]:
            mean = sum(float(losses[name]) for losses in seen[6 * i : 6 * i + 6]) / 6
            assert float(row[name]) == pytest.approx(mean, rel=1e-5)


@pytest.mark.parametrize("columns", [0, 40])
def test_reports_on_a_terminal(cgan, small, monkeypatch, capsys, columns):
    """One over the other, in one line; one after the other where it does not say how wide it is."""
    monkeypatch.setattr(sys.stdout, "isatty", lambda: True)
    monkeypatch.setattr(os, "get_terminal_size", lambda *_: os.terminal_size((columns, 24)))
    cgan.train(cgan.parse_args([*small, "--n_epochs", "2"]))
    out = capsys.readouterr().out
    reports = re.findall(r"^.*epoch .*$", out.split("writing to runs/cgan")[1], re.MULTILINE)
    if columns:
        assert [len(line) for line in reports[0].split("\r")[:-1]] == [39, 39] and len(reports) == 1
    else:
        assert len(reports) == 2 and "\r" not in out


def test_an_empty_folder_is_used_as_it_is(cgan, small, tmp_path, monkeypatch):
    (tmp_path / "empty").mkdir()
    assert cgan.train(cgan.parse_args([*small, "--n_epochs", "0", "--out_dir", "empty"])) == Path("empty")
    monkeypatch.chdir("empty")  # where there is something now
    run = cgan.train(cgan.parse_args([*small, "--n_epochs", "0", "--out_dir", "."]))
    assert run != Path() and (run / "checkpoint.pt").exists()


def test_a_folder_in_use_is_left_alone(cgan, small, tmp_path):
    (tmp_path / "runs/cgan").mkdir(parents=True)
    (tmp_path / "runs/cgan" / "log.csv").write_text("mine")
    assert cgan.train(cgan.parse_args([*small, "--n_epochs", "0"])) == Path("runs/cgan-2")
    assert (tmp_path / "runs/cgan" / "log.csv").read_text() == "mine"


def test_no_epochs_only_sets_the_run_up(script, small):
    run = script.train(script.parse_args([*small, "--n_epochs", "0"]))
    assert [f.name for f in (run / "images").glob("sample*")] == ["sample_000000.png"]
    script.load(run)


def test_same_seed_same_images(script, small):
    runs = [script.train(script.parse_args([*small, "--n_epochs", "1", "--seed", seed])) for seed in "334"]
    one, same, other = ((run / "images/sample_000006.png").read_bytes() for run in runs)
    assert one == same != other


def test_seeds_have_nothing_in_common(cgan):
    draws = set()
    positions = [
        (s, kind, i, *rank)
        for s in (0, 1)
        for kind in ("epoch", "batch")
        for i in range(20)
        for rank in ((), (0,), (1,))
    ]
    for position in positions:
        cgan.seed(*position)
        draws.add(torch.rand(4).sum().item())
    assert len(draws) == len(positions)


@pytest.mark.parametrize("name", ["gan", "cgan"])
def test_what_the_steps_see_and_every_epoch_has_an_order_of_its_own(name, images, tmp_path, monkeypatch):
    """Real images in [-1, 1], and z from a standard normal distribution."""
    script, seen, zs = importlib.import_module(name), [], []
    monkeypatch.chdir(tmp_path)
    d_step, g_step = script.discriminator_step, script.generator_step
    monkeypatch.setattr(script, "discriminator_step", lambda *args: (seen.append(args[2]), d_step(*args))[1])
    monkeypatch.setattr(script, "generator_step", lambda *args: (zs.append(args[3]), g_step(*args))[1])
    script.train(script.parse_args(["--dataset", str(images), *SMALL, "--n_epochs", "2"]))
    z = torch.cat(zs)
    assert abs(z.mean()) < 0.2 and abs(z.std() - 1) < 0.2 and z.min() < -1
    one, two = torch.cat(seen[:6]), torch.cat(seen[6:])
    assert not torch.equal(one, two)
    for epoch in (one, two):
        assert -1 <= epoch.min() < -0.9 and 0.5 < epoch.max() <= 1 and len(epoch.unique(dim=0)) > 40


def test_the_checkpoint_is_plain_data(script, trained):
    state = torch.load(trained / "checkpoint.pt", weights_only=True)
    assert state["script"] == script.__name__ and state["options"]["classes"] == ["blue", "green", "red"]


def test_load_gives_the_average_and_leaves_nothing_to_set_up(script, small, trained):
    state = torch.load(trained / "checkpoint.pt", weights_only=True)
    (average,) = (state[name] for name in state.keys() & {"G_avg", "model_avg"})
    for path in (trained, str(trained)):
        model = script.load(path)
        assert not model.training and model.options["img_size"] == script.parse_args(small).img_size
        assert not any(p.requires_grad for p in model.parameters())
        assert all(torch.equal(value, average[name]) for name, value in model.state_dict().items())


def test_generating_needs_no_data(script, small, images, command, refused, tmp_path):
    """A run folder that was copied to another machine draws pictures there."""
    shutil.copytree(images, tmp_path / "mine")
    run = script.train(script.parse_args([*small, "--dataset", str(tmp_path / "mine"), "--n_epochs", "0"]))
    shutil.rmtree(tmp_path / "mine")
    shutil.move(run, tmp_path / "elsewhere")
    assert command(script, "--resume", "elsewhere", "--generate", 3) == (0, [])
    refused(script, "--resume", "elsewhere", says=[str(tmp_path / "mine")])


def test_generating_again_draws_the_same_or_with_a_seed_others(script, trained, command):
    for seed in (0, 0, 5):
        assert command(script, "--resume", trained, "--generate", 3, "--seed", seed) == (0, [])
    one, same, other = (
        [file.read_bytes() for file in sorted((trained / folder).rglob("*.png"))]
        for folder in ("generated", "generated-2", "generated-3")
    )
    assert one == same != other


def test_a_grid_is_written_in_one_piece(cgan, small, monkeypatch):
    """Stopped while one is written, the GIF is made of those before."""
    save_image, calls = cgan.utils.save_image, []

    def stop_in_the_second(images, file, **options):
        calls.append(file)
        save_image(images, file, **options)
        if len(calls) == 2:
            Path(file).write_bytes(Path(file).read_bytes()[:60])
            raise KeyboardInterrupt

    monkeypatch.setattr(cgan.utils, "save_image", stop_in_the_second)
    with pytest.raises(KeyboardInterrupt):
        cgan.train(cgan.parse_args([*small, "--n_epochs", "1"]))
    assert [file.name for file in Path("runs/cgan/images").iterdir()] == ["sample_000000.png"]
    assert Image.open("runs/cgan/training.gif").n_frames == 1


def test_the_animation_has_at_most_100_frames(cgan, tmp_path):
    """Evenly spread, in the order of their numbers, and the last grid is the last frame."""
    (tmp_path / "images").mkdir()
    for k in range(103):  # the last ones have a digit more
        Image.new("RGB", (8, 8), (2 * k, 0, 0)).save(tmp_path / f"images/sample_{999_900 + k:06}.png")
    cgan.finish(argparse.Namespace(folder=tmp_path), sample="training.gif")
    animation, reds = Image.open(tmp_path / "training.gif"), []
    for k in range(animation.n_frames):
        animation.seek(k)
        reds.append(animation.convert("RGB").getpixel((4, 4))[0])
    assert 50 <= len(reds) <= 100 and reds == sorted(reds) and abs(reds[-1] - 204) < 8


# ---------------------------------------------------------------- resume


def same(a, b):
    if isinstance(a, torch.Tensor):
        return torch.equal(a, b)
    if isinstance(a, dict):
        other = ("seconds", "images_per_second", "options")
        return a.keys() == b.keys() and all(same(a[key], b[key]) for key in a if key not in other)
    if isinstance(a, (list, tuple)):
        return len(a) == len(b) and all(map(same, a, b))
    return a == b


def assert_same(*runs):
    one, two = (torch.load(run / "checkpoint.pt", weights_only=True) for run in runs)
    for state in (one, two):
        state["position"].pop()  # seconds
    assert same(one, two)


def stop_after(script, monkeypatch, batch, seconds=0):
    """Ctrl-C in that batch, with a checkpoint every so many seconds; torch has random numbers as in a new process."""
    after_batch = script.after_batch

    def after_batch_and_stop(run, opt, **losses):
        after_batch(run, opt, **losses)
        if run.done == batch:
            torch.manual_seed(99)
            raise KeyboardInterrupt

    monkeypatch.setattr(script, "after_batch", after_batch_and_stop)
    monkeypatch.setattr(script, "CHECKPOINT_SECONDS", seconds)


CONV = dict.fromkeys(["gan", "cgan"], ["--arch", "conv", "--lr_hold", "3"])
CONV["vae"] = ["--arch", "vanilla", "--hidden_dims", "4", "8"]
CONV["vqvae"] = ["--codebook", "loss"]
CONV["pixelcnn"] = ["--arch", "pixelcnn", "--conditional", "--dropout", "0.2", "--binarize"]


@pytest.mark.parametrize("conv, stops", [(False, [(1, 0, 1), (6, 0, 5), (11, 1000, 6)]), (True, [(8, 0, 8)])])
def test_resume_equals_the_run_never_stopped(script, small, monkeypatch, conv, stops):
    """Stopped after a batch, with a checkpoint after so many seconds, which then is of so many batches."""
    arguments = [*small, "--n_epochs", "2", *(CONV[script.__name__] if conv else [])]
    whole = script.train(script.parse_args(arguments))
    for batch, seconds, saved in stops:
        part = Path(f"runs/stopped_after_{batch}")
        with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
            stop_after(script, patch, batch, seconds)
            script.train(script.parse_args([*arguments, "--out_dir", str(part)]))
        assert torch.load(part / "checkpoint.pt", weights_only=True)["position"][0] == saved
        (part / "log.csv").unlink()  # as after a stop at the worst moment
        assert script.train(script.parse_args(["--resume", str(part)])) == part
        assert_same(whole, part)
        names = sorted(file.relative_to(whole) for file in whole.rglob("*.png"))
        assert names == sorted(file.relative_to(part) for file in part.rglob("*.png"))
        assert all((whole / name).read_bytes() == (part / name).read_bytes() for name in names)
        logs = [[list(row.values())[:-2] for row in csv.DictReader(open(run / "log.csv"))] for run in (whole, part)]
        assert logs[0] == logs[1] and len(logs[0]) == 2


def test_a_data_loader_of_ones_own(script, small, monkeypatch):
    """`DataLoader(mine, opt.batch_size, shuffle=True, drop_last=True)`, and even then a resumed run is exact."""
    loader = torch.utils.data.DataLoader

    def own(data, sampler=None, batch_size=None, **rest):
        if sampler is None:
            return loader(data, batch_size, **rest)
        return loader(data, sampler.batch_size, shuffle=True, drop_last=True)

    monkeypatch.setattr(
        script, "DataLoader", lambda data, *args, **k: loader(data, *args, **k) if args else own(data, **k)
    )
    whole = script.train(script.parse_args([*small, "--n_epochs", "2"]))
    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        stop_after(script, patch, 8)
        script.train(script.parse_args([*small, "--n_epochs", "2"]))
    assert_same(whole, script.train(script.parse_args(["--resume", f"runs/{script.__name__}-2"])))


def test_resume_may_train_longer(script, small, trained):
    script.train(script.parse_args(["--resume", str(trained), "--n_epochs", "2"]))
    assert len((trained / "log.csv").read_text().splitlines()) == 3
    assert_same(trained, script.train(script.parse_args([*small, "--n_epochs", "2"])))


def test_resume_with_other_images(script, small, images, refused, tmp_path):
    """Batches would be counted in epochs of another length."""
    shutil.copytree(images, tmp_path / "f")
    run = script.train(script.parse_args([*small, "--dataset", str(tmp_path / "f"), "--n_epochs", "1"]))
    for i in range(16):
        shutil.copy(tmp_path / "f/red/0.png", tmp_path / f"f/red/new{i}.png")
    before = (run / "checkpoint.pt").read_bytes()
    refused(script, "--resume", run, "--n_epochs", 2, says=["had 6"])
    assert (run / "checkpoint.pt").read_bytes() == before


def test_training_in_a_thread(cgan, small):
    runs = []
    thread = threading.Thread(target=lambda: runs.append(cgan.train(cgan.parse_args([*small, "--n_epochs", "1"]))))
    thread.start()
    thread.join()
    assert runs and (runs[0] / "checkpoint.pt").exists()


# ---------------------------------------------------------------- bfloat16 and compiled


def test_amp(script, small, trained, monkeypatch):
    """Forward passes are in bfloat16, in training; losses, weights and gradients stay float32."""
    kind, seen = torch.nn.Linear if "--arch" in small or "gan" in script.__name__ else torch.nn.Conv2d, set()
    forward = kind.forward

    def forward_and_note(layer, x):
        y = forward(layer, x)
        seen.add((layer.training, y.dtype))
        return y

    monkeypatch.setattr(kind, "forward", forward_and_note)
    run = script.train(script.parse_args([*small, "--n_epochs", "1", "--amp", "--sample_interval", "1000"]))
    assert seen == {(True, torch.bfloat16), (False, torch.float32)}  # averages draw and are tested in float32
    state = torch.load(run / "checkpoint.pt", weights_only=True)
    name, optimizer = ("model", "optimizer") if "model" in state else ("G", "opt_G")
    assert all(t.dtype != torch.bfloat16 for t in state[name].values())
    assert all(t.dtype != torch.bfloat16 for s in state[optimizer]["state"].values() for t in s.values())
    assert all(total.dtype == torch.float32 for total in state["position"][2].values())
    exact = torch.load(trained / "checkpoint.pt", weights_only=True)[name]
    pairs = [(a, exact[key]) for key, a in state[name].items() if a.is_floating_point()]
    assert not all(torch.equal(a, b) for a, b in pairs)
    assert all((a - b).abs().max() < 0.05 * (1 + b.abs().max()) for a, b in pairs)


def test_compile(script, small, trained, monkeypatch):
    """A smoke test, without the minutes that a compiler takes: torch traces the networks and runs what it found."""
    compiled = []

    def compile_eagerly(network):
        compiled.append(network)
        network._compiled_call_impl = torch.compile(network._call_impl, backend="eager")

    monkeypatch.setattr(torch.nn.Module, "compile", compile_eagerly)
    run = script.train(script.parse_args([*small, "--n_epochs", "1", "--compile"]))
    assert len(compiled) == (1 if script.__name__ in ("vae", "pixelcnn") else 2)  # G and D, or encoder and decoder
    for a, b in zip(script.load(run).state_dict().values(), script.load(trained).state_dict().values()):
        torch.testing.assert_close(a, b, rtol=1e-3, atol=1e-3)


# ---------------------------------------------------------------- data


def test_digits_fill_the_picture(cgan):
    data, test = (cgan.DATASETS["digits"]("", train, False) for train in (True, False))
    images, labels = data.data, data.targets
    assert images.shape == (10_000, 28, 28) and images.dtype == torch.uint8 and len(test.data) == 2000
    assert labels.bincount().tolist() == [1000] * 10
    assert images.amax((1, 2)).min() > 200 and (images[:, [0, -1]] > 0).float().mean() < 0.01
    assert torch.equal(test.data, cgan.draw_digits(train=False).data)
    # Nearest class mean, learnt on one split, judges the other.
    means = torch.stack([images[labels == k].float().mean(0) for k in range(10)]).flatten(1)
    found = torch.cdist(test.data.float().flatten(1), means).argmin(1)
    assert (found == test.targets).float().mean() > 0.85


def read(script, folder, *arguments):
    opt = script.parse_args(["--dataset", str(folder), "--img_size", "16", *arguments])
    opt.img_size = 8
    return (*script.load_data(opt), opt)


def test_a_folder_of_images(cgan, tmp_path):
    folder = make_folder(tmp_path / "f", per_class=4, size=(30, 20))
    Image.new("L", (5, 5), 77).save(folder / "red" / "grey.png")
    Image.new("RGBA", (5, 5), (1, 2, 3, 0)).save(folder / "red" / "clear.png")
    (folder / "red" / "notes.txt").write_text("not an image")
    images, labels, opt = read(cgan, folder)
    assert images.shape == (14, 3, 8, 8) and images.dtype == torch.uint8
    assert labels.tolist() == [0] * 4 + [1] * 4 + [2] * 6
    assert (images[-1] == 77).all() and images[-2][:, 0, 0].tolist() == [1, 2, 3]
    assert (opt.channels, opt.n_classes, opt.classes) == (3, 3, ["blue", "green", "red"])


def test_channels_convert(cgan, tmp_path):
    folder = make_folder(tmp_path / "f", per_class=4)
    colour, _, _ = read(cgan, folder)
    grey, _, opt = read(cgan, folder, "--channels", "1")
    assert grey.shape == (12, 1, 8, 8) and opt.channels == 1
    weights = torch.tensor([0.299, 0.587, 0.114]).view(1, 3, 1, 1)
    assert ((colour * weights).sum(1, keepdim=True) - grey).abs().max() <= 1
    for channels in ("1", "3"):
        opt = cgan.parse_args(["--dataset", "digits", "--img_size", "16", "--channels", channels])
        images, _ = cgan.load_data(opt, train=False)
        assert images.shape == (2000, int(channels), 16, 16)
        assert (images == images[:, :1]).all() and images.max() > 100


def test_a_coloured_data_set_with_a_name(cgan, monkeypatch):
    """torchvision has its images as (N, H, W, C) arrays and its labels as a list."""
    colours = torch.zeros(5, 8, 8, 3, dtype=torch.uint8)
    colours[:, :2, :, 0], colours[:, :, :4, 1] = 200, 100  # red above, green on the left
    fake = argparse.Namespace(data=colours.numpy(), targets=[3, 1, 4, 1, 5])
    monkeypatch.setitem(cgan.DATASETS, "cifar10", lambda root, train, download: fake)
    images, labels, opt = read(cgan, "cifar10")
    assert images.shape == (5, 3, 8, 8) and labels.tolist() == [3, 1, 4, 1, 5] and opt.channels == 3
    assert torch.equal(images, colours.permute(0, 3, 1, 2))
    assert (images[:, 0, 0] == 200).all() and (images[:, 0, 7] == 0).all() and (images[:, 1, :, 0] == 100).all()


def test_images_are_cut_about_the_centre(cgan, tmp_path):
    (tmp_path / "f" / "a").mkdir(parents=True)
    image = Image.new("RGB", (40, 20), (255, 0, 0))
    image.paste((0, 255, 0), (10, 0, 30, 20))  # the middle square is green
    for i in range(2):
        image.save(tmp_path / "f" / "a" / f"{i}.png")
    images, _, _ = read(cgan, tmp_path / "f")
    assert (images[:, 1] > 200).all() and (images[:, 0] < 50).all()


def test_processes_and_none_decode_the_same(cgan, tmp_path, monkeypatch):
    monkeypatch.setattr(os, "cpu_count", lambda: 2)
    folder = make_folder(tmp_path / "f", per_class=700)
    assert torch.equal(read(cgan, folder, "--n_cpu", "0")[0], read(cgan, folder, "--n_cpu", "2")[0])


def test_what_a_process_decodes_with_can_be_sent_to_it(cgan, small):
    """Where processes are not forked, it is pickled."""
    assert pickle.loads(pickle.dumps(functools.partial(cgan.read_image, opt=cgan.parse_args(small))))


def test_one_class_is_enough(script, small, tmp_path):
    folder = make_folder(tmp_path / "f", classes=["only"])
    run = script.train(script.parse_args([*small, "--dataset", str(folder), "--n_epochs", "1"]))
    assert len(list((run / "images").glob("sample*"))) == 2


real_mnist = pytest.mark.skipif(not os.environ.get("DATA_DIR"), reason="DATA_DIR names no folder with MNIST")


@real_mnist
def test_real_mnist(cgan):
    opt = cgan.parse_args(["--data_dir", os.environ["DATA_DIR"], "--img_size", "28"])
    images, labels = cgan.load_data(opt, train=False)
    raw = torchvision.datasets.MNIST(os.environ["DATA_DIR"], train=False)
    assert torch.equal(images[:, 0], raw.data) and torch.equal(labels, raw.targets) and opt.dataset == "mnist"


@real_mnist
def test_damaged_mnist(cgan, refused, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    shutil.copytree(Path(os.environ["DATA_DIR"], "MNIST", "raw"), tmp_path / "data" / "MNIST" / "raw")
    file = tmp_path / "data/MNIST/raw/train-images-idx3-ubyte"
    file.chmod(0o644)
    os.truncate(file, 10_000_000)
    refused(cgan, "--n_epochs", 1, "--dataset", "mnist", says=["mnist", "data", "--dataset digits"])
    assert not (tmp_path / "runs").exists()


def test_a_silent_network_is_given_up(cgan, tmp_path, monkeypatch, capsys):
    """One that takes the connection and never answers. Seconds pass quickly here."""
    import socket

    with socket.socket() as silent:
        silent.bind(("127.0.0.1", 0))
        silent.listen()
        monkeypatch.chdir(tmp_path)
        monkeypatch.setattr(torchvision.datasets.MNIST, "mirrors", [f"http://127.0.0.1:{silent.getsockname()[1]}/"])
        for name in ("http_proxy", "HTTP_PROXY"):
            monkeypatch.delenv(name, raising=False)
        monkeypatch.setattr(urllib.request, "_opener", None)  # it remembers proxies
        set_timeout = socket.setdefaulttimeout
        monkeypatch.setattr(socket, "setdefaulttimeout", lambda seconds: set_timeout(seconds / 100))
        opt = cgan.parse_args([])
        cgan.load_data(opt, train=False)
        set_timeout(None)
    assert opt.dataset == "digits" and "timed out" in capsys.readouterr().err


# ---------------------------------------------------------------- what the first lines of this file have started


def test_importing_does_nothing(children):
    folder, child = children["imports"]
    assert (*child.communicate(), child.returncode) == ("", "", 0)
    assert not list(folder.iterdir())


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc" or platform.machine() != "x86_64", reason="another malloc")
def test_memory_is_kept_from_step_to_step(children):
    """Without find_device it is given back and comes again as 8000 new pages: some hundredths of a step's time."""
    out, err = children["memory"][1].communicate()
    assert int(out) < 1000, err


def test_the_script_alone_in_an_empty_folder(script, children):
    """Without the rest; and with no network and no data, on the built-in digits, which it says."""
    folder, child = children[script.__name__]
    out, err = child.communicate()
    assert child.returncode == 0, err
    alone = script.__name__ == "cgan"  # it has no data
    assert err.count("\n") == alone and "\r" not in out
    if alone:
        assert err.startswith("warning: mnist") and "digits" in out
        assert "--dataset digits" in err and "refused" in err  # what, and why
    run, grids = folder / "runs" / script.__name__, (0, 10, 20) if alone else (0, 4, 6)
    assert {f"images/sample_{n:06}.png" for n in grids} | {"training.gif", "log.csv", "checkpoint.pt"} <= {
        str(f.relative_to(run)) for f in run.rglob("*")
    }
    assert Image.open(run / "training.gif").n_frames == 3
    assert not [f for f in folder.glob("data/**/*") if f.is_file()]
