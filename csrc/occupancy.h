// The moving maximum of one occupancy cell, and the bits of eight.
#pragma once

#include "hd.h"

namespace mvdream_fast {
namespace MVDREAM_FAST_ISA {

// A negative entry marks a cell that no camera sees; it stays.
MVDREAM_FAST_HD float decayed(float ema, float decay) { return ema < 0 ? ema : ema * decay; }
MVDREAM_FAST_HD float raised(float ema, float value) { return ema < 0 || !(value > ema) ? ema : value; }

// Byte i of the bits: cells 8 i .. 8 i + 7, where above `limit` counts as occupied.
MVDREAM_FAST_HD uint8_t occupancy_byte(const float* ema, int64_t i, int64_t n_cells, float limit) {
  uint8_t byte = 0;
  for (int b = 0; b < 8; ++b) {
    const int64_t cell = 8 * i + b;
    if (cell < n_cells && ema[cell] >= 0 && ema[cell] > limit) byte |= static_cast<uint8_t>(1u << b);
  }
  return byte;
}

}  // namespace MVDREAM_FAST_ISA
}  // namespace mvdream_fast
