//! A launch over the FFI allocates nothing on this side of it.
#![expect(unsafe_code, reason = "counting allocations takes an allocator")]

mod common;

use hal::op::RmsNorm;
use hal::{Command, DType, Device, DeviceId, Op};
use std::alloc::{GlobalAlloc, Layout, System};
use std::cell::Cell;

struct Counting;

thread_local! {
    static COUNT: Cell<u64> = const { Cell::new(0) };
}

// SAFETY: every call goes to the system allocator unchanged.
unsafe impl GlobalAlloc for Counting {
    unsafe fn alloc(&self, layout: Layout) -> *mut u8 {
        COUNT.with(|count| count.set(count.get() + 1));
        // SAFETY: the caller's promise is passed on.
        unsafe { System.alloc(layout) }
    }

    unsafe fn dealloc(&self, at: *mut u8, layout: Layout) {
        // SAFETY: the caller's promise is passed on.
        unsafe { System.dealloc(at, layout) }
    }
}

#[global_allocator]
static ALLOCATOR: Counting = Counting;

#[test]
fn building_and_submitting_an_op_allocates_nothing() {
    let runtime = common::load(common::fake("no-alloc", &[]));
    let system = common::system(&runtime, "").unwrap();
    let device: std::sync::Arc<dyn Device> = system.open(DeviceId(0)).unwrap();
    let stream = device.stream("s").unwrap();
    let x = stream.alloc_tensor(DType::Bf16, &[2, 8]).unwrap();
    let weight = stream.alloc_tensor(DType::Bf16, &[8]).unwrap();
    let launch = || {
        let (x, out) = (x.clone(), x.clone());
        let op = RmsNorm { x, weight: weight.clone(), residual: None, out, eps: 1e-6 };
        let command: Command = Op::from(op).label("norm");
        assert!(device.supports(&command.op.desc()).is_supported());
        stream.submit(&command).unwrap();
    };
    launch();
    let before = COUNT.with(Cell::get);
    (0..100).for_each(|_| launch());
    assert_eq!(COUNT.with(Cell::get) - before, 0);
    assert!(before > 0, "the counter counts");
    assert_eq!(stream.point().value(), 101, "every launch arrived");
}
