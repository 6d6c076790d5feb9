"""What every test runs under: one thread for each worker, so that parallel workers do not fight over cores."""

import torch

torch.set_num_threads(1)
