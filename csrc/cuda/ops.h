// Entry points of the CUDA backend, op by op those of csrc/cpu with a stream instead of a number of threads. Pointers
// are device memory; calls return when the work is queued, unless a result by value says that they wait for it.
#pragma once

#include <cstdint>

#include "cpu/field.h"
#include "cpu/rays.h"
#include "cpu/scan.h"
#include "shape_types.h"

struct CUstream_st;  // as the CUDA headers declare it, so that the bindings need none of them

namespace mvdream_fast::cuda {

// Where and how work runs.
struct Queue {
  CUstream_st* stream = nullptr;
  bool deterministic = false;  // sums into the table in fixed point, which any order of the threads leaves alike
  bool tf32 = false;           // one tensor-core GEMM for a float32 one, to 10 bits, instead of three, to 20
  int device = -1;             // of the stream and of every pointer; -1 for the one that is current
};

// The MarchStatus of rays, waiting for it. The samples of each ray, [R], none where one cannot be marched, and in
// `status` the highest MarchStatus of all: the caller reads it when it reads how many samples there are.
int march_status(const MarchArgs& args, Queue queue);
void march_count(const MarchArgs& args, int64_t* counts, int64_t* status, Queue queue);
void march_fill(const MarchArgs& args, const int64_t* packed_info, float* t_starts, float* t_ends, Queue queue);
void sample_positions(const Packed& samples, const float* rays_o, const float* rays_d, float* positions, Queue queue);
void prune_count(const Packed& samples, const float* sigmas, double least, double most, uint8_t* keep, int64_t* counts,
                 Queue queue);
void prune_fill(const Packed& samples, const uint8_t* keep, const int64_t* packed_info, float* t_starts, float* t_ends,
                Queue queue);

void update_occupancy(const float* ema, int64_t n_cells, const float* values, const int64_t* cells, int64_t n_values,
                      float decay, float threshold, float* new_ema, uint8_t* bits, Queue queue);

// As on the CPU, but true: a NaN position makes NaN features instead of an error, which would have to wait for it.
bool hash_encode_forward(const HashGrid& grid, const float* table, const float* positions, int64_t n, float* out,
                         Queue queue);
bool hash_encode_backward(const HashGrid& grid, const float* table, const float* positions, int64_t n,
                          const float* d_out, float* d_table, float* d_positions, Queue queue);

bool field_forward(const Field& field, const float* positions, int64_t n, float* sigmas, float* rgb, Queue queue);
bool field_backward(const Field& field, const float* positions, int64_t n, const float* d_sigmas, const float* d_rgb,
                    const FieldGradients& gradients, Queue queue);

// The pixels of rays through a field with early termination, thresholds as in prune_count; waits for the number of
// samples evaluated, which it returns.
int64_t render(const Field& field, const MarchArgs& march, double least, double most, const float* background,
               int64_t background_stride, float* rgb, float* opacity, float* depth, Queue queue);

// Of a packing that is none every ray takes what lies within the samples.
void packed_scan(const ScanArgs& args, Queue queue);
void packed_product_backward(const ScanArgs& args, const void* d_out, Queue queue);

// The status must be 0 before.
void traverse(const TraverseArgs& args, Queue queue);

void composite_forward(const Packed& samples, const CompositeForward& args, Queue queue);
void composite_backward(const Packed& samples, const CompositeBackward& args, Queue queue);

// As on the CPU, but always kRasterFine: vertices that are no numbers, and triangles and vertices that there are not,
// are left out instead of refused, which would have to wait for them.
int rasterize_forward(const Meshes& meshes, float* rast, float* rast_db, Queue queue);
void rasterize_backward(const Meshes& meshes, const float* rast, const float* d_rast, const float* d_db, float* d_pos,
                        Queue queue);
int interpolate_forward(const Attributes& args, float* out, float* out_da, Queue queue);
void interpolate_backward(const Attributes& args, const float* d_out, const float* d_out_da, float* d_attr,
                          float* d_rast, float* d_db, Queue queue);
int antialias_forward(const Silhouettes& args, const float* color, int32_t* crossings, float* out, Queue queue);
void antialias_backward(const Silhouettes& args, const float* color, const int32_t* crossings, const float* d_out,
                        float* d_color, float* d_pos, Queue queue);
void texture_forward(const Textured& args, float* out, Queue queue);
void texture_backward(const Textured& args, const float* d_out, float* d_tex, float* d_uv, float* d_da, Queue queue);

}  // namespace mvdream_fast::cuda
