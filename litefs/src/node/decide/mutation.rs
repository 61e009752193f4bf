//! Places where a test can switch a rule off, to see that something notices; see `node::sim::mutants`.

/// Says whether a test has put this fault in; `false` in every other build.
#[cfg(test)]
macro_rules! mutated {
    ($fault:ident) => {
        $crate::node::sim::mutants::is_on($crate::node::sim::mutants::Mutant::$fault)
    };
}

/// Says whether a test has put this fault in; `false` in every other build.
#[cfg(not(test))]
macro_rules! mutated {
    ($fault:ident) => {
        false
    };
}

pub(crate) use mutated;
