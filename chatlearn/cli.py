"""The command line: sub-commands, overrides, the dry run, and what an error looks like to the person who typed."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable, Generator, Sequence
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Final

import typer
from rich.console import Console
from rich.progress import BarColumn, Progress, TaskProgressColumn, TextColumn, TimeRemainingColumn
from rich.table import Column, Table

from chatlearn.config.environment import Environment, keep_to_ourselves
from chatlearn.config.layout import Layout, layout_of
from chatlearn.config.preflight import disk_problems
from chatlearn.config.read import read_config
from chatlearn.config.resolve import imported, resolve
from chatlearn.config.summary import inert_line, summary_rows
from chatlearn.config.text import resolved_text
from chatlearn.errors import ChatLearnError, ConfigError, RunError

if TYPE_CHECKING:
    from chatlearn.config.schema import GrpoConfig
    from chatlearn.replay.comparison import Comparison
    from chatlearn.resume_check.comparison import Comparison as RunComparison

DONE: Final = 0
FAILED: Final = 1
WRONG: Final = 2  # the command or the configuration; nothing was started. 130, interrupted, comes from typer.

PREPROCESSORS: Final = {
    name: f"chatlearn.data.data_preprocess.{name}:main" for name in ("math_lighteval", "gsm8k", "arithmetic")
}

app = typer.Typer(
    name="chatlearn",
    help="Reinforcement learning for language models: GRPO with vLLM, PyTorch FSDP2 and Ray.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
)


@app.callback()
def chatlearn() -> None:
    """Tell typer that there are several sub-commands."""


@app.command()
def grpo(
    config_file: Annotated[Path, typer.Option("--config-file", "-c", help="YAML file, see docs/config.md.")],
    overrides: Annotated[list[str] | None, typer.Argument(metavar="KEY=VALUE", help="Keys to override.")] = None,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Check all, print the plan, start nothing.")] = False,
) -> None:
    """Train a model with GRPO."""
    config = read_config(config_file, overrides or ())
    layout = check(config, Environment.read())
    line = inert_line(config)
    if line is not None:
        typer.echo(line, err=True)
    if dry_run:
        rehearse(config, layout)
        show_plan(config, layout)
        return
    from chatlearn.grpo import run

    run(config)


@app.command(context_settings={"allow_interspersed_args": False})
def prepare(
    name: Annotated[str, typer.Argument(metavar="NAME", help=f"One of: {', '.join(PREPROCESSORS)}.")],
    arguments: Annotated[list[str] | None, typer.Argument(help="As for that preprocessor; try NAME --help.")] = None,
) -> None:
    """Write train.json and test.json from a downloaded data set, or generate them."""
    main_of = imported(resolve(PREPROCESSORS, name, "prepare"), "prepare")
    main_of(arguments or [])


@app.command()
def convert(
    hf_dir: Annotated[Path, typer.Option("--hf_dir", help="Hugging Face directory of the base model.")],
    ckpt_dir: Annotated[Path, typer.Option("--ckpt_dir", help="The run's save_model/policy_trainer.")],
    save_dir: Annotated[Path, typer.Option("--save_dir", help="Directory to write.")],
    iteration: Annotated[int, typer.Option("--iter", min=0, help="Train iteration: a sub-folder of --ckpt_dir.")],
    groupgemm: Annotated[int, typer.Option(min=0, max=1, help="1 when training ran with groupgemm.")] = 0,
) -> None:
    """Turn a sharded checkpoint into a Hugging Face directory."""
    from chatlearn.checkpoint.convert import convert as convert_checkpoint

    with conversion_bar() as progress:
        report = convert_checkpoint(hf_dir, ckpt_dir, save_dir, iteration, groupgemm == 1, progress=progress)
    for note in report.notes:
        typer.echo(note, err=True)
    size = f"{report.num_tensors} tensors, {report.num_bytes / 1e9:.3f} GB"
    typer.echo(f"iteration {report.iteration} of {ckpt_dir} is in {report.save_dir} ({size})", err=True)


@app.command()
def replay(
    capsule: Annotated[Path, typer.Argument(metavar="CAPSULE", help="Such as output/capsules/iteration_000001.")],
    overrides: Annotated[list[str] | None, typer.Argument(metavar="KEY=VALUE", help="Keys to override.")] = None,
    compare: Annotated[bool, typer.Option("--compare", help="In every way that must give the same numbers.")] = False,
) -> None:
    """Compute a recorded training step again, without Ray and without an engine; prints JSON."""
    from chatlearn.replay import command

    say = partial(typer.echo, err=True)
    if compare:
        show_comparison(command.compare(capsule, overrides or (), say))
        return
    document = command.replay(capsule, overrides or (), say)
    if document is not None:  # else another rank says it
        typer.echo(json.dumps(document, indent=1))


@app.command("resume-check")
def resume_check(
    config_file: Annotated[Path, typer.Option("--config-file", "-c", help="YAML file, see docs/config.md.")],
    episodes: Annotated[int, typer.Option(min=2, help="How many episodes both runs have.")],
    cut: Annotated[int, typer.Option(min=1, help="After which of them one is killed, to go on from there.")],
    overrides: Annotated[list[str] | None, typer.Argument(metavar="KEY=VALUE", help="Keys to override.")] = None,
) -> None:
    """Prove that a killed run goes on as if nothing had happened: runs it three times, compares, prints JSON."""
    config = read_config(config_file, overrides or ())
    from chatlearn.resume_check import command
    from chatlearn.resume_check.trial import trial_of

    trial = trial_of(config, config_file, overrides or (), episodes, cut)
    say = partial(typer.echo, err=True)
    tried = read_config(config_file, trial.words(trial.uninterrupted))  # It is shorter, and saves at other places.
    layout = check(tried, Environment.read())
    command.require_room(tried, layout, trial)
    for warning in command.warnings_of(tried, layout):
        say(warning)
    show_run_comparison(command.resume_check(trial, say))


@contextmanager
def conversion_bar() -> Generator[Callable[[int, int], None]]:
    """A bar on standard error to be told what is done and of how much; nothing where that is not a terminal."""
    if not sys.stderr.isatty():
        yield lambda done, total: None
        return
    columns = (TextColumn("{task.description}"), BarColumn(), TaskProgressColumn(), TimeRemainingColumn())
    with Progress(*columns, console=Console(stderr=True), transient=True) as bar:
        task = bar.add_task("converting", total=None)

        def show(done: int, total: int) -> None:
            what = "converting" if done < total else "loading back"
            bar.update(task, description=what, completed=done, total=total)

        yield show


def check(config: GrpoConfig, environment: Environment) -> Layout:
    """Everything that can be known before the start; one ConfigError lists all that is wrong."""
    problems = disk_problems(config, environment)
    if environment.node_rank > 0:
        problems.append(
            f"this is node {environment.node_rank} (NODE_RANK or RANK); the command runs on node 0, the others join "
            "its Ray cluster, as scripts/base_env.sh does"
        )
    try:
        layout = layout_of(config, environment)
    except ConfigError as error:
        problems += error.problems
        raise ConfigError(*problems) from error
    if problems:
        raise ConfigError(*problems)
    from chatlearn.disk_room import check_disk_room
    from chatlearn.host_memory import check_host_memory
    from chatlearn.inspection import check_models, check_names

    check_models(config, layout)
    check_names(config)
    check_host_memory(config, layout)
    check_disk_room(config, layout)
    return layout


def rehearse(config: GrpoConfig, layout: Layout) -> None:
    """What a run does before its cluster: see who is there, read the data, find where to begin. Nothing is written."""
    from chatlearn.beginning import announce, state_found
    from chatlearn.checkpoint.run_lock import require_free
    from chatlearn.provenance import provenance_of
    from chatlearn.questions import read_questions

    require_free(layout.folders.output, announce)
    questions = read_questions(config)
    state = state_found(config, layout, provenance_of(layout, questions.training))
    if state.episode > 0:
        announce(f"a run would go on from checkpoint {state.train_iteration}, after episode {state.episode}")


def show_plan(config: GrpoConfig, layout: Layout) -> None:
    """The configuration on standard output, ready to be a file again; the numbers on standard error."""
    typer.echo(resolved_text(config), nl=False)
    table = Table("what", "how", title="Plan (nothing was started)", title_justify="left")
    from chatlearn.disk_room import disk_room_rows
    from chatlearn.host_memory import host_memory_rows

    for what, how in (*summary_rows(layout), *host_memory_rows(config, layout), *disk_room_rows(config, layout)):
        table.add_row(what, how)
    Console(stderr=True).print(table)


def show_comparison(comparison: Comparison) -> None:
    """The document on standard output, a table on standard error; raises ``RunError`` where something disagrees."""
    typer.echo(json.dumps(comparison.document(), indent=1))
    worst = Column("worst parameter", overflow="fold")
    table = Table("variant", "loss", "gradient", worst, "", title="Difference from the base, relative")
    for row in (*comparison.variants, *comparison.precision):
        found = row.difference
        verdict = "ok" if row.passed else f"more than {row.tolerance:.0e}"
        table.add_row(row.name, f"{found.loss_rel:.1e}", f"{found.grad_rel:.1e}", found.worst, verdict)
    for entry in comparison.left_out:
        table.add_row(entry.name, "", "", "", f"left out: {entry.reason}")
    Console(stderr=True).print(table)
    failures = comparison.failures()
    if failures:
        raise RunError("\n".join(failures))


def show_run_comparison(comparison: RunComparison) -> None:
    """The document on standard output, the verdict on standard error; raises ``RunError`` where the runs differ."""
    typer.echo(json.dumps(comparison.document(), indent=1, ensure_ascii=False))
    if comparison.difference is not None:
        raise RunError(f"the resumed run is another one: {comparison.difference}")
    counts = ", ".join(f"{number} of {kind.replace('_', ' ')}" for kind, number in comparison.counts.items())
    typer.echo(f"equal: {counts}", err=True)


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command line; returns the exit status. A user's error is one message, never a traceback."""
    keep_to_ourselves()  # Before transformers or Ray are imported; they read the environment once.
    words = list(sys.argv[1:] if arguments is None else arguments)
    try:
        app(words, prog_name="chatlearn")  # leaves with SystemExit in any case, with status 2 for a wrong command
    except SystemExit as end:
        return end.code if isinstance(end.code, int) else DONE
    except ConfigError as error:
        _complain("wrong configuration or command", error)
        return WRONG
    except ChatLearnError as error:
        _complain("the run failed", error)
        return FAILED
    except OSError as error:  # A full disk, a folder that may not be written: the system's own words name the file.
        typer.echo(f"the run failed: {error}", err=True)
        return FAILED
    return DONE


def _complain(what: str, error: ChatLearnError) -> None:
    """One problem: one line. Several: one line each below a heading."""
    lines = str(error).splitlines()
    text = f"{what}: {lines[0]}" if len(lines) == 1 else "\n  ".join([f"{what}:", *lines])
    typer.echo(text, err=True)
