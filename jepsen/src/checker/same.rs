//! Guarantee: after healing all nodes come to one position and one content, and SQLite finds nothing wrong with it.

use super::{Anomaly, Evidence, anomaly};

const GUARANTEE: &str = "same";

/// Checks all databases.
#[must_use]
pub fn same(evidence: &Evidence) -> Vec<Anomaly> {
    let mut all = Vec::new();
    for (db, finals) in &evidence.finals {
        let first = finals.first();
        for (node, state) in finals.iter().enumerate() {
            let mut say =
                |text: String| all.push(anomaly(GUARANTEE, db, format!("n{node}: {text}")));
            if state.pos.is_none() {
                say("has no position".into());
            }
            if let Some(pos) = first.and_then(|f| f.pos.as_ref())
                && state.pos.as_ref().is_some_and(|other| other != pos)
            {
                say(format!("is at {:?}, n0 at {pos}", state.pos));
            }
            match &state.content {
                Err(error) => say(format!("cannot be read: {error}")),
                Ok(content) => {
                    if content.integrity != "ok" {
                        say(format!("integrity_check: {}", content.integrity));
                    }
                    if let Some(Ok(other)) = first.map(|f| &f.content)
                        && other != content
                    {
                        say(format!(
                            "holds {} rows, sum {:?}, crc {:08x}; n0 holds {}, {:?}, {:08x}",
                            content.ids.len(),
                            content.sum,
                            content.crc,
                            other.ids.len(),
                            other.sum,
                            other.crc
                        ));
                    }
                }
            }
        }
    }
    all
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::checker::tests::{evidence, holding};

    #[test]
    fn other_positions_contents_and_damage_are_found() {
        let mut other_pos = holding(&[]);
        other_pos.pos = Some("1/3".into());
        let mut no_pos = holding(&[]);
        no_pos.pos = None;
        let mut other_crc = holding(&[]);
        let mut damaged = holding(&[]);
        if let (Ok(a), Ok(b)) = (&mut other_crc.content, &mut damaged.content) {
            a.crc += 1;
            b.integrity = "row 1 missing from index".into();
        }
        let mut unreadable = holding(&[]);
        unreadable.content = Err("hangs".into());
        for bad in [
            other_pos,
            no_pos,
            other_crc,
            damaged,
            unreadable,
            holding(&[5]),
        ] {
            assert_ne!(same(&evidence(vec![], vec![holding(&[]), bad])), []);
        }
        assert_eq!(
            same(&evidence(vec![], vec![holding(&[]), holding(&[])])),
            []
        );
    }
}
