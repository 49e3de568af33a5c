//! From a BPF program's text to instructions: `rbpf` assembles, and this gives it labels, numbers and maps by name.
//!
//! ```text
//!   loop:                a label stands by itself
//!   jgt r1, r8, @pass    a jump to one
//!   lddw r1, $mac        a number given by name
//!   lddw r1, $sockets    a map given by name: the loader replaces its descriptor by its address
//! ```

use std::{collections::BTreeMap, fmt::Write};

/// What a name in a program stands for.
#[derive(Clone, Copy, Debug)]
pub(super) enum Value {
    /// A number.
    Number(i64),
    /// A map's descriptor.
    Map(i32),
}

/// A program of ours is no program.
#[derive(Clone, Debug, thiserror::Error)]
#[error("a bug: a BPF program cannot be assembled: {0}")]
pub struct AssemblyError(String);

/// Bytes of one instruction.
const INSTRUCTION_BYTES: usize = 8;
/// `src_reg` of a load that names a map (BPF_PSEUDO_MAP_FD), in the upper half of an instruction's second byte.
const PSEUDO_MAP_FD: u8 = 1 << 4;

/// The instructions of `text`.
pub(super) fn assemble(text: &str, names: &[(&str, Value)]) -> Result<Vec<u8>, AssemblyError> {
    let (mut labels, mut lines, mut at) = (BTreeMap::new(), Vec::new(), 0usize);
    for line in text.lines() {
        let line = line.split(';').next().unwrap_or_default().trim();
        if let Some(label) = line.strip_suffix(':') {
            labels.insert(label, at);
        } else if !line.is_empty() {
            lines.push((at, line));
            at += if line.starts_with("lddw") { 2 } else { 1 };
        }
    }
    let (mut plain, mut maps) = (String::new(), Vec::new());
    for (at, line) in lines {
        let line = match line.split_once(['@', '$']) {
            None => line.to_owned(),
            Some((before, rest)) => {
                let (name, after) = match rest.split_once(',') {
                    Some((name, after)) => (name, format!(",{after}")),
                    None => (rest, String::new()),
                };
                if line.contains('@') && !line.contains('$') {
                    format!("{before}{:+}", jump(&labels, name, at)?)
                } else {
                    let number = match named(names, name)? {
                        Value::Number(number) => number,
                        Value::Map(descriptor) => {
                            maps.push(at);
                            descriptor.into()
                        }
                    };
                    let after = match after.split_once('@') {
                        Some((between, label)) => {
                            format!("{between}{:+}", jump(&labels, label, at)?)
                        }
                        None => after,
                    };
                    format!("{before}{number}{after}")
                }
            }
        };
        let _ = writeln!(plain, "{line}"); // writing to a String cannot fail
    }
    let mut code = rbpf::assembler::assemble(&plain).map_err(AssemblyError)?;
    for at in maps {
        code[at * INSTRUCTION_BYTES + 1] |= PSEUDO_MAP_FD;
    }
    Ok(code)
}

fn jump(labels: &BTreeMap<&str, usize>, label: &str, at: usize) -> Result<i64, AssemblyError> {
    let target = labels
        .get(label.trim())
        .ok_or_else(|| AssemblyError(format!("no label `{label}`")))?;
    Ok(*target as i64 - at as i64 - 1)
}

fn named(names: &[(&str, Value)], name: &str) -> Result<Value, AssemblyError> {
    names
        .iter()
        .find(|(known, _)| *known == name.trim())
        .map(|(_, value)| *value)
        .ok_or_else(|| AssemblyError(format!("nothing is called `{name}`")))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn labels_numbers_and_maps_find_their_places() {
        let text = "
            lddw r1, $map     ; two instructions long
            jne r1, $seven, @end
            mov r0, 1
            exit
        end:
            mov r0, 2
            exit";
        let names = [("map", Value::Map(5)), ("seven", Value::Number(7))];
        let code = assemble(text, &names).unwrap();
        assert_eq!(code.len(), 7 * INSTRUCTION_BYTES);
        assert_eq!((code[1], code[4]), (0x11, 5), "r1, a map, descriptor 5");
        let jump = &code[2 * INSTRUCTION_BYTES..][..INSTRUCTION_BYTES];
        assert_eq!(
            (jump[2], jump[4]),
            (2, 7),
            "over two instructions, unless 7"
        );
    }

    #[test]
    fn what_stands_for_nothing_is_named() {
        for (text, name) in [("ja @away", "away"), ("mov r0, $what", "what")] {
            let error = assemble(text, &[]).unwrap_err().to_string();
            assert!(error.contains(name), "{error}");
        }
    }
}
