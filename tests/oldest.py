"""Run the quick tests with the oldest versions that requirements.txt and pyproject.toml allow.

    python tests/oldest.py                  in a temporary environment, of some 6 GB
    python tests/oldest.py --into FOLDER    in one that is kept

A bound that is no version, or with which a test fails, is too low.
"""

import argparse
import re
import subprocess
import sys
import venv
from pathlib import Path
from tempfile import TemporaryDirectory

ROOT = Path(__file__).resolve().parents[1]
BOUND = re.compile(r'^[ "]*([\w-]+)>=([\d.]+)', re.M)  # at the beginning of a line


def oldest() -> str:
    """Every lower bound as the one version that pip may take; so it must be one that exists."""
    files = ROOT / "requirements.txt", ROOT / "pyproject.toml"
    bounds = dict(pair for file in files for pair in BOUND.findall(file.read_text()))
    return "".join(f"{name}=={version}\n" for name, version in bounds.items())


def run(folder: Path) -> int:
    """Make the environment, install the package and its bounds, and test; pytest's exit status."""
    venv.create(folder, with_pip=True)
    python, constraints = folder.resolve() / "bin" / "python", folder.resolve() / "oldest.txt"
    constraints.write_text(oldest())
    install = "pip", "install", "--constraint", constraints, "--editable", ".[test]"
    subprocess.run([python, "-m", *install], cwd=ROOT, check=True)
    tests = "pytest", "tests", "-x", "-q", "-m", "not slow and not long"
    return subprocess.run([python, "-m", *tests], cwd=ROOT).returncode


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--into", type=Path, metavar="FOLDER", help="keep the environment here")
    into = parser.parse_args().into
    with TemporaryDirectory() as temporary:
        sys.exit(run(into or Path(temporary)))
