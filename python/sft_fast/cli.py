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
from typing import TYPE_CHECKING, Any, NoReturn

import click

from sft_fast import console, options
from sft_fast.errors import ConfigError, SftFastError, TrainError
from sft_fast.redact import without_secrets

if TYPE_CHECKING:
    import sft_fast
    from sft_fast.config import SFTConfig

# Packages of the extra `train`: without them there is a better answer than a missing module.
TRAIN_PACKAGES = frozenset(
    ("accelerate", "deepspeed", "peft", "ray", "safetensors", "tensorboard", "torch", "transformers")
)

# What a shell reports of a command that Ctrl-C ended: 128 and the number of the signal.
INTERRUPTED = 130


@click.group(
    invoke_without_command=True,
    no_args_is_help=True,
    context_settings={"help_option_names": ["-h", "--help"], "show_default": True, "max_content_width": 100},
)
@options.flag("--version", help="Print the version.")
@options.show_completion
@click.pass_context
def app(context: click.Context, version: bool) -> None:
    """Supervised fine-tuning of language models: records in, a fine-tuned model out."""
    if version:
        import sft_fast

        click.echo(f"sft-fast {sft_fast.__version__}")
        context.exit()


@app.group(no_args_is_help=True)
def cache() -> None:
    """The data sets that training keeps, and the space they take.

    DIR is a data_cache_dir; by default that of the configuration.
    """


@app.command()
@options.arguments("[FILE]...")
@options.text("--output-dir", "DIR", help="Where the data set goes.")
@options.text("--tokenizer", "DIR", help="Model directory with a tokenizer.")
@click.option(
    "--template",
    metavar="NAME",
    default="native",
    shell_complete=options.complete_template,
    help="Chat template: native, a built-in name, or a file.",
)
@options.number("--sequence-length", least=1, help="Most tokens of a sample.")
@options.text("--system-key", "FIELD", help="Field of the system prompt.")
@options.text("--prompt-key", "FIELD", default="instruction", help="Field of the prompt.")
@options.text("--query-key", "FIELD", help="Field of further input.")
@options.text("--response-key", "FIELD", default="output", help="Field of the answer.")
@options.text("--history-key", "FIELD", help="Field of earlier turns, pairs of prompt and answer.")
@options.text("--text-key", "FIELD", default="text", help="Field of plain text.")
@options.choice(
    "--record-shape",
    *("auto", "fields", "messages", "conversations", "prompt_completion", "text"),
    help="The shape that every record has; auto: that which its keys show.",
)
@options.text("--template-date", "DATE", help="Date that the template takes for today.")
@options.number("--num-threads", least=1, help="Threads; one a core if not given.")
@options.choice("--on-error", "raise", "skip", help="What to do with a record that is wrong.")
@options.choice("--too-long", "reject", "truncate_turns", "truncate", help="What to do with a sample that is too long.")
@options.choice(
    "--duplicates", "keep", "drop", help="What to do with a record that makes the same samples as one before."
)
@options.choice(
    "--control-tokens",
    *("plain", "reject", "allow"),
    help="What becomes of text in a record that spells a control token.",
)
@options.choice("--train-on", "all_answers", "last_answer", help="Which answers of a conversation are trained on.")
@click.option(
    "--train-on-tool-calls/--no-train-on-tool-calls",
    default=True,
    help="Whether answers that call tools are trained on.",
)
@click.option(
    "--train-on-thinking/--no-train-on-thinking", default=True, help="Whether the thinking of answers is trained on."
)
@options.choice(
    "--dropped-thinking",
    *("skip", "split", "reject", "keep"),
    help="What becomes of an answer whose thinking the template leaves out.",
)
@options.choice("--verify", "none", "sampled", "all", help="Which samples to compare with those of transformers.")
@options.text("--ray-address", "HOST:PORT", help="Ray cluster that encodes: HOST:PORT, auto, or local for none.")
@options.flag("--overwrite", help="Replace a data set that is there.")
@options.as_json
@options.configuration(is_required=False)
def preprocess(
    arguments: Sequence[str],
    output_dir: str | None,
    tokenizer: str | None,
    sequence_length: int | None,
    as_json: bool,
    config_path: str,
    config_name: str | None,
    **settings: Any,
) -> None:
    """Turn records into token ids and label masks on disk.

    FILE: JSONL or JSON files, or globs; with --config-name: KEY=VALUE overrides.

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
            sequence_length=sequence_length,
            progress=progress,
            **settings,
        )
    # Of epoch 0; the others hardly differ.
    packing = sft_fast.Dataset(report.path, report.sources).pack(sequence_length=sequence_length)
    packs = {"num_packs": len(packing), "fill_ratio": packing.fill_ratio}
    console.print_reports({"": report}, {"": packs}, as_json)


@app.command()
@options.arguments("[KEY=VALUE]...")
@options.configuration(is_required=True)
def train(arguments: Sequence[str], config_path: str, config_name: str) -> None:
    """Fine-tune a model; preprocess first what the cache lacks.

    KEY=VALUE: values that replace those of the file.

    \b
    Examples:
      sft-fast train --config-path configs --config-name my
      sft-fast train --config-path configs --config-name my sft_train.training_args.learning_rate=1e-5
      sft-fast train --config-path configs --config-name my resume_from_checkpoint=true
    """
    config = _load(config_path, config_name, arguments)
    try:
        from sft_fast.train.pipeline import SFTPipeline

        SFTPipeline(config).run()
    except ModuleNotFoundError as error:  # Ray and others are imported as late as they are needed
        raise _missing_package(error) from error


@app.command()
@options.arguments("[KEY=VALUE]...")
@options.number("--num-samples", least=0, default=2, help="Records to render from the first file.")
@options.configuration(is_required=True)
def validate(arguments: Sequence[str], num_samples: int, config_path: str, config_name: str) -> None:
    """Check a configuration in seconds: keys, files, template, first records, batch arithmetic, memory.

    KEY=VALUE: values that replace those of the file.

    \b
    Examples:
      sft-fast validate --config-path configs --config-name my
      sft-fast validate --config-path configs --config-name my --num-samples 10 global_template=qwen3
    """
    from sft_fast.check import check_run

    check_run(_load(config_path, config_name, arguments), console.stdout_console(), num_samples)


@app.command()
@options.arguments("[DATASET]")
@options.number("--sample", "-s", least=0, multiple=True, help="This sample, from 0; again for more.")
@options.number("--first", least=0, default=0, help="Number of the first sample.")
@options.number("--num-samples", "-n", least=1, default=3, help="How many samples, hits or differences.")
@options.number("--pack", least=0, help="This pack, from 0, with all its samples.")
@options.number("--sequence-length", least=1, help="Tokens of a pack; as preprocessed if not given.")
@options.number("--seed", least=0, default=42, help="Seed of the packs: the data_seed of a run.")
@options.number("--epoch", least=0, default=0, help="Epoch of the packs, from 0.")
@options.text("--source", "FILE:LINE", help="What became of the record on a line.")
@options.text("--search", help="Find a text in all samples.")
@options.text("--diff", "OTHER", help="Compare with another data set of these records.")
@options.text("--html", "FILE", help="Write a page with statistics, plots and samples.")
@click.option("--ids", "with_ids", is_flag=True, help="One token a line, with its id.")
@options.text("--tokenizer", "DIR", help="Tokenizer, if it has moved.")
@options.text("--diff-tokenizer", "DIR", help="Tokenizer of OTHER, if it has moved.")
@options.as_json
@options.configuration(is_required=False)
def inspect(arguments: Sequence[str], config_path: str, config_name: str | None, **question: Any) -> None:
    """Show what the model will read, token by token, with what it learns in colour, and where it comes from.

    DATASET: a data set on disk; with --config-name: KEY=VALUE overrides.

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

    dataset = sft_fast.Dataset(_dataset_path(arguments, config_path, config_name))
    answer(dataset, Question(**question), console.stdout_console())


@app.command()
@options.arguments("[DATASET]")
@options.as_json
@options.configuration(is_required=False)
def verify(arguments: Sequence[str], as_json: bool, config_path: str, config_name: str | None) -> None:
    """Check the checksums and laws of a data set on disk.

    DATASET: a data set on disk; with --config-name: KEY=VALUE overrides.

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
        click.echo(json.dumps({"path": without_secrets(str(path)), **{name: manifest[name] for name in names}}))
        return
    num_samples, num_tokens = console.count(manifest["num_samples"]), console.count(manifest["num_tokens"])
    click.echo(f"{without_secrets(str(path))}: whole, {num_samples} samples, {num_tokens} tokens")


@cache.command("list")
@options.arguments("[DIR]")
@options.as_json
@options.configuration(is_required=False)
def cache_list(arguments: Sequence[str], as_json: bool, config_path: str, config_name: str | None) -> None:
    """List the data sets in a cache, those used longest ago first, and what killed runs left.

    DIR: the cache; with --config-name: KEY=VALUE overrides.

    \b
    Examples:
      sft-fast cache list output/data
      sft-fast cache list --config-path configs --config-name my --json
    """
    from sft_fast.cache import list_cache

    content = list_cache(_cache_path(arguments, config_path, config_name))
    if as_json:
        click.echo(json.dumps({**dataclasses.asdict(content), "num_bytes": content.num_bytes}))
    else:
        console.print_cache(content)


@cache.command("prune")
@options.arguments("[DIR]")
@options.text("--older-than", "TIME", help="Remove what was not used for 30d, 12h, 2w …")
@options.text("--max-bytes", "SIZE", help="Remove what was not used for longest, down to 50GB …")
@click.option("--all", "all_datasets", is_flag=True, help="Remove every data set.")
@options.flag("--dry-run", help="Only say what would go.")
@options.as_json
@options.configuration(is_required=False)
def cache_prune(
    arguments: Sequence[str],
    older_than: str | None,
    max_bytes: str | None,
    all_datasets: bool,
    dry_run: bool,
    as_json: bool,
    config_path: str,
    config_name: str | None,
) -> None:
    """Free space in a cache: what killed runs left and damaged data sets always, others as the options say.

    What a process makes or uses stays. DIR: the cache; with --config-name: KEY=VALUE overrides.

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
        click.echo(json.dumps(dataclasses.asdict(report)))
    else:
        console.print_pruned(report)


@app.command()
@click.argument("checkpoint", metavar="CHECKPOINT")
@click.argument("output_dir", metavar="DIR")
@options.flag("--adapters-only", help="Write the LoRA adapters as PEFT does, instead of a merged model.")
def export(checkpoint: str, output_dir: str, adapters_only: bool) -> None:
    """Write the model of a checkpoint as an ordinary model directory, with its tokenizer.

    CHECKPOINT: a checkpoint directory of a run. DIR: where the model goes.

    \b
    Examples:
      sft-fast export output/sft_train/checkpoint-200 trained
    """
    try:
        from sft_fast.train.export import export_checkpoint
    except ModuleNotFoundError as error:
        raise _missing_package(error) from error
    export_checkpoint(checkpoint, output_dir, adapters_only=adapters_only)
    click.echo(f"the {'adapters are' if adapters_only else 'model is'} in {output_dir}")


@app.command()
@options.arguments("[DIR]")
@click.option("--train", "for_training", is_flag=True, help="Also fail where something is missing that training needs.")
@options.as_json
@options.configuration(is_required=False)
def doctor(
    arguments: Sequence[str], for_training: bool, as_json: bool, config_path: str, config_name: str | None
) -> None:
    """Say what this machine can do, what is missing, and how to install it. Status 1 where something does not work.

    DIR: the cache to look at; with --config-name: KEY=VALUE overrides.

    \b
    Examples:
      sft-fast doctor
      sft-fast doctor /mnt/fast/cache --train
    """
    from sft_fast.doctor import examine

    checks = examine(_cache_path(arguments, config_path, config_name), for_training=for_training)
    is_well = all(check.state != "problem" for check in checks)
    if as_json:
        click.echo(json.dumps({"ok": is_well, "checks": [dataclasses.asdict(check) for check in checks]}))
    else:
        console.print_checks(checks)
    if not is_well:
        click.get_current_context().exit(1)


def _load(config_path: str, config_name: str, overrides: Sequence[str]) -> SFTConfig:
    from sft_fast.config import load_config

    config = load_config(config_path, config_name, overrides)
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


def _dataset_path(arguments: Sequence[str], config_path: str, config_name: str | None) -> str:
    """The data set that a command is about: its one argument, or the training data of a configuration."""
    if config_name is not None:
        return str(_preprocess_config(_load(config_path, config_name, arguments))["train"].path)
    if len(arguments) != 1:
        raise ConfigError("expected one data set", code="usage", hint="give its directory, or --config-name")
    return arguments[0]


def _cache_path(arguments: Sequence[str], config_path: str, config_name: str | None) -> str:
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
        status = app.main(None if arguments is None else list(arguments), prog_name="sft-fast", standalone_mode=False)
    except click.ClickException as error:
        error.show()
        sys.exit(error.exit_code)
    except (KeyboardInterrupt, click.Abort):
        console.print_error("interrupted; nothing half-done is left")
        sys.exit(INTERRUPTED)
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
    sys.exit(status or 0)


def _debug() -> bool:
    return os.environ.get("SFT_FAST_DEBUG", "") not in ("", "0")
