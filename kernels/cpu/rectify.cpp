// Bias + rectifier, forward and backward, for CPU tensors: the mathematics of ../rectify.py in one compact source.
// Plain C++17 with GCC / Clang vector extensions and no torch header (those cost 11 to 44 s to compile), built at first use by build.py.
//
// A tensor is a dense run of n elements; the channel of memory position p is (p / inner) % channels. Two walks cover every layout:
//   planes  inner >= 16, or no channels: pieces of one plane, bias and slope are scalars, one partial sum a piece;
//   rows    inner < 16 (channels_last, linear): rows of one channel period, bias and slope are vectors, partial sums a column.
// Both cut the tensor by its shape alone and add partial sums in a fixed order, so the bits don't depend on the number of threads.
// Compile with -ffp-contract=off: float32 equals eager bit for bit, and the sums are those of the products stored.
#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstring>
#include <memory>
#include <thread>
#include <type_traits>
#include <vector>

#include "call.h"

#include <dlfcn.h>
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

struct bf16 { uint16_t bits; };
struct fp16 { uint16_t bits; };

// What element type T computes in (A), how many lanes a vector of it has, and how it is read and written.
template <class T> struct Element {
  using A = T;
  static constexpr int lanes = VECTOR_BYTES / sizeof(A);
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
    U small = (U)((V)m + 0.5f) - 0x3f000000;                        // below 2^-14: the adder rounds to multiples of 2^-24
    U r = (m < (113u << 23)) ? small : normal;
    r = (m >= 0x477ff000) ? U{} + 0x7c00 : r;                       // 65520 and above: infinite
    r = (m > 0x7f800000) ? U{} + 0x7e00 : r;
    store(p, narrow(r | sign));
  }
#endif
};

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
    for (int i = 0; i < batch; i++) lanes[i] = (i % 2) * (batch / 2) + i / 2;  // 0 4 1 5 2 6 3 7: two unpacks restore order
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

constexpr int64_t longest = 2048;  // no walk asks for a longer segment

// A window of slopes in L1, moved along as segments ask for positions.
template <class A> struct Slopes {
  static constexpr int64_t step = 64;  // a loop of 16 GCC unrolls before it could vectorize it
  Philox philox;
  A scale, middle;
  bool divisor;
  int64_t begin = 0, end = 0;
  A window[longest + 2 * step];

  explicit Slopes(const Call &c)
      : philox((uint64_t)*c.seed), scale((A)((c.upper - c.lower) * 0x1p-32)), middle((A)((c.upper + c.lower) / 2)), divisor(c.divisor) {}

  // Slopes of [position, position + count); the positions up to `stop` are likely next, in segments of the same length.
  const A *at(int64_t position, int64_t count, int64_t stop) {
    if (position < begin || position + count > end) {
      begin = position & ~(int64_t)3;
      end = begin;
      fill(std::min(stop, position + count * (longest / count)) - begin);
    }
    return window + (position - begin);
  }

  void fill(int64_t wanted) {
    for (A *to = window; end - begin < wanted; to += step, end += step) {
      uint32_t words[step];
      for (int i = 0; i < step; i += 4 * batch) philox.words((uint64_t)(end + i) / 4, words + i);
      for (int i = 0; i < step; i++) to[i] = multiply_add((A)(int32_t)words[i], scale, middle);
    }
    if (divisor)
      for (int64_t i = 0; i < end - begin; i++) window[i] = 1 / window[i];
  }

  static A multiply_add(A x, A y, A z) {
#if defined(__FMA__) || defined(__aarch64__)
    return std::fma(x, y, z);
#else  // a call of the C library; double holds the product of two floats exactly
    return sizeof(A) == 4 ? (A)((double)x * y + z) : std::fma(x, y, z);
#endif
  }
};

// ---------------------------------------------------------------- one segment: contiguous, longest elements at most

template <class A> struct Sums { A *bias, *weight; };

// `value` is the conv output, or what forward saved; grad is null in forward. ROWS: bias, slope (of prelu) and sums are vectors.
// The last, ragged vector overlaps the one before it: it is read before anything is written (out may be value or grad), and only its
// new lanes enter the sums.
template <class T, Rule R, bool ROWS, bool BACK> struct Segment {
  using E = Element<T>;
  using A = typename E::A;
  using V = typename E::V;
  using M = decltype(V{} < V{});
  static constexpr int W = E::lanes;
  static constexpr bool random = R == rrelu, slopes = random || (ROWS && R == prelu);

  const A *bias, *slope;
  Sums<A> sums;
  V bias_sum{}, weight_sum{};

  void step(int64_t i, V x, V g, T *out, const M *live) {
    V z = x + (ROWS ? load<V>(bias + i) : *bias - V{});  // not + V{}: an absent bias is -0, which changes no x
    V s = slopes ? load<V>(slope + i) : *slope - V{};
    if (!BACK) return E::write(out, R == relu ? (z < 0 ? V{} : z) : (z > 0 ? z : s * z));
    M negative = R == relu || random ? z <= 0 : ~(z > 0);  // where eager sends the gradient of a NaN
    V result = negative ? (R == relu ? V{} : g * s) : g, slope_term = negative ? g * z : V{};
    if (R == relu) E::write_exact(out, result);
    else E::write(out, result);
    if (live) result = *live ? result : V{}, slope_term = *live ? slope_term : V{};
    add(sums.bias + i, bias_sum, result);
    if (R == prelu) add(sums.weight + i, weight_sum, slope_term);
  }

  static void add(A *column, V &sum, V term) {
    if (ROWS) store(column, load<V>(column) + term);
    else sum += term;
  }

  static V get(const T *p) { return p ? E::read(p) : V{}; }

  void run(const T *value, const T *grad, T *out, int64_t count) {
    M lane;
    for (int i = 0; i < W; i++) lane[i] = i;
    int64_t whole = count / W * W, rest = count - whole;
    if (count < W) {
      T v[W] = {}, g[W] = {}, o[W];
      std::memcpy(v, value, count * sizeof(T));
      if (BACK) std::memcpy(g, grad, count * sizeof(T));
      M live = lane < (decltype(lane[0] + 0))count;
      step(0, E::read(v), E::read(g), o, &live);
      std::memcpy(out, o, count * sizeof(T));
    } else {
      V last_value = E::read(value + count - W), last_grad = BACK ? E::read(grad + count - W) : V{};
      for (int64_t i = 0; i < whole; i += W) step(i, E::read(value + i), BACK ? E::read(grad + i) : V{}, out + i, nullptr);
      if (rest) {
        M live = lane >= (decltype(lane[0] + 0))(W - rest);
        step(count - W, last_value, last_grad, out + count - W, &live);
      }
    }
    if (BACK && !ROWS) {
      *sums.bias = total(bias_sum);
      if (R == prelu) *sums.weight = total(weight_sum);
    }
  }

  static A total(V v) {
    for (int half = W / 2; half; half /= 2)
      for (int i = 0; i < half; i++) v[i] += v[i + half];
    return v[0];
  }
};

// ---------------------------------------------------------------- threads: torch's pool

// Work in equal shares, each thread the same stretch of memory every time, as ATen cuts it: what one op leaves in a core's
// caches the next one finds there. (Handing out small items as threads come free ran ReLU 3 times slower.)
template <class F> void parallel_for(int64_t items, int threads, const F &work) {
  struct Shared {
    int64_t items;
    const F &work;
    void share(int64_t thread, int64_t of) const {
      for (int64_t i = items * thread / of, stop = items * (thread + 1) / of; i < stop; i++) work(i);
    }
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
  for (int i = 1; i < threads; i++) others.emplace_back([&, i] { shared.share(i, threads); });
  shared.share(0, threads);
  for (auto &t : others) t.join();
}

// ---------------------------------------------------------------- whole tensors

double fetch(const void *p, int64_t i, int type) {
  auto lane = [&](auto t) { using T = decltype(t); T e[VECTOR_BYTES] = {((const T *)p)[i]}; return (double)Element<T>::read(e)[0]; };
  return type == float32 ? ((const float *)p)[i] : type == float64 ? ((const double *)p)[i] : type == float16 ? lane(fp16{}) : lane(bf16{});
}

void put(void *p, int64_t i, int type, double x) {
  auto lane = [&](auto t) {
    using T = decltype(t);
    T e[VECTOR_BYTES];
    Element<T>::write(e, typename Element<T>::V{} + (float)x);
    ((T *)p)[i] = e[0];
  };
  if (type == float32) ((float *)p)[i] = (float)x;
  else if (type == float64) ((double *)p)[i] = x;
  else type == float16 ? lane(fp16{}) : lane(bf16{});
}

int64_t blocks(int64_t n, int64_t size) { return (n + size - 1) / size; }

template <class A> using Array = std::unique_ptr<A[]>;

// Channel parameters spread over `columns` memory positions; -0 is what x + nothing adds.
template <class A> Array<A> spread(const void *p, int type, int64_t length, const Call &c, int64_t columns, int64_t inner, double otherwise) {
  Array<A> to(new A[columns + VECTOR_BYTES]());
  for (int64_t j = 0, channel = 0; j < columns; channel = channel + 1 == c.channels ? 0 : channel + 1) {
    A value = (A)(p ? fetch(p, length == 1 ? 0 : channel, type) : otherwise);
    for (int64_t stop = j + inner; j < stop; j++) to[j] = value;
  }
  return to;
}

// The finishing sum: partials lie as outer x channels x width; float64, in order.
template <class A> void finish(const A *partials, int64_t outer, const Call &c, int64_t width, void *to, int type, bool one) {
  std::vector<double> sums(c.channels);
  for (int64_t o = 0; o < outer; o++)
    for (int64_t k = 0; k < c.channels; k++)
      for (int64_t w = 0; w < width; w++) sums[k] += *partials++;
  for (int64_t k = 1; one && k < c.channels; k++) sums[0] += sums[k];
  for (int64_t k = 0; k < (one ? 1 : c.channels); k++) put(to, k, type, sums[k]);
}

template <class T, Rule R, bool ROWS, bool BACK> void walk(const Call &c) {
  using S = Segment<T, R, ROWS, BACK>;
  using A = typename S::A;
  constexpr int64_t strip = longest / 2, item_size = 16384, group = 64;
  const int64_t period = c.channels * c.inner;
  // planes: pieces of a plane, `share` pieces an item. rows: repeated until 256 columns, `group` rows by one strip of columns an item.
  const int64_t repeat = ROWS ? blocks(256, period) : 1, columns = ROWS ? repeat * period : c.inner;
  const int64_t cuts = std::max<int64_t>(1, columns / strip), lines = blocks(c.n, columns), pieces = lines * cuts;
  const int64_t share = std::max<int64_t>(1, item_size * cuts / columns);
  const int64_t items = ROWS ? blocks(lines, group) * cuts : blocks(pieces, share);
  const int64_t slots = !BACK ? 1 : ROWS ? blocks(lines, group) * columns : pieces, spare = VECTOR_BYTES;

  const int64_t length = ROWS ? columns : c.channels, run = ROWS ? c.inner : 1;
  Array<A> bias = spread<A>(c.bias, c.bias_type, c.channels, c, length, run, -0.0);
  Array<A> slope = spread<A>(c.weight, c.weight_type, c.weights, c, length, run, c.lower);
  Array<A> bias_part(new A[slots + spare]()), weight_part(new A[R == prelu ? slots + spare : 1]());

  struct Nothing { Nothing(const Call &) {} };
  using Random = std::conditional_t<S::random, Slopes<A>, Nothing>;
  auto segment = [&](int64_t line, int64_t cut, int64_t slot, Random &slopes, int64_t stop) {
    const int64_t first = cut * strip, start = line * columns + first;
    const int64_t count = std::min((cut + 1 == cuts ? columns : first + strip) - first, c.n - start);
    if (count <= 0) return;
    const int64_t k = ROWS ? first : line % c.channels;
    const A *s = &slope[k];
    if constexpr (S::random) s = slopes.at(start, count, cuts == 1 || !ROWS ? stop : start + count);
    S{&bias[k], s, {&bias_part[slot], &weight_part[R == prelu ? slot : 0]}}.run(
        (const T *)c.value + start, BACK ? (const T *)c.grad + start : nullptr, (T *)c.out + start, count);
  };
  auto item = [&](int64_t i) {
    Random slopes(c);
    if (ROWS) {
      const int64_t g = i / cuts, cut = i % cuts, stop = std::min(lines, (g + 1) * group);
      for (int64_t line = g * group; line < stop; line++)
        segment(line, cut, BACK ? g * columns + cut * strip : 0, slopes, std::min(c.n, stop * columns));
    } else {
      const int64_t stop = std::min(pieces, (i + 1) * share), end = stop / cuts * columns + stop % cuts * strip;
      for (int64_t q = i * share; q < stop; q++) segment(q / cuts, q % cuts, BACK ? q : 0, slopes, end);
    }
  };
  parallel_for(items, c.n < 32768 ? 1 : c.threads, item);

  const int64_t outer = ROWS ? blocks(lines, group) * repeat : lines / c.channels, width = ROWS ? c.inner : cuts;
  if (c.bias_sum) finish(bias_part.get(), outer, c, width, c.bias_sum, c.bias_type, false);
  if (R == prelu && c.weight_sum) finish(weight_part.get(), outer, c, width, c.weight_sum, c.weight_type, c.weights == 1);
}

template <class T, Rule R> void dispatch(const Call &c) {
  const bool rows = c.channels > 1 && c.inner < 16;
  if (c.grad) rows ? walk<T, R, true, true>(c) : walk<T, R, false, true>(c);
  else rows ? walk<T, R, true, false>(c) : walk<T, R, false, false>(c);
}

template <class T> void dispatch(const Call &c) {
  switch (c.rule) {
    case relu: return dispatch<T, relu>(c);
    case leaky: return dispatch<T, leaky>(c);
    case prelu: return dispatch<T, prelu>(c);
    default: return dispatch<T, rrelu>(c);
  }
}

}  // namespace

extern "C" void fused_rect(const Call *call) {
  Call c = *call;
  if (c.channels == 1) c.inner = c.n;
  switch (c.type) {
    case float32: return dispatch<float>(c);
    case bfloat16: return dispatch<bf16>(c);
    case float16: return dispatch<fp16>(c);
    default: return dispatch<double>(c);
  }
}

// The words of `count` counters from `counter` on: what tests compare with the published vectors.
extern "C" void fused_rect_words(uint64_t seed, uint64_t counter, int64_t count, uint32_t *to) {
  const Philox philox(seed);
  uint32_t words[4 * batch];
  for (int64_t i = 0; i < count; i += batch) {
    philox.words(counter + (uint64_t)i, words);
    std::memcpy(to + 4 * i, words, 16 * std::min<int64_t>(batch, count - i));
  }
}
