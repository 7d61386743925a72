// Batch norm by batch statistics, then ReLU if requested: what both derivatives do with a channel, given sums
// over its N rows. No torch. Internal linkage: this is compiled for each instruction set.
//
//     d = x - mean,  xhat = r d,  a = w r,  z = a d + b,  y = [z > 0] z,  g = [z > 0] dy
//
// mean is that of the rows and r = (variance + eps)^-1/2, biased. Every elementwise result is linear in the rows' own
// values, with coefficients that belong to the channel; u, p and q are the cotangents of dx, dweight and dbias.
#pragma once

#include "qualifiers.h"

namespace {

// dx = g * of_g + d * of_d + constant
template <class S>
struct BackwardCoefficients {
  S of_g, of_d, constant;
  S dweight, dbias;
};

template <class S>
struct BackwardSums {
  S g, gd;  // of g and of g d
};

template <class S>
__host__ __device__ BackwardCoefficients<S> backward_coefficients(S N, S w, S r, const BackwardSums<S>& sum) {
  const S a = w * r, dw = r * sum.gd;
  return {a, -a * r * dw / N, -a * sum.g / N, dw, sum.g};
}

// dx  = u * dx_of_u + g * dx_of_g + d * dx_of_d + dx_constant
// ddy = [z > 0] (u * ddy_of_u + d * ddy_of_d + ddy_constant)
template <class S>
struct DoubleBackwardCoefficients {
  S dx_of_u, dx_of_g, dx_of_d, dx_constant;
  S ddy_of_u, ddy_of_d, ddy_constant;
  S dweight;
};

template <class S>
struct DoubleBackwardSums {
  S g, gd, u, ud, ug;
};

template <class S>
__host__ __device__ DoubleBackwardCoefficients<S> double_backward_coefficients(S N, S w, S r, S p, S q,
                                                                               const DoubleBackwardSums<S>& sum) {
  const S a = w * r, dw = r * sum.gd, Ux = r * sum.ud;
  // The cotangents' form is a Q + p dw + q db, and c its gradient by xhat: c = -a (u dw + g Ux) / N + p g.
  const S Q = sum.ug - (sum.u * sum.g + Ux * dw) / N;
  const S of_xhat = p - a * Ux / N;
  const S mean_c = (p * sum.g - a * (sum.u * dw + Ux * sum.g) / N) / N;
  const S mean_c_xhat = (p - 2 * a * Ux / N) * dw / N;
  return {-r * a * dw / N,   r * of_xhat, -r * r * (mean_c_xhat + a * Q / N), -r * mean_c, a, r * of_xhat,
          q - a * sum.u / N, r * Q};
}

}  // namespace
