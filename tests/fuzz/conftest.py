"""Damaged and random input, for minutes: `python -m pytest -m fuzz tests/fuzz`, and never else.

FUZZ_EXAMPLES says how many of each. A failure ends with what repeats it; once mended, it becomes a
plain test where such tests are.
"""

import os

from hypothesis import HealthCheck, settings

os.environ["HF_HUB_OFFLINE"] = "1"  # no setting that is tried may fetch anything

settings.register_profile(
    "fuzz",
    max_examples=int(os.environ.get("FUZZ_EXAMPLES", 500)),
    deadline=None,
    database=None,  # nothing is written
    print_blob=True,
    suppress_health_check=list(HealthCheck),
)


def pytest_ignore_collect(config):
    """Who chooses by other marks, or by none, does not wait for this."""
    return None if config.option.markexpr == "fuzz" else True
