//! What `GET /info` answers: LiteFS's fields, and whether the node is ready.

use serde::{Deserialize, Serialize};

/// A node as it describes itself.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase", default)]
pub struct NodeInfo {
    /// The cluster's id; empty until one is known.
    #[serde(rename = "clusterID", skip_serializing_if = "String::is_empty")]
    pub cluster_id: String,
    /// Whether the node is the primary.
    pub is_primary: bool,
    /// Whether the node may be the primary.
    pub candidate: bool,
    /// The mount point.
    pub path: String,
    /// The primary, once one is known.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub primary: Option<PrimaryInfo>,
    /// Whether databases can be used; LiteFS does not say, and counts as ready.
    #[serde(default = "yes")]
    pub ready: bool,
}

/// The primary, as another node knows it.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(default)]
pub struct PrimaryInfo {
    /// Its host name.
    pub hostname: String,
}

const fn yes() -> bool {
    true
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn fields_are_named_as_in_litefs() {
        let info = NodeInfo {
            cluster_id: "LFSC0123456789ABCDEF".to_owned(),
            is_primary: true,
            candidate: true,
            path: "/litefs".to_owned(),
            primary: Some(PrimaryInfo {
                hostname: "a".to_owned(),
            }),
            ready: false,
        };
        let json = serde_json::to_string(&info).unwrap();
        let want = concat!(
            r#"{"clusterID":"LFSC0123456789ABCDEF","isPrimary":true,"candidate":true,"#,
            r#""path":"/litefs","primary":{"hostname":"a"},"ready":false}"#
        );
        assert_eq!(json, want);
        assert_eq!(serde_json::from_str::<NodeInfo>(&json).unwrap(), info);
    }

    #[test]
    fn a_litefs_node_counts_as_ready() {
        let info: NodeInfo = serde_json::from_str(r#"{"isPrimary":false,"more":1}"#).unwrap();
        assert!(info.ready && !info.is_primary && info.primary.is_none());
    }
}
