"""Peak memory beside the model: at most one more model and one block, measured in a process of its own."""

from __future__ import annotations

import subprocess
import sys
import textwrap
from pathlib import Path

import pytest

BENCHMARKS = Path(__file__).resolve().parents[2] / "benchmarks"

#: What was loaded before does not count: a small model goes through the same steps first, which imports all they use.
MEASURE = """
    import gc, logging, sys
    from pathlib import Path

    import torch
    from torch import nn

    import latentize
    from latentize.memory import release

    logging.disable(logging.WARNING)
    torch.set_num_threads(1)

    def held(field):
        lines = Path("/proc/self/status").read_text().splitlines()
        return next(int(line.split()[1]) for line in lines if line.startswith(f"{field}:")) * 1024

    def peak(run):
        release()
        Path("/proc/self/clear_refs").write_text("5")
        before = held("VmRSS")
        run()
        return held("VmHWM") - before

    class Moe(nn.Module):
        def __init__(self, width, neurons, experts):
            super().__init__()
            self.router = nn.Linear(width, experts, bias=False)
            self.gate, self.up, self.down = (
                nn.Parameter(torch.randn(experts, *shape) * shape[1] ** -0.5)
                for shape in ((neurons, width), (neurons, width), (width, neurons))
            )

        def forward(self, hidden):
            x = hidden.reshape(-1, hidden.shape[-1])
            weights, chosen = self.router(x).softmax(-1).topk(2, -1)
            out = torch.zeros_like(x)
            for e in range(len(self.up)):
                row, slot = torch.where(chosen == e)
                h = torch.nn.functional.silu(x[row] @ self.gate[e].T) * (x[row] @ self.up[e].T)
                out.index_add_(0, row, (h @ self.down[e].T) * weights[row, slot, None])
            return hidden + out.view(hidden.shape)

    def plain(width, neurons, experts, layers):
        torch.manual_seed(0)
        return nn.Sequential(*(Moe(width, neurons, experts) for _ in range(layers))).eval()

    def inputs(width):
        return (torch.randn(2, 24, width, generator=torch.Generator().manual_seed(1)),)

    def convert(model, args, kwargs, calibration=None):
        init = "weights" if calibration is None else "activation"
        recipe = latentize.Recipe(compression=2, heal_steps=0, init=init)
        result = latentize.convert(model, args, kwargs, recipe, calibration)
        assert [b.status for b in result.blocks] == ["moe"] * len(result.plan) and result.plan

    def report(model, *peaks):
        size = sum(p.nbytes for p in model.parameters())
        block = max(sum(p.nbytes for p in m.parameters()) for m in model.modules() if hasattr(m, "down") or
                    hasattr(m, "experts"))
        print(size, block, *peaks)
"""


def peaks(script: str) -> tuple[int, int, list[int]]:
    """Bytes of the model, of its largest block, and of the peaks that a script reports."""
    text = textwrap.dedent(MEASURE) + textwrap.dedent(script)
    done = subprocess.run([sys.executable, "-c", text, str(BENCHMARKS)], capture_output=True, text=True, timeout=1800)
    assert done.returncode == 0, done.stderr[-2000:]
    size, block, *found = map(int, done.stdout.split())
    return size, block, found


linux = pytest.mark.skipif(not Path("/proc/self/clear_refs").exists(), reason="the high-water mark is Linux's")


@linux
def test_a_proof_holds_little_more_than_the_block_in_fp64() -> None:
    size, block, (found,) = peaks("""
        small, model = plain(16, 12, 4, 2), plain(256, 256, 40, 2)
        latentize.inspect(small, inputs(16))
        report(model, peak(lambda: latentize.inspect(model, inputs(256))))
    """)
    assert size > 55 * 2**20
    # One copy in fp64 is two blocks. Copies of it, or doubled experts, would each add two or four.
    assert found < 3.4 * block, f"{found / block:.1f} blocks"


@linux
@pytest.mark.slow
def test_a_conversion_holds_the_model_twice_and_one_block() -> None:
    pytest.importorskip("transformers")
    size, block, found = peaks("""
        sys.path.insert(0, sys.argv[1])
        import large_moe

        small = plain(16, 12, 4, 2)
        convert(small, inputs(16), {}, [inputs(16)] * 2)
        model, given = large_moe.build_model(), large_moe.example_inputs()
        data = large_moe.calibration_data()[:2]
        latentize.inspect(model, (), given)  # what transformers imports when it runs
        runs = (lambda: latentize.inspect(model, (), given), lambda: convert(model, (), given),
                lambda: convert(model, (), given, data))
        report(model, *map(peak, runs))
    """)
    inspected, converted, with_data = found
    assert inspected < 3.4 * block, f"{inspected / block:.1f} blocks"
    assert converted <= size + block, f"{converted / size:.2f} models"
    # The activations of the calibration's tokens come on top.
    assert with_data <= size + 1.5 * block, f"{with_data / size:.2f} models"
