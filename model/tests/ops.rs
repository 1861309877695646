//! Single ops on the simulator against torch, numpy and transformers (see oracle/README.md).

mod common;

use common::{device, floats};
use hal::op::{BlockGrid, Cast, Gate, Linear, Quantize, Rope, ScaleFormat};
use hal::{DType, Device, Op, Operand, Stream, Tensor};
use model::config::Preset;
use safetensors::SafeTensors;
use std::path::Path;
use std::sync::Arc;
use std::time::Duration;

const SOON: Duration = Duration::from_secs(20);

struct Bench {
    data: Vec<u8>,
    _device: Arc<dyn Device>,
    stream: Arc<dyn Stream>,
}

impl Bench {
    fn new() -> Self {
        let path = "tests/fixtures/ops/ops.safetensors";
        let data = std::fs::read(Path::new(env!("CARGO_MANIFEST_DIR")).join(path)).unwrap();
        let device = device(1);
        let stream = device.stream("ops").unwrap();
        Bench { data, _device: device, stream }
    }

    fn file(&self) -> SafeTensors<'_> {
        SafeTensors::deserialize(&self.data).unwrap()
    }

    fn floats(&self, name: &str) -> Vec<f32> {
        floats(&self.file(), name)
    }

    fn ints(&self, name: &str) -> Vec<i32> {
        let file = self.file();
        let data = file.tensor(name).unwrap().data();
        data.as_chunks::<4>().0.iter().map(|b| i32::from_le_bytes(*b)).collect()
    }

    fn bytes(&self, name: &str) -> Vec<u8> {
        self.file().tensor(name).unwrap().data().to_vec()
    }

    fn shape(&self, name: &str) -> Vec<usize> {
        self.file().tensor(name).unwrap().shape().to_vec()
    }

    fn send(&self, dtype: DType, shape: &[usize], bytes: &[u8]) -> Tensor {
        let tensor = self.stream.alloc_tensor(dtype, shape).unwrap();
        self.stream.write(&tensor.region(), bytes).unwrap();
        tensor
    }

    /// A tensor of the fixture, as it is.
    fn tensor(&self, dtype: DType, name: &str) -> Tensor {
        self.send(dtype, &self.shape(name), &self.bytes(name))
    }

    fn f32s(&self, shape: &[usize], values: &[f32]) -> Tensor {
        let bytes: Vec<u8> = values.iter().flat_map(|v| v.to_le_bytes()).collect();
        self.send(DType::F32, shape, &bytes)
    }

    fn empty(&self, dtype: DType, shape: &[usize]) -> Tensor {
        self.stream.alloc_tensor(dtype, shape).unwrap()
    }

    fn run(&self, op: impl Into<Op>) {
        self.stream.submit(&op.into().into()).unwrap();
    }

    fn read(&self, tensor: &Tensor) -> Vec<u8> {
        let region = tensor.region();
        let mut bytes = vec![0; region.len as usize];
        self.stream.read(&region, &mut bytes, SOON).unwrap();
        bytes
    }

    fn read_floats(&self, tensor: &Tensor) -> Vec<f32> {
        let bytes = self.read(tensor);
        bytes.as_chunks::<4>().0.iter().map(|b| f32::from_le_bytes(*b)).collect()
    }
}

#[test]
fn fp8_rounds_as_torch_does() {
    let bench = Bench::new();
    let (inputs, outputs) = (bench.floats("e4m3.input"), bench.bytes("e4m3.output"));
    // A group whose largest magnitude is 448 has the scale 1, so its values are encoded as they are.
    let pairs: Vec<(f32, u8)> =
        inputs.into_iter().zip(outputs).filter(|(x, _)| x.abs() <= 448.0).collect();
    assert!(pairs.len() > 2500);
    for part in pairs.chunks(127) {
        let mut values = vec![448.0];
        values.extend(part.iter().map(|p| p.0));
        let columns = values.len();
        let x = bench.f32s(&[1, columns], &values);
        let (q, scales) =
            (bench.empty(DType::F8E4M3, &[1, columns]), bench.empty(DType::F32, &[1, 1]));
        let scale_format = ScaleFormat::Float;
        bench.run(Quantize {
            x,
            q: q.clone(),
            scales: scales.clone(),
            row_offsets: None,
            column_offset: 0,
            scale_format,
            expected_rows: 0,
        });
        assert_eq!(bench.read_floats(&scales), [1.0]);
        let expected: Vec<u8> = part.iter().map(|p| p.1).collect();
        assert_eq!(bench.read(&q)[1..], expected, "{part:?}");
    }
}

#[test]
fn bf16_rounds_as_torch_does() {
    let bench = Bench::new();
    let x = bench.tensor(DType::F32, "bf16.input");
    let out = bench.empty(DType::Bf16, &bench.shape("bf16.input"));
    bench.run(Cast { x, out: out.clone() });
    assert_eq!(bench.read(&out), bench.bytes("bf16.output"));
}

#[test]
fn activations_are_quantised_as_the_reference_does() {
    let bench = Bench::new();
    let x = bench.tensor(DType::F32, "act.input");
    let q = bench.empty(DType::F8E4M3, &bench.shape("act.input"));
    let scales = bench.empty(DType::F32, &bench.shape("act.scale"));
    let scale_format = ScaleFormat::Float;
    bench.run(Quantize {
        x,
        q: q.clone(),
        scales: scales.clone(),
        row_offsets: None,
        column_offset: 0,
        scale_format,
        expected_rows: 0,
    });
    assert_eq!(bench.read_floats(&scales), bench.floats("act.scale"));
    assert_eq!(bench.read(&q), bench.bytes("act.output"));
}

#[test]
fn block_scaled_products_agree_with_f64() {
    let bench = Bench::new();
    let (x, w) = (bench.tensor(DType::F8E4M3, "gemm.a"), bench.tensor(DType::F8E4M3, "gemm.w"));
    let out = bench.empty(DType::F32, &[x.desc().dim(0), w.desc().dim(0)]);
    bench.run(Linear {
        x,
        x_scales: Some(bench.tensor(DType::F32, "gemm.a_scale")),
        w,
        w_scales: Some(bench.tensor(DType::F32, "gemm.w_scale")),
        out: out.clone(),
        grid: BlockGrid::default(),
    });
    let f64s = |name: &str| -> Vec<f64> {
        bench.bytes(name).as_chunks::<8>().0.iter().map(|b| f64::from_le_bytes(*b)).collect()
    };
    let (expected, magnitude) = (f64s("gemm.output"), f64s("gemm.magnitude"));
    for ((got, want), size) in bench.read_floats(&out).into_iter().zip(expected).zip(magnitude) {
        assert!((f64::from(got) - want).abs() <= 1e-6 * size, "{got} for {want}");
    }
}

#[test]
fn rotation_agrees_with_transformers() {
    let bench = Bench::new();
    for name in ["v3", "plain", "short"] {
        let part = |what: &str| bench.floats(&format!("rope.{name}.{what}"));
        let (cos, sin) = (part("cos"), part("sin"));
        let shape = bench.shape(&format!("rope.{name}.input"));
        let (rows, d) = (shape[0], shape[1]);
        let table: Vec<f32> = (cos.chunks(d / 2).zip(sin.chunks(d / 2)))
            .flat_map(|(cos, sin)| [cos, sin].concat())
            .collect();
        let x = bench.f32s(&[rows, 1, d], &part("input"));
        let numbers: Vec<u8> = (0..rows as i32).flat_map(i32::to_le_bytes).collect();
        let positions = bench.send(DType::I32, &[rows], &numbers);
        bench.run(Rope { x: x.clone(), positions, table: bench.f32s(&[rows, d], &table) });
        let difference = common::max_difference(&bench.read_floats(&x), &part("output"));
        assert!(difference <= 1e-6, "{name}: {difference}");
    }
    let ours = Preset::DeepSeekV3.config().rope_inv_freq();
    for (ours, theirs) in ours.iter().zip(bench.floats("rope.v3.inv_freq")) {
        assert!((ours - theirs).abs() <= 2.0 * f32::EPSILON * theirs, "{ours} {theirs}");
    }
}

#[test]
fn the_gate_agrees_with_transformers() {
    let bench = Bench::new();
    for name in ["v3", "tiny", "one_group", "all_groups", "all_kept", "no_norm", "negative"] {
        let at = |what: &str| format!("gate.{name}.{what}");
        let params = bench.ints(&at("params"));
        let shape = bench.shape(&at("ids"));
        let experts = bench.empty(DType::I32, &shape);
        let weights = bench.empty(DType::F32, &shape);
        bench.run(Gate {
            logits: bench.tensor(DType::F32, &at("logits")),
            bias: Some(bench.tensor(DType::F32, &at("bias"))),
            experts: experts.clone(),
            weights: weights.clone(),
            groups: params[0] as u32,
            groups_kept: params[1] as u32,
            normalize: params[3] != 0,
            scale: bench.floats(&at("scale"))[0],
        });
        let ids: Vec<i32> = bench
            .read(&experts)
            .as_chunks::<4>()
            .0
            .iter()
            .map(|b| i32::from_le_bytes(*b))
            .collect();
        let weights = bench.read_floats(&weights);
        let (want_ids, want_weights) = (bench.ints(&at("ids")), bench.floats(&at("weights")));
        let k = shape[1];
        for t in 0..shape[0] {
            // The fixture lists experts in ascending order.
            let row = t * k..(t + 1) * k;
            let mut chosen: Vec<(i32, f32)> = ids[row.clone()]
                .iter()
                .copied()
                .zip(weights[row.clone()].iter().copied())
                .collect();
            chosen.sort_by_key(|c| c.0);
            for (i, (id, weight)) in row.zip(chosen) {
                assert_eq!(id, want_ids[i], "{name}, token {t}");
                assert!((weight - want_weights[i]).abs() <= 1e-5, "{name}, token {t}: {weight}");
            }
        }
    }
}
