// The scan of an occupancy grid that a march on CPUs starts with: which blocks hold anything, and where that begins.
#include <cstring>

#include "cpu/rays.h"
#include "march.h"

namespace mvdream_fast {
namespace MVDREAM_FAST_ISA {

constexpr int kWord = 64, kBlocksOfWord = kWord / kBlock;  // cells along z that are looked at together
constexpr uint64_t kEvenNibbles = UINT64_C(0x0f0f0f0f0f0f0f0f);

// n <= 64 bits from bit `i` on; bit 0 of the result is bit i. Bytes become words as a little-endian machine reads them.
static inline uint64_t load_bits(const uint8_t* bits, int64_t n_bytes, int64_t i, int n) {
  const int64_t byte = i >> 3, left = n_bytes - byte;
  const int shift = static_cast<int>(i & 7);
  uint64_t word = 0;
  if (left >= 8) {
    std::memcpy(&word, bits + byte, 8);
  } else {
    std::memcpy(&word, bits + byte, static_cast<size_t>(left));
  }
  word >>= shift;
  if (shift != 0 && left > 8) word |= static_cast<uint64_t>(bits[byte + 8]) << (kWord - shift);
  return n < kWord ? word & ((UINT64_C(1) << n) - 1) : word;
}

// Set bits of each four neighbours, in their place.
static inline uint64_t count_nibbles(uint64_t word) {
  word -= word >> 1 & UINT64_C(0x5555555555555555);
  return (word & UINT64_C(0x3333333333333333)) + (word >> 2 & UINT64_C(0x3333333333333333));
}

static inline void include(GridScan* scan, int axis, int cell) {
  if (cell < scan->first[axis]) scan->first[axis] = cell;
  if (cell > scan->last[axis]) scan->last[axis] = cell;
}

// The rows of up to 4 x 4 cells across that share their blocks, word by word along z: sums of 16 rows fit a byte.
static void scan_rows(const MarchArgs& args, const int* block, int64_t n_bytes, GridScan* scan, uint8_t* out) {
  const int *n = args.resolution, n_blocks = (n[2] + kBlock - 1) / kBlock;
  for (int z = 0; z < n[2]; z += kWord) {
    const int width = n[2] - z < kWord ? n[2] - z : kWord;
    uint64_t even = 0, odd = 0, any = 0;
    for (int x = kBlock * block[0]; x < n[0] && x < kBlock * (block[0] + 1); ++x)
      for (int y = kBlock * block[1]; y < n[1] && y < kBlock * (block[1] + 1); ++y) {
        const int64_t row = static_cast<int64_t>(x) * n[1] + y;
        const uint64_t word = load_bits(args.bits, n_bytes, row * n[2] + z, width);
        if (word == 0) continue;
        any |= word;
        include(scan, 0, x);
        include(scan, 1, y);
        const uint64_t counts = count_nibbles(word);
        even += counts & kEvenNibbles;
        odd += counts >> 4 & kEvenNibbles;
      }
    if (any == 0) continue;
    for (int i = 0; i < kWord; ++i)
      if (any >> i & 1) include(scan, 2, z + i);
    for (int i = 0; i < kBlocksOfWord && z / kBlock + i < n_blocks; ++i) {
      const int count = static_cast<int>((i % 2 ? odd : even) >> 8 * (i / 2) & 0xff);
      out[z / kBlock + i] = count == 0 ? kBlockEmpty : count == kBlock * kBlock * kBlock ? kBlockFull : kBlockMixed;
    }
  }
}

void scan_grid(const MarchArgs& args, GridScan* scan) {
  int64_t n_blocks[3], n_cells = 1;
  for (int a = 0; a < 3; ++a) {
    n_blocks[a] = (args.resolution[a] + kBlock - 1) / kBlock;
    n_cells *= args.resolution[a];
    scan->first[a] = args.resolution[a];
    scan->last[a] = -1;
  }
  scan->blocks.assign(static_cast<size_t>(n_blocks[0] * n_blocks[1] * n_blocks[2]), kBlockEmpty);
  int block[2];
  for (block[0] = 0; block[0] < n_blocks[0]; ++block[0])
    for (block[1] = 0; block[1] < n_blocks[1]; ++block[1]) {
      uint8_t* out = scan->blocks.data() + (block[0] * n_blocks[1] + block[1]) * n_blocks[2];
      scan_rows(args, block, (n_cells + 7) / 8, scan, out);
    }
}

}  // namespace MVDREAM_FAST_ISA
}  // namespace mvdream_fast
