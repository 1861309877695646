use super::*;

fn time(machine: &Machine, kind: CollectiveKind, ranks: u32, bytes: u64) -> Exchange {
    let machine = machine.enlarged(ranks).unwrap();
    let ids: Vec<_> = (0..ranks).map(DeviceId).collect();
    let what = Exchanged { kind, bytes, rows: 0 };
    Network::new(&machine).collective(&what, &ids, &machine.topology())
}

#[test]
fn small_is_latency_and_large_is_bandwidth() {
    let h800 = Machine::named("h800").unwrap();
    let small = time(&h800, CollectiveKind::AllReduce, 8, 16 << 10);
    assert!(small.picos < 12_000_000, "{small:?}");
    assert!(small.algorithm.starts_with("one-shot"), "{small:?}");
    // A ring moves 2 (n-1)/n of the bytes over each port; no algorithm moves less.
    let bytes = 1u64 << 30;
    let large = time(&h800, CollectiveKind::AllReduce, 8, bytes);
    let floor = 2.0 * 7.0 / 8.0 * bytes as f64 / 160e9 * 1e12;
    assert!((1.0..1.01).contains(&(large.picos as f64 / floor)), "{large:?} {floor}");
    // Between hosts every network port works, for a shard of an eighth.
    let across = time(&h800, CollectiveKind::AllReduce, 32, bytes);
    let network = 2.0 * 3.0 / 4.0 * bytes as f64 / 8.0 / 46e9 * 1e12;
    assert!(across.picos as f64 > network && across.picos < 2 * large.picos, "{across:?}");
}

#[test]
fn the_dies_of_a_card_share_its_port() {
    let mut va16 = Machine::named("va16").unwrap();
    // What a die adds to its host's others: 28 of 32 shares, four dies through one port.
    let bytes = 64u64 << 20;
    let shared = time(&va16, CollectiveKind::AllToAll, 32, bytes).picos as f64;
    va16.link.in_host.as_mut().unwrap().shared_by = None;
    let alone = time(&va16, CollectiveKind::AllToAll, 32, bytes).picos as f64;
    assert!((3.8..4.1).contains(&(shared / alone)), "{shared} {alone}");
}

#[test]
fn more_ranks_and_bytes_never_take_less_and_wider_links_never_more() {
    for name in Machine::names() {
        let machine = Machine::named(name).unwrap();
        let most = if machine.link.network.is_some() { 64 } else { machine.dies() };
        for kind in [
            CollectiveKind::AllReduce,
            CollectiveKind::AllGather,
            CollectiveKind::ReduceScatter,
            CollectiveKind::AllToAll,
            CollectiveKind::Broadcast,
        ] {
            for ranks in [2, 4, 8, 32, 64].into_iter().filter(|&r| r <= most) {
                let mut before = 0;
                for bytes in [1u64, 1 << 10, 1 << 16, 1 << 20, 1 << 26, 1 << 30] {
                    let now = time(&machine, kind, ranks, bytes);
                    assert!(now.picos >= before, "{name} {kind:?} {ranks} {bytes}");
                    before = now.picos;
                    for field in ["in_host", "on_card", "network"] {
                        for (what, factor) in [("gb_s", 1.5), ("latency_us", 0.5)] {
                            let mut better = machine.clone();
                            let field = format!("link.{field}.{what}");
                            let Some(constant) = better.constant_mut(&field) else { continue };
                            constant.value *= factor;
                            let faster = time(&better, kind, ranks, bytes);
                            assert!(faster.picos <= now.picos, "{name} {kind:?} {ranks} {field}");
                        }
                    }
                }
            }
        }
    }
}

#[test]
fn two_thousand_ranks_are_a_quick_question() {
    let h800 = Machine::named("h800").unwrap();
    let small = time(&h800, CollectiveKind::AllReduce, 256, 1 << 20);
    let large = time(&h800, CollectiveKind::AllReduce, 2048, 1 << 20);
    assert!(small.picos < large.picos && large.picos < 20 * small.picos, "{small:?} {large:?}");
}
