//! The fast engine and the `tokenizers` crate alone, one thread, cold and warm: what `benches/engines.py` runs beside other
//! engines. `engine NAME MODEL TEXTS IDS`: the name is `sft-fast` or `tokenizers`; a file of texts is, for each text, its
//! length (u32, little-endian) and its UTF-8 bytes; the ids of the cold pass go to `IDS`, for each text their number and they.
//! Prints JSON: CPU seconds to load, cold and warm; bytes; bytes of memory at the peak, and before loading.

use std::path::Path;

use rustix::time::{ClockId, clock_gettime};
use sft_fast_core::tokenize::fast::{FastTokenizer, Scratch};

type Encode = Box<dyn FnMut(&str, &mut Vec<u32>)>;

fn engine(name: &str, json: &[u8]) -> Encode {
    if name == "sft-fast" {
        let tokenizer = FastTokenizer::from_json(json).unwrap_or_else(|reason| panic!("{reason}"));
        let mut scratch = Scratch::default();
        return Box::new(move |text, ids| tokenizer.encode(text, &mut scratch, ids));
    }
    let tokenizer = tokenizers::Tokenizer::from_bytes(json).expect("tokenizers reads it");
    Box::new(move |text, ids| ids.extend(tokenizer.encode_fast(text, false).expect("a text encodes").get_ids()))
}

fn read_texts(path: &Path) -> Vec<String> {
    let bytes = std::fs::read(path).expect("the file of texts");
    let (mut rest, mut texts) = (&bytes[..], Vec::new());
    while let Some((length, more)) = rest.split_first_chunk::<4>() {
        let (text, more) = more.split_at(u32::from_le_bytes(*length) as usize);
        texts.push(String::from_utf8(text.to_vec()).expect("UTF-8"));
        rest = more;
    }
    texts
}

fn cpu_seconds() -> f64 {
    let time = clock_gettime(ClockId::ProcessCPUTime);
    time.tv_sec as f64 + time.tv_nsec as f64 / 1e9
}

fn peak_bytes() -> u64 {
    let status = std::fs::read_to_string("/proc/self/status").unwrap_or_default();
    let line = status.lines().find_map(|line| line.strip_prefix("VmHWM:"));
    line.and_then(|line| line.split_whitespace().next()?.parse::<u64>().ok()).unwrap_or(0) * 1024
}

fn main() {
    let arguments: Vec<String> = std::env::args().skip(1).filter(|argument| argument != "--bench").collect();
    let [name, model, texts, output] = &*arguments else {
        println!("nothing to measure: benches/engines.py runs this");
        return; // as part of `cargo bench`
    };
    let texts = read_texts(Path::new(texts));
    let num_bytes: usize = texts.iter().map(String::len).sum();
    let peak_before = peak_bytes();
    let start = cpu_seconds();
    let json = std::fs::read(Path::new(model).join("tokenizer.json")).expect("a model directory");
    let mut encode = engine(name, &json);
    encode("a", &mut Vec::new());
    let load = cpu_seconds() - start;
    let mut passes = [0.0; 2];
    let (mut ids, mut ends) = (Vec::new(), Vec::new());
    for pass in &mut passes {
        ids.clear();
        ends.clear();
        let start = cpu_seconds();
        for text in &texts {
            encode(text, &mut ids);
            ends.push(ids.len());
        }
        *pass = cpu_seconds() - start;
    }
    let peak = peak_bytes();
    let [cold, warm] = passes;
    println!(
        "{{\"load\": {load}, \"cold\": {cold}, \"warm\": {warm}, \"num_bytes\": {num_bytes}, \"peak\": {peak}, \
         \"peak_before\": {peak_before}}}"
    );
    let mut bytes = Vec::with_capacity(4 * (ids.len() + ends.len()));
    let mut start = 0;
    for end in ends {
        bytes.extend_from_slice(&((end - start) as u32).to_le_bytes());
        bytes.extend(ids[start..end].iter().flat_map(|id| id.to_le_bytes()));
        start = end;
    }
    std::fs::write(output, bytes).expect("room for the ids");
}
