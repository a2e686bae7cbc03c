// Vectors as wide as the machine's, in the compiler's own notation.
#pragma once
#include <algorithm>
#include <bit>
#include <cmath>
#include <cstdint>
#include <cstring>
#include <type_traits>
#ifdef __x86_64__
#include <immintrin.h>
#endif

#if defined(__AVX512F__) && defined(__AVX512BW__)
constexpr int kLanes = 16;
#elif defined(__AVX2__)
constexpr int kLanes = 8;
#else
constexpr int kLanes = 4;
#endif
constexpr int kPanel = 32;                 // rows of a panel, whatever the vectors' width
constexpr int kVectors = kPanel / kLanes;  // vectors that make up a panel's column
constexpr int kBlock = 32;                 // weights that share a scale, as in GGUF
constexpr int kColumn = 4 * kPanel;        // bytes that a panel's column takes: 4 for each row

typedef float f32s __attribute__((vector_size(4 * kLanes)));
typedef int32_t i32s __attribute__((vector_size(4 * kLanes)));
typedef uint32_t u32s __attribute__((vector_size(4 * kLanes)));
typedef uint16_t u16s __attribute__((vector_size(2 * kLanes)));
typedef int8_t i8s __attribute__((vector_size(kLanes)));
typedef uint8_t u8s __attribute__((vector_size(kLanes)));

struct bf16 {
    uint16_t bits;
};
struct fp8 {  // e4m3: a sign, four bits of exponent (bias 7), three of mantissa; no infinities
    uint8_t bits;
};

template <class V>
static inline V load_as(const void* p) {
    V v;
    memcpy(&v, p, sizeof v);
    return v;
}

// Where GCC 12 takes several instructions for a conversion that is one, the processor's own is named.
static inline u32s widen(u16s v) {
#if defined(__AVX512F__) && defined(__AVX512BW__)
    return (u32s)_mm512_cvtepu16_epi32((__m256i)v);
#elif defined(__AVX2__)
    return (u32s)_mm256_cvtepu16_epi32((__m128i)v);
#else
    return __builtin_convertvector(v, u32s);
#endif
}
static inline f32s load(const float* p) { return load_as<f32s>(p); }
static inline f32s load(const bf16* p) { return (f32s)(widen(load_as<u16s>(p)) << 16); }
static inline f32s load_half(const uint8_t* p) {  // IEEE fp16, as GGUF's scales are
#if defined(__AVX512F__) && defined(__AVX512BW__)
    return (f32s)_mm512_cvtph_ps(load_as<__m256i>(p));
#elif defined(__AVX2__) && defined(__F16C__)
    return (f32s)_mm256_cvtph_ps(load_as<__m128i>(p));
#else
    f32s v;
    for (int i = 0; i < kLanes; ++i) v[i] = (float)load_as<_Float16>(p + 2 * i);
    return v;
#endif
}
static inline f32s load(const fp8* p) {  // its fields moved into those of fp16 or fp32 give the number over 2^8 or 2^120
#if defined(__AVX512F__) && defined(__AVX512BW__)
    __m256i w = _mm256_cvtepu8_epi16(load_as<__m128i>(p));
    __m256i sign = _mm256_slli_epi16(_mm256_and_si256(w, _mm256_set1_epi16(0x80)), 8);
    __m256i rest = _mm256_slli_epi16(_mm256_and_si256(w, _mm256_set1_epi16(0x7f)), 7);
    return (f32s)_mm512_cvtph_ps(_mm256_or_si256(sign, rest)) * 256.f;
#elif defined(__AVX2__) && defined(__F16C__)
    __m128i w = _mm_cvtepu8_epi16(_mm_loadl_epi64((const __m128i*)p));
    __m128i sign = _mm_slli_epi16(_mm_and_si128(w, _mm_set1_epi16(0x80)), 8);
    __m128i rest = _mm_slli_epi16(_mm_and_si128(w, _mm_set1_epi16(0x7f)), 7);
    return (f32s)_mm256_cvtph_ps(_mm_or_si128(sign, rest)) * 256.f;
#else
    u32s w = __builtin_convertvector(load_as<u8s>(p), u32s);
    return (f32s)((w & 0x80) << 24 | (w & 0x7f) << 20) * 0x1p120f;
#endif
}
static inline void store(float* p, f32s v) { memcpy(p, &v, sizeof v); }
static inline u32s round_to_bf16(f32s v) {  // to nearest, ties to even
    u32s bits = (u32s)v;
    return (bits + 0x7fff + ((bits >> 16) & 1)) >> 16;
}
static inline void store(bf16* p, f32s v) {
    u16s rounded = __builtin_convertvector(round_to_bf16(v), u16s);
    memcpy(p, &rounded, sizeof rounded);
}

template <class V>
static inline V max(V a, V b) { return a > b ? a : b; }
static inline f32s min(f32s a, f32s b) { return a < b ? a : b; }
static inline f32s round(f32s v) {  // adding 1.5 * 2^23 leaves no bits for the fraction; for |v| < 2^22
    return (v + 12582912.f) - 12582912.f;
}
static inline void store(fp8* p, f32s v) {  // to nearest, ties to even; the largest, 448, stands for all beyond
    u32s sign = ((u32s)v >> 24) & 0x80;
    f32s size = min((f32s)((u32s)v & 0x7fffffff), f32s{} + 448.f);
    u32s bits = (u32s)size;
    u32s normal = ((bits + 0x7ffff + ((bits >> 20) & 1)) >> 20) - (120 << 3);
    u32s small = (u32s)__builtin_convertvector(round(size * 512.f), i32s);  // below 2^-6 steps are of 2^-9
    u8s code = __builtin_convertvector(sign | (size < 0x1p-6f ? small : normal), u8s);
    memcpy(p, &code, sizeof code);
}
static inline f32s exp(f32s v) {  // 2^n * e^r, |r| <= ln(2) / 2; relative error about 2e-7
    v = min(max(v, f32s{} - 87.f), f32s{} + 88.f);
    f32s n = round(v * 1.44269504f);
    f32s r = v - n * 0.693359375f + n * 2.12194440e-4f;
    f32s p = r * (1.f / 720) + 1.f / 120;
    p = p * r + 1.f / 24;
    p = p * r + 1.f / 6;
    p = p * r + 0.5f;
    p = p * r * r + r + 1.f;
    return p * (f32s)((__builtin_convertvector(n, i32s) + 127) << 23);
}
static inline float sum_of(f32s v) {
    float sum = 0;
    for (int i = 0; i < kLanes; ++i) sum += v[i];
    return sum;
}
template <class V>
static inline auto max_of(V v) {
    auto most = v[0];
    for (int i = 1; i < kLanes; ++i) most = std::max(most, v[i]);
    return most;
}
static inline f32s only_first(int n, f32s v, float rest) {  // the first n lanes of v, and `rest` in the others
    i32s index;
    for (int i = 0; i < kLanes; ++i) index[i] = i;
    return index < n ? v : f32s{} + rest;
}

// Lane i of the result is the sum over v[i]. v's vectors are folded in pairs, half by half: after the fold by kHalf
// every vector holds kLanes / kHalf partial sums of kHalf lanes.
template <int kHalf = kLanes / 2>
static inline f32s sum_rows(f32s (&v)[kLanes]) {
    i32s low;
    for (int i = 0; i < kLanes; ++i) low[i] = (i / kHalf % 2) * kLanes + i / kHalf / 2 * 2 * kHalf + i % kHalf;
    for (int i = 0; i < kHalf; ++i)
        v[i] = __builtin_shuffle(v[i], v[i + kHalf], low) + __builtin_shuffle(v[i], v[i + kHalf], low + kHalf);
    if constexpr (kHalf == 1) return v[0];
    else return sum_rows<kHalf / 2>(v);
}

template <int kHalf = kLanes / 2>
static inline void transpose(f32s (&v)[kLanes]) {  // by swapping squares of kHalf lanes, then of half as many
    i32s low, high;
    for (int i = 0; i < kLanes; ++i) {
        low[i] = i & kHalf ? kLanes + (i ^ kHalf) : i;
        high[i] = i & kHalf ? kLanes + i : i ^ kHalf;
    }
    for (int i = 0; i < kLanes; ++i) {
        if (i & kHalf) continue;
        f32s upper = v[i], lower = v[i + kHalf];
        v[i] = __builtin_shuffle(upper, lower, low), v[i + kHalf] = __builtin_shuffle(upper, lower, high);
    }
    if constexpr (kHalf > 1) transpose<kHalf / 2>(v);
}

// call(integral_constant<R>, first) for n rows, kTile at a time and the rest one by one.
template <int kTile, class Call>
static inline void by_tiles(int n, Call call) {
    int first = 0;
    for (; first + kTile <= n; first += kTile) call(std::integral_constant<int, kTile>{}, first);
    for (; first < n; ++first) call(std::integral_constant<int, 1>{}, first);
}

// Each lane of w holds two bf16 weights of its own row; x holds the two activations they meet, rounded to bf16 too.
#if defined(__AVX512BF16__)
typedef bf16 Rounded;
static inline void store_rounded(bf16* p, f32s v) { store(p, v); }
static inline f32s dot2(f32s sum, u32s w, const bf16* x) {
    return (f32s)_mm512_dpbf16_ps((__m512)sum, (__m512bh)w, (__m512bh)_mm512_set1_epi32(load_as<int>(x)));
}
#else
typedef float Rounded;  // so that a product takes it as it lies
static inline void store_rounded(float* p, f32s v) { store(p, (f32s)(round_to_bf16(v) << 16)); }
static inline f32s dot2(f32s sum, u32s w, const float* x) {
    sum += (f32s)(w << 16) * x[0];
    return sum + (f32s)(w & 0xffff0000u) * x[1];
}
#endif

// Each lane of w holds four weights of its own row; x holds the four activations in -127..127 they meet. The weights of
// int8 lie in 0..255 and mean 128 less: sums begin with what that makes of `total`, the sum of the block's activations.
// Those of int4 lie in 0..15, and sum_int4 makes the sum of what a block's products came to.
#if defined(__AVX2__) && !defined(__AVX512BW__)
static inline i32s begin_int8(int) { return i32s{}; }
static inline i32s dot4_int8(i32s sum, u32s w, uint32_t x) {  // |w| times x with w's sign: a pair fits in 16 bits
    __m256i weights = _mm256_xor_si256((__m256i)w, _mm256_set1_epi8(-128));
    __m256i signed_x = _mm256_sign_epi8(_mm256_set1_epi32((int)x), weights);
    __m256i pairs = _mm256_maddubs_epi16(_mm256_abs_epi8(weights), signed_x);
    return sum + (i32s)_mm256_madd_epi16(pairs, _mm256_set1_epi16(1));
}
static inline i32s dot4_int4(i32s sum, u32s w, uint32_t x) {  // two sums of 16 bits: at most 16 * 15 * 127 in a block
    __m256i pairs = _mm256_maddubs_epi16((__m256i)w, _mm256_set1_epi32((int)x));
    return (i32s)_mm256_add_epi16((__m256i)sum, pairs);
}
static inline i32s sum_int4(i32s sum) { return (i32s)_mm256_madd_epi16((__m256i)sum, _mm256_set1_epi16(1)); }
#else
static inline i32s dot4(i32s sum, u32s w, uint32_t x) {
#if defined(__AVX512VNNI__) && defined(__AVX512BW__)
    return (i32s)_mm512_dpbusd_epi32((__m512i)sum, (__m512i)w, _mm512_set1_epi32((int)x));
#else
    for (int i = 0; i < 4; ++i) sum += (i32s)((w >> (8 * i)) & 255) * (int32_t)(int8_t)(x >> (8 * i));
    return sum;
#endif
}
static inline i32s begin_int8(int total) { return i32s{} - 128 * total; }
static inline i32s dot4_int8(i32s sum, u32s w, uint32_t x) { return dot4(sum, w, x); }
static inline i32s dot4_int4(i32s sum, u32s w, uint32_t x) { return dot4(sum, w, x); }
static inline i32s sum_int4(i32s sum) { return sum; }
#endif
