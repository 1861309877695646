//! Copies: every direction, odd sizes and offsets, with sentinels around.

use crate::backend::Feature;
use crate::lab::{Lab, SOON, Verdict, ensure, equal, is, pattern, read, refused, upload, usage};
use crate::run::Case;
use hal::Buffer;

/// Where bytes lie, or go.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Side {
    /// Die 0.
    Here,
    /// Another die.
    There(usize),
    /// Pinned host memory of die 0.
    Host,
}

const SIZES: [usize; 8] = [0, 1, 3, 127, 128, 129, 4097, (1 << 20) + 1];

pub(crate) fn add_cases(all: &mut Vec<Case>) {
    use Side::{Here, Host, There};
    for (name, from, to, dies) in [
        ("host_to_device", Host, Here, 1),
        ("device_to_host", Here, Host, 1),
        ("within_the_die", Here, Here, 1),
        ("to_a_die_of_the_card", Here, There(1), 2),
        ("from_a_die_of_the_card", There(1), Here, 2),
        ("to_a_die_farther_off", Here, There(7), 8),
        ("from_a_die_farther_off", There(31), Here, 32),
    ] {
        for size in SIZES {
            all.push(
                Case::new(format!("copies/{name}/{size}"), move |lab| copy(lab, from, to, size))
                    .needs(&[Feature::Values])
                    .dies(dies),
            );
        }
    }
    for size in SIZES {
        all.push(
            Case::new(format!("copies/pageable/{size}"), move |lab| pageable(lab, size))
                .needs(&[Feature::Values]),
        );
        all.push(
            Case::new(format!("copies/fill/{size}"), move |lab| fill(lab, size))
                .needs(&[Feature::Values]),
        );
    }
    all.extend([
        Case::new("copies/refused/sizes_that_differ", sizes_differ).needs(&[Feature::Values]),
        Case::new("copies/refused/overlap", overlap),
        Case::new("copies/refused/neither_side_is_here", elsewhere).dies(3),
        Case::new("copies/beside_each_other", beside).needs(&[Feature::Values]),
    ]);
}

/// Bytes before and after what is copied.
const GUARD: usize = 65;

fn make(lab: &Lab, side: Side, bytes: &[u8]) -> Verdict<Buffer> {
    let die = match side {
        Side::Host => {
            let host = lab.die(0).alloc_host(bytes.len() as u64)?;
            host.raw().write_host(0, bytes)?;
            return Ok(host);
        }
        Side::Here => 0,
        Side::There(die) => die,
    };
    let stream = lab.stream(die)?;
    let buffer = upload(&*stream, bytes)?;
    stream.synchronize(SOON)?;
    Ok(buffer)
}

fn contents(lab: &Lab, side: Side, buffer: &Buffer) -> Verdict<Vec<u8>> {
    let die = match side {
        Side::Host => {
            let mut bytes = vec![0; buffer.size() as usize];
            buffer.raw().read_host(0, &mut bytes)?;
            return Ok(bytes);
        }
        Side::Here => 0,
        Side::There(die) => die,
    };
    read(&*lab.stream(die)?, &buffer.whole())
}

fn copy(lab: &Lab, from: Side, to: Side, size: usize) -> Verdict {
    let source = pattern(size + 2 * GUARD, 11);
    let target = pattern(size + 2 * GUARD, 12);
    let (a, b) = (make(lab, from, &source)?, make(lab, to, &target)?);
    let stream = lab.stream(0)?;
    for (read_at, write_at) in [(GUARD, GUARD - 1), (GUARD + 1, GUARD)] {
        let src = a.region(read_at as u64, size as u64)?;
        stream.copy(&b.region(write_at as u64, size as u64)?, &src)?;
        stream.synchronize(SOON)?;
        let mut expected = target.clone();
        expected[write_at..write_at + size].copy_from_slice(&source[read_at..read_at + size]);
        let got = contents(lab, to, &b)?;
        let wrong = got.iter().zip(&expected).position(|(g, e)| g != e);
        ensure(wrong.is_none(), || {
            format!("byte {wrong:?} is wrong: {size} bytes from {read_at} to {write_at}")
        })?;
        ensure(contents(lab, from, &a)? == source, || "the source changed".into())?;
        // Back to what it was.
        let again = make(lab, to, &target)?;
        if to != Side::Host {
            let back = match to {
                Side::There(die) => lab.stream(die)?,
                _ => lab.stream(0)?,
            };
            back.copy(&b.whole(), &again.whole())?;
            back.synchronize(SOON)?;
        } else {
            b.raw().write_host(0, &target)?;
        }
    }
    Ok(())
}

fn pageable(lab: &Lab, size: usize) -> Verdict {
    let stream = lab.stream(0)?;
    let (data, around) = (pattern(size, 5), pattern(size + 2 * GUARD, 6));
    let buffer = upload(&*stream, &around)?;
    let front = stream.alloc(8 << 20)?;
    let mut expected = around;
    // Backends may write at once where nothing is in front, and must not where something is.
    for (busy, at) in [(true, GUARD), (false, GUARD + 3)] {
        let writer = match busy {
            true => {
                stream.fill(&front.whole(), 1)?;
                stream.clone()
            }
            false => {
                stream.synchronize(SOON)?;
                lab.stream(0)?
            }
        };
        writer.write(&buffer.region(at as u64, size as u64)?, &data)?;
        stream.wait(&writer.point())?;
        expected[at..at + size].copy_from_slice(&data);
        ensure(read(&*stream, &buffer.whole())? == expected, || {
            format!("the write to {at} missed; commands in front: {busy}")
        })?;
        let part = read(&*stream, &buffer.region(at as u64, size as u64)?)?;
        ensure(part == data, || format!("the read from {at} missed"))?;
    }
    Ok(())
}

fn fill(lab: &Lab, size: usize) -> Verdict {
    let stream = lab.stream(0)?;
    let around = pattern(size + 2 * GUARD, 7);
    let buffer = upload(&*stream, &around)?;
    stream.fill(&buffer.region(GUARD as u64, size as u64)?, 0x5c)?;
    let mut expected = around;
    expected[GUARD..GUARD + size].fill(0x5c);
    ensure(read(&*stream, &buffer.whole())? == expected, || "the fill missed".into())
}

fn sizes_differ(lab: &Lab) -> Verdict {
    let stream = lab.stream(0)?;
    let (a, b) = (upload(&*stream, &[1; 64])?, upload(&*stream, &[2; 64])?);
    let before = stream.point().value();
    for error in [
        refused("a copy", stream.copy(&a.region(0, 63)?, &b.whole()))?,
        refused("a write", stream.write(&a.whole(), &[0; 63]))?,
        refused("a read", stream.read(&a.whole(), &mut [0; 65], SOON))?,
    ] {
        is(&error, "Usage", usage)?;
    }
    equal("commands submitted", stream.point().value(), before)?;
    ensure(read(&*stream, &a.whole())? == [1; 64], || "something was written".into())
}

fn overlap(lab: &Lab) -> Verdict {
    let stream = lab.stream(0)?;
    let a = upload(&*stream, &pattern(64, 1))?;
    for (to, from, len) in [(0, 1, 32), (1, 0, 32), (31, 0, 32), (0, 0, 64)] {
        let result = stream.copy(&a.region(to, len)?, &a.region(from, len)?);
        is(&refused("an overlapping copy", result)?, "Usage", usage)?;
    }
    stream.copy(&a.region(32, 32)?, &a.region(0, 32)?)?;
    stream.synchronize(SOON)?;
    Ok(())
}

fn elsewhere(lab: &Lab) -> Verdict {
    let (a, b) = (make(lab, Side::There(1), &[1; 8])?, make(lab, Side::There(2), &[2; 8])?);
    let stream = lab.stream(0)?;
    is(&refused("a copy between others", stream.copy(&a.whole(), &b.whole()))?, "Usage", usage)
}

fn beside(lab: &Lab) -> Verdict {
    // Many small copies into one buffer, from streams that share it without touching each other.
    let streams = (0..4).map(|_| lab.stream(0)).collect::<Verdict<Vec<_>>>()?;
    let data = pattern(4096, 9);
    let source = upload(&*streams[0], &data)?;
    let target = upload(&*streams[0], &[0; 4096])?;
    let ready = streams[0].point();
    for (i, stream) in streams.iter().enumerate() {
        stream.wait(&ready)?;
        for piece in 0..64 {
            let at = (piece * 4 + i as u64) * 16;
            stream.copy(&target.region(at, 16)?, &source.region(at, 16)?)?;
        }
    }
    streams.iter().try_for_each(|s| s.synchronize(SOON))?;
    ensure(read(&*streams[0], &target.whole())? == data, || "pieces are missing".into())
}
