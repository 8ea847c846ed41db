"""Copy the blocks of plumbing of one script into the others: python tests/copy_blocks.py cgan"""

import re
import sys

from conftest import ROOT, SCRIPTS

BLOCK = re.compile(r"^# --- block: (\w+)\n.*?(?=^# ---|^def main)", re.MULTILINE | re.DOTALL)

if __name__ == "__main__":
    blocks = {block[1]: block[0] for block in BLOCK.finditer((ROOT / f"{sys.argv[1]}.py").read_text())}
    for name in {*SCRIPTS} - {sys.argv[1]}:
        file = ROOT / f"{name}.py"
        file.write_text(BLOCK.sub(lambda old: blocks.get(old[1], old[0]), file.read_text()))
