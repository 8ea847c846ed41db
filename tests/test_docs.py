"""README and docs: commands and Python blocks run, changes of a script train, links lead somewhere."""

import importlib
import importlib.util
import itertools
import re
import shlex
import shutil
import sys
from unittest.mock import Mock

import pytest
import torch
from conftest import ROOT, SCRIPTS, SMALL, SMALLER, checkpoint, make_folder

PAGES = {path.name: path.read_text() for path in (ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md")))}
BLOCK = re.compile(r"^```(.*)\n((?:.*\n)*?)```$", re.MULTILINE)


def blocks(page: str, language: str) -> list[str]:
    return [text for name, text in BLOCK.findall(PAGES[page]) if name == language]


def test_links_lead_somewhere():
    for page, text in PAGES.items():
        folder = ROOT if page == "README.md" else ROOT / "docs"
        for link in re.findall(r"\]\(([^)#]+)", text):
            assert link.startswith("https://") or (folder / link).exists(), (page, link)


def test_the_list_of_options_is_up_to_date():
    """If not: python docs/write_options.py"""
    sys.path.insert(0, str(ROOT / "docs"))
    write_options = importlib.import_module("write_options")
    assert PAGES["options.md"] == write_options.options_as_markdown()


# ---------------------------------------------------------------- commands

COMMAND = re.compile(rf"(?:^|`|python |-m |=2 )({'|'.join(SCRIPTS)})\.py((?: [\w./=-]+)*)", re.MULTILINE)


def test_every_option_exists():
    """Also in the middle of a sentence or of a table."""
    n_options = 0
    for page, text in PAGES.items():
        for name, arguments in COMMAND.findall(text):
            options = vars(importlib.import_module(name).parse_args([]))
            for word in arguments.split():
                if word.startswith("--"):
                    n_options += 1
                    assert word.removeprefix("--").removeprefix("no-") in options, (page, name, word)
    assert n_options > 20


@pytest.fixture
def in_an_empty_folder(tmp_path, monkeypatch):
    """With the folder of images of which the documentation speaks."""
    monkeypatch.chdir(tmp_path)
    make_folder(tmp_path / "path/to/folder", classes=("1", "3", "7"))


@pytest.fixture
def small_runs(in_an_empty_folder, tmp_path_factory, monkeypatch):
    """And with a small run of each script, trained once; MNIST is not there, and few digits are."""
    kept = tmp_path_factory.getbasetemp() / "small_runs"
    for name in SCRIPTS:
        script = importlib.import_module(name)
        if not (kept / name).exists():
            options = ["--dataset", "path/to/folder", *SMALL, *SMALLER[name], "--n_epochs", "1"]
            shutil.copytree(script.train(script.parse_args(options)), kept / name)
        monkeypatch.setattr(script, "draw_digits", few_digits)
    shutil.copytree(kept, "runs", dirs_exist_ok=True)


def few_digits(n):
    return torch.zeros(64, 1, 28, 28, dtype=torch.uint8), torch.arange(64) % 10, list("0123456789")


def run_small(line: str, command) -> None:
    """A line of the documentation: with small networks, for two epochs, in this process."""
    words = shlex.split(line, comments=True)
    at = next(i for i, word in enumerate(words) if word.removesuffix(".py") in SCRIPTS)
    script = importlib.import_module(words[at].removesuffix(".py"))
    arguments = words[at + 1 :]
    if "--resume" not in arguments:
        arguments += [*SMALL, *SMALLER[script.__name__]]
    if "--generate" in arguments:
        arguments += ["--generate", "3"]
    else:
        arguments += ["--n_epochs", "2"]
    status, lines = command(script, *arguments)
    assert status == 0, (line, lines)


def test_every_command_runs(small_runs, command):
    lines = [line for block in blocks("README.md", "") for line in block.splitlines()]
    lines = [line for line in lines if re.search(rf"\b({'|'.join(SCRIPTS)})\.py", line)]
    assert len(lines) > 8
    for line in lines:
        run_small(line, command)


# ---------------------------------------------------------------- Python


def test_every_python_block_runs(small_runs, monkeypatch):
    """In one Python for each page. matplotlib need not be installed."""
    monkeypatch.setitem(sys.modules, "matplotlib", Mock())
    monkeypatch.setitem(sys.modules, "matplotlib.pyplot", Mock())
    for page in PAGES:
        names = {"__name__": "__main__"}
        for block in blocks(page, "python"):
            exec(compile(block, page, "exec"), names)


# ---------------------------------------------------------------- changes of a script

PARTS = [re.split(r"^#{2,3} ", PAGES[page], flags=re.MULTILINE) for page in ("README.md", "extending.md")]
CHANGES = []
for section in itertools.chain(*PARTS):
    found = [
        (language.split()[1:], text) for language, text in BLOCK.findall(section) if language[:4] == "diff"
    ]
    for name in sorted({file for files, _ in found for file in files}):
        CHANGES.append((section, name, [text for files, text in found if name in files]))


def apply(diff: str, code: str) -> str:
    """The code with a difference applied: what it says stands there must stand there, once."""
    lines = diff.splitlines(keepends=True)
    before = "".join(line[1:] for line in lines if line[0] != "+")
    after = "".join(line[1:] for line in lines if line[0] != "-")
    assert code.count(before) == 1, before
    return code.replace(before, after)


@pytest.mark.parametrize(
    "section, file, diffs", CHANGES, ids=[f"{s.splitlines()[0]} [{file}]" for s, file, _ in CHANGES]
)
def test_every_change_trains(section, file, diffs, in_an_empty_folder, tmp_path, monkeypatch):
    """And what it has trained can be loaded."""
    code = (ROOT / file).read_text()
    for diff in diffs:
        code = apply(diff, code)
    (tmp_path / "mine.py").write_text(code)
    spec = importlib.util.spec_from_file_location("mine", tmp_path / "mine.py")
    mine = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(mine)
    options = [*SMALL, *SMALLER[file.removesuffix(".py")]]
    arch = re.search(r"`(?:\w+\.py )?(--arch \w+)", section)
    if arch:
        options += arch[1].split()
    if not any("load_data(opt)" in diff for diff in diffs):  # which the examples of data replace
        options += ["--dataset", "path/to/folder"]
    run = mine.train(mine.parse_args([*options, "--n_epochs", "1"]))
    assert checkpoint(run)["log"][-1]["epoch"] == 1
    mine.load(run)
