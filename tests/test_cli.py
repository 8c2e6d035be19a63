"""The command line: what each command prints and leaves, its exit status, and how it answers mistakes."""

import gzip
import json
import os
import re
import subprocess
import sys
from dataclasses import asdict
from pathlib import Path
from typing import Any

import pytest
import yaml

import sft_fast
from sft_fast import cli, errors
from tests.cli_helpers import RECORDS, Run, Write, preprocess_arguments


@pytest.fixture
def config_file(tmp_path: Path, tokenizer_dir: Path, write_jsonl: Write) -> Path:
    """A configuration `run.yaml` in the test's directory, with training and validation data."""
    write_jsonl("train.jsonl", RECORDS)
    write_jsonl("validation.jsonl", RECORDS[:1])
    content = {
        "pretrain": str(tokenizer_dir),
        "sequence_length": 128,
        "query_key": "input",
        "data_cache_dir": "cache",
        "num_gpus_per_node": 0,
        "validation": {"data_args": {"file_name": "validation.jsonl"}},
        "sft_train": {
            "training_args": {"per_device_train_batch_size": 2, "gradient_accumulation_steps": 3},
            "data_args": {"file_name": "train.jsonl"},
            "device_mapping": [0, 1],
        },
    }
    path = tmp_path / "run.yaml"
    path.write_text(yaml.safe_dump(content), encoding="utf-8")
    return path


def test_version(run_cli: Run) -> None:
    """`--version` prints the version of the package."""
    result = run_cli("--version")

    assert (result.returncode, result.stdout) == (0, f"sft-fast {sft_fast.__version__}\n")


@pytest.mark.parametrize(
    "command", ["preprocess", "train", "validate", "inspect", "verify", "doctor", "cache list", "cache prune", "export"]
)
def test_help_of_every_command(run_cli: Run, command: str) -> None:
    """Every command of the design is there and explains itself; those that read a configuration name its options."""
    result = run_cli(*command.split(), "--help")

    assert result.returncode == 0
    assert f"Usage: sft-fast {command} " in result.stdout
    examples = result.stdout.split("Examples:")[1].split("Options:")[0].strip().splitlines()
    assert examples
    assert all(line.split()[: 1 + len(command.split())] == ["sft-fast", *command.split()] for line in examples)
    if command != "export":
        assert "--config-path" in result.stdout
        assert "--config-name" in result.stdout


@pytest.mark.parametrize(
    ("words", "expected"),
    [
        (["sft-fast", "insp"], ["inspect"]),
        (["sft-fast", "cache", ""], ["list", "prune"]),
        (["sft-fast", "preprocess", "--on-error", ""], ["raise", "skip"]),
        (["sft-fast", "preprocess", "--template", "qwen"], ["qwen2_5", "qwen3"]),
        (["sft-fast", "inspect", "--sequ"], ["--sequence-length"]),
        (["sft-fast", "train", "--config-path", "configs", "--config-name", "fi"], ["fine", "first"]),
    ],
)
def test_shell_completes(tmp_path: Path, words: list[str], expected: list[str]) -> None:
    """In bash, commands, options, choices, templates and the names of configurations are completed."""
    (tmp_path / "configs").mkdir()
    for name in ("first.yaml", "fine.yml", "other.yaml", "find.txt"):
        (tmp_path / "configs" / name).touch()
    program = f"""
        source <(sft-fast --show-completion bash)
        COMP_WORDS=({" ".join(map(repr, words))})
        COMP_CWORD={len(words) - 1}
        $(complete -p sft-fast | sed 's/.*-F \\([^ ]*\\).*/\\1/') sft-fast
        printf '%s\\n' "${{COMPREPLY[@]}}"
    """
    path = f"{Path(sys.executable).parent}:{os.environ['PATH']}"
    environment = {**os.environ, "PATH": path}
    result = subprocess.run(
        ["bash", "-c", program], cwd=tmp_path, env=environment, capture_output=True, text=True, check=False
    )

    assert result.stdout.split() == expected, result.stderr


def test_preprocess_makes_a_dataset(run_cli: Run, tokenizer_dir: Path, write_jsonl: Write, tmp_path: Path) -> None:
    """`preprocess` leaves a data set of all records and prints a report with its numbers."""
    write_jsonl("data.jsonl", RECORDS)

    result = run_cli(*preprocess_arguments(tokenizer_dir, "data.jsonl", "--query-key", "input"))

    assert result.returncode == 0, result.stderr
    assert len(sft_fast.Dataset(tmp_path / "out")) == len(RECORDS)
    words = result.stdout.split()
    assert words[words.index("samples") + 1] == str(len(RECORDS))


def test_json_report_is_the_report(run_cli: Run, tokenizer_dir: Path, write_jsonl: Write, tmp_path: Path) -> None:
    """`--json` prints nothing but the report that `sft_fast.preprocess` returns, and what its samples make as packs."""
    path = write_jsonl("data.jsonl", RECORDS)
    report = sft_fast.preprocess([path], tmp_path / "other", tokenizer=tokenizer_dir, sequence_length=128)

    printed = json.loads(run_cli(*preprocess_arguments(tokenizer_dir, "data.jsonl", "--json")).stdout)

    packing = sft_fast.Dataset(report.path).pack(sequence_length=128)
    assert (printed.pop("num_packs"), printed.pop("fill_ratio")) == (len(packing), packing.fill_ratio)
    differs = {"path", "seconds"}
    assert {name: value for name, value in printed.items() if name not in differs} == {
        name: value for name, value in json.loads(json.dumps(asdict(report))).items() if name not in differs
    }


def test_preprocessing_loads_only_what_it_needs(tokenizer_dir: Path, write_jsonl: Write, tmp_path: Path) -> None:
    """What draws, counts, or talks to the network would be most of the start-up: without a use, it is not loaded."""
    write_jsonl("data.jsonl", RECORDS)
    program = (
        "import atexit, sys; from sft_fast.cli import main\n"
        "heavy = {'rich', 'numpy', 'ray', 'logging', 'socket', 'tempfile'}\n"
        "atexit.register(lambda: print(heavy & set(sys.modules), file=sys.stderr)); main(sys.argv[1:])"
    )
    arguments = map(str, preprocess_arguments(tokenizer_dir, "data.jsonl", "--json"))
    result = subprocess.run(
        [sys.executable, "-c", program, *arguments], cwd=tmp_path, capture_output=True, text=True, check=True
    )

    assert json.loads(result.stdout)["num_samples"] == len(RECORDS)
    assert result.stderr.endswith("\nset()\n")


def test_report_says_what_a_run_would_do(run_cli: Run, config_file: Path) -> None:
    """The report has the packs of the samples and how full they are, and of a configuration the steps of its run."""
    packed = run_cli("preprocess", "--config-name", "run", "sft_train.use_sequence_packing=true")
    as_json = run_cli("preprocess", "--config-name", "run", "sft_train.use_sequence_packing=true", "--json")
    reports = json.loads(as_json.stdout)

    train = reports["train"]
    assert {"num_packs", "fill_ratio", "num_steps_per_epoch", "num_steps", "seconds", "num_bytes"} <= set(train)
    assert 0 < train["fill_ratio"] <= 1
    assert "num_steps" not in reports["validation"]
    lines = [line.split() for line in packed.stdout.splitlines()]
    assert ["packs", f"{train['num_packs']},", f"{train['fill_ratio']:.2%}", "full"] in lines
    assert ["steps", f"{train['num_steps']},", f"{train['num_steps_per_epoch']}", "an", "epoch"] in lines


def test_options_reach_the_preprocessing(run_cli: Run, tokenizer_dir: Path, write_jsonl: Write, tmp_path: Path) -> None:
    """Each option of `preprocess` arrives: the data set is that of the same arguments in Python."""
    record = {"sys": "Be brief.", "ask": "Add.", "more": "two and three", "answer": "five " * 200}
    path = write_jsonl("data.jsonl", [record, '{"ask": 3}'])
    options: dict[str, Any] = {
        "template": "chatml",
        "sequence_length": 64,
        "system_key": "sys",
        "prompt_key": "ask",
        "query_key": "more",
        "response_key": "answer",
        "num_threads": 1,
        "on_error": "skip",
        "control_tokens": "allow",
        "train_on": "last_answer",
        "dropped_thinking": "keep",
        "too_long": "truncate",
    }
    report = sft_fast.preprocess([path], tmp_path / "python", tokenizer=tokenizer_dir, **options)
    arguments = [text for name, value in options.items() for text in (f"--{name.replace('_', '-')}", str(value))]

    result = run_cli("preprocess", path, "--output-dir", "out", "--tokenizer", tokenizer_dir, *arguments)

    assert result.returncode == 0, result.stderr
    assert sft_fast.Dataset(tmp_path / "out").fingerprint == report.fingerprint
    assert (report.num_samples, report.num_rejected) == (1, 1)
    assert "rejected.jsonl" in result.stderr


def test_preprocess_of_a_configuration(run_cli: Run, config_file: Path, tmp_path: Path) -> None:
    """With a configuration, `preprocess` puts its data sets into the cache, and the next time finds them there."""
    first = json.loads(run_cli("preprocess", "--config_name", "run", "--json").stdout)
    second = json.loads(run_cli("preprocess", "--config-name", "run", "--json").stdout)

    assert {name: report["num_samples"] for name, report in first.items()} == {"train": 3, "validation": 1}
    assert [report["reused"] for report in (*first.values(), *second.values())] == [False, False, True, True]
    assert Path(tmp_path, first["train"]["path"]).parent == tmp_path / "cache"


def test_both_spellings_and_overrides(run_cli: Run, config_file: Path) -> None:
    """`--config-path` and `--config_path` are the same, relative to the current directory; overrides follow."""
    reports = [
        json.loads(run_cli("preprocess", path, ".", name, "run", "--json", "sequence_length=64").stdout)
        for path, name in [("--config-path", "--config-name"), ("--config_path", "--config_name")]
    ]

    assert reports[0]["train"]["fingerprint"] == reports[1]["train"]["fingerprint"]


def test_validate_shows_the_run(run_cli: Run, config_file: Path, tmp_path: Path) -> None:
    """`validate` shows batch arithmetic, memory and the first records with what trains, and leaves nothing behind."""
    before = sorted(tmp_path.iterdir())

    result = run_cli("validate", "--config-name", "run")

    assert result.returncode == 0, result.stderr
    assert "2 samples a micro-batch x 3 micro-batches x 2 ranks = 12 samples" in result.stdout
    # The model of this test is a configuration alone: a Llama as transformers has it by default.
    assert re.search(r"memory a device +about 81\.\d GB: weights 13\.\d+ GB", result.stdout), result.stdout
    assert "⟦The capital of France is Paris.<|im_end|>⟧" in result.stdout
    assert "train.jsonl:1" in result.stdout
    assert sorted(tmp_path.iterdir()) == before


@pytest.mark.parametrize("ending", ["jsonl", "json"])
def test_validate_reads_only_the_beginning(
    run_cli: Run, config_file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, ending: str
) -> None:
    """Of a large file `validate` reads the first records, and an error there has its line in the real file."""
    from sft_fast import check

    good = json.dumps(RECORDS[0])
    bad = json.dumps({"instruction": "no answer"})
    opening, separator, closing = ("[\n", ",\n", "\n]") if ending == "json" else ("", "\n", "\n")
    path = tmp_path / f"large.{ending}"
    monkeypatch.setattr(check, "MAX_HEAD_BYTES", 1000)
    monkeypatch.chdir(tmp_path)

    path.write_text(opening + separator.join([good] * 50 + [bad]) + closing, encoding="utf-8")
    head = check._head(str(path), tmp_path / "head")
    assert head != str(path)
    assert 2 <= sum(bool(line) for line in Path(head).read_text().splitlines()) < 50

    path.write_text(opening + separator.join([good, good, bad] + [good] * 50) + closing, encoding="utf-8")
    config = sft_fast_config(tmp_path, f"sft_train.data_args.file_name={path}")
    with pytest.raises(errors.InputError) as caught:
        check.check_run(config, cli.console.stdout_console(), 1)
    assert (caught.value.path, caught.value.line) == (str(path), 4 if ending == "json" else 3)


def test_validate_reads_compressed_files_whole(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A compressed file has no beginning that could be cut off: it is read whole, however large."""
    from sft_fast import check

    path = tmp_path / "train.jsonl.gz"
    path.write_bytes(gzip.compress(b'{"instruction": "a", "output": "b"}\n' * 1000))
    monkeypatch.setattr(check, "MAX_HEAD_BYTES", 10)

    assert check._head(str(path), tmp_path / "head") == str(path)


def sft_fast_config(directory: Path, *overrides: str) -> Any:
    """The configuration `run` of a directory."""
    from sft_fast.config import load_config

    return load_config(directory, "run", overrides)


def test_verify_tells_whole_from_damaged(run_cli: Run, tokenizer_dir: Path, write_jsonl: Write, tmp_path: Path) -> None:
    """`verify` ends with 0 on a data set that is whole, and with 2 and one error when a byte of it has changed."""
    write_jsonl("data.jsonl", RECORDS)
    run_cli(*preprocess_arguments(tokenizer_dir, "data.jsonl"))
    whole = run_cli("verify", "out")
    proved = json.loads(run_cli("verify", "out", "--json").stdout)
    [shard] = (tmp_path / "out").glob("shard-*")
    content = bytearray(shard.read_bytes())
    content[-1] ^= 1
    shard.write_bytes(content)
    damaged = run_cli("verify", "out")

    assert (whole.returncode, whole.stderr) == (0, "")
    assert "3 samples" in whole.stdout
    assert (proved["path"], proved["num_samples"]) == ("out", 3)
    assert_one_error(damaged)


def assert_one_error(result: "subprocess.CompletedProcess[str]", *parts: str) -> None:
    """The command ended with status 2, printed nothing as a result, and one error without a traceback."""
    assert result.returncode == 2, result.stderr
    assert result.stdout == ""
    assert result.stderr.count("error: ") == 1
    assert "Traceback" not in result.stderr
    for part in parts:
        assert part in result.stderr


GOOD = json.dumps(RECORDS[0])


@pytest.mark.parametrize(
    ("bad", "parts"),
    [
        ('{"instruction": "a", "output": ', ["data.jsonl:2:"]),
        ('{"instruction": "a"}', ["data.jsonl:2", "output"]),
        ('{"instruction": 5, "output": "b"}', ["data.jsonl:2", "instruction"]),
        ('{"instruction": "a", "output": ""}', ["data.jsonl:2", "output"]),
        ('{"messages": [{"role": "robot", "content": "a"}]}', ["data.jsonl:2", "messages[0].role", "robot"]),
        ("5", ["data.jsonl:2"]),
    ],
)
def test_bad_record_is_one_error(
    run_cli: Run, tokenizer_dir: Path, write_jsonl: Write, tmp_path: Path, bad: str, parts: list[str]
) -> None:
    """A record that is wrong ends with status 2 and one error with file and line; nothing half-written stays."""
    write_jsonl("data.jsonl", [GOOD, bad, GOOD])

    result = run_cli(*preprocess_arguments(tokenizer_dir, "data.jsonl"))

    assert_one_error(result, *parts)
    assert [path.name for path in tmp_path.iterdir()] == ["data.jsonl"]


@pytest.mark.parametrize(
    ("arguments", "parts"),
    [
        (["preprocess", "nowhere.jsonl"], ["nowhere.jsonl"]),
        (["preprocess", "*.parquet"], ["*.parquet"]),
        (["preprocess", "data.jsonl", "--template", "nonsense"], ["nonsense"]),
        (["preprocess", "data.jsonl", "--tokenizer", "empty"], ["empty"]),
        (["preprocess", "data.jsonl", "--tokenizer", "nowhere"], ["nowhere"]),
    ],
)
def test_bad_argument_is_one_error(
    run_cli: Run, tokenizer_dir: Path, write_jsonl: Write, tmp_path: Path, arguments: list[str], parts: list[str]
) -> None:
    """A missing file, an unknown template, a directory without a tokenizer: status 2, one error that names it."""
    write_jsonl("data.jsonl", [GOOD])
    (tmp_path / "empty").mkdir()
    defaults = ["--output-dir", "out", "--tokenizer", tokenizer_dir, "--sequence-length", "64"]

    result = run_cli(arguments[0], *defaults, *arguments[1:])

    assert_one_error(result, *parts)
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("arguments", "parts"),
    [
        (
            ["train", "--config-name", "run", "learning_rate=1"],
            ["learning_rate", "sft_train.training_args.learning_rate"],
        ),
        (["train", "--config-name", "run", "sequence_length=many"], ["whole number", "sequence_length"]),
        (["train", "--config-name", "rum"], ["rum.yaml", "that directory has: run"]),
        (["train", "--config-path", "nowhere", "--config-name", "run"], ["nowhere"]),
        (["validate", "--config-name", "run", "pretrain=nowhere"], ["nowhere", "pretrain"]),
        (["validate", "--config-name", "run", "sft_train.data_args.file_name=no.jsonl"], ["no.jsonl"]),
        (
            ["validate", "--config-name", "run", "sft_train.strategy_args.strategy_name=megatron_train"],
            ["deepspeed_train"],
        ),
        (["inspect", "nowhere"], ["nowhere"]),
        (["inspect"], ["--config-name"]),
        (["inspect", "--config-name", "run", "--search", "a", "--pack", "1"], ["--pack and --search"]),
        (["inspect", "--config-name", "run", "--sample", "9"], ["no sample 9: the data set has 3"]),
        (["inspect", "--config-name", "run", "--pack", "9"], ["no pack 9"]),
        (["inspect", "--config-name", "run", "--diff", "nowhere"], ["nowhere"]),
        (["inspect", "--config-name", "run", "--source", "train.jsonl:7"], ["train.jsonl", "line 7"]),
        (["verify", "."], ["manifest"]),
        (["preprocess"], ["--output-dir", "--tokenizer"]),
        (["preprocess", "--config-name", "run", "--output-dir", "out"], ["--config-name"]),
    ],
)
def test_bad_configuration_is_one_error(
    run_cli: Run, config_file: Path, arguments: list[str], parts: list[str]
) -> None:
    """A wrong key, value, file or combination of options: status 2, one error that names it and what to do."""
    assert_one_error(run_cli(*arguments), *parts)


@pytest.mark.parametrize("arguments", [["nonsense"], ["preprocess", "--nonsense"], ["train"]])
def test_wrong_usage_ends_with_2(run_cli: Run, arguments: list[str]) -> None:
    """An unknown command or option, or a missing one, ends with status 2 and no traceback."""
    result = run_cli(*arguments)

    assert result.returncode == 2
    assert "Traceback" not in result.stderr


@pytest.mark.parametrize(
    ("error", "status", "text"),
    [
        (errors.ConfigError("wrong", path="a.yaml", line=3), 2, "error: a.yaml:3: wrong\n"),
        (errors.TrainError("rank 1 died", hint="look at its log"), 1, "error: rank 1 died\n  look at its log\n"),
        (KeyError("x"), 1, "error: KeyError: 'x'\n"),
        (RuntimeError("[red]not markup[/red]"), 1, "error: RuntimeError: [red]not markup[/red]\n"),
    ],
)
@pytest.mark.parametrize("debug", ["", "1"])
def test_error_text_and_status(
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    error: Exception,
    status: int,
    text: str,
    debug: str,
) -> None:
    """Each error is its own text on stderr; only `SFT_FAST_DEBUG=1` shows the traceback, and before the text."""

    def fail(*args: Any, **kwargs: Any) -> None:
        raise error

    monkeypatch.setattr(cli.app, "main", fail)
    monkeypatch.setenv("SFT_FAST_DEBUG", debug)
    with pytest.raises(SystemExit) as ended:
        cli.main([])
    printed = capsys.readouterr()

    assert ended.value.code == status
    assert printed.out == ""
    assert text in printed.err
    assert printed.err.startswith("Traceback") == bool(debug)


def test_notes_are_not_results(run_cli: Run, config_file: Path) -> None:
    """What is accepted without effect is said on stderr, so that stdout stays the result."""
    result = run_cli("preprocess", "--config-name", "run", "--json", "rpc_timeout=60")

    assert "note: rpc_timeout has no effect" in result.stderr
    assert set(json.loads(result.stdout)) == {"train", "validation"}


EXAMPLES = Path(__file__).parent.parent / "examples"


@pytest.mark.parametrize(
    "command",
    [
        [sys.executable, EXAMPLES / "start_sft_pipeline.py", "--config_path", ".", "--config_name", "run"],
        ["bash", EXAMPLES / "qwen2.5-7B-sft_deepspeed" / "run_sft_pipeline.sh"],
    ],
)
def test_start_scripts_are_the_command(config_file: Path, tmp_path: Path, command: list[str | Path]) -> None:
    """The start scripts take overrides, from any directory, and answer as `sft-fast train` does."""
    environment = {**os.environ, "PYTHON": sys.executable}
    for override, answer in [
        ("sequence_len=5", "the nearest known key is sequence_length"),
        ("pretrain=/no/model", "no model directory here"),
    ]:
        result = subprocess.run(
            [*command, override], cwd=tmp_path, env=environment, capture_output=True, text=True, check=False
        )
        assert_one_error(result, override.split("=")[0], answer)


@pytest.mark.parametrize("forced", ["", "1"])
def test_progress_is_a_bar_or_lines(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, forced: str
) -> None:
    """In a terminal preprocessing has a moving bar, elsewhere plain lines; the shape of the records is said once."""
    monkeypatch.setenv("FORCE_COLOR", forced)
    monkeypatch.setenv("COLUMNS", "120")
    monkeypatch.setattr(cli.console, "PLAIN_INTERVAL_SECONDS", 0.0)
    values = {"is_hashing": False, "num_bytes": 2e6, "num_total_bytes": 4e6, "num_records": 10}
    state = type("State", (), {**values, "records_by_shape": {"text": 10}})()

    with cli.console.PreprocessProgress("making") as progress:
        progress(state)
        progress(state)
    printed = capsys.readouterr()
    with cli.console.counting("searching", 10) as count:
        count(5)
    assert ("searching" in capsys.readouterr().err) == bool(forced)

    assert printed.out == ""
    assert "2.0 MB of 4.0 MB" in printed.err
    assert ("\x1b[" in printed.err) == bool(forced)
    assert printed.err.count("making: records of the shape text") == 1
    assert forced or printed.err.count("\n") == 3
