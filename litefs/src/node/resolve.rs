//! Which nodes a peer of `lease.peers` stands for: itself, or all that its name has in DNS.
//!
//! | host | asked for | nodes |
//! |---|---|---|
//! | an address | nothing | one |
//! | a name | A and AAAA, as the system resolves names | one for each address, if there are several of a kind |
//! | a service, `_litefs._tcp.example.com` | SRV | one for each record, at its port |

use std::collections::HashMap;
use std::net::{IpAddr, SocketAddr};
use std::time::{Duration, Instant};

use anyhow::Context;
use hickory_resolver::TokioResolver;
use hickory_resolver::proto::rr::RData;
use parking_lot::Mutex;

use crate::config::NodeUrl;

/// How long an answer is good for: nodes come and go.
const KEEP: Duration = Duration::from_secs(1);
/// How long a name server may take.
const PATIENCE: Duration = Duration::from_secs(2);

/// Asks DNS, and remembers the answers for a moment.
pub(super) struct Resolver {
    known: Mutex<HashMap<NodeUrl, (Instant, Vec<NodeUrl>)>>,
    /// The one that is asked for services; the system's if there is none.
    services: Option<TokioResolver>,
}

impl Resolver {
    /// Asks whom the system asks.
    pub(super) fn new() -> Resolver {
        Resolver {
            known: Mutex::default(),
            services: None,
        }
    }

    /// Returns the URLs of the nodes behind a peer.
    ///
    /// # Errors
    /// The name has no addresses, or the name server does not answer.
    pub(super) async fn nodes(&self, peer: &NodeUrl) -> anyhow::Result<Vec<NodeUrl>> {
        if peer.host().parse::<IpAddr>().is_ok() {
            return Ok(vec![peer.clone()]);
        }
        let known = self.known.lock().get(peer).cloned();
        if let Some((since, nodes)) = known
            && since.elapsed() < KEEP
        {
            return Ok(nodes);
        }
        let asked = async {
            match peer.host().starts_with('_') {
                true => self.services(peer.host()).await,
                false => addresses(peer).await,
            }
        };
        let nodes = tokio::time::timeout(PATIENCE, asked)
            .await
            .context("no answer")
            .and_then(|nodes| nodes)
            .with_context(|| format!("look up {} in DNS", peer.host()))?;
        let mut known = self.known.lock();
        known.insert(peer.clone(), (Instant::now(), nodes.clone()));
        Ok(nodes)
    }

    async fn services(&self, name: &str) -> anyhow::Result<Vec<NodeUrl>> {
        let lookup = match &self.services {
            Some(resolver) => resolver.srv_lookup(name).await?,
            // Made anew: the system's settings may be others by now, and nothing is to be kept longer than here.
            None => {
                let system = TokioResolver::builder_tokio()?.build()?;
                system.srv_lookup(name).await?
            }
        };
        let node = |data: &RData| match data {
            RData::SRV(srv) => {
                let target = srv.target.to_utf8();
                Some(NodeUrl::new(target.trim_end_matches('.'), srv.port))
            }
            _ => None,
        };
        let answers = lookup.answers().iter();
        Ok(answers.filter_map(|record| node(&record.data)).collect())
    }
}

async fn addresses(peer: &NodeUrl) -> anyhow::Result<Vec<NodeUrl>> {
    let found = tokio::net::lookup_host((peer.host(), peer.port())).await?;
    Ok(nodes_at(peer, found))
}

/// Several addresses are several nodes; one of each kind is one node that is reached both ways.
fn nodes_at(peer: &NodeUrl, found: impl Iterator<Item = SocketAddr>) -> Vec<NodeUrl> {
    let (mut kinds, mut first_is_v6) = ([Vec::new(), Vec::new()], None);
    for ip in found.map(|address| address.ip()) {
        first_is_v6.get_or_insert(ip.is_ipv6());
        let kind = &mut kinds[usize::from(ip.is_ipv6())];
        if !kind.contains(&ip) {
            kind.push(ip);
        }
    }
    let [v4, v6] = kinds;
    let takes_v6 = v6.len() > v4.len() || v6.len() == v4.len() && first_is_v6 == Some(true);
    let kind = if takes_v6 { v6 } else { v4 };
    match kind.len() {
        0 => Vec::new(),
        1 => vec![peer.clone()],
        _ => kind
            .into_iter()
            .map(|ip| NodeUrl::new(ip.to_string(), peer.port()))
            .collect(),
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use hickory_resolver::config::{ConnectionConfig, NameServerConfig, ResolverConfig};
    use hickory_resolver::net::runtime::TokioRuntimeProvider;
    use hickory_resolver::proto::op::{Message, OpCode};
    use hickory_resolver::proto::rr::rdata::SRV;
    use hickory_resolver::proto::rr::{Name, Record};

    fn url(text: &str) -> NodeUrl {
        text.parse().unwrap()
    }

    fn shown(nodes: &[NodeUrl]) -> Vec<String> {
        nodes.iter().map(ToString::to_string).collect()
    }

    #[test]
    fn several_addresses_are_several_nodes() {
        let peer = url("http://nodes.internal:20202");
        for (found, nodes) in [
            (vec!["10.0.0.1"], vec!["http://nodes.internal:20202"]),
            (
                vec!["::1", "127.0.0.1"],
                vec!["http://nodes.internal:20202"],
            ),
            (
                vec!["10.0.0.1", "10.0.0.2", "10.0.0.1"],
                vec!["http://10.0.0.1:20202", "http://10.0.0.2:20202"],
            ),
            (
                vec!["fd00::1", "10.0.0.1", "fd00::2"],
                vec!["http://[fd00::1]:20202", "http://[fd00::2]:20202"],
            ),
            (
                vec!["10.0.0.1", "10.0.0.2", "fd00::1", "fd00::2"],
                vec!["http://10.0.0.1:20202", "http://10.0.0.2:20202"],
            ),
            (vec![], vec![]),
        ] {
            let found = found
                .iter()
                .map(|ip| (ip.parse::<IpAddr>().unwrap(), 1).into());
            assert_eq!(shown(&nodes_at(&peer, found)), nodes);
        }
    }

    /// A name server that answers each question with what `records` has at that moment.
    async fn name_server(
        records: std::sync::Arc<Mutex<Vec<(&'static str, u16)>>>,
    ) -> TokioResolver {
        let socket = tokio::net::UdpSocket::bind("127.0.0.1:0").await.unwrap();
        let port = socket.local_addr().unwrap().port();
        tokio::spawn(async move {
            let mut buffer = [0; 1500];
            while let Ok((len, from)) = socket.recv_from(&mut buffer).await {
                let asked = Message::from_vec(&buffer[..len]).unwrap();
                let mut answer = Message::response(asked.metadata.id, OpCode::Query);
                for query in asked.queries {
                    for (target, port) in records.lock().iter() {
                        let target = Name::from_ascii(target).unwrap();
                        let srv = RData::SRV(SRV::new(1, 1, *port, target));
                        answer.add_answer(Record::from_rdata(query.name().clone(), 0, srv));
                    }
                    answer.add_query(query);
                }
                let _ = socket.send_to(&answer.to_vec().unwrap(), from).await;
            }
        });
        let mut server = NameServerConfig::udp("127.0.0.1".parse().unwrap());
        server.connections = vec![ConnectionConfig::udp()];
        server.connections[0].port = port;
        let config = ResolverConfig::from_parts(None, Vec::new(), vec![server]);
        TokioResolver::builder_with_config(config, TokioRuntimeProvider::default())
            .build()
            .unwrap()
    }

    #[tokio::test]
    async fn a_service_is_looked_up_again() {
        let records = std::sync::Arc::new(Mutex::new(vec![("a.internal.", 20202)]));
        let resolver = Resolver {
            known: Mutex::default(),
            services: Some(name_server(records.clone()).await),
        };
        let peer = url("http://_litefs._tcp.internal:1");
        assert_eq!(
            shown(&resolver.nodes(&peer).await.unwrap()),
            ["http://a.internal:20202"]
        );
        records.lock().push(("b.internal.", 7));
        resolver.known.lock().clear();
        let mut nodes = shown(&resolver.nodes(&peer).await.unwrap());
        nodes.sort();
        assert_eq!(nodes, ["http://a.internal:20202", "http://b.internal:7"]);
        records.lock().clear();
        resolver.known.lock().clear();
        let error = resolver.nodes(&peer).await.unwrap_err();
        assert!(
            format!("{error:#}").contains("_litefs._tcp.internal"),
            "{error:#}"
        );
    }
}
