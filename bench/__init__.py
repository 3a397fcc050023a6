"""How fast the parts are that have a target, one topic a file.

Machines are noisy, so every figure is the best of several rounds, and every claim a ratio of two
things measured in turn, in one run.
"""
