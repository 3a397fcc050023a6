"""The front door: `python -m diffad_ref` starts `tools.commands`."""

import sys

from diffad_ref.tools.commands import main

if __name__ == "__main__":
    sys.exit(main())
