//! Many seeds, one seed again, and the same with faults put in on purpose.
//!
//! `LITEFS_SIM_SEED=n` replays one seed and prints its story; `LITEFS_SIM_SEEDS=n` sets how many are run,
//! `LITEFS_SIM_FIRST=n` where they begin.

use std::sync::atomic::{AtomicU64, Ordering};

use super::chaos::{self, Failure, Report};
use super::mutants::{ALL, Mutant, set};
use super::world::Counts;

fn env(name: &str) -> Option<u64> {
    std::env::var(name).ok()?.parse().ok()
}

/// Runs seeds on all processors until one fails.
fn run_seeds(first: u64, count: u64, mutants: &[Mutant]) -> Result<Vec<Report>, Failure> {
    let next = AtomicU64::new(first);
    let worst = AtomicU64::new(u64::MAX);
    let threads = std::thread::available_parallelism().map_or(1, usize::from);
    let work = || {
        set(mutants);
        let mut done = Vec::new();
        loop {
            let seed = next.fetch_add(1, Ordering::Relaxed);
            if seed >= first + count || seed > worst.load(Ordering::Relaxed) {
                return Ok(done);
            }
            match chaos::run(seed, false) {
                Ok(report) => done.push(report),
                Err(_) => {
                    worst.fetch_min(seed, Ordering::Relaxed);
                    // Again, for its story.
                    return chaos::run(seed, true).map(|report| vec![report]);
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
         replay: LITEFS_SIM_SEED={seed} cargo test -p litefs --lib sim::tests::a_seed_replays -- --nocapture"
    )
}

#[test]
fn whatever_happens_the_invariants_hold() {
    let count = env("LITEFS_SIM_SEEDS").unwrap_or(1000);
    let first = env("LITEFS_SIM_FIRST").unwrap_or(0);
    let reports = match run_seeds(first, count, &[]) {
        Ok(reports) => reports,
        Err(failure) => panic!("{}", explain(&failure)),
    };
    let mut counts = Counts::new();
    for (what, n) in reports.iter().flat_map(|report| &report.counts) {
        *counts.entry(what).or_default() += n;
    }
    println!("{count} seeds:");
    for (what, n) in &counts {
        println!("{n:>9} {what}");
    }
}

#[test]
fn a_seed_replays() {
    if let Some(seed) = env("LITEFS_SIM_SEED") {
        match chaos::run(seed, true) {
            Ok(report) => println!("seed {seed}: {report:?}"),
            Err(failure) => panic!("{}", explain(&failure)),
        }
        return;
    }
    for seed in 0..20 {
        let (a, b) = (chaos::run(seed, false), chaos::run(seed, false));
        assert_eq!(a.expect("holds"), b.expect("holds"), "seed {seed}");
    }
}

/// Returns the first seed that notices a fault.
fn found(mutants: &[Mutant], within: u64) {
    match run_seeds(0, within, mutants) {
        Ok(_) => panic!("{mutants:?} is not found by {within} seeds"),
        Err(failure) => println!(
            "{:<38} seed {:>5} of {within}: {}",
            format!("{mutants:?}"),
            failure.seed,
            failure.what.lines().next().unwrap_or_default()
        ),
    }
}

/// `LITEFS_SIM_MUTANTS=A,B` says which rules are off at once.
#[test]
fn faults_that_are_asked_for_are_found() {
    let Ok(names) = std::env::var("LITEFS_SIM_MUTANTS") else {
        return;
    };
    let named = |name: &str| ALL.into_iter().find(|m| format!("{m:?}") == name);
    let all: Vec<Mutant> = names
        .split(',')
        .map(|name| named(name).expect("the name of a fault"))
        .collect();
    found(&all, env("LITEFS_SIM_SEEDS").unwrap_or(2000));
}

macro_rules! mutant_is_found {
    ($($name:ident: $($mutant:ident)and+ within $within:literal,)*) => {
        $(
            #[test]
            fn $name() {
                found(&[$(Mutant::$mutant),+], $within);
            }
        )*
    };
}

mutant_is_found! {
    a_takeover_without_a_fence_is_found: FenceSkipped within 50,
    a_fence_of_a_minority_is_found: MinorityFenced within 50,
    writes_opened_before_the_fetch_are_found: OpensBeforeFetch within 50,
    the_first_report_instead_of_the_best_is_found: FirstReport within 100,
    an_acknowledgement_before_the_sync_is_found: AckBeforeSync within 100,
    a_primary_that_counts_itself_unsynced_is_found: OwnLogNotSynced within 100,
    acceptance_told_once_is_found: ToldOnce within 100,
    what_was_there_before_a_connection_and_is_not_acknowledged_is_found: RestartNotAcked within 100,
    acknowledgements_of_an_older_tenure_are_found: OldTenureAcks within 100,
    a_bound_that_is_ignored_is_found: BoundIgnored within 100,
    a_lower_epoch_that_is_taken_is_found: LowerEpochTaken within 200,
    a_branch_that_is_not_kept_is_found: BranchDropped within 200,
    acknowledgements_before_acceptance_are_found: UnacceptedCounts within 500,
    an_empty_disk_with_the_old_id_is_found: EmptyDiskKeepsId within 300,
    a_copy_that_keeps_its_epoch_is_found: CopyKeepsEpoch within 200,
    a_compacted_range_that_keeps_its_epoch_is_found: CompactedKeepsEpoch within 300,
    voters_changed_without_a_barrier_are_found: NoBarrier within 500,
    a_position_in_another_history_that_counts_is_found: AckByTxid within 500,
    a_commit_after_the_fence_is_found: CommitAfterFence within 600,
    a_forgotten_acceptance_is_found: AcceptedForgotten within 300,
    a_database_reopened_after_the_fence_is_found: ReopenedAfterFence within 300,
    a_copy_that_is_not_acknowledged_is_found: CopyNotAcked within 1000,
    a_role_given_up_for_nothing_is_found: GivenUpForNothing within 300,
    a_tenure_that_outlives_its_lease_is_found: LeaseIgnored within 200,
    a_choice_by_txid_only_is_found: TxidOnly within 300,
    a_bound_that_begins_anew_is_found: BacklogBeginsEmpty within 100,
    a_fetch_that_waits_forever_is_found: WaitsForever within 300,
}

/// A bound counted whoever was as far as some transaction, in whatever history.
#[test]
fn a_shorter_history_that_is_another_does_not_count_for_a_bound() {
    if let Err(failure) = run_seeds(1877, 1, &[]) {
        panic!("{}", explain(&failure));
    }
}
