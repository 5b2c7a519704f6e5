"""The same tests whatever the caller's environment says."""

import os
import sys

# What to do about warnings is said in pyproject.toml; the programs that tests start inherit these.
os.environ.pop("PYTHONWARNINGS", None)
sys.warnoptions.clear()

import torch  # noqa: E402

# The models here are tiny: a second thread costs more than it brings.
torch.set_num_threads(1)
