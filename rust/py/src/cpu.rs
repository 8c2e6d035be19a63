//! What the processor can do, as the engine sees it when it runs.

use pyo3::prelude::*;
use sft_fast_core::tokenize::fast::instruction_set;

/// (name, whether the processor has it) of each instruction set that the engine knows to use.
#[pyfunction]
pub fn cpu_features() -> Vec<(&'static str, bool)> {
    #[cfg(target_arch = "x86_64")]
    return vec![
        ("avx512bw", is_x86_feature_detected!("avx512bw")),
        ("avx2", is_x86_feature_detected!("avx2")),
        ("bmi2", is_x86_feature_detected!("bmi2")),
        ("lzcnt", is_x86_feature_detected!("lzcnt")),
    ];
    #[cfg(target_arch = "aarch64")]
    return vec![("neon", std::arch::is_aarch64_feature_detected!("neon"))];
    #[allow(unreachable_code)]
    Vec::new()
}

/// The path that the tokenizer engine takes here: `avx512`, `avx2`, `neon` or `plain`.
#[pyfunction]
pub fn engine_level() -> &'static str {
    instruction_set()
}
