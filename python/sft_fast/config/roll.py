"""Keys that a configuration of ROLL may hold and that sft-fast accepts but does not act on, each with the reason.

`load_config` takes them out before the rest is checked and tells the user once. A value that asks for nothing (`null`,
`false`, an empty group) is not worth a word.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

_REINFORCEMENT = "it belongs to reinforcement learning"
_PACKS = "packs are planned over the whole data set from the sample lengths"
_PADDING = "rows are packed (use_sequence_packing) or padded to the longest of their micro-batch"
_MEDIA = "records are text"
_STATES = "offload with strategy_config.zero_optimization.offload_optimizer"


def _group(reason: str, names: str) -> Iterable[tuple[str, str]]:
    return ((name, reason) for name in names.split())


# Blocks of DeepSpeed settings that ROLL's files include at the top level, to be referred to as `${deepspeed_zero2}`.
SHARED_BLOCKS = frozenset(
    "deepspeed_zero deepspeed_zero2 deepspeed_zero2_cpuoffload deepspeed_zero3 deepspeed_zero3_cpuoffload".split()
)

# Trackers that ROLL's files name and that are not here; metrics.jsonl is written all the same.
OTHER_TRACKERS = frozenset(("trackio", "ml_tracker"))

_WORKER = dict(
    [
        ("name", "the role is always called sft_train"),
        ("worker_cls", "the worker is always SFTWorker"),
        ("world_size", "it is the length of device_mapping"),
        ("num_gpus_per_worker", "a training rank always has one device"),
        ("backend_timeout", "a failed rank ends the run at once"),
        ("logits_in_fp32", "the loss is always computed in 32 bits"),
        ("apply_loss_scale", "the loss is always the mean over the label tokens of the global batch"),
        ("mtp_training_mode", "multi-token prediction is not supported"),
        ("offload_nccl", _STATES),
        ("checkpoint_config", "checkpoints stay in output_dir"),
        ("sequence_packing_args", _PACKS),
        *_group(
            _PADDING,
            "use_dynamic_batching_in_train max_tokens_per_microbatch_in_train sequence_length_round_in_train "
            "use_dynamic_batching_in_infer max_tokens_per_microbatch_in_infer sequence_length_round_in_infer",
        ),
        *_group(
            _REINFORCEMENT,
            "pg_variant generating_args model_update_frequency topr_positive_weight topr_negative_weight "
            "max_concurrency router_replay opd_kl_coef tag_included",
        ),
    ]
)

_DATA = dict(
    [
        ("domain_interleave_probs", "records of all files are shuffled together"),
        ("eval_file_name", "name validation files in validation.data_args.file_name"),
        ("dataset_type", "the kind of file follows from its content"),
        ("prompt", "the top-level prompt_key names the field"),
        ("response", "the top-level response_key names the field"),
        ("messages", "conversations are read from the field messages"),
        ("custom_data_kwargs_func", "code is not run from a configuration"),
        *_group(_REINFORCEMENT, "tag id"),
        *_group(
            _MEDIA,
            "image_max_pixels image_min_pixels video_max_pixels video_min_pixels video_total_pixels video_fps "
            "video_max_frames video_resize_chunk_frames image_folder video_folder audio_folder",
        ),
    ]
)

# Section (the full name of the group, empty for the top level) -> key -> why nothing is done with it.
NOT_ACTED_ON: dict[str, dict[str, str]] = {
    "": dict(
        [
            ("max_steps", "it does not bound an SFT run; sft_train.training_args.max_steps does"),
            ("base_dir", "output_dir and logging_dir say where files go"),
            ("checkpoint_config", "checkpoints stay in output_dir"),
            ("rpc_timeout", "a step may take as long as it needs"),
            ("num_nodes", "it follows from device_mapping and num_gpus_per_node"),
            ("model_download_type", "nothing is downloaded; pretrain is a directory"),
            ("local_rank", "ranks come from device_mapping"),
            ("transfer_backend", "workers read the data set themselves"),
            ("otlp_output_dir", "traces are not exported"),
            *_group("use sequence_length", "prompt_length response_length val_prompt_length val_sequence_length"),
            *_group("profile_first_step traces a run", "profiler_timeline profiler_memory profiler_output_dir"),
            *_group(_STATES, "is_offload_states is_offload_optimizer_states_in_train_step"),
            *_group(
                _REINFORCEMENT,
                "rollout_dump_dir rollout_batch_size val_batch_size max_running_requests report_length_and_rewards "
                "length_profiler_dir model_update_buffer_size_mb rollout_mock generate_opt_level "
                "is_num_return_sequences_expand is_use_additional_prompts max_additional_running_prompts "
                "user_defined_rollout_loop_cls router_args",
            ),
        ]
    ),
    "sft_train": _WORKER,
    "sft_train.model_args": dict(
        [
            ("autocast_adapter_dtype", "master weights are always in 32 bits"),
            ("device_map", "devices come from device_mapping"),
            ("gradient_checkpointing_use_reentrant", "checkpointing is never re-entrant"),
            ("moe_aux_loss_coef", "set router_aux_loss_coef in model_config_kwargs"),
            ("ulysses_size", "say it in strategy_config: sequence_parallel_size, or ulysses_size of fsdp2_train"),
            *_group("the model is always a causal language model", "model_type num_labels"),
        ]
    ),
    "sft_train.training_args": dict(
        [
            ("output_dir", "the top-level output_dir is used"),
            ("seed", "the top-level seed is used"),
            ("dataloader_num_workers", "batches are filled from mapped files by a thread of each worker"),
            ("save_hf_model", "set export_dir, or run sft-fast export on a checkpoint"),
            ("tf32", "32-bit arithmetic stays exact"),
            *_group("the precision is sft_train.model_args.dtype", "fp16 bf16"),
        ]
    ),
    "sft_train.data_args": _DATA,
    "validation": dict(
        _WORKER,
        **dict(
            _group(
                "validation runs on the workers of sft_train",
                "model_args training_args strategy_args device_mapping use_sequence_packing infer_batch_size "
                "system_envs",
            )
        ),
    ),
    "validation.data_args": _DATA,
}


def take_out(values: dict[str, Any]) -> list[str]:
    """Removes from `values` (nested plain dictionaries) what is not acted on; returns a line on each key removed."""
    notes = []
    for section, reasons in NOT_ACTED_ON.items():
        group: Any = values
        for name in section.split(".") if section else ():
            group = group.get(name) if isinstance(group, dict) else None
        if not isinstance(group, dict):
            continue
        for name in [name for name in group if name in reasons]:
            value = group.pop(name)
            if value not in (None, False, {}, []):
                notes.append(f"{f'{section}.' if section else ''}{name} has no effect: {reasons[name]}")
    for name in SHARED_BLOCKS & values.keys():
        del values[name]
    if isinstance(values.get("track_with"), str) and values["track_with"] in OTHER_TRACKERS:
        notes.append(f"track_with: {values.pop('track_with')} is not supported: metrics go to metrics.jsonl alone")
        values["track_with"] = None
    return notes
