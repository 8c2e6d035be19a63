//! A model directory → its chat template and special tokens, read as `transformers` reads them.

use std::fs;
use std::path::Path;

use serde_json::{Map, Value};

use super::named::{NAMES, named};
use crate::error::{Error, ErrorKind, Result};

/// The special tokens of a model: names such as `bos_token`, and texts.
pub type SpecialTokens = Vec<(String, String)>;

/// The special tokens that templates see, by the names that `transformers` gives them.
const SPECIAL_TOKENS: [&str; 7] =
    ["bos_token", "eos_token", "unk_token", "sep_token", "pad_token", "cls_token", "mask_token"];

/// What the tokenizer classes assume where the configuration says nothing.
const CLASS_DEFAULTS: [(&str, &[(&str, &str)]); 5] = [
    ("Qwen2", &[("eos_token", "<|endoftext|>"), ("unk_token", "<|endoftext|>"), ("pad_token", "<|endoftext|>")]),
    ("Llama", &[("bos_token", "<s>"), ("eos_token", "</s>"), ("unk_token", "<unk>")]),
    ("CodeLlama", &[("bos_token", "<s>"), ("eos_token", "</s>"), ("unk_token", "<unk>")]),
    ("GPT2", &[("bos_token", "<|endoftext|>"), ("eos_token", "<|endoftext|>"), ("unk_token", "<|endoftext|>")]),
    (
        "Gemma",
        &[
            ("bos_token", "<bos>"),
            ("eos_token", "<eos>"),
            ("unk_token", "<unk>"),
            ("pad_token", "<pad>"),
            ("mask_token", "<mask>"),
        ],
    ),
];

/// The name of no template: for models without one, of which only plain text is asked for.
const NO_TEMPLATE: &str = "none";
const REFUSAL: &str = "{{ raise_exception('expected plain text, found turns: the template is none') }}";

/// Finds the template that `template` means for the model in `directory`: `native` (its own), `none`, one of [`NAMES`], or
/// the path of a `.jinja` file. Returns its name for messages, its Jinja text and the model's special tokens by variable name.
///
/// # Errors
/// [`ErrorKind::Template`] if there is no such template, [`ErrorKind::Io`] if a file can't be read.
pub fn load(directory: &Path, template: &str) -> Result<(String, String, SpecialTokens)> {
    let config = read_config(&directory.join("tokenizer_config.json"))?;
    let special_tokens = special_tokens(directory, &config)?;
    let (name, source) = if template == NO_TEMPLATE {
        (template.to_owned(), REFUSAL.to_owned())
    } else if template == "native" {
        let name = directory.file_name().map_or_else(|| "native".into(), |name| name.to_string_lossy().into_owned());
        (name, native(directory, &config)?)
    } else if template.ends_with(".jinja") {
        (template.to_owned(), read(Path::new(template))?)
    } else if let Some(source) = named(template) {
        (template.to_owned(), source.to_owned())
    } else {
        let known = NAMES.join(", ");
        return Err(Error::new(ErrorKind::Template, format!("unknown chat template '{template}'"))
            .with_hint(format!("use native (the model's own), none, the path of a .jinja file, or one of {known}")));
    };
    Ok((name, source, special_tokens))
}

fn read(path: &Path) -> Result<String> {
    let bytes = fs::read(path).map_err(|error| Error::io("read the chat template", path, &error))?;
    String::from_utf8(bytes)
        .map_err(|_| Error::new(ErrorKind::Template, "the chat template is not UTF-8").with_path(path))
}

/// The object in a JSON file; empty if there is no such file.
fn read_config(path: &Path) -> Result<Map<String, Value>> {
    match fs::read(path) {
        Ok(bytes) => match serde_json::from_slice(&bytes) {
            Ok(Value::Object(config)) => Ok(config),
            Ok(_) => Err(Error::new(ErrorKind::Tokenizer, "expected a JSON object").with_path(path)),
            Err(error) => Err(Error::new(ErrorKind::Tokenizer, format!("invalid JSON: {error}")).with_path(path)),
        },
        Err(error) if error.kind() == std::io::ErrorKind::NotFound => Ok(Map::new()),
        Err(error) => Err(Error::io("read the tokenizer's configuration", path, &error)),
    }
}

/// The model's own template. A file of its own goes before the configuration. Where there is one for conversations with
/// tools, `transformers` takes that one for them; both become one text here.
fn native(directory: &Path, config: &Map<String, Value>) -> Result<String> {
    let file = |name: &str| {
        let path = directory.join(name);
        if path.exists() { read(&path).map(Some) } else { Ok(None) }
    };
    let (mut default, mut tool_use) = (file("chat_template.jinja")?, file("additional_chat_templates/tool_use.jinja")?);
    if default.is_none() {
        match config.get("chat_template") {
            Some(Value::String(source)) => default = Some(source.clone()),
            Some(Value::Array(templates)) => {
                let find = |name: &str| {
                    let template = templates.iter().find(|template| template["name"] == name)?;
                    template["template"].as_str().map(str::to_owned)
                };
                (default, tool_use) = (find("default"), find("tool_use"));
            }
            Some(Value::Object(templates)) => {
                let find = |name: &str| templates.get(name).and_then(Value::as_str).map(str::to_owned);
                (default, tool_use) = (find("default"), find("tool_use"));
            }
            _ => {}
        }
    }
    match (default, tool_use) {
        (Some(default), None) => Ok(default),
        (Some(default), Some(tool_use)) => Ok(join(&default, &tool_use)),
        (None, _) => Err(Error::new(ErrorKind::Template, "the model has no chat template")
            .with_path(directory)
            .with_hint(format!("choose one: template=<path of a .jinja file> or one of {}", NAMES.join(", ")))),
    }
}

/// One text that is `default` without tools and `tool_use` with them. Both begin at the start of a line and end without
/// their trailing newline, as they would alone.
fn join(default: &str, tool_use: &str) -> String {
    let [default, tool_use] = [default, tool_use].map(|text| text.strip_suffix('\n').unwrap_or(text));
    format!("{{% if tools is none %}}\n{default}{{%+ else %}}\n{tool_use}{{%+ endif %}}")
}

fn special_tokens(directory: &Path, config: &Map<String, Value>) -> Result<SpecialTokens> {
    // Models without `added_tokens_decoder` are older: their `special_tokens_map.json` counts.
    let map = match config.contains_key("added_tokens_decoder") {
        true => Map::new(),
        false => read_config(&directory.join("special_tokens_map.json"))?,
    };
    let class = config.get("tokenizer_class").and_then(Value::as_str).unwrap_or_default();
    let class = class.trim_end_matches("Fast").trim_end_matches("Tokenizer");
    let defaults = CLASS_DEFAULTS.iter().find(|(known, _)| *known == class).map_or(&[][..], |(_, defaults)| defaults);
    let mut tokens = Vec::new();
    for name in SPECIAL_TOKENS {
        let token = match map.get(name).or_else(|| config.get(name)) {
            Some(Value::String(token)) => Some(&**token),
            Some(Value::Object(token)) => token.get("content").and_then(Value::as_str),
            Some(_) => None,
            None => defaults.iter().find(|(known, _)| *known == name).map(|(_, token)| *token),
        };
        tokens.extend(token.map(|token| (name.to_owned(), token.to_owned())));
    }
    Ok(tokens)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn model(files: &[(&str, &str)]) -> tempfile::TempDir {
        let directory = tempfile::tempdir().unwrap();
        for (name, text) in files {
            let path = directory.path().join(name);
            fs::create_dir_all(path.parent().unwrap()).unwrap();
            fs::write(path, text).unwrap();
        }
        directory
    }

    // The template's own file goes before the configuration, and the special tokens come in all their shapes.
    #[test]
    fn native_templates_are_found() {
        let config = r#"{"chat_template": "old", "bos_token": {"content": "<b>"}, "eos_token": "</e>", "pad_token": null,
            "added_tokens_decoder": {}, "tokenizer_class": "LlamaTokenizerFast"}"#;
        let directory = model(&[("tokenizer_config.json", config), ("chat_template.jinja", "new\n")]);
        let (_, source, tokens) = load(directory.path(), "native").unwrap();
        let tokens: Vec<_> = tokens.iter().map(|(name, token)| (&**name, &**token)).collect();
        assert_eq!("new\n", source);
        assert_eq!(vec![("bos_token", "<b>"), ("eos_token", "</e>"), ("unk_token", "<unk>")], tokens);

        let list = r#"{"chat_template": [{"name": "default", "template": "{{ 1 }}\n"}, {"name": "tool_use", "template": "  {% if 1 %}2{% endif %}"}]}"#;
        let directory =
            model(&[("tokenizer_config.json", list), ("special_tokens_map.json", r#"{"eos_token":"<e>"}"#)]);
        let (_, source, tokens) = load(directory.path(), "native").unwrap();
        assert_eq!("{% if tools is none %}\n{{ 1 }}{%+ else %}\n  {% if 1 %}2{% endif %}{%+ endif %}", source);
        assert_eq!(vec![("eos_token".to_owned(), "<e>".to_owned())], tokens);
    }

    // Names and files are found without the model; what is not there is an error that says what there is.
    #[test]
    fn other_templates_are_found() {
        let directory = model(&[("t.jinja", "{{ 1 }}")]);
        let path = directory.path().join("t.jinja");
        assert_eq!("{{ 1 }}", load(directory.path(), path.to_str().unwrap()).unwrap().1);
        assert_eq!(named("qwen3").unwrap(), load(directory.path(), "qwen3").unwrap().1);
        for wrong in ["native", "qwen99"] {
            let error = load(directory.path(), wrong).unwrap_err();
            assert_eq!(ErrorKind::Template, error.kind());
            assert!(error.hint().unwrap().contains("chatml"));
        }
        assert_eq!(ErrorKind::Io, load(directory.path(), "missing.jinja").unwrap_err().kind());
    }
}
