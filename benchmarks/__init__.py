"""Benchmarks. Each figure stands beside a baseline that was measured in the same run: see `benchmarks.figures`."""

import os

# By default OpenMP's threads spin after a copy or a layer of a model: whoever runs next, in another process on two
# cores, would be measured with one of them taken. It has to be said before torch is imported.
os.environ.setdefault("OMP_WAIT_POLICY", "passive")
