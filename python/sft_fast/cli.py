"""The command `sft-fast`: one function a command, each of which does its imports itself.

Printing is in `console.py`; what a command does is elsewhere. Nothing here imports torch, Ray or transformers before a
command needs them, so that help answers at once.
"""

from __future__ import annotations

import dataclasses
import json
import os
import sys
import traceback
from collections.abc import Sequence
from typing import TYPE_CHECKING, Annotated, Literal, NoReturn

import typer

from sft_fast import console
from sft_fast.errors import ConfigError, SftFastError, TrainError
from sft_fast.options import (
    AsJson,
    CacheDirectory,
    ConfigName,
    ConfigPath,
    DatasetOrOverrides,
    OptionalConfigName,
    Overrides,
    complete_template,
)

if TYPE_CHECKING:
    import sft_fast
    from sft_fast.config import SFTConfig

# Packages of the extra `train`: without them there is a better answer than a missing module.
TRAIN_PACKAGES = frozenset(
    ("accelerate", "deepspeed", "peft", "ray", "safetensors", "tensorboard", "torch", "transformers")
)

# What typer ends with after Ctrl-C: 128 and the number of the signal.
INTERRUPTED = 130

app = typer.Typer(
    name="sft-fast",
    help="Supervised fine-tuning of language models: records in, a fine-tuned model out.",
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)

cache = typer.Typer(
    help="The data sets that training keeps, and the space they take. DIR is a data_cache_dir; by default that of the "
    "configuration.",
    no_args_is_help=True,
)
app.add_typer(cache, name="cache")


@app.callback(invoke_without_command=True)
def _root(version: Annotated[bool, typer.Option("--version", help="Print the version.")] = False) -> None:
    if version:
        import sft_fast

        typer.echo(f"sft-fast {sft_fast.__version__}")
        raise typer.Exit


@app.command()
def preprocess(
    arguments: Annotated[
        list[str] | None,
        typer.Argument(metavar="FILE", help="JSONL or JSON files, or globs; with --config-name: KEY=VALUE overrides."),
    ] = None,
    output_dir: Annotated[str | None, typer.Option(metavar="DIR", help="Where the data set goes.")] = None,
    tokenizer: Annotated[str | None, typer.Option(metavar="DIR", help="Model directory with a tokenizer.")] = None,
    template: Annotated[
        str, typer.Option(help="Chat template: native, a built-in name, or a file.", autocompletion=complete_template)
    ] = "native",
    sequence_length: Annotated[int | None, typer.Option(min=1, help="Most tokens of a sample.")] = None,
    system_key: Annotated[str | None, typer.Option(help="Field of the system prompt.")] = None,
    prompt_key: Annotated[str, typer.Option(help="Field of the prompt.")] = "instruction",
    query_key: Annotated[str | None, typer.Option(help="Field of further input.")] = None,
    response_key: Annotated[str, typer.Option(help="Field of the answer.")] = "output",
    history_key: Annotated[str | None, typer.Option(help="Field of earlier turns, pairs of prompt and answer.")] = None,
    text_key: Annotated[str, typer.Option(help="Field of plain text.")] = "text",
    record_shape: Annotated[
        Literal["auto", "fields", "messages", "conversations", "prompt_completion", "text"],
        typer.Option(help="The shape that every record has; auto: that which its keys show."),
    ] = "auto",
    template_date: Annotated[str | None, typer.Option(help="Date that the template takes for today.")] = None,
    num_threads: Annotated[int | None, typer.Option(min=1, help="Threads; one a core if not given.")] = None,
    on_error: Annotated[
        Literal["raise", "skip"], typer.Option(help="What to do with a record that is wrong.")
    ] = "raise",
    too_long: Annotated[
        Literal["reject", "truncate_turns", "truncate"], typer.Option(help="What to do with a sample that is too long.")
    ] = "reject",
    duplicates: Annotated[
        Literal["keep", "drop"],
        typer.Option(help="What to do with a record that makes the same samples as one before."),
    ] = "keep",
    control_tokens: Annotated[
        Literal["plain", "reject", "allow"],
        typer.Option(help="What becomes of text in a record that spells a control token."),
    ] = "plain",
    train_on: Annotated[
        Literal["all_answers", "last_answer"], typer.Option(help="Which answers of a conversation are trained on.")
    ] = "all_answers",
    train_on_tool_calls: Annotated[bool, typer.Option(help="Train on answers that call tools.")] = True,
    train_on_thinking: Annotated[bool, typer.Option(help="Train on the thinking of answers.")] = True,
    dropped_thinking: Annotated[
        Literal["skip", "split", "reject", "keep"],
        typer.Option(help="What becomes of an answer whose thinking the template leaves out."),
    ] = "skip",
    verify_samples: Annotated[
        Literal["none", "sampled", "all"],
        typer.Option("--verify", help="Which samples to compare with those of transformers."),
    ] = "none",
    ray_address: Annotated[
        str | None,
        typer.Option(metavar="HOST:PORT", help="Ray cluster that encodes: HOST:PORT, auto, or local for none."),
    ] = None,
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Replace a data set that is there.")] = False,
    as_json: AsJson = False,
    config_path: ConfigPath = ".",
    config_name: OptionalConfigName = None,
) -> None:
    """Turn records into token ids and label masks on disk.

    \b
    Examples:
      sft-fast preprocess data.jsonl --output-dir out --tokenizer path/to/model --sequence-length 4096
      sft-fast preprocess --config-path configs --config-name my on_error=skip
      sft-fast preprocess --config-path configs --config-name my --json
    """
    if config_name is not None:
        if output_dir is not None or tokenizer is not None:
            raise ConfigError("with --config-name, the configuration names the tokenizer and the place of the data set")
        from sft_fast.train.plan import plans_of

        config = _load(config_path, config_name, arguments)
        reports = _preprocess_config(config)
        console.print_reports(reports, plans_of(config, reports), as_json)
        return
    import sft_fast

    if not (arguments and output_dir and tokenizer and sequence_length):
        given = {
            "FILE": arguments,
            "--output-dir": output_dir,
            "--tokenizer": tokenizer,
            "--sequence-length": sequence_length,
        }
        raise ConfigError(
            f"missing: {', '.join(name for name, value in given.items() if not value)}",
            code="missing_key",
            hint="or name a configuration with --config-name",
        )
    with console.PreprocessProgress("preprocessing") as progress:
        report = sft_fast.preprocess(
            arguments,
            output_dir,
            tokenizer=tokenizer,
            template=template,
            sequence_length=sequence_length,
            system_key=system_key,
            prompt_key=prompt_key,
            query_key=query_key,
            response_key=response_key,
            history_key=history_key,
            text_key=text_key,
            record_shape=record_shape,
            template_date=template_date,
            num_threads=num_threads,
            on_error=on_error,
            too_long=too_long,
            duplicates=duplicates,
            control_tokens=control_tokens,
            train_on=train_on,
            train_on_tool_calls=train_on_tool_calls,
            train_on_thinking=train_on_thinking,
            dropped_thinking=dropped_thinking,
            verify=verify_samples,
            ray_address=ray_address,
            overwrite=overwrite,
            progress=progress,
        )
    # Of epoch 0; the others hardly differ.
    packing = sft_fast.Dataset(report.path, report.sources).pack(sequence_length=sequence_length)
    packs = {"num_packs": len(packing), "fill_ratio": packing.fill_ratio}
    console.print_reports({"": report}, {"": packs}, as_json)


@app.command()
def train(config_name: ConfigName, overrides: Overrides = None, config_path: ConfigPath = ".") -> None:
    """Fine-tune a model; preprocess first what the cache lacks.

    \b
    Examples:
      sft-fast train --config-path configs --config-name my
      sft-fast train --config-path configs --config-name my sft_train.training_args.learning_rate=1e-5
      sft-fast train --config-path configs --config-name my resume_from_checkpoint=true
    """
    config = _load(config_path, config_name, overrides)
    try:
        from sft_fast.train.pipeline import SFTPipeline

        SFTPipeline(config).run()
    except ModuleNotFoundError as error:  # Ray and others are imported as late as they are needed
        raise _missing_package(error) from error


@app.command()
def validate(
    config_name: ConfigName,
    overrides: Overrides = None,
    config_path: ConfigPath = ".",
    num_samples: Annotated[int, typer.Option(min=0, help="Records to render from the first file.")] = 2,
) -> None:
    """Check a configuration in seconds: keys, files, template, first records, batch arithmetic.

    \b
    Examples:
      sft-fast validate --config-path configs --config-name my
      sft-fast validate --config-path configs --config-name my --num-samples 10 global_template=qwen3
    """
    from sft_fast.check import check_run

    check_run(_load(config_path, config_name, overrides), console.stdout_console(), num_samples)


@app.command()
def inspect(
    arguments: DatasetOrOverrides = None,
    sample: Annotated[
        list[int] | None, typer.Option("--sample", "-s", min=0, help="This sample, from 0; again for more.")
    ] = None,
    first: Annotated[int, typer.Option(min=0, help="Number of the first sample.")] = 0,
    num_samples: Annotated[
        int, typer.Option("--num-samples", "-n", min=1, help="How many samples, hits or differences.")
    ] = 3,
    pack: Annotated[int | None, typer.Option(min=0, help="This pack, from 0, with all its samples.")] = None,
    sequence_length: Annotated[
        int | None, typer.Option(min=1, help="Tokens of a pack; as preprocessed if not given.")
    ] = None,
    seed: Annotated[int, typer.Option(min=0, help="Seed of the packs: the data_seed of a run.")] = 42,
    epoch: Annotated[int, typer.Option(min=0, help="Epoch of the packs, from 0.")] = 0,
    source: Annotated[
        str | None, typer.Option(metavar="FILE:LINE", help="What became of the record on a line.")
    ] = None,
    search: Annotated[str | None, typer.Option(metavar="TEXT", help="Find a text in all samples.")] = None,
    diff: Annotated[
        str | None, typer.Option(metavar="OTHER", help="Compare with another data set of these records.")
    ] = None,
    html: Annotated[
        str | None, typer.Option(metavar="FILE", help="Write a page with statistics, plots and samples.")
    ] = None,
    ids: Annotated[bool, typer.Option("--ids", help="One token a line, with its id.")] = False,
    tokenizer: Annotated[str | None, typer.Option(metavar="DIR", help="Tokenizer, if it has moved.")] = None,
    diff_tokenizer: Annotated[
        str | None, typer.Option(metavar="DIR", help="Tokenizer of OTHER, if it has moved.")
    ] = None,
    as_json: AsJson = False,
    config_path: ConfigPath = ".",
    config_name: OptionalConfigName = None,
) -> None:
    """Show what the model will read, token by token, with what it learns in colour, and where it comes from.

    \b
    Examples:
      sft-fast inspect out --sample 17 --ids
      sft-fast inspect out --pack 0 --sequence-length 4096
      sft-fast inspect out --source data.jsonl:120
      sft-fast inspect out --search "As an AI" -n 20
      sft-fast inspect out --diff other
      sft-fast inspect out --html out.html
    """
    import sft_fast
    from sft_fast.inspect.command import Question, answer

    question = Question(
        sample=sample,
        first=first,
        num_samples=num_samples,
        pack=pack,
        sequence_length=sequence_length,
        seed=seed,
        epoch=epoch,
        source=source,
        search=search,
        diff=diff,
        html=html,
        tokenizer=tokenizer,
        diff_tokenizer=diff_tokenizer,
        with_ids=ids,
        as_json=as_json,
    )
    dataset = sft_fast.Dataset(_dataset_path(arguments, config_path, config_name))
    answer(dataset, question, console.stdout_console())


@app.command()
def verify(
    arguments: DatasetOrOverrides = None,
    as_json: AsJson = False,
    config_path: ConfigPath = ".",
    config_name: OptionalConfigName = None,
) -> None:
    """Check the checksums and laws of a data set on disk.

    \b
    Examples:
      sft-fast verify out
      sft-fast verify --config-path configs --config-name my
    """
    import sft_fast

    path = _dataset_path(arguments, config_path, config_name)
    sft_fast.verify(path)
    manifest = sft_fast.Dataset(path).manifest
    if as_json:
        names = ("fingerprint", "num_samples", "num_tokens", "num_label_tokens")
        typer.echo(json.dumps({"path": path, **{name: manifest[name] for name in names}}))
        return
    num_samples, num_tokens = console.count(manifest["num_samples"]), console.count(manifest["num_tokens"])
    typer.echo(f"{path}: whole, {num_samples} samples, {num_tokens} tokens")


@cache.command("list")
def cache_list(
    arguments: CacheDirectory = None,
    as_json: AsJson = False,
    config_path: ConfigPath = ".",
    config_name: OptionalConfigName = None,
) -> None:
    """List the data sets in a cache, those used longest ago first, and what killed runs left.

    \b
    Examples:
      sft-fast cache list output/data
      sft-fast cache list --config-path configs --config-name my --json
    """
    from sft_fast.cache import list_cache

    content = list_cache(_cache_path(arguments, config_path, config_name))
    if as_json:
        typer.echo(json.dumps({**dataclasses.asdict(content), "num_bytes": content.num_bytes}))
    else:
        console.print_cache(content)


@cache.command("prune")
def cache_prune(
    arguments: CacheDirectory = None,
    older_than: Annotated[
        str | None, typer.Option(metavar="TIME", help="Remove what was not used for 30d, 12h, 2w …")
    ] = None,
    max_bytes: Annotated[
        str | None, typer.Option(metavar="SIZE", help="Remove what was not used for longest, down to 50GB …")
    ] = None,
    all_datasets: Annotated[bool, typer.Option("--all", help="Remove every data set.")] = False,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Only say what would go.")] = False,
    as_json: AsJson = False,
    config_path: ConfigPath = ".",
    config_name: OptionalConfigName = None,
) -> None:
    """Free space in a cache: what killed runs left and damaged data sets always, others as the options say.

    What a process makes or uses stays.

    \b
    Examples:
      sft-fast cache prune output/data --older-than 30d --dry-run
      sft-fast cache prune output/data --max-bytes 50GB
    """
    from sft_fast.cache import parse_duration, parse_size, prune_cache

    report = prune_cache(
        _cache_path(arguments, config_path, config_name),
        older_than_seconds=None if older_than is None else parse_duration(older_than),
        max_bytes=None if max_bytes is None else parse_size(max_bytes),
        all_datasets=all_datasets,
        dry_run=dry_run,
    )
    if as_json:
        typer.echo(json.dumps(dataclasses.asdict(report)))
    else:
        console.print_pruned(report)


@app.command()
def export(
    checkpoint: Annotated[str, typer.Argument(metavar="CHECKPOINT", help="A checkpoint directory of a run.")],
    output_dir: Annotated[str, typer.Argument(metavar="DIR", help="Where the model goes.")],
    adapters_only: Annotated[
        bool, typer.Option("--adapters-only", help="Write the LoRA adapters as PEFT does, instead of a merged model.")
    ] = False,
) -> None:
    """Write the model of a checkpoint as an ordinary model directory, with its tokenizer.

    \b
    Examples:
      sft-fast export output/sft_train/checkpoint-200 trained
    """
    try:
        from sft_fast.train.export import export_checkpoint
    except ModuleNotFoundError as error:
        raise _missing_package(error) from error
    export_checkpoint(checkpoint, output_dir, adapters_only=adapters_only)
    typer.echo(f"the {'adapters are' if adapters_only else 'model is'} in {output_dir}")


@app.command()
def doctor(
    arguments: CacheDirectory = None,
    for_training: Annotated[
        bool, typer.Option("--train", help="Also fail where something is missing that training needs.")
    ] = False,
    as_json: AsJson = False,
    config_path: ConfigPath = ".",
    config_name: OptionalConfigName = None,
) -> None:
    """Say what this machine can do, what is missing, and how to install it. Status 1 where something does not work.

    \b
    Examples:
      sft-fast doctor
      sft-fast doctor /mnt/fast/cache --train
    """
    from sft_fast.doctor import examine

    checks = examine(_cache_path(arguments, config_path, config_name), for_training=for_training)
    is_well = all(check.state != "problem" for check in checks)
    if as_json:
        typer.echo(json.dumps({"ok": is_well, "checks": [dataclasses.asdict(check) for check in checks]}))
    else:
        console.print_checks(checks)
    if not is_well:
        raise typer.Exit(1)


def _load(config_path: str, config_name: str, overrides: Sequence[str] | None) -> SFTConfig:
    from sft_fast.config import load_config

    config = load_config(config_path, config_name, overrides or ())
    for note in config.notes:
        console.print_note(note)
    return config


def _preprocess_config(config: SFTConfig) -> dict[str, sft_fast.Report]:
    """Finds or makes the data sets that a configuration names: `train`, and those of the validation."""
    import sft_fast

    reports = {}
    for name, files in config.data_files().items():
        with console.PreprocessProgress(name) as progress:
            reports[name] = sft_fast.ensure_dataset(
                files, config.data_cache_dir, progress=progress, **config.preprocess_options()
            )
    return reports


def _dataset_path(arguments: Sequence[str] | None, config_path: str, config_name: str | None) -> str:
    """The data set that a command is about: its one argument, or the training data of a configuration."""
    if config_name is not None:
        return str(_preprocess_config(_load(config_path, config_name, arguments))["train"].path)
    if not arguments or len(arguments) != 1:
        raise ConfigError("expected one data set", code="usage", hint="give its directory, or --config-name")
    return arguments[0]


def _cache_path(arguments: Sequence[str] | None, config_path: str, config_name: str | None) -> str:
    """The cache that a command is about: its argument, that of a configuration, or where a configuration has it."""
    if config_name is not None:
        return _load(config_path, config_name, arguments).data_cache_dir
    if not arguments:
        from sft_fast.config import SFTConfig

        return SFTConfig.data_cache_dir
    if len(arguments) > 1:
        raise ConfigError("expected one directory", code="usage", hint="give one cache, or --config-name")
    return arguments[0]


def _missing_package(error: ModuleNotFoundError) -> Exception:
    """The answer to a package of the extra `train` that is not installed; any other missing module is a bug."""
    if (error.name or "").split(".")[0] not in TRAIN_PACKAGES:
        return error
    return TrainError(
        f"training needs the package {error.name}", code="missing_package", hint="pip install 'sft-fast[train]'"
    )


def main(arguments: Sequence[str] | None = None) -> NoReturn:
    """Runs the command line and ends the process: 0 done, 1 the run failed, 2 the input or configuration is wrong.

    Ctrl-C is 130, as of any command that ends by it.

    An error is one text on stderr; with `SFT_FAST_DEBUG=1` its traceback comes first.
    """
    try:
        app(args=None if arguments is None else list(arguments), prog_name="sft-fast")
    except BrokenPipeError:
        # Whoever read our output has seen enough; nothing is left to tell them.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        sys.exit(1)
    except Exception as error:
        if _debug():
            traceback.print_exception(error)
        if isinstance(error, SftFastError):
            status, text = error.exit_status, str(error)
        else:
            status, text = 1, f"{type(error).__name__}: {error}"
            if not _debug():
                text += "\n  this is a mistake in sft-fast; SFT_FAST_DEBUG=1 shows where it happened"
        console.print_error(text)
        sys.exit(status)
    except (KeyboardInterrupt, SystemExit) as end:
        if isinstance(end, KeyboardInterrupt) or end.code == INTERRUPTED:
            console.print_error("interrupted; nothing half-done is left")
            sys.exit(INTERRUPTED)
        raise
    sys.exit(0)


def _debug() -> bool:
    return os.environ.get("SFT_FAST_DEBUG", "") not in ("", "0")
