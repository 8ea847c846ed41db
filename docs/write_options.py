"""Writes options.md: the options of each script with their defaults, as its --help tells them. Run by hand
after options have changed:

    python docs/write_options.py
"""

import importlib
import sys
from argparse import ArgumentParser, Namespace
from contextlib import suppress
from pathlib import Path
from types import ModuleType
from unittest import mock

ROOT = Path(__file__).resolve().parent.parent
SCRIPTS = ["vae", "gan", "cgan", "vqvae", "pixelcnn", "pixelcnnpp"]
INTRODUCTION = """\
# Options

Written by `write_options.py` from what `--help` prints. An option without a default is off, or decided by the
data or by other options, as its text says. An on-off option such as `--amp` is switched off by `--no-amp`.
"""


def parser_of(script: ModuleType) -> ArgumentParser:
    """The parser that parse_args of a script makes."""
    parsers = []

    def keep(parser: ArgumentParser, argv: list[str]) -> Namespace:
        parsers.append(parser)
        raise StopIteration

    with mock.patch.object(script, "parse_and_check", keep), suppress(StopIteration):
        script.parse_args([])
    return parsers[0]


def describe(script: ModuleType) -> str:
    """A heading, and a table with a row for each option."""
    lines = [f"\n## {script.__name__}.py\n", "| option | default | meaning |", "|---|---|---|"]
    for action in parser_of(script)._actions:
        if action.dest == "help":
            continue
        default = action.default
        if default is None:
            default = ""
        if isinstance(default, bool):
            default = "on" if default else "off"
        text = action.help.replace("|", "\\|")
        if action.choices:
            text += f" ({', '.join(map(str, action.choices))})"
        lines.append(f"| `{action.option_strings[0]}` | {default} | {text} |")
    return "\n".join(lines) + "\n"


def options_as_markdown() -> str:
    sys.path.insert(0, str(ROOT))
    return INTRODUCTION + "".join(describe(importlib.import_module(name)) for name in SCRIPTS)


if __name__ == "__main__":
    (ROOT / "docs" / "options.md").write_text(options_as_markdown())
