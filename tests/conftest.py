"""The same tests whatever the caller's environment says."""

import os
import sys

# The programs that tests start inherit these. What to do about warnings is said in pyproject.toml;
# where the hub's files are and whether it may be asked (HF_…) is left as it is.
SETTLED = ("PYTHONWARNINGS", "MINIBOOTH_KERNELS", "COLUMNS", "NO_COLOR")
for name in list(os.environ):
    if name in SETTLED or name.startswith(("TORCH", "PYTORCH", "TQDM")):
        del os.environ[name]
sys.warnoptions.clear()

import torch  # noqa: E402

# The models here are tiny: a second thread costs more than it brings.
torch.set_num_threads(1)
