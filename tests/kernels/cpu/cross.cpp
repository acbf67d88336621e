// The kernels of every slope and type over shapes of both walks, as hashes of what they write: two builds for different
// machines, of vectors of the same length, print the same. (test_cross.py)
#include "rectify.cpp"

#include <cstdio>
#include <cstdlib>

static uint64_t state;

static double draw() {  // uniform on (-2, 2)
  state = state * 6364136223846793005u + 1442695040888963407u;
  return ((int64_t)(state >> 20) - (INT64_C(1) << 43)) / (double)(INT64_C(1) << 42);
}

static void hash(uint64_t &h, const std::vector<char> &bytes) {
  for (unsigned char b : bytes) h = (h ^ b) * 1099511628211u;
}

static void one(int type, int slope) {
  const size_t sizes[] = {4, 2, 2, 8}, e = sizes[type];
  const struct { int64_t n, c, inner; } shapes[] = {
      {2 * 3 * 5, 3, 5}, {2 * 51 * 899, 51, 899}, {2 * 899 * 51, 51, 1}, {40 * 2100, 2100, 1}, {7, 1, 7},
      {15000, 2500, 2}, {30000, 300, 1}, {1, 1, 1}, {33 * 1027, 1027, 1}, {5 * 7 * 49, 7, 49},
  };
  uint64_t elements = 14695981039346656037u, sums = elements;
  for (auto &s : shapes) {
    state = s.n * 31 + type * 7 + slope;
    std::vector<char> x(s.n * e), grad(s.n * e), out(s.n * e), dx(s.n * e), bits((s.n + 7) / 8);
    std::vector<char> bias(s.c * e), weight(s.c * e), db(s.c * e), dw(s.c * e);
    for (int64_t i = 0; i < s.n; i++) {
      const double special = i % 17 == 0 ? 0.0 : i % 19 == 0 ? -1e-40 : i % 23 == 0 ? -60000.0 : 0.0;
      put(x.data(), i, type, i % 17 && i % 19 && i % 23 ? draw() : special);
      put(grad.data(), i, type, draw());
    }
    for (int64_t i = 0; i < s.c; i++) put(bias.data(), i, type, draw()), put(weight.data(), i, type, draw());
    const int64_t seed = 0x123456789abcdef;
    Call c{};
    c.value = x.data(), c.out = out.data(), c.bias = bias.data(), c.bits = (uint8_t *)bits.data(), c.seed = &seed;
    c.n = s.n, c.channels = s.c, c.inner = s.inner;
    if (slope == learned) c.weight = weight.data(), c.weights = s.c;
    c.first = slope == drawn ? 0.2 * 0x1p-32 : slope == drawn_divisor ? 5 * 0x1p-32 : 0.1;
    c.second = slope == drawn ? 0.2 : 5.5;
    c.type = c.bias_type = c.weight_type = c.bias_sum_type = type, c.slope = slope, c.threads = 2;
    if (fused_rect(&c)) std::abort();
    hash(elements, out), hash(elements, bits);
    c.grad = grad.data(), c.out = dx.data(), c.bias_sum = db.data();
    if (slope == learned) c.weight_sum = dw.data();
    else c.value = nullptr, c.bias = nullptr;
    if (fused_rect(&c)) std::abort();
    hash(elements, dx), hash(sums, db);
    if (slope == learned) hash(sums, dw);
  }
  std::printf("type %d slope %d: ", type, slope);
  std::printf("elements %016llx sums %016llx\n", (unsigned long long)elements, (unsigned long long)sums);
}

int main() {
  for (int type : {float32, bfloat16, float16, float64})
    for (int slope : {zero, constant, learned, drawn, drawn_divisor}) one(type, slope);
}
