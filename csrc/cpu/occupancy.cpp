// update_occupancy on CPUs. A grid has few cells, so one thread does it, in one fixed order.
#include "occupancy.h"

#include "cpu/rays.h"

namespace mvdream_fast {
namespace MVDREAM_FAST_ISA {

void update_occupancy(const float* ema, int64_t n_cells, const float* values, const int64_t* cells, int64_t n_values,
                      float decay, float threshold, float* new_ema, uint8_t* bits) {
  for (int64_t i = 0; i < n_cells; ++i) new_ema[i] = cells ? ema[i] : decayed(ema[i], decay);
  // Decay the given cells from the old value first: a cell given twice must decay once.
  if (cells)
    for (int64_t i = 0; i < n_values; ++i) new_ema[cells[i]] = decayed(ema[cells[i]], decay);
  for (int64_t i = 0; i < n_values; ++i) {
    const int64_t cell = cells ? cells[i] : i;
    new_ema[cell] = raised(new_ema[cell], values[i]);
  }
  double sum = 0;
  int64_t n_seen = 0;
  for (int64_t i = 0; i < n_cells; ++i) {
    if (!(ema[i] >= 0)) continue;
    sum += new_ema[i];
    ++n_seen;
  }
  const float mean = static_cast<float>(n_seen ? sum / static_cast<double>(n_seen) : 0.0);
  const float limit = mean < threshold ? mean : threshold;
  for (int64_t i = 0; i < (n_cells + 7) / 8; ++i) bits[i] = occupancy_byte(new_ema, i, n_cells, limit);
}

}  // namespace MVDREAM_FAST_ISA
}  // namespace mvdream_fast
