//! A launch allocates nothing above the backend.
#![expect(unsafe_code, reason = "counting allocations takes an allocator")]

use hal::op::RmsNorm;
use hal::{Command, DType, Device, DeviceId, NullDevice, Op};
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
    let device = NullDevice::new(DeviceId(0), 1 << 20);
    let stream = device.stream("s").unwrap();
    let x = stream.alloc_tensor(DType::Bf16, &[2, 8]).unwrap();
    let weight = stream.alloc_tensor(DType::Bf16, &[8]).unwrap();
    let launch = || {
        let (x, out) = (x.clone(), x.clone());
        let op = RmsNorm { x, weight: weight.clone(), residual: None, out, eps: 1e-6 };
        let command: Command = Op::from(op).label("norm");
        stream.submit(&command).unwrap();
    };
    launch();
    let before = COUNT.with(Cell::get);
    (0..100).for_each(|_| launch());
    assert_eq!(COUNT.with(Cell::get) - before, 0);
    assert!(before > 0, "the counter counts");
}
