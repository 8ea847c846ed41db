"""What the scripts have in common as texts and modules: the same plumbing, no import of one another,
their options.
"""

import ast
import functools
import importlib
import inspect
import re

import pytest
import torch
from conftest import ROOT, SCRIPTS

PLUMBING = (
    "# ================================================================ plumbing: the same in every script\n"
)


def source(name):
    return (ROOT / f"{name}.py").read_text()


def test_the_plumbing_is_the_same_in_every_script():
    """To the letter, up to main. What must change is changed in all copies at once."""
    copies = {}
    for name in SCRIPTS:
        _, plumbing = source(name).split(PLUMBING)
        copies[name] = plumbing.split("\ndef main")[0]
    for name in SCRIPTS:
        assert copies[name].splitlines() == copies["cgan"].splitlines(), name


def test_functions_that_some_scripts_share_are_the_same():
    """A function or class with the same name in two scripts is the same, or listed here as their own."""
    own = {
        "parse_args",
        "train",
        "load",
        "generate",
        "main",
        "Generator",
        "Discriminator",
        "test",
        "Residual",
    }
    own |= {"PixelCNN", "new_model"}
    texts = {}
    for name in SCRIPTS:
        for node in ast.parse(source(name)).body:
            if isinstance(node, ast.FunctionDef | ast.ClassDef) and node.name not in own:
                text = ast.get_source_segment(source(name), node)
                first, first_text = texts.setdefault(node.name, (name, text))
                assert text.splitlines() == first_text.splitlines(), (
                    f"{node.name} in {first}.py and {name}.py"
                )
    assert "hold_out" in texts


def test_no_script_imports_another():
    for name in SCRIPTS:
        for node in ast.walk(ast.parse(source(name))):
            imported = [alias.name for alias in node.names] if isinstance(node, ast.Import) else []
            imported += [node.module] if isinstance(node, ast.ImportFrom) else []
            assert not {module.split(".")[0] for module in imported} & {*SCRIPTS, "tests"}, name


def test_the_metadata_names_what_is_imported(script):
    """For `uv run`: a script says in its first lines what it depends on."""
    metadata = re.search(r"^# /// script\n(.*?)^# ///$", source(script.__name__), re.MULTILINE | re.DOTALL)[1]
    for module, package in {
        "torch": "torch",
        "torchvision": "torchvision",
        "numpy": "numpy",
        "PIL": "pillow",
    }.items():
        imports = re.search(rf"^(import|from) {module}\b", source(script.__name__), re.MULTILINE)
        assert bool(imports) == bool(re.search(rf'"{package}[>"]', metadata)), package


# ---------------------------------------------------------------- options

COMMON = dict(
    n_epochs=200, channels=None, n_cpu=8, dataset=None, data_dir="data", seed=0, device="auto", b2=0.999
)
COMMON |= dict(amp=False, resume=None, generate=None, ema=0.999, batch_size=64, sample_interval=400)
OPTIONS = {
    "vae": dict(arch="burgess", latent_dim=128, lr=1e-3, b1=0.9, img_size=32, beta=1.0, prior="fitted"),
    "gan": dict(arch="mlp", latent_dim=100, lr=6e-4, b1=0.5),
    "cgan": dict(
        arch="mlp", latent_dim=100, lr=4e-4, b1=0.5, img_size=32, conditioning="projection", n_classes=None
    ),
    "vqvae": dict(
        latent_dim=64, lr=1e-3, b1=0.9, img_size=32, n_embeddings=512, commitment=0.25, restart=True
    ),
    "pixelcnn": dict(arch="gated", lr=2e-3, b1=0.9, img_size=28, binarize=False, conditional=False),
    "pixelcnnpp": dict(lr=2e-3, b1=0.9, binarize=False, conditional=False),
}
OPTIONS["vae"] |= dict(sample_interval=1000, labels=None, reconstruct=None)
OPTIONS["cgan"] |= dict(labels=None)
OPTIONS["vqvae"] |= dict(batch_size=128)
OPTIONS["pixelcnn"] |= dict(batch_size=16, sample_interval=4000)
OPTIONS["pixelcnnpp"] |= dict(batch_size=16, sample_interval=4000)


def test_options_and_defaults(script):
    options = vars(script.parse_args([]))
    for name, value in (COMMON | OPTIONS[script.__name__]).items():
        if name != "channels" or script.__name__ != "pixelcnn":  # which has only grey images
            assert options[name] == value, name
    assert options["out_dir"] == f"runs/{script.__name__}"


def test_help_shows_each_option_with_its_default(script, capsys):
    with pytest.raises(SystemExit) as stop:
        script.parse_args(["--help"])
    assert stop.value.code == 0
    text = " ".join(capsys.readouterr().out.split())
    for name, value in (COMMON | OPTIONS[script.__name__]).items():
        if name != "channels" or script.__name__ != "pixelcnn":
            assert f"--{name}" in text
            defaults = (f"(default: {value})", f"(default: {value};")  # or the one of another network follows
            assert value is None or any(default in text for default in defaults), name
    assert "(default: None)" not in text


def test_options_without_docstrings(script, monkeypatch):
    """As under python -OO."""
    monkeypatch.setattr(script, "__doc__", None)
    assert script.parse_args(["--n_epochs", "3"]).n_epochs == 3


def test_uses_are_options(script):
    """What USES and MAY_CHANGE name exists: a misspelt one would free nothing."""
    options = set(vars(script.parse_args([])))
    assert script.USES <= options
    assert script.MAY_CHANGE <= options


def test_every_public_function_and_class_is_explained(script):
    for name, thing in vars(script).items():
        if inspect.getmodule(thing) is script and name in ("parse_args", "train", "load", "generate"):
            assert thing.__doc__, name


def test_options_reach_the_optimisers_and_the_average(script, small, monkeypatch):
    adams = []
    decays = []
    adam = torch.optim.Adam
    update_average = script.update_average

    def recording_adam(*arguments, **more):
        adams.append(adam(*arguments, **more))
        return adams[-1]

    def recording_update(average, model, decay, step):
        decays.append((decay, step))
        update_average(average, model, decay, step)

    monkeypatch.setattr(torch.optim, "Adam", recording_adam)
    monkeypatch.setattr(script, "update_average", recording_update)
    options = ["--n_epochs", "1", "--lr", "0.01", "--b1", "0.1", "--b2", "0.2", "--ema", "0.3"]
    script.train(script.parse_args([*small, *options]))
    assert len(adams) == (2 if "gan" in script.__name__ else 1)
    assert decays == [(0.3, step) for step in range(6)]
    for optimizer in adams:
        assert optimizer.defaults["lr"] == 0.01
        assert optimizer.defaults["betas"] == (0.1, 0.2)


# ---------------------------------------------------------------- single functions of the plumbing


def test_seeds_have_nothing_in_common(cgan):
    draws = set()
    keys = [
        (seed, kind, i, *rank)
        for seed in (0, 1)
        for kind in ("epoch", "step")
        for i in range(20)
        for rank in [(), (0,), (1,)]
    ]
    for key in keys:
        cgan.seed(*key)
        draws.add(torch.rand(4).sum().item())
    assert len(draws) == len(keys)


def test_an_accelerator_is_seeded_too(cgan, monkeypatch):
    """With one, torch seeds all devices; without, only the CPU's generator is seeded, to the same numbers."""
    seeds = []
    manual_seed = torch.manual_seed
    monkeypatch.setattr(torch, "manual_seed", lambda n: [seeds.append(n), manual_seed(n)])
    draws = []
    for there in (True, False):
        monkeypatch.setattr(torch.accelerator, "is_available", lambda there=there: there)
        cgan.seed(3, "step", 7, 0)
        draws.append(torch.rand(4))
    assert len(seeds) == 1 and torch.equal(*draws)


def test_the_averaged_weights(cgan):
    """They forget how they began, then follow with the decay rate; batch norm's statistics are averaged,
    too.
    """
    model = torch.nn.BatchNorm1d(2)
    average = torch.nn.BatchNorm1d(2)
    with torch.no_grad():
        average.weight.fill_(3.0)
        average.running_mean.fill_(5.0)
        average.num_batches_tracked.fill_(7)
    cgan.update_average(average, model, 0.999, step=1)  # early: (1 + 1) / (10 + 1) is kept
    torch.testing.assert_close(average.weight.detach(), torch.full((2,), 1 + 2 * 2 / 11))
    torch.testing.assert_close(average.running_mean, torch.full((2,), 5 * 2 / 11))
    assert average.num_batches_tracked == 7  # a count is no average
    cgan.update_average(average, model, 0.9, step=10**6)
    torch.testing.assert_close(average.running_mean, torch.full((2,), 5 * 2 / 11 * 0.9))
    cgan.update_average(average, model, 0.0, step=10**6)  # off: the model as it is
    assert torch.equal(average.weight, model.weight)


@pytest.mark.parametrize(
    "kind, low, below, good, bad",
    [
        (int, 1, 10, ["1", "9"], ["0", "10", "-1", "1.5", "nan", "many", ""]),
        (float, 0, 1, ["0", "0.5", "1e-9"], ["1", "-0.1", "nan", "inf", "x"]),
    ],
)
def test_numbers(cgan, kind, low, below, good, bad):
    parse = cgan.number(kind, low, below)
    assert [parse(text) for text in good] == [kind(text) for text in good]
    for text in bad:
        with pytest.raises((ValueError, cgan.argparse.ArgumentTypeError)):
            parse(text)


def test_a_new_folder_is_claimed_once(cgan, tmp_path):
    """However many ask for it at once, each gets one of its own."""
    with cgan.ThreadPoolExecutor(8) as pool:
        folders = list(pool.map(functools.partial(cgan.new_folder), [tmp_path / "a" / "run"] * 40))
    assert len(set(folders)) == 40
    assert {folder.name for folder in folders} == {"run", *(f"run-{n}" for n in range(2, 41))}


def test_a_folder_that_exists_is_left_alone(cgan, tmp_path):
    (tmp_path / "run").mkdir()
    assert cgan.new_folder(tmp_path / "run") == tmp_path / "run-2"


def test_a_file_is_whole_or_not_there(cgan, tmp_path):
    file = tmp_path / "a.txt"
    with pytest.raises(KeyboardInterrupt), cgan.replacing(file) as new:
        new.write_text("half")
        raise KeyboardInterrupt
    assert not list(tmp_path.iterdir())
    with cgan.replacing(file) as new:
        new.write_text("whole")
        assert not file.exists()
    assert file.read_text() == "whole"
    with pytest.raises(OSError, match="a.txt.*cannot be written.*full"), cgan.replacing(file) as new:
        new.write_text("half")
        raise OSError("full")
    assert [path.read_text() for path in tmp_path.iterdir()] == ["whole"]


class Broken:
    """A stream that fails, as one does that was closed."""

    def __init__(self, error):
        self.error = error

    def write(self, text):
        raise self.error

    def flush(self):
        pass


@pytest.mark.parametrize(
    "error", [BrokenPipeError(), ValueError("closed"), UnicodeEncodeError("ascii", "é", 0, 1, "no")]
)
def test_a_message_never_ends_a_training(cgan, monkeypatch, error):
    monkeypatch.setattr(cgan.sys, "stdout", Broken(error))
    cgan.say("é")


def test_importing_a_script_by_its_copy(tmp_path, monkeypatch):
    """A copy under another name is a script of its own: its runs are not the original's."""
    (tmp_path / "mine.py").write_text(source("cgan"))
    monkeypatch.syspath_prepend(str(tmp_path))
    mine = importlib.import_module("mine")
    assert mine.SCRIPT == "mine"
    assert mine.parse_args([]).out_dir == "runs/mine"
