// Voxels onto images and back: one thread per voxel, all tilts. Coordinates are double: a float is too coarse for large volumes.

static __device__ __forceinline__ void taps(double at, long long degree, long long* nearest, REAL* weights) {
  if (degree == 3) {
    double below = floor(at), offset = at - below, rest = 1 - offset;
    *nearest = (long long)below;
    weights[0] = (REAL)(rest * rest * rest / 6);
    weights[1] = (REAL)(2.0 / 3 - offset * offset * (2 - offset) / 2);
    weights[2] = (REAL)(2.0 / 3 - rest * rest * (2 - rest) / 2);
    weights[3] = (REAL)(offset * offset * offset / 6);
    return;
  }
  double shifted = at + 0.5, whole = floor(shifted), offset = shifted - whole, rest = 1 - offset;
  *nearest = (long long)whole;
  if (degree == 2) {
    weights[0] = (REAL)(0.5 * rest * rest);
    weights[2] = (REAL)(0.5 * offset * offset);
    weights[1] = (REAL)(1 - 0.5 * rest * rest - 0.5 * offset * offset);
  } else {
    weights[0] = (REAL)(offset < 0.5 ? 0.5 - offset : 0);
    weights[2] = (REAL)(offset > 0.5 ? offset - 0.5 : 0);
    weights[1] = (REAL)(1 - (offset < 0.5 ? 0.5 - offset : offset - 0.5));
  }
}

static __device__ __forceinline__ long long count_of(long long degree) { return degree == 3 ? 4 : 3; }

static __device__ __forceinline__ double locate(const double* line, long long x, long long y, long long z) {
  return line[0] * x + line[1] * y + line[2] * z + line[3];
}

extern "C" __global__ void splat_voxels(long long count, long long depth, long long height, long long width, long long tilts,
                                        long long rows, long long columns, long long degree, long long masked,
                                        const double* placements, const bool* support, const REAL* block, REAL* images) {
  long long i = (long long)blockIdx.x * blockDim.x + threadIdx.x;
  if (i >= count || (masked && !support[i])) return;
  REAL value = block[i];
  if (value == 0) return;
  long long x = i % width, y = (i / width) % height, z = i / (width * height);
  for (long long tilt = 0; tilt < tilts; ++tilt) {
    long long column, row;
    REAL a[4], b[4];
    taps(locate(placements + 8 * tilt, x, y, z), degree, &column, a);
    taps(locate(placements + 8 * tilt + 4, x, y, z), degree, &row, b);
    for (long long v = 0; v < count_of(degree); ++v) {
      if (row + v < 1 || row + v > rows) continue;
      for (long long u = 0; u < count_of(degree); ++u) {
        if (column + u < 1 || column + u > columns) continue;
        atomicAdd(images + (tilt * rows + row + v - 1) * columns + column + u - 1, value * a[u] * b[v]);
      }
    }
  }
}

extern "C" __global__ void gather_voxels(long long count, long long depth, long long height, long long width, long long tilts,
                                         long long rows, long long columns, long long degree, long long masked,
                                         const double* placements, const bool* support, REAL* block, const REAL* images) {
  long long i = (long long)blockIdx.x * blockDim.x + threadIdx.x;
  if (i >= count || (masked && !support[i])) return;
  long long x = i % width, y = (i / width) % height, z = i / (width * height);
  REAL total = 0;
  for (long long tilt = 0; tilt < tilts; ++tilt) {
    long long column, row;
    REAL a[4], b[4];
    taps(locate(placements + 8 * tilt, x, y, z), degree, &column, a);
    taps(locate(placements + 8 * tilt + 4, x, y, z), degree, &row, b);
    for (long long v = 0; v < count_of(degree); ++v) {
      if (row + v < 1 || row + v > rows) continue;
      REAL line = 0;
      for (long long u = 0; u < count_of(degree); ++u) {
        if (column + u < 1 || column + u > columns) continue;
        line += a[u] * images[(tilt * rows + row + v - 1) * columns + column + u - 1];
      }
      total += b[v] * line;
    }
  }
  block[i] += total;
}
