"""Settings of all tests."""

import torch as th

# The tests' networks are tiny: more threads would only wait for each other
th.set_num_threads(1)
