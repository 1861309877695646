//! Files that are damaged, cut off, of another kind, or made to do harm: an error with its place,
//! never a panic, never memory for a length that only the file claims.

mod common;

use common::{record, records, replayed, small_program};
use proptest::prelude::*;
use replay::file::{Reader, Writer};
use replay::record::Record;
use replay::{Header, Options, Problem, ReplayError, Report};
use serde_json::Value;
use sim::{Mode, System};
use std::io::Cursor;
use std::sync::LazyLock;
use std::time::Duration;

static FILE: LazyLock<Vec<u8>> = LazyLock::new(|| {
    record(
        (Mode::Full, 2, true),
        |_| {},
        |bench| {
            small_program(bench);
            two_ranks(bench);
        },
    )
});

static SYSTEM: LazyLock<System> = LazyLock::new(|| common::system(Mode::Full));

fn two_ranks(bench: &common::Bench) {
    let id = bench.dies[0].communicator_id().unwrap();
    let mut results = Vec::new();
    for (rank, die) in bench.dies.iter().enumerate() {
        let stream = die.stream("comm").unwrap();
        let communicator = die.communicator(id, rank, 2).unwrap();
        let (send, recv) =
            (common::floats(&*stream, &[4], 1.0), common::floats(&*stream, &[8], 0.0));
        let batch = [hal::Collective::AllGather { send, recv: recv.clone() }];
        stream.submit_collectives(&communicator, &batch, &"gather".into()).unwrap();
        results.push((stream, recv, communicator));
    }
    for (stream, recv, _) in &results {
        common::read(&**stream, recv);
    }
}

fn play(file: &[u8]) -> Result<Report, ReplayError> {
    let options = Options { timeout: Duration::from_millis(100), ..Options::default() };
    replayed(file, &SYSTEM, |_| {}, &options)
}

/// The error of a file that must be refused: its place, and what is wrong.
fn refused(file: &[u8]) -> (u64, Problem) {
    match play(file) {
        Err(ReplayError::Format(error)) => (error.offset, error.problem),
        Err(other) => panic!("{other}"),
        Ok(report) => panic!("replayed: {report:#?}"),
    }
}

static PAYLOADS: LazyLock<Vec<Vec<u8>>> = LazyLock::new(|| {
    let mut reader = Reader::new(Cursor::new(&**FILE)).unwrap();
    while reader.next_record().unwrap().is_some() {}
    let payload = |n| reader.payload(n).unwrap().map(<[u8]>::to_vec);
    (0..).map_while(payload).collect()
});

/// A file of these records and the payloads of the small program, with right checksums.
fn file_of(records: &[Record]) -> Vec<u8> {
    let mut writer = Writer::new(Vec::new(), &Header::default()).unwrap();
    for (number, bytes) in PAYLOADS.iter().enumerate() {
        assert_eq!(writer.payload(bytes).unwrap(), number as u64);
    }
    records.iter().for_each(|record| writer.record(record).unwrap());
    writer.into_inner().unwrap()
}

#[test]
fn other_files_and_versions_have_their_own_errors() {
    assert!(matches!(refused(b""), (0, Problem::NotARecording)));
    assert!(matches!(refused(b"{\"model\": 1}"), (0, Problem::NotARecording)));
    let mut newer = FILE.clone();
    newer[8] = 9;
    let (offset, problem) = refused(&newer);
    assert!(matches!(problem, Problem::Version { found: 9 }));
    assert_eq!(offset, 8);
    assert!(problem.to_string().contains("version 9, this program reads 1"), "{problem}");
    let mut longer = FILE.clone();
    longer.extend_from_slice(&FILE[12..]);
    let (offset, problem) = refused(&longer);
    assert_eq!(offset, FILE.len() as u64);
    assert!(problem.to_string().contains("follows the end record"), "{problem}");
}

#[test]
fn a_length_that_the_file_does_not_have_costs_nothing() {
    let start = file_of(&[]);
    for claimed in [1 << 20, 1 << 40, (1 << 63) - 1] {
        let mut file = start.clone();
        file.push(b'P');
        let mut length: u64 = claimed;
        while length >= 0x80 {
            file.push(length as u8 | 0x80);
            length >>= 7;
        }
        file.push(length as u8);
        file.extend_from_slice(&[7; 100]);
        let (offset, problem) = refused(&file);
        assert!(matches!(problem, Problem::Truncated), "{problem}");
        assert_eq!(offset, start.len() as u64);
    }
    let mut file = start.clone();
    file.extend_from_slice(&[b'P', 0xff, 0xff, 0xff, 0xff, 0xff, 0xff, 0xff, 0xff, 0xff, 0xff, 1]);
    assert!(refused(&file).1.to_string().contains("too many digits"));
}

#[test]
fn numbers_that_mean_nothing_are_named() {
    let all = records(&FILE);
    let lacks = |keep: fn(&Value) -> bool| {
        let keep = |r: &&Record| keep(&serde_json::to_value(&r.call).unwrap());
        let kept: Vec<Record> = all.iter().filter(keep).cloned().collect();
        refused(&file_of(&kept)).1.to_string()
    };
    for (text, words) in [
        (lacks(|call| call.get("die").is_none()), "die 0 was not opened"),
        (lacks(|call| call.get("stream").is_none()), "there is no stream 0"),
        (lacks(|call| call.get("alloc").is_none()), "there is no buffer 0"),
        (lacks(|call| call.get("define").is_none()), "there is no command 0"),
        (lacks(|call| call.get("join").is_none()), "there is no communicator 0"),
        (lacks(|call| call.get("write").is_none()), "has come to"),
    ] {
        assert!(text.contains(words), "{text:?} lacks {words:?}");
    }
}

/// A number in a JSON value, chosen by counting.
fn nth_number<'v>(value: &'v mut Value, nth: &mut usize) -> Option<&'v mut Value> {
    match value {
        Value::Number(_) if *nth == 0 => Some(value),
        Value::Number(_) => {
            *nth -= 1;
            None
        }
        Value::Array(items) => items.iter_mut().find_map(|item| nth_number(item, nth)),
        Value::Object(map) => map.values_mut().find_map(|item| nth_number(item, nth)),
        _ => None,
    }
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 400, failure_persistence: None, ..ProptestConfig::default() })]

    #[test]
    fn a_file_that_is_cut_off_says_where(at in 0..FILE.len()) {
        let (offset, problem) = refused(&FILE[..at]);
        prop_assert!(offset <= at as u64);
        let known = matches!(
            problem,
            Problem::NotARecording | Problem::Truncated | Problem::Unfinished | Problem::Invalid(_)
        );
        prop_assert!(known, "{}", problem);
    }

    #[test]
    fn every_changed_byte_is_found(at in 0..FILE.len(), flip in 1..=255u8) {
        let mut file = FILE.clone();
        file[at] ^= flip;
        let (offset, _) = refused(&file);
        prop_assert!(offset <= at as u64, "byte {} found at {}", at, offset);
    }

    #[test]
    fn records_that_make_no_sense_do_no_harm(
        at in 0..records(&FILE).len(),
        mut nth in 0..30usize,
        new in prop_oneof![
            Just(0u64), Just(1), Just(3), Just(255), Just(1 << 31), Just(u64::from(u32::MAX)),
            Just(1 << 40), Just(1 << 63), Just(u64::MAX), 0..100u64
        ],
        way in 0..4u8,
    ) {
        let mut all = records(&FILE);
        match way {
            0 => drop(all.remove(at)),
            1 => all.insert(at, all[at].clone()),
            2 => { let other = (at * 7 + 3) % all.len(); all.swap(at, other); }
            _ => {
                let mut json = serde_json::to_value(&all[at]).unwrap();
                if let Some(number) = nth_number(&mut json, &mut nth) {
                    *number = new.into();
                }
                // What does not even parse is refused by the reader.
                if let Ok(record) = serde_json::from_value(json) {
                    all[at] = record;
                }
            }
        }
        let file = file_of(&all);
        match play(&file) {
            Ok(report) => prop_assert!(report.recorded_commands as usize <= all.len() + 1),
            Err(ReplayError::Format(error)) => prop_assert!(error.offset <= file.len() as u64),
            // A die that this machine does not have.
            Err(error) => prop_assert!(error.to_string().contains("cannot be opened")),
        }
        let mut reader = Reader::new(Cursor::new(&file)).unwrap();
        let mut text = Vec::new();
        let _ = replay::dump(&mut reader, true, &mut text);
        prop_assert!(!text.is_empty());
    }
}
