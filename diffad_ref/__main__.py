"""The front door: `python -m diffad_ref` starts `tools.shell`."""

import sys

from diffad_ref.tools.shell import main

if __name__ == "__main__":
    sys.exit(main())
