// Which triangles are neighbours, on CPUs: a hash table of edges, where a sort of them would take several times as
// long.
#include <algorithm>
#include <vector>

#include "cpu/shapes.h"

namespace mvdream_fast {
namespace MVDREAM_FAST_ISA {
namespace {

// Edge i is opposite to corner i % 3 of triangle i / 3; an edge is the same whichever end comes first.
struct Edge {
  uint32_t low, high;
  Edge(const int32_t* tri, int64_t i) {
    const int32_t* face = tri + i / 3 * 3;
    const uint32_t a = face[(i + 1) % 3], b = face[(i + 2) % 3];
    low = std::min(a, b);
    high = std::max(a, b);
  }
  bool operator==(const Edge& other) const { return low == other.low && high == other.high; }
  uint64_t mixed() const { return (uint64_t(low) << 32 | high) * 0x9e3779b97f4a7c15u >> 32; }
};

}  // namespace

void edge_topology(const int32_t* tri, int64_t n_faces, int32_t* opposite, int n_threads) {
  const int64_t n_edges = 3 * n_faces;
  uint64_t n_heads = 1;
  while (n_heads < uint64_t(n_edges)) n_heads *= 2;
  std::vector<int32_t> heads(n_heads, -1), next(n_edges);  // chains of edges with the same place in the table
  for (int64_t i = 0; i < n_edges; ++i) {
    int32_t& head = heads[Edge(tri, i).mixed() & (n_heads - 1)];
    next[i] = head;
    head = int32_t(i);
  }
#pragma omp parallel for schedule(static) num_threads(n_threads)
  for (int64_t i = 0; i < n_edges; ++i) {
    const Edge edge(tri, i);
    int n_others = edge.low == edge.high ? 2 : 0;
    int32_t other = -1;
    for (int32_t j = heads[edge.mixed() & (n_heads - 1)]; j >= 0 && n_others < 2; j = next[j]) {
      if (j == i || !(Edge(tri, j) == edge)) continue;
      other = tri[j];
      ++n_others;
    }
    opposite[i] = n_others == 1 ? other : -1;
  }
}

}  // namespace MVDREAM_FAST_ISA
}  // namespace mvdream_fast
