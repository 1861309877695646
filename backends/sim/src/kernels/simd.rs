//! Vectors of 16 lanes on each instruction set, and the choice between them.
//!
//! Every sum of the kernels is defined over 16 lanes: lane `l` adds up the elements `k` with
//! `k % 16 == l` in ascending order by fused multiply-add, and the lanes are then added pairwise.
//! An instruction set changes how many of them one instruction holds, never the result.
#![expect(
    unsafe_code,
    reason = "vendor intrinsics, and calls of functions compiled for an instruction set"
)]

use half::bf16;

/// Lanes of a vector.
pub(crate) const LANES: usize = 16;

/// An instruction set that the kernels are compiled for.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Isa {
    /// Whatever the target guarantees.
    Portable,
    /// AVX2 with FMA and F16C.
    #[cfg(target_arch = "x86_64")]
    Avx2,
    /// AVX-512 (F, BW, VL).
    #[cfg(target_arch = "x86_64")]
    Avx512,
}

impl Isa {
    /// The best one that this processor has.
    pub(crate) fn detect() -> Self {
        Isa::available().into_iter().next_back().unwrap_or(Isa::Portable)
    }

    /// All that this processor has, best last.
    pub(crate) fn available() -> Vec<Self> {
        let mut all = vec![Isa::Portable];
        #[cfg(target_arch = "x86_64")]
        {
            let avx2 = is_x86_feature_detected!("avx2")
                && is_x86_feature_detected!("fma")
                && is_x86_feature_detected!("f16c");
            if avx2 {
                all.push(Isa::Avx2);
            }
            if avx2
                && is_x86_feature_detected!("avx512f")
                && is_x86_feature_detected!("avx512bw")
                && is_x86_feature_detected!("avx512vl")
            {
                all.push(Isa::Avx512);
            }
        }
        all
    }
}

/// 16 FP32 lanes.
///
/// The implementations for an instruction set are named by [`kernel!`] alone, inside functions
/// compiled for that set, which run only where [`Isa::detect`] found it.
pub(crate) trait Lanes: Copy {
    fn splat(value: f32) -> Self;
    fn load(values: &[f32; LANES]) -> Self;
    fn load_bf16(values: &[bf16; LANES]) -> Self;
    /// FP8 E4M3 values times 2⁻⁸, exactly; a NaN byte loads as if it were 480.
    ///
    /// The factor comes from reading the byte as the upper bits of an IEEE half, whose exponent
    /// bias is 8 larger.
    fn load_fp8(values: &[u8; LANES]) -> Self;
    /// Up to 16 values, filled up with zeros.
    #[inline(always)]
    fn load_some(values: &[f32]) -> Self {
        Self::load(&filled_up(values))
    }
    /// As [`Lanes::load_some`].
    #[inline(always)]
    fn load_some_bf16(values: &[bf16]) -> Self {
        Self::load_bf16(&filled_up(values))
    }
    /// As [`Lanes::load_some`].
    #[inline(always)]
    fn load_some_fp8(values: &[u8]) -> Self {
        Self::load_fp8(&filled_up(values))
    }
    /// `self + a · b`, rounded once.
    fn fma(self, a: Self, b: Self) -> Self;
    fn array(self) -> [f32; LANES];
    /// The lanes added up: halves, quarters, eighths, pairs. `(b₀ + b₂) + (b₁ + b₃)` for the four
    /// sums `b` of every fourth lane.
    fn sum(self) -> f32;
    /// [`Lanes::sum`] of each of 16.
    #[inline(always)]
    fn sums(all: [Self; LANES]) -> [f32; LANES] {
        let mut out = [0.0; LANES];
        for (sum, one) in out.iter_mut().zip(all) {
            *sum = one.sum();
        }
        out
    }
    /// Asks for the cache line of a value that will be wanted soon.
    #[inline(always)]
    fn prefetch<T>(_value: &T) {}
}

impl Lanes for [f32; LANES] {
    #[inline(always)]
    fn splat(value: f32) -> Self {
        [value; LANES]
    }

    #[inline(always)]
    fn load(values: &[f32; LANES]) -> Self {
        *values
    }

    #[inline(always)]
    fn load_bf16(values: &[bf16; LANES]) -> Self {
        std::array::from_fn(|l| f32::from_bits(u32::from(values[l].to_bits()) << 16))
    }

    #[inline(always)]
    fn load_fp8(values: &[u8; LANES]) -> Self {
        // The exponent of FP8 moved to that of FP32 gives the value times 2⁻¹²⁰, in integer bits;
        // the product with 2¹¹² is exact.
        std::array::from_fn(|l| {
            let byte = u32::from(values[l]);
            let bits = ((byte & 0x80) << 24) | ((byte & 0x7f) << 20);
            f32::from_bits(bits) * f32::from_bits((127 + 112) << 23)
        })
    }

    #[inline(always)]
    fn fma(self, a: Self, b: Self) -> Self {
        std::array::from_fn(|l| a[l].mul_add(b[l], self[l]))
    }

    #[inline(always)]
    fn array(self) -> [f32; LANES] {
        self
    }

    #[inline(always)]
    fn sum(self) -> f32 {
        sum(self)
    }
}

#[cfg(target_arch = "x86_64")]
pub(crate) use x86::{Avx2, Avx512};

#[cfg(target_arch = "x86_64")]
mod x86 {
    use super::{LANES, Lanes, bf16};
    use std::arch::x86_64::*;

    /// One 512-bit register.
    #[derive(Clone, Copy)]
    pub(crate) struct Avx512(__m512);

    /// A bit for each of so many first lanes.
    #[inline(always)]
    fn first(count: usize) -> __mmask16 {
        debug_assert!(count <= LANES);
        ((1u32 << count.min(LANES)) - 1) as __mmask16
    }

    /// 16 FP8 values times 2⁻⁸.
    ///
    /// # Safety
    ///
    /// AVX-512 exists.
    #[inline(always)]
    unsafe fn decode_fp8(bytes: __m128i) -> Avx512 {
        // SAFETY: the caller's.
        unsafe {
            let words = _mm256_slli_epi16::<7>(_mm256_cvtepi8_epi16(bytes));
            let halves = _mm256_and_si256(words, _mm256_set1_epi16(0xbfff_u16 as i16));
            Avx512(_mm512_cvtph_ps(halves))
        }
    }

    /// 16 BF16 values.
    ///
    /// # Safety
    ///
    /// AVX-512 exists.
    #[inline(always)]
    unsafe fn widen_bf16(words: __m256i) -> Avx512 {
        // SAFETY: the caller's.
        unsafe {
            let wide = _mm512_slli_epi32::<16>(_mm512_cvtepu16_epi32(words));
            Avx512(_mm512_castsi512_ps(wide))
        }
    }

    /// The halves of two vectors, each added up: first those of `a`.
    ///
    /// # Safety
    ///
    /// AVX-512 exists.
    #[inline(always)]
    unsafe fn halves(a: __m512, b: __m512) -> __m512 {
        // SAFETY: the caller's.
        unsafe {
            let lower = _mm512_shuffle_f32x4::<0b01_00_01_00>(a, b);
            _mm512_add_ps(lower, _mm512_shuffle_f32x4::<0b11_10_11_10>(a, b))
        }
    }

    /// Every fourth lane of each of four vectors added up, a vector after the other.
    ///
    /// # Safety
    ///
    /// AVX-512 exists.
    #[inline(always)]
    unsafe fn quarters([a, b, c, d]: [Avx512; 4]) -> __m512 {
        // SAFETY: the caller's.
        unsafe {
            let (a, c) = (halves(a.0, b.0), halves(c.0, d.0));
            let even = _mm512_shuffle_f32x4::<0b10_00_10_00>(a, c);
            _mm512_add_ps(even, _mm512_shuffle_f32x4::<0b11_01_11_01>(a, c))
        }
    }

    // SAFETY of every block below: these types are used only inside functions that `kernel!`
    // compiles for the instruction set and calls after its detection, so the instructions exist;
    // loads read the 16 elements of the array reference they are given, or under a mask the
    // elements of the slice.
    impl Lanes for Avx512 {
        #[inline(always)]
        fn prefetch<T>(value: &T) {
            // SAFETY: a hint that reads nothing; SSE is part of x86-64.
            unsafe { _mm_prefetch::<_MM_HINT_T0>(std::ptr::from_ref(value).cast()) }
        }

        #[inline(always)]
        fn splat(value: f32) -> Self {
            // SAFETY: see above.
            unsafe { Avx512(_mm512_set1_ps(value)) }
        }

        #[inline(always)]
        fn load(values: &[f32; LANES]) -> Self {
            // SAFETY: see above.
            unsafe { Avx512(_mm512_loadu_ps(values.as_ptr())) }
        }

        #[inline(always)]
        fn load_bf16(values: &[bf16; LANES]) -> Self {
            // SAFETY: see above; bf16 is a transparent u16.
            unsafe { widen_bf16(_mm256_loadu_si256(values.as_ptr().cast())) }
        }

        #[inline(always)]
        fn load_fp8(values: &[u8; LANES]) -> Self {
            // SAFETY: see above.
            unsafe { decode_fp8(_mm_loadu_si128(values.as_ptr().cast())) }
        }

        #[inline(always)]
        fn load_some(values: &[f32]) -> Self {
            // SAFETY: see above.
            unsafe { Avx512(_mm512_maskz_loadu_ps(first(values.len()), values.as_ptr())) }
        }

        #[inline(always)]
        fn load_some_bf16(values: &[bf16]) -> Self {
            // SAFETY: see above.
            unsafe {
                let at = values.as_ptr().cast();
                widen_bf16(_mm256_maskz_loadu_epi16(first(values.len()), at))
            }
        }

        #[inline(always)]
        fn load_some_fp8(values: &[u8]) -> Self {
            // SAFETY: see above.
            unsafe {
                let at = values.as_ptr().cast();
                decode_fp8(_mm_maskz_loadu_epi8(first(values.len()), at))
            }
        }

        #[inline(always)]
        fn fma(self, a: Self, b: Self) -> Self {
            // SAFETY: see above.
            unsafe { Avx512(_mm512_fmadd_ps(a.0, b.0, self.0)) }
        }

        #[inline(always)]
        fn array(self) -> [f32; LANES] {
            let mut out = [0.0; LANES];
            // SAFETY: see above; `out` has 16 elements.
            unsafe { _mm512_storeu_ps(out.as_mut_ptr(), self.0) };
            out
        }

        #[inline(always)]
        fn sum(self) -> f32 {
            // SAFETY: see above.
            unsafe {
                let upper = _mm512_castsi512_pd(_mm512_castps_si512(self.0));
                let upper = _mm256_castpd_ps(_mm512_extractf64x4_pd::<1>(upper));
                sum_eight(_mm256_add_ps(_mm512_castps512_ps256(self.0), upper))
            }
        }

        /// The additions of [`Lanes::sum`], for several vectors at once.
        #[inline(always)]
        fn sums(v: [Self; LANES]) -> [f32; LANES] {
            // SAFETY: see above.
            unsafe {
                let a = quarters([v[0], v[4], v[8], v[12]]);
                let b = quarters([v[1], v[5], v[9], v[13]]);
                let c = quarters([v[2], v[6], v[10], v[14]]);
                let d = quarters([v[3], v[7], v[11], v[15]]);
                let pairs = |a, b| {
                    let (a, b) = (_mm512_castps_pd(a), _mm512_castps_pd(b));
                    let (lower, upper) = (_mm512_unpacklo_pd(a, b), _mm512_unpackhi_pd(a, b));
                    _mm512_add_ps(_mm512_castpd_ps(lower), _mm512_castpd_ps(upper))
                };
                let (a, c) = (pairs(a, b), pairs(c, d));
                let even = _mm512_shuffle_ps::<0b10_00_10_00>(a, c);
                Avx512(_mm512_add_ps(even, _mm512_shuffle_ps::<0b11_01_11_01>(a, c))).array()
            }
        }
    }

    /// The rest of [`Lanes::sum`], from the sums of opposite halves.
    ///
    /// # Safety
    ///
    /// AVX exists.
    #[inline(always)]
    unsafe fn sum_eight(a: __m256) -> f32 {
        // SAFETY: the caller's.
        unsafe {
            let b = _mm_add_ps(_mm256_castps256_ps128(a), _mm256_extractf128_ps::<1>(a));
            let c = _mm_add_ps(b, _mm_movehl_ps(b, b));
            _mm_cvtss_f32(_mm_add_ss(c, _mm_shuffle_ps::<1>(c, c)))
        }
    }

    /// Two 256-bit registers.
    #[derive(Clone, Copy)]
    pub(crate) struct Avx2(__m256, __m256);

    impl Lanes for Avx2 {
        #[inline(always)]
        fn prefetch<T>(value: &T) {
            // SAFETY: a hint that reads nothing; SSE is part of x86-64.
            unsafe { _mm_prefetch::<_MM_HINT_T0>(std::ptr::from_ref(value).cast()) }
        }

        #[inline(always)]
        fn splat(value: f32) -> Self {
            // SAFETY: see above.
            unsafe { Avx2(_mm256_set1_ps(value), _mm256_set1_ps(value)) }
        }

        #[inline(always)]
        fn load(values: &[f32; LANES]) -> Self {
            // SAFETY: see above.
            unsafe {
                let at = values.as_ptr();
                Avx2(_mm256_loadu_ps(at), _mm256_loadu_ps(at.add(8)))
            }
        }

        #[inline(always)]
        fn load_bf16(values: &[bf16; LANES]) -> Self {
            // SAFETY: see above; bf16 is a transparent u16.
            unsafe {
                let at: *const __m128i = values.as_ptr().cast();
                let widen = |words| {
                    _mm256_castsi256_ps(_mm256_slli_epi32::<16>(_mm256_cvtepu16_epi32(words)))
                };
                Avx2(widen(_mm_loadu_si128(at)), widen(_mm_loadu_si128(at.add(1))))
            }
        }

        #[inline(always)]
        fn load_fp8(values: &[u8; LANES]) -> Self {
            // SAFETY: see above.
            unsafe {
                let bytes = _mm_loadu_si128(values.as_ptr().cast());
                let words = _mm256_slli_epi16::<7>(_mm256_cvtepi8_epi16(bytes));
                let halves = _mm256_and_si256(words, _mm256_set1_epi16(0xbfff_u16 as i16));
                Avx2(
                    _mm256_cvtph_ps(_mm256_castsi256_si128(halves)),
                    _mm256_cvtph_ps(_mm256_extracti128_si256::<1>(halves)),
                )
            }
        }

        #[inline(always)]
        fn fma(self, a: Self, b: Self) -> Self {
            // SAFETY: see above.
            unsafe { Avx2(_mm256_fmadd_ps(a.0, b.0, self.0), _mm256_fmadd_ps(a.1, b.1, self.1)) }
        }

        #[inline(always)]
        fn array(self) -> [f32; LANES] {
            let mut out = [0.0; LANES];
            // SAFETY: see above; `out` has 16 elements.
            unsafe {
                _mm256_storeu_ps(out.as_mut_ptr(), self.0);
                _mm256_storeu_ps(out.as_mut_ptr().add(8), self.1);
            }
            out
        }

        #[inline(always)]
        fn sum(self) -> f32 {
            // SAFETY: see above.
            unsafe { sum_eight(_mm256_add_ps(self.0, self.1)) }
        }
    }
}

/// Asks for the bytes at an address, which will be wanted soon.
pub(crate) fn fetch(address: usize, bytes: usize) {
    #[cfg(not(target_arch = "x86_64"))]
    let _ = (address, bytes);
    #[cfg(target_arch = "x86_64")]
    for line in 0..bytes.div_ceil(64) {
        let at = std::ptr::without_provenance::<i8>(address.wrapping_add(line * 64));
        // SAFETY: a hint that reads nothing, whatever the address; SSE is part of x86-64.
        unsafe { std::arch::x86_64::_mm_prefetch::<{ std::arch::x86_64::_MM_HINT_T0 }>(at) }
    }
}

/// Adds the lanes: halves, quarters, eighths, pairs.
#[inline(always)]
pub(crate) fn sum(v: [f32; LANES]) -> f32 {
    let mut a = [0.0; 8];
    for l in 0..8 {
        a[l] = v[l] + v[l + 8];
    }
    let b = [a[0] + a[4], a[1] + a[5], a[2] + a[6], a[3] + a[7]];
    (b[0] + b[2]) + (b[1] + b[3])
}

/// An element type that vectors are loaded from.
pub(crate) trait Element: Copy + Send + Sync + bytemuck::Pod {
    fn load<L: Lanes>(values: &[Self; LANES]) -> L;
    /// Up to 16, filled up with zeros.
    fn load_some<L: Lanes>(values: &[Self]) -> L;
    fn widen(self) -> f32;
}

impl Element for f32 {
    #[inline(always)]
    fn load<L: Lanes>(values: &[f32; LANES]) -> L {
        L::load(values)
    }

    #[inline(always)]
    fn load_some<L: Lanes>(values: &[f32]) -> L {
        L::load_some(values)
    }

    #[inline(always)]
    fn widen(self) -> f32 {
        self
    }
}

impl Element for bf16 {
    #[inline(always)]
    fn load<L: Lanes>(values: &[bf16; LANES]) -> L {
        L::load_bf16(values)
    }

    #[inline(always)]
    fn load_some<L: Lanes>(values: &[bf16]) -> L {
        L::load_some_bf16(values)
    }

    #[inline(always)]
    fn widen(self) -> f32 {
        f32::from_bits(u32::from(self.to_bits()) << 16)
    }
}

/// FP8 as weights: loads times 2⁻⁸, see [`Lanes::load_fp8`].
impl Element for u8 {
    #[inline(always)]
    fn load<L: Lanes>(values: &[u8; LANES]) -> L {
        L::load_fp8(values)
    }

    #[inline(always)]
    fn load_some<L: Lanes>(values: &[u8]) -> L {
        L::load_some_fp8(values)
    }

    #[inline(always)]
    fn widen(self) -> f32 {
        <[f32; LANES]>::load_fp8(&[self; LANES])[0]
    }
}

/// Calls `f` with each vector of the equally long slices, the last one filled up with zeros.
///
/// A macro, because a closure would not be compiled for the caller's instruction set.
macro_rules! for_vectors {
    (|$i:ident| in $len:expr, $whole:block, |$tail:ident| $rest:block) => {{
        let len = $len;
        let mut $i = 0;
        while $i + $crate::kernels::simd::LANES <= len {
            $whole
            $i += $crate::kernels::simd::LANES;
        }
        if $i < len {
            let $tail = len - $i;
            $rest
        }
    }};
}
pub(crate) use for_vectors;

/// The 16 elements from `at`.
#[inline(always)]
pub(crate) fn vector<T>(slice: &[T], at: usize) -> &[T; LANES] {
    slice[at..at + LANES].as_array().unwrap_or_else(|| unreachable!("16 elements were sliced"))
}

/// Up to 16 elements, filled up with zeros.
#[inline(always)]
fn filled_up<T: bytemuck::Zeroable + Copy>(values: &[T]) -> [T; LANES] {
    let mut out = [T::zeroed(); LANES];
    out[..values.len()].copy_from_slice(values);
    out
}

/// Defines a function whose body is compiled once per instruction set: `fn name(isa, args..)`.
/// The body is generic over `L: Lanes`. It must not touch vectors inside closures (`map`,
/// `from_fn`): those are functions of their own, compiled for the base instruction set.
macro_rules! kernel {
    (
        $(#[$doc:meta])*
        fn $name:ident < $L:ident $(, $T:ident : $bound:path)* $(; $(const $C:ident),+)? > (
            $($arg:ident : $ty:ty),* $(,)?
        ) $(-> $ret:ty)? $body:block
    ) => {
        $(#[$doc])*
        #[allow(clippy::too_many_arguments, reason = "kernels take their operands one by one")]
        pub(crate) fn $name<$($T: $bound,)* $($(const $C: usize,)+)?>(
            isa: $crate::kernels::simd::Isa, $($arg: $ty),*
        ) $(-> $ret)? {
            #[inline(always)]
            #[allow(
                clippy::too_many_arguments,
                clippy::needless_range_loop,
                reason = "as above; and registers are numbered, not iterated over"
            )]
            fn body<$L: $crate::kernels::simd::Lanes, $($T: $bound,)* $($(const $C: usize,)+)?>(
                $($arg: $ty),*
            ) $(-> $ret)? $body

            #[cfg(target_arch = "x86_64")]
            #[target_feature(enable = "avx512f,avx512bw,avx512vl,avx2,fma,f16c")]
            #[allow(clippy::too_many_arguments, reason = "as above")]
            fn avx512<$($T: $bound,)* $($(const $C: usize,)+)?>($($arg: $ty),*) $(-> $ret)? {
                body::<$crate::kernels::simd::Avx512, $($T,)* $($($C,)+)?>($($arg),*)
            }

            #[cfg(target_arch = "x86_64")]
            #[target_feature(enable = "avx2,fma,f16c")]
            #[allow(clippy::too_many_arguments, reason = "as above")]
            fn avx2<$($T: $bound,)* $($(const $C: usize,)+)?>($($arg: $ty),*) $(-> $ret)? {
                body::<$crate::kernels::simd::Avx2, $($T,)* $($($C,)+)?>($($arg),*)
            }

            match isa {
                $crate::kernels::simd::Isa::Portable => {
                    body::<[f32; $crate::kernels::simd::LANES], $($T,)* $($($C,)+)?>($($arg),*)
                }
                // SAFETY: the variant exists only where `Isa::available` detected the features.
                #[cfg(target_arch = "x86_64")]
                #[expect(unsafe_code, reason = "a call into code for a detected instruction set")]
                $crate::kernels::simd::Isa::Avx2 => unsafe { avx2::<$($T,)* $($($C,)+)?>($($arg),*) },
                // SAFETY: as above.
                #[cfg(target_arch = "x86_64")]
                #[expect(unsafe_code, reason = "a call into code for a detected instruction set")]
                $crate::kernels::simd::Isa::Avx512 => unsafe { avx512::<$($T,)* $($($C,)+)?>($($arg),*) },
            }
        }
    };
}
pub(crate) use kernel;
