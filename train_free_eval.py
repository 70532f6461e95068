"""Measure what dropping vision tokens costs and saves, without any training; `--help` lists the options."""

import sys

from nanovlm_v2drop.cli import main

if __name__ == "__main__":
    sys.exit(main())
