//! Python module `sft_fast._core`: registers what the other files define, nothing else.

mod assemble;
mod conversations;
mod cpu;
mod dataset;
mod error;
mod packing;
mod policies;
mod preprocess;
mod template;

use pyo3::prelude::*;

#[pymodule]
fn _core(module: &Bound<'_, PyModule>) -> PyResult<()> {
    module.add("__version__", env!("CARGO_PKG_VERSION"))?;
    module.add("DATASET_FORMAT", sft_fast_core::manifest::DATASET_FORMAT)?;
    module.add("FORMAT_VERSION", sft_fast_core::manifest::FORMAT_VERSION)?;
    module.add_class::<assemble::Assembler>()?;
    module.add_class::<conversations::Conversations>()?;
    module.add_class::<dataset::Dataset>()?;
    module.add_class::<packing::Packing>()?;
    module.add_class::<packing::Steps>()?;
    module.add_class::<template::ChatTemplate>()?;
    module.add_class::<preprocess::TaskRunner>()?;
    module.add_class::<preprocess::Progress>()?;
    module.add_function(wrap_pyfunction!(preprocess::preprocess, module)?)?;
    module.add_function(wrap_pyfunction!(cpu::cpu_features, module)?)?;
    module.add_function(wrap_pyfunction!(cpu::engine_level, module)?)?;
    module.add_function(wrap_pyfunction!(packing::plan_lengths, module)?)?;
    module.add_function(wrap_pyfunction!(packing::total_steps, module)?)?;
    module.add_function(wrap_pyfunction!(dataset::samples_taken, module)?)?;
    Ok(())
}
