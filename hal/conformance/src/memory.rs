//! Memory: alignment, exhaustion, accounting, reuse in stream order, pinned host memory, leaks.

use crate::backend::Feature;
use crate::lab::{
    Lab, SOON, Verdict, add, ensure, equal, floats, is, pattern, read, refused, upload, usage,
    values,
};
use crate::run::Case;
use hal::{Error, Location, Validated};

pub(crate) fn add_cases(all: &mut Vec<Case>) {
    for bytes in [1usize, 3, 127, 128, 129, 255, 256, 257, 4097, (1 << 20) + 1] {
        all.push(
            Case::new(format!("memory/contents/{bytes}"), move |lab| contents(lab, bytes))
                .needs(&[Feature::Values]),
        );
    }
    all.extend([
        Case::new("memory/zero_bytes", zero_bytes),
        Case::new("memory/identity_and_location", identity),
        Case::new("memory/accounting", accounting).alone(),
        Case::new("memory/alignment", alignment).alone(),
        Case::new("memory/exhaustion", exhaustion).alone(),
        Case::new("memory/exhaustion_is_per_die", per_die).alone().dies(2),
        Case::new("memory/reuse_in_stream_order", reuse).needs(&[Feature::Values]).alone(),
        Case::new("memory/fresh_memory_is_its_streams", fresh).needs(&[Feature::Hazards]),
        Case::new("memory/freed_while_in_use", freed_in_use).needs(&[Feature::Values]),
        Case::new("memory/buffers_do_not_overlap", no_overlap).needs(&[Feature::Values]),
        Case::new("memory/host/contents", host_contents),
        Case::new("memory/host/ranges", host_ranges),
        Case::new("memory/host/device_memory_is_not_host_memory", device_is_not_host),
        Case::new("memory/region_outside_is_refused", outside),
        Case::new("memory/leaks/everything_is_given_back", given_back).alone(),
        Case::new("memory/leaks/the_wrapper_finds_them", wrapper_finds_leaks).alone(),
    ]);
}

fn contents(lab: &Lab, bytes: usize) -> Verdict {
    let stream = lab.stream(0)?;
    let data = pattern(bytes, bytes as u64);
    let buffer = upload(&*stream, &data)?;
    equal("size", buffer.size(), bytes as u64)?;
    ensure(read(&*stream, &buffer.whole())? == data, || "contents differ".into())?;
    let last = buffer.region(bytes as u64 - 1, 1)?;
    stream.write(&last, &[!data[bytes - 1]])?;
    equal("the last byte", read(&*stream, &last)?, vec![!data[bytes - 1]])?;
    ensure(read(&*stream, &buffer.region(0, bytes as u64 - 1)?)? == data[..bytes - 1], || {
        "writing the last byte changed others".into()
    })
}

fn zero_bytes(lab: &Lab) -> Verdict {
    let stream = lab.stream(0)?;
    let buffer = stream.alloc(0)?;
    equal("size", buffer.size(), 0)?;
    stream.fill(&buffer.whole(), 1)?;
    stream.write(&buffer.whole(), &[])?;
    stream.read(&buffer.whole(), &mut [], SOON)?;
    Ok(())
}

fn identity(lab: &Lab) -> Verdict {
    let stream = lab.stream(0)?;
    let (a, b, host) = (stream.alloc(8)?, stream.alloc(8)?, lab.die(0).alloc_host(8)?);
    ensure(a.id() != b.id() && a.id() != host.id(), || "two buffers have one id".into())?;
    let id = lab.die(0).properties().id;
    equal("location", a.location(), Location::Device(id))?;
    equal("location", host.location(), Location::Host(id))
}

fn accounting(lab: &Lab) -> Verdict {
    let (die, stream) = (lab.die(0), lab.stream(0)?);
    let before = die.memory_info()?;
    equal("capacity", before.capacity, die.properties().memory_bytes)?;
    let buffers = [stream.alloc(1000)?, stream.alloc(5000)?];
    let during = die.memory_info()?;
    ensure(during.used >= before.used + 6000, || format!("{} bytes used of 6000", during.used))?;
    ensure(during.peak >= during.used, || format!("peak {} < used {}", during.peak, during.used))?;
    drop(buffers);
    stream.synchronize(SOON)?;
    let after = die.memory_info()?;
    equal("used after all was dropped", after.used, before.used)?;
    ensure(after.peak >= during.used, || "the peak was forgotten".into())?;
    let small = stream.alloc(10)?;
    let now = die.memory_info()?;
    ensure(now.peak >= during.used, || format!("the peak fell to {}", now.peak))?;
    drop(small);
    let host = die.alloc_host(5000)?;
    equal("used with host memory beside", die.memory_info()?.used, before.used)?;
    drop(host);
    equal("used after host memory was dropped", die.memory_info()?.used, before.used)
}

fn alignment(lab: &Lab) -> Verdict {
    let (die, stream) = (lab.die(0), lab.stream(0)?);
    let unit = die.properties().allocation_alignment;
    ensure(unit.is_power_of_two() && unit >= 16, || format!("alignment is {unit}"))?;
    let mut kept = Vec::new();
    let mut used = die.memory_info()?.used;
    for bytes in [1, unit - 1, unit, unit + 1, 3 * unit] {
        kept.push(stream.alloc(bytes)?);
        let now = die.memory_info()?.used;
        let expected = bytes.div_ceil(unit) * unit;
        ensure(now - used >= expected && (now - used).is_multiple_of(unit), || {
            format!("{bytes} bytes are counted as {}, not as multiples of {unit}", now - used)
        })?;
        used = now;
    }
    Ok(())
}

fn exhaustion(lab: &Lab) -> Verdict {
    let (die, stream) = (lab.die(0), lab.stream(0)?);
    let free = die.memory_info()?.free();
    let error = refused("more than everything", stream.alloc(free + (1 << 30)))?;
    match error {
        Error::OutOfMemory { requested, free: told, capacity, .. } => {
            ensure(requested >= free + (1 << 30), || format!("requested is {requested}"))?;
            equal("free", told, free)?;
            equal("capacity", capacity, die.properties().memory_bytes)?;
        }
        other => return Err(format!("expected OutOfMemory, got: {other}").into()),
    }
    for huge in [u64::MAX, u64::MAX - 1, 1 << 63] {
        let error = refused("a huge allocation", stream.alloc(huge))?;
        is(&error, "OutOfMemory", |e| matches!(e, Error::OutOfMemory { .. }))?;
    }
    equal("used after refusals", die.memory_info()?.free(), free)?;
    // The stream goes on.
    let buffer = stream.alloc(64)?;
    stream.fill(&buffer.whole(), 7)?;
    stream.synchronize(SOON)?;
    Ok(())
}

fn per_die(lab: &Lab) -> Verdict {
    let (here, there) = (lab.stream(0)?, lab.stream(1)?);
    let used = lab.die(1).memory_info()?.used;
    let _kept = here.alloc(1 << 20)?;
    equal("the other die's memory", lab.die(1).memory_info()?.used, used)?;
    there.alloc(1 << 10)?;
    Ok(())
}

fn reuse(lab: &Lab) -> Verdict {
    // Memory of the size of what is free cannot be allocated twice, unless the first is freed in
    // the order of the stream rather than when the host looks.
    let stream = lab.stream(0)?;
    let one = floats(&*stream, &[1.0; 256])?;
    let sum = floats(&*stream, &[0.0; 256])?;
    for round in 0..200u32 {
        let scratch = stream.alloc_tensor(hal::DType::F32, &[256])?;
        stream.submit(&add(&sum, &one, &scratch).into())?;
        stream.submit(&hal::Op::from(hal::op::Copy { x: scratch, out: sum.clone() }).into())?;
        if round % 50 == 49 {
            equal("the running sum", values(&*stream, &sum)?[255], (round + 1) as f32)?;
        }
    }
    let used = lab.die(0).memory_info()?.used;
    ensure(used < 64 << 10, || format!("{used} bytes are used after 200 freed buffers"))
}

/// Memory belongs to the stream that allocated it, after what was submitted there so far: it may
/// have been somebody else's until then.
fn fresh(lab: &Lab) -> Verdict {
    let (owner, other) = (lab.stream(0)?, lab.stream(0)?);
    let before = owner.alloc(64)?;
    owner.fill(&before.whole(), 1)?;
    drop(before);
    let buffer = owner.alloc(64)?;
    let error = refused("a use that nothing orders", other.fill(&buffer.whole(), 2))?;
    is(&error, "Usage", usage)?;
    other.wait(&owner.point())?;
    other.fill(&buffer.whole(), 2)?;
    other.synchronize(SOON)?;
    Ok(())
}

fn freed_in_use(lab: &Lab) -> Verdict {
    let stream = lab.stream(0)?;
    let data = pattern(1 << 16, 3);
    let kept = stream.alloc(1 << 16)?;
    let source = upload(&*stream, &data)?;
    // Work in front, so that the copy has not begun when its source is dropped.
    let front = stream.alloc(8 << 20)?;
    for i in 0..10 {
        stream.fill(&front.whole(), i)?;
    }
    stream.copy(&kept.whole(), &source.whole())?;
    drop(source);
    // Whatever takes its place must not be seen by the copy.
    let next = stream.alloc(1 << 16)?;
    stream.fill(&next.whole(), 0xee)?;
    ensure(read(&*stream, &kept.whole())? == data, || "the copy read freed memory".into())
}

fn no_overlap(lab: &Lab) -> Verdict {
    let stream = lab.stream(0)?;
    let buffers = (0..64u64)
        .map(|i| {
            let buffer = stream.alloc(100 + i * 37)?;
            stream.fill(&buffer.whole(), i as u8)?;
            Ok(buffer)
        })
        .collect::<Verdict<Vec<_>>>()?;
    for (i, buffer) in buffers.iter().enumerate() {
        let bytes = read(&*stream, &buffer.whole())?;
        ensure(bytes.iter().all(|&b| b == i as u8), || format!("buffer {i} was overwritten"))?;
    }
    Ok(())
}

fn host_contents(lab: &Lab) -> Verdict {
    let host = lab.die(0).alloc_host(1000)?;
    let data = pattern(1000, 1);
    host.raw().write_host(0, &data)?;
    host.raw().write_host(17, &[1, 2, 3])?;
    let mut got = vec![0; 1000];
    host.raw().read_host(0, &mut got)?;
    let mut expected = data;
    expected[17..20].copy_from_slice(&[1, 2, 3]);
    ensure(got == expected, || "contents differ".into())
}

fn host_ranges(lab: &Lab) -> Verdict {
    let host = lab.die(0).alloc_host(10)?;
    for (offset, len) in [(0, 11), (10, 1), (11, 0), (u64::MAX, 2)] {
        let error = refused("reading outside", host.raw().read_host(offset, &mut vec![0; len]))?;
        is(&error, "Usage", usage)?;
        let error = refused("writing outside", host.raw().write_host(offset, &vec![0; len]))?;
        is(&error, "Usage", usage)?;
    }
    host.raw().read_host(10, &mut [])?;
    Ok(())
}

fn device_is_not_host(lab: &Lab) -> Verdict {
    let buffer = lab.stream(0)?.alloc(8)?;
    let error = refused("reading device memory", buffer.raw().read_host(0, &mut [0; 8]))?;
    is(&error, "Usage", usage)?;
    let error = refused("writing device memory", buffer.raw().write_host(0, &[0; 8]))?;
    is(&error, "Usage", usage)
}

fn outside(lab: &Lab) -> Verdict {
    let stream = lab.stream(0)?;
    let buffer = stream.alloc(100)?;
    stream.fill(&buffer.whole(), 1)?;
    let before = stream.point().value();
    for (offset, len) in [(0, 101), (100, 1), (99, 2), (u64::MAX, 2), (1, u64::MAX)] {
        let region = hal::Region { buffer: buffer.clone(), offset, len };
        let error = refused("filling outside", stream.fill(&region, 9))?;
        is(&error, "Usage", usage)?;
        if len < 1000 {
            let error = refused("writing outside", stream.write(&region, &vec![0; len as usize]))?;
            is(&error, "Usage", usage)?;
            let mut room = vec![0; len as usize];
            let error = refused("reading outside", stream.read(&region, &mut room, SOON))?;
            is(&error, "Usage", usage)?;
        }
        ensure(buffer.region(offset, len).is_err(), || "region() allows it".into())?;
    }
    equal("commands submitted", stream.point().value(), before)?;
    stream.synchronize(SOON)?;
    Ok(())
}

fn given_back(lab: &Lab) -> Verdict {
    let die = lab.die(0);
    for _ in 0..3 {
        let stream = lab.stream(0)?;
        let x = floats(&*stream, &[1.0; 100])?;
        stream.submit(&add(&x, &x, &x).into())?;
        // The stream's handle goes first, with work in flight.
        drop(stream);
        drop(x);
    }
    let stream = lab.stream(0)?;
    stream.synchronize(SOON)?;
    equal("bytes used when all is dropped", die.memory_info()?.used, 0)
}

fn wrapper_finds_leaks(lab: &Lab) -> Verdict {
    let validated = Validated::wrap(lab.die(0).clone());
    let stream = hal::Device::stream(&*validated, "leaky")?;
    let (kept, dropped) = (stream.alloc(64)?, stream.alloc(32)?);
    drop(dropped);
    let leaks = validated.leaks();
    equal("leaks", leaks.iter().map(|l| l.bytes).collect(), vec![64])?;
    equal("the leaking stream", leaks[0].allocated_on.contains("leaky"), true)?;
    drop(kept);
    equal("leaks", validated.leaks().len(), 0)
}
