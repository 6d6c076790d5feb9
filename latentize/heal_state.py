"""What healing trains, and how it survives an interruption: fp32 master weights, snapshots, and the saved state."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from latentize.disk_errors import write_error
from latentize.errors import LatentizeError, ResourceError, first_line
from latentize.heal_outside import OUTSIDE, step_sizes
from latentize.inputs import buffers_kept
from latentize.moe import LatentMoE
from latentize.soap import matrix_step
from latentize.whole_files import written_whole

#: Name of the state file in a checkpoint folder.
STATE_FILE = "heal.pt"


class Trainables:
    """The parameters of some blocks, with a master copy in at least fp32 of each that is narrower.

    A parameter is known as (block name, parameter name). One that shares memory with `teacher` is given its own.
    Parameters `outside` the blocks come after theirs, as (`OUTSIDE`, name).
    """

    def __init__(
        self,
        blocks: Mapping[str, LatentMoE],
        teacher: nn.Module,
        outside: Mapping[str, nn.Parameter] | None = None,
    ) -> None:
        shared = {parameter.untyped_storage().data_ptr() for parameter in teacher.parameters()}
        self.names: list[tuple[str, str]] = []
        self.parameters: list[nn.Parameter] = []
        self.masters: list[Tensor] = []
        for block, module in blocks.items():
            for name, parameter in module.named_parameters():
                if not parameter.is_floating_point() or parameter.numel() == 0:
                    continue
                if parameter.untyped_storage().data_ptr() in shared:
                    parameter.data = parameter.data.clone()
                self._add(block, name, parameter)
        #: How many parameters are in blocks: the first ones.
        self.in_blocks = len(self.names)
        for name, parameter in (outside or {}).items():
            self._add(OUTSIDE, name, parameter)

    def _add(self, block: str, name: str, parameter: nn.Parameter) -> None:
        self.names.append((block, name))
        self.parameters.append(parameter)
        self.masters.append(parameter.data.to(torch.promote_types(parameter.dtype, torch.float32)))

    @property
    def outside(self) -> int:
        """How many numbers outside the blocks are trained."""
        return sum(master.numel() for master in self.masters[self.in_blocks :])

    def step_sizes(self, teacher_blocks: Mapping[str, LatentMoE]) -> list[float]:
        """How large a step of each parameter is a relative change of about 1.

        Of a matrix, as `latentize.soap.matrix_step` says, so that one relative rate serves models of all sizes; its
        size is the smaller of the parameter's and its original's, since fitted outputs can be large and cancel. A
        vector moves as the block's matrices do on average. `latentize.heal_outside` says it of what is outside the
        blocks.
        """
        sizes = []
        for (block, name), master in list(zip(self.names, self.masters, strict=True))[: self.in_blocks]:
            if "bias" in name:
                sizes.append(0.0)
                continue
            own = float(master.square().mean().sqrt())
            original = dict(teacher_blocks[block].named_parameters()).get(name)
            if original is not None:
                own = min(own, float(original.detach().double().square().mean().sqrt())) or own
            sizes.append(matrix_step(own, master.shape))
        for block in {name for name, _ in self.names[: self.in_blocks]}:
            places = self.of(block)
            known = [sizes[i] for i in places if sizes[i]]
            for i in places:
                sizes[i] = sizes[i] or (sum(known) / len(known) if known else 1e-3)
        return sizes + step_sizes([name for _, name in self.names[self.in_blocks :]], self.masters[self.in_blocks :])

    def write(self) -> None:
        """Round the masters into the parameters; nothing to do where a parameter is its own master."""
        for parameter, master in zip(self.parameters, self.masters, strict=True):
            if parameter.data_ptr() != master.data_ptr():
                parameter.data.copy_(master)

    def of(self, block: str) -> list[int]:
        """Positions of a block's parameters."""
        return [i for i, (name, _) in enumerate(self.names) if name == block]

    def snapshot(self, *, blocks: bool = False) -> list[Tensor]:
        """Copies of all masters, or of those in `blocks` alone."""
        return [master.clone() for master in self.masters[: self.in_blocks if blocks else None]]

    def restore(self, values: Sequence[Tensor]) -> None:
        """Take masters and parameters back to a snapshot; what it does not hold stays."""
        for master, value in zip(self.masters, values, strict=False):
            master.copy_(value)
        self.write()

    def shapes(self) -> list[str]:
        """Every parameter's name and shape, to recognise the same job again."""
        return [f"{b}:{n}:{list(m.shape)}" for (b, n), m in zip(self.names, self.masters, strict=True)]


class Checkpoint:
    """One state file, replaced atomically; `folder` None keeps nothing.

    `fingerprint` says which job the state belongs to; `load` refuses the state of another. Of several processes one
    `writes`, and all read.
    """

    def __init__(self, folder: Path | None, fingerprint: Mapping[str, Any], *, writes: bool = True) -> None:
        self._writes = writes
        self._path = None if folder is None else Path(folder) / STATE_FILE
        self._fingerprint = dict(fingerprint)

    @property
    def kept(self) -> bool:
        """Whether states are written at all."""
        return self._path is not None

    def save(self, state: Mapping[str, Any]) -> None:
        """Write `state`: tensors, numbers, strings, and lists and dicts of them.

        Raises:
            ResourceError: the disk is full.
            LatentizeError: the folder cannot be written.
        """
        if self._path is None or not self._writes:
            return
        try:
            self._path.parent.mkdir(parents=True, exist_ok=True)
            with written_whole(self._path) as (path,), path.open("wb") as file:
                torch.save({"fingerprint": self._fingerprint, **state}, file)
        except (OSError, RuntimeError) as error:
            why = error.__context__ if isinstance(error.__context__, OSError) else error  # torch says less than it
            if isinstance(why, OSError):
                said = f"healing: its state {self._path}"
                raise write_error(said, why, "an earlier one is kept there", "choose another folder") from error
            raise ResourceError(
                f"healing: its state could not be written to {self._path} ({first_line(why)}); free some disk and run "
                "again"
            ) from error

    def load(self) -> dict[str, Any] | None:
        """The saved state, or None when there is none. Only tensors and plain values are ever unpickled.

        Raises:
            LatentizeError: the file is not a healing state, or the state of another job (the difference is named).
        """
        if self._path is None or not self._path.exists():
            return None
        try:
            state: dict[str, Any] = torch.load(self._path, map_location="cpu", weights_only=True)
            saved = state.pop("fingerprint")
        except Exception as error:
            raise LatentizeError(
                f"healing: {self._path} cannot be read as a healing state ({type(error).__name__}); "
                "remove it to start over"
            ) from error
        for field, value in self._fingerprint.items():
            if saved.get(field) != value:
                raise LatentizeError(
                    f"healing: {self._path} belongs to another job: {field} was {saved.get(field)!r:.120} and is now "
                    f"{value!r:.120}; use the same settings to resume, or remove the file to start over"
                )
        return state


@contextlib.contextmanager
def training_room(seed: int, *models: nn.Module, advice: str = "") -> Iterator[None]:
    """Gradients on, `models` in eval mode, own random state, deterministic kernels; everything is put back afterwards.

    `advice` is added to what is said where memory runs out.

    Raises:
        ResourceError: memory ran out inside.
    """
    modes = [(module, module.training) for model in models for module in model.modules()]
    deterministic = torch.are_deterministic_algorithms_enabled()
    warn_only = torch.is_deterministic_algorithms_warn_only_enabled()
    filling = torch.utils.deterministic.fill_uninitialized_memory  # type: ignore[attr-defined]
    try:
        for module, _ in modes:
            module.training = False
        torch.use_deterministic_algorithms(True, warn_only=True)
        # Filling takes time, and nothing here reads memory before it is written.
        torch.utils.deterministic.fill_uninitialized_memory = False  # type: ignore[attr-defined]
        with buffers_kept(*models), torch.random.fork_rng(), torch.inference_mode(False), torch.enable_grad():
            torch.manual_seed(seed)
            yield
    except (torch.OutOfMemoryError, MemoryError) as error:
        raise ResourceError(_MEMORY + advice) from error
    except RuntimeError as error:
        if "can't allocate memory" not in str(error) and "not enough memory" not in str(error):
            raise
        raise ResourceError(_MEMORY + advice) from error
    finally:
        torch.use_deterministic_algorithms(deterministic, warn_only=warn_only)
        torch.utils.deterministic.fill_uninitialized_memory = filling  # type: ignore[attr-defined]
        for module, training in modes:
            module.training = training


@contextlib.contextmanager
def contiguous(blocks: Mapping[str, LatentMoE]) -> Iterator[None]:
    """The parameters of `blocks` in contiguous memory while inside: those of a canonical block can be views into wider
    tensors, which the compiled kernels do not take.
    """
    strided = [p for block in blocks.values() for p in block.parameters() if not p.is_contiguous()]
    views = [p.data for p in strided]
    try:
        for parameter in strided:
            parameter.data = parameter.data.contiguous()
        yield
    finally:
        for parameter, view in zip(strided, views, strict=True):
            parameter.data = view


_MEMORY = (
    "healing: out of memory while training the rewritten blocks; give calibration batches of fewer tokens, "
    "or heal fewer steps (heal_steps 0 does not heal)"
)
