// Bias + rectifier, forward and backward, for CPU tensors: the mathematics of ../rectify.py in one compact source.
// Plain C++17 with GCC / Clang vector extensions and no torch header (those cost 11 to 44 s to compile), built at
// first use by build.py.
//
// A tensor is a dense run of n elements; the channel of memory position p is (p / inner) % channels. Two walks cover
// every layout:
//   planes  inner is large, or there are no channels: pieces of one plane, bias and slope are numbers, one partial sum
//           a piece;
//   rows    inner is small (channels_last, linear, 7 x 7): rows of whole periods, bias and slope are vectors, partial
//           sums a column.
// Both cut the tensor by its shape alone and add partial sums in a fixed order, so results don't depend on the number
// of threads, and no two threads write one byte of the bits, but for the strips of wide rows, which say so.
// Compile with -ffp-contract=off: float32 equals eager bit for bit, and the sums are those of the products stored.
#include <algorithm>
#include <bitset>
#include <cctype>
#include <cmath>
#include <cstdint>
#include <cstring>
#include <fstream>
#include <memory>
#include <new>
#include <numeric>
#include <string>
#include <thread>
#include <tuple>
#include <type_traits>
#include <vector>

#include "call.h"

#include <dlfcn.h>
#include <unistd.h>
#if defined(__x86_64__)
#include <immintrin.h>
#endif

namespace {

#if defined(__AVX512F__) && defined(__AVX512BW__) && defined(__AVX512DQ__) && defined(__AVX512VL__)
#define VECTOR_BYTES 64
#elif defined(__AVX2__)
#define VECTOR_BYTES 32
#else
#define VECTOR_BYTES 16  // SSE2, NEON, or whatever the compiler makes of 16-byte vectors
#endif

// ---------------------------------------------------------------- vectors

template <class E, int N> using vec __attribute__((vector_size(N * sizeof(E)))) = E;

template <class V> V load(const void *from) {
  V v;
  std::memcpy(&v, from, sizeof v);
  return v;
}
template <class V> void store(void *to, V v) { std::memcpy(to, &v, sizeof v); }

// To memory past the caches, which then need not read what is written over. Other threads see it after `fence`.
template <int BYTES> void stream(void *to, const void *from) {
#if VECTOR_BYTES >= 32
  if constexpr (BYTES == 32) _mm256_stream_si256((__m256i *)to, load<__m256i>(from));
  else _mm_stream_si128((__m128i *)to, load<__m128i>(from));
#else
  std::memcpy(to, from, BYTES);
#endif
}
void fence() {
#if VECTOR_BYTES >= 32
  _mm_sfence();
#endif
}

struct bf16 { uint16_t bits; };
struct fp16 { uint16_t bits; };

// What element type T computes in (A), how many lanes a vector of it has, and how it is read and written. Of 32 bytes at
// most: from beyond the caches, Zen 4 moves 64 bytes at once 6 to 13 % slower, and 3 to 5 % where two halves are joined.
template <class T> struct Element {
  using A = T;
  static constexpr int lanes = std::min(VECTOR_BYTES, 32) / sizeof(A);
  using V = vec<A, lanes>;
  static V read(const T *p) { return load<V>(p); }
  static void write(T *p, V v) { store(p, v); }
  static void write_exact(T *p, V v) { store(p, v); }  // of a value that T holds
};

struct Short {
  using A = float;
  static constexpr int lanes = VECTOR_BYTES / 4;
  using V = vec<float, lanes>;
  using U = vec<uint32_t, lanes>;
  using H = vec<uint16_t, lanes>;

  static H narrow(U u) {  // of values below 2^16
#if VECTOR_BYTES == 32
    return (H)_mm_packus_epi32(_mm256_castsi256_si128((__m256i)u), _mm256_extracti128_si256((__m256i)u, 1));
#else
    return __builtin_convertvector(u, H);
#endif
  }
};

template <> struct Element<bf16> : Short {
  static V read(const bf16 *p) { return (V)(__builtin_convertvector(load<H>(p), U) << 16); }
  static void write(bf16 *p, V v) {  // nearest even; not vcvtneps2bf16, which flushes subnormals
    U u = (U)v;
    U r = (u + 0x7fff + ((u >> 16) & 1)) >> 16;
    store(p, narrow(v == v ? r : U{} + 0x7fc0));
  }
  static void write_exact(bf16 *p, V v) { store(p, narrow((U)v >> 16)); }
};

template <> struct Element<fp16> : Short {
  static void write_exact(fp16 *p, V v) { write(p, v); }
#if VECTOR_BYTES == 64
  static V read(const fp16 *p) { return (V)_mm512_cvtph_ps(load<__m256i>(p)); }
  static void write(fp16 *p, V v) { store(p, _mm512_cvtps_ph((__m512)v, 0)); }
#elif VECTOR_BYTES == 32
  static V read(const fp16 *p) { return (V)_mm256_cvtph_ps(load<__m128i>(p)); }
  static void write(fp16 *p, V v) { store(p, _mm256_cvtps_ph((__m256)v, 0)); }
#elif defined(__aarch64__)
  using F = vec<__fp16, lanes>;
  static V read(const fp16 *p) { return __builtin_convertvector(load<F>(p), V); }
  static void write(fp16 *p, V v) { store(p, __builtin_convertvector(v, F)); }
#else
  static V read(const fp16 *p) {  // shift into place, rescale the exponent by 2^112; inf and NaN get all exponent bits
    U h = __builtin_convertvector(load<H>(p), U), m = (h & 0x7fff) << 13;
    U r = (U)((V)m * 0x1p112f);
    r = (m >= (0x7c00u << 13)) ? (m | 0x7f800000u) : r;
    return (V)(r | (h & 0x8000) << 16);
  }
  static void write(fp16 *p, V v) {
    U u = (U)v, sign = (u >> 16) & 0x8000, m = u & 0x7fffffff;
    U normal = (m + 0xfff + ((m >> 13) & 1) - (112u << 23)) >> 13;  // nearest even on the 13 bits that go
    U small = (U)((V)m + 0.5f) - 0x3f000000;  // below 2^-14: the adder rounds to multiples of 2^-24
    U r = (m < (113u << 23)) ? small : normal;
    r = (m >= 0x477ff000) ? U{} + 0x7c00 : r;                       // 65520 and above: infinite
    r = (m > 0x7f800000) ? U{} + 0x7e00 : r;
    store(p, narrow(r | sign));
  }
#endif
};

// ---------------------------------------------------------------- sides: one bit a lane

// Which lanes of a vector are on the negative side, as a mask that chooses between vectors and as bits of a word.
template <class A, int W> struct Side {
  using V = vec<A, W>;
  using M = decltype(V{} < V{});
  static M at_most_zero(V z) { return z <= 0; }
  static M not_above_zero(V z) { return ~(z > 0); }
  static V choose(M m, V a, V b) { return m ? a : b; }
  static V positive_part(V z) { return z < 0 ? V{} : z; }
  static uint64_t bits(M m) {
#if VECTOR_BYTES >= 32
    return sizeof(A) == 4 ? _mm256_movemask_ps((__m256)m) : _mm256_movemask_pd((__m256d)m);
#elif defined(__SSE2__)
    return sizeof(A) == 4 ? _mm_movemask_ps((__m128)m) : _mm_movemask_pd((__m128d)m);
#else
    uint64_t word = 0;
    for (int i = 0; i < W; i++) word |= (uint64_t)(m[i] & 1) << i;
    return word;
#endif
  }
  static M of(uint64_t bits) {
    M lane;
    for (int i = 0; i < W; i++) lane[i] = 1 << i;
    return ((M{} + (decltype(lane[0] + 0))(bits & ((1 << W) - 1))) & lane) != 0;
  }
};
#if VECTOR_BYTES == 64
template <> struct Side<float, 16> {
  using M = __mmask16;
  using V = vec<float, 16>;
  static M at_most_zero(V z) { return _mm512_cmp_ps_mask((__m512)z, _mm512_setzero_ps(), _CMP_LE_OQ); }
  static M not_above_zero(V z) { return _mm512_cmp_ps_mask((__m512)z, _mm512_setzero_ps(), _CMP_NGT_UQ); }
  static V choose(M m, V a, V b) { return (V)_mm512_mask_blend_ps(m, (__m512)b, (__m512)a); }
  // z itself where it is NaN or a zero of either sign
  static V positive_part(V z) { return (V)_mm512_max_ps(_mm512_setzero_ps(), (__m512)z); }
  static uint64_t bits(M m) { return m; }
  static M of(uint64_t bits) { return (M)bits; }
};
#endif

// Bits of a tensor as words of 64 for one segment, and back. The byte between two segments of one thread belongs to
// both: the former leaves zeros in the latter's place. Little-endian, as are x86-64 and AArch64.
static_assert(__BYTE_ORDER__ == __ORDER_LITTLE_ENDIAN__, "a word's bytes are in the order of its bits");

void read_bits(const uint8_t *bits, int64_t position, int64_t count, uint64_t *words) {
  const int shift = position % 8;
  std::memcpy(words, bits + position / 8, (shift + count + 7) / 8);
  if (shift)
    for (int64_t i = 0; 64 * i < count; i++) words[i] = words[i] >> shift | words[i + 1] << (64 - shift);
}

// Bits of words from `count` on are zero, and there is room for one word more. `shared`: other threads write the
// neighbours' bits, into bytes that were zero.
void write_bits(uint8_t *bits, int64_t position, int64_t count, uint64_t *words, bool shared) {
  const int shift = position % 8;
  int64_t bytes = (shift + count + 7) / 8;
  bits += position / 8;
  if (shift) {
    words[(count + 63) / 64] = 0;
    for (int64_t i = (count + 63) / 64; i > 0; i--) words[i] = words[i] << shift | words[i - 1] >> (64 - shift);
    words[0] <<= shift;
  }
  if (!shared) {
    if (shift) words[0] |= *bits;
    std::memcpy(bits, words, bytes);
    return;
  }
  const uint8_t *from = (const uint8_t *)words;
  __atomic_fetch_or(bits, *from, __ATOMIC_RELAXED);
  if (bytes > 1) __atomic_fetch_or(bits + bytes - 1, from[bytes - 1], __ATOMIC_RELAXED);
  if (bytes > 2) std::memcpy(bits + 1, from + 1, bytes - 2);
}

// ---------------------------------------------------------------- random slopes: philox.py's rule

constexpr int rounds = 7, batch = VECTOR_BYTES / 8;  // counters a vector, four words each
using u64 = vec<uint64_t, batch>;

// Product of the low halves; x's high halves may hold anything.
u64 multiply(u64 x, uint32_t by) {
#if VECTOR_BYTES == 64
  return (u64)_mm512_mul_epu32((__m512i)x, _mm512_set1_epi64(by));
#elif VECTOR_BYTES == 32
  return (u64)_mm256_mul_epu32((__m256i)x, _mm256_set1_epi64x(by));
#elif defined(__SSE2__)
  return (u64)_mm_mul_epu32((__m128i)x, _mm_set1_epi64x(by));
#else
  return (x & 0xffffffff) * (uint64_t)by;
#endif
}

// The 64-bit seed as keys of the rounds, spread over vectors once a call.
struct Philox {
  u64 key0[rounds], key1[rounds], lanes;

  explicit Philox(uint64_t seed) {
    uint32_t k0 = (uint32_t)seed, k1 = (uint32_t)(seed >> 32);
    for (int r = 0; r < rounds; r++, k0 += 0x9E3779B9u, k1 += 0xBB67AE85u) key0[r] = u64{} + k0, key1[r] = u64{} + k1;
    for (int i = 0; i < batch; i++) lanes[i] = (i % 2) * (batch / 2) + i / 2;  // 0 4 1 5 2 6 3 7: unpacking undoes it
  }

  // Words of `batch` successive counters, in the order of the positions they serve.
  [[gnu::always_inline]] void words(uint64_t counter, uint32_t *to) const {
    u64 x0 = lanes + counter, x1 = x0 >> 32, x2{}, x3{};
#pragma GCC unroll 7
    for (int r = 0; r < rounds; r++) {
      u64 p0 = multiply(x0, 0xD2511F53u), p1 = multiply(x2, 0xCD9E8D57u);
      x0 = (p1 >> 32) ^ x1 ^ key0[r], x2 = (p0 >> 32) ^ x3 ^ key1[r], x1 = p1, x3 = p0;
    }
    u64 a = (x0 & 0xffffffff) | x1 << 32, b = (x2 & 0xffffffff) | x3 << 32;
#if VECTOR_BYTES == 64
    store(to, _mm512_unpacklo_epi64((__m512i)a, (__m512i)b));
    store(to + 16, _mm512_unpackhi_epi64((__m512i)a, (__m512i)b));
#elif VECTOR_BYTES == 32
    store(to, _mm256_unpacklo_epi64((__m256i)a, (__m256i)b));
    store(to + 8, _mm256_unpackhi_epi64((__m256i)a, (__m256i)b));
#else
    for (int i = 0; i < 2; i++) {
      store(to + 4 * i, (uint64_t)a[i]);
      store(to + 4 * i + 2, (uint64_t)b[i]);
    }
#endif
  }
};

constexpr int64_t block = 16384;   // elements of memory that a thread takes at a time
constexpr int64_t longest = 4096;  // elements of a segment
constexpr int64_t widest = 1024;   // columns of rows
constexpr int deep = 8;            // rows that are summed before float64 takes the sum

// A window of slopes in L1.
template <class A> struct Slopes {
  static constexpr int64_t step = 64;
  static constexpr int lanes = VECTOR_BYTES / sizeof(A);
  using V = vec<A, lanes>;
  Philox philox;
  A scale, middle;
  bool divisor;
  int64_t begin = 0, end = 0;
  A window[longest + 2 * step];

  explicit Slopes(const Call &c)
      : philox((uint64_t)*c.seed), scale((A)c.first), middle((A)c.second), divisor(c.slope == drawn_divisor) {}

  // Slopes of [position, position + count); those up to `stop` are likely next.
  const A *at(int64_t position, int64_t count, int64_t stop) {
    if (position < begin || position + count > end) {
      begin = position & ~(int64_t)3;
      end = begin + fill(window, begin, std::min(stop, position + std::max(count, longest / 2)) - begin);
    }
    return window + (position - begin);
  }

  // Slopes from `from`, a multiple of 4, on; how many, in whole steps.
  int64_t fill(A *to, int64_t from, int64_t wanted) const {
    int64_t done = 0;
    for (; done < wanted; done += step) {
      uint32_t words[step];
      for (int i = 0; i < step; i += 4 * batch) philox.words((uint64_t)(from + done + i) / 4, words + i);
      for (int i = 0; i < step; i += lanes) {
        const V drawn = multiply_add(__builtin_convertvector(load<vec<int32_t, lanes>>(words + i), V));
        store(to + done + i, divisor ? 1 / drawn : drawn);
      }
    }
    return done;
  }

  V multiply_add(V word) const {
    const V x = scale - V{}, y = middle - V{};  // 0 + -0 would be 0
#if VECTOR_BYTES == 64
    if constexpr (sizeof(A) == 4) return (V)_mm512_fmadd_ps((__m512)word, (__m512)x, (__m512)y);
    else return (V)_mm512_fmadd_pd((__m512d)word, (__m512d)x, (__m512d)y);
#elif VECTOR_BYTES == 32
    if constexpr (sizeof(A) == 4) return (V)_mm256_fmadd_ps((__m256)word, (__m256)x, (__m256)y);
    else return (V)_mm256_fmadd_pd((__m256d)word, (__m256d)x, (__m256d)y);
#else
    V v;
    for (int i = 0; i < lanes; i++) {
#if defined(__aarch64__)
      v[i] = std::fma(word[i], x[i], y[i]);
#else  // a call of the C library; double holds the product of two floats exactly
      v[i] = sizeof(A) == 4 ? (A)((double)word[i] * x[i] + y[i]) : std::fma(word[i], x[i], y[i]);
#endif
    }
    return v;
#endif
  }
};

// ---------------------------------------------------------------- one segment: contiguous, `longest` elements at most

// Of one plane, or of lines of `columns`, which are a multiple of 64 where a segment holds several.

// marking: forward that finds the bits; scaling: forward of x * scale + bias, without bits; streaming: forward without
// bits, whose output the caches cannot hold
enum Pass { forward, marking, scaling, streaming, backward };

// Adds to sums of vectors, whose lanes are float64: a constant's sum keeps its digits however short a vector is.
template <class V> void widen(V v, double *sum) {
  using D = vec<double, sizeof(V) / 8>;
  if constexpr (sizeof(v[0]) == 8) {
    store(sum, load<D>(sum) + v);
#if VECTOR_BYTES == 64
  } else if constexpr (sizeof v == 64) {
    store(sum, load<D>(sum) + _mm512_cvtps_pd(_mm512_castps512_ps256((__m512)v)));
    store(sum + 8, load<D>(sum + 8) + _mm512_cvtps_pd(_mm512_extractf32x8_ps((__m512)v, 1)));
#endif
#if VECTOR_BYTES >= 32
  } else {
    store(sum, load<D>(sum) + _mm256_cvtps_pd(_mm256_castps256_ps128((__m256)v)));
    store(sum + 4, load<D>(sum + 4) + _mm256_cvtps_pd(_mm256_extractf128_ps((__m256)v, 1)));
#else
  } else {
    for (int i = 0; i < 4; i++) sum[i] += v[i];
#endif
  }
}

template <class T> struct Memory {
  const T *value, *grad;
  T *out;
  uint64_t *words;  // the sides
  int64_t count;
};

// Reads grad backward and, unless the slope is learned, no value: words that the marking pass made tell the sides.
template <class T, Slope S, bool ROWS, Pass P> struct Segment {
  using E = Element<T>;
  using A = typename E::A;
  using V = typename E::V;
  using Sides = Side<A, E::lanes>;
  using M = typename Sides::M;
  using Total = std::conditional_t<ROWS, A, double>;
  static constexpr int W = E::lanes;
  // Vectors at a time, whose sum is widened once. Without bits and sums there is nothing to share, and a loop of one was
  // 1 to 4 % faster from beyond the caches than one of four.
  static constexpr bool alone = P != backward && P != marking;
  static constexpr int abreast = alone ? 1 : P == backward && !ROWS && W <= 8 ? 8 : 4;
  static constexpr bool random = S == drawn, from_value = P != backward || S == learned;

  const A *bias, *slope, *scale;   // ROWS: of the columns; else one number each, but for random slopes
  Total *bias_sum, *weight_sum;    // of the columns; else the lanes of one number each, null where not wanted
  int64_t columns = 0;             // ROWS: how many there are
  struct { V bias, slope, scale; } one{};

  struct Terms { V bias, weight; };

  // One vector. Its sides are found and put into `m`, or read from it; what it adds to the sums is returned.
  [[gnu::always_inline]] static Terms step(V x, V g, V b, V s, V k, T *out, M &m) {
    const V z = (P == scaling ? x * k : x) + b;
    // Eager's choice for NaN: rules.py's nan_is_negative
    if (from_value) m = S == zero || random ? Sides::at_most_zero(z) : Sides::not_above_zero(z);
    if (P != backward) {
      alignas(32) T y[W];
      T *const to = P == streaming ? y : out;
      E::write(to, S == zero ? Sides::positive_part(z) : Sides::choose(m, s * z, z));
      if (P == streaming) stream<sizeof y>(out, y);
      return {V{}, V{}};
    }
    const V result = Sides::choose(m, S == zero ? V{} : g * s, g);
    if (S == zero) E::write_exact(out, result);
    else E::write(out, result);
    return {result, S == learned ? Sides::choose(m, g * z, V{}) : V{}};
  }

  V bias_at(int64_t column) const { return ROWS && from_value ? load<V>(bias + column) : one.bias; }
  V scale_at(int64_t column) const { return ROWS && P == scaling ? load<V>(scale + column) : one.scale; }
  V slope_at(int64_t i, int64_t column) const {
    return random || (ROWS && S == learned) ? load<V>(slope + (random ? i : column)) : one.slope;
  }

  [[gnu::always_inline]] static void add(V term, int64_t column, Total *sum) {
    if constexpr (ROWS) store(sum + column, load<V>(sum + column) + term);
    else widen(term, sum);
  }
  [[gnu::always_inline]] void add(Terms t, int64_t column) const {
    if (ROWS || bias_sum) add(t.bias, column, bias_sum);
    if (S == learned && (ROWS || weight_sum)) add(t.weight, column, weight_sum);
  }

  template <int N> [[gnu::always_inline]] void vectors(const Memory<T> &at, int64_t i, int64_t column) const {
    uint64_t &word = at.words[i / 64], sides = from_value ? 0 : word >> i % 64;
    V x[N], g[N];
#pragma GCC unroll 8
    for (int n = 0; n < N; n++) {
      x[n] = from_value ? E::read(at.value + i + n * W) : V{};
      g[n] = P == backward ? E::read(at.grad + i + n * W) : V{};
    }
    Terms t[N];
#pragma GCC unroll 8
    for (int n = 0; n < N; n++) {
      const int64_t j = i + n * W, k = column + n * W;
      M m = from_value ? M{} : Sides::of(sides >> n * W);
      t[n] = step(x[n], g[n], bias_at(k), slope_at(j, k), scale_at(k), at.out + j, m);
      if (P == marking) sides |= Sides::bits(m) << n * W;
      if (P == backward && ROWS) add(t[n], k);
    }
    if (P == marking) word = i % 64 ? word | sides << i % 64 : sides;
    if (P != backward || ROWS) return;
#pragma GCC unroll 4
    for (int half = N / 2; half; half /= 2)
#pragma GCC unroll 4
      for (int n = 0; n < half; n++) t[n].bias += t[n + half].bias, t[n].weight += t[n + half].weight;
    add(t[0], 0);
  }

  // The last count % W elements, in the last vector's last lanes if there are as many elements; only they are written.
  [[gnu::noinline]] void ragged(const Memory<T> &at, int64_t column) const {
    const int rest = (int)(at.count % W), skip = column < W ? 0 : W - rest;
    const int64_t i = at.count - rest;
    column -= skip;
    const uint64_t live = ((1ull << rest) - 1) << skip;
    auto read = [&](const T *p) {
      T all[W] = {};
      if (!skip) std::memcpy(all, p, rest * sizeof(T));
      return E::read(skip ? p - skip : all);
    };
    uint64_t &word = at.words[i / 64];
    alignas(32) T to[W];
    M m = from_value ? M{} : Sides::of(word >> i % 64 << skip);
    const V x = from_value ? read(at.value + i) : V{}, g = P == backward ? read(at.grad + i) : V{};
    const Terms t = step(x, g, bias_at(column), slope_at(i - skip, column), scale_at(column), to, m);
    std::memcpy(at.out + i, to + skip, rest * sizeof(T));
    if (P == marking) word = (i % 64 ? word : 0) | (Sides::bits(m) & live) >> skip << i % 64;
    const M lanes = Sides::of(live);
    if (P == backward) add({Sides::choose(lanes, t.bias, V{}), Sides::choose(lanes, t.weight, V{})}, column);
  }

  [[gnu::noinline]] void run(const Memory<T> &memory) const {
    Segment segment = *this;  // copies, which no store of an element can change
    const Memory<T> at = memory;
    // not + V{}: an absent bias is -0, which changes no x
    segment.one = {*bias - V{}, *slope - V{}, P == scaling ? *scale - V{} : V{}};
    int64_t i = 0, column = 0;
    for (; (ROWS || !alone) && i + 64 <= at.count; i += 64) {
#pragma GCC unroll 1
      for (int k = 0; k < 64; k += abreast * W) segment.template vectors<abreast>(at, i + k, column + k);
      column = ROWS && column + 64 == columns ? 0 : column + 64;
    }
    for (; i + W <= at.count; i += W, column += W) segment.template vectors<1>(at, i, column);
    if (i < at.count) Segment(segment).ragged(memory, column);
  }
};

// ---------------------------------------------------------------- threads: torch's pool

// work(first, last) on equal shares of the items, each thread the same stretch of memory every time, as ATen cuts it:
// what one op leaves in a core's caches the next one finds there. (Handing out small items as threads come free ran
// ReLU 3 times slower.)
template <class F> void parallel_for(int64_t items, int threads, const F &work) {
  struct Shared {
    int64_t items;
    const F &work;
    void share(int64_t thread, int64_t of) const { work(items * thread / of, items * (thread + 1) / of); }
  } shared{items, work};
  threads = (int)std::min<int64_t>(threads, items);
  if (threads < 2) return shared.share(0, 1);

  // The OpenMP runtime torch has loaded, found by name so that there is never a second one; else threads of our own.
  using Parallel = void (*)(void (*)(void *), void *, unsigned, unsigned);
  static const auto parallel = (Parallel)dlsym(RTLD_DEFAULT, "GOMP_parallel");
  static const auto thread = (int (*)())dlsym(RTLD_DEFAULT, "omp_get_thread_num");
  static const auto team = (int (*)())dlsym(RTLD_DEFAULT, "omp_get_num_threads");
  if (parallel && thread && team)
    return parallel([](void *data) { ((const Shared *)data)->share(thread(), team()); }, &shared, (unsigned)threads, 0);
  std::vector<std::thread> others;
  others.reserve(threads);
  for (int i = 1; i < threads; i++) {
    try {
      others.emplace_back([&, i] { shared.share(i, threads); });
    } catch (const std::exception &) {  // no more threads to be had
      shared.share(i, threads);
    }
  }
  shared.share(0, threads);
  for (auto &t : others) t.join();
}

// ---------------------------------------------------------------- parameters and sums

// `count` numbers of `type` from number `first` on; absent ones are `otherwise`.
template <class A> void get(const void *p, int type, int64_t first, int64_t count, double otherwise, A *to) {
  auto narrow = [&](auto t) {
    using T = decltype(t);
    constexpr int W = Element<T>::lanes;
    const T *from = (const T *)p + first;
    for (int64_t i = 0; i < count; i += W) {
      const int64_t some = std::min<int64_t>(W, count - i);
      T last[W] = {};
      std::memcpy(last, from + i, some * sizeof(T));
      const auto v = Element<T>::read(last);
      for (int j = 0; j < some; j++) to[i + j] = (A)v[j];
    }
  };
  if (!p) std::fill(to, to + count, (A)otherwise);
  else if (type == float32) std::copy_n((const float *)p + first, count, to);
  else if (type == float64) std::copy_n((const double *)p + first, count, to);
  else type == float16 ? narrow(fp16{}) : narrow(bf16{});
}

void put(void *p, int64_t i, int type, double x) {
  auto narrow = [&](auto t) {
    using T = decltype(t);
    T e[VECTOR_BYTES];
    Element<T>::write(e, typename Element<T>::V{} + (float)x);
    ((T *)p)[i] = e[0];
  };
  if (type == float32) ((float *)p)[i] = (float)x;
  else if (type == float64) ((double *)p)[i] = x;
  else type == float16 ? narrow(fp16{}) : narrow(bf16{});
}

template <class A> using Array = std::unique_ptr<A[]>;

// Parameters of channels as A.
template <class A> Array<A> whole(const void *p, int type, int64_t length, double otherwise) {
  Array<A> to(new A[p ? length : 1]);
  get(p, type, 0, p ? length : 1, otherwise, to.get());
  return to;
}

// The same for `count` memory positions from column `first` of a period on.
template <class A>
void spread(const Call &c, const void *p, int type, int64_t length, double otherwise, int64_t first, int64_t count,
            A *to) {
  if (!p || length == 1) {
    get(p, type, 0, 1, otherwise, to);
    return std::fill(to + 1, to + count, *to);
  }
  for (int64_t j = 0, run; j < count; j += run) {
    const int64_t channel = (first + j) / c.inner % c.channels;
    run = std::min(count - j, c.inner == 1 ? c.channels - channel : c.inner - (first + j) % c.inner);
    get(p, type, channel, c.inner == 1 ? run : 1, otherwise, to + j);
    if (c.inner > 1) std::fill(to + j, to + j + run, to[j]);
  }
}

// A BatchNorm and the bias behind it as one scale, in the place of its weight, and one bias for each channel.
template <class A> struct Folded : Call {
  Array<A> scales{new A[channels]}, biases{new A[channels]};

  explicit Folded(const Call &c) : Call(c) {
    const auto read = [&](const void *p, int type, double otherwise, A *to) { get(p, type, 0, channels, otherwise, to); };
    const Array<A> means(new A[channels]), variances(new A[channels]);
    read(mean, mean_type, 0, means.get()), read(var, var_type, 1, variances.get());
    read(norm_weight, norm_weight_type, 1, scales.get()), read(bias, bias_type, 0, biases.get());
    for (int64_t k = 0; k < channels; k++) {
      scales[k] *= 1 / std::sqrt(variances[k] + (A)eps);
      biases[k] -= means[k] * scales[k];
    }
    norm_weight = scales.get(), bias = biases.get();
    norm_weight_type = bias_type = sizeof(A) == 8 ? float64 : float32;
  }
};

// The finishing sums in float64, in the order of the parts: add(first, count, sums) has those of `count` channels.
template <class F> void finish(const Call &c, void *to, int type, bool one, const F &add) {
  constexpr int64_t some = 256;
  double all = 0;
  for (int64_t first = 0; first < c.channels; first += some) {
    const int64_t count = std::min(some, c.channels - first);
    double sums[some] = {};
    add(first, count, sums);
    for (int64_t k = 0; k < count; k++) {
      if (one) all += sums[k];
      else put(to, first + k, type, sums[k]);
    }
  }
  if (one) put(to, 0, type, all);
}

// ---------------------------------------------------------------- the two walks: how a tensor is cut

int64_t blocks(int64_t n, int64_t size) { return (n + size - 1) / size; }

// Blocks of memory; a piece, with its part of the sums, is where a block and a plane meet.
struct Planes {
  const Call &c;
  const int64_t items = blocks(c.n, block), planes = c.n / c.inner, parts = items + planes;
  // Of a position in a plane: pieces are numbered in order, and each has its own number.
  int64_t part(int64_t position, int64_t plane) const { return position / block + plane; }

  template <class A> void add(const A *parts, int64_t first, int64_t count, double *sums) const {
    for (int64_t plane = first; plane < planes; plane += c.channels)
      for (int64_t k = 0; k < count; k++) {
        const int64_t last = part((plane + k + 1) * c.inner - 1, plane + k);
        for (int64_t i = part((plane + k) * c.inner, plane + k); i <= last; i++) sums[k] += parts[i];
      }
  }
};

// Lines of whole periods in strips of columns. An item is a group of lines in one strip.
struct Rows {
  const Call &c;
  const bool narrow;  // as few columns as can be: 64 took 3/4 of the time of 512 where 512's parameters filled L1
  const int64_t period = c.channels * c.inner, even = std::lcm(period, 64), unit = even <= widest ? even : period;
  const int64_t columns = blocks(narrow && unit == even ? 1 : widest / 2, unit) * unit;
  const int64_t strips = columns <= widest ? 1 : blocks(columns, widest - 8), lines = blocks(c.n, columns);
  // Lines that one walk takes: 64 columns make whole words of bits, and sums are widened every `deep` lines.
  const int64_t together = strips > 1 || columns % 64 ? 1 : narrow ? longest / columns : deep;
  const int64_t group = deep * std::max<int64_t>(4, blocks(lines, 32 * deep)), groups = blocks(lines, group);
  const int64_t items = groups * strips, parts = groups * columns + VECTOR_BYTES;  // read by whole vectors
  int64_t begin(int64_t strip) const { return columns * strip / strips / 8 * 8; }  // so up to 8 wider than its share
  int64_t width(int64_t strip) const { return (strip + 1 == strips ? columns : begin(strip + 1)) - begin(strip); }

  template <class A> void add(const A *parts, int64_t first, int64_t count, double *sums) const {
    constexpr int64_t some = 4096, lanes = VECTOR_BYTES / sizeof(A);
    double wide[some + lanes];
    for (int64_t k = 0, few; k < count; k += few) {
      few = std::min(some / c.inner, count - k);
      std::fill_n(wide, few * c.inner, 0.0);
      for (int64_t o = (first + k) * c.inner; o < groups * columns; o += period)
        for (int64_t j = 0; j < few * c.inner; j += lanes) widen(load<vec<A, lanes>>(parts + o + j), wide + j);
      for (int64_t j = 0; j < few; j++)
        sums[k + j] = std::accumulate(wide + j * c.inner, wide + (j + 1) * c.inner, 0.0);
    }
  }
};

// One thread's way through its segments.
template <class T, Slope S, bool ROWS, Pass P> struct Walker {
  using Step = Segment<T, S, ROWS, P>;
  using A = typename Step::A;
  struct Nothing { explicit Nothing(const Call &) {} };

  const Call &c;
  std::conditional_t<Step::random, Slopes<A>, Nothing> slopes{c};
  uint64_t words[longest / 64 + 3];

  // stop: how far this thread goes on from here; shared: other threads may meet the bytes at the ends.
  void walk(int64_t position, int64_t count, int64_t stop, const Step &step, bool shared) {
    const int64_t most = ROWS ? longest / step.columns * step.columns : longest;
    for (int64_t end = position + count; position < end; position += most)
      segment(position, std::min(most, end - position), stop, step, shared);
  }

  void segment(int64_t position, int64_t count, int64_t stop, Step step, bool shared) {
    const T *value = c.value ? (const T *)c.value + position : nullptr;
    if constexpr (Step::random) step.slope = slopes.at(position, count, stop);
    if (!Step::from_value) c.bits ? read_bits(c.bits, position, count, words) : mark(step, value, count);
    step.run({value, P == backward ? (const T *)c.grad + position : nullptr, (T *)c.out + position, words, count});
    if (P == marking && c.bits) write_bits(c.bits, position, count, words, shared);
  }

  // The sides that were not kept, from the input that was.
  [[gnu::noinline]] void mark(const Step &step, const T *value, int64_t count) {
    T y[longest];
    Segment<T, S, ROWS, marking>{step.bias, step.slope, nullptr, nullptr, nullptr, step.columns}.run(
        {value, nullptr, y, words, count});
  }
};

template <class T, Slope S, Pass P> void planes(const Call &c) {
  using W = Walker<T, S, false, P>;
  using A = typename W::A;
  const Planes cut{c};
  const Array<A> bias = whole<A>(c.bias, c.bias_type, c.channels, -0.0);
  const Array<A> slope = whole<A>(c.weight, c.weight_type, c.weights, c.first);
  const Array<A> scale = whole<A>(c.norm_weight, c.norm_weight_type, c.channels, 1);
  const Array<A> biases(c.bias_sum ? new A[cut.parts] : nullptr), weights(c.weight_sum ? new A[cut.parts] : nullptr);

  parallel_for(cut.items, c.n < 32768 ? 1 : c.threads, [&](int64_t first, int64_t last) {
    W walker{c};
    const int64_t stop = std::min(c.n, last * block);
    int64_t position = first * block, plane = position / c.inner, k = plane % c.channels;
    for (int64_t count; position < stop; position += count) {
      const int64_t part = cut.part(position, plane), end = (plane + 1) * c.inner;
      count = std::min({end, (position / block + 1) * block, c.n}) - position;
      constexpr int lanes = VECTOR_BYTES / sizeof(A);
      double bias_sum[lanes], weight_sum[lanes];
      if (biases) std::fill_n(bias_sum, lanes, 0.0);
      if (weights) std::fill_n(weight_sum, lanes, 0.0);
      walker.walk(position, count, stop, {&bias[c.bias ? k : 0], &slope[c.weights > 1 ? k : 0],
                                          &scale[P == scaling ? k : 0], biases ? bias_sum : nullptr,
                                          weights ? weight_sum : nullptr}, false);
      if (biases) biases[part] = (A)std::accumulate(bias_sum, bias_sum + lanes, 0.0);
      if (weights) weights[part] = (A)std::accumulate(weight_sum, weight_sum + lanes, 0.0);
      if (position + count == end) plane++, k = k + 1 == c.channels ? 0 : k + 1;
    }
    if (P == streaming) fence();
  });
  auto add = [&](const Array<A> &parts) {
    return [&](int64_t first, int64_t count, double *sums) { cut.add(parts.get(), first, count, sums); };
  };
  if (biases) finish(c, c.bias_sum, c.bias_sum_type, false, add(biases));
  if (weights) finish(c, c.weight_sum, c.weight_type, c.weights == 1, add(weights));
}

template <class T, Slope S, Pass P> void rows(const Call &c) {
  using W = Walker<T, S, true, P>;
  using A = typename W::A;
  constexpr int64_t lanes = VECTOR_BYTES / sizeof(A), room = widest + lanes;
  const Rows cut{c, P != backward};
  const Array<A> biases(c.bias_sum ? new A[cut.parts] : nullptr), weights(c.weight_sum ? new A[cut.parts] : nullptr);
  A *const parts[] = {biases.get(), weights.get()};
  // Bytes that two strips share, where lines are no whole bytes, are put together from zero.
  const bool shared = cut.strips > 1 && cut.columns % 8;
  if (P == marking && shared && c.bits) std::memset(c.bits, 0, blocks(c.n, 8));

  parallel_for(cut.items, c.n < 32768 ? 1 : c.threads, [&](int64_t item, int64_t end) {
    W walker{c};
    A bias[room], slope[room], scale[P == scaling ? room : 1], sums[2][room];
    double totals[2][room];
    for (int64_t at = -1; item < end; item++) {
      const int64_t g = item / cut.strips, strip = item % cut.strips;
      const int64_t first = cut.begin(strip), width = cut.width(strip), few = std::min(c.n, width);
      if (strip != at) {  // spreading for every item took a fifth of the time of ReLU's forward
        spread(c, c.bias, c.bias_type, c.channels, -0.0, first, W::Step::from_value || !c.bits ? few : 1, bias);
        spread(c, c.weight, c.weight_type, c.weights, c.first, first, S == learned ? few : 1, slope);
        if (P == scaling) spread(c, c.norm_weight, c.norm_weight_type, c.channels, 1, first, few, scale);
        at = strip;
      }
      for (int i = 0; i < 2; i++)
        if (P == backward) std::fill_n(sums[i], room, A{}), std::fill_n(totals[i], width, 0.0);
      const int64_t last = std::min(cut.lines, (g + 1) * cut.group), stop = std::min(c.n, last * cut.columns);
      for (int64_t line = g * cut.group; line < last; line += cut.together) {
        const int64_t position = line * cut.columns + first, count = std::min(width * cut.together, stop - position);
        if (count > 0)
          walker.walk(position, count, cut.strips == 1 ? stop : position + count,
                      {bias, slope, scale, sums[0], sums[1], width}, shared);
        if ((line + cut.together) % deep && line + cut.together < last) continue;
        for (int i = 0; i < 2; i++)
          for (int64_t j = 0; parts[i] && j < width; j += lanes) {
            widen(load<vec<A, lanes>>(sums[i] + j), totals[i] + j);
            store(sums[i] + j, vec<A, lanes>{});
          }
      }
      for (int i = 0; i < 2; i++)
        if (parts[i]) std::copy_n(totals[i], width, parts[i] + g * cut.columns + first);
    }
    if (P == streaming) fence();
  });
  auto add = [&](const Array<A> &parts) {
    return [&](int64_t first, int64_t count, double *sums) { cut.add(parts.get(), first, count, sums); };
  };
  if (biases) finish(c, c.bias_sum, c.bias_sum_type, false, add(biases));
  if (weights) finish(c, c.weight_sum, c.weight_type, c.weights == 1, add(weights));
}

bool by_rows(const Call &c) {
  const int64_t narrow = c.n / c.inner < 4 * c.channels ? 64 : 256;  // few rows don't pay for spreading parameters
  return c.channels > 1 && c.inner < narrow;
}

// What the system says of the last caches: bytes of one (0: unknown), and how many there are.
struct Caches {
  int64_t bytes = 0, count = 1;

  Caches() {
    const std::string folder = "/sys/devices/system/cpu/cpu0/cache/index3/";
    std::ifstream size(folder + "size"), map(folder + "shared_cpu_map");  // such as 32768K; a bit for each processor
    int64_t beside = 0;
    for (char digit; map >> digit;)
      if (std::isxdigit(digit)) beside += std::bitset<4>(std::stoi(std::string(1, digit), nullptr, 16)).count();
    if (beside && size >> bytes) bytes <<= 10, count = std::max<int64_t>(1, sysconf(_SC_NPROCESSORS_ONLN) / beside);
  }
};

Caches &last_caches() {
  static Caches found;
  return found;
}

// Whether to write past the caches: a tensor and its output that they cannot hold, in segments that begin at whole
// vectors. float64 of 51 MB, beside 32 MB of cache, is so rectified 1.2 to 1.4 times as fast; what the caches can hold
// is not (.9 with two threads), and whoever reads it next would miss it there.
template <class T> bool streams(const Call &c) {
  const Caches &caches = last_caches();
  const int64_t held = caches.bytes * std::min<int64_t>(c.threads, caches.count);  // one may run beside each
  const int64_t period = c.channels * c.inner;
  const bool whole = by_rows(c) ? period % 64 == 0 && period <= widest : c.channels == 1 || c.inner % 32 == 0;
  return VECTOR_BYTES >= 32 && whole && c.out != c.value && (uintptr_t)c.out % 32 == 0 && held > 0 &&
         2 * c.n * (int64_t)sizeof(T) > held;
}

template <class T, Slope S, Pass P> void dispatch(const Call &c) {
  by_rows(c) ? rows<T, S, P>(c) : planes<T, S, P>(c);
}

template <class T, Slope S> void dispatch(const Call &c) {
  if (c.grad) return dispatch<T, S, backward>(c);
  if constexpr (S != drawn)
    if (c.var) return dispatch<T, S, scaling>(Folded<typename Element<T>::A>(c));
  if constexpr (S != drawn)  // whose time is its slopes'
    if (!c.bits) return streams<T>(c) ? dispatch<T, S, streaming>(c) : dispatch<T, S, forward>(c);
  dispatch<T, S, marking>(c);
}

template <class T> void dispatch(const Call &c) {
  switch (c.slope) {
    case zero: return dispatch<T, zero>(c);
    case constant: return dispatch<T, constant>(c);
    case learned: return dispatch<T, learned>(c);
    default: return dispatch<T, drawn>(c);
  }
}

void run(Call c) {
  if (c.channels == 1) c.inner = c.n;
  switch (c.type) {
    case float32: return dispatch<float>(c);
    case bfloat16: return dispatch<bf16>(c);
    case float16: return dispatch<fp16>(c);
    default: return dispatch<double>(c);
  }
}

}  // namespace

// Returns a Status. Whatever is allocated is allocated before anything is written, and by the calling thread.
extern "C" int fused_rect(const Call *call) {
  try {
    run(*call);
    return done;
  } catch (const std::bad_alloc &) {
    return no_memory;
  }
}

// For tests: what a last cache is to hold.
extern "C" void fused_rect_caches(int64_t bytes) { last_caches().bytes = bytes; }

// The words of `count` counters from `counter` on: what tests compare with the published vectors.
extern "C" void fused_rect_words(uint64_t seed, uint64_t counter, int64_t count, uint32_t *to) {
  const Philox philox(seed);
  uint32_t words[4 * batch];
  for (int64_t i = 0; i < count; i += batch) {
    philox.words(counter + (uint64_t)i, words);
    std::memcpy(to + 4 * i, words, 16 * std::min<int64_t>(batch, count - i));
  }
}
