// Prints a hash of what the CPU kernels compute, one line per case: two builds of them agree bit for bit if they print
// the same. Links without torch's libraries. `make aarch64-check` compares the builds for ARM and for this machine.

#include <cinttypes>
#include <cmath>
#include <cstdio>
#include <cstring>
#include <limits>
#include <vector>

#include "ops/cpu/chunk.h"
#include "ops/cpu/kernels.h"

using namespace ademamix;

namespace {

constexpr int64_t NUMEL = 192 * BLOCK_SIZE + 77;  // with a ragged block, and a ragged vector in it
constexpr int64_t BLOCKS = block_count(NUMEL);
constexpr uint64_t SEED = 0x123456789abcdef;
constexpr Hyperparameters OPTIONS{1e-2f, 0.9, 0.999, 0.9999, 5, 8, 8, 0, 1e-8, 0.01, 0, 0, 0, 0};
constexpr float STEP = 5;

enum class Values {
  ORDINARY,  // of both signs, in two orders of magnitude
  POSITIVE,
  ANY_BITS,  // infinite, NaN and denormal ones too
};

// splitmix64
uint64_t next_bits() {
  static uint64_t state = 0;
  uint64_t z = state += 0x9E3779B97F4A7C15;
  z = (z ^ (z >> 30)) * 0xBF58476D1CE4E5B9;
  z = (z ^ (z >> 27)) * 0x94D049BB133111EB;
  return z ^ (z >> 31);
}

double next_value(Values values) {
  const uint64_t bits = next_bits();
  const double value = static_cast<double>(static_cast<int64_t>(bits)) * (bits & 1 ? 0x1p-63 : 0x1p-76);
  return values == Values::POSITIVE ? std::fabs(value) : value;
}

template <class T>
using Array = std::vector<T>;

template <class T>
Array<T> random_array(Values values, int64_t numel = NUMEL) {
  Array<T> array(numel);
  for (T& element : array) {
    const uint64_t bits = next_bits();
    if constexpr (std::is_integral_v<T>) {
      element = static_cast<T>(bits);
    } else if (values == Values::ANY_BITS) {
      std::memcpy(&element, &bits, sizeof element);
    } else {
      element = static_cast<T>(static_cast<float>(next_value(values)));
    }
  }
  return array;
}

// Every other element of an array, if it has that many.
template <class T>
TensorView view_of(Array<T>& array) {
  static const int64_t numel = NUMEL, strides[] = {1, 2};
  const int64_t stride = static_cast<int64_t>(array.size()) / NUMEL;
  ScalarType dtype = ScalarType::Short;
  if constexpr (!std::is_integral_v<T>) dtype = c10::CppTypeToScalarType<T>::value;
  return {array.data(), &numel, &strides[stride - 1], 1, NUMEL, dtype, Device::CPU, 0, stride == 1};
}

// FNV-1a over elements.
class Hash {
 public:
  template <class T>
  Hash& add(const Array<T>& array) {
    for (const T& element : array) {
      uint64_t bits = 0;
      std::memcpy(&bits, &element, sizeof element);
      if constexpr (!std::is_integral_v<T>) {
        if (std::isnan(static_cast<double>(element))) bits = UINT64_MAX;  // processors choose its sign and payload
      }
      hash_ = (hash_ ^ bits) * 1099511628211;
      hash_ ^= hash_ >> 29;
    }
    return *this;
  }

  void print(const char* op, std::initializer_list<int> options) const {
    std::printf("%s", op);
    for (const int option : options) std::printf(" %d", option);
    std::printf(" %016" PRIx64 "\n", hash_);
  }

 private:
  uint64_t hash_ = 14695981039346656037u;
};

// Codes and scales of any bits are a tensor's state, too.
struct State {
  Array<int16_t> codes = random_array<int16_t>(Values::ORDINARY);
  Array<float> absmax = random_array<float>(Values::POSITIVE, BLOCKS);

  Quantized quantized(BlockFormat format) { return {codes.data(), absmax.data(), format}; }
};

template <class P, class G, class T>
void hash_steps_of(Values values, ParamRounding rounding, int64_t param_stride, bool has_exp_avg) {
  Hyperparameters options = OPTIONS;
  if (!has_exp_avg) options.beta1 = 0;
  const StepScalars<T> scalars(options, STEP, 1);
  const RandomKey key = random_key(SEED, 5, 3);
  const int param_dtype = static_cast<int>(c10::CppTypeToScalarType<P>::value);
  const int grad_dtype = static_cast<int>(c10::CppTypeToScalarType<G>::value);
  const auto param = random_array<P>(values, NUMEL * param_stride);
  const auto remainder = random_array<int16_t>(values);  // of which int8 ones are the first half
  auto grad = random_array<G>(values);

  auto p = param;
  auto r = remainder;
  auto exp_avg = random_array<T>(values), exp_avg_slow = random_array<T>(values);
  auto exp_avg_sq = random_array<T>(values == Values::ORDINARY ? Values::POSITIVE : values);
  step_elements<T>({{view_of(p), rounding, view_of(r), key},
                    view_of(grad),
                    view_of(exp_avg),
                    view_of(exp_avg_slow),
                    view_of(exp_avg_sq),
                    scalars,
                    has_exp_avg},
                   0, NUMEL);
  Hash()
      .add(p)
      .add(r)
      .add(exp_avg)
      .add(exp_avg_slow)
      .add(exp_avg_sq)
      .print("step", {static_cast<int>(values), static_cast<int>(rounding), param_dtype, grad_dtype, has_exp_avg});

  for (const auto slow : {BlockFormat::SIGNED_SQRT_INT8, BlockFormat::LINEAR_INT16}) {
    for (const bool stochastic : {false, true}) {
      State m1, m2, nu;
      p = param;
      r = remainder;
      blockwise_step_elements<T>({{view_of(p), rounding, view_of(r), key},
                                  view_of(grad),
                                  has_exp_avg ? m1.quantized(BlockFormat::SIGNED_SQRT_INT8) : Quantized{},
                                  m2.quantized(slow),
                                  nu.quantized(BlockFormat::FOURTH_ROOT_UINT8),
                                  scalars,
                                  key,
                                  stochastic},
                                 0, NUMEL);
      Hash hash;
      for (const State* state : {&m1, &m2, &nu}) hash.add(state->codes).add(state->absmax);
      hash.add(p).add(r).print("blockwise_step", {static_cast<int>(values), static_cast<int>(rounding), param_dtype,
                                                  grad_dtype, has_exp_avg, static_cast<int>(slow), stochastic});
    }
  }
}

template <class P, class G, class T>
void hash_steps(Values values, ParamRounding rounding, int64_t param_stride = 1) {
  for (const bool has_exp_avg : {true, false}) hash_steps_of<P, G, T>(values, rounding, param_stride, has_exp_avg);
}

template <class P>
void hash_steps_of_gradients(Values values) {
  hash_steps<P, float, float>(values, ParamRounding::NEAREST);
  hash_steps<P, c10::BFloat16, float>(values, ParamRounding::NEAREST);
  hash_steps<P, c10::Half, float>(values, ParamRounding::NEAREST);
}

void hash_conversions(Values values, BlockFormat format, bool stochastic) {
  const auto source = random_array<float>(values);
  Array<float> result(NUMEL);
  State state;
  const RandomKey key = random_key(SEED, 5, 3);
  quantize_elements(source.data(), state.quantized(format), stochastic ? &key : nullptr, 0, NUMEL);
  dequantize_elements(state.quantized(format), result.data(), 0, NUMEL);
  Hash()
      .add(state.codes)
      .add(state.absmax)
      .add(result)
      .print("quantize", {static_cast<int>(values), static_cast<int>(format), stochastic});
}

}  // namespace

int main() {
  for (const Values values : {Values::ORDINARY, Values::ANY_BITS}) {
    hash_steps_of_gradients<float>(values);
    hash_steps_of_gradients<c10::BFloat16>(values);
    hash_steps_of_gradients<c10::Half>(values);
    hash_steps<c10::BFloat16, float, float>(values, ParamRounding::REMAINDER);
    hash_steps<c10::BFloat16, float, float>(values, ParamRounding::REMAINDER8);
    hash_steps<c10::BFloat16, float, float>(values, ParamRounding::STOCHASTIC);
    hash_steps<c10::BFloat16, float, float>(values, ParamRounding::NEAREST, 2);
    hash_steps<double, double, double>(values, ParamRounding::NEAREST);
    hash_conversions(values, BlockFormat::SIGNED_SQRT_INT8, false);
    hash_conversions(values, BlockFormat::LINEAR_INT16, false);
    hash_conversions(values, BlockFormat::FOURTH_ROOT_UINT8, false);
    hash_conversions(values, BlockFormat::FOURTH_ROOT_UINT8, true);
  }
}
