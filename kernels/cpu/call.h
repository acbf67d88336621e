// What a call of the C++ kernels asks for: as launch.py packs it and direct.cpp fills it in, and rectify.cpp reads it.
#pragma once
#include <cstdint>

enum Type { float32, bfloat16, float16, float64 };
enum Rule { relu, leaky, prelu, rrelu };

// Pointers (null: absent), sizes, doubles, ints.
struct Call {
  const void *value, *grad;  // conv output, or what forward saved; grad is null in forward
  void *out;                 // may be value or grad
  const void *bias, *weight;
  const int64_t *seed;
  void *bias_sum, *weight_sum;
  int64_t n, channels, inner, weights;
  double lower, upper;
  int type, bias_type, weight_type;  // a sum has the type of its parameter
  int rule, divisor, threads;
};
