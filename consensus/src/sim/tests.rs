//! Many seeds, one seed again, and the same with faults put in on purpose.
//!
//! `LITEFS_CONSENSUS_SEED=n` replays one seed and prints its story; `LITEFS_CONSENSUS_SEEDS=n` sets how many
//! are run, `LITEFS_CONSENSUS_FIRST=n` where they begin.

use std::sync::atomic::{AtomicU64, Ordering};

use super::chaos::{self, Failure, Report};
use super::mutants::{self, Mutant};

fn env(name: &str) -> Option<u64> {
    std::env::var(name).ok()?.parse().ok()
}

/// Runs seeds on all processors until one fails.
fn run_seeds(first: u64, count: u64, mutant: Option<Mutant>) -> Result<Vec<Report>, Failure> {
    let next = AtomicU64::new(first);
    let worst = AtomicU64::new(u64::MAX);
    let threads = std::thread::available_parallelism().map_or(1, usize::from);
    let work = || {
        mutants::set(mutant);
        let mut done = Vec::new();
        loop {
            let seed = next.fetch_add(1, Ordering::Relaxed);
            if seed >= first + count || seed > worst.load(Ordering::Relaxed) {
                return Ok(done);
            }
            match std::panic::catch_unwind(|| chaos::run(seed)) {
                Ok(Ok(report)) => done.push(report),
                Ok(Err(failure)) => {
                    worst.fetch_min(seed, Ordering::Relaxed);
                    return Err(failure);
                }
                Err(_) => {
                    worst.fetch_min(seed, Ordering::Relaxed);
                    return Err(Failure {
                        seed,
                        what: "panic, see above".to_owned(),
                        story: String::new(),
                    });
                }
            }
        }
    };
    let results: Vec<_> = std::thread::scope(|scope| {
        let threads: Vec<_> = (0..threads).map(|_| scope.spawn(work)).collect();
        threads
            .into_iter()
            .map(|t| t.join().expect("no panic"))
            .collect()
    });
    let mut reports = Vec::new();
    let mut failures = Vec::new();
    for result in results {
        match result {
            Ok(more) => reports.extend(more),
            Err(failure) => failures.push(failure),
        }
    }
    match failures.into_iter().min_by_key(|failure| failure.seed) {
        Some(failure) => Err(failure),
        None => Ok(reports),
    }
}

fn explain(failure: &Failure) -> String {
    let Failure { seed, what, story } = failure;
    format!(
        "{story}\nseed {seed}: {what}\n\
         replay: LITEFS_CONSENSUS_SEED={seed} cargo test -p consensus replays -- --nocapture"
    )
}

#[test]
fn whatever_happens_the_invariants_hold() {
    let count = env("LITEFS_CONSENSUS_SEEDS").unwrap_or(1500);
    let first = env("LITEFS_CONSENSUS_FIRST").unwrap_or(0);
    let reports = match run_seeds(first, count, None) {
        Ok(reports) => reports,
        Err(failure) => panic!("{}", explain(&failure)),
    };
    let sum = |f: fn(&Report) -> u64| reports.iter().map(f).sum::<u64>();
    let acknowledged = sum(|r| r.acknowledged as u64);
    let (epochs, transfers) = (sum(|r| r.epochs), sum(|r| r.transfers));
    println!("{count} seeds: {acknowledged} commits, {epochs} epochs, {transfers} transfers");
    // Runs in which nothing happens would prove nothing.
    assert!(acknowledged > count && epochs > 4 * count && transfers * 10 > count);
}

#[test]
fn a_seed_replays() {
    if let Some(seed) = env("LITEFS_CONSENSUS_SEED") {
        match chaos::run(seed) {
            Ok(report) => println!("seed {seed}: {report:?}"),
            Err(failure) => panic!("{}", explain(&failure)),
        }
        return;
    }
    for seed in 0..20 {
        let (a, b) = (chaos::run(seed), chaos::run(seed));
        assert_eq!(a.expect("holds"), b.expect("holds"), "seed {seed}");
    }
}

/// Returns the first seed that notices a fault.
fn found(mutant: Mutant, within: u64) {
    match run_seeds(0, within, Some(mutant)) {
        Ok(_) => panic!("{mutant:?} is not found by {within} seeds"),
        Err(failure) => println!("{mutant:?}: seed {}: {}", failure.seed, failure.what),
    }
}

macro_rules! mutant_is_found {
    ($($name:ident: $mutant:ident within $within:literal,)*) => {
        $(
            #[test]
            fn $name() {
                found(Mutant::$mutant, $within);
            }
        )*
    };
}

mutant_is_found! {
    a_log_that_is_not_synced_is_found: LogNotSynced within 50,
    a_restart_without_a_wait_is_found: NoRestartWait within 200,
    a_lease_from_the_answer_is_found: LeaseFromAnswer within 1000,
    a_lease_that_is_too_long_is_found: LeaseTooLong within 200,
    a_transfer_that_keeps_the_lease_is_found: TransferKeepsLease within 500,
    an_election_without_asking_is_found: ElectWithoutAsking within 200,
    a_lease_over_a_suspension_is_found: IgnoresSuspension within 500,
    a_restored_leader_is_found: LeaderRestored within 200,
}
