//! What launching a list costs: a hundred small ops as one list, and one by one; on one die, and
//! on each of 32 in turn, where nothing that a command looks at is in a cache any more.

use criterion::{Criterion, Throughput, criterion_group, criterion_main};
use hal::op::Add;
use hal::{CommandList, DType, Device, DeviceId, Entry, ListAction, Op, Stream};
use sim::{Machine, Mode, Options, System};
use std::sync::Arc;
use std::time::Duration;

const COMMANDS: usize = 100;
const LONG: Duration = Duration::from_secs(60);

struct Die {
    device: Arc<dyn Device>,
    stream: Arc<dyn Stream>,
    list: CommandList,
}

/// A die and a list of adds, each with a buffer of its own besides the sum.
fn die(system: &System, number: u32) -> Die {
    let device = system.open(DeviceId(number)).unwrap();
    let stream = device.stream("bench").unwrap();
    let tensor = || {
        let tensor = stream.alloc_tensor(DType::F32, &[256]).unwrap();
        stream.fill(&tensor.region(), 0).unwrap();
        tensor
    };
    let sum = tensor();
    let add = |_| {
        let op: Op = Add { a: sum.clone(), b: tensor(), out: sum.clone() }.into();
        Entry { stream: 0, action: ListAction::Op(Box::new(op.label("add".to_string()))) }
    };
    let list = CommandList::new((0..COMMANDS).map(add).collect(), 1).unwrap();
    Die { device, stream, list }
}

fn lists(c: &mut Criterion) {
    let options = Options { mode: Mode::Full, threads: None };
    let system = System::new(Machine::named("va16").unwrap(), options).unwrap();
    let mut group = c.benchmark_group("lists");
    for dies in [1, 32] {
        let dies: Vec<Die> = (0..dies).map(|number| die(&system, number)).collect();
        group.throughput(Throughput::Elements((dies.len() * COMMANDS) as u64));
        let mut run = |name: &str, launch: fn(&Die)| {
            group.bench_function(format!("{name}/{} dies", dies.len()), |b| {
                b.iter(|| {
                    dies.iter().for_each(launch);
                    dies.iter().for_each(|die| die.stream.synchronize(LONG).unwrap());
                });
            });
        };
        run("whole", |die| {
            die.device.execute(&die.list, std::slice::from_ref(&die.stream)).unwrap();
        });
        run("one by one", |die| {
            let id = die.device.properties().id;
            die.list.issue(id, std::slice::from_ref(&die.stream)).unwrap();
        });
    }
    group.finish();
}

criterion_group!(benches, lists);
criterion_main!(benches);
