"""Net2Net experiments: `python train.py` lists them, `python train.py experiment=quickstart` runs one."""

import sys

from experiments.command import main

if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
