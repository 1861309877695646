//! Collectives, and exchanges between experts.

use super::{Answer, Precision, Question, fits, positive};
use crate::cost::Exchanged;
use crate::cost::network::{MoeExchange, MoeMode};
use crate::cost::tile::TileModel;
use crate::machine::Machine;
use hal::{CollectiveKind, DeviceId, LinkKind};

pub(super) fn collective(
    machine: &Machine,
    kind: CollectiveKind,
    ranks: u64,
    bytes: u64,
) -> Result<Answer, String> {
    if ranks < 2 {
        return Err(format!("a collective of {ranks} rank(s) moves nothing; expected at least 2"));
    }
    let point = matches!(kind, CollectiveKind::Send | CollectiveKind::Recv);
    if point && ranks != 2 {
        return Err(format!("{} joins 2 ranks, not {ranks}", kind.name()));
    }
    if bytes == 0 {
        return Err("bytes is 0: there is nothing to move; expected at least 1".into());
    }
    fits(machine, bytes as f64)?;
    let ranks = u32::try_from(ranks).map_err(|_| format!("{ranks} ranks are too many"))?;
    let machine = machine.enlarged(ranks)?;
    let ids: Vec<DeviceId> = (0..ranks).map(DeviceId).collect();
    let topology = machine.topology();
    let model = TileModel::new(&machine);
    let told = model.network().collective(&Exchanged { kind, bytes, rows: 0 }, &ids, &topology);
    // What a rank sends or receives at least, over all of its ports at once.
    let kinds = [LinkKind::OnCard, LinkKind::InHost, LinkKind::Network];
    let reached = |kind| ids[1..].iter().any(|&to| topology.kind(ids[0], to) == Some(kind));
    let ports: f64 = kinds
        .into_iter()
        .filter(|&kind| reached(kind))
        .filter_map(|kind| machine.link(kind))
        .map(|link| link.gb_s.value * 1e9)
        .sum();
    let share = match kind {
        CollectiveKind::AllReduce => 2.0 * f64::from(ranks - 1) / f64::from(ranks),
        CollectiveKind::Broadcast | CollectiveKind::Send | CollectiveKind::Recv => 1.0,
        _ => f64::from(ranks - 1) / f64::from(ranks),
    };
    let seconds = told.picos as f64 * 1e-12;
    Ok(Answer {
        time_us: told.picos as f64 * 1e-6,
        tflops: 0.0,
        gb_per_s: bytes as f64 / seconds * 1e-9,
        bound: told.bound.name(),
        mapping: told.algorithm.to_string(),
        floor_us: share * bytes as f64 / ports * 1e6,
        gap_us: machine.launch.device_us.value,
        picos: told.picos,
    })
}

pub(super) fn moe(machine: &Machine, question: &Question) -> Result<Answer, String> {
    let Question::Moe {
        combine: _,
        ep,
        tokens,
        top_k,
        hidden,
        dtype,
        low_latency,
        experts,
        host_limit,
        network_only,
    } = *question
    else {
        return Err("not an exchange".into());
    };
    let sizes =
        [("tokens", tokens), ("top-k", top_k), ("hidden", hidden), ("host limit", host_limit)];
    positive(&sizes)?;
    if ep < 2 {
        return Err(format!(
            "ep is {ep}: experts on one rank exchange nothing; expected at least 2"
        ));
    }
    let ranks = u32::try_from(ep).map_err(|_| format!("ep is {ep}: too many ranks"))?;
    let host = machine.dies_per_host();
    let machine = machine.enlarged(ranks)?;
    if ranks > host && ranks % host != 0 {
        return Err(format!(
            "ep is {ep}, but a host of {} has {host} dies: expected a multiple of {host}, or less",
            machine.name
        ));
    }
    let experts = experts.unwrap_or_else(|| 256u64.next_multiple_of(ep));
    if experts % ep != 0 || experts > u64::from(u32::MAX) {
        return Err(format!(
            "{experts} experts do not divide over {ep} ranks; {} would, with redundant experts",
            experts.next_multiple_of(ep)
        ));
    }
    if top_k > experts {
        return Err(format!("top-k is {top_k}, but there are {experts} experts"));
    }
    if dtype == Precision::Fp8 && hidden % 128 != 0 {
        return Err(format!(
            "hidden is {hidden}: FP8 tokens have a scale for each 128 elements, so it must be a \
             multiple of 128"
        ));
    }
    if network_only && machine.link.network.is_none() {
        return Err(format!("{} has no network", machine.name));
    }
    let small =
        |name: &str, v: u64| u32::try_from(v).map_err(|_| format!("{name} {v} is too large"));
    let exchange = MoeExchange {
        mode: if low_latency { MoeMode::LowLatency } else { MoeMode::Throughput },
        ep: ranks,
        tokens: small("tokens", tokens)?,
        top_k: small("top-k", top_k)?,
        hidden: small("hidden", hidden)?,
        element_bytes: dtype.dtype().size() as u32,
        experts: experts as u32,
        host_limit: small("host limit", host_limit)?,
        network_only,
    };
    let copies = tokens as f64 * top_k as f64 * exchange.token_bytes();
    fits(&machine, copies)?;
    let model = TileModel::new(&machine);
    let told = model.network().moe(&exchange);
    let seconds = told.picos as f64 * 1e-12;
    Ok(Answer {
        time_us: told.picos as f64 * 1e-6,
        tflops: 0.0,
        gb_per_s: told.logical_bytes / seconds * 1e-9,
        bound: if told.link_bound { "link" } else { "launch" },
        mapping: told.mapping,
        floor_us: told.link_seconds * 1e6,
        gap_us: machine.launch.device_us.value,
        picos: told.picos,
    })
}
