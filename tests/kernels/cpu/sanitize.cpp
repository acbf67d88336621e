// Random calls of the kernels on memory of exactly the size that they may touch, for builds with sanitizers (../../sanitize.py).
//
//     program SEED FIRST COUNT        cases FIRST .. FIRST + COUNT - 1 of a seed; each can be run by itself
//
// A case is a forward pass and its backward passes: from the bits and from the input, in place and not, on one thread and on several,
// and with each of its allocations failing in turn. Results must agree, and where memory is lacking nothing may have been written.
#include <algorithm>
#include <atomic>
#include <cmath>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <new>
#include <random>
#include <thread>
#include <utility>
#include <vector>

#include "call.h"

extern "C" int fused_rect(const Call *);
extern "C" void fused_rect_caches(int64_t bytes);

static std::atomic<long> allocations_left{-1};  // negative: as many as wanted

void *operator new(std::size_t size) {
  if (allocations_left == 0) throw std::bad_alloc();
  if (allocations_left > 0) allocations_left--;
  void *p = std::malloc(size ? size : 1);
  if (!p) throw std::bad_alloc();
  return p;
}
void *operator new[](std::size_t size) { return operator new(size); }
void operator delete(void *p) noexcept { std::free(p); }
void operator delete[](void *p) noexcept { std::free(p); }
void operator delete(void *p, std::size_t) noexcept { std::free(p); }
void operator delete[](void *p, std::size_t) noexcept { std::free(p); }

using Random64 = std::mt19937_64;
static int64_t from(Random64 &r, int64_t low, int64_t high) { return low + (int64_t)(r() % (uint64_t)(high - low + 1)); }
static bool one_in(Random64 &r, int n) { return r() % n == 0; }

static const size_t bytes_of[] = {4, 2, 2, 8};

// `count` elements that end where the allocation ends, and begin at any multiple of their size.
struct Memory {
  size_t shift, bytes;
  char *base, *at;
  Memory(Random64 &r, int64_t count, size_t element) : shift(from(r, 0, 9) * element), bytes(count * element) {
    base = (char *)std::malloc(shift + bytes + !(shift + bytes));
    at = base + shift;
    std::memset(at, 0xA5, bytes);
  }
  Memory(const Memory &other) : shift(other.shift), bytes(other.bytes), base((char *)std::malloc(shift + bytes + !(shift + bytes))), at(base + shift) {
    std::memcpy(at, other.at, bytes);
  }
  ~Memory() { std::free(base); }
  bool untouched() const {
    return std::all_of(at, at + bytes, [](char b) { return (unsigned char)b == 0xA5; });
  }
};

static void put(char *to, int type, double x) {
  const float f = (float)x;
  const _Float16 h = (_Float16)f;
  if (type == float64) std::memcpy(to, &x, 8);
  else if (type == float32) std::memcpy(to, &f, 4);
  else if (type == float16) std::memcpy(to, &h, 2);
  else std::memcpy(to, (const char *)&f + 2, 2);  // bfloat16, cut off
}

// Numbers around zero, now and then special ones, now and then any bits at all.
static Memory numbers(Random64 &r, int64_t count, int type) {
  Memory m(r, count, bytes_of[type]);
  const double special[] = {0.0, -0.0, INFINITY, -INFINITY, NAN, 1e-45, -1e-45, 3e38, 65504, 65520, -65519.9, 6e-8};
  const bool raw = one_in(r, 8);
  for (int64_t i = 0; i < count; i++) put(m.at + i * bytes_of[type], type, one_in(r, 16) ? special[r() % 12] : (double)from(r, -4000, 4000) / 1000);
  for (size_t i = 0; raw && i < m.bytes; i++) m.at[i] = (char)r();
  return m;
}

static bool is_nan(const char *p, int type) {
  if (type == float64) {
    double x;
    std::memcpy(&x, p, 8);
    return std::isnan(x);
  }
  uint32_t u = 0;
  std::memcpy(&u, p, bytes_of[type]);
  if (type == float16) return (u & 0x7fff) > 0x7c00;
  if (type == bfloat16) u <<= 16;
  return (u & 0x7fffffff) > 0x7f800000;
}

static uint64_t seed, index_of_case, calls;

static void must(bool right, const char *what) {
  if (right) return;
  std::printf("case %llu of seed %llu: %s\n", (unsigned long long)index_of_case, (unsigned long long)seed, what);
  std::exit(1);
}

static void same(const Memory &a, const Memory &b, int type, const char *what) {
  const size_t e = bytes_of[type];
  for (size_t i = 0; i < a.bytes; i += e)  // a NaN's payload is nobody's
    must(!std::memcmp(a.at + i, b.at + i, e) || (is_nan(a.at + i, type) && is_nan(b.at + i, type)), what);
}

static void run_it(const Call &c) {
  calls++;
  must(fused_rect(&c) == done, "no memory where there is enough");
}

// With each allocation failing in turn, until the call has them all. `out` and the sums hold their first bytes where it fails.
static void with_too_little_memory(Call c, const std::vector<std::pair<Memory *, Memory>> &written) {
  for (long enough = 0;; enough++) {
    must(enough < 100, "a hundred allocations");
    allocations_left = enough;
    calls++;
    const int status = fused_rect(&c);
    allocations_left = -1;
    if (status == done) return;
    must(status == no_memory, "a status that is none");
    for (auto &[memory, before] : written) must(!std::memcmp(memory->at, before.at, before.bytes), "written to without the memory for it");
  }
}

static void one() {
  Random64 r(seed * 1000003 + index_of_case);
  const int type = (int)from(r, 0, 3), slope = (int)from(r, 0, 4), wide = one_in(r, 2) && type != float64 ? (int)float32 : type;
  const int64_t most = one_in(r, 6) ? 150000 : 3000;  // the larger ones are cut among threads
  int64_t channels = one_in(r, 4) ? 1 : one_in(r, 6) ? from(r, 900, 2600) : from(r, 1, 70);
  int64_t inner = one_in(r, 3) ? 1 : one_in(r, 4) ? from(r, 200, 5000) : from(r, 2, 70);
  channels = std::min(channels, most), inner = std::min(inner, std::max<int64_t>(1, most / channels));
  const int64_t n = channels * inner * from(r, 1, std::max<int64_t>(1, most / (channels * inner)));
  const int64_t weights = slope == learned ? (one_in(r, 2) ? 1 : channels) : 0;
  const bool with_bias = one_in(r, 2), several = n > 32768;

  const Memory x = numbers(r, n, type), grad = numbers(r, n, type), bias = numbers(r, channels, wide), weight = numbers(r, std::max<int64_t>(weights, 1), wide);
  const int64_t random_seed = (int64_t)r();
  Memory out(r, n, bytes_of[type]), bits(r, (n + 7) / 8, 1);
  Call c{};
  c.value = x.at, c.out = out.at, c.bits = (uint8_t *)bits.at, c.bias = with_bias ? bias.at : nullptr, c.weight = weights ? weight.at : nullptr;
  c.seed = slope >= drawn ? &random_seed : nullptr;
  c.n = n, c.channels = channels, c.inner = channels == 1 ? n : inner, c.weights = weights;
  c.first = slope >= drawn ? 0x1p-32 / 5 : -0.3, c.second = slope == drawn_divisor ? 5.5 : 0.2;
  c.type = type, c.bias_type = c.weight_type = c.bias_sum_type = wide, c.slope = slope, c.threads = 1;

  run_it(c);
  must(n % 8 == 0 || !((unsigned char)bits.at[n / 8] >> n % 8), "unused bits");
  for (int threads : {2, 5}) {
    Memory other(r, n, bytes_of[type]), others(r, (n + 7) / 8, 1);
    Call d = c;
    d.out = other.at, d.bits = (uint8_t *)others.at, d.threads = threads;
    if (several || threads == 2) run_it(d), same(out, other, type, "threads change outputs"), must(!std::memcmp(bits.at, others.at, bits.bytes), "threads change bits");
  }
  Memory past_caches(r, n, bytes_of[type]);
  Call past = c;
  past.out = past_caches.at, past.bits = nullptr, past.threads = 2;
  fused_rect_caches(1);
  run_it(past);
  fused_rect_caches(INT64_MAX / 1024);
  same(out, past_caches, type, "past the caches");
  Memory in_place(x);
  Call d = c;
  d.value = d.out = in_place.at, d.bits = nullptr;
  run_it(d);
  same(out, in_place, type, "in place, without bits");
  {
    Memory again(x);
    const Memory before(again);
    d.value = d.out = again.at, d.threads = 3;
    with_too_little_memory(d, {{&again, before}});
    same(out, again, type, "after failures");
  }

  if (slope < drawn) {  // a norm before the bias, of which one statistic may be absent
    const Memory mean = numbers(r, channels, wide), var = numbers(r, channels, wide), scale = numbers(r, channels, wide);
    Memory place(x), again(x);
    const Memory before(again);
    Call n = c;
    n.bits = nullptr, n.value = n.out = place.at, n.mean = mean.at, n.var = var.at, n.norm_weight = one_in(r, 2) ? scale.at : nullptr;
    n.mean_type = n.var_type = n.norm_weight_type = wide, n.eps = 1e-5;
    run_it(n);
    n.value = n.out = again.at, n.threads = 3;
    with_too_little_memory(n, {{&again, before}});
    same(place, again, type, "threads, or failures, change what is behind a norm");
  }

  for (int by_bits = 0; by_bits <= (slope != learned); by_bits++) {
    Memory dx(r, n, bytes_of[type]), db(r, channels, bytes_of[wide]), dw(r, std::max<int64_t>(weights, 1), bytes_of[wide]);
    Call b = c;
    b.grad = grad.at, b.out = dx.at, b.bias_sum = one_in(r, 4) ? nullptr : db.at, b.weight_sum = weights && !one_in(r, 4) ? dw.at : nullptr;
    if (by_bits) b.value = nullptr, b.bias = nullptr;
    else b.bits = nullptr;
    run_it(b);
    must(b.bias_sum || db.untouched(), "a sum that nobody asked for");
    must(b.weight_sum || dw.untouched(), "a sum that nobody asked for");
    for (int threads : {1, 4}) {
      Memory alias(grad), db2(db), dw2(dw);
      Call again = b;
      again.grad = again.out = alias.at, again.bias_sum = b.bias_sum ? db2.at : nullptr, again.weight_sum = b.weight_sum ? dw2.at : nullptr, again.threads = threads;
      run_it(again);
      same(dx, alias, type, "threads, or the place, change gradients");
      same(db, db2, wide, "threads change the bias's gradient"), same(dw, dw2, wide, "threads change the weight's gradient");
    }
    Memory alias(grad), db3(r, channels, bytes_of[wide]), dw3(r, std::max<int64_t>(weights, 1), bytes_of[wide]);
    Call scarce = b;
    scarce.grad = scarce.out = alias.at, scarce.bias_sum = b.bias_sum ? db3.at : nullptr, scarce.weight_sum = b.weight_sum ? dw3.at : nullptr, scarce.threads = 3;
    with_too_little_memory(scarce, {{&alias, alias}, {&db3, db3}, {&dw3, dw3}});
    same(dx, alias, type, "after failures"), same(db, db3, wide, "after failures"), same(dw, dw3, wide, "after failures");
  }
}

int main(int count, char **words) {
  if (count != 4) return 2;
  seed = std::strtoull(words[1], nullptr, 10);
  const uint64_t first = std::strtoull(words[2], nullptr, 10), stop = first + std::strtoull(words[3], nullptr, 10);
  for (index_of_case = first; index_of_case < stop; index_of_case++) one();
  std::printf("%llu cases, %llu calls\n", (unsigned long long)(stop - first), (unsigned long long)calls);
}
