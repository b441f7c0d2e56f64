// The gated GELU on CPUs: value * gate * Phi(gate), element by element, so any number of threads gives the same bits.
#include "cpu/geglu.h"

#include "activations.h"

namespace mvdream_fast {
namespace MVDREAM_FAST_ISA {

// Below this many elements a thread costs more than it saves.
constexpr int64_t kSerial = 16384;

// Runs body(row, column, n) for every vector of n <= kLanes neighbours; n is kLanes except at a row's end.
template <typename Body>
static inline void for_vectors(int64_t n_rows, int64_t n_columns, int n_threads, Body body) {
#pragma omp parallel for schedule(static) num_threads(n_threads) if (n_rows * n_columns > kSerial)
  for (int64_t row = 0; row < n_rows; ++row) {
    int64_t column = 0;
    for (; column + kLanes <= n_columns; column += kLanes) body(row, column, int64_t(kLanes));
    if (column < n_columns) body(row, column, n_columns - column);
  }
}

void geglu_forward(const float* x, int64_t n_rows, int64_t n_columns, float* y, int n_threads) {
  for_vectors(n_rows, n_columns, n_threads, [=](int64_t row, int64_t column, int64_t n) {
    const float* at = x + 2 * row * n_columns + column;
    const VecF value = load_first(at, n), gate = load_first(at + n_columns, n);
    store_first(y + row * n_columns + column, value * (gate * normal(gate).below), n);
  });
}

void geglu_backward(const float* d_y, const float* x, int64_t n_rows, int64_t n_columns, float* d_x, int n_threads) {
  for_vectors(n_rows, n_columns, n_threads, [=](int64_t row, int64_t column, int64_t n) {
    const int64_t at = 2 * row * n_columns + column;
    const VecF value = load_first(x + at, n), gate = load_first(x + at + n_columns, n);
    const VecF d = load_first(d_y + row * n_columns + column, n);
    const Normal phi = normal(gate);
    store_first(d_x + at, d * (gate * phi.below), n);
    store_first(d_x + at + n_columns, d * (value * (phi.below + gate * phi.density)), n);
  });
}

}  // namespace MVDREAM_FAST_ISA
}  // namespace mvdream_fast
