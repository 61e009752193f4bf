//! What a client has seen: a position per database, as text that a cookie, a header and a URL can carry.
//!
//! ```text
//! app.db:000000000000001f/9c1f5ac3a81f3f4e@3~tenants/7.db:...      by name; TXID, checksum, tenure in hex
//! 000000000000001f                                                 LiteFS's, where the proxy has one database
//! ```
//! The tenure is what tells histories apart: a transaction of an older one, which a newer one does not have, was lost.
//! Where tenure and TXID are equal, the checksum tells.

use std::collections::BTreeMap;
use std::fmt::Write as _;

use crate::ltx::{Checksum, Pos, Txid};
use crate::replication::DbName;

/// Name of the cookie, as in LiteFS.
pub const COOKIE: &str = "__txid";
/// Name of the header, both ways.
pub const HEADER: &str = "litefs-position";
/// Longest text that is read or written: a cookie may have 4096 bytes with its name and attributes.
pub const MAX_LEN: usize = 3500;
/// Most databases in one token.
pub const MAX_DATABASES: usize = 40;

/// How far one database was seen.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Seen {
    /// Last transaction.
    pub txid: Txid,
    /// Checksum then, if it is known.
    pub checksum: Option<Checksum>,
    /// Tenure of that transaction, if it is known.
    pub epoch: Option<u64>,
}

/// Where a database is on a node.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Standing {
    /// Its position.
    pub pos: Pos,
    /// Tenure of its last transaction.
    pub epoch: u64,
    /// When that was committed, by the primary's clock, in milliseconds since 1970.
    pub timestamp_ms: i64,
}

impl From<Standing> for Seen {
    fn from(at: Standing) -> Seen {
        Seen {
            txid: at.pos.txid,
            checksum: Some(at.pos.post_apply_checksum),
            epoch: Some(at.epoch),
        }
    }
}

impl Seen {
    /// Whether a node where the database is `at` has all of this that is left of it.
    #[must_use]
    pub fn is_in(&self, at: &Standing) -> bool {
        let is_same = self.txid == at.pos.txid
            && self
                .checksum
                .is_none_or(|sum| sum == at.pos.post_apply_checksum);
        match self.epoch {
            // The node that began the later tenure had all of the earlier one that was left.
            Some(epoch) if epoch < at.epoch => true,
            Some(epoch) if epoch > at.epoch => is_same && self.checksum.is_some(),
            _ => is_same || self.txid < at.pos.txid,
        }
    }

    /// Whether the primary, which has seen `there`, does not have it: so nobody will.
    #[must_use]
    pub fn is_lost(&self, there: &Seen) -> bool {
        let at = Standing {
            pos: Pos {
                txid: there.txid,
                post_apply_checksum: there.checksum.unwrap_or(Checksum::EMPTY),
            },
            epoch: there.epoch.unwrap_or_default(),
            timestamp_ms: 0,
        };
        self.epoch <= there.epoch && !self.is_in(&at)
    }

    /// Whether it is of a later time than another of the same database.
    fn is_after(&self, other: &Seen) -> bool {
        match (self.epoch, other.epoch) {
            (Some(a), Some(b)) if a != b => a > b,
            _ => self.txid > other.txid,
        }
    }

    fn write(&self, text: &mut String) {
        // Writing to a string does not fail.
        let _ = write!(text, "{}", self.txid);
        if let Some(checksum) = self.checksum {
            let _ = write!(text, "/{checksum}");
        }
        if let Some(epoch) = self.epoch {
            let _ = write!(text, "@{epoch:x}");
        }
    }

    /// Reads `TXID`, `TXID/CHECKSUM` and either with `@TENURE`.
    fn parse(text: &str) -> Option<Seen> {
        let (pos, epoch) = match text.split_once('@') {
            None => (text, None),
            Some((pos, epoch)) => {
                let is_hex = !epoch.is_empty()
                    && epoch.len() <= 16
                    && epoch.bytes().all(|b| b.is_ascii_hexdigit());
                (
                    pos,
                    Some(is_hex.then(|| u64::from_str_radix(epoch, 16).ok())??),
                )
            }
        };
        let (txid, checksum) = match pos.split_once('/') {
            None => (pos, None),
            Some((txid, checksum)) => (txid, Some(checksum.parse().ok()?)),
        };
        Some(Seen {
            txid: txid.parse().ok()?,
            checksum,
            epoch,
        })
    }
}

/// Text that is no token.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error("{text:?} is no position: {why}")]
pub struct TokenError {
    text: String,
    why: &'static str,
}

/// Positions by database, in the order of their names.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Token(BTreeMap<DbName, Seen>);

impl Token {
    /// Reads a token; `only` is the database that a text without a name is about.
    ///
    /// # Errors
    /// Says what is wrong with the text.
    pub fn parse(text: &str, only: Option<&DbName>) -> Result<Token, TokenError> {
        let error = |why| TokenError {
            text: text.chars().take(60).collect(),
            why,
        };
        if text.len() > MAX_LEN {
            return Err(error("it is longer than 3500 bytes"));
        }
        let mut seen = BTreeMap::new();
        for part in text.split('~') {
            if seen.len() >= MAX_DATABASES {
                return Err(error("it names more than 40 databases"));
            }
            let (name, pos) = match part.split_once(':') {
                Some((name, pos)) => {
                    let name = decode(name).and_then(|name| name.parse().ok());
                    (
                        name.ok_or_else(|| error("a name in it cannot be one of a database"))?,
                        pos,
                    )
                }
                None => {
                    let why =
                        "without a name, it can only be used where the proxy has one database";
                    (only.ok_or_else(|| error(why))?.clone(), part)
                }
            };
            let why = "write NAME:TXID/CHECKSUM, the TXID as 16 hexadecimal digits";
            let pos = Seen::parse(pos).ok_or_else(|| error(why))?;
            if seen.insert(name, pos).is_some() {
                return Err(error("it names a database twice"));
            }
        }
        Ok(Token(seen))
    }

    /// Of one database.
    #[must_use]
    pub fn of(db: DbName, seen: Seen) -> Token {
        Token(BTreeMap::from([(db, seen)]))
    }

    /// Takes what is later in `other`.
    pub fn merge(&mut self, other: Token) {
        for (db, seen) in other.0 {
            self.advance(db, seen);
        }
    }

    /// Takes a position, unless there is a later one.
    pub fn advance(&mut self, db: DbName, seen: Seen) {
        match self.0.entry(db) {
            std::collections::btree_map::Entry::Vacant(entry) => drop(entry.insert(seen)),
            std::collections::btree_map::Entry::Occupied(mut entry) => {
                let old = entry.get_mut();
                // The same transaction, by whoever knows more about it.
                if seen.is_after(old) || (seen.txid == old.txid && !old.is_after(&seen)) {
                    *old = seen;
                }
            }
        }
    }

    /// Takes a position, whatever it was before.
    pub fn set(&mut self, db: DbName, seen: Seen) {
        self.0.insert(db, seen);
    }

    /// Keeps the databases for which `keep` says so.
    pub fn retain(&mut self, mut keep: impl FnMut(&DbName, &Seen) -> bool) {
        self.0.retain(|db, seen| keep(db, seen));
    }

    /// What is known of a database.
    #[must_use]
    pub fn get(&self, db: &DbName) -> Option<&Seen> {
        self.0.get(db)
    }

    /// All of it.
    pub fn iter(&self) -> impl Iterator<Item = (&DbName, &Seen)> {
        self.0.iter()
    }

    /// Whether it is about nothing.
    #[must_use]
    pub fn is_empty(&self) -> bool {
        self.0.is_empty()
    }

    /// How many databases it is about.
    #[must_use]
    pub fn len(&self) -> usize {
        self.0.len()
    }

    /// Writes it, as much of it as fits.
    #[must_use]
    pub fn to_text(&self) -> String {
        let mut text = String::with_capacity(64 * self.0.len());
        for (db, seen) in self.0.iter().take(MAX_DATABASES) {
            let before = text.len();
            if before > 0 {
                text.push('~');
            }
            encode(db.as_str(), &mut text);
            text.push(':');
            seen.write(&mut text);
            if text.len() > MAX_LEN {
                text.truncate(before);
                break;
            }
        }
        text
    }
}

/// Writes a name so that a cookie can carry it, and no part of it looks like what stands between.
pub(super) fn encode(name: &str, text: &mut String) {
    for byte in name.bytes() {
        match byte {
            b'A'..=b'Z' | b'a'..=b'z' | b'0'..=b'9' | b'-' | b'.' | b'_' | b'/' => {
                text.push(char::from(byte));
            }
            _ => {
                let _ = write!(text, "%{byte:02X}");
            }
        }
    }
}

/// Reads such a name.
pub(super) fn decode(text: &str) -> Option<String> {
    let mut bytes = Vec::with_capacity(text.len());
    let mut rest = text.as_bytes();
    while let [first, tail @ ..] = rest {
        if *first != b'%' {
            bytes.push(*first);
            rest = tail;
            continue;
        }
        let [high, low, tail @ ..] = tail else {
            return None;
        };
        let digit = |b: &u8| char::from(*b).to_digit(16);
        bytes.push(u8::try_from(digit(high)? * 16 + digit(low)?).ok()?);
        rest = tail;
    }
    String::from_utf8(bytes).ok()
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    fn db(name: &str) -> DbName {
        name.parse().unwrap()
    }

    fn seen(txid: u64, checksum: u64, epoch: u64) -> Seen {
        Seen {
            txid: Txid(txid),
            checksum: Some(Checksum::new(checksum)),
            epoch: Some(epoch),
        }
    }

    fn at(txid: u64, checksum: u64, epoch: u64) -> Standing {
        Standing {
            pos: Pos {
                txid: Txid(txid),
                post_apply_checksum: Checksum::new(checksum),
            },
            epoch,
            timestamp_ms: 0,
        }
    }

    #[test]
    fn texts() {
        let text = "a%20b.db:000000000000001f/8000000000000005@3~t/7.db:0000000000000002";
        let token = Token::parse(text, None).unwrap();
        assert_eq!(token.get(&db("a b.db")), Some(&seen(31, 5, 3)));
        assert_eq!(token.to_text(), text);
        let of_litefs = Token::parse("000000000000001f", Some(&db("app.db"))).unwrap();
        let bare = of_litefs.get(&db("app.db")).unwrap();
        assert_eq!(
            (bare.txid, bare.checksum, bare.epoch),
            (Txid(31), None, None)
        );
        let pos = Token::parse("000000000000001f/8000000000000005", Some(&db("app.db")));
        assert_eq!(
            pos.unwrap().to_text(),
            "app.db:000000000000001f/8000000000000005"
        );
    }

    #[test]
    fn order_of_texts_is_order_of_positions() {
        let text = |txid| Token::of(db("a"), seen(txid, 1, 1)).to_text();
        assert!(text(0xf) < text(0x10) && text(0xffff) < text(0x1_0000));
    }

    #[test]
    fn what_is_no_token_is_refused() {
        let app = db("app.db");
        let long = "a".repeat(MAX_LEN + 1);
        let many = ["x:0000000000000001"; 2].join("~");
        let most: Vec<String> = (0..41).map(|i| format!("d{i}:0000000000000001")).collect();
        let most = most.join("~");
        for bad in [
            "",
            "1f",
            "~",
            ":",
            "a:",
            "a:1",
            ":0000000000000001",
            "../x:0000000000000001",
            "a:000000000000000g",
            "a:0000000000000001@",
            "a:0000000000000001@zz",
            "a:0000000000000001@00000000000000001",
            "a:0000000000000001/1",
            "a%:0000000000000001",
            "a%zz:0000000000000001",
            "a%ff:0000000000000001",
            "%00:0000000000000001",
            "a:0000000000000001~",
            "+000000000000001",
            "-000000000000001",
            "a:0000000000000001;",
            &long,
            &many,
            &most,
        ] {
            assert!(Token::parse(bad, Some(&app)).is_err(), "{bad}");
        }
        assert!(Token::parse("000000000000001f", None).is_err());
        let most_there_are = (0..40).map(|i| format!("d{i}:0000000000000001"));
        assert!(Token::parse(&most_there_are.collect::<Vec<_>>().join("~"), None).is_ok());
    }

    #[test]
    fn what_a_node_has() {
        for (token, here, want) in [
            (seen(5, 1, 1), at(5, 1, 1), true),
            (seen(5, 1, 1), at(6, 2, 1), true),
            (seen(5, 1, 1), at(4, 2, 1), false),
            // Another history of the same tenure.
            (seen(5, 1, 1), at(5, 2, 1), false),
            // A later tenure has all that is left of an earlier one, though it be less.
            (seen(5, 1, 1), at(3, 2, 2), true),
            // A branch of an earlier tenure may be longer, and is not it.
            (seen(5, 1, 2), at(9, 2, 1), false),
            // The same position, whatever a page copy said of its tenure.
            (seen(5, 1, 2), at(5, 1, 1), true),
        ] {
            assert_eq!(token.is_in(&here), want, "{token:?} {here:?}");
        }
        let of_litefs = Seen {
            txid: Txid(5),
            checksum: None,
            epoch: None,
        };
        assert!(of_litefs.is_in(&at(5, 9, 9)) && of_litefs.is_in(&at(6, 9, 1)));
        assert!(!of_litefs.is_in(&at(4, 9, 9)));
    }

    #[test]
    fn what_the_primary_does_not_have_is_lost() {
        for (token, there, want) in [
            (seen(5, 1, 1), seen(5, 1, 1), false),
            (seen(5, 1, 1), seen(4, 1, 1), true),
            (seen(5, 1, 1), seen(5, 2, 1), true),
            (seen(5, 1, 1), seen(3, 1, 2), false),
            // Who says so is of an older tenure.
            (seen(5, 1, 2), seen(4, 1, 1), false),
        ] {
            assert_eq!(token.is_lost(&there), want, "{token:?} {there:?}");
        }
    }

    #[test]
    fn merging_keeps_what_is_later() {
        let mut token = Token::of(db("a"), seen(5, 1, 1));
        token.merge(Token::of(db("a"), seen(4, 2, 1)));
        assert_eq!(token.get(&db("a")), Some(&seen(5, 1, 1)));
        token.merge(Token::of(db("a"), seen(4, 2, 2)));
        assert_eq!(token.get(&db("a")), Some(&seen(4, 2, 2)));
        token.merge(Token::of(db("b"), seen(1, 1, 1)));
        assert_eq!(token.len(), 2);
        token.set(db("a"), seen(1, 1, 1));
        assert_eq!(token.get(&db("a")), Some(&seen(1, 1, 1)));
    }

    #[test]
    fn a_text_that_would_be_too_long_is_cut_between_databases() {
        let mut token = Token::default();
        for i in 0..60 {
            token.set(db(&format!("{}{i:02}", "n".repeat(200))), seen(i, i, i));
        }
        let text = token.to_text();
        assert!(text.len() <= MAX_LEN);
        let back = Token::parse(&text, None).unwrap();
        assert!(back.len() > 10 && back.iter().all(|(db, seen)| token.get(db) == Some(seen)));
    }

    proptest! {
        #[test]
        fn any_text_is_read_without_harm(text in "\\PC{0,80}") {
            let _ = Token::parse(&text, Some(&db("a")));
        }

        #[test]
        fn what_is_written_is_read_again(name in "[^\u{0}/.]{1,20}", txid: u64, sum: u64, epoch: u64) {
            let token = Token::of(db(&name), seen(txid, sum, epoch));
            let text = token.to_text();
            let is_cookie = |b: u8| b.is_ascii_graphic() && !b"\",;\\".contains(&b);
            prop_assert!(text.bytes().all(is_cookie));
            prop_assert_eq!(Token::parse(&text, None).unwrap(), token);
        }
    }
}
