"""The command line under torchrun, whose second rank dies in the middle of its first part."""

import os

from maira_sae.cli import main
from tests.crash.dying import die_at

if __name__ == "__main__":
    if os.environ["RANK"] == "1":
        die_at(12)
    main()
