//! Chat templates by name: our own texts, each equal in effect to the template that the models themselves carry.
//!
//! `tests/test_template_parity.py` proves the equality against the models' own templates.

/// The named templates, in alphabetical order.
pub const NAMES: [&str; 7] = ["chatml", "gemma", "llama3", "phi3", "qwen2_5", "qwen3", "smollm2"];

/// The Jinja text of a named template.
pub fn named(name: &str) -> Option<&'static str> {
    Some(match name {
        "chatml" => include_str!("named/chatml.jinja"),
        "gemma" => include_str!("named/gemma.jinja"),
        "llama3" => include_str!("named/llama3.jinja"),
        "phi3" => include_str!("named/phi3.jinja"),
        "qwen2_5" => include_str!("named/qwen2_5.jinja"),
        "qwen3" => include_str!("named/qwen3.jinja"),
        "smollm2" => include_str!("named/smollm2.jinja"),
        _ => return None,
    })
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::template::ChatTemplate;

    // Every name has a text that compiles, whose answers stand where the model would write them and end their turns.
    #[test]
    fn every_name_compiles() {
        for name in NAMES {
            let verdict = ChatTemplate::compile(name, named(name).unwrap(), &[]).unwrap().verdict().clone();
            assert!(verdict.prefix_preserving && verdict.end_of_turn_trained && !verdict.date_dependent, "{name}");
        }
        assert_eq!(None, named("nobody"));
    }
}
