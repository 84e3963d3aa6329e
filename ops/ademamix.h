// AdEMAMix (arXiv 2409.03137): the schedules, and the update of one element. The CPU and the CUDA kernels compile
// these same functions; T is float or double, V is T or a SIMD vector of T.
#pragma once

#include <cstdint>

#include "value.h"

namespace ademamix {

// The hyperparameters of one parameter group. An op call has one or more rows of them, as numbers or in a tensor, in
// this order (which torch_ademamix/numerics/reference_step.py shares).
struct Hyperparameters {
  double lr, beta1, beta2, beta3, alpha;
  double t_alpha, t_beta3;  // steps of warm-up of alpha and beta3; 0 for none
  double schedule_start;    // steps before the warm-ups begin
  double eps, weight_decay;
  double delta;           // of beta3 in logarithmic time, instead of beta3 and its warm-up; 0 for none
  double log_time_beta2;  // not 0: beta2 is in logarithmic time too, and exp_avg_sq has no bias correction
  double kappa;           // alpha grows by (1 + t)^(1 - kappa); 0 for none
  double t_weight_decay;  // weight_decay is divided by 1 + t / t_weight_decay; 0 for a constant one
};

constexpr int64_t HYPERPARAMETERS = 14;
static_assert(sizeof(Hyperparameters) == HYPERPARAMETERS * sizeof(double));

template <class S>
ADEMAMIX_INLINE Hyperparameters read_hyperparameters(const S* row) {
  const auto number = [row](int i) { return static_cast<double>(row[i]); };
  return {number(0), number(1), number(2), number(3),  number(4),  number(5),  number(6),
          number(7), number(8), number(9), number(10), number(11), number(12), number(13)};
}

// Returns the schedules' t, which stays 0 until a tensor has done schedule_start steps.
ADEMAMIX_INLINE double schedule_step(double step, const Hyperparameters& h) {
  return ::fmax(step - h.schedule_start, 0.0);
}

// alpha(t): linear from 0 to alpha over t_alpha steps; with kappa, it grows without end.
ADEMAMIX_INLINE double alpha_schedule(double step, const Hyperparameters& h) {
  const double alpha = h.t_alpha > 0 ? ::fmin(step * h.alpha / h.t_alpha, h.alpha) : h.alpha;
  return h.kappa > 0 ? alpha + ::pow(1 + step, 1 - h.kappa) : alpha;
}

// 1 - beta(t) in logarithmic time (arXiv 2602.05298): the EMA remembers about the last t / delta steps.
ADEMAMIX_INLINE double log_time_rate(double step, double delta) { return delta / (delta + step); }

// weight_decay(t) in logarithmic time.
ADEMAMIX_INLINE double weight_decay_schedule(double step, const Hyperparameters& h) {
  return h.t_weight_decay > 0 ? h.weight_decay / (1 + step / h.t_weight_decay) : h.weight_decay;
}

// beta3(t): from beta1 to beta3 over t_beta3 steps, linear in the half-life of the EMA, which is proportional to
// 1 / ln(beta). This form of the paper's equation also works at beta1 = 0, where 1 / ln(beta1) is -0: before the
// warm-up's first step, s is 0 and exp(1 / -0) is that beta1.
ADEMAMIX_INLINE double beta3_schedule(double step, const Hyperparameters& h) {
  if (!(step < h.t_beta3)) return h.beta3;
  const double s = step / h.t_beta3;
  const double start = h.beta1 > 0 ? 1 / ::log(h.beta1) : -0.0;
  const double end = h.beta3 > 0 ? 1 / ::log(h.beta3) : -0.0;
  return ::fmin(::exp(1 / ((1 - s) * start + s * end)), h.beta3);
}

// Returns the count after a step. float32 has every integer only up to 2^24. From there on the count advances to the
// next float32, so that warm-ups continue, though faster, and each step draws other random bits.
ADEMAMIX_INLINE float next_step(float step) {
  const float next = step + 1;
  return next > step ? next : float_from_bits(float_bits(step) + 1);
}

// Returns the factor of gradients: -1 to maximize, times the inverse of GradScaler's scale.
ADEMAMIX_INLINE double grad_factor(bool maximize, double grad_scale) { return (maximize ? -1 : 1) / grad_scale; }

// The scalars of one tensor's update, which are the same for all its elements.
template <class V>
struct StepScalars {
  V grad_factor;
  V beta1, one_minus_beta1;
  V beta2, one_minus_beta2;
  V beta3, one_minus_beta3;
  V alpha;
  V inv_bias1;       // 1 / (1 - beta1^t)
  V inv_sqrt_bias2;  // 1 / sqrt(1 - beta2^t) / ROOT_SCALE<V>
  V eps, minus_lr, weight_decay;

  StepScalars() = default;

  // All in float64, rounded once: in float32, 1 - 0.9999 alone would be off by 1.7e-4. `step` counts from 1.
  ADEMAMIX_INLINE StepScalars(const Hyperparameters& h, double step, double grad_factor)
      : grad_factor(V(grad_factor)),
        beta1(V(h.beta1)),
        one_minus_beta1(V(1 - h.beta1)),
        beta2(V(h.beta2)),
        one_minus_beta2(V(1 - h.beta2)),
        alpha(V(alpha_schedule(schedule_step(step, h), h))),
        inv_bias1(V(1 / (1 - ::pow(h.beta1, step)))),
        inv_sqrt_bias2(V(1 / ::sqrt(1 - ::pow(h.beta2, step)))),
        eps(V(h.eps)),
        minus_lr(V(-h.lr)),
        weight_decay(V(weight_decay_schedule(step, h))) {
    const double schedule_t = schedule_step(step, h);
    const double beta3_t = beta3_schedule(schedule_t, h);
    const double rate3 = h.delta > 0 ? log_time_rate(schedule_t, h.delta) : 1 - beta3_t;
    beta3 = V(h.delta > 0 ? 1 - rate3 : beta3_t);
    one_minus_beta3 = V(rate3);
    if (h.log_time_beta2 != 0) {
      const double rate2 = log_time_rate(step, h.delta);
      beta2 = V(1 - rate2);
      one_minus_beta2 = V(rate2);
      inv_sqrt_bias2 = V(1);
    }
  }

  // Broadcast to the lanes of a SIMD vector.
  template <class T>
  ADEMAMIX_INLINE explicit StepScalars(const StepScalars<T>& s)
      : grad_factor(s.grad_factor),
        beta1(s.beta1),
        one_minus_beta1(s.one_minus_beta1),
        beta2(s.beta2),
        one_minus_beta2(s.one_minus_beta2),
        beta3(s.beta3),
        one_minus_beta3(s.one_minus_beta3),
        alpha(s.alpha),
        inv_bias1(s.inv_bias1),
        inv_sqrt_bias2(s.inv_sqrt_bias2 * T(1 / ROOT_SCALE<V>)),
        eps(s.eps),
        minus_lr(s.minus_lr),
        weight_decay(s.weight_decay) {}
};

template <class V>
struct Element {
  V param, exp_avg, exp_avg_slow, exp_avg_sq;
};

// Updates the moments of one element: exp_avg, exp_avg_slow and exp_avg_sq are the paper's m1, m2 and nu. Without
// EXP_AVG, beta1 is 0: m1 is the gradient, and its bias correction is 1.
template <bool EXP_AVG = true, class V>
ADEMAMIX_INLINE void update_moments(Element<V>& e, V grad, const StepScalars<V>& s) {
  grad = grad * s.grad_factor;
  e.exp_avg = EXP_AVG ? fma(s.beta1, e.exp_avg, s.one_minus_beta1 * grad) : grad;
  e.exp_avg_slow = fma(s.beta3, e.exp_avg_slow, s.one_minus_beta3 * grad);
  e.exp_avg_sq = fma(s.beta2, e.exp_avg_sq, s.one_minus_beta2 * grad * grad);
}

// Updates the parameter of one element by its new moments, where root = scaled_sqrt(nu):
//   param -= lr * ((m1 / (1 - beta1^t) + alpha * m2) / (sqrt(nu) / sqrt(1 - beta2^t) + eps) + weight_decay * param)
template <bool EXP_AVG = true, class V>
ADEMAMIX_INLINE void update_param(Element<V>& e, V root, const StepScalars<V>& s) {
  const V numerator = fma(s.alpha, e.exp_avg_slow, EXP_AVG ? e.exp_avg * s.inv_bias1 : e.exp_avg);
  const V denominator = fma(root, s.inv_sqrt_bias2, s.eps);
  e.param = fma(s.minus_lr, fma(s.weight_decay, e.param, numerator / denominator), e.param);
}

// Does one step of one element, moments and parameter. Returns the root, from which quantized state is made.
template <bool EXP_AVG = true, class V>
ADEMAMIX_INLINE V update(Element<V>& e, V grad, const StepScalars<V>& s) {
  update_moments<EXP_AVG>(e, grad, s);
  const V root = scaled_sqrt(e.exp_avg_sq);
  update_param<EXP_AVG>(e, root, s);
  return root;
}

}  // namespace ademamix
