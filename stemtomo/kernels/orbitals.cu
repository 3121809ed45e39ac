// Gaussian atoms on a stack of slices, on the device: one thread per atom. REAL is the precision.

__device__ void place_orbital(REAL depth, long long slices, long long* first, REAL* behind, REAL* slope) {
  *first = 0;
  *behind = 0;
  *slope = 0;
  if (slices == 1 || depth <= 0) return;
  if (depth >= (REAL)(slices - 1)) {
    *first = slices - 2;
    *behind = 1;
    return;
  }
  *first = (long long)floor(depth);
  *behind = depth - (REAL)*first;
  *slope = 1;
}

extern "C" __global__ void render_orbitals(long long count, long long slices, long long rows, long long columns, long long radius,
                                           const REAL* u, const REAL* v, const REAL* depth, const REAL* intensity,
                                           const REAL* width, REAL* stack) {
  long long i = (long long)blockIdx.x * blockDim.x + threadIdx.x;
  if (i >= count) return;
  long long left = (long long)floor(u[i] + (REAL)0.5) - radius, top = (long long)floor(v[i] + (REAL)0.5) - radius;
  long long first;
  REAL behind, slope, b = width[i], norm = intensity[i] / ((REAL)6.283185307179586 * b * b);
  place_orbital(depth[i], slices, &first, &behind, &slope);
  for (int offset = 0; offset < 2; ++offset) {
    REAL share = offset ? behind : 1 - behind;
    if (share == 0) continue;
    REAL* image = stack + (first + offset) * rows * columns;
    for (long long y = top < 0 ? 0 : top; y <= top + 2 * radius && y < rows; ++y) {
      REAL ty = ((REAL)y - v[i]) / b, weight = share * norm * exp((REAL)-0.5 * ty * ty);
      for (long long x = left < 0 ? 0 : left; x <= left + 2 * radius && x < columns; ++x) {
        REAL tx = ((REAL)x - u[i]) / b;
        atomicAdd(image + y * columns + x, (REAL)(weight * exp((REAL)-0.5 * tx * tx)));
      }
    }
  }
}

extern "C" __global__ void gather_orbitals(long long count, long long slices, long long rows, long long columns, long long radius,
                                           const REAL* u, const REAL* v, const REAL* depth, const REAL* intensity,
                                           const REAL* width, const REAL* residual, REAL* by_intensity, REAL* by_u, REAL* by_v,
                                           REAL* by_depth, REAL* by_width) {
  long long i = (long long)blockIdx.x * blockDim.x + threadIdx.x;
  if (i >= count) return;
  long long left = (long long)floor(u[i] + (REAL)0.5) - radius, top = (long long)floor(v[i] + (REAL)0.5) - radius;
  long long first;
  REAL behind, slope, b = width[i], norm = 1 / ((REAL)6.283185307179586 * b * b);
  REAL total_0 = 0, total_x = 0, total_y = 0, total_rr = 0, difference = 0;
  place_orbital(depth[i], slices, &first, &behind, &slope);
  for (int offset = 0; offset < 2; ++offset) {
    REAL share = offset ? behind : 1 - behind, moment_0 = 0;
    if (share == 0 && slope == 0) continue;
    const REAL* image = residual + (first + offset) * rows * columns;
    for (long long y = top < 0 ? 0 : top; y <= top + 2 * radius && y < rows; ++y) {
      REAL dy = (REAL)y - v[i], weight = norm * exp((REAL)-0.5 * dy * dy / (b * b));
      for (long long x = left < 0 ? 0 : left; x <= left + 2 * radius && x < columns; ++x) {
        REAL dx = (REAL)x - u[i];
        REAL value = weight * exp((REAL)-0.5 * dx * dx / (b * b)) * image[y * columns + x];
        moment_0 += value;
        total_x += share * value * dx;
        total_y += share * value * dy;
        total_rr += share * value * (dx * dx + dy * dy);
      }
    }
    total_0 += share * moment_0;
    difference += (offset ? slope : -slope) * moment_0;
  }
  by_intensity[i] = total_0;
  by_u[i] = intensity[i] * total_x / (b * b);
  by_v[i] = intensity[i] * total_y / (b * b);
  by_depth[i] = intensity[i] * difference;
  by_width[i] = intensity[i] * (total_rr / (b * b) - 2 * total_0) / b;
}
