"""Kill a training at random moments and see that nothing is lost. Run by hand:

    python tests/bench_crash.py cgan --kills 20

Trains on the built-in digits, once undisturbed and once killed (SIGKILL) at random moments and resumed each time, with
a checkpoint a second. The checkpoint must load after each kill, the last resume must finish, the weights, averaged
ones too, must equal the undisturbed run's, and the log must have each epoch once.
"""

import argparse
import importlib
import random
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import torch

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))


def main() -> None:
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("script", choices=["vae", "gan", "cgan", "vqvae", "pixelcnn"])
    p.add_argument("--kills", type=int, default=20)
    p.add_argument("--n_epochs", type=int, default=30)
    p.add_argument("--options", default="", help="more options of the script")
    opt = p.parse_args()
    script = importlib.import_module(opt.script)
    code = (
        f"import sys; sys.path.insert(0, {str(ROOT)!r}); import {opt.script} as s; s.CHECKPOINT_SECONDS = 1; s.main()"
    )
    with tempfile.TemporaryDirectory() as folder:

        def start(*arguments):
            """Begin, and come back when "writing to" is printed."""
            command = [sys.executable, "-c", code, *arguments]
            child = subprocess.Popen(command, cwd=folder, stdout=subprocess.PIPE, text=True)
            assert "writing to" in child.stdout.readline()
            return child

        def finish(child):
            child.communicate()
            assert child.returncode == 0

        new = ["--dataset", "digits", "--n_epochs", str(opt.n_epochs), "--sample_interval", "50", *opt.options.split()]
        finish(start(*new, "--out_dir", "whole"))
        child, middle = start(*new, "--out_dir", "killed"), 0
        for kill in range(opt.kills):
            time.sleep(random.uniform(0, 4))
            ended = child.poll()
            child.kill()
            child.communicate()
            assert ended in (None, 0)
            script.load(Path(folder, "killed"))
            done, *_ = torch.load(Path(folder, "killed", "checkpoint.pt"), weights_only=True)["position"]
            middle += done % 156 != 0
            print(f"kill {kill + 1}{' (finished)' if ended == 0 else ''}: {done} batches saved", flush=True)
            child = start("--resume", "killed")
        finish(child)
        runs = [Path(folder, name) for name in ("whole", "killed")]
        whole, killed = (torch.load(run / "checkpoint.pt", weights_only=True) for run in runs)
        for name in {"model", "model_avg", "G", "D", "G_avg"} & whole.keys():
            for key, value in whole[name].items():
                assert torch.equal(value, killed[name][key]), f"{name} {key} differs"
        epochs = [[line.split(",")[0] for line in (run / "log.csv").read_text().splitlines()[1:]] for run in runs]
        assert epochs == [[str(k + 1) for k in range(opt.n_epochs)]] * 2
    print(f"killed {opt.kills} times, {middle} of them resumed in mid-epoch: weights and log are the undisturbed run's")


if __name__ == "__main__":
    main()
