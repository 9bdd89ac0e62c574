"""What holds for all tests."""

import os

# Set before torch is imported, and inherited by the processes that tests start. The number of threads decides the order
# in which floats are summed: runs can be equal bit for bit only if all of them have the same.
os.environ["OMP_NUM_THREADS"] = "1"
