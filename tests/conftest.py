"""What every test runs under: one thread for each worker, so that parallel workers do not fight over cores."""

import sys
from pathlib import Path

import torch

torch.set_num_threads(1)
sys.path.insert(0, str(Path(__file__).parent))  # helper modules of the tests
