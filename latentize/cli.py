"""The command line: arguments in, exit code out. Nothing heavy is imported before a command runs."""

from __future__ import annotations

import errno
import math
import os
import shlex
import sys
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from latentize import __version__
from latentize.errors import LatentizeError, ResourceError

if TYPE_CHECKING:
    from latentize.exporters.tensorrt_profiles import Profile

EXPORTS = ("onnx", "tensorrt", "nemotron_h", "nemotron_h-hub")
BACKENDS = ("torch", "ort", "trt")
#: Threads that wait for each other sleep. Where something else runs on the same cores, spinning ones cost healing a
#: factor of six; it must be set before torch is imported.
_WAITING = ("OMP_WAIT_POLICY", "PASSIVE")
_HELP = {"help_option_names": ["-h", "--help"], "max_content_width": 110}


class _Commands(click.Group):
    """Subcommands beside a default one: an argument that names no subcommand is the MODEL to convert."""

    def parse_args(self, ctx: click.Context, args: list[str]) -> list[str]:
        if args and args[0] not in self.commands and args[0] not in ("-h", "--help", "--version"):
            args = ["convert", *args]
        return super().parse_args(ctx, args)

    def format_options(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        convert = self.commands["convert"]
        convert.format_options(click.Context(convert, info_name=ctx.info_name), formatter)
        self.format_commands(ctx, formatter)

    def format_usage(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        formatter.write_usage(ctx.command_path, "MODEL [-o OUT] [OPTIONS]")
        formatter.write_usage(ctx.command_path, "COMMAND [ARGS]...", prefix="       ")


@click.group(cls=_Commands, context_settings=_HELP, invoke_without_command=True)
@click.version_option(__version__, prog_name="latentize", message="%(prog)s %(version)s")
@click.pass_context
def cli(context: click.Context) -> None:
    """Compile a trained Mixture-of-Experts model into LatentMoE.

    MODEL is model.py or model.py:factory (it defines build_model and example_inputs, and may define calibration_data
    and evaluate), a Hugging Face model directory, or a .pt2 file.

    Exit codes: 0 done, 2 a fault in what was given, 3 no MoE block to rewrite, 4 an accuracy or agreement gate failed,
    5 out of memory or disk, 130 interrupted (continue with --resume), 1 a bug.
    """
    if context.invoked_subcommand is None:
        click.echo(context.get_help())
        context.exit(2)


class _Bound(click.FloatRange):
    """A limit: a number in a range, and not "nan", with which nothing would ever pass."""

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> Any:
        number = super().convert(value, param, ctx)
        if math.isnan(number):
            self.fail(f"{value} is not a number", param, ctx)
        return number


class _Compression(click.ParamType[Any]):
    """A number, or "auto"; the recipe says which numbers."""

    name = "A"

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> Any:
        """The value as the recipe takes it."""
        return value if value == "auto" else click.FLOAT.convert(value, param, ctx)


def _budget(_ctx: click.Context, _param: click.Parameter, text: str | None) -> dict[str, str] | None:
    """`bytes=0.5` as a field and its value, which the recipe checks."""
    if text is None:
        return None
    name, equals, value = text.partition("=")
    if not equals:
        raise LatentizeError(f"--budget {text}: give bytes=SHARE, flops=SHARE or max_loss=X")
    return {name.strip(): value.strip()}


def _profiles(_ctx: click.Context, _param: click.Parameter, texts: tuple[str, ...]) -> tuple[Profile, ...]:
    """Each BATCHxTOKENS."""
    if not texts:
        return ()
    from latentize.exporters.tensorrt_profiles import Profile

    return tuple(Profile.parse(text) for text in texts)


def _common(command: Callable[..., Any]) -> Callable[..., Any]:
    """Options that every command has."""
    options = [
        click.option("-v", "--verbose", count=True, help="Say more; -vv lets other libraries speak too."),
        click.option("-q", "--quiet", is_flag=True, help="Say nothing but errors."),
        click.option("--log-file", type=click.Path(path_type=Path, dir_okay=False), help="Keep a detailed log here."),
    ]
    for option in reversed(options):
        command = option(command)
    return command


@cli.command(hidden=True)
@click.argument("model")
@click.option("-o", "--output", "out", type=click.Path(path_type=Path), help="Folder to write. [default: MODEL-latent]")
@click.option(
    "--compression",
    type=_Compression(),
    metavar="A",
    help="α: divide the experts' width by this; auto gives every block its own, within --budget. [default: 2]",
)
@click.option(
    "--budget",
    callback=_budget,
    metavar="WHAT=X",
    help="For --compression auto: bytes=X or flops=X, the share of the original's expert weights or FLOPs that a token "
    "may take; or max_loss=X, how much loss may be predicted.",
)
@click.option("--latent-dim", type=int, help="ℓ: the experts' width, instead of --compression.")
@click.option(
    "--variant",
    type=click.Choice(["acc", "eff", "fixed"]),
    help="What the saving buys: acc αN experts and αk active, eff αN experts, fixed neither. [default: acc]",
)
@click.option(
    "--bypass",
    type=click.IntRange(min=0),
    metavar="RANK",
    help="Add a linear map of this rank around each block's routed experts, fitted to what they lose; not a plain "
    "LatentMoE any more. [default: 0, none]",
)
@click.option(
    "--refit-shared",
    is_flag=True,
    default=None,
    help="Let shared experts absorb what the routed path lost: refit their last layer, at no bytes.",
)
@click.option(
    "--heal",
    "heal_steps",
    type=click.IntRange(min=0),
    metavar="STEPS",
    help="Steps of distillation after the start; 0 does not heal. [default: chosen]",
)
@click.option(
    "--heal-train",
    type=click.Choice(["latent", "all"]),
    help="What healing trains: the latent blocks, or all of the model. [default: latent]",
)
@click.option(
    "--export",
    "exports",
    metavar="LIST",
    help="Comma-separated: onnx, tensorrt, nemotron_h (a checkpoint of that architecture), nemotron_h-hub (its weights "
    "named as on the hub).",
)
@click.option(
    "--onnx-form",
    default="auto",
    metavar="FORM",
    help="How the experts' graph orders its work: auto (by usual costs), measured (what is fastest on this machine), "
    "loop, unrolled, batched, dense, gather, moe, or several by the number of tokens, gather:1+dense:16+batched.",
)
@click.option(
    "--profile",
    "profiles",
    multiple=True,
    callback=_profiles,
    metavar="BATCHxTOKENS",
    help="What exports are made for, each a number or smallest:usual:largest: 1:1:4x1 decodes, 1x256:1024:4096 "
    "prefills. The graph's experts are ordered for so many tokens, and engines take these; may be given several times.",
)
@click.option("--recipe", "recipe_file", type=click.Path(path_type=Path), help="YAML file of recipe fields.")
@click.option("--seed", type=int, help="Seed of everything random. [default: 0]")
@click.option(
    "--dry-run", is_flag=True, help="Check everything and print the plan, without the long work and the writes."
)
@click.option("--resume", is_flag=True, help="Continue an interrupted run with the same arguments.")
@click.option(
    "--max-loss",
    type=_Bound(min=0),
    metavar="X",
    help="Fail (exit 4) when the first value of evaluate rises by more than this fraction; 0.01 is 1 %.",
)
@_common
def convert(
    model: str, out: Path | None, exports: str | None, onnx_form: str, recipe_file: Path | None, dry_run: bool,
    resume: bool, max_loss: float | None, profiles: tuple[Profile, ...], verbose: int, quiet: bool,
    log_file: Path | None, **fields: Any,
) -> None:  # fmt: skip
    """Convert MODEL."""
    recipe = _recipe(recipe_file, fields | {"profiles": [vars(profile) for profile in profiles] or None})
    wanted = _names(exports, "--export", EXPORTS)
    _start(verbose, quiet, log_file)
    from latentize import run

    run.convert(
        run.Options(
            model=model, out=out if out is not None else default_out(model), recipe=recipe, exports=wanted,
            onnx_form=onnx_form, dry_run=dry_run, resume=resume, max_loss=max_loss, quiet=quiet,
        )
    )  # fmt: skip


@cli.command()
@click.argument("model")
@click.option("--json", "as_json", is_flag=True, help="Print JSON.")
@click.option(
    "--calibrate",
    is_flag=True,
    help="Run the model on its calibration data and predict what every latent width would cost each block.",
)
@click.option(
    "--knee",
    type=_Bound(min=0, min_open=True),
    metavar="X",
    help="With --calibrate: name the smallest width for all blocks whose predicted loss is at most X.",
)
@_common
def inspect(
    model: str, as_json: bool, calibrate: bool, knee: float | None, verbose: int, quiet: bool, log_file: Path | None
) -> None:
    """List every MoE block of MODEL and what it was proved to compute."""
    if knee is not None and not calibrate:
        raise LatentizeError("--knee is read off what --calibrate predicts; give both")
    _start(verbose, quiet, log_file)
    from latentize import run

    run.inspect(model, as_json=as_json, calibrate=calibrate, knee=knee, quiet=quiet)


@cli.command()
@click.argument("out", type=click.Path(path_type=Path))
@click.option("--original", metavar="MODEL", help="The original, where it is no longer where it was.")
@click.option(
    "--backend",
    "backends",
    metavar="LIST",
    help="Comma-separated: torch, ort, trt. [default: torch, and those whose files OUT has and that run here]",
)
@click.option(
    "--tolerance",
    type=_Bound(min=0),
    metavar="X",
    help="Fail (exit 4) when a backend is further than this from PyTorch, relatively. [default: 1e-5 in fp32]",
)
@click.option(
    "--max-loss",
    type=_Bound(min=0),
    metavar="X",
    help="Fail when the first value of evaluate rises by more than this fraction. [default: the conversion's]",
)
@click.option(
    "--max-block-error",
    type=_Bound(min=0),
    metavar="X",
    help="Fail when a block is further than this from the original's, relatively, and name the first.",
)
@click.option(
    "--max-tokens",
    type=click.IntRange(min=1),
    metavar="T",
    help="The longest sequence to compare. [default: the model's own, as far as time and memory allow]",
)
@_common
def compare(
    out: Path, original: str | None, backends: str | None, tolerance: float | None, max_loss: float | None,
    max_block_error: float | None, max_tokens: int | None, verbose: int, quiet: bool, log_file: Path | None,
) -> None:  # fmt: skip
    """Compare the converted model in OUT with its original, and its exports with PyTorch; the report keeps it."""
    wanted = None if not backends else _names(backends, "--backend", BACKENDS)
    _start(verbose, quiet, log_file)
    from latentize import run_compare

    run_compare.compare(
        run_compare.Options(out, original, wanted, tolerance, max_loss, max_block_error, max_tokens, quiet)
    )


@cli.command()
@click.argument("out", type=click.Path(path_type=Path))
@click.option("--original", metavar="MODEL", help="The original, where it is no longer where it was.")
@click.option("--fused", is_flag=True, help="Time both as captured graphs too, the converted one with its fusions.")
@_common
def bench(out: Path, original: str | None, fused: bool, verbose: int, quiet: bool, log_file: Path | None) -> None:
    """Time the converted model in OUT and its original, in PyTorch and, where exported, in onnxruntime."""
    _start(verbose, quiet, log_file)
    from latentize import run_compare

    run_compare.bench(out, original, fused=fused, quiet=quiet)


@cli.command()
@click.argument("out", type=click.Path(path_type=Path))
@click.option(
    "--experts",
    type=click.Choice(["dense", "plugin", "embedded"]),
    help="Routed experts as dense products over all of them; as latentize's fused plugin, which runs the selected ones "
    "(what loads such an engine calls latentize.exporters.tensorrt_plugin.register first); or, with the full tensorrt, "
    "as kernels embedded in the engine, which then needs no Python. [default: dense]",
)
@click.option(
    "--target",
    "targets",
    multiple=True,
    metavar="WHAT",
    help="An engine for the GPU portable, SM80, SM86, SM89, SM120 or native; or, for onnxruntime on the CPU, a library "
    "of latentize's operator: onnxruntime, or onnxruntime-native for this machine's processor. May be given several "
    "times. [default: portable; native with the full tensorrt]",
)
@click.option("--dtype", type=click.Choice(["fp32", "fp16", "bf16"]), help="[default: that of model.onnx]")
@click.option(
    "--profile",
    "profiles",
    multiple=True,
    callback=_profiles,
    metavar="BATCHxTOKENS",
    help="What the engine takes, each a number or smallest:usual:largest; may be given several times. [default: the "
    "recipe's profiles, or 1:1:4x1:16:256]",
)
@_common
def build(
    out: Path, experts: Any, targets: tuple[str, ...], dtype: str | None, profiles: tuple[Profile, ...], verbose: int,
    quiet: bool, log_file: Path | None,
) -> None:  # fmt: skip
    """Build TensorRT engines from the ONNX graph in OUT, or the library that runs its experts in onnxruntime.

    What the full tensorrt measures serves later builds on the same GPU (its timing cache is kept in LATENTIZE_CACHE);
    tensorrt-rtx measures nothing while it builds, and has no such cache.
    """
    _start(verbose, quiet, log_file)
    from latentize import run_build

    run_build.build(out, targets, experts, profiles=profiles, dtype=dtype, quiet=quiet)


def default_out(model: str) -> Path:
    """The folder that a conversion of MODEL writes when none is named, e.g. "net.py:small" -> "net-small-latent"."""
    path, _, factory = model.partition(".py:")
    stem = Path(path).resolve().name if Path(path).is_dir() else Path(path).stem
    return Path("-".join(part for part in (stem, factory, "latent") if part))


def _recipe(file: Path | None, given: dict[str, Any]) -> Any:
    """The recipe of the file with what the command line says on top."""
    from latentize.recipe import Recipe, read_yaml

    fields = {} if file is None else read_yaml(file)
    explicit = {name: value for name, value in given.items() if value is not None}
    if "compression" in explicit and "latent_dim" in explicit:
        raise LatentizeError("--compression and --latent-dim both set the experts' width; give one of them")
    if "compression" in explicit:
        fields.pop("latent_dim", None)
        if explicit["compression"] != "auto":
            fields.pop("budget", None)
    if "latent_dim" in explicit and fields.get("compression") == "auto":
        fields = {name: value for name, value in fields.items() if name not in ("compression", "budget")}
    return Recipe(**{**fields, **explicit})


def _names(text: str | None, option: str, known: tuple[str, ...]) -> tuple[str, ...]:
    """The comma-separated names of an option."""
    names = tuple(dict.fromkeys(part.strip() for part in (text or "").split(",") if part.strip()))
    unknown = [name for name in names if name not in known]
    if unknown:
        raise LatentizeError(f"{option} {unknown[0]}: not known; choose from {', '.join(known)}")
    return names


def _start(verbose: int, quiet: bool, log_file: Path | None) -> None:
    from latentize import log

    log.configure(-1 if quiet else verbose, log_file)


def main(arguments: list[str] | None = None) -> None:
    """Run the command line and exit with the code of the contract; a bug shows its traceback and exits with 1."""
    arguments = sys.argv[1:] if arguments is None else arguments
    os.environ.setdefault(*_WAITING)
    try:
        _alone()
        result = cli.main(args=list(arguments), prog_name="latentize", standalone_mode=False)
        sys.exit(result if isinstance(result, int) else 0)
    except click.exceptions.Exit as done:
        sys.exit(done.exit_code)
    except click.ClickException as error:
        _fail(error.format_message() + "; see latentize --help", 2)
    except LatentizeError as error:
        _debug(error)
        further = isinstance(error, ResourceError) and _resumable(arguments)
        _fail(f"{error}; --resume goes on from where this stopped" if further else str(error), error.exit_code)
    except (KeyboardInterrupt, click.Abort):
        _fail(_interrupted(arguments), 130)
    except Exception as error:
        problem = _resource_problem(error, "continue with --resume" if _resumable(arguments) else "run again")
        if problem is None:
            raise
        _debug(error)
        _fail(problem, 5)


def _alone() -> None:
    """Several processes would write the same files."""
    world = os.environ.get("WORLD_SIZE", "1")
    if world not in ("", "1") and "RANK" in os.environ:
        raise LatentizeError(
            f"started in {world} processes (WORLD_SIZE), but the command line is for one; "
            "call latentize.convert from a script of your own there, and save from one of them"
        )


def _fail(message: str, code: int) -> None:
    click.echo(f"latentize: {' '.join(message.split())}", err=True)
    sys.exit(code)


def _debug(error: BaseException) -> None:
    import logging

    logging.getLogger("latentize").debug("details", exc_info=error)


def _interrupted(arguments: list[str]) -> str:
    if not _resumable(arguments):
        return "interrupted"
    again = [*arguments] if "--resume" in arguments else [*arguments, "--resume"]
    return f"interrupted; continue with: latentize {shlex.join(again)}"


def _resumable(arguments: list[str]) -> bool:
    converts = bool(arguments) and arguments[0] not in ("inspect", "compare", "bench", "build")
    return converts and "--dry-run" not in arguments


def _resource_problem(error: Exception, again: str) -> str | None:
    """What ran out, for errors that say so whoever raised them; None for any other."""
    text = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
    no_memory = ("can't allocate memory", "not enough memory", "out of memory")
    if isinstance(error, MemoryError) or any(name.__name__ == "OutOfMemoryError" for name in type(error).__mro__):
        return f"out of memory ({text}); give smaller calibration batches, or use a machine with more memory"
    if isinstance(error, OSError) and error.errno == errno.ENOMEM:
        return f"out of memory ({text}); use a machine with more memory"
    if isinstance(error, OSError) and error.errno == errno.EFBIG:
        return f"a file grows larger than the disk or a limit (ulimit -f) allows ({text}); allow more, then {again}"
    if isinstance(error, RuntimeError) and any(words in text for words in no_memory):
        return f"out of memory ({text}); give smaller calibration batches, or use a machine with more memory"
    full = isinstance(error, OSError) and error.errno in (errno.ENOSPC, errno.EDQUOT)
    if full or "No space left on device" in text:
        return f"the disk is full ({text}); free some space, then {again}"
    return None
