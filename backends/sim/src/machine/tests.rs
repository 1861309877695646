use super::*;
use crate::machine::Constant;

const VA16: &str = include_str!("../../machines/va16.toml");

#[test]
fn built_in_machines_are_sound() {
    for name in Machine::names() {
        let machine = Machine::named(name).unwrap();
        assert_eq!(machine.name, name);
        assert_eq!(machine.topology().dies(), machine.dies() as usize);
        for (field, constant) in machine.constants() {
            assert!(constant.source.len() > 3, "{name}: {field} has no source");
        }
    }
    let va16 = Machine::named("va16").unwrap();
    assert_eq!(va16.dies(), 32, "8 cards of 4 dies");
    assert_eq!(va16.memory_bytes(), 32 << 30);
    assert!(va16.assumed().contains(&"die.memory_gb_s".to_string()), "it is not public");
    assert!(!va16.assumed().contains(&"die.memory_gib".to_string()));
}

#[test]
fn mistakes_are_named() {
    let line = |name: &str, with: &str| -> String {
        let lines: Vec<_> = VA16
            .lines()
            .map(|l| if l.starts_with(&format!("{name} =")) { with } else { l })
            .collect();
        lines.join("\n")
    };
    let constant = |name: &str, value: &str| line(name, &format!("{name} = {value}"));
    let section = |name: &str| {
        let (before, after) = VA16.split_once(&format!("[{name}]")).unwrap();
        format!("{before}{}", after.find("\n[").map_or("", |at| &after[at..]))
    };
    for (text, words) in [
        ("name = 3".to_string(), "name"),
        ("name = \"x".to_string(), "TOML parse error"),
        (VA16.replace("dies_per_card", "dies_on_card"), "unknown field `dies_on_card`"),
        (line("cores", ""), "missing field `cores`"),
        (constant("cores", "0"), "die.cores is 0, expected a positive number"),
        (constant("cores", "8.5"), "die.cores is 8.5, expected a whole number"),
        (constant("memory_gib", "-32"), "die.memory_gib is -32, expected a positive number"),
        (constant("memory_gb_s", "0"), "die.memory_gb_s is 0, expected a positive number"),
        (constant("memory_gb_s", "inf"), "die.memory_gb_s is inf"),
        (constant("memory_reach", "1.2"), "die.memory_reach is 1.2, expected a share"),
        (constant("cores", "\"many\""), "expected a number, or { value"),
        (constant("cores", "{ value = 8 }"), "missing field `provenance`"),
        (
            constant("cores", "{ value = 8, provenance = \"rumour\", source = \"x\" }"),
            "unknown variant `rumour`",
        ),
        (
            constant("cores", "{ value = 8, provenance = \"published\", source = \"\" }"),
            "die.cores is published but names no source",
        ),
        (constant("tile_rows", "[]"), "kernels.tile_rows is [], expected ascending"),
        (constant("tile_rows", "[64, 16]"), "kernels.tile_rows is [64, 16]"),
        (constant("memory_kib", "1"), "die.core.memory_kib is 1, but a tile of"),
        (constant("hosts", "0"), "system.hosts is 0"),
        (constant("hosts", "2"), "there are 2 hosts, but there is no [link.network]"),
        (section("link.on_card"), "a card has 4 dies, but there is no [link.on_card]"),
        (section("link.in_host"), "a host has 8 cards, but there is no [link.in_host]"),
        (section("link.host"), "missing field `host`"),
        ("based_on = \"va17\"".to_string(), "va16, h800"),
    ] {
        let error = Machine::parse(&text, "x.toml").unwrap_err().to_string();
        assert!(error.contains(words), "expected {words:?}: {error}");
    }
    let error = Machine::load("va17").unwrap_err().to_string();
    assert!(error.contains("va16, h800"), "{error}");
    assert!(matches!(Machine::load("no/such.toml"), Err(MachineError::Read { .. })));
}

#[test]
fn a_file_may_say_only_what_differs() {
    let text = "
        based_on = \"h200\"
        name = \"x1\"
        description = \"a chip that does not exist\"
        [die]
        memory_gb_s = 9000
        [link.network]
        gb_s = { value = 90, provenance = \"published\", source = \"data sheet\" }
    ";
    let (x1, h200) = (Machine::parse(text, "x1.toml").unwrap(), Machine::named("h200").unwrap());
    assert_eq!(x1.name, "x1");
    assert_eq!(x1.die.memory_gb_s.value, 9000.0);
    assert_eq!(x1.die.memory_gb_s.provenance, Provenance::Assumed, "a bare number is a guess");
    assert_eq!(x1.die.memory_gib, h200.die.memory_gib);
    assert_eq!(x1.link.network.as_ref().unwrap().gb_s.value, 90.0);
    assert_eq!(x1.link.in_host, h200.link.in_host);
    let wrong = Machine::parse(&text.replace("memory_gb_s", "memory_gbps"), "x1.toml");
    assert!(wrong.unwrap_err().to_string().contains("unknown field `memory_gbps`"));
}

#[test]
fn constants_are_found_by_name_and_changed() {
    for name in Machine::names() {
        let mut machine = Machine::named(name).unwrap();
        let all: Vec<(String, Constant)> =
            machine.constants().into_iter().map(|(n, c)| (n, c.clone())).collect();
        for (field, constant) in all {
            assert_eq!(machine.constant_mut(&field), Some(&mut constant.clone()), "{field}");
        }
        machine.constant_mut("die.memory_gb_s").unwrap().value = 1.0;
        assert_eq!(machine.die.memory_gb_s.value, 1.0);
        assert!(machine.constant_mut("die.colour").is_none());
    }
}

#[test]
fn machines_grow_by_hosts_where_hosts_are_joined() {
    let h800 = Machine::named("h800").unwrap();
    assert_eq!(h800.enlarged(2048).unwrap().dies(), 2048);
    assert_eq!(h800.enlarged(1).unwrap(), h800);
    assert!(h800.enlarged(1 << 20).unwrap_err().contains("too many"));
    let error = Machine::named("va16").unwrap().enlarged(33).unwrap_err();
    assert!(error.contains("at most 32 dies"), "{error}");
}
