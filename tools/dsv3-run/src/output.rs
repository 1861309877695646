//! What people see: tables, units, progress, colour.

use indicatif::{ProgressBar, ProgressStyle};
use std::io::IsTerminal;
use std::time::{Duration, Instant};

/// Red on a terminal, plain elsewhere.
pub(crate) fn paint_error(text: &str) -> String {
    paint(text, "31;1", std::io::stderr().is_terminal())
}

/// Dim on a terminal.
pub(crate) fn dim(text: &str) -> String {
    paint(text, "2", std::io::stdout().is_terminal())
}

/// Bold on a terminal.
pub(crate) fn bold(text: &str) -> String {
    paint(text, "1", std::io::stdout().is_terminal())
}

fn paint(text: &str, code: &str, terminal: bool) -> String {
    let wanted = terminal && std::env::var_os("NO_COLOR").is_none_or(|v| v.is_empty());
    if wanted { format!("\x1b[{code}m{text}\x1b[0m") } else { text.to_string() }
}

/// A progress bar that appears once the work has taken half a second, on a terminal only.
#[derive(Debug)]
pub(crate) struct Progress {
    what: &'static str,
    style: &'static str,
    began: Instant,
    bar: Option<ProgressBar>,
}

impl Progress {
    /// Of bytes.
    pub(crate) fn new(what: &'static str) -> Self {
        let style = "{msg} [{bar:40}] {bytes}/{total_bytes} {bytes_per_sec} ETA {eta}";
        Progress { what, style, began: Instant::now(), bar: None }
    }

    /// Of things that are counted.
    pub(crate) fn counting(what: &'static str) -> Self {
        let style = "{msg} [{bar:40}] {pos}/{len} {per_sec} ETA {eta}";
        Progress { style, ..Progress::new(what) }
    }

    /// `done` of `total`.
    pub(crate) fn update(&mut self, done: u64, total: u64) {
        if self.bar.is_none()
            && self.began.elapsed() > Duration::from_millis(500)
            && std::io::stderr().is_terminal()
        {
            let style =
                ProgressStyle::with_template(self.style).unwrap_or(ProgressStyle::default_bar());
            self.bar = Some(ProgressBar::new(total).with_style(style).with_message(self.what));
        }
        if let Some(bar) = &self.bar {
            bar.set_position(done);
        }
    }

    pub(crate) fn finish(&mut self) {
        if let Some(bar) = self.bar.take() {
            bar.finish_and_clear();
        }
    }
}

/// Picoseconds as a time that people read.
pub(crate) fn picos(ps: u64) -> String {
    seconds(ps as f64 * 1e-12)
}

/// Seconds as a time that people read: three digits and a unit.
pub(crate) fn seconds(s: f64) -> String {
    let (value, unit) = match s {
        s if s >= 1.0 => (s, "s"),
        s if s >= 1e-3 => (s * 1e3, "ms"),
        s if s >= 1e-6 => (s * 1e6, "us"),
        s => (s * 1e9, "ns"),
    };
    format!("{} {unit}", three_digits(value))
}

/// Bytes as people read them, in powers of 1024.
pub(crate) fn bytes(n: u64) -> String {
    let units = ["B", "KiB", "MiB", "GiB", "TiB"];
    let mut value = n as f64;
    let mut unit = 0;
    while value >= 1024.0 && unit + 1 < units.len() {
        value /= 1024.0;
        unit += 1;
    }
    match unit {
        0 => format!("{n} B"),
        _ => format!("{} {}", three_digits(value), units[unit]),
    }
}

/// A count as people read it.
pub(crate) fn count(n: f64) -> String {
    let (value, unit) = match n {
        n if n >= 1e12 => (n / 1e12, " T"),
        n if n >= 1e9 => (n / 1e9, " G"),
        n if n >= 1e6 => (n / 1e6, " M"),
        n if n >= 1e4 => (n / 1e3, " k"),
        n => (n, ""),
    };
    format!("{}{unit}", three_digits(value))
}

/// So many of a thing.
pub(crate) fn plural(n: usize, what: &str) -> String {
    if n == 1 { format!("1 {what}") } else { format!("{n} {what}s") }
}

fn three_digits(value: f64) -> String {
    match value {
        v if v >= 100.0 || v == v.trunc() && v >= 10.0 => format!("{v:.0}"),
        v if v >= 10.0 => format!("{v:.1}"),
        v => format!("{v:.2}"),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn units_follow_size() {
        assert_eq!(seconds(1.234), "1.23 s");
        assert_eq!(seconds(0.012_34), "12.3 ms");
        assert_eq!(picos(1_500_000), "1.50 us");
        assert_eq!(bytes(1023), "1023 B");
        assert_eq!(bytes(8_750_000), "8.34 MiB");
        assert_eq!(count(24_321.0), "24.3 k");
        assert_eq!(count(671e9), "671 G");
    }
}
