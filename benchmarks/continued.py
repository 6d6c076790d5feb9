"""What the text of healing would do to the original itself: trained on, next-byte loss, on the same batches.

    python benchmarks/continued.py                      three learning rates, one seed (ten minutes)
    python benchmarks/continued.py --rate 3e-4 --seed 0 1 2

The yardstick of a healed "acc" model beside one that was trained on for as long. AdamW on all parameters, a linear rise
over a twentieth of the steps and a cosine to zero, one step a batch; no weight decay, as the steps are few.
"""

from __future__ import annotations

import argparse
import itertools
import logging
import math
import sys
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "samples"))

import stdlib_lm
import torch
import torch.nn.functional as F
from measured import keep, table

WARMUP = 0.05


def main() -> None:
    """Train, print the table, keep the rows."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rate", type=float, nargs="+", default=[1e-4, 3e-4, 1e-3])
    parser.add_argument("--seed", type=int, nargs="+", default=[0])
    parser.add_argument("--threads", type=int, default=2)
    options = parser.parse_args()
    logging.getLogger("transformers").setLevel(logging.ERROR)
    torch.set_num_threads(options.threads)
    original = stdlib_lm.evaluate(stdlib_lm.build_model())["bits per byte"]
    rows = [continued(rate, seed, original) for rate, seed in itertools.product(options.rate, options.seed)]
    keep("continued", rows, ("rate", "seed"))
    print(table(rows, {"rate": "g", "seed": "d", "original": ".4f", "bits_per_byte": ".4f", "training": ".4f"}))


def continued(rate: float, seed: int, original: float) -> dict[str, Any]:
    """One row: the original after one step on each calibration batch; `training` is the last quarter's mean loss."""
    model = stdlib_lm.build_model()
    batches = list(stdlib_lm.calibration_data(seed))
    optimizer = torch.optim.AdamW(model.parameters(), lr=rate, betas=(0.9, 0.95), weight_decay=0.0)
    losses = []
    for step, inputs in enumerate(batches):
        rise = min(1.0, (step + 1) / (WARMUP * len(batches)))
        for group in optimizer.param_groups:
            group["lr"] = rate * rise * 0.5 * (1.0 + math.cos(math.pi * step / len(batches)))
        logits = model(**inputs).logits[:, :-1]
        loss = F.cross_entropy(logits.flatten(0, 1), inputs["input_ids"][:, 1:].flatten())
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item() / math.log(2))
    last = losses[3 * len(losses) // 4 :]
    after = stdlib_lm.evaluate(model)["bits per byte"]
    return {
        "rate": rate, "seed": seed, "original": original, "bits_per_byte": after, "training": sum(last) / len(last)
    }  # fmt: skip


if __name__ == "__main__":
    main()
