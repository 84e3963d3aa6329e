// The CPU ops with drawn arguments, for the address and undefined-behaviour sanitizers. Good arguments must be
// accepted, change what they should and nothing else, and give the same values in every layout; invalid ones must be
// rejected, with nothing changed. Every tensor has an allocation of its own, of exactly the bytes from its first to its
// last element.
//
// `fuzz_ops SEED SECONDS` draws from a seeded generator; `fuzz_ops SEED 0 CASE` repeats one case. With clang,
// -DLIBFUZZER -fsanitize=fuzzer makes a libFuzzer target of the same cases.
#include <chrono>
#include <cmath>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <memory>
#include <random>

#include <sanitizer/common_interface_defs.h>

#include "../../ops/torch_stable.h"

#undef STABLE_TORCH_LIBRARY_IMPL  // the ops are called as functions
#define STABLE_TORCH_LIBRARY_IMPL(ns, k, m) \
  [[maybe_unused]] static void C10_CONCATENATE(unused_, C10_UID)(torch::stable::detail::StableLibrary & m)

#include "../../ops/cpu/step.cpp"
#define run run_blockwise  // each of the files has a function of its own by that name
#include "../../ops/cpu/blockwise.cpp"
#undef run

namespace ademamix {
namespace {

#define REQUIRE(condition)                                                          \
  do {                                                                              \
    if (!(condition)) {                                                             \
      std::fprintf(stderr, "%s:%d: %s is false\n", __FILE__, __LINE__, #condition); \
      std::abort();                                                                 \
    }                                                                               \
  } while (false)

// Where choices come from: a seeded generator, or a fuzzer's bytes, after whose end all choices are the first.
class Choices {
 public:
  explicit Choices(uint64_t seed) : random_(seed), seeded_(true) {}
  Choices(const uint8_t* bytes, size_t size) : bytes_(bytes), end_(bytes + size), seeded_(false) {}

  int64_t below(int64_t n) {
    if (seeded_) return static_cast<int64_t>(random_() % static_cast<uint64_t>(n));
    uint32_t choice = 0;
    for (int i = 0; i < 2 && bytes_ < end_; ++i) choice = choice << 8 | *bytes_++;
    return choice % n;
  }

  bool one_in(int64_t n) { return below(n) == n - 1; }

  template <class T>
  T of(std::initializer_list<T> values) {
    return values.begin()[below(static_cast<int64_t>(values.size()))];
  }

 private:
  std::mt19937_64 random_;
  const uint8_t *bytes_ = nullptr, *end_ = nullptr;
  bool seeded_;
};

using Sizes = std::vector<int64_t>;

size_t item_size(ScalarType dtype) {
  switch (dtype) {
    case ScalarType::ComplexFloat:
    case ScalarType::Long:
    case ScalarType::Double: return 8;
    case ScalarType::Int:
    case ScalarType::Float: return 4;
    case ScalarType::Short:
    case ScalarType::Half:
    case ScalarType::BFloat16: return 2;
    default: return 1;
  }
}

bool is_nan(ScalarType dtype, const char* at) {
  const auto value = [&](auto type) {
    std::memcpy(&type, at, sizeof type);
    return std::isnan(static_cast<double>(type));
  };
  switch (dtype) {
    case ScalarType::Double: return value(double{});
    case ScalarType::Float: return value(float{});
    case ScalarType::Half: return value(c10::Half{});
    case ScalarType::BFloat16: return value(c10::BFloat16{});
    default: return false;
  }
}

void put(ScalarType dtype, char* at, double value) {
  const auto copy = [&](auto type) { std::memcpy(at, &type, sizeof type); };
  switch (dtype) {
    case ScalarType::Double: return copy(value);
    case ScalarType::Float: return copy(static_cast<float>(value));
    case ScalarType::Half: return copy(static_cast<c10::Half>(static_cast<float>(value)));
    case ScalarType::BFloat16: return copy(static_cast<c10::BFloat16>(static_cast<float>(value)));
    default: return;
  }
}

// A tensor's memory and its offset there.
struct Operand {
  Sizes sizes, strides;
  int64_t offset = 0;
  ScalarType dtype = ScalarType::Float;
  std::unique_ptr<char[]> memory;
  size_t bytes = 0;

  Operand() = default;
  Operand(const Operand& other) { *this = other; }
  Operand(Operand&&) = default;
  Operand& operator=(Operand&&) = default;
  Operand& operator=(const Operand& other) {
    sizes = other.sizes;
    strides = other.strides;
    offset = other.offset;
    dtype = other.dtype;
    allocate();
    if (bytes) std::memcpy(memory.get(), other.memory.get(), bytes);
    return *this;
  }

  int64_t numel() const {
    int64_t product = 1;
    for (const int64_t size : sizes) product *= size;
    return product;
  }

  void allocate() {
    int64_t elements = offset + 1;
    for (size_t d = 0; d < sizes.size(); ++d) elements += (sizes[d] - 1) * strides[d];
    bytes = numel() ? static_cast<size_t>(elements) * item_size(dtype) : 0;
    memory.reset(bytes ? new char[bytes] : nullptr);
  }

  // Calls f with the addresses of the elements, in row-major order.
  template <class F>
  void for_each(const F& f) const {
    for (int64_t i = 0, n = numel(); i < n; ++i) {
      int64_t rest = i, at = offset;
      for (size_t d = sizes.size(); d-- > 0; rest /= sizes[d]) at += rest % sizes[d] * strides[d];
      f(memory.get() + static_cast<size_t>(at) * item_size(dtype));
    }
  }

  void fill(Choices& choices) {
    std::mt19937_64 random(static_cast<uint64_t>(choices.below(1 << 16)));
    const int64_t kind = choices.below(4);
    for (size_t i = 0; i < bytes; ++i) memory[i] = static_cast<char>(random());  // any codes; NaN, denormals and all
    if (kind == 0) return;
    std::normal_distribution<double> normal;
    for_each([&](char* at) { put(dtype, at, kind == 1 ? 0 : normal(random)); });
  }

  Operand contiguous() const {
    Operand copy;
    copy.sizes = sizes;
    copy.strides.assign(sizes.size(), 1);
    for (size_t d = sizes.size(); d-- > 1;) copy.strides[d - 1] = copy.strides[d] * std::max<int64_t>(sizes[d], 1);
    copy.dtype = dtype;
    copy.allocate();
    char* target = copy.memory.get();
    for_each([&](const char* at) {
      std::memcpy(target, at, item_size(dtype));
      target += item_size(dtype);
    });
    return copy;
  }

  Tensor tensor() const {
    const torch::stable::Device cpu(torch::headeronly::DeviceType::CPU);
    const size_t start = bytes ? static_cast<size_t>(offset) * item_size(dtype) : 0;
    return torch::stable::from_blob(memory.get() + start, sizes, strides, cpu, dtype);
  }
};

bool same_bytes(const Operand& a, const Operand& b) {
  return a.bytes == b.bytes && (!a.bytes || std::memcmp(a.memory.get(), b.memory.get(), a.bytes) == 0);
}

// NaNs of any kind are the same.
bool same_values(const Operand& a, const Operand& b) {
  const Operand x = a.contiguous(), y = b.contiguous();
  const size_t size = item_size(x.dtype);
  for (size_t i = 0; i < x.bytes; i += size) {
    const char *at_x = x.memory.get() + i, *at_y = y.memory.get() + i;
    if (std::memcmp(at_x, at_y, size) != 0 && !(is_nan(x.dtype, at_x) && is_nan(y.dtype, at_y))) return false;
  }
  return true;
}

// Whether the memory between the elements is the same.
bool same_gaps(const Operand& a, const Operand& b) {
  Operand x = a, y = b;
  for (Operand* operand : {&x, &y}) operand->for_each([&](char* at) { std::memset(at, 0, item_size(operand->dtype)); });
  return same_bytes(x, y);
}

// An order of the dimensions in memory, and the elements to leave out after each.
struct Layout {
  std::vector<size_t> order;
  Sizes gaps;
  int64_t offset = 0;
};

Layout draw_layout(Choices& choices, size_t dims) {
  Layout layout{{}, Sizes(dims, 0)};
  for (size_t d = 0; d < dims; ++d)
    layout.order.insert(layout.order.begin() + choices.below(static_cast<int64_t>(d) + 1), d);
  if (choices.one_in(2)) return layout;
  for (int64_t& gap : layout.gaps) gap = choices.of<int64_t>({0, 0, 1, 3});
  layout.offset = choices.below(9);
  return layout;
}

Operand make(Choices& choices, const Sizes& sizes, ScalarType dtype, const Layout* layout) {
  Operand operand;
  operand.sizes = sizes;
  operand.strides.assign(sizes.size(), 1);
  operand.dtype = dtype;
  int64_t stride = 1;
  for (size_t i = sizes.size(); i-- > 0;) {
    const size_t d = layout ? layout->order[i] : i;
    operand.strides[d] = stride;
    stride *= std::max<int64_t>(sizes[d], 1) + (layout ? layout->gaps[d] : 0);
  }
  operand.offset = layout ? layout->offset : choices.below(3);
  operand.allocate();
  operand.fill(choices);
  return operand;
}

Sizes draw_sizes(Choices& choices) {
  if (choices.one_in(3)) return {choices.of<int64_t>({0, 1, 7, 8, 15, 17, 255, 256, 257, 511, 1023, 1024, 1025, 2500})};
  Sizes sizes(static_cast<size_t>(choices.below(5)));
  for (int64_t& size : sizes) size = choices.of<int64_t>({0, 1, 1, 2, 3, 5, 8, 17});
  return sizes;
}

// What the lists of the ops hold.
enum class Kind { PARAM, GRAD, STATE, CODES, SLOW_CODES, SQ_CODES, ABSMAX, STEP, REMAINDER };

const std::vector<Kind> STEP_KINDS = {Kind::PARAM, Kind::GRAD, Kind::STATE,    Kind::STATE,
                                      Kind::STATE, Kind::STEP, Kind::REMAINDER};
const std::vector<Kind> BLOCKWISE_KINDS = {Kind::PARAM,  Kind::GRAD,     Kind::CODES,  Kind::ABSMAX, Kind::SLOW_CODES,
                                           Kind::ABSMAX, Kind::SQ_CODES, Kind::ABSMAX, Kind::STEP,   Kind::REMAINDER};

bool is_contiguous_kind(Kind kind) {
  return kind == Kind::CODES || kind == Kind::SLOW_CODES || kind == Kind::SQ_CODES || kind == Kind::ABSMAX;
}

struct Call {
  bool blockwise;
  std::vector<std::vector<Operand>> lists;
  std::vector<Hyperparameters> h;  // rows
  std::vector<Operand> lrs;
  std::optional<Operand> table, grad_scale, found_inf;
  std::vector<int64_t> rows;
  bool maximize = false;
  bool stochastic_rounding = false, stochastic_param_rounding = false;
  int64_t seed = 0;
  std::vector<int64_t> subsequences, offsets;
  bool dry_run = false;

  const std::vector<Kind>& kinds() const { return blockwise ? BLOCKWISE_KINDS : STEP_KINDS; }

  void run() const {
    std::vector<std::vector<Tensor>> t;
    for (const auto& list : lists) {
      t.emplace_back();
      for (const Operand& operand : list) t.back().push_back(operand.tensor());
    }
    const auto scalar = [](const std::optional<Operand>& x) {
      return x ? std::optional<Tensor>(x->tensor()) : std::nullopt;
    };
    std::vector<Tensor> rates;
    for (const Operand& operand : lrs) rates.push_back(operand.tensor());
    std::vector<StableIValue> stack;
    const auto push = [&](const auto&... arguments) { (stack.push_back(torch::stable::detail::from(arguments)), ...); };
    for (const auto& list : t) push(list);
    table ? push(table->tensor()) : push(flat_rows(), rates);
    push(rows, maximize);
    if (blockwise) push(stochastic_rounding);
    push(stochastic_param_rounding, seed, subsequences, offsets, scalar(grad_scale), scalar(found_inf), dry_run);
    auto* const op = blockwise ? table ? boxed_step<BlockwiseLists, blockwise_step, Tensor>
                                       : boxed_step<BlockwiseLists, blockwise_step, std::vector<double>>
                     : table   ? boxed_step<StepLists, step, Tensor>
                               : boxed_step<StepLists, step, std::vector<double>>;
    op(stack.data(), stack.size(), 0);
  }

  std::vector<double> flat_rows() const {
    std::vector<double> numbers(h.size() * HYPERPARAMETERS);
    std::memcpy(numbers.data(), h.data(), numbers.size() * sizeof(double));
    return numbers;
  }

  // The checks alone, of tensors of which one is said to be on another device.
  void check_with_foreign(size_t list, size_t i, Device device) const {
    std::vector<std::vector<Tensor>> t;
    std::vector<Views> v;
    for (const auto& operands : lists) {
      t.emplace_back();
      for (const Operand& operand : operands) t.back().push_back(operand.tensor());
      v.push_back(views_of(t.back()));
    }
    v[list][i].device = device;
    v[list][i].device_index = 1;
    v[list][i].data = nullptr;
    const StepOptions options{NumberRows{flat_rows(), {}},
                              rows,
                              maximize,
                              stochastic_rounding,
                              stochastic_param_rounding,
                              seed,
                              subsequences,
                              offsets,
                              {},
                              {},
                              true};
    const auto step = [](auto&, const StepOptions&) {};
    if (blockwise)
      run_op(BlockwiseLists{v[0], v[1], v[2], v[3], v[4], v[5], v[6], v[7], v[8], v[9]}, options, step);
    else
      run_op(StepLists{v[0], v[1], v[2], v[3], v[4], v[5], v[6]}, options, step);
  }

  bool skips() const {
    if (!found_inf) return false;
    float value;
    std::memcpy(&value, found_inf->memory.get() + static_cast<size_t>(found_inf->offset) * sizeof value, sizeof value);
    return value != 0;
  }
};

double draw_number(Choices& choices, double least, double most) {
  return choices.one_in(3) ? least + (most - least) * static_cast<double>(choices.below(1 << 15)) / (1 << 15)
                           : choices.of({least, (least + most) / 2, least + (most - least) / 1000});
}

Operand scalar_operand(Choices& choices, ScalarType dtype, double value) {
  Operand operand = make(choices, choices.of<Sizes>({{}, {1}, {1, 1}}), dtype, nullptr);
  operand.for_each([&](char* at) { put(dtype, at, value); });
  return operand;
}

Operand table_operand(const Call& call, int64_t offset) {
  Operand operand;
  operand.sizes = {static_cast<int64_t>(call.h.size()), HYPERPARAMETERS};
  operand.strides = {HYPERPARAMETERS, 1};
  operand.offset = offset;
  operand.dtype = ScalarType::Double;
  operand.allocate();
  const std::vector<double> numbers = call.flat_rows();
  std::memcpy(operand.memory.get() + static_cast<size_t>(offset) * sizeof(double), numbers.data(),
              numbers.size() * sizeof(double));
  return operand;
}

Hyperparameters draw_row(Choices& choices) {
  const auto warm_up = [&] { return choices.one_in(2) ? draw_number(choices, 1e-3, 1e6) : 0; };
  const double almost_one = 1 - 0x1p-53;
  Hyperparameters h;
  h.lr = draw_number(choices, 0, 1);
  h.beta1 = draw_number(choices, 0, almost_one);
  h.beta2 = draw_number(choices, 0, almost_one);
  h.beta3 = draw_number(choices, 0, almost_one);
  h.alpha = draw_number(choices, -5, 10);
  h.t_alpha = warm_up();
  h.t_beta3 = warm_up();
  h.schedule_start = choices.of<double>({0, 0, 1, 0x1p63});
  h.eps = draw_number(choices, 0, 1);
  h.weight_decay = draw_number(choices, -1, 1);
  h.delta = choices.one_in(3) ? draw_number(choices, 1e-3, 100) : 0;
  h.log_time_beta2 = h.delta > 0 && choices.one_in(2);
  h.kappa = choices.one_in(3) ? draw_number(choices, 1e-3, 1) : 0;
  h.t_weight_decay = warm_up();
  return h;
}

Call draw_call(Choices& choices) {
  Call call;
  call.blockwise = choices.one_in(2);
  call.lists.resize(call.kinds().size());
  const auto floating = {ScalarType::Float, ScalarType::BFloat16, ScalarType::Half, ScalarType::Double};
  const ScalarType param_dtype = choices.of(floating), grad_dtype = choices.of(floating);
  const bool rounded_otherwise = param_dtype == ScalarType::BFloat16 && choices.one_in(2);
  call.stochastic_param_rounding = rounded_otherwise && choices.one_in(2);
  const bool has_remainders = rounded_otherwise && !call.stochastic_param_rounding;
  const ScalarType slow_dtype = choices.of({ScalarType::Short, ScalarType::Char});
  const ScalarType remainder_dtype = choices.of({ScalarType::Short, ScalarType::Char});
  const auto dtype_of = [&](Kind kind) {
    switch (kind) {
      case Kind::PARAM: return param_dtype;
      case Kind::GRAD: return grad_dtype;
      case Kind::STATE: return compute_dtype(param_dtype);
      case Kind::CODES: return ScalarType::Char;
      case Kind::SQ_CODES: return ScalarType::Byte;
      case Kind::SLOW_CODES: return slow_dtype;
      case Kind::REMAINDER: return remainder_dtype;
      default: return ScalarType::Float;
    }
  };
  for (int64_t count = choices.below(5), i = 0; i < count; ++i) {
    const Sizes sizes = draw_sizes(choices);
    const Layout common = draw_layout(choices, sizes.size());
    const bool alike = choices.one_in(3);
    int64_t numel = 1;
    for (const int64_t size : sizes) numel *= size;
    for (size_t l = 0; l < call.lists.size(); ++l) {
      const Kind kind = call.kinds()[l];
      if (kind == Kind::REMAINDER && !has_remainders) continue;
      if (kind == Kind::STEP) {
        const double steps = static_cast<double>(choices.of<int64_t>({0, 1, 1000, (1 << 24) - 1}));
        call.lists[l].push_back(scalar_operand(choices, ScalarType::Float, steps));
        continue;
      }
      const Sizes own = kind == Kind::ABSMAX ? Sizes{block_count(numel)} : sizes;
      const Layout layout = alike ? common : draw_layout(choices, own.size());
      call.lists[l].push_back(make(choices, own, dtype_of(kind), is_contiguous_kind(kind) ? nullptr : &layout));
      if (kind == Kind::GRAD && choices.one_in(4)) {  // expanded, or with strides that cross
        Operand& grad = call.lists[l].back();
        for (int64_t& stride : grad.strides) stride = choices.of<int64_t>({0, 0, stride, 1, 2});
        grad.allocate();
        grad.fill(choices);
      }
    }
    call.subsequences.push_back(choices.below(1 << 16));
  }
  if (choices.one_in(3))
    call.grad_scale = scalar_operand(choices, choices.of({ScalarType::Float, ScalarType::Double}),
                                     choices.of<double>({1, 65536, 0, NAN}));
  if (choices.one_in(3)) call.found_inf = scalar_operand(choices, ScalarType::Float, choices.of<double>({0, 1, NAN}));
  for (int64_t count = choices.of<int64_t>({1, 1, 2, 3}), i = 0; i < count; ++i) call.h.push_back(draw_row(choices));
  const auto count = static_cast<int64_t>(call.h.size());
  if (count > 1 || choices.one_in(4))
    for (size_t i = 0; i < call.lists[0].size(); ++i) call.rows.push_back(choices.below(count));
  if (choices.one_in(3))
    for (int64_t i = 0; i < count; ++i) {
      const ScalarType dtype = choices.of({ScalarType::Float, ScalarType::Double});
      call.lrs.push_back(scalar_operand(choices, dtype, draw_number(choices, 0, 1)));
    }
  call.maximize = choices.one_in(2);
  if (choices.one_in(4)) {
    call.lrs.clear();
    call.table = table_operand(call, choices.below(9));
  }
  call.dry_run = choices.one_in(8);
  call.stochastic_rounding = choices.one_in(2);
  call.seed = choices.of<int64_t>({0, 1, INT64_MIN, INT64_MAX});
  return call;
}

// Makes one argument invalid.
void bend_options(Choices& choices, Call& call) {
  const double beta = choices.of<double>({1, -0.1, 2, NAN, INFINITY, -INFINITY});
  const double negative = choices.of<double>({-1, -1e-300, NAN, -INFINITY});
  const auto bad_scalar = [&](std::initializer_list<ScalarType> dtypes) {
    if (choices.one_in(2)) return make(choices, {choices.of<int64_t>({0, 2})}, ScalarType::Float, nullptr);
    return scalar_operand(choices, choices.of(dtypes), 1);
  };
  const int64_t option = choices.below(14);
  if (option < 8) call.table.reset();
  Hyperparameters& h = call.h[static_cast<size_t>(choices.below(static_cast<int64_t>(call.h.size())))];
  switch (option) {
    case 0: h.beta1 = beta; break;
    case 1: h.beta2 = beta; break;
    case 2: h.beta3 = beta; break;
    case 3: h.t_alpha = negative; break;
    case 4: h.t_beta3 = negative; break;
    case 5: h.schedule_start = negative; break;
    case 6: h.eps = negative; break;
    case 7:  // of another dtype or shape, or too many
      call.lrs.resize(call.h.size() - 1);
      for (Operand& lr : call.lrs) lr = scalar_operand(choices, ScalarType::Float, 1);
      call.lrs.push_back(bad_scalar({ScalarType::Half, ScalarType::Int, ScalarType::ComplexFloat}));
      break;
    case 8: call.grad_scale = bad_scalar({ScalarType::Half, ScalarType::Byte}); break;
    case 9:  // both ways of rounding at once, or of parameters that aren't rounded; or numbers of random subsequences
      call.subsequences.resize(call.lists[0].size() + 1);
      call.stochastic_param_rounding = true;
      break;
    case 10:  // of another dtype or length, or with gaps
      call.table = make(choices, {1, choices.of<int64_t>({0, 1, 9, 11})}, ScalarType::Double, nullptr);
      if (choices.one_in(2)) {
        call.table = make(choices, {3, HYPERPARAMETERS}, ScalarType::Double, nullptr);
        call.table->strides = {HYPERPARAMETERS, choices.of<int64_t>({0, 2})};
        call.table->allocate();
        call.table->fill(choices);
      } else if (choices.one_in(2)) {
        call.table = make(choices, {1, HYPERPARAMETERS}, ScalarType::Int, nullptr);
      }
      break;
    case 11:  // rows of more parameters than there are
      call.rows.assign(call.lists[0].size() + 1, 0);
      break;
    case 12:  // rows that there aren't
      if (call.lists[0].empty()) return bend_options(choices, call);
      call.rows.assign(call.lists[0].size(), 0);
      call.rows.back() = choices.of<int64_t>({-1, static_cast<int64_t>(call.h.size()), INT64_MIN, INT64_MAX});
      break;
    default: call.found_inf = bad_scalar({ScalarType::Double, ScalarType::Bool}); break;
  }
}

void bend_lists(Choices& choices, Call& call) {
  const int64_t used = static_cast<int64_t>(call.lists.size()) - call.lists.back().empty();  // without remainders
  const size_t l = static_cast<size_t>(choices.below(used));
  const Kind kind = call.kinds()[l];
  auto& list = call.lists[l];
  if (choices.one_in(6)) {  // a list's length
    if (call.blockwise && choices.one_in(4))
      call.subsequences.pop_back();
    else if (choices.one_in(2) && kind != Kind::REMAINDER && list.size() > 1)  // an only one may be left out
      list.pop_back();
    else
      list.push_back(list[0]);
    return;
  }
  Operand& operand = list[static_cast<size_t>(choices.below(static_cast<int64_t>(list.size())))];
  const int64_t numel = operand.numel();
  const Sizes sizes = operand.sizes;
  switch (choices.below(4)) {
    case 0:  // a dtype that is nowhere allowed
      operand =
          make(choices, sizes, choices.of({ScalarType::Int, ScalarType::ComplexFloat, ScalarType::Bool}), nullptr);
      return;
    case 1:  // a gap between elements, or elements at one address
      if (numel > 1 && kind != Kind::GRAD && kind != Kind::STEP) {
        size_t d = 0;
        while (sizes[d] == 1) ++d;
        operand.strides[d] = is_contiguous_kind(kind) ? 2 * numel : 0;
        operand.allocate();
        operand.fill(choices);
        return;
      }
      [[fallthrough]];
    case 2:  // one dimension more, of no consequence
      if (kind != Kind::ABSMAX && kind != Kind::STEP) {
        Sizes longer = sizes;
        longer.insert(longer.begin() + choices.below(static_cast<int64_t>(sizes.size()) + 1), 1);
        operand = make(choices, longer, operand.dtype, nullptr);
        return;
      }
      [[fallthrough]];
    default:  // another number of elements
      operand = make(choices, {numel + choices.of<int64_t>({1, 3, 1000})}, operand.dtype, nullptr);
      return;
  }
}

void require_unchanged(const Call& call, const Call& before) {
  for (size_t l = 0; l < call.lists.size(); ++l)
    for (size_t i = 0; i < call.lists[l].size(); ++i) REQUIRE(same_bytes(call.lists[l][i], before.lists[l][i]));
}

template <class F>
void require_refusal(const char* op, const F& f) {
  std::string text;
  try {
    f();
  } catch (const std::runtime_error& error) {
    text = error.what();
  }
  REQUIRE(text.find(op) == 0);
}

// The offsets of a parameter's elements, in row-major order, in state that has the parameter's order in memory.
Sizes offsets_in_memory(const Operand& param) {
  Sizes offsets;
  int64_t extent = 1;
  for (size_t d = 0; d < param.sizes.size(); ++d) extent += (param.sizes[d] - 1) * param.strides[d];
  const bool has_gaps = extent != param.numel();
  const char* first = param.memory.get() + static_cast<size_t>(param.offset) * item_size(param.dtype);
  param.for_each([&](const char* at) {
    const auto number = (at - first) / static_cast<int64_t>(item_size(param.dtype));
    offsets.push_back(has_gaps ? static_cast<int64_t>(offsets.size()) : number);
  });
  return offsets;
}

// A call with its state in arenas.
class InArenas {
 public:
  InArenas(Choices& choices, const Call& call) : call_(call), plain_(call) {
    const auto count = static_cast<size_t>(1 + choices.below(3));
    std::vector<int64_t> blocks(count, 0), steps(count, 0);
    for (const Operand& param : call.lists[0]) {
      const auto k = static_cast<size_t>(choices.below(static_cast<int64_t>(count)));
      blocks[k] += choices.below(2);
      steps[k] += choices.below(2);
      for (const int64_t number : {static_cast<int64_t>(k), BLOCK_SIZE * blocks[k], steps[k]++})
        call_.offsets.push_back(number);
      blocks[k] += block_count(param.numel());
    }
    for (size_t l = 2; l < call.lists.size(); ++l) {
      if (call.lists[l].empty()) continue;
      const Kind kind = call.kinds()[l];
      call_.lists[l].clear();
      for (size_t k = 0; k < count; ++k) {
        const int64_t size = kind == Kind::STEP ? steps[k] : kind == Kind::ABSMAX ? blocks[k] : BLOCK_SIZE * blocks[k];
        call_.lists[l].push_back(make(choices, {size}, call.lists[l][0].dtype, nullptr));
      }
    }
    before_ = call_;
    for_each([](char* in_arena, char* element, size_t size) { std::memcpy(in_arena, element, size); }, call_, plain_);
  }

  Call& call() { return call_; }

  // That the elements are those of `stepped`, and nothing else in the arenas has changed.
  void require_equal(Call stepped) {
    for (size_t l : {0, 1})
      for (size_t i = 0; i < stepped.lists[l].size(); ++i) REQUIRE(same_values(call_.lists[l][i], stepped.lists[l][i]));
    Call expected = before_;
    for_each([](char* in_arena, char* element, size_t size) { std::memcpy(in_arena, element, size); }, expected,
             stepped);
    for (size_t l = 2; l < call_.lists.size(); ++l)
      for (size_t k = 0; k < call_.lists[l].size(); ++k) REQUIRE(same_values(call_.lists[l][k], expected.lists[l][k]));
  }

 private:
  // Calls f(element in an arena, the same in a tensor of its own, its bytes) for all state.
  template <class F>
  void for_each(const F& f, Call& placed, Call& plain) const {
    for (size_t i = 0; i < plain.lists[0].size(); ++i) {
      const Sizes in_memory = offsets_in_memory(plain.lists[0][i]);
      const int64_t* offsets = call_.offsets.data() + OFFSETS_PER_PARAM * i;
      for (size_t l = 2; l < plain.lists.size(); ++l) {
        if (plain.lists[l].empty()) continue;
        const Kind kind = plain.kinds()[l];
        const Operand& arena = placed.lists[l][static_cast<size_t>(offsets[0])];
        const size_t size = item_size(arena.dtype);
        const int64_t first = kind == Kind::STEP     ? offsets[2]
                              : kind == Kind::ABSMAX ? offsets[1] / BLOCK_SIZE
                                                     : offsets[1];
        size_t number = 0;
        plain.lists[l][i].for_each([&](char* element) {
          const auto n = static_cast<int64_t>(number++);
          const bool reordered = kind == Kind::STATE || kind == Kind::REMAINDER;
          const int64_t at = arena.offset + first + (reordered ? in_memory[static_cast<size_t>(n)] : n);
          f(arena.memory.get() + static_cast<size_t>(at) * size, element, size);
        });
      }
    }
  }

  Call call_, plain_, before_;
};

// Makes an offset or an arena invalid.
void bend_offsets(Choices& choices, Call& call) {
  const auto i = static_cast<size_t>(choices.below(static_cast<int64_t>(call.lists[0].size())));
  int64_t* offsets = call.offsets.data() + OFFSETS_PER_PARAM * i;
  const auto list = static_cast<size_t>(2 + choices.below(call.blockwise ? 7 : 4));
  Operand& arena = call.lists[list][static_cast<size_t>(choices.below(static_cast<int64_t>(call.lists[list].size())))];
  switch (choices.below(6)) {
    case 0: offsets[0] = choices.of<int64_t>({-1, 3, INT64_MIN, INT64_MAX}); break;
    case 1: offsets[1] = choices.of<int64_t>({-1, -256, offsets[1] + 1, 1 << 20, INT64_MIN, INT64_MAX - 255}); break;
    case 2: offsets[2] = choices.of<int64_t>({-1, 16, INT64_MIN, INT64_MAX}); break;
    case 3: call.offsets.pop_back(); break;
    case 4: call.lists[list].push_back(arena); break;
    default: arena = make(choices, {1, arena.sizes[0]}, arena.dtype, nullptr); break;
  }
}

void run_step(Choices& choices) {
  Call call = draw_call(choices);
  const char* op = call.blockwise ? "ademamix_blockwise_step_: " : "ademamix_step_: ";
  const bool bent_lists = !call.lists[0].empty() && choices.one_in(3), bent_options = choices.one_in(6);
  if (bent_lists) bend_lists(choices, call);
  if (bent_options) bend_options(choices, call);
  const Call before = call;
  if (bent_lists || bent_options) {
    require_refusal(op, [&] { call.run(); });
    return require_unchanged(call, before);
  }
  if (!call.lists[0].empty() && choices.one_in(4)) {
    const int64_t used = static_cast<int64_t>(call.lists.size()) - call.lists.back().empty();
    const auto list = static_cast<size_t>(choices.below(used));
    const auto i = static_cast<size_t>(choices.below(static_cast<int64_t>(call.lists[0].size())));
    const Device device = choices.of({Device::CUDA, Device::OTHER});
    require_refusal(op, [&] { call.check_with_foreign(list, i, device); });
  }
  Call plain = call;
  plain.table.reset();
  for (auto& list : plain.lists)
    for (Operand& operand : list) operand = operand.contiguous();
  call.run();
  if (call.skips() || call.dry_run) return require_unchanged(call, before);
  plain.run();
  if (!call.lists[0].empty() && choices.one_in(2)) {
    InArenas placed(choices, before);
    placed.call().run();
    placed.require_equal(call);
    bend_offsets(choices, placed.call());
    const Call bent = placed.call();
    require_refusal(op, [&] { placed.call().run(); });
    require_unchanged(placed.call(), bent);
  }
  for (size_t l = 0; l < call.lists.size(); ++l) {
    for (size_t i = 0; i < call.lists[l].size(); ++i) {
      REQUIRE(same_gaps(call.lists[l][i], before.lists[l][i]));
      REQUIRE(same_values(call.lists[l][i], plain.lists[l][i]));
      if (call.kinds()[l] == Kind::GRAD) REQUIRE(same_bytes(call.lists[l][i], before.lists[l][i]));
    }
  }
}

Operand copy_of(const Tensor& t) {
  Operand operand;
  operand.sizes.assign(t.sizes().begin(), t.sizes().end());
  operand.strides.assign(t.strides().begin(), t.strides().end());
  operand.dtype = t.scalar_type();
  operand.allocate();
  if (operand.bytes) std::memcpy(operand.memory.get(), t.const_data_ptr(), operand.bytes);
  return operand;
}

void run_quantize(Choices& choices) {
  const Sizes sizes = draw_sizes(choices);
  const Layout layout = draw_layout(choices, sizes.size());
  const bool wrong_dtype = choices.one_in(8), wrong_format = choices.one_in(8), wrong_random = choices.one_in(8);
  const ScalarType dtype =
      wrong_dtype ? choices.of({ScalarType::Double, ScalarType::Half, ScalarType::Int}) : ScalarType::Float;
  const Operand x = make(choices, sizes, dtype, &layout);
  const int64_t format = wrong_format   ? choices.of<int64_t>({-1, BLOCK_FORMATS, INT64_MIN, INT64_MAX})
                         : wrong_random ? choices.of<int64_t>({0, 2, 3})
                                        : choices.below(BLOCK_FORMATS);
  std::optional<int64_t> seed;
  const bool stochastic = format == 1 || format >= 4;
  if (wrong_random || (stochastic && choices.one_in(2))) seed = choices.of<int64_t>({0, -1, INT64_MAX});
  const int64_t step = choices.of<int64_t>({0, -1, INT64_MAX});
  const auto quantize = [&](const Operand& values) {
    return quantize_blockwise(values.tensor(), format, seed, step, step);
  };
  if (wrong_dtype || wrong_format || wrong_random) return require_refusal("quantize_blockwise: ", [&] { quantize(x); });
  const std::tuple<Tensor, Tensor> quantized = quantize(x), plain = quantize(x.contiguous());
  const Tensor codes = std::get<0>(quantized), absmax = std::get<1>(quantized);
  REQUIRE(same_values(copy_of(codes), copy_of(std::get<0>(plain))));
  REQUIRE(same_values(copy_of(absmax), copy_of(std::get<1>(plain))));

  const int64_t bent = choices.below(8);
  Operand scales = copy_of(absmax);
  if (bent == 0) scales = make(choices, {scales.numel() + 1}, ScalarType::Float, nullptr);
  if (bent == 1) scales = make(choices, {1, scales.numel()}, ScalarType::Float, nullptr);
  if (bent == 2) scales = make(choices, scales.sizes, ScalarType::Double, nullptr);
  const int64_t other_format = bent == 3 ? (format + 1) % 3 : format;  // of codes of another dtype
  const auto dequantize = [&] { return dequantize_blockwise(codes, scales.tensor(), other_format); };
  if (bent < 4) return require_refusal("dequantize_blockwise: ", dequantize);
  const Tensor values = dequantize();
  REQUIRE(values.numel() == x.numel() && values.scalar_type() == ScalarType::Float);
}

void run_case(Choices choices) { choices.one_in(4) ? run_quantize(choices) : run_step(choices); }

}  // namespace
}  // namespace ademamix

#ifdef LIBFUZZER

extern "C" int LLVMFuzzerTestOneInput(const uint8_t* bytes, size_t size) {
  ademamix::run_case({bytes, size});
  return 0;
}

#else

int main(int argc, char** argv) {
  const uint64_t seed = argc > 1 ? std::strtoull(argv[1], nullptr, 10) : 0;
  const double seconds = argc > 2 ? std::atof(argv[2]) : 10;
  const bool one = argc > 3;
  static uint64_t number = one ? std::strtoull(argv[3], nullptr, 10) : 0;
  const auto start = std::chrono::steady_clock::now();
  const auto elapsed = [&] { return std::chrono::duration<double>(std::chrono::steady_clock::now() - start).count(); };
  __sanitizer_set_death_callback(
      [] { std::fprintf(stderr, "in case %llu\n", static_cast<unsigned long long>(number)); });
  do ademamix::run_case(ademamix::Choices(seed << 32 | number++));
  while (!one && elapsed() < seconds);
  std::printf("%llu cases\n", static_cast<unsigned long long>(number));
}

#endif
