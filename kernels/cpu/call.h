// What a call of the C++ kernels asks for: launch.py packs it and direct.cpp fills it in, rectify.cpp reads it.
#pragma once
#include <cstdint>

enum Type { float32, bfloat16, float16, float64 };
enum Slope { zero, constant, learned, drawn, drawn_divisor };  // rules.py's SLOPES, in its order
enum Status { done, no_memory };

// launch.py reads the fields' names and types from here. An absent pointer is null.
struct Call {
  const void *value, *grad;  // conv output (in backward: null where bits are read instead); grad is null in forward
  void *out;                 // may be value or grad
  uint8_t *bits;             // which side each element is on, bit i % 8 of byte i / 8: forward writes, backward reads
  const void *bias, *weight;
  const void *mean, *var, *norm_weight;  // a BatchNorm before the bias: in forward, without bits or a drawn slope
  const int64_t *seed;
  void *bias_sum, *weight_sum;
  int64_t n, channels, inner, weights;
  double first, second;  // rules.py's constants: the slope of a fixed one, scale and middle of a drawn one
  double eps;            // of the BatchNorm
  int type, bias_type, weight_type, mean_type, var_type, norm_weight_type, bias_sum_type;  // weight_sum has the weight's
  int slope, threads;
};
