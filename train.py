"""Net2Net experiments: `python train.py` lists them, `python train.py experiment=quickstart` runs one."""

import sys

try:
    from experiments.command import main
except ModuleNotFoundError as error:
    sys.exit(f"{error.name} is not installed in this Python: run `make setup`, then `source .venv/bin/activate`.")

if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
