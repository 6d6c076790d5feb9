"""A trained byte-level Mixture-of-Experts language model and the text it reads: the sample that `make demo` converts.

    latentize samples/stdlib_lm.py -o out/       convert it
    python samples/stdlib_lm.py                  what the original says and scores

The model is a Qwen3-MoE of the transformers library (d 128, 4 layers, 16 experts of which 4 work on a token), trained
on the sources of Python's standard library; samples/stdlib_lm/README.md says where weights and text come from.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

DATA = Path(__file__).resolve().parent / "stdlib_lm"
WINDOW = 128  # bytes, the length the model was trained at
PIECE = 4096  # calibration.bin is made of pieces of this many consecutive bytes
CALIBRATION_BATCHES, CALIBRATION_ROWS = 400, 16
EVALUATION_WINDOWS, EVALUATION_ROWS = 1024, 64


def build_model() -> nn.Module:
    """The trained model, in fp32 and evaluation mode."""
    from transformers import AutoModelForCausalLM

    model: nn.Module = AutoModelForCausalLM.from_pretrained(DATA).eval()
    return model


def example_inputs() -> dict[str, Any]:
    """Keyword arguments of one call: input_ids [2, 128] int64, token = byte."""
    return _inputs(_read("calibration.bin")[: 2 * WINDOW].view(2, WINDOW))


def calibration_data(seed: int = 0) -> Iterator[dict[str, Any]]:
    """400 batches of 16 windows of 128 bytes, drawn at random from text that is not evaluated on."""
    pieces = _read("calibration.bin").view(-1, PIECE)
    generator = torch.Generator().manual_seed(seed)
    for _ in range(CALIBRATION_BATCHES):
        which = torch.randint(len(pieces), (CALIBRATION_ROWS,), generator=generator).tolist()
        starts = torch.randint(PIECE - WINDOW + 1, (CALIBRATION_ROWS,), generator=generator).tolist()
        windows = [pieces[piece, start : start + WINDOW] for piece, start in zip(which, starts, strict=True)]
        yield _inputs(torch.stack(windows))


@torch.no_grad()
def evaluate(model: nn.Module) -> dict[str, float]:
    """Mean next-byte loss in bits over the first 1024 windows of 128 bytes of evaluation.bin; lower is better."""
    windows = _read("evaluation.bin")[: WINDOW * EVALUATION_WINDOWS].view(EVALUATION_WINDOWS, WINDOW)
    total = 0.0
    for ids in torch.split(windows, EVALUATION_ROWS):
        logits = model(**_inputs(ids)).logits[:, :-1]
        total += F.cross_entropy(logits.flatten(0, 1).float(), ids[:, 1:].flatten(), reduction="sum").item()
    return {"bits per byte": total / (EVALUATION_WINDOWS * (WINDOW - 1)) / math.log(2)}


def complete(model: Any, prompt: str, length: int = 120) -> str:
    """`prompt` and the `length` bytes that the model finds most likely to follow, one after the other."""
    ids = torch.tensor([list(prompt.encode())])
    text = model.generate(ids, attention_mask=torch.ones_like(ids), max_new_tokens=length, do_sample=False)
    return bytes(text[0].tolist()).decode(errors="replace")


def _inputs(ids: Tensor) -> dict[str, Any]:
    return {"input_ids": ids, "use_cache": False}


def _read(name: str) -> Tensor:
    return torch.frombuffer(bytearray((DATA / name).read_bytes()), dtype=torch.uint8).long()


def main() -> None:
    """Print a completion by the original model and its score."""
    model = build_model()
    print(complete(model, "def __init__(self, "))
    for name, value in evaluate(model).items():
        print(f"\n{name} {value:.4f}")


if __name__ == "__main__":
    main()
