"""What the tests share: the scripts as modules, a small folder of images, and ways to run a script as
users do.
"""

import functools
import importlib
import json
import os
import shutil
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from PIL import Image

ROOT = Path(__file__).parent.parent
sys.path.insert(0, str(ROOT))
SCRIPTS = ["vae", "gan", "cgan", "vqvae", "pixelcnn", "pixelcnnpp"]
torch.set_num_threads(1)  # small networks gain nothing from more

# MNIST cannot be downloaded during the tests, on any machine: nothing listens there.
os.environ |= dict.fromkeys(("http_proxy", "https_proxy", "HTTP_PROXY", "HTTPS_PROXY"), "http://127.0.0.1:9")


@pytest.fixture(scope="session", autouse=True)
def digits_once():
    """Drawing the digits takes seconds, and they are always the same: in this process it is done once."""
    draw = functools.cache(importlib.import_module("cgan").draw_digits)
    for name in SCRIPTS:
        importlib.import_module(name).draw_digits = draw


@pytest.fixture(autouse=True)
def no_codes_where_none_are_used(request, monkeypatch):
    """Where all scripts are tested, vqvae.py writes neither codes nor decoder: that takes a second each."""
    if request.module.__name__ in ("test_run", "test_bad_input", "test_plumbing"):
        monkeypatch.setattr(importlib.import_module("vqvae"), "write_codes", lambda folder, **arrays: None)


@pytest.fixture(params=SCRIPTS)
def script(request):
    """Each script in turn, as a module."""
    return importlib.import_module(request.param)


@pytest.fixture
def script_name(request):
    """The script of this test: one of all, or the one that the file is about."""
    if "script" in request.fixturenames:
        return request.node.callspec.params["script"]
    name = request.module.__name__.removeprefix("test_")
    return name if name in SCRIPTS else "cgan"


@pytest.fixture
def cgan():
    """The script that stands for all where the plumbing is tested."""
    return importlib.import_module("cgan")


def make_folder(
    folder: Path, classes=("blue", "green", "red"), per_class=18, size=(12, 12), mode="RGB"
) -> Path:
    """Images of one colour per class, each a little different."""
    random = torch.Generator().manual_seed(0)
    for k, name in enumerate(classes):
        (folder / name).mkdir(parents=True)
        for i in range(per_class):
            shade = int(torch.randint(150, 256, (), generator=random))
            colour = tuple(shade if c == 2 - k else i for c in range(3)) if mode == "RGB" else shade - 50 * k
            Image.new(mode, size, colour).save(folder / name / f"{i}.png")
    return folder


@pytest.fixture(scope="session")
def images(tmp_path_factory):
    """A folder of 54 coloured images in 3 classes."""
    return make_folder(tmp_path_factory.mktemp("data") / "images")


SMALL = ["--batch_size", "8", "--img_size", "16", "--sample_interval", "4", "--device", "cpu"]
SMALLER = {name: ["--latent_dim", "4"] for name in ("vae", "gan", "cgan", "vqvae")}
SMALLER["gan"] += ["--arch", "conv", "--hidden_dim", "4"]
SMALLER["cgan"] += ["--arch", "conv", "--hidden_dim", "4"]
SMALLER["vae"] += ["--arch", "mlp"]
SMALLER["vqvae"] += ["--hidden_dim", "8", "--residual_dim", "4", "--n_embeddings", "16"]
SMALLER["pixelcnn"] = ["--hidden_dim", "4", "--n_layers", "1", "--img_size", "4"]
SMALLER["pixelcnnpp"] = ["--hidden_dim", "4", "--n_layers", "1", "--img_size", "4"]


@pytest.fixture
def small(script_name, images, tmp_path, monkeypatch):
    """Options of a short training, 6 steps per epoch (some scripts hold out every tenth image), in an
    empty folder.
    """
    monkeypatch.chdir(tmp_path)
    return ["--dataset", str(images), *SMALL, *SMALLER[script_name]]


@pytest.fixture
def trained(script, small, tmp_path_factory):
    """runs/NAME as `small` leaves it after one epoch: trained once per script, then copied."""
    kept = tmp_path_factory.getbasetemp() / "trained" / script.__name__
    if not kept.exists():
        shutil.copytree(
            script.train(script.parse_args([*small, "--n_epochs", "1", "--out_dir", "new"])), kept
        )
        shutil.rmtree("new")
    return shutil.copytree(kept, Path("runs", script.__name__))


@pytest.fixture
def recorded(monkeypatch):
    """recorded(script, *names) has these network classes of a script note what happens to them in training.

    Gives an object for each: `before`, the network as it was made, and `inputs`, those of each forward pass.
    """

    def record(script, name):
        note = SimpleNamespace(before=None, inputs=[])
        network_class = getattr(script, name)

        class Recorded(network_class):
            def __init__(self, *arguments):
                super().__init__(*arguments)
                if note.before is None:
                    note.before = network_class(*arguments)
                    note.before.load_state_dict(self.state_dict())

            def forward(self, *inputs):
                if self.training:
                    note.inputs.append(inputs)
                return super().forward(*inputs)

        monkeypatch.setattr(script, name, Recorded)
        return note

    return lambda script, *names: [record(script, name) for name in names]


@pytest.fixture
def command(monkeypatch, capsys):
    """Call a script as its command line would: command(script, *arguments) -> exit status, lines on
    stderr.
    """

    def call(script, *arguments):
        monkeypatch.setattr(sys, "argv", [f"{script.__name__}.py", *map(str, arguments)])
        capsys.readouterr()
        status = 0
        try:
            script.main()
        except SystemExit as e:
            if isinstance(e.code, str):  # what the interpreter does with it
                print(e.code, file=sys.stderr)
            status = 1 if isinstance(e.code, str) else e.code or 0
        return status, capsys.readouterr().err.splitlines()

    return call


@pytest.fixture
def refused(command):
    """Call a script as `command` does: it must fail, with all of `says` in one line, after argparse's
    usage if any.
    """

    def call(script, *arguments, says=()):
        status, lines = command(script, *arguments)
        assert status in (1, 2), lines
        assert lines[-1].startswith(f"{script.__name__}.py: error: "), lines
        assert len(lines) == 1 or (len(lines) == 2 and lines[0].startswith("usage: ") and status == 2), lines
        assert all(str(word) in lines[-1] for word in says), lines[-1]

    return call


def run_script(path: Path, *arguments, cwd: Path, **environment) -> subprocess.CompletedProcess:
    """A script in a process of its own."""
    return subprocess.run(
        [sys.executable, path, *map(str, arguments)],
        cwd=cwd,
        env=os.environ | environment,
        capture_output=True,
        text=True,
    )


def checkpoint(run) -> dict:
    """What a run has saved."""
    return torch.load(Path(run, "checkpoint.pt"), weights_only=True)


# ---------------------------------------------------------------- processes, beside the other tests

# What a script prints is read; it neither waits for a terminal nor uses more than one core.
PIPES = dict(
    stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=os.environ | {"OMP_NUM_THREADS": "1"}
)

IMPORTS = f"""
import signal, socket, sys, torch
def state():
    handler = signal.getsignal(signal.SIGINT)
    return torch.get_rng_state().tolist(), torch.get_num_threads(), handler, socket.getdefaulttimeout()
before = state()
sys.argv = ["x", "--nonsense"]
sys.path.insert(0, {str(ROOT)!r})
import {", ".join(SCRIPTS)}
assert state() == before
"""


ONE_AFTER_ANOTHER = """
import json, os, runpy, sys
for folder, arguments in json.loads(sys.argv[1]):
    os.chdir(folder)
    sys.argv = ["mine.py", *arguments]
    runpy.run_path("mine.py", run_name="__main__")
"""


@pytest.fixture(scope="session")
def children(images, tmp_path_factory):
    """Each script, copied alone into an empty folder and trained there: gives the folders and the processes.

    cgan has a process of its own, and no data; the others share one, as torch takes seconds to import.
    Another process imports all.
    """
    folders = {name: tmp_path_factory.mktemp(name) for name in (*SCRIPTS, "imports")}
    for name in SCRIPTS:
        shutil.copy(ROOT / f"{name}.py", folders[name] / "mine.py")
    few = ["--n_epochs", "1", "--dataset", str(images), "--batch_size", "8", "--sample_interval", "4"]
    others = [(str(folders[name]), [*few, *SMALLER[name]]) for name in SCRIPTS if name != "cgan"]
    commands = {
        "imports": ["-B", "-c", IMPORTS],
        "cgan": ["mine.py", "--n_epochs", "1", "--batch_size", "500", "--sample_interval", "10"],
        "others": ["-c", ONE_AFTER_ANOTHER, json.dumps(others)],
    }
    processes = {
        name: subprocess.Popen([sys.executable, *command], cwd=folders.get(name, folders["vae"]), **PIPES)
        for name, command in commands.items()
    }
    yield folders, processes
    for process in processes.values():
        process.kill()
        process.communicate()


@pytest.fixture(scope="session")
def two_processes(images, tmp_path_factory):
    """The folder in which torchrun does the work of test_torchrun.py, and torchrun."""
    folder = tmp_path_factory.mktemp("two")
    for name in SCRIPTS:
        (folder / "runs" / name).mkdir(parents=True)  # so that a new run gets another name
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2"]
    child = subprocess.Popen(
        [*command, ROOT / "tests" / "test_torchrun.py", images],
        cwd=folder,
        env=os.environ | {"OMP_NUM_THREADS": "1"},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )
    yield folder, child
    child.terminate()  # torchrun ends its workers, too
    child.communicate()


@pytest.fixture(scope="session", autouse=True)
def processes_begin_at_once(request):
    """Those that any of the tests asks for."""
    for name in ("two_processes", "children"):
        if any(name in item.fixturenames for item in request.session.items):
            request.getfixturevalue(name)
