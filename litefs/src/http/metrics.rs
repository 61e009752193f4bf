//! Prometheus text format, version 0.0.4.

use std::fmt::Write;

/// How a number behaves.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum MetricKind {
    /// Only rises, until a restart.
    Counter,
    /// Goes up and down.
    Gauge,
}

/// Text of all metrics, built family by family.
#[derive(Debug, Default)]
pub struct MetricsText(String);

impl MetricsText {
    /// Starts a family; its samples follow.
    pub fn family(&mut self, name: &str, kind: MetricKind, help: &str) {
        let kind = match kind {
            MetricKind::Counter => "counter",
            MetricKind::Gauge => "gauge",
        };
        let _ = writeln!(self.0, "# HELP {name} {help}\n# TYPE {name} {kind}");
    }

    /// Adds a sample of the family begun last.
    pub fn sample(&mut self, name: &str, labels: &[(&str, &str)], value: f64) {
        self.0.push_str(name);
        for (i, (label, text)) in labels.iter().enumerate() {
            let before = if i == 0 { '{' } else { ',' };
            let text = text
                .replace('\\', "\\\\")
                .replace('"', "\\\"")
                .replace('\n', "\\n");
            let _ = write!(self.0, "{before}{label}=\"{text}\"");
        }
        if !labels.is_empty() {
            self.0.push('}');
        }
        let _ = writeln!(self.0, " {value}");
    }

    /// Adds a family of one sample without labels.
    pub fn single(&mut self, name: &str, kind: MetricKind, help: &str, value: f64) {
        self.family(name, kind, help);
        self.sample(name, &[], value);
    }

    /// Adds a counter without labels.
    pub fn count(&mut self, name: &str, help: &str, value: u64) {
        #[expect(clippy::cast_precision_loss, reason = "Prometheus knows only f64")]
        let value = value as f64;
        self.single(name, MetricKind::Counter, help, value);
    }

    /// Adds a histogram: upper bounds with the counts up to them, the last of which is for all.
    pub fn histogram(&mut self, name: &str, help: &str, buckets: &[(f64, u64)], sum: f64) {
        let _ = writeln!(self.0, "# HELP {name} {help}\n# TYPE {name} histogram");
        for (bound, count) in buckets {
            let bound = match bound.is_finite() {
                true => bound.to_string(),
                false => "+Inf".to_owned(),
            };
            let _ = writeln!(self.0, "{name}_bucket{{le=\"{bound}\"}} {count}");
        }
        let count = buckets.last().map_or(0, |(_, count)| *count);
        let _ = writeln!(self.0, "{name}_sum {sum}\n{name}_count {count}");
    }

    /// Returns the text.
    #[must_use]
    pub fn into_text(self) -> String {
        self.0
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn histograms_end_with_all() {
        let mut text = MetricsText::default();
        text.histogram("w", "waits", &[(0.5, 1), (f64::INFINITY, 3)], 2.5);
        assert_eq!(
            text.into_text(),
            "# HELP w waits\n# TYPE w histogram\nw_bucket{le=\"0.5\"} 1\nw_bucket{le=\"+Inf\"} 3\nw_sum 2.5\nw_count 3\n"
        );
    }

    #[test]
    fn text_is_escaped() {
        let mut text = MetricsText::default();
        text.single("a", MetricKind::Gauge, "an a", 1.5);
        text.family("b", MetricKind::Counter, "bs");
        text.sample("b", &[("db", "x\"\\\n"), ("n", "1")], 3.0);
        assert_eq!(
            text.into_text(),
            "# HELP a an a\n# TYPE a gauge\na 1.5\n# HELP b bs\n# TYPE b counter\nb{db=\"x\\\"\\\\\\n\",n=\"1\"} 3\n"
        );
    }
}
