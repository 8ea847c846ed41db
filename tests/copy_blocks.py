"""Copy the blocks of plumbing of one script into the others: python tests/copy_blocks.py cgan"""

import re
import sys

from conftest import ROOT, SCRIPTS

BLOCKS = re.compile(r"^# --- block: .*?(?=^def main)", re.MULTILINE | re.DOTALL)

if __name__ == "__main__":
    blocks = BLOCKS.search((ROOT / f"{sys.argv[1]}.py").read_text()).group()
    for name in set(SCRIPTS) - {sys.argv[1]}:
        file = ROOT / f"{name}.py"
        file.write_text(BLOCKS.sub(lambda _: blocks, file.read_text()))
