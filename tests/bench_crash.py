"""Kill a training at random moments and see that nothing is lost. Run by hand:

    python tests/bench_crash.py cgan --kills 20
    python tests/bench_crash.py pixelcnn --kills 5 --options "--dataset /path/to/folder --conditional"

Trains a small network on the built-in digits, once undisturbed and once killed (SIGKILL) at random moments
and resumed each time, with a checkpoint every second. The checkpoint must load after each kill, and the
last resume must finish. Then what the two runs leave must be the same to the last bit: every tensor and
number of the checkpoint (weights, averaged ones too, optimisers, the log), every row of log.csv, every
picture, and the codes of vqvae.py; only seconds and the names of the runs may differ.
"""

import argparse
import csv
import importlib
import random
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from textwrap import shorten

import numpy as np
import torch

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

# Small networks, so that a training takes about half a minute on one core.
OPTIONS = {
    "vae": "--n_epochs 20 --arch mlp",
    "gan": "--n_epochs 20",
    "cgan": "--n_epochs 20",
    "vqvae": "--n_epochs 5 --hidden_dim 16 --residual_dim 8 --n_embeddings 64",
    "pixelcnn": "--n_epochs 2 --hidden_dim 8 --n_layers 2 --img_size 12",
    "pixelcnnpp": "--n_epochs 2 --hidden_dim 8 --n_layers 1 --img_size 8",
}
DIFFER = {"seconds", "out_dir", "resume"}  # between two runs with the same result


def differences(a, b, name: str = "checkpoint") -> list[str]:
    """The names of what differs between two checkpoints, or parts of them."""
    if isinstance(a, torch.Tensor):
        same = isinstance(b, torch.Tensor) and a.dtype == b.dtype and torch.equal(a, b)
        return [] if same else [name]
    if type(a) is not type(b):
        return [name]
    if isinstance(a, dict):
        if list(a) != list(b):
            return [f"{name}: keys"]
        return [
            text for key in a if key not in DIFFER for text in differences(a[key], b[key], f"{name}.{key}")
        ]
    if isinstance(a, list | tuple):
        if len(a) != len(b):
            return [f"{name}: length"]
        return [text for i in range(len(a)) for text in differences(a[i], b[i], f"{name}.{i}")]
    return [] if a == b else [name]


def read_log(run: Path) -> list[dict]:
    with open(run / "log.csv", newline="") as file:
        return list(csv.DictReader(file))


def compare(whole: Path, killed: Path) -> list[str]:
    """The names of what differs between two runs."""
    states = [torch.load(run / "checkpoint.pt", weights_only=True) for run in (whole, killed)]
    found = differences(*states)
    found += differences(read_log(whole), read_log(killed), "log.csv")
    names = [sorted(file.name for file in (run / "images").glob("*.png")) for run in (whole, killed)]
    found += differences(*names, "images")
    for name in names[0]:
        if (whole / "images" / name).read_bytes() != (killed / "images" / name).read_bytes():
            found.append(name)
    if (whole / "codes.npz").exists():
        with np.load(whole / "codes.npz") as a, np.load(killed / "codes.npz") as b:
            found += [f"codes.npz: {name}" for name in a if not np.array_equal(a[name], b[name])]
    return found


def start(script: str, folder: str, *arguments: str) -> subprocess.Popen:
    """Begin a training, and come back when its steps begin."""
    code = f"import sys; sys.path.insert(0, {str(ROOT)!r}); import {script} as script; "
    code += "script.CHECKPOINT_SECONDS = 1; script.main()"
    command = [sys.executable, "-c", code, *arguments]
    child = subprocess.Popen(command, cwd=folder, stdout=subprocess.PIPE, text=True)
    for line in child.stdout:
        if line.startswith("to continue after a stop: --resume"):
            return child
    raise SystemExit(f"{script}.py {' '.join(arguments)}: status {child.wait()} before its first step")


def finish(child: subprocess.Popen) -> None:
    child.communicate()
    assert child.returncode == 0


def main() -> None:
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("script", choices=list(OPTIONS))
    p.add_argument("--kills", type=int, default=20)
    p.add_argument("--options", default="", help="more options of the script")
    opt = p.parse_args()
    script = importlib.import_module(opt.script)
    with tempfile.TemporaryDirectory() as folder:
        new = f"--dataset digits --sample_interval 50 {OPTIONS[opt.script]} {opt.options}".split()
        child = start(opt.script, folder, *new, "--out_dir", "whole")
        began = time.perf_counter()
        finish(child)
        seconds = time.perf_counter() - began
        print(f"undisturbed: {seconds:.1f} s", flush=True)

        killed = Path(folder, "killed")
        child = start(opt.script, folder, *new, "--out_dir", "killed")
        n_killed = 0
        for kill in range(opt.kills):
            time.sleep(random.uniform(0, 2 * seconds / (opt.kills + 1)))
            status = child.poll()
            child.kill()
            child.communicate()
            assert status in (None, 0)
            script.load(killed)
            done = torch.load(killed / "checkpoint.pt", weights_only=True)["step"]
            if status is None:
                n_killed += 1
                print(f"kill {kill + 1}: {done} steps saved", flush=True)
            else:
                print(f"kill {kill + 1} came too late: {done} steps were done", flush=True)
            child = start(opt.script, folder, "--resume", "killed")
        finish(child)
        found = compare(Path(folder, "whole"), killed)
        rows = len(read_log(killed))
    if found:
        sys.exit(f"{opt.script}: not as in the undisturbed run: {shorten(', '.join(found), 1000)}")
    print(f"{opt.script}: killed {n_killed} times; checkpoint, {rows} log rows and pictures are the same")


if __name__ == "__main__":
    main()
