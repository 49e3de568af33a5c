//! Tables of text, and quantities as people read them.

use std::io::{self, Write};

/// Three digits and a binary unit.
pub(super) fn bytes(count: u64) -> String {
    const UNITS: [&str; 6] = ["KiB", "MiB", "GiB", "TiB", "PiB", "EiB"];
    if count < 1024 {
        return format!("{count} B");
    }
    let (mut value, mut unit) = (count as f64 / 1024.0, 0);
    while value >= 999.5 && unit + 1 < UNITS.len() {
        value /= 1024.0;
        unit += 1;
    }
    let digits = if value < 9.995 {
        2
    } else if value < 99.95 {
        1
    } else {
        0
    };
    format!("{value:.digits$} {}", UNITS[unit])
}

/// The two largest units.
pub(super) fn duration(seconds: u64) -> String {
    match seconds {
        0..60 => format!("{seconds}s"),
        60..3600 => format!("{}m {}s", seconds / 60, seconds % 60),
        3600..86_400 => format!("{}h {}m", seconds / 3600, seconds / 60 % 60),
        _ => format!("{}d {}h", seconds / 86_400, seconds / 3600 % 24),
    }
}

/// Columns as wide as their widest cell.
pub(super) struct Table {
    head: Vec<String>,
    rows: Vec<Vec<String>>,
    empty: &'static str,
}

impl Table {
    pub(super) fn new(head: &[&str], empty: &'static str) -> Self {
        Self {
            head: head.iter().map(ToString::to_string).collect(),
            rows: Vec::new(),
            empty,
        }
    }

    /// What came over the network must not move the terminal's cursor.
    pub(super) fn row<const N: usize>(&mut self, cells: [String; N]) {
        let printable = |cell: String| {
            cell.chars()
                .map(|c| if c.is_control() { '?' } else { c })
                .collect()
        };
        self.rows.push(cells.map(printable).into());
    }

    pub(super) fn write(&self, output: &mut impl Write) -> io::Result<()> {
        if self.rows.is_empty() {
            return writeln!(output, "{}", self.empty);
        }
        let lines = || [&self.head].into_iter().chain(&self.rows);
        let widths: Vec<usize> = (0..self.head.len())
            .map(|column| {
                lines()
                    .map(|line| line[column].chars().count())
                    .max()
                    .unwrap_or(0)
            })
            .collect();
        for line in lines() {
            let mut text = String::new();
            for (cell, width) in line.iter().zip(&widths) {
                text.push_str(&format!("{cell:<width$}  "));
            }
            writeln!(output, "{}", text.trim_end())?;
        }
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn quantities_keep_three_digits() {
        for (count, text) in [
            (0, "0 B"),
            (1023, "1023 B"),
            (1024, "1.00 KiB"),
            (10_239, "10.0 KiB"),
            (1_048_575, "1.00 MiB"),
            (123 << 30, "123 GiB"),
            (u64::MAX, "16.0 EiB"),
        ] {
            assert_eq!(bytes(count), text);
        }
        for (seconds, text) in [
            (59, "59s"),
            (3599, "59m 59s"),
            (3600, "1h 0m"),
            (86_400, "1d 0h"),
        ] {
            assert_eq!(duration(seconds), text);
        }
    }
}
