"""The configuration: what is accepted, what is refused and in which words, and that nothing secret is written."""

import ast
import copy
import inspect
import itertools
import string
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import yaml
from hypothesis import given
from hypothesis import strategies as st

from sft_fast.config import SFTConfig, WorkerConfig, load_config, resolved_yaml, schema
from sft_fast.config.roll import NOT_ACTED_ON
from sft_fast.config.values import all_keys, field_types, nearest_key, parse_device_mapping, section_of
from sft_fast.errors import ConfigError, FileError

ROOT = Path(__file__).parent.parent

SMALL: dict[str, Any] = {
    "pretrain": "model",
    "sequence_length": 128,
    "sft_train": {"data_args": {"file_name": "train.jsonl"}},
}


@pytest.fixture
def load(tmp_path: Path) -> Any:
    """Writes a configuration (a dictionary, or YAML) to `run.yaml` and loads it."""

    def write_and_load(content: dict[str, Any] | str, *overrides: str) -> SFTConfig:
        text = content if isinstance(content, str) else yaml.safe_dump(content)
        (tmp_path / "run.yaml").write_text(text, encoding="utf-8")
        return load_config(tmp_path, "run", overrides)

    return write_and_load


def with_key(key: str, value: Any, content: dict[str, Any] = SMALL) -> dict[str, Any]:
    """A copy of a configuration with one more key, given by its full name."""
    content = copy.deepcopy(content)
    group = content
    *parents, name = key.split(".")
    for parent in parents:
        group = group.setdefault(parent, {})
    group[name] = value
    return content


# ROLL's own example for its SFT pipeline holds these keys and values; its wording is not repeated here.
ROLL_EXAMPLE = """
hydra:
  run:
    dir: .
  output_subdir: null
exp_name: "qwen2.5-7B-sft-config"
seed: 42
logging_dir: ./output/logs
output_dir: ./output_sft
system_envs:
  USE_MODELSCOPE: '1'
track_with: tensorboard
tracker_kwargs:
  log_dir: ./tensorboard
num_gpus_per_node: 8
save_steps: 100
logging_steps: 1
eval_steps: 10
resume_from_checkpoint: false
sequence_length: 2048
pretrain: Qwen/Qwen2.5-7B
prompt_key: instruction
query_key: input
response_key: output
validation:
  data_args:
    file_name: data/code.json
    template: qwen2_5
sft_train:
  model_args:
    dtype: bf16
    ulysses_size: 2
  training_args:
    num_train_epochs: 1
    per_device_train_batch_size: 2
    gradient_accumulation_steps: 16
    learning_rate: 5.0e-6
    dataloader_num_workers: 2
  data_args:
    file_name: data/code.json
    template: qwen2_5
    preprocessing_num_workers: 4
  strategy_args:
    strategy_name: megatron_train
    strategy_config:
      tensor_model_parallel_size: 2
      use_distributed_optimizer: true
  use_sequence_packing: True
  device_mapping: list(range(0,8))
  infer_batch_size: 2
"""


def test_roll_example_loads_unchanged(load: Any) -> None:
    """A file of ROLL loads as it is; what is not acted on is said once, and the rest arrives."""
    config = load(ROLL_EXAMPLE)

    assert config.sft_train.devices == list(range(8))
    assert config.sft_train.training_args.num_train_epochs == 1.0
    assert config.sft_train.training_args.learning_rate == 5e-6
    assert config.sft_train.model_args.model_name_or_path == config.pretrain == "Qwen/Qwen2.5-7B"
    assert config.template == "qwen2_5"
    assert config.num_rows_per_step == 2 * 16 * 8
    assert config.system_envs == {"USE_MODELSCOPE": "1"}
    assert [note.split(" ")[0] for note in config.notes] == [
        "sft_train.model_args.ulysses_size",
        "sft_train.training_args.dataloader_num_workers",
    ]


@pytest.mark.parametrize("section", NOT_ACTED_ON)
def test_every_roll_key_without_effect_is_accepted_and_said(load: Any, section: str) -> None:
    """Each key of ROLL that is not acted on loads with one note that names it in full; `null` loads without a word."""
    keys = [f"{section}.{name}".lstrip(".") for name in NOT_ACTED_ON[section]]
    asking, silent = SMALL, SMALL
    for key in keys:
        asking, silent = with_key(key, 7, asking), with_key(key, None, silent)

    assert sorted(note.split(" has no effect: ")[0] for note in load(asking).notes) == sorted(keys)
    assert load(silent).notes == []


def test_no_key_is_both_known_and_without_effect() -> None:
    """A key is acted on or listed as without effect, never both."""
    known = set(all_keys(SFTConfig))

    listed = {f"{section}.{name}".lstrip(".") for section, names in NOT_ACTED_ON.items() for name in names}

    assert listed & known == set()


@pytest.mark.parametrize(
    ("key", "nearest"),
    [
        ("learning_rate", "sft_train.training_args.learning_rate"),
        ("sft_train.training_args.learning_rat", "sft_train.training_args.learning_rate"),
        ("sequence_len", "sequence_length"),
        ("sft_train.model_args.lora_rnk", "sft_train.model_args.lora_rank"),
        ("validation.data_args.filename", "validation.data_args.file_name"),
        ("sft_training", "sft_train"),
    ],
)
def test_unknown_key_names_the_nearest(load: Any, key: str, nearest: str) -> None:
    """An unknown key, in a file or on the command line, is an error with its full name and the nearest known key."""
    with pytest.raises(ConfigError) as in_file:
        load(with_key(key, 1))
    with pytest.raises(ConfigError) as on_command_line:
        load(SMALL, f"{key}=1")

    for error in (in_file.value, on_command_line.value):
        assert error.code == "unknown_key"
        assert error.location == key
        assert error.hint == f"the nearest known key is {nearest}"
    assert on_command_line.value.path == "command line"


@given(st.text(alphabet=string.ascii_lowercase + "_.", min_size=1, max_size=40))
def test_nearest_key_is_a_key(key: str) -> None:
    """Whatever is written, the key that is named exists."""
    assert nearest_key(key, SFTConfig) in set(all_keys(SFTConfig))


def test_error_gives_line_and_column(load: Any, tmp_path: Path) -> None:
    """An error about a key of the file gives the place of that key in the file."""
    with pytest.raises(ConfigError) as caught:
        load("pretrain: model\nsequence_length: 128\nsft_train:\n  data_args:\n    file_nam: x\n")

    assert (caught.value.path, caught.value.line, caught.value.column) == (str(tmp_path / "run.yaml"), 5, 5)


@pytest.mark.parametrize(
    ("text", "line"),
    [
        ("pretrain: model\nsft_train: [\n", 3),
        ("pretrain: model\npretrain: other\n", 2),
        ("pretrain: model\n\tsequence_length: 3\n", 2),
    ],
)
def test_broken_yaml_gives_its_line(load: Any, text: str, line: int) -> None:
    """YAML that cannot be read is one error with its line."""
    with pytest.raises(ConfigError) as caught:
        load(text)

    assert (caught.value.code, caught.value.line) == ("broken_yaml", line)


@pytest.mark.parametrize("key", ["pretrain", "sequence_length", "sft_train.data_args.file_name"])
@pytest.mark.parametrize("value", [None, "???"])
def test_required_keys(load: Any, key: str, value: str | None) -> None:
    """A required key that is missing, or left to be filled, is an error that names it."""
    with pytest.raises(ConfigError) as caught:
        load(with_key(key, value))

    assert (caught.value.code, caught.value.location) == ("missing_key", key)


@pytest.mark.parametrize(
    ("key", "value", "expected"),
    [
        ("sequence_length", "many", "expected a whole number, found the text 'many'"),
        ("sequence_length", 12.5, "expected a whole number, found 12.5"),
        ("sequence_length", True, "expected a whole number, found true"),
        ("sequence_length", 0, "expected a number at least 1, found 0"),
        ("pretrain", 5, "expected a text, found 5"),
        ("sft_train", 5, "expected a group of keys, found 5"),
        ("tracker_kwargs", [1], "expected a group of keys, found the list [1]"),
        ("sft_train.training_args.learning_rate", "fast", "expected a number, found the text 'fast'"),
        ("sft_train.training_args.learning_rate", -1, "expected a number at least 0, found -1"),
        ("sft_train.training_args.learning_rate", float("nan"), "expected a number, found nan"),
        ("sft_train.training_args.warmup_ratio", 1.5, "expected a number at least 0 and at most 1, found 1.5"),
        ("sft_train.training_args.num_train_epochs", 0, "expected a number more than 0, found 0"),
        ("sft_train.use_sequence_packing", "yes please", "expected true or false, found the text 'yes please'"),
        (
            "sft_train.data_args.file_name",
            [1],
            "expected a text or a group of keys or a list of them or null, found the list [1]",
        ),
        (
            "track_with",
            "tensorbord",
            'expected "tensorboard" or "wandb" or "swanlab" or "mlflow" or "stdout" or null, '
            "found the text 'tensorbord'",
        ),
        ("on_error", "ignore", 'expected "raise" or "skip", found the text \'ignore\''),
        ("resume_from_checkpoint", 3, "expected true or false or a text, found 3"),
        ("system_envs.DEBUG", True, "expected a text, found True"),
    ],
)
def test_wrong_value_is_named_in_full(load: Any, key: str, value: Any, expected: str) -> None:
    """A value of the wrong type or out of bounds is an error that says what was expected, what was found, and where."""
    with pytest.raises(ConfigError) as caught:
        load(with_key(key, value))

    assert caught.value.message == expected
    assert caught.value.location == key


@pytest.mark.parametrize(
    ("value", "expected"),
    [
        (None, [0]),
        ([0, 2], [0, 2]),
        ("[0, 2]", [0, 2]),
        ("list(range(0,8))", list(range(8))),
        (" list( range(8) ) ", list(range(8))),
        ("range(0, 8, 2)", [0, 2, 4, 6]),
        ("list(range(2)) + [7]", [0, 1, 7]),
    ],
)
def test_device_mapping_is_read(value: Any, expected: list[int]) -> None:
    """A device mapping is a list or the text of one, in the few forms that ROLL's users write."""
    assert parse_device_mapping(value, "device_mapping") == expected


@pytest.mark.parametrize(
    "text",
    [
        "",
        "8",
        "[]",
        "[0, 0]",
        "[-1]",
        "[True]",
        "list(range(0, 8)",
        "list(range(10**9))",
        "list(range(1000000000))",
        "[x for x in range(8)]",
        "__import__('os').system('true')",
        "exec('1')",
        "list(open('/etc/passwd'))",
        "(" * 10_000,
    ],
)
def test_device_mapping_is_never_evaluated(text: str) -> None:
    """Any other text, code included, is refused without being run."""
    with pytest.raises(ConfigError) as caught:
        parse_device_mapping(text, "sft_train.device_mapping")

    assert caught.value.location == "sft_train.device_mapping"


def test_override_sets_a_key_that_the_file_lacks(load: Any) -> None:
    """`key=value` sets any known key, with the types of YAML, whether the file has it or not."""
    config = load(
        SMALL,
        "sequence_length=64",
        "seed=7",
        "sft_train.training_args.learning_rate=1e-5",
        "sft_train.data_args.file_name=[a.jsonl,b.jsonl]",
        'sft_train.device_mapping="list(range(0,2))"',
        "resume_from_checkpoint=runs/checkpoint-3",
    )

    assert (config.sequence_length, config.seed) == (64, 7)
    assert config.sft_train.training_args.learning_rate == 1e-5
    assert config.sft_train.data_args.file_name == ["a.jsonl", "b.jsonl"]
    assert config.sft_train.devices == [0, 1]
    assert config.resume_from_checkpoint == "runs/checkpoint-3"


def test_unreadable_override_is_an_error(load: Any) -> None:
    """An override that is no `key=value` is an error that repeats it."""
    with pytest.raises(ConfigError, match="command line: cannot read sequence_length"):
        load(SMALL, "sequence_length")


@pytest.mark.parametrize("stage", [1, 2, 3])
@pytest.mark.parametrize("offload", ["", "_offload"])
def test_packaged_groups_are_found(load: Any, stage: int, offload: str) -> None:
    """A file anywhere may name the DeepSpeed groups that ship with the package; its own keys win over theirs."""
    config = load(
        {
            **SMALL,
            "defaults": [{"strategy@sft_train.strategy_args": f"deepspeed_zero{stage}{offload}"}],
            "sft_train": {**SMALL["sft_train"], "strategy_args": {"strategy_config": {"steps_per_print": 5}}},
        }
    )

    strategy = config.sft_train.strategy_args
    assert strategy.strategy_name == "deepspeed_train"
    assert strategy.strategy_config["zero_optimization"]["stage"] == stage
    assert ("offload_optimizer" in strategy.strategy_config["zero_optimization"]) == bool(offload)
    assert strategy.strategy_config["steps_per_print"] == 5


def test_group_is_chosen_on_the_command_line(load: Any) -> None:
    """A group that the file names can be exchanged by an override."""
    content = {**SMALL, "defaults": [{"strategy@sft_train.strategy_args": "deepspeed_zero1"}, "_self_"]}

    config = load(content, "strategy@sft_train.strategy_args=deepspeed_zero3")

    assert config.sft_train.strategy_args.strategy_config["zero_optimization"]["stage"] == 3


def test_missing_group_is_an_error(load: Any) -> None:
    """A group that does not exist is an error that names it."""
    with pytest.raises(ConfigError, match="strategy/deepspeed_zero9"):
        load({**SMALL, "defaults": [{"strategy@sft_train.strategy_args": "deepspeed_zero9"}, "_self_"]})


def test_interpolation(load: Any) -> None:
    """A value may refer to another key; one that refers to nothing is an error with its key."""
    assert load(with_key("exp_name", "${pretrain}-sft")).exp_name == "model-sft"
    with pytest.raises(ConfigError) as caught:
        load(with_key("exp_name", "${nowhere}"))

    assert caught.value.location == "exp_name"


def test_missing_file_lists_what_is_there(load: Any, tmp_path: Path) -> None:
    """A configuration that is not there is an error that lists those that are; a directory that is not there, too."""
    load(SMALL)
    with pytest.raises(FileError) as no_file:
        load_config(tmp_path, "rum")
    with pytest.raises(FileError) as no_directory:
        load_config(tmp_path / "nowhere", "run")

    assert no_file.value.hint == "that directory has: run"
    assert no_directory.value.path == str(tmp_path / "nowhere")


def test_global_template_wins(load: Any) -> None:
    """`global_template` replaces the template of the data; another one of validation is said to have no effect."""
    content = with_key("sft_train.data_args.template", "chatml")
    content["validation"] = {"data_args": {"file_name": "v.jsonl", "template": "qwen3"}}
    content["global_template"] = "llama3"

    config = load(content)

    assert config.template == config.sft_train.data_args.template == "llama3"
    assert len(config.notes) == 1
    assert "validation.data_args.template" in config.notes[0]


@pytest.mark.parametrize(("ranks", "size", "rows"), [(4, 1, 4 * 6), (4, 2, 2 * 6), (8, 4, 2 * 6)])
def test_global_batch_counts_data_parallel_ranks(ranks: int, size: int, rows: int) -> None:
    """Ranks of one tensor-parallel group read the same rows; a number of ranks that does not divide is refused."""
    worker = WorkerConfig(device_mapping=list(range(ranks)))
    worker.data_args.file_name = "train.jsonl"
    worker.training_args.per_device_train_batch_size = 2
    worker.training_args.gradient_accumulation_steps = 3
    worker.strategy_args.strategy_config = {"tensor_parallel": {"autotp_size": size}}

    assert SFTConfig(pretrain="model", sequence_length=8, sft_train=worker).num_rows_per_step == rows

    worker.device_mapping = list(range(ranks + 1))
    if size > 1:
        with pytest.raises(ConfigError, match="cannot be split"):
            SFTConfig(pretrain="model", sequence_length=8, sft_train=worker)


@pytest.mark.parametrize(
    ("ratio", "steps", "total", "expected"), [(0.0, 0, 100, 0), (0.03, 0, 100, 3), (0.03, 0, 101, 4), (0.5, 7, 100, 7)]
)
def test_warmup_steps(ratio: float, steps: int, total: int, expected: int) -> None:
    """Steps of warm-up are those given, else the ratio of all steps, rounded up."""
    arguments = schema.TrainingArguments(warmup_ratio=ratio, warmup_steps=steps)

    assert arguments.get_warmup_steps(total) == expected


def test_resolved_yaml_loads_as_the_same_configuration(load: Any) -> None:
    """The configuration saved with a run is itself a configuration, equal to that of the run."""
    config = load(ROLL_EXAMPLE.replace("dataloader_num_workers: 2", "weight_decay: 0.1"))

    assert load(resolved_yaml(config)) == config


def test_no_secret_is_written(load: Any) -> None:
    """Keys, tokens and passwords, by name, nested, or inside an address, are not in the saved configuration."""
    config = load(
        {
            **SMALL,
            "tracker_kwargs": {
                "api_key": "hidden-1",
                "settings": {"auth": {"password": "hidden-2"}, "tokens": ["hidden-3"]},
                "base_url": "https://me:hidden-4@example.org/api",
                "project": "shown-1",
            },
            "system_envs": {"HF_TOKEN": "hidden-5", "MODE": "shown-2"},
            "sft_train": {
                **SMALL["sft_train"],
                "system_envs": {"WANDB_API_KEY": "hidden-6"},
                "data_args": {
                    **SMALL["sft_train"]["data_args"],
                    "file_name": [
                        "https://hidden-7@host/a.jsonl",
                        {"path": ["https://host/b.jsonl?token=hidden-8"], "weight": 2.0},
                    ],
                },
            },
            "data_cache_dir": "webdav://me:hidden-9@host/cache",
        }
    )

    text = resolved_yaml(config)

    assert "hidden" not in text
    assert "shown-1" in text
    assert "shown-2" in text
    assert "example.org" in text
    assert "https://***@host/a.jsonl" in text
    assert config.tracker_kwargs["api_key"] == "hidden-1"


SHIPPED = sorted([*ROOT.glob("configs/*.yaml"), *ROOT.glob("examples/*/*.yaml")])


@pytest.mark.parametrize("file", SHIPPED, ids=lambda file: f"{file.parent.name}/{file.stem}")
def test_shipped_configurations_load_without_a_note(file: Path) -> None:
    """Every configuration of the project loads, once its required keys are filled, and asks for nothing in vain."""
    overrides = ["pretrain=model", "sft_train.data_args.file_name=train.jsonl"]

    config = load_config(file.parent, file.stem, overrides)

    assert config.notes == []
    assert config.sft_train.strategy_args.strategy_name == "deepspeed_train"


def sections(section: type = SFTConfig) -> set[type]:
    """All dataclasses of the schema."""
    inner = (section_of(annotation) for annotation in field_types(section).values())
    return {section}.union(*(sections(found) for found in inner if found is not None))


@pytest.mark.parametrize("section", sorted(sections(), key=lambda section: section.__name__))
def test_every_key_is_documented(section: type) -> None:
    """Each field of the schema is followed by a text that says what it means."""
    body = ast.parse(inspect.getsource(section)).body[0].body
    documented = {
        field.target.id
        for field, text in itertools.pairwise(body)
        if isinstance(field, ast.AnnAssign) and isinstance(text, ast.Expr) and isinstance(text.value, ast.Constant)
    }

    assert set(field_types(section)) <= documented


def test_every_key_is_acted_on() -> None:
    """Each key of the schema is read somewhere in the package; one that is not is listed as without effect."""
    sources = [ast.parse(path.read_text(encoding="utf-8")) for path in (ROOT / "python" / "sft_fast").rglob("*.py")]
    read = {node.attr for source in sources for node in ast.walk(source) if isinstance(node, ast.Attribute)}

    assert {key.rpartition(".")[2] for key in all_keys(SFTConfig)} - read == set()


def test_page_is_up_to_date() -> None:
    """docs/configuration.md is what its generator writes from the schema."""
    generator = ROOT / "docs" / "generate_configuration.py"

    subprocess.run([sys.executable, generator, "--check"], check=True)
