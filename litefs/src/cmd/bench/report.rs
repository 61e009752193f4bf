//! How a number is distributed, as text.

use std::time::Duration;

const BUCKETS: usize = 10;
const BAR_LEN: usize = 40;

/// Measured times, sorted.
#[derive(Debug, Clone, Default)]
pub(super) struct Distribution(Vec<Duration>);

impl Distribution {
    pub(super) fn new(mut times: Vec<Duration>) -> Distribution {
        times.sort_unstable();
        Distribution(times)
    }

    /// The smallest time that at least so many percent do not exceed.
    fn percentile(&self, percent: usize) -> Duration {
        let rank = (self.0.len() * percent).div_ceil(100).max(1);
        self.0.get(rank - 1).copied().unwrap_or_default()
    }

    /// One line of numbers, and a small histogram once there are a few.
    pub(super) fn show(&self) -> String {
        let (Some(min), Some(max)) = (self.0.first(), self.0.last()) else {
            return "  nothing was measured\n".to_owned();
        };
        let mut out = format!(
            "  ms: min {}, median {}, 90 % {}, 99 % {}, max {}\n",
            ms(*min),
            ms(self.percentile(50)),
            ms(self.percentile(90)),
            ms(self.percentile(99)),
            ms(*max),
        );
        if self.0.len() > 4 {
            out.push_str(&self.histogram(*min, *max));
        }
        out
    }

    fn histogram(&self, min: Duration, max: Duration) -> String {
        let width =
            ((max - min) / u32::try_from(BUCKETS).unwrap_or(1)).max(Duration::from_micros(1));
        let mut counts = [0_usize; BUCKETS];
        for time in &self.0 {
            let bucket = (*time - min).as_nanos() / width.as_nanos();
            counts[usize::try_from(bucket).unwrap_or(BUCKETS).min(BUCKETS - 1)] += 1;
        }
        let most = counts.into_iter().max().unwrap_or(1).max(1);
        let mut out = String::new();
        for (i, count) in (0_u32..).zip(counts) {
            let from = min + width * i;
            let bar = "#".repeat((count * BAR_LEN).div_ceil(most));
            let line = format!(
                "  {:>8} - {:>8}  {bar:<BAR_LEN$}  {count}",
                ms(from),
                ms(from + width)
            );
            out.push_str(line.trim_end());
            out.push('\n');
        }
        out
    }
}

fn ms(time: Duration) -> String {
    format!("{:.1}", time.as_secs_f64() * 1000.0)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn percentiles_are_of_what_was_measured() {
        let times = (1..=100).rev().map(Duration::from_millis).collect();
        let text = Distribution::new(times).show();
        assert!(
            text.starts_with("  ms: min 1.0, median 50.0, 90 % 90.0, 99 % 99.0, max 100.0\n"),
            "{text}"
        );
        let counts = text
            .lines()
            .skip(1)
            .map(|line| line.rsplit(' ').next().unwrap());
        assert_eq!(
            counts.map(|n| n.parse::<usize>().unwrap()).sum::<usize>(),
            100
        );
    }

    #[test]
    fn one_time_or_none_is_no_trouble() {
        let one = Distribution::new(vec![Duration::from_millis(7)]).show();
        assert_eq!(
            one,
            "  ms: min 7.0, median 7.0, 90 % 7.0, 99 % 7.0, max 7.0\n"
        );
        assert!(Distribution::default().show().contains("nothing"));
        let same = Distribution::new(vec![Duration::from_millis(7); 9]).show();
        assert!(same.contains("  9\n"), "{same}");
    }
}
