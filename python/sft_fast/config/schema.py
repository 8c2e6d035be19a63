"""What a configuration holds: one dataclass a section, each field with its type, its bounds and its meaning.

The names and defaults are those of ROLL's SFT pipeline, so that its YAML files load unchanged; the few keys of our own
say so. The string below a field is its documentation: `docs/configuration.md` is generated from it. Keys of ROLL that
nothing here acts on are listed in `roll.py`; reading YAML is the business of `load.py`.
"""

from __future__ import annotations

import dataclasses
import re
from dataclasses import dataclass, field
from typing import Annotated, Any, Literal

from sft_fast.config.values import Bound, check_values, parse_device_mapping
from sft_fast.errors import ConfigError
from sft_fast.mixing import Files, read_entries

PositiveInt = Annotated[int, Bound(at_least=1)]
CountOrZero = Annotated[int, Bound(at_least=0)]
PositiveFloat = Annotated[float, Bound(more_than=0)]
FloatOrZero = Annotated[float, Bound(at_least=0)]
Share = Annotated[float, Bound(at_least=0, at_most=1)]
ShareBelowOne = Annotated[float, Bound(at_least=0, less_than=1)]

SchedulerName = Literal[
    "linear",
    "cosine",
    "cosine_with_restarts",
    "cosine_with_min_lr",
    "cosine_warmup_with_min_lr",
    "polynomial",
    "constant",
    "constant_with_warmup",
    "inverse_sqrt",
    "warmup_stable_decay",
]


@dataclass(kw_only=True)
class ModelArguments:
    """The model: where it is, in which precision it trains, and which of its weights are trained."""

    model_name_or_path: str | None = None
    """The model directory. `pretrain` is copied here; set that one."""

    dtype: Literal["bf16", "fp16", "fp32"] = "bf16"
    """Precision of the forward and backward pass. Master weights and optimizer state stay in 32 bits."""

    attn_implementation: Literal["auto", "sdpa", "eager", "fa2", "flash_attention_2"] | None = None
    """Attention kernel. `null` and `auto` take the fastest that the machine has and that is exact on packs."""

    disable_gradient_checkpointing: bool = False
    """True keeps all activations: faster, but more memory. `gradient_checkpointing` replaces it."""

    gradient_checkpointing: Literal["full", "selective", "none"] | None = None
    """What is computed again in the backward pass instead of kept: `full` keeps the input of each layer alone,
    `selective` also the results of matrix products and attention, `none` keeps all. `null`: `full`, unless
    `disable_gradient_checkpointing`. Ours."""

    offload_activations: bool = False
    """On a GPU, what the layers keep for the backward pass waits in the machine's memory. Ours."""

    compile: bool = False
    """Compiles the layers of the model with `torch.compile`, which takes a minute at the start. A CPU needs g++, a GPU
    Triton. Ours."""

    model_config_kwargs: dict[str, Any] = field(default_factory=dict)
    """Entries that replace those of the model's own `config.json`."""

    freeze_module_prefix: str | list[str] | None = None
    """Modules whose weights do not train: name prefixes, as a list or separated by commas."""

    lora_target: str | list[str] | None = None
    """Modules that get a LoRA adapter: names (a list, or separated by commas), a regular expression, or `all-linear`.
    `null` trains all weights."""

    lora_rank: PositiveInt = 8
    """Rank of the LoRA matrices."""

    lora_alpha: PositiveFloat | None = None
    """LoRA scale is `lora_alpha / lora_rank`. `null` means twice the rank."""

    lora_dropout: ShareBelowOne = 0.0
    """Dropout on the input of the LoRA matrices."""

    additional_target: str | list[str] | None = None
    """Modules trained in full and saved beside the LoRA adapters: names, as a list or separated by commas."""

    adapter_name_or_path: str | None = None
    """Directory of LoRA adapters, as PEFT saves them, to go on training. It replaces the other `lora_*` keys."""

    quantization: Literal["nf4", "int8", "none"] | None = None
    """Weights in 4 bits (QLoRA) or 8 bits under adapters, by bitsandbytes: not with ZeRO-3 or `fsdp2_train`. What is
    exported is not quantised. Ours."""

    resize_vocab: bool = False
    """Gives the model the embeddings that it lacks where its tokenizer has more ids: tokens were added to it."""

    @property
    def kept_activations(self) -> str:
        """`gradient_checkpointing`, filled in."""
        return self.gradient_checkpointing or ("none" if self.disable_gradient_checkpointing else "full")

    @property
    def has_adapters(self) -> bool:
        """Whether adapters are trained, and not all weights."""
        return bool(self.lora_target or self.adapter_name_or_path)


@dataclass(kw_only=True)
class TrainingArguments:
    """Batch sizes, length of the run, optimizer and schedule."""

    num_train_epochs: PositiveFloat = 1.0
    """Passes over the data; a fraction is allowed."""

    max_steps: int = -1
    """Optimizer steps of the run. Above 0 it replaces `num_train_epochs`."""

    per_device_train_batch_size: PositiveInt = 8
    """Rows of one micro-batch on one device: packs with `use_sequence_packing`, samples without."""

    gradient_accumulation_steps: PositiveInt = 1
    """Micro-batches of one optimizer step on one device."""

    learning_rate: FloatOrZero = 5e-5
    """Highest learning rate of the schedule."""

    lr_scheduler_type: SchedulerName = "linear"
    """Shape of the learning-rate schedule, by its name in `transformers`."""

    lr_scheduler_kwargs: dict[str, Any] = field(default_factory=dict)
    """Further arguments of that schedule, such as `min_lr`. Ours."""

    warmup_ratio: Share = 0.0
    """Share of all steps in which the learning rate rises from 0."""

    warmup_steps: CountOrZero = 0
    """The same as a number of steps. Above 0 it replaces `warmup_ratio`."""

    weight_decay: FloatOrZero = 0.0
    """Weight decay of AdamW. Norm weights and biases are exempt."""

    adam_beta1: ShareBelowOne = 0.9
    """AdamW: decay of the running mean of the gradient."""

    adam_beta2: ShareBelowOne = 0.999
    """AdamW: decay of the running mean of its square."""

    adam_epsilon: PositiveFloat = 1e-8
    """AdamW: term that keeps the divisor above zero. Ours."""

    label_smoothing_factor: ShareBelowOne = 0.0
    """Share of each target that is spread over the whole vocabulary. The validation loss is without."""

    neftune_noise_alpha: FloatOrZero = 0.0
    """NEFTune: strength of the noise on the embeddings of training samples. 0: none."""

    data_seed: int | None = None
    """Seed of the sample order. `null` takes `seed`."""

    def get_warmup_steps(self, num_training_steps: int) -> int:
        """Steps of warm-up in a run of `num_training_steps`: `warmup_steps` if given, else the ratio, rounded up."""
        return self.warmup_steps or -int(-self.warmup_ratio * num_training_steps // 1)


@dataclass(kw_only=True)
class DataArguments:
    """Files of records and how they become samples."""

    file_name: str | dict[str, Any] | list[str | dict[str, Any]] | None = None
    """JSON Lines, JSON or Parquet files, directories of them, or `hf:NAME@CONFIG:SPLIT` for a data set of Hugging Face:
    a path, a glob, an address such as `s3://bucket/data/*.jsonl`, or a list of sources. A source is one of these, or a
    group of `path`, `name`, `weight` (how often an epoch uses a sample of it) and `max_samples`. Weights and caps never
    encode anything anew."""

    template: str = "native"
    """Chat template: `native` is the tokenizer's own, other names are built in. `global_template` replaces it."""

    preprocessing_num_workers: PositiveInt | None = None
    """Threads that preprocess. `null`: one a core."""


@dataclass(kw_only=True)
class StrategyArguments:
    """How the model is spread over the devices."""

    strategy_name: str = "deepspeed_train"
    """Training backend: `deepspeed_train`, or `fsdp2_train`, which is torch's own."""

    strategy_config: dict[str, Any] = field(default_factory=dict)
    """Settings of that backend: a DeepSpeed configuration, which the groups `strategy/deepspeed_zero*` fill, with
    `tensor_parallel.autotp_size` (ranks that split weights) and `sequence_parallel_size` (ranks that split rows); for
    `fsdp2_train`, `reshard_after_forward` (true: as ZeRO-3; false: as ZeRO-2), `offload_policy` (true: the CPU) and
    `ulysses_size` (ranks that split rows)."""


@dataclass(kw_only=True)
class WorkerConfig:
    """The training role: model, data, schedule, devices."""

    model_args: ModelArguments = field(default_factory=ModelArguments)
    """The model."""

    training_args: TrainingArguments = field(default_factory=TrainingArguments)
    """Batch sizes, length of the run, optimizer and schedule."""

    data_args: DataArguments = field(default_factory=DataArguments)
    """The training data."""

    strategy_args: StrategyArguments = field(default_factory=StrategyArguments)
    """How the model is spread over the devices."""

    device_mapping: list[int] | str | None = None
    """Devices of the role, one rank each: a list or the text `list(range(0,8))`, which is parsed and never evaluated.
    Device `d` is on node `d // num_gpus_per_node`. `null`: device 0."""

    use_sequence_packing: bool = False
    """True puts several samples into each row of `sequence_length` tokens; attention stays within each sample."""

    infer_batch_size: PositiveInt = 16
    """Rows of one micro-batch on one device in validation."""

    system_envs: dict[str, Any] = field(default_factory=dict)
    """Environment variables of the training processes; they win over the `system_envs` of the whole run."""

    @property
    def devices(self) -> list[int]:
        """`device_mapping` as a list: the device of each rank."""
        assert isinstance(self.device_mapping, list), "checked and parsed when the configuration was made"
        return self.device_mapping

    @property
    def world_size(self) -> int:
        """Number of ranks."""
        return len(self.devices)


@dataclass(kw_only=True)
class ValidationConfig:
    """Validation data. There is no validation role: the training workers validate."""

    data_args: DataArguments = field(default_factory=DataArguments)
    """Only `file_name` counts; template and threads are those of training. In a list, each entry is a source, with a
    validation loss of its own: `val_loss/<file name without its endings>`."""

    num_generations: CountOrZero = 0
    """Prompts of the validation data that the model answers at each validation, for you to read. Ours."""

    max_new_tokens: PositiveInt = 128
    """Longest of these answers, in tokens. Ours."""


@dataclass(kw_only=True)
class SFTConfig:
    """A whole run. Making one checks every value and fills what follows from others.

    Raises:
        ConfigError: a value has the wrong type or is out of bounds; `location` is the full name of its key.
    """

    pretrain: str
    """Directory of the model to start from, with its tokenizer. Required."""

    sequence_length: PositiveInt
    """Most tokens of a sample, and the capacity of a pack. Required."""

    exp_name: str = "sft"
    """Name of the run, for its logs and trackers."""

    seed: int = 42
    """Seed of everything random."""

    output_dir: str = "./output"
    """Where checkpoints go: `<output_dir>/sft_train/checkpoint-<step>/<cluster_name>/`."""

    logging_dir: str = "./output/logs"
    """Where logs, metrics and the resolved configuration go."""

    track_with: Literal["tensorboard", "wandb", "swanlab", "mlflow", "stdout"] | None = "tensorboard"
    """Where metrics are sent besides `metrics.jsonl`."""

    tracker_kwargs: dict[str, Any] = field(default_factory=dict)
    """Arguments of the tracker, such as `log_dir` (TensorBoard), `project` (Weights & Biases, SwanLab) or
    `tracking_uri` (MLflow)."""

    num_gpus_per_node: CountOrZero | None = None
    """GPUs of each machine. 0: the ranks run on the CPU. `null`: what the machine has."""

    device_peak_tflops: PositiveFloat | None = None
    """10^12 operations a second that a device can do at the run's precision, for the metric `mfu`. `null`: by its name,
    where that is known, at `bf16` and `fp16`. Ours."""

    profile_first_step: CountOrZero = 0
    """First step of a trace by `torch.profiler`, in `<logging_dir>/<exp_name>/profile/`. 0: none. Ours."""

    profile_num_steps: PositiveInt = 3
    """Steps of that trace. Ours."""

    save_steps: CountOrZero = 50
    """Steps between checkpoints. The end of the run always writes one; 0 writes only that one."""

    async_save: bool = False
    """Training goes on while a checkpoint is written: it stands still only until the state is copied, which takes as
    much memory of the machine as the files have. The last checkpoint of a run is complete before it ends. Ours."""

    max_ckpt_to_keep: CountOrZero = 0
    """Newest checkpoints to keep, besides the one with the lowest validation loss. 0 keeps all."""

    on_non_finite: Literal["stop", "skip"] = "stop"
    """A step whose loss or gradient is not finite never changes a weight: `stop` ends the run, `skip` goes on and
    counts it. Ours."""

    ray_address: str | None = None
    """The Ray cluster that preprocesses and trains: `HOST:PORT`, or `auto` for the one that this machine is part of;
    without it, that of the environment variable `RAY_ADDRESS`. `local`, or neither: this machine. Ours."""

    max_restarts: CountOrZero = 3
    """How often a run starts its ranks again, from its last checkpoint, after one has died, crashed or hung. What fails
    before it has done a single step is not tried again. Ours."""

    min_nodes: PositiveInt | None = None
    """Machines with which a run goes on that has lost others, with more micro-batches on each so that every step keeps
    its samples. `null`: all that it began with. Ours."""

    rejoin_timeout: FloatOrZero = 300.0
    """Seconds for which such a run waits for the machines that it lost; then it goes on without them, or ends. Ours."""

    heartbeat_timeout: PositiveFloat = 60.0
    """Seconds without any sign of life after which a rank counts as hung. After a quarter of them its machine is tried,
    which counts as lost if it does not answer. Ours."""

    hang_timeout: PositiveFloat = 300.0
    """Seconds on one micro-batch after which a rank counts as hung; loading, saving and exporting may take ten times as
    long. Ours."""

    logging_steps: PositiveInt = 1
    """Steps between logged metrics."""

    eval_steps: CountOrZero = 10
    """Steps between validations. The end of the run always validates; 0 validates only there."""

    early_stopping_patience: CountOrZero = 0
    """Ends the run after so many validations in a row without a better `val_loss`. 0: never. Ours."""

    early_stopping_threshold: FloatOrZero = 0.0
    """By how much a `val_loss` must be lower than the lowest before to count as better. Ours."""

    resume_from_checkpoint: bool | str = False
    """`true`: the newest complete checkpoint under `output_dir`; a fresh start if there is none. A path: that one."""

    max_grad_norm: FloatOrZero = 1.0
    """Gradients are scaled down to at most this norm. 0 leaves them."""

    system_key: str | None = None
    """Field of a record that holds its system prompt."""

    prompt_key: str = "instruction"
    """Field that holds the prompt."""

    query_key: str | None = None
    """Field that holds further input; where it is not empty, it follows the prompt on a new line."""

    response_key: str = "output"
    """Field that holds the answer, which is what trains."""

    history_key: str | None = None
    """Field that holds earlier turns, a list of pairs of prompt and answer. Ours."""

    text_key: str = "text"
    """Field that holds plain text, which no chat template frames. Ours."""

    record_shape: Literal["auto", "fields", "messages", "conversations", "prompt_completion", "text"] = "auto"
    """The shape that every record has. `auto` reads each record by its keys. Ours."""

    global_template: str | None = None
    """Chat template of the whole run; replaces `sft_train.data_args.template`."""

    template_date: str | None = None
    """The date, as 2026-01-31, that a chat template takes for today if it asks for one. `null`: today's, so that such a
    run can only be resumed on the same day. Ours."""

    validation: ValidationConfig | None = None
    """Validation data. Without `validation.data_args.file_name` there is no validation."""

    sft_train: WorkerConfig = field(default_factory=WorkerConfig)
    """The training role."""

    system_envs: dict[str, Any] = field(default_factory=dict)
    """Environment variables of all processes of the run."""

    data_cache_dir: str = "./output/data"
    """Where preprocessed data sets are kept and found again, one directory a fingerprint: a directory, or an address
    such as `s3://bucket/cache`. Ours."""

    export_dir: str | None = None
    """Where the trained model goes at the end, as an ordinary model directory. `null`: nowhere. Ours."""

    on_error: Literal["raise", "skip"] = "raise"
    """A record that is wrong: `raise` stops, `skip` sets it aside in `rejected.jsonl` and goes on. Ours."""

    control_tokens: Literal["plain", "reject", "allow"] = "plain"
    """Text in a record that spells a control token, such as `<|im_end|>`: `plain` encodes it as ordinary text, `reject`
    leaves the record out and counts it, `allow` makes it that token as transformers does. Ours."""

    too_long: Literal["reject", "truncate_turns", "truncate"] = "reject"
    """A sample of more than `sequence_length` tokens: `reject` leaves it out, `truncate_turns` leaves out its last
    turns so that it ends with a whole answer, `truncate` cuts its end; all are counted. Ours."""

    duplicates: Literal["keep", "drop"] = "keep"
    """A record whose samples have the same ids and label masks as those of one before it: `drop` leaves it out and
    counts it. Ours."""

    train_on: Literal["all_answers", "last_answer"] = "all_answers"
    """Which answers of a conversation are trained on. A record can take out more: `weight: 0` or `train: false` in a
    message. Ours."""

    train_on_tool_calls: bool = True
    """Whether answers are trained on that call tools. Ours."""

    train_on_thinking: bool = True
    """Whether the thinking of an answer is trained on. Ours."""

    dropped_thinking: Literal["skip", "split", "reject", "keep"] = "skip"
    """An answer whose thinking the chat template leaves out of the text, as many do for earlier turns: `skip` does not
    train on it and counts it, `split` makes a sample of the conversation up to it, `reject` leaves the record out,
    `keep` trains on what the template writes. Ours."""

    verify: Literal["none", "sampled", "all"] = "none"
    """Which samples are compared with those that `transformers` makes of the same conversations: none, a hundred of
    each data set, or all. A difference ends the run. Ours."""

    notes: list[str] = field(default_factory=list, init=False, compare=False)
    """What the reader of the configuration should be told once; filled by `load_config`, not a key."""

    def __post_init__(self) -> None:
        check_values(self)
        train = self.sft_train
        train.device_mapping = parse_device_mapping(train.device_mapping, "sft_train.device_mapping")
        train.data_args.template = self.template
        model = train.model_args
        model.model_name_or_path = self.pretrain
        model.lora_alpha = 2.0 * model.lora_rank if model.lora_alpha is None else model.lora_alpha
        model.freeze_module_prefix = _names(model.freeze_module_prefix)
        model.additional_target = _names(model.additional_target)
        if isinstance(model.lora_target, str) and re.fullmatch(r"[\w.\s-]+(,[\w.\s-]+)+", model.lora_target):
            model.lora_target = _names(model.lora_target)
        model.quantization = None if model.quantization == "none" else model.quantization
        if model.compile and model.gradient_checkpointing == "selective":
            raise ConfigError(
                "a compiler decides itself which results of a layer it keeps, so checkpointing cannot be selective",
                code="unknown_value",
                location="sft_train.model_args.gradient_checkpointing",
                hint="write full or none, or compile: false",
            )
        if train.training_args.data_seed is None:
            train.training_args.data_seed = self.seed
        train.system_envs = _texts(train.system_envs, "sft_train.system_envs")
        self.system_envs = _texts(self.system_envs, "system_envs")
        if not train.data_args.file_name:
            raise ConfigError(
                "no training data is named",
                code="missing_key",
                location="sft_train.data_args.file_name",
                hint="name a JSONL or JSON file, a glob, or a list of them",
            )
        read_entries(train.data_args.file_name, "sft_train.data_args.file_name")
        if self.validation_file_name is not None:
            _check_validation_files(self.validation_file_name, "validation.data_args.file_name")
        if self.early_stopping_patience and self.validation_file_name is None:
            raise ConfigError(
                "early stopping needs validation data",
                code="missing_key",
                location="early_stopping_patience",
                hint="name files in validation.data_args.file_name, or set it to 0",
            )
        size = self.tensor_parallel_size * self.sequence_parallel_size
        if train.world_size % size:
            key = "tensor_parallel.autotp_size" if self.tensor_parallel_size > 1 else self.sequence_parallel_key
            raise ConfigError(
                f"{train.world_size} ranks cannot be split into groups of {size} (tensor parallel "
                f"{self.tensor_parallel_size} x sequence parallel {self.sequence_parallel_size})",
                code="parallel_size",
                location=f"sft_train.strategy_args.strategy_config.{key}",
                hint="the length of sft_train.device_mapping must be a multiple of it",
            )

    @property
    def template(self) -> str:
        """The chat template of the run."""
        return self.global_template or self.sft_train.data_args.template

    @property
    def validation_file_name(self) -> Files | None:
        """The validation files as written, or None where there is no validation."""
        return (self.validation.data_args.file_name or None) if self.validation else None

    def data_files(self) -> dict[str, Files]:
        """The files of each data set of the run as written: `train`, and those of `validation_sources`."""
        train_files = self.sft_train.data_args.file_name
        assert train_files, "checked when the configuration was made"
        return {"train": train_files, **self.validation_sources()}

    def validation_sources(self) -> dict[str, Files]:
        """The files of each source of validation data: `validation`, or `validation/<source>` where a list has several.

        A source has the name that its entry says, or is called as its file, without the directory and the endings.
        """
        if self.validation_file_name is None:
            return {}
        entries = read_entries(self.validation_file_name, "validation.data_args.file_name")
        if len(entries) == 1:
            return {"validation": entries[0].paths}
        return {f"validation/{entry.name}": entry.paths for entry in entries}

    def preprocess_options(self) -> dict[str, Any]:
        """The keyword arguments of `sft_fast.preprocess` and `ensure_dataset` that decide what the samples are."""
        return {
            "tokenizer": self.pretrain,
            "template": self.template,
            "sequence_length": self.sequence_length,
            "system_key": self.system_key,
            "prompt_key": self.prompt_key,
            "query_key": self.query_key,
            "response_key": self.response_key,
            "history_key": self.history_key,
            "text_key": self.text_key,
            "record_shape": self.record_shape,
            "template_date": self.template_date,
            "num_threads": self.sft_train.data_args.preprocessing_num_workers,
            "on_error": self.on_error,
            "too_long": self.too_long,
            "duplicates": self.duplicates,
            "control_tokens": self.control_tokens,
            "train_on": self.train_on,
            "train_on_tool_calls": self.train_on_tool_calls,
            "train_on_thinking": self.train_on_thinking,
            "dropped_thinking": self.dropped_thinking,
            "verify": self.verify,
            "ray_address": self.ray_address,
        }

    @property
    def tensor_parallel_size(self) -> int:
        """Ranks that split each weight between them: DeepSpeed's `tensor_parallel.autotp_size`."""
        return self._parallel_size("tensor_parallel.autotp_size")

    @property
    def sequence_parallel_size(self) -> int:
        """Ranks that split each row between them: `sequence_parallel_size`, in `fsdp2_train` `ulysses_size`."""
        return self._parallel_size(self.sequence_parallel_key)

    @property
    def data_parallel_size(self) -> int:
        """Ranks, or groups of them, that read different data."""
        return self.sft_train.world_size // (self.tensor_parallel_size * self.sequence_parallel_size)

    @property
    def sequence_parallel_key(self) -> str:
        """Where `strategy_config` says `sequence_parallel_size`."""
        is_fsdp2 = self.sft_train.strategy_args.strategy_name == "fsdp2_train"
        return "ulysses_size" if is_fsdp2 else "sequence_parallel_size"

    def _parallel_size(self, key: str) -> int:
        """A number of ranks in `strategy_config`; 1 where there is none.

        Raises:
            ConfigError: it is no number of ranks.
        """
        value: Any = self.sft_train.strategy_args.strategy_config
        for name in key.split("."):
            value = value.get(name) if isinstance(value, dict) else None
        if value in (None, 0, "auto"):
            return 1
        if not isinstance(value, int) or isinstance(value, bool) or value < 1:
            raise ConfigError(
                f"expected a number of ranks, found {value!r}",
                code="parallel_size",
                location=f"sft_train.strategy_args.strategy_config.{key}",
            )
        return value

    @property
    def num_rows_per_step(self) -> int:
        """Rows of a global batch: rows of a micro-batch, times micro-batches, times ranks that read different data."""
        arguments = self.sft_train.training_args
        rows_per_rank = arguments.per_device_train_batch_size * arguments.gradient_accumulation_steps
        return rows_per_rank * self.data_parallel_size

    def to_dict(self) -> dict[str, Any]:
        """The configuration as plain dictionaries, lists and scalars; `notes` left out."""
        values = dataclasses.asdict(self)
        del values["notes"]
        return values


def _check_validation_files(files: Files, location: str) -> None:
    """Validation uses each sample once, so that losses can be compared."""
    for entry in read_entries(files, location):
        if entry.weight != 1 or entry.max_samples is not None:
            raise ConfigError(
                f'expected only path and name, found a weight or max_samples of "{entry.name}"',
                code="unknown_key",
                location=location,
                hint="validation uses each sample once; weights and caps are for sft_train.data_args.file_name",
            )


def _names(value: str | list[str] | None) -> list[str] | None:
    """A list of names from a list, or from a text that separates them by commas."""
    return [name.strip() for name in value.split(",") if name.strip()] if isinstance(value, str) else value


def _texts(variables: dict[str, Any], key: str) -> dict[str, Any]:
    """Environment variables as texts; YAML reads an unquoted 1 as a number, which can only mean the text."""
    for name, value in variables.items():
        if isinstance(value, bool) or not isinstance(value, str | int | float):
            raise ConfigError(
                f"expected a text, found {value}", code="wrong_type", location=f"{key}.{name}", hint="put it in quotes"
            )
    return {name: str(value) for name, value in variables.items()}
