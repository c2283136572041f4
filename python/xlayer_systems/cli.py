"""The ``xlayer`` command."""

from __future__ import annotations

import os
import sys
from pathlib import Path
from typing import Annotated, NoReturn

import typer

from xlayer_systems.errors import CommandError, InterruptionError, UserError

# typer has click under a name of its own: BadParameter is a UsageError is a ClickException.
ClickException: type[Exception] = typer.BadParameter.__mro__[2]
INTERRUPTED = 130

app = typer.Typer(
    no_args_is_help=True,
    add_completion=False,
    rich_markup_mode="markdown",
    pretty_exceptions_enable=False,
    help="""Train and compare systems for cross-layer communication in transformers.

**First steps** (no download; two CPU cores are enough):

    xlayer train xlrb --preset H9 --quick

    xlayer sweep xlrb --presets plain,H9,A3,A8 --seeds 0,1,2 --quick

    xlayer eval runs/xlrb-H9-stdlib-topics-seed0-quick

    xlayer train hyper_lm --residual dhc --quick

    xlayer eval runs/hyper_lm-dhc-stdlib-lm-seed0-quick --prompt "def "

    xlayer sweep hyper_lm --residual plain,shc,dhc,mhc --seeds 0,1,2 --quick

    xlayer train telepathy --quick

    xlayer sweep telepathy --soft-tokens 4,8,16,32,64,128 --seeds 0,1,2 --quick

    xlayer train bypass --quick

    xlayer train lformer --quick

    xlayer sweep lformer --presets ema,gru,attn --seeds 0,1,2 --quick

**Real data and backbones** are named in the same place:

    xlayer train xlrb --preset H9 --dataset glue/rte --backbone roberta-large --set dtype=bfloat16

    xlayer train hyper_lm --residual dhc --dataset wikitext/wikitext-2-raw-v1 --backbone small --set dtype=bfloat16

    xlayer train telepathy --dataset glue/sst2 --backbone meta-llama/Llama-3.1-8B,mistralai/Mistral-7B-v0.3

**Many GPUs**: `accelerate launch -m xlayer_systems.cli train xlrb --preset H9 ...`

Wrong input gives one line that starts with `error:` and exit code 2; a run that diverges ends with exit code 3. Ctrl-C
and SIGTERM end a run after a checkpoint, with exit code 130 and 143; a second Ctrl-C ends it at once.""",
)
pretrain_app = typer.Typer(no_args_is_help=True, help="Make the small backbone that the other commands start from.")
app.add_typer(pretrain_app, name="pretrain")

System = Annotated[
    str,
    typer.Argument(
        help="What to train: xlrb (routing bridges in an encoder), hyper_lm (a hyper-connected language model), "
        "telepathy (a frozen language model speaks to another), "
        "bypass (hidden states of all layers come back as biases of a frozen language model), "
        "lformer (a side path over a language model's layers learns to use tools)."
    ),
]
Dataset = Annotated[
    str | None,
    typer.Option(
        help="xlrb: stdlib-topics (default), stdlib-pairs, glue/rte or another hub name, or a local folder. "
        "hyper_lm: stdlib-lm (default), wikitext/wikitext-2-raw-v1 or another hub name, a folder of .txt files, or one "
        "with a train and a validation file. telepathy: stdlib-topics (default), passkey, arithmetic, glue/sst2, "
        "ag_news, trec, banking77, gsm8k, boolq, piqa, commonsense_qa or another classification data set. "
        "bypass: as hyper_lm. lformer: tools (default), or a folder or hub name with columns text and tool, "
        "and perhaps value and plan."
    ),
]
Backbone = Annotated[
    str | None,
    typer.Option(
        help="xlrb: small (default, shipped), small-scratch, a Hugging Face name such as roberta-large, or a folder. "
        "hyper_lm: the size of the model, tiny (default), small, base or large. telepathy: SENDER,RECEIVER, two causal "
        "language models (names or folders); decoder-sender,decoder-receiver by default. "
        "bypass and lformer: one, decoder-sender by default."
    ),
]
Streams = Annotated[int | None, typer.Option(help="hyper_lm: number of residual streams; the same as expansion_rate.")]
Bridge = Annotated[
    str | None, typer.Option(help="telepathy: continuous (default), vq, fsq or dit; in a sweep several, with commas.")
]
SoftTokens = Annotated[
    str | None, typer.Option(help="telepathy: vectors in place of the text, 8 by default; in a sweep several.")
]
Quick = Annotated[bool, typer.Option("--quick", help="Settings that train in a minute or two on two CPU cores.")]
Settings = Annotated[
    list[str] | None,
    typer.Option("--set", metavar="KEY=VALUE", help="Override a training option or a field of the preset; repeatable."),
]
Resume = Annotated[bool, typer.Option("--resume", help="Go on from the last checkpoint of an interrupted run.")]


@app.command()
def train(
    system: System,
    preset: Annotated[
        str | None,
        typer.Option(
            "--preset",
            "--residual",
            help="xlrb: plain (the backbone alone), H1 to H30, A1 to A20; H9 by default. "
            "hyper_lm: plain, shc, dhc or mhc; dhc by default. "
            "telepathy: classification (default) or a phase of the report, v1 to v15. "
            "bypass: plain, lora, full or offset; full by default. "
            "lformer: ema (default), gru, attn, or head_only, the baseline without a side path.",
        ),
    ] = None,
    dataset: Dataset = None,
    backbone: Backbone = None,
    streams: Streams = None,
    bridge: Bridge = None,
    soft_tokens: SoftTokens = None,
    seed: Annotated[int, typer.Option(help="Initial parameters, order of the examples, dropout.")] = 0,
    epochs: Annotated[int | None, typer.Option(help="Passes over the training set.")] = None,
    quick: Quick = False,
    run_dir: Annotated[Path | None, typer.Option(help="A new directory; by default runs/<what is trained>.")] = None,
    resume: Resume = False,
    settings: Settings = None,
) -> None:
    """Train one preset with one seed and report its accuracy with a 95 % interval, or its loss.

    Examples:

        xlayer train xlrb --preset plain --quick

        xlayer train xlrb --preset H9 --set topk=2 --set router_weight=full_softmax

        xlayer train xlrb --preset H9 --run-dir runs/mine --resume    (the same options as before)

        xlayer train hyper_lm --residual dhc --streams 2 --quick --set max_steps=400

        xlayer train telepathy --bridge fsq --soft-tokens 16 --dataset passkey --quick
    """
    from xlayer_systems.registry import get_system
    from xlayer_systems.runs.execute import format_result, train_run
    from xlayer_systems.training.options import parse_overrides

    chosen = get_system(system)
    shortcuts = {"epochs": epochs, "expansion_rate": streams, "bridge": bridge, "soft_tokens": soft_tokens}
    overrides = _with_shortcuts(parse_overrides(settings or []), **shortcuts)
    spec = chosen.make_spec(preset, dataset=dataset, backbone=backbone, seed=seed, quick=quick, overrides=overrides)
    path = run_dir or Path("runs") / _run_name(system, spec.preset, spec.dataset, seed, quick)
    result = train_run(chosen, spec, path, resume)
    if _is_main_process():
        print(format_result(chosen, result))
        print(f"run directory: {path}  ({result['seconds']:.0f} s)")


@app.command()
def sweep(
    system: System,
    presets: Annotated[
        str | None,
        typer.Option(
            "--presets",
            "--residual",
            help="Separated by commas; each may carry overrides: H9:router_weight=full_softmax:topk=2, "
            "dhc:expansion_rate=2. By default plain, where the system has it, and the system's own default.",
        ),
    ] = None,
    seeds: Annotated[str, typer.Option(help="Separated by commas.")] = "0",
    dataset: Dataset = None,
    backbone: Backbone = None,
    streams: Streams = None,
    bridge: Bridge = None,
    soft_tokens: SoftTokens = None,
    epochs: Annotated[int | None, typer.Option(help="Passes over the training set.")] = None,
    quick: Quick = False,
    out: Annotated[Path | None, typer.Option(help="A new directory; by default runs/sweep-<system>-<dataset>.")] = None,
    resume: Annotated[bool, typer.Option("--resume", help="Keep finished runs and go on with the others.")] = False,
    settings: Settings = None,
) -> None:
    """Train several presets with several seeds and print a table.

    Per preset: mean accuracy on the whole validation set and its 95 % interval (Wilson for one seed, Student's t over
    seeds for more), parameters, seconds. For language models: validation loss with its interval over seeds, and how
    many tokens it took to the final loss of plain. Writes results.json, report.md, curves and what the layers did as
    PNG, and one run directory per preset and seed.

    Examples:

        xlayer sweep xlrb --presets plain,H9,A3,A8 --seeds 0,1,2 --quick

        xlayer sweep xlrb --presets H9,H9:router_weight=full_softmax,H9:gate_position=after_norm --seeds 0,1,2,3,4

        xlayer sweep hyper_lm --residual plain,shc,dhc,mhc --seeds 0,1,2 --quick

        xlayer sweep telepathy --bridge continuous,vq,fsq,dit --seeds 0,1,2 --quick

        xlayer sweep telepathy --presets classification:bridge=vq,classification:bridge=vq:revive_below=1 --quick
    """
    from xlayer_systems.registry import get_system
    from xlayer_systems.runs.sweep import cross_variants, parse_seeds, parse_variants, run_sweep
    from xlayer_systems.runs.system import PLAIN
    from xlayer_systems.training.options import parse_overrides

    chosen = get_system(system)
    common = _with_shortcuts(parse_overrides(settings or []), epochs=epochs, expansion_rate=streams)
    common = {**chosen.sweep_defaults, **common}
    default = f"{PLAIN},{chosen.default_preset}" if PLAIN in chosen.presets() else chosen.default_preset
    variants = cross_variants(
        parse_variants(default if presets is None else presets), bridge=bridge, soft_tokens=soft_tokens
    )
    numbers = parse_seeds(seeds)
    specs = {
        variant.name: [
            chosen.make_spec(
                variant.preset,
                dataset=dataset,
                backbone=backbone,
                seed=seed,
                quick=quick,
                overrides={**common, **variant.overrides},
            )
            for seed in numbers
        ]
        for variant in variants
    }
    name = (dataset or chosen.default_dataset).replace("/", "-")
    path = out or Path("runs") / f"sweep-{system}-{name}{'-quick' * quick}"
    summary = run_sweep(chosen, specs, path, resume)
    if _is_main_process():
        print(chosen.format_sweep(summary))
        print(f"sweep directory: {path}")


@app.command(name="eval")
def evaluate(
    run: Annotated[Path, typer.Argument(help="Run directory of a finished run.")],
    prompt: Annotated[str | None, typer.Option(help="Language models: go on with this text instead.")] = None,
    tokens: Annotated[int, typer.Option(help="With --prompt: at most so many tokens.")] = 128,
    temperature: Annotated[float, typer.Option(help="With --prompt: 0 takes the likeliest token every time.")] = 0.0,
    top_k: Annotated[int | None, typer.Option(help="With --prompt: draw from so many of the likeliest tokens.")] = None,
    seed: Annotated[int, typer.Option(help="With --prompt: of the draws.")] = 0,
) -> None:
    """Evaluate the model of a finished run on the whole validation set, or let a language model write.

    Examples:

        xlayer eval runs/xlrb-H9-stdlib-topics-seed0-quick

        xlayer eval runs/hyper_lm-dhc-stdlib-lm-seed0-quick --prompt "def " --temperature 0.8 --top-k 40
    """
    from xlayer_systems.registry import open_run
    from xlayer_systems.runs.execute import complete_text, evaluate_run, format_result

    system, spec = open_run(run)
    if prompt is not None:
        print(complete_text(system, spec, run, prompt, tokens=tokens, temperature=temperature, top_k=top_k, seed=seed))
        return
    result = evaluate_run(system, spec, run)
    if _is_main_process():
        print(format_result(system, result))


@app.command()
def profile(
    system: System,
    preset: Annotated[str | None, typer.Option("--preset", "--residual", help="As of train.")] = None,
    dataset: Dataset = None,
    backbone: Backbone = None,
    seed: Annotated[int, typer.Option(help="As of train.")] = 0,
    quick: Quick = False,
    steps: Annotated[int, typer.Option(help="Optimizer steps that count.")] = 5,
    warmup: Annotated[int, typer.Option(help="Steps before them.")] = 3,
    tool: Annotated[
        str,
        typer.Option(
            help="torch (a Chrome trace), nsys (Nsight Systems) or ncu (Nsight Compute). auto, the default: nsys and "
            "ncu where there are a GPU, the tools and the package nvtx, else torch."
        ),
    ] = "auto",
    run_dir: Annotated[Path | None, typer.Option(help="A new directory; by default runs/profile-<what runs>.")] = None,
    settings: Settings = None,
) -> None:
    """Show where the time of a few training steps and an evaluation goes.

    A table of the loop's phases, the longest kernels (on the CPU: operators) with bandwidth and occupancy, the modules,
    and the share of time in which the device was at work; and the trace or the reports, to look closer.

    Examples:

        xlayer profile xlrb --quick

        xlayer profile hyper_lm --residual dhc --backbone small --set dtype=bfloat16 --tool nsys
    """
    os.environ.setdefault("KINETO_LOG_LEVEL", "99")  # else torch's profiler says when it starts and stops
    from xlayer_systems.profiling.command import profile_run
    from xlayer_systems.registry import get_system
    from xlayer_systems.training.options import parse_overrides

    overrides = parse_overrides(settings or [])
    chosen = get_system(system)
    spec = chosen.make_spec(preset, dataset=dataset, backbone=backbone, seed=seed, quick=quick, overrides=overrides)
    path = run_dir or Path("runs") / f"profile-{_run_name(system, spec.preset, spec.dataset, seed, quick)}"
    print("\n".join(profile_run(chosen, spec, path, steps=steps, warmup=warmup, tool=tool)))
    print(f"run directory: {path}")


@app.command()
def info() -> None:
    """Say what was built, what is in use on this machine and why (the same as `python -m xlayer_ext.info`)."""
    from xlayer_ext.info import main as print_info

    print_info([])


@pretrain_app.command()
def encoder(
    out: Annotated[Path, typer.Argument(help="A new directory: run files, and the encoder itself in its encoder/.")],
    epochs: Annotated[int | None, typer.Option(help="Passes over the passages of the training files.")] = None,
    contrast: Annotated[float, typer.Option(help="Weight of the contrastive loss; 0 leaves masked tokens only.")] = 1.0,
    seed: Annotated[int, typer.Option(help="Parameters, pairs, masks.")] = 0,
    resume: Resume = False,
    settings: Settings = None,
) -> None:
    """Pretrain the small encoder (1.7 M parameters) on the Python standard library's training files.

    Masked-token prediction and in-batch contrast of passages that belong together. Validation files are never read.

    Example:

        xlayer pretrain encoder runs/encoder && xlayer train xlrb --backbone runs/encoder/encoder --quick
    """
    from xlayer_systems.registry import PRETRAINING
    from xlayer_systems.runs.execute import format_result, train_run
    from xlayer_systems.training.options import parse_overrides

    system = PRETRAINING["encoder"]
    overrides = _with_shortcuts(parse_overrides(settings or []), epochs=epochs)
    spec = system.make_spec(seed=seed, overrides=overrides, config={"contrast": str(contrast)})
    result = train_run(system, spec, out, resume)
    if _is_main_process():
        print(format_result(system, result))
        print(f"encoder: {out / 'encoder'}")


@pretrain_app.command()
def decoder(
    out: Annotated[Path, typer.Argument(help="A new directory: run files, and the decoder itself in its decoder/.")],
    shape: Annotated[str, typer.Option(help="sender or receiver: they differ in tokenizer and width.")] = "sender",
    seed: Annotated[int, typer.Option(help="Parameters, order of documents and blocks.")] = 0,
    resume: Resume = False,
    settings: Settings = None,
) -> None:
    """Pretrain one of the two small decoders on the Python standard library's training files.

    Next-token prediction on source files and docstrings. Nothing is learned from validation files.

    Example:

        xlayer pretrain decoder runs/sender --shape sender
    """
    from xlayer_systems.registry import PRETRAINING
    from xlayer_systems.runs.execute import format_result, train_run
    from xlayer_systems.training.options import parse_overrides

    system = PRETRAINING["decoder"]
    spec = system.make_spec(shape, seed=seed, overrides=parse_overrides(settings or []))
    result = train_run(system, spec, out, resume)
    if _is_main_process():
        print(format_result(system, result))
        print(f"decoder: {out / 'decoder'}")


def main() -> None:
    """Entry point: what a user can mend ends in one line on stderr and the exit code of its `CommandError`."""
    # Before torch loads its OpenMP: threads that spin while they wait make a step on a busy machine ten times slower.
    os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
    try:
        code = app(standalone_mode=False)
        if code == INTERRUPTED:  # outside the training loop, which raises its own error
            raise InterruptionError("interrupted", INTERRUPTED - 128)
    except CommandError as error:
        _fail(error)
    except ClickException as error:
        message = error.format_message()  # type: ignore[attr-defined]
        if message:
            _fail(UserError(message))
        error.show()  # type: ignore[attr-defined]  # a command without arguments shows its help
        sys.exit(UserError.exit_code)


def _fail(error: CommandError) -> NoReturn:
    print(f"error: {error}", file=sys.stderr)
    sys.exit(error.exit_code)


def _with_shortcuts(overrides: dict[str, str], **shortcuts: int | str | None) -> dict[str, str]:
    """Overrides with those that have an option of their own; ``--set`` wins."""
    return {**{key: str(value) for key, value in shortcuts.items() if value is not None}, **overrides}


def _run_name(system: str, preset: str, dataset: str, seed: int, quick: bool) -> str:
    return f"{system}-{preset}-{dataset.strip('/').replace('/', '-')}-seed{seed}{'-quick' * quick}"


def _is_main_process() -> bool:
    return os.environ.get("RANK", "0") == "0"


if __name__ == "__main__":
    main()
