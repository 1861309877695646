//! Accesses that nothing orders.

use super::bump;
use crate::backend::Feature;
use crate::lab::{Lab, SOON, Verdict, add, equal, floats, is, refused, usage};
use crate::run::Case;
use hal::{DType, Validated};

pub(super) fn add_cases(all: &mut Vec<Case>) {
    all.extend([
        Case::new("streams/hazard/unordered_write_is_refused", |lab| hazard(lab, true))
            .needs(&[Feature::Hazards]),
        Case::new("streams/hazard/unordered_read_is_refused", |lab| hazard(lab, false))
            .needs(&[Feature::Hazards]),
        Case::new("streams/hazard/unordered_write_after_read_is_refused", write_after_read)
            .needs(&[Feature::Hazards]),
        Case::new("streams/hazard/parts_that_do_not_meet_are_free", parts)
            .needs(&[Feature::Hazards]),
        Case::new("streams/hazard/the_wrapper_refuses", wrapper_hazard),
        Case::new("streams/hazard/the_wrapper_finds_unwritten_memory", wrapper_unwritten),
    ]);
}

fn hazard(lab: &Lab, write: bool) -> Verdict {
    let (a, b) = (lab.stream(0)?, lab.stream(0)?);
    let (x, y) = (floats(&*a, &[1.0; 8])?, floats(&*b, &[1.0; 8])?);
    let before = b.point().value();
    let op = if write { add(&y, &y, &x) } else { add(&x, &y, &y) };
    let error = refused("an access that nothing orders", b.submit(&op.clone().into()))?;
    is(&error, "Usage", usage)?;
    equal("commands submitted", b.point().value(), before)?;
    // With the order it goes, and the refusal has left no trace.
    b.wait(&a.point())?;
    b.submit(&op.into())?;
    a.wait(&b.point())?;
    bump(&*a, &x, &x)?;
    a.synchronize(SOON)?;
    Ok(())
}

fn write_after_read(lab: &Lab) -> Verdict {
    let (a, b) = (lab.stream(0)?, lab.stream(0)?);
    let (x, sum) = (floats(&*a, &[1.0; 8])?, floats(&*a, &[0.0; 8])?);
    // Everybody knows that x is written; only a knows that it is being read.
    b.wait(&a.point())?;
    a.submit(&add(&x, &x, &sum).into())?;
    let before = b.point().value();
    is(&refused("a write that nothing orders", b.fill(&x.region(), 0))?, "Usage", usage)?;
    equal("commands submitted", b.point().value(), before)?;
    // Reading beside it is no hazard.
    b.submit(&add(&x, &x, &floats(&*b, &[0.0; 8])?).into())?;
    b.wait(&a.point())?;
    b.fill(&x.region(), 0)?;
    b.synchronize(SOON)?;
    Ok(())
}

fn parts(lab: &Lab) -> Verdict {
    let (a, b) = (lab.stream(0)?, lab.stream(0)?);
    let buffer = a.alloc(100)?;
    b.wait(&a.point())?;
    a.fill(&buffer.region(0, 50)?, 1)?;
    b.fill(&buffer.region(50, 50)?, 2)?;
    is(&refused("one byte too far", b.fill(&buffer.region(49, 1)?, 3))?, "Usage", usage)?;
    a.synchronize(SOON)?;
    b.synchronize(SOON)?;
    // The host has seen both: nothing is unordered any more.
    b.fill(&buffer.whole(), 4)?;
    b.synchronize(SOON)?;
    Ok(())
}

fn wrapper_hazard(lab: &Lab) -> Verdict {
    let validated = Validated::wrap(lab.die(0).clone());
    let a = hal::Device::stream(&*validated, "a")?;
    let b = hal::Device::stream(&*validated, "b")?;
    let x = floats(&*a, &[1.0; 8])?;
    let error = refused("a read that nothing orders", b.submit(&add(&x, &x, &x).into()))?;
    is(&error, "Usage", usage)?;
    b.wait(&a.point())?;
    b.submit(&add(&x, &x, &x).into())?;
    b.synchronize(SOON)?;
    Ok(())
}

fn wrapper_unwritten(lab: &Lab) -> Verdict {
    let validated = Validated::wrap(lab.die(0).clone());
    let stream = hal::Device::stream(&*validated, "s")?;
    let x = stream.alloc_tensor(DType::F32, &[8])?;
    let error =
        refused("reading memory that nothing wrote", stream.submit(&add(&x, &x, &x).into()))?;
    is(&error, "Usage", usage)?;
    stream.fill(&x.region(), 0)?;
    stream.submit(&add(&x, &x, &x).into())?;
    stream.synchronize(SOON)?;
    Ok(())
}
