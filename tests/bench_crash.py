"""Kill a training at random moments and see that nothing is lost. Run by hand:

    python tests/bench_crash.py cgan --kills 20

Trains on the built-in digits, once undisturbed and once killed (SIGKILL) at random moments and resumed each time. The
checkpoint must load after each kill, the last resume must finish, and the weights must equal the undisturbed run's.
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
    p.add_argument("script", choices=["vae", "gan", "cgan"])
    p.add_argument("--kills", type=int, default=20)
    p.add_argument("--n_epochs", type=int, default=20)
    p.add_argument("--options", default="", help="more options of the script")
    opt = p.parse_args()
    script = importlib.import_module(opt.script)
    command = [sys.executable, f"{ROOT / opt.script}.py"]
    with tempfile.TemporaryDirectory() as folder:

        def start(*arguments):
            return subprocess.Popen([*command, *arguments], cwd=folder, stdout=subprocess.DEVNULL)

        new = ["--dataset", "digits", "--n_epochs", str(opt.n_epochs), "--sample_interval", "20", *opt.options.split()]
        assert start(*new, "--out_dir", "whole").wait() == 0
        checkpoint = Path(folder, "killed", "checkpoint.pt")
        child = start(*new, "--out_dir", "killed")
        while not checkpoint.exists():
            time.sleep(0.01)
        for kill in range(opt.kills):
            time.sleep(random.uniform(0, 8))
            ended = child.poll()
            child.kill()
            child.wait()
            script.load(checkpoint)
            position = torch.load(checkpoint, weights_only=True)["position"]
            print(
                f"kill {kill + 1}{' (finished)' if ended == 0 else ''}: {position['batches_done']} batches saved",
                flush=True,
            )
            assert ended in (None, 0)
            child = start("--resume", "killed")
        assert child.wait() == 0
        whole, killed = (
            torch.load(Path(folder, name, "checkpoint.pt"), weights_only=True) for name in ("whole", "killed")
        )
        for name in ("model", "G", "D", "G_avg"):
            for key, value in whole.get(name, {}).items():
                assert torch.equal(value, killed[name][key]), f"{name} {key} differs"
        rows = [len(Path(folder, name, "log.csv").read_text().splitlines()) for name in ("whole", "killed")]
        assert rows == [opt.n_epochs + 1] * 2
    print(f"killed {opt.kills} times, every checkpoint loaded, the final weights are those of the undisturbed run")


if __name__ == "__main__":
    main()
